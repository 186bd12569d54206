"""Choosing a token from logits: greedy, temperature, top-k, top-p, guidance; no host sync.

Noise is a function of (seed of the slot, step of the slot, stream, rank), not of a generator's
history: what a slot says does not depend on its neighbours, on its place in a batch or on pauses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_cli.core.config import Sampling as Sampling

GREEDY = Sampling(temp=0.0, text_temp=0.0)


@dataclass
class Noise:
    """Where the random numbers of one step come from."""

    seed: Tensor  # long[B]
    step: Tensor  # long[B]

    def exponential(self, stream: int, count: int) -> Tensor:
        """Exp(1) draws, float32 [B, count]: a counter-based generator (SplitMix64)."""
        key = mix(mix(mix(self.seed) + stream) + self.step * _ODD)  # [B]
        ranks = torch.arange(1, count + 1, device=key.device)
        # mix(key + rank · golden), wrapping. Not written so, since Inductor takes a rank times a
        # number for an index, which in C must not overflow: from the 16th on it does anything.
        bits = mix(((key * _GOLDEN_INVERSE)[:, None] + ranks) * _GOLDEN)  # [B, count]
        uniform = (((bits >> 40) & 0xFFFFFF) + 0.5) * 2.0**-24  # in (0, 1)
        return -uniform.float().log()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_GOLDEN_INVERSE = 0xF1DE83E19937733D - 2**64  # their product is 1, wrapping
_ODD = 0xD1B54A32D192ED03 - 2**64


def mix(z: Tensor) -> Tensor:
    """Scramble 64 bits, wrapping (finaliser of SplitMix64). long[...] -> long[...]"""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & (2**33 - 1))


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: [conditional; null] logits [2B, V] -> [B, V]."""
    real, null = logits.chunk(2)
    return null + scale * (real - null)


def choose(
    logits: Tensor,
    temp: float,
    top_k: int,
    top_p: float,
    noise: Noise | None,
    stream: int,
) -> Tensor:
    """logits [B, V] -> tokens long[B].

    Top-k of the tempered softmax, not renormalised, then argmax(p / e), e ~ Exp(1): a draw in
    proportion to p. Greedy if temp is 0 or there is no noise.
    """
    if temp == 0 or noise is None:
        return logits.argmax(-1)
    p = (logits.float() / temp).softmax(-1)
    V = logits.shape[-1]
    p, ids = p.topk(min(top_k, V) if top_k else V)  # [B, k], falling
    if top_p < 1:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the first is always kept
    rank = (p / noise.exponential(stream, p.shape[-1])).argmax(-1, keepdim=True)
    return ids.gather(-1, rank)[:, 0]
