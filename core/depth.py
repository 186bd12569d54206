"""The depth transformer (paper §3.4.2): the codebooks of one frame, one after the other.

Width d, a position per codebook but no position embedding, weights picked by a schedule. Position
k reads the temporal output h and the token before it: text for k = 0, else code k - 1. Its cache
lives and dies within a frame, so there is no streaming state. Two paths, equal in result:
`forward` knows all tokens and does the Q codebooks at once, `sample` makes them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core import native
from moshi_cli.core.config import DepthConfig, LmConfig
from moshi_cli.core.layers import gated_width, make_norm, project, table
from moshi_cli.core.sampling import Noise, Sampling, choose, guide

Product = Callable[[Tensor], Tensor]  # rows [N, in] -> [N, out]


class TextEmbedding(nn.Module):
    """Text ids [...] -> [..., D]; -1 gives zero. `demux`: an id may hold two tokens.

    With E rows, id = left + (right + 1) · E. Both halves use one table and a projection each.
    """

    def __init__(self, rows: int, dim: int, low_rank: int | None = None, demux: bool = False):
        super().__init__()
        width = low_rank or dim
        self.table = table(rows, width, std=dim**-0.5)
        self.demux = demux
        self.low_rank = nn.Linear(width, dim, bias=False) if low_rank else None
        self.left = nn.Linear(width, dim, bias=False) if demux else None
        self.right = nn.Linear(width, dim, bias=False) if demux else None

    def forward(self, ids: Tensor) -> Tensor:
        rows, there = self.table.shape[0], (ids >= 0)[..., None]
        if self.left is None or self.right is None:
            x = F.embedding(ids.clamp(min=0), self.table) * there
            return x if self.low_rank is None else self.low_rank(x)
        left, right = ids % rows, ids.div(rows, rounding_mode="floor") - 1
        y = self.left(F.embedding(left, self.table))
        second = self.right(F.embedding(right.clamp(min=0), self.table))
        return (y + second * (right >= 0)[..., None]) * there


def by_set(weight: Tensor, x: Tensor, schedule: tuple[int, ...]) -> Tensor:
    """weight [W, out, in]; x [Q, N, in] or [N, in] (the same for all) -> [Q, N, out]."""
    if x.dim() == 2:
        x = x.expand(len(schedule), *x.shape)
    if len(weight) == 1:
        return F.linear(x, weight[0])
    if schedule != tuple(range(len(weight))):
        weight = weight[torch.tensor(schedule, device=weight.device)]
    return torch.bmm(x, weight.transpose(1, 2))


class StackedLinear(nn.Module):
    """W bias-free linear layers, one per weight set. weight [W, out, in]"""

    sets: list[Product] | None = None  # if packed (see packing.py): the layers one by one

    def __init__(self, sets: int, into: int, out: int):
        super().__init__()
        weight = torch.empty(sets, out, into).uniform_(-1, 1)
        self.weight = nn.Parameter(weight if weight.is_meta else weight * into**-0.5)  # see `table`

    def forward(self, x: Tensor, schedule: tuple[int, ...]) -> Tensor:
        """x [Q, N, in] or [N, in] (the same for all) -> [Q, N, out], position k by its set."""
        if self.sets is not None:
            rows = x.expand(len(schedule), *x.shape) if x.dim() == 2 else x
            return torch.stack([self.sets[w](y) for w, y in zip(schedule, rows, strict=True)])
        return by_set(self.weight, x, schedule)

    def one(self, x: Tensor, which: int) -> Tensor:
        """x [N, in] -> [N, out] by one set."""
        return self.pick(which)(x)

    def pick(self, which: int) -> Product:
        """One set as a function."""
        if self.sets is not None:
            return self.sets[which]
        return partial(project, weight=self.weight[which])


@dataclass
class DepthSet:
    """What a codebook uses of one layer."""

    norm1: Product
    qkv: Product
    out: Product
    norm2: Product
    up: Product
    down: Product


@dataclass
class DepthStep:
    """What a codebook uses of the whole depth transformer."""

    into: Product
    sets: list[DepthSet]
    norm: Product | None
    head: Product
    native: native.Stack | None = None  # the layers at once, for a single row


class DepthLayer(nn.Module):
    """Pre-norm block over the codebooks of a frame; norms are shared, matrices are per set."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        d, sets = config.dim, max(config.schedule) + 1
        hidden = gated_width(d, config.ff) if config.gated else config.ff
        self.gated, self.repeat = config.gated, config.kv_repeat
        self.numbered = config.numbered  # how files name the weight sets
        self.head_dim = d // config.heads
        self.split = [config.heads, *[config.heads // config.kv_repeat] * 2]
        self.norm1 = make_norm(config.norm, d)
        self.qkv = StackedLinear(sets, d, sum(self.split) * self.head_dim)
        self.out = StackedLinear(sets, d, d)
        self.norm2 = make_norm(config.norm, d)
        self.up = StackedLinear(sets, d, 2 * hidden if config.gated else hidden)
        self.down = StackedLinear(sets, hidden, d)

    def act(self, x: Tensor) -> Tensor:
        """[..., 2H] -> [..., H] gated, else [..., H] -> [..., H]."""
        if not self.gated:
            return F.gelu(x)
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value

    def repeated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H + 2 Hkv, Q, Dh] -> q, k, v, each [N, H, Q, Dh]."""
        q, k, v = torch.split_with_sizes(qkv, self.split, 1)
        if self.repeat > 1:
            k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        return q, k, v

    def forward(self, x: Tensor, schedule: tuple[int, ...]) -> Tensor:
        """x [Q, N, d] -> [Q, N, d], causal over Q."""
        Q, N, d = x.shape
        qkv = self.qkv(self.norm1(x), schedule).view(Q, N, -1, self.head_dim)
        q, k, v = self.repeated(qkv.permute(1, 2, 0, 3))  # [N, H, Q, Dh]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.permute(2, 0, 1, 3).reshape(Q, N, d), schedule)
        return x + self.down(self.act(self.up(self.norm2(x), schedule)), schedule)

    def pick(self, which: int) -> DepthSet:
        """Its parts for one weight set."""
        return DepthSet(
            self.norm1.forward, self.qkv.pick(which), self.out.pick(which),
            self.norm2.forward, self.up.pick(which), self.down.pick(which),
        )  # fmt: skip

    def one(self, x: Tensor, use: DepthSet, k: int, past: Tensor) -> Tensor:
        """x [N, d], codebook k of each frame.

        past: q, k, v [N, H + 2 Hkv, Q, Dh] of the codebooks before, extended here.
        """
        past.select(2, k).copy_(use.qkv(use.norm1(x)).view(x.shape[0], -1, self.head_dim))
        q, keys, v = self.repeated(past.narrow(2, 0, k + 1))
        # [N, H, 1, Dh]; the first has itself alone to look at
        y = F.scaled_dot_product_attention(q.narrow(2, k, 1), keys, v) if k else v
        x = x + use.out(y.reshape(x.shape))
        return x + use.down(self.act(use.up(use.norm2(x))))


class DepthTransformer(nn.Module):
    """h [B, T, D] and the text token -> the Q codes of the voice."""

    steps: list[DepthStep] | None = None  # if packed: what `plan` gave
    rows = 1  # that a frame is computed for at least: kernels for one are slower where it is packed

    def __init__(self, lm: LmConfig):
        super().__init__()
        config = lm.depth
        assert config is not None
        d, Q, C = config.dim, lm.dep_q, lm.codebook_size
        self.config = config
        self.inputs = StackedLinear(max(config.inputs) + 1, lm.temporal.dim, d)
        self.text_emb = TextEmbedding(lm.text_vocab + 1, d, config.low_rank, lm.demux)
        width = config.low_rank or d
        self.emb = table(Q - 1, C + 1, width, std=d**-0.5)
        self.emb_out = StackedLinear(Q - 1, width, d) if config.low_rank else None
        self.layers = nn.ModuleList(DepthLayer(config) for _ in range(config.layers))
        kind = config.norm_out
        self.norms = nn.ModuleList(make_norm(kind, d) for _ in range(Q)) if kind else None
        self.heads = StackedLinear(Q, d, C)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens before each position, long[Q, N] (text first) -> [Q, N, d]; -1 gives zero."""
        codes = tokens[1:]  # [Q - 1, N]
        books, rows, width = self.emb.shape
        offset = torch.arange(books, device=codes.device)[:, None] * rows
        x = F.embedding(codes.clamp(min=0) + offset, self.emb.view(-1, width))
        x = x * (codes >= 0)[..., None]
        if self.emb_out is not None and books:
            x = self.emb_out(x, tuple(range(books)))
        return torch.cat([self.text_emb(tokens[0])[None], x])

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """Teacher forcing: h [B, T, D], targets long[B, 1 + Q, T] (text first) -> [B, Q, T, C]."""
        B, T, D = h.shape
        Q = len(self.config.schedule)
        tokens = targets[:, :Q].permute(1, 0, 2).reshape(Q, B * T)
        x = self.inputs(h.reshape(B * T, D), self.config.inputs) + self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.config.schedule)
        if self.norms is not None:
            x = torch.stack([norm(y[None])[0] for norm, y in zip(self.norms, x, strict=True)])
        logits = self.heads(x, tuple(range(Q)))  # [Q, N, C]
        return logits.view(Q, B, T, -1).transpose(0, 1)

    def plan(self) -> list[DepthStep]:
        """Who does what, codebook by codebook."""
        layers, c = cast(list[DepthLayer], list(self.layers)), self.config
        return [
            DepthStep(
                self.inputs.pick(c.inputs[k]), [layer.pick(which) for layer in layers],
                None if self.norms is None else self.norms[k].forward, self.heads.pick(k),
            )
            for k, which in enumerate(c.schedule)
        ]  # fmt: skip

    def embed_one(self, k: int, token: Tensor) -> Tensor:
        """The token before position k, long[N] -> [N, d]."""
        if k == 0:
            return self.text_emb(token)
        x = F.embedding(token.clamp(min=0), self.emb[k - 1]) * (token >= 0)[:, None]
        return x if self.emb_out is None else self.emb_out.one(x, k - 1)

    def sample(
        self,
        h: Tensor,
        text: Tensor,
        sampling: Sampling,
        noise: Noise | None = None,
        codebooks: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One frame: h [B, D] ([2B, D] if guided, null half last), text long[B].

        -> codes long[B, q], logits float32 [B, q, C] they were chosen from; q = codebooks or Q.
        """
        count, N = codebooks or len(self.config.schedule), len(h)
        layers = cast(list[DepthLayer], list(self.layers))
        if N == 1 < self.rows:
            h = h.repeat(self.rows, 1)
        size = (len(layers), len(h), sum(layers[0].split), count, layers[0].head_dim)
        past = h.new_empty(size).unbind()
        token, codes, kept, caches = text, [], [], None
        steps = self.steps or self.plan()
        if len(h) <= native.ROWS and steps[0].native is not None:
            caches = native.Caches([tuple(c.split(layers[0].split, 1)[1:]) for c in past])
            slots = torch.arange(len(h))
        for k, step in enumerate(steps[:count]):
            seen = torch.cat([token, token]) if sampling.guided else token
            x = step.into(h) + self.embed_one(k, seen)
            if caches is not None and step.native is not None:
                x = step.native.step(x, caches, count, torch.full_like(slots, k), slots, None)
            else:
                for layer, use, cache in zip(layers, step.sets, past, strict=True):
                    x = layer.one(x, use, k, cache)
            if step.norm is not None:
                x = step.norm(x)
            logits = step.head(x)[:N]
            logits = guide(logits, sampling.guidance) if sampling.guided else logits
            logits = logits.float()
            token = choose(logits, sampling.temp, sampling.top_k, sampling.top_p, noise, 1 + k)
            codes.append(token)
            kept.append(logits)
        return torch.stack(codes, 1), torch.stack(kept, 1)
