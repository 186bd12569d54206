"""What `moshi bench` measures: published sizes by name with random weights, and made-up inputs.

Random weights keep activations near 1 from end to end, so that two implementations can be compared
number by number; nothing is downloaded. Inputs depend on the seed alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moshi_cli.core.config import MIMI_NANO, DepthConfig, LmConfig, MimiConfig, ModelConfig
from moshi_cli.core.errors import UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.presets import EIGHT, PRESETS, delays, temporal
from moshi_cli.core.vq import Codebook
from moshi_cli.core.weights import allocate

BLOCK = 1_000_003  # random numbers that are drawn; tensors repeat them from different places on
SPREAD = 0.2  # of the centroids, for latents of size 1: residuals shrink level by level
LOUDNESS = 0.1  # of the made-up sound

SMALL = ModelConfig(  # what runs in real time on one core of most machines
    lm=LmConfig(
        temporal=temporal(512, 8, 8, 3000, 10_000),
        depth=DepthConfig(256, 8, 6, 1056, EIGHT, EIGHT),
        n_q=16, dep_q=8, delays=delays(1, 8, 8), text_vocab=32_000, text_classes=32_000,
    ),
    lags={"chat": 0.0},
)  # fmt: skip
SHAPES = {
    **PRESETS, "small": SMALL, "mimi": ModelConfig(), "mimi-nano": ModelConfig(mimi=MIMI_NANO),
}  # fmt: skip


def shape(name: str, *, layers: int | None = None, context: int | None = None) -> ModelConfig:
    """A size by name; layers, context: of the temporal transformer instead. UsageError."""
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SHAPES)}"
        raise UsageError(f"there is no size {name!r}", hint)
    return resized(SHAPES[name], layers, context)


def resized(config: ModelConfig, layers: int | None, context: int | None) -> ModelConfig:
    """With another number of layers or another context; as it is where these are None."""
    if config.lm is None:
        return config
    changed: dict[str, Any] = {"layers": layers, "context": context}
    stack = replace(config.lm.temporal, **{k: v for k, v in changed.items() if v is not None})
    return replace(config, lm=replace(config.lm, temporal=stack))


# Random weights -----------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter: matrices by N(0, 1 / inputs), embeddings by N(0, 1 / 4), norms by 1."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
    at = 0
    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "scale":  # of a layer scale
            p.fill_(0.01)
        elif leaf == "bias":
            p.zero_()
        elif "norm" in name:
            p.fill_(1.0)
        else:
            table = leaf in ("emb", "table")
            tile(p, block, at, 0.5 if table else p.shape[-1] ** -0.5)
            at = (at + p.numel()) % BLOCK


def tile(target: Tensor, block: Tensor, at: int, scale: float) -> None:
    """Write the numbers of `block`, again and again, from place `at` on."""
    flat = target.view(-1)
    own = (block.roll(-at) * scale).to(flat.dtype).to(flat.device)
    for i in range(0, len(flat), BLOCK):
        piece = flat[i : i + BLOCK]
        piece.copy_(own[: len(piece)])


def random_lm(config: LmConfig, dtype: torch.dtype, device: torch.device, seed: int) -> MoshiLm:
    """A language model that says nothing. MemoryLimitError before it would not fit."""
    with torch.device("meta"):
        lm = MoshiLm(config)
    lm.to(dtype).conditioning.float()
    allocate(lm, device, "random weights")
    randomise(lm, seed)
    return lm.eval().requires_grad_(False)


def random_mimi(config: MimiConfig, device: torch.device, seed: int) -> Mimi:
    """A codec that makes something of everything, in float32."""
    generator = torch.Generator().manual_seed(seed)
    mimi = Mimi(config)
    randomise(mimi, seed)
    mimi.init_weights(generator)
    for book in mimi.modules():
        if isinstance(book, Codebook):
            book.embedding_sum.normal_(std=SPREAD, generator=generator)
            book.cluster_usage.fill_(1.0)
            book.initialized.fill_(1.0)
    mimi.to(device).quantizer.refresh()
    return mimi.eval().requires_grad_(False)


# Inputs -------------------------------------------------------------------------------------------


def sound(batch: int, samples: int, seed: int) -> NDArray[np.float32]:
    """Noise, float32 [B, 1, S]."""
    drawn = np.random.default_rng(seed).standard_normal((batch, 1, samples), dtype=np.float32)
    return LOUDNESS * drawn


def codes(shape: Sequence[int], entries: int, seed: int) -> NDArray[np.int64]:
    """Random codes below `entries`."""
    return np.random.default_rng(seed).integers(entries, size=tuple(shape))


# What a step reads --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """Bytes that a step must read from memory at least once."""

    weights: int
    cache: int = 0  # keys and values

    def record(self) -> dict[str, float]:
        """In megabytes."""
        return {"weights_mb": round(self.weights / 1e6, 3), "cache_mb": round(self.cache / 1e6, 3)}


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stack_cache(config: Any, batch: int, element: int, more: int = 0) -> int:
    """Bytes of the keys and values of a transformer's whole ring."""
    width = config.dim // config.kv_repeat
    return 2 * config.layers * batch * (config.context + more) * width * element


def lm_reads(lm: MoshiLm, batch: int) -> Reads:
    """Of one step: every matrix once, of tables the rows that are looked up."""
    tables = {"emb", "text_emb.table", "depth.emb", "depth.text_emb.table"}
    weights, c = 0, lm.config
    for name, p in lm.named_parameters():
        if name.startswith("conditioning"):
            continue
        if name in tables:
            rows = batch * (p.shape[0] if name.endswith("emb") else 1)
            weights += rows * p.shape[-1] * p.element_size()
        else:
            weights += size(p)
    return Reads(weights, stack_cache(c.temporal, batch, lm.like.element_size()))


def codec_reads(mimi: Mimi, batch: int) -> tuple[Reads, Reads]:
    """Of one streamed frame: (encode, decode)."""
    vq, c, q = mimi.quantizer, mimi.config, mimi.num_codebooks
    cache = stack_cache(c.transformer, batch, 4, c.stride - 1)
    books = q * c.quantizer.size * (c.quantizer.dim + 1) * 4
    rows = batch * q * c.quantizer.dim * 4
    into = size(vq.semantic.input_proj.weight, vq.acoustic.input_proj.weight)
    back = size(vq.semantic.output_proj.weight, vq.acoustic.output_proj.weight)
    heard = (mimi.encoder, mimi.encoder_transformer, mimi.downsample)
    said = (mimi.upsample, mimi.decoder_transformer, mimi.decoder)
    encode = sum(size(*m.parameters()) for m in heard) + into + books
    decode = sum(size(*m.parameters()) for m in said) + back + rows
    return Reads(encode, cache), Reads(decode, cache)
