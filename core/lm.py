"""The RQ-Transformer (paper §3.4): one vector per frame in, one column of tokens out.

Input of a frame: the sum of the embeddings of its K streams (audio first, then text, then
conditions: in bfloat16 the order counts). The temporal transformer turns it into h, from which
text is predicted; the depth transformer turns h and the text token into the codes of the model's
voice. Codes are what is predicted and sent; of a voice that is given a model may hear what its
codes leave of it, too (`LmConfig.residual`; not in the paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.attention import CrossCache, Layer, Transformer, TransformerState
from moshi_cli.core.conditioning import Conditioning, Conditions, Value
from moshi_cli.core.config import LmConfig
from moshi_cli.core.depth import DepthTransformer, StackedLinear, TextEmbedding
from moshi_cli.core.layers import Linear, make_norm, table
from moshi_cli.core.sampling import Noise, Sampling


class MoshiLm(nn.Module):
    """K token streams -> text logits and, with a depth transformer, the codes of a voice."""

    def __init__(self, config: LmConfig):
        super().__init__()
        self.config = config
        D, C = config.temporal.dim, config.codebook_size
        width = config.low_rank or D
        self.emb = table(config.n_q, C + 1, width, std=D**-0.5)
        self.emb_out = StackedLinear(config.n_q, width, D) if config.low_rank else None
        self.residual = Linear(2 * config.residual, D) if config.residual else None
        self.text_emb = TextEmbedding(config.text_vocab + 1, D, demux=config.demux)
        self.transformer = Transformer(config.temporal)
        self.out_norm = make_norm(config.temporal.norm, D)
        self.text_linear = Linear(D, config.text_classes)
        self.depth = DepthTransformer(config) if config.depth is not None else None
        self.extra = nn.ModuleList(
            nn.Linear(D, config.extra_classes, bias=False) for _ in range(config.extra_heads)
        )
        self.conditioning = Conditioning(config.conditions, config.fuser, D)

    @property
    def like(self) -> Tensor:
        """A tensor of its type, where it is."""
        return self.text_emb.table

    def init_state(
        self, slots: int, *, dtype: torch.dtype, device: torch.device | str, chunk: int = 1
    ) -> TransformerState:
        """Fresh temporal state; chunk: frames per call computed at once (see Transformer)."""
        return self.transformer.init_state(slots, dtype=dtype, device=device, chunk=chunk)

    def condition(self, values: Sequence[Mapping[str, Value]]) -> Conditions:
        """One mapping per slot, condition -> value (missing: nothing) -> fused conditions."""
        total, source = self.conditioning.fuse(self.conditioning.encode(values))
        like = self.like
        cross: list[CrossCache] = []
        if source is not None:
            source = source.to(like.dtype)
            for layer in self.transformer.layers:
                assert isinstance(layer, Layer) and layer.cross is not None
                cross.append(layer.cross.prepare(source))
        return Conditions(None if total is None else total.to(like.dtype), cross)

    def embed(self, inputs: Tensor) -> Tensor:
        """inputs long[B, K, T], text first, -1 for nothing -> [B, T, D]."""
        codes = inputs[:, 1:].transpose(0, 1)  # [n_q, B, T]
        books, rows, width = self.emb.shape
        offset = torch.arange(books, device=codes.device)[:, None, None] * rows
        each = F.embedding(codes.clamp(min=0) + offset, self.emb.view(-1, width))
        each = each * (codes >= 0)[..., None]
        if self.emb_out is not None:
            each = self.emb_out(each.flatten(1, 2), tuple(range(books))).view(*codes.shape, -1)
        # [n_q, B, T, D]
        x = each[0]
        for more in each[1:]:
            x = x + more
        return x + self.text_emb(inputs[:, 0])

    def temporal(
        self,
        inputs: Tensor,
        state: TransformerState | None = None,
        active: Tensor | None = None,
        conditions: Conditions | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """inputs long[B, K, T] -> h [B, T, D] (after the last norm), text logits [B, T, V].

        residual [B, T, 2 · config.residual]: what the codes of the given voice leave, as late as
        they are; None: nothing is known of it.

        State None: training or offline, T columns at once. active bool[B]: paused slots compute but
        do not advance. `conditions` is required if the model has any.
        """
        assert inputs.shape[1] == self.config.streams, (inputs.shape, self.config.streams)
        assert conditions is not None or not self.config.conditions, "conditions are missing"
        x = self.embed(inputs)
        if residual is not None:
            assert self.residual is not None
            x = x + self.residual(residual.to(x.dtype))
        sources = None
        if conditions is not None:
            if conditions.sum is not None:
                x = x + conditions.sum
            sources = conditions.cross or None
        h = self.out_norm(self.transformer(x, state, active, sources))
        return h, self.text_linear(h)

    def depth_logits(self, h: Tensor, targets: Tensor) -> Tensor:
        """h [B, T, D], targets long[B, 1 + Q, T] (text first) -> [B, Q, T, C]."""
        assert self.depth is not None
        return self.depth(h, targets)

    def depth_sample(
        self,
        h: Tensor,
        text: Tensor,
        sampling: Sampling,
        noise: Noise | None = None,
        codebooks: int | None = None,
    ) -> Tensor:
        """One frame: h [B, D], text long[B] -> codes long[B, Q]; see DepthTransformer.sample."""
        assert self.depth is not None
        return self.depth.sample(h, text, sampling, noise, codebooks)[0]

    def extra_probabilities(self, h: Tensor) -> Tensor:
        """h [B, T, D] -> [B, T, heads, classes], e.g. the pause detector of the STT."""
        return torch.stack([head(h).softmax(-1) for head in self.extra], 2)
