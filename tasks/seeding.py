"""A head start for a language model: its tables begin where the codec's codebooks are.

Codes that sound alike then start alike, which saves a small corpus from having to show every code
often enough on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.vq import Codebook


def centroids(mimi: Mimi) -> list[Tensor]:
    """The codec's centroids, semantic first, centred and of mean square 1. Each [C, D]"""
    books = [m for m in mimi.quantizer.modules() if isinstance(m, Codebook)]
    tables = [b.centroids - b.centroids.mean(0) for b in books]
    return [t / (t.square().mean().sqrt() + 1e-9) for t in tables]


def rotation(into: int, out: int, generator: torch.Generator) -> Tensor:
    """A random map [into, out] with orthonormal rows or columns, scaled to keep mean squares."""
    noise = torch.randn(max(into, out), min(into, out), generator=generator)
    q = torch.linalg.qr(noise)[0]  # orthonormal columns
    return (q if into >= out else q.T) * max(out / into, 1.0) ** 0.5


@torch.no_grad()
def seed_embeddings(lm: MoshiLm, mimi: Mimi, generator: torch.Generator) -> None:
    """Set the code tables and the heads of `lm` from the centroids, each at its present scale.

    Codebook k of voice and partner share one random rotation; rows of start tokens stay.
    """
    tables, Q = centroids(mimi), lm.config.voice_q
    assert len(tables) >= Q and len(tables[0]) == lm.config.codebook_size

    def fill(weight: Tensor, table: Tensor) -> None:
        made = table @ rotation(table.shape[1], weight.shape[1], generator)  # [C, width]
        scale = weight.square().mean().sqrt() / (made.square().mean().sqrt() + 1e-9)
        weight[: len(made)].copy_(made * scale)

    for k in range(Q):
        fill(lm.emb[k], tables[k])
        for other in range(k + Q, lm.config.n_q, Q):
            lm.emb[other, : len(tables[k])].copy_(lm.emb[k, : len(tables[k])])
        if lm.depth is not None:
            fill(lm.depth.heads.weight[k], tables[k])
            if k < Q - 1:
                fill(lm.depth.emb[k], tables[k])
