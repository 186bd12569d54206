"""Codebooks anew for a codec whose encoder stays: recode.py MODEL OUT PACK [PACK ...]

The semantic codes stay as they are. The acoustic codebooks are aimed at what is heard alone, the
spectral envelope and the pitch that a linear layer, fitted by least squares, reads from the latent
(tasks/readout.py), and fitted to --frames latents under the search that encodes. With --listener
most of an error's cost is how much it changes what Whisper's encoder hears of the decoded latent;
that wants a decoder that has learnt. What a language model knows of the codes is carried over: its
tables of codes give the quantised latent as before, and an entry of the depth transformer's tables
and heads begins as those of the old entries that are nearest to it. OUT is MODEL with both, in
float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from moshi_cli.core import load
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.vq import ResidualVq, SplitVq
from moshi_cli.core.weights import save
from moshi_cli.tasks.augment import Augment
from moshi_cli.tasks.readout import (
    CORRELATIONS,
    VOICED,
    Readout,
    components,
    likeliest,
    second_moments,
)
from moshi_cli.tasks.seeding import rotation
from moshi_cli.tasks.stages import Flow, Source
from moshi_cli.tasks.utterances import Utterances
from moshi_cli.tasks.whisper import WhisperListener

ODDS = {
    "digits": 2.0, "moshi": 1.0, "noisy": 0.3, "world": 0.8, "question": 0.8,
    "wordnet": 1.5, "chat": 1.5, "open": 2.0, "cheap": 0.5,
}  # fmt: skip
AUGMENT = Augment(noise_share=0.1, room_share=0.05, band_share=0.05)
ENVELOPE, PITCH = 6.0, 4.0  # what they are worth
EAR = 0.65  # what a listener is worth of all, if there is one
LISTENED = 46_000  # frames that it hears
EDGE = 4  # frames at both ends of a window that lack what is around them
ROUNDS = 6  # of k-means, codebook by codebook
HELD_OUT = 200  # windows that are only measured
NEAREST = 4  # old entries that a new one begins as


class Heard:
    """What a latent tells of its sound."""

    def __init__(self, mimi: Mimi):
        self.mimi = mimi
        self.readout = Readout(mimi.config.seanet.dim, mimi.sample_rate, mimi.frame_samples)

    def true(self, wav: Tensor) -> Tensor:
        """wav [B, 1, S] -> envelope and correlation [B, T, 320 + 4 · lags]."""
        return torch.cat([self.readout.envelope(wav), self.readout.correlation(wav).flatten(2)], -1)

    def missed(self, latent: Tensor, true: Tensor) -> str:
        """latent [B, T, D]: what of each is not told, as in `Readout.loss`."""
        told, sizes = self.readout.layer(latent), self.readout.sizes
        (mel, pitch), (true_mel, true_pitch) = told.split(sizes, -1), true.split(sizes, -1)
        pitch, true_pitch = (x.unflatten(-1, (CORRELATIONS, -1)) for x in (pitch, true_pitch))
        voiced = true_pitch.amax(-1, keepdim=True) > VOICED
        envelope = (mel - true_mel).square().mean() / true_mel.var()
        lost = ((pitch - true_pitch).square() * voiced).sum()
        return f"envelope {envelope:.4f}, pitch {lost / (true_pitch.square() * voiced).sum():.4f}"


def gather(heard: Heard, packs: list[str], frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [N, D], then those [B, T, D] and the truth [B, T, ...] of windows that are held out,
    and the costs of errors in what the readout, fitted here, tells."""
    data = Utterances([Source(p, skip=()) for p in packs], None, Flow(odds=ODDS), AUGMENT)
    generator = torch.Generator().manual_seed(5)
    wide = heard.mimi.config.seanet.dim + 1
    within = torch.zeros(wide, wide, dtype=torch.float64)
    across = torch.zeros(wide, sum(heard.readout.sizes), dtype=torch.float64)
    found, held, count = list[Tensor](), list[tuple[Tensor, Tensor]](), 0
    squares = torch.zeros(2)
    while count < frames:
        wav = data.draw(32, 8, generator).wav
        latent = heard.mimi.encode_latent(wav).transpose(1, 2)  # [B, T, D]
        true = heard.true(wav)
        if 8 * len(held) < HELD_OUT:
            held.append((latent, true))
            continue
        x = torch.cat([latent, torch.ones_like(latent[..., :1])], -1).flatten(0, 1).double()
        within += x.T @ x
        across += x.T @ true.flatten(0, 1).double()
        mel, pitch = true.split(heard.readout.sizes, -1)
        squares += torch.stack([mel.var(), pitch.square().mean()]) * len(x)
        found.append(latent.flatten(0, 1))
        count += len(x)
        if sys.stderr.isatty():
            print(f"\r{count} frames", end="", file=sys.stderr, flush=True)
    ridge = 1e-5 * within.diagonal().mean() * torch.eye(wide, dtype=torch.float64)
    solved = torch.linalg.solve(within + ridge, across).float()  # [D + 1, ...]
    heard.readout.layer.weight.copy_(solved[:-1].T)
    heard.readout.layer.bias.copy_(solved[-1])
    sizes = torch.tensor(heard.readout.sizes)
    costs = torch.tensor([ENVELOPE, PITCH]) / (squares / count) / sizes
    latent, true = (torch.cat(x) for x in zip(*held, strict=True))
    return torch.cat(found), latent, true, costs.sqrt().repeat_interleave(sizes)


def sensitivity(mimi: Mimi, listener: WhisperListener, packs: list[str]) -> Tensor:
    """float64 [L, L]: the mean of Jᵀ J over frames, where J is how what is heard of a decoded
    latent moves with it. By gradients of random sums of what is heard."""
    sources = [Source(p, skip=()) for p in packs]
    clean = Augment(noise_share=0, room_share=0, band_share=0)
    data = Utterances(sources, None, Flow(odds=ODDS), clean)
    generator = torch.Generator().manual_seed(3)
    wide = mimi.config.seanet.dim
    squares, count = torch.zeros(wide, wide, dtype=torch.float64), 0
    for module in (mimi, listener):
        module.requires_grad_(False)
    while count < LISTENED:
        wav = data.draw(32, 4, generator).wav
        latent = mimi.quantizer.decode(mimi.encode(wav)).requires_grad_()  # [B, D, T]
        with torch.enable_grad():
            total = latent.new_zeros(())
            for heard in listener.hear(mimi.decode_latent(latent)):
                noise = torch.randn(heard.shape, generator=generator)
                total = total + (heard * noise).sum() / heard.numel() ** 0.5
        (slope,) = torch.autograd.grad(total, latent)
        rows = slope.transpose(1, 2)[:, EDGE:-EDGE].flatten(0, 1).double()
        squares += rows.T @ rows
        count += len(rows)
    return squares / count


def aims(latents: Tensor, sound: Tensor, squares: Tensor | None) -> Tensor:
    """latents [N, L], what tells the sound [M, L], `sensitivity` -> the directions whose errors
    count, by how much they do."""
    if squares is None:
        return sound
    values, vectors = torch.linalg.eigh(squares)
    ear = (vectors * values.clamp(min=0).sqrt()).T
    parts = ((sound, 1 - EAR), (ear, EAR))
    return torch.cat([
        rows * (share / (latents @ rows.T).var(0).sum()).sqrt() for rows, share in parts
    ])  # fmt: skip


def contributions(mimi: Mimi) -> list[Tensor]:
    """What each code adds to the latent, centred: [C, L] for each codebook, semantic first."""
    found = []
    for branch in branches(mimi.quantizer):
        for book in branch.books:
            centre = book.cluster_usage @ book.centroids / book.cluster_usage.sum()
            found.append((book.centroids - centre) @ branch.output_proj.weight[..., 0].T)
    return found


def ways_out(mimi: Mimi) -> list[Tensor]:
    """How the semantic and the acoustic branch get to the latent, [L, dim] each."""
    return [b.output_proj.weight[..., 0].clone() for b in branches(mimi.quantizer)]


def branches(quantizer: SplitVq) -> tuple[ResidualVq, ResidualVq]:
    return quantizer.semantic, quantizer.acoustic


def carry(
    lm: MoshiLm,
    before: list[Tensor],
    outs: list[Tensor],
    seen: Tensor,
    into: Tensor,
    old: list[Tensor],
    mimi: Mimi,
) -> None:
    """before: what each code added to the latent, and outs: how each branch did; seen [L, L]: what
    of a latent the old codebooks were for; into [dim, dim]: from the old acoustic coordinates to
    the new ones, in which old is, the acoustic codebooks of before."""
    Q, rank, size = lm.config.voice_q, lm.emb.shape[2], len(before[0])
    assert lm.emb_out is not None and lm.depth is not None
    heard = [lm.emb[k, :size] @ lm.emb_out.weight[k].T for k in range(Q)]  # [C, D]
    x = torch.cat([b - b.mean(0) for b in before]).double()
    y = torch.cat([h - h.mean(0) for h in heard]).double()
    way = torch.linalg.pinv(x, rtol=1e-4) @ y  # [L, D], for what they can add to a latent
    print(f"tables of codes: {(x @ way - y).square().sum() / y.square().sum():.4f} not explained")
    generator = torch.Generator().manual_seed(0)
    for k, now in enumerate(contributions(mimi)):
        u, s, v = torch.linalg.svd(now.double() @ seen.T @ way, full_matrices=False)
        turn = rotation(rank, rank, generator).double()
        table = u[:, :rank] * s[:rank] @ turn
        scale = table.square().mean().sqrt()
        for at in range(k, lm.config.n_q, Q):
            lm.emb[at, :size].copy_(table / scale)
            lm.emb_out.weight[at].copy_((scale * turn.T @ v[:rank]).T)
    if lm.residual is not None:  # as the tables are heard, and what training added to that
        halves = lm.residual.weight.double().T.chunk(2)  # [dim, D] each
        learnt = [h - o.double().T @ way for h, o in zip(halves, outs, strict=True)]
        learnt[1] = torch.linalg.pinv(into.double(), rtol=0.1).T @ learnt[1]
        fresh = [o.double().T @ seen.T @ way for o in ways_out(mimi)]
        made = torch.cat([f + x for f, x in zip(fresh, learnt, strict=True)])
        lm.residual.weight.copy_(made.T)
    for k, (book, was) in enumerate(zip(mimi.quantizer.acoustic.books, old, strict=True), 1):
        far = torch.cdist(book.centroids, was).square()  # [C, C]
        near = far.topk(NEAREST, largest=False)
        width = near.values[:, :1].median() + 1e-9
        share = (-near.values / width).softmax(1)[..., None]  # [C, 4, 1]
        tables = [lm.depth.heads.weight[k], *([lm.depth.emb[k][:size]] if k < Q - 1 else [])]
        for rows in tables:
            made = (rows[near.indices] * share).sum(1)
            rows.copy_(made * (rows.square().mean() / made.square().mean()).sqrt())


def aim_again(quantizer: SplitVq, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Projections by what latents x [N, L] tell: the acoustic branch keeps rows @ latent, the
    semantic one says what of the rest it tells. -> what of a latent the old codes were for [L, L],
    and the old acoustic coordinates in the new ones [dim, dim]."""
    acoustic, semantic = quantizer.acoustic, quantizer.semantic
    meant, heard = (b.input_proj.weight[..., 0].double() for b in (semantic, acoustic))
    out, outs = (b.output_proj.weight[..., 0].double() for b in (semantic, acoustic))
    known = out @ meant + outs @ heard
    moments = second_moments(x)
    seen = components(rows, moments, len(heard))  # [dim, L]
    given = likeliest(seen, moments)  # [L, dim]
    rest = moments.new_ones(len(moments)).diag() - given @ seen
    acoustic.input_proj.weight.copy_(seen[..., None])
    acoustic.output_proj.weight.copy_(given[..., None])
    semantic.output_proj.weight.copy_((rest @ likeliest(meant, moments))[..., None])
    (book,) = semantic.books  # its entries stay, with the usage that they have here
    codes = book.encode_many((x @ meant.T).float())
    centroids, usage = book.centroids, torch.bincount(codes, minlength=len(book.centroids))
    book.cluster_usage.copy_(usage.clamp(min=1) / usage.float().mean())
    book.embedding_sum.copy_(centroids * book.cluster_usage[:, None])
    return known, (seen @ outs).float()


def anew(
    folder: Path, out: Path, packs: list[str], frames: int, whisper: Path | None = None
) -> None:
    """Write the model again under `out`, its acoustic codebooks fitted to frames of packs."""
    model = load(folder, dtype="fp32")
    mimi, quantizer = model.mimi.eval(), model.mimi.quantizer
    heard = Heard(mimi)
    latents, latent, true, costs = gather(heard, packs, frames)
    print("\nmissed by the latent:", heard.missed(latent, true))

    def told() -> str:
        codes = quantizer.encode(latent.transpose(1, 2))
        return heard.missed(quantizer.decode(codes).transpose(1, 2), true)

    print("by the old codes:", told(), flush=True)
    before, outs, x = contributions(mimi), ways_out(mimi), latents.double()
    squares = None
    if whisper is not None:
        squares = sensitivity(mimi, WhisperListener(whisper, mimi.sample_rate), packs)
    rows = aims(x, (heard.readout.layer.weight * costs[:, None]).double(), squares)
    known, into = aim_again(quantizer, x, rows)
    acoustic = quantizer.acoustic
    old = [book.centroids @ into.T for book in acoustic.books]
    acoustic.fit(latents, ROUNDS, torch.Generator().manual_seed(0), old)
    print("by the new codes:", told(), flush=True)
    if model.lm is not None:
        carry(model.lm, before, outs, known, into, old, mimi)
    save(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("packs", nargs="+")
    parser.add_argument("--frames", type=int, default=160_000)
    parser.add_argument("--listener", type=Path, metavar="WHISPER", help="CTranslate2 folder")
    args = parser.parse_args()
    with torch.no_grad():
        anew(args.model, args.out, args.packs, args.frames, args.listener)


if __name__ == "__main__":
    main()
