"""A head start for a language model: it hears what the codec heard from the first step on.

The embeddings of a frame's codes add up to the codec's quantised latent. So codes that sound alike
start alike, a refinement starts as small as it is, and a small corpus need not show every code
often enough on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moshi_cli.core.layers import Linear
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi


@dataclass(frozen=True)
class Book:
    """A codebook as it acts on the latent."""

    table: Tensor  # [C, dim], centred
    usage: Tensor  # [C], sum 1
    out: Tensor  # [L, dim]: how it gets to the latent


def books_of(mimi: Mimi) -> list[Book]:
    """All codebooks, semantic first."""
    found = []
    for branch in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        for book in branch.books:
            usage = book.cluster_usage / book.cluster_usage.sum()
            centre = usage @ book.centroids
            found.append(Book(book.centroids - centre, usage, branch.output_proj.weight[..., 0]))
    return found


def rotation(into: int, out: int, generator: torch.Generator) -> Tensor:
    """A random map [into, out] with orthonormal rows or columns, scaled to keep mean squares."""
    noise = torch.randn(max(into, out), min(into, out), generator=generator)
    q = torch.linalg.qr(noise)[0]  # orthonormal columns
    return (q if into >= out else q.T) * max(out / into, 1.0) ** 0.5


@torch.no_grad()
def seed_embeddings(lm: MoshiLm, mimi: Mimi, generator: torch.Generator) -> None:
    """Set the code tables and the heads of `lm` from the codebooks.

    What a voice's codes add up to has mean square 1, and so has a word: small beside what the
    first layer adds, an input is heard badly. Voice and partner start alike. The depth
    transformer's tables and heads keep their scale; rows of start tokens stay.
    """
    books, Q = books_of(mimi)[: lm.config.voice_q], lm.config.voice_q
    assert len(books) == Q and len(books[0].table) == lm.config.codebook_size
    way = rotation(len(books[0].out), lm.config.temporal.dim, generator)  # [L, D]
    power = sum(book.usage @ (book.table @ book.out.T @ way).square().mean(1) for book in books)
    way = way / (power + 1e-12) ** 0.5

    def fill(weight: Tensor, table: Tensor) -> None:
        made = table @ rotation(table.shape[1], weight.shape[1], generator)  # [C, width]
        scale = weight.square().mean().sqrt() / (made.square().mean().sqrt() + 1e-9)
        weight[: len(made)].copy_(made * scale)

    for k, book in enumerate(books):
        onto = book.out.T @ way  # [dim, D]
        table = book.table
        if lm.emb_out is None:
            table = table @ onto  # [C, D]
        else:
            turn = rotation(table.shape[1], lm.emb.shape[2], generator)  # [dim, width]
            scale = table.square().mean().sqrt() + 1e-9
            table, onto = table @ turn / scale, torch.linalg.pinv(turn) @ onto * scale
        for at in range(k, lm.config.n_q, Q):
            lm.emb[at, : len(table)].copy_(table)
            if lm.emb_out is not None:
                lm.emb_out.weight[at].copy_(onto.T)
        if lm.depth is not None:
            fill(lm.depth.heads.weight[k], book.table)
            if k < Q - 1:
                fill(lm.depth.emb[k], book.table)
    lm.text_emb.table.div_(lm.text_emb.table.square().mean().sqrt())
    if lm.residual is not None:
        seed_residual(lm, mimi)


@torch.no_grad()
def seed_residual(lm: MoshiLm, mimi: Mimi) -> None:
    """Let `lm` hear what codes leave of a given voice as it hears the codes: by the linear map from
    a branch's first codebook to the embeddings of its codes that comes nearest to all of them."""
    dim, vq = mimi.config.quantizer.dim, mimi.quantizer
    lm.config = replace(lm.config, residual=dim)
    lm.residual = Linear(2 * dim, lm.config.temporal.dim).to(lm.like)
    first = mimi.config.quantizer.semantic
    for half, (k, book) in enumerate(((0, vq.semantic.books[0]), (first, vq.acoustic.books[0]))):
        table = lm.emb[k, : len(book.centroids)]
        if lm.emb_out is not None:
            table = table @ lm.emb_out.weight[k].T
        spread = book.centroids - book.centroids.mean(0)
        way = torch.linalg.pinv(spread, rtol=1e-4) @ (table - table.mean(0))  # [dim, D]
        lm.residual.weight[:, half * dim : (half + 1) * dim].copy_(way.T)
