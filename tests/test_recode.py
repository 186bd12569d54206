"""Codebooks anew: what a language model knows of the codes is carried over."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor, nn

from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.tasks.readout import aim
from moshi_cli.tasks.seeding import seed_embeddings, seed_residual

RECIPE = Path(__file__).parent.parent / "examples" / "train_builtin"
WIDE = replace(TINY_MIMI, quantizer=replace(TINY_MIMI.quantizer, dim=16, size=64, beam=3))

ROWS = torch.randn(12, 16, generator=torch.Generator().manual_seed(4))  # what codes are aimed at


@pytest.fixture
def recode(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(RECIPE))
    import recode

    yield recode
    del sys.modules["recode"]


@pytest.fixture
def latents() -> Tensor:
    """[N, D]; few of their directions matter."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.linspace(2, 0.1, 16)
    return torch.randn(2000, 16, generator=generator) * scales


@pytest.fixture
def codec(latents: Tensor) -> Mimi:
    torch.manual_seed(1)
    mimi = Mimi(WIDE).eval().requires_grad_(False)
    aim(mimi.quantizer, latents, ROWS[:5], ROWS)
    mimi.quantizer.fit(latents, generator=torch.Generator().manual_seed(0))
    return mimi


@pytest.fixture
def lm(codec: Mimi) -> MoshiLm:
    depth = TINY_LM.depth
    assert depth is not None
    config = replace(TINY_LM, codebook_size=64, low_rank=16, depth=replace(depth, low_rank=16))
    lm = MoshiLm(config).eval().requires_grad_(False)
    seed_embeddings(lm, codec, torch.Generator().manual_seed(0))
    return lm


def heard(lm: MoshiLm, codes: Tensor, first: int) -> Tensor:
    """codes [Q, N] -> what the temporal transformer is given for a voice [N, D]."""
    assert lm.emb_out is not None
    return sum(
        (lm.emb[first + k][row] @ lm.emb_out.weight[first + k].T for k, row in enumerate(codes)),
        start=torch.zeros(()),
    )


def unchanged(recode: ModuleType, codec: Mimi) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """What `carry` is told of codebooks that stay as they are."""
    eye = torch.eye(16, dtype=torch.float64)
    return recode.contributions(codec), recode.ways_out(codec), eye, eye


@torch.no_grad()
def test_what_a_model_hears_is_carried_over(
    recode: ModuleType, codec: Mimi, lm: MoshiLm, latents: Tensor
) -> None:
    """New projections and entries: the same latents are heard nearly as before."""
    quantizer, before = codec.quantizer, recode.contributions(codec)
    outs = recode.ways_out(codec)
    codes = quantizer.encode(latents.t()[None])[0]
    was, semantic = heard(lm, codes, 0), codes[0]
    noise = torch.randn(12, 16, generator=torch.Generator().manual_seed(5))
    rows = (ROWS + 0.2 * noise).double()  # others than before, but not by much
    known, into = recode.aim_again(quantizer, latents.double(), rows)
    old = [book.centroids @ into.T for book in quantizer.acoustic.books]
    quantizer.acoustic.fit(latents, 6, torch.Generator().manual_seed(0), old)
    recode.carry(lm, before, outs, known, into, old, codec)
    codes = quantizer.encode(latents.t()[None])[0]
    for first in (0, 4):
        apart = (heard(lm, codes, first) - was).square().mean()
        assert apart < 0.2 * was.square().mean()
    assert torch.equal(codes[0], semantic)
    assert lm.depth is not None and lm.depth.heads.weight.isfinite().all()


@torch.no_grad()
def test_nothing_changes_where_the_codebooks_stay(
    recode: ModuleType, codec: Mimi, lm: MoshiLm, latents: Tensor
) -> None:
    codes = codec.quantizer.encode(latents.t()[None])[0]
    assert lm.depth is not None
    was, heads = heard(lm, codes, 0), lm.depth.heads.weight.clone()
    old = [book.centroids for book in codec.quantizer.acoustic.books]
    recode.carry(lm, *unchanged(recode, codec), old, codec)
    torch.testing.assert_close(heard(lm, codes, 0), was, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lm.depth.heads.weight, heads)


@torch.no_grad()
def test_what_codes_leave_is_heard_as_before(
    recode: ModuleType, codec: Mimi, lm: MoshiLm, latents: Tensor
) -> None:
    """Codes and what they leave together: other codebooks change little, the same ones nothing."""
    quantizer, x = codec.quantizer, latents.t()[None]
    seed_residual(lm, codec)
    assert lm.residual is not None
    noise = torch.randn(lm.residual.weight.shape, generator=torch.Generator().manual_seed(6))
    lm.residual.weight.add_(0.05 * noise)  # what training adds

    def whole() -> Tensor:
        codes = quantizer.encode(x)
        assert lm.residual is not None
        return heard(lm, codes[0], 0) + lm.residual(quantizer.residual(x, codes)[0].t())

    was = whole()
    old = [book.centroids for book in quantizer.acoustic.books]
    recode.carry(lm, *unchanged(recode, codec), old, codec)
    torch.testing.assert_close(whole(), was, atol=2e-3, rtol=2e-3)

    before, outs = recode.contributions(codec), recode.ways_out(codec)
    rows = (ROWS + 0.2 * torch.randn(12, 16, generator=torch.Generator().manual_seed(5))).double()
    known, into = recode.aim_again(quantizer, latents.double(), rows)
    old = [centroids @ into.T for centroids in old]
    quantizer.acoustic.fit(latents, 6, torch.Generator().manual_seed(0), old)
    recode.carry(lm, before, outs, known, into, old, codec)

    def apart(now: Tensor) -> float:
        return float((now - was).square().mean() / was.square().mean())

    assert (near := apart(whole())) < 0.12
    lm.residual.weight.zero_()
    assert apart(whole()) > 1.3 * near, near


class Ear(nn.Module):
    """Hears three directions of what it is given, the first one louder."""

    def __init__(self) -> None:
        super().__init__()
        self.way = nn.Parameter(torch.zeros(3, 16))
        self.way.data[[0, 1, 2], [0, 1, 2]] = torch.tensor([2.0, 1.0, 1.0])

    def hear(self, wav: Tensor) -> list[Tensor]:
        return [wav[:, 0].unflatten(-1, (-1, 16)) @ self.way.T]  # [B, T, 3]


@torch.no_grad()
def test_what_an_ear_hears_of_a_latent_is_found_through_the_decoder(
    recode: ModuleType, codec: Mimi, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Draws:
        def __init__(self, *_: object) -> None: ...

        def draw(self, frames: int, items: int, generator: torch.Generator) -> SimpleNamespace:
            pick = torch.randint(len(latents), (items, frames), generator=generator)
            return SimpleNamespace(wav=latents[pick].transpose(1, 2))  # [B, D, T]

    monkeypatch.setattr(recode, "Utterances", Draws)
    monkeypatch.setattr(recode, "LISTENED", 20_000)
    monkeypatch.setattr(codec, "encode", codec.quantizer.encode)
    # Sound is the latent itself.
    monkeypatch.setattr(codec, "decode_latent", lambda z: z.transpose(1, 2).flatten(1)[:, None])
    found = recode.sensitivity(codec, Ear(), ["pack"])
    size = 4 * 32 * 3  # of what is heard at once, by whose root a random sum is divided
    meant = torch.zeros(16, 16, dtype=torch.float64)
    meant[[0, 1, 2], [0, 1, 2]] = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found * size, meant, atol=0.15, rtol=0)


def test_an_ear_has_its_share_of_what_codes_are_aimed_at(
    recode: ModuleType, latents: Tensor
) -> None:
    x, sound = latents.double(), ROWS.double()
    assert recode.aims(x, sound, None) is sound
    ear = torch.zeros(16, 16, dtype=torch.float64)
    ear[15, 15] = 1e-6  # whatever its scale
    rows = recode.aims(x, sound, ear)
    said = (x @ rows.T).var(0)
    torch.testing.assert_close(said[len(sound) :].sum().item(), recode.EAR)
    torch.testing.assert_close(said[: len(sound)].sum().item(), 1 - recode.EAR)
    assert (x[:, 15] * rows[-1, 15]).var() > 0.99 * recode.EAR
