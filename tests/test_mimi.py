"""Mimi: any chunking equals offline, slots are independent, and its bottleneck learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moshi_cli.core import vq
from moshi_cli.core.config import MimiConfig, QuantizerConfig, SeanetConfig, TransformerConfig
from moshi_cli.core.kyutai_mimi import read_mimi, write_mimi
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.vq import ResidualVq

FRAME = 1920
TINY = MimiConfig(
    seanet=SeanetConfig(dim=16, filters=2),
    transformer=TransformerConfig(
        dim=16, heads=2, layers=2, ff=32, context=6, norm="layer", gated=False, layer_scale=0.5
    ),
    quantizer=QuantizerConfig(dim=8, codebooks=4, size=16),
)


@pytest.fixture
def mimi() -> Mimi:
    """A codec of random weights with spread-out codebooks and a window of 3 frames."""
    torch.manual_seed(0)
    model = Mimi(TINY).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.quantizer.refresh()
    return model


def noise(slots: int, frames: int, seed: int = 1) -> torch.Tensor:
    """wav [slots, 1, frames · 1920]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slots, 1, frames * FRAME, generator=generator) * 0.3


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5, 12])
def test_any_chunking_is_offline(mimi: Mimi, chunk: int) -> None:
    wav = noise(2, 12)
    latent, codes = mimi.encode_latent(wav), mimi.encode(wav)
    state = mimi.init_state(2)
    parts = [mimi.encode_latent(x, state.encoder) for x in wav.split(chunk * FRAME, -1)]
    torch.testing.assert_close(torch.cat(parts, -1), latent, atol=2e-5, rtol=0)
    spoken = [mimi.decode(c, state.decoder) for c in codes.split(chunk, -1)]
    torch.testing.assert_close(torch.cat(spoken, -1), mimi.decode(codes), atol=2e-5, rtol=0)


@torch.no_grad()
def test_paused_and_reset_slots_are_like_fresh_ones(mimi: Mimi) -> None:
    frames, slots = 10, 3
    wav = noise(slots, frames)
    latent, codes = mimi.encode_latent(wav), mimi.encode(wav)
    spoken = mimi.decode(codes)
    state = mimi.init_state(slots)
    rng = torch.Generator().manual_seed(4)
    at = [0] * slots
    heard: list[list[torch.Tensor]] = [[] for _ in range(slots)]
    said: list[list[torch.Tensor]] = [[] for _ in range(slots)]
    for step in range(60):
        if step == 9:
            state.reset(torch.tensor([False, True, False]))
            at[1], heard[1], said[1] = 0, [], []
        active = torch.rand(slots, generator=rng) < 0.5
        active &= torch.tensor([a < frames for a in at])
        pick = [min(a, frames - 1) for a in at]
        x = torch.stack([wav[b, :, p * FRAME : (p + 1) * FRAME] for b, p in enumerate(pick)])
        c = torch.stack([codes[b, :, p : p + 1] for b, p in enumerate(pick)])
        x = torch.where(active[:, None, None], x, 99.0)  # garbage in paused slots
        c = torch.where(active[:, None, None], c, 3)
        y, w = mimi.encode_latent(x, state.encoder, active), mimi.decode(c, state.decoder, active)
        for b in range(slots):
            if active[b]:
                heard[b].append(y[b])
                said[b].append(w[b])
                at[b] += 1
    assert at == [frames] * slots
    for b in range(slots):
        torch.testing.assert_close(torch.cat(heard[b], -1), latent[b], atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.cat(said[b], -1), spoken[b], atol=2e-5, rtol=0)


@torch.no_grad()
def test_batch_is_single_and_ragged_input_is_padded_once(mimi: Mimi) -> None:
    wav = noise(3, 4)[..., :-700]
    codes = mimi.encode(wav)
    assert codes.shape == (3, 4, 4)
    for b in range(3):
        assert torch.equal(mimi.encode(wav[b : b + 1])[0], codes[b])


@torch.no_grad()
def test_fewer_codebooks_are_a_prefix(mimi: Mimi) -> None:
    wav = noise(1, 3)
    full = mimi.encode(wav)
    for count in (1, 2, 4):
        mimi.set_num_codebooks(count)
        assert torch.equal(mimi.encode(wav), full[:, :count])
        assert mimi.decode(full[:, :count]).shape == wav.shape
    with pytest.raises(ValueError, match="4 codebooks"):
        mimi.set_num_codebooks(5)


@torch.no_grad()
def test_a_search_finds_the_nearest_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough paths find the best of all sums of entries, one path the nearest entries."""
    generator = torch.Generator().manual_seed(0)
    branch = ResidualVq(8, replace(TINY.quantizer, size=6, beam=36), 3)
    for book in branch.books:
        book.initialized.fill_(1.0)
        book.embedding_sum.normal_(generator=generator)
        book.refresh()
    x = torch.randn(50, 8, generator=generator)
    entries = torch.cartesian_prod(*[torch.arange(6)] * 3)  # [216, 3]
    sums = sum(book.decode(entries[:, k]) for k, book in enumerate(branch.books))
    assert isinstance(sums, torch.Tensor)
    apart = torch.cdist(x, sums)
    assert torch.equal(branch.search(x, 3), entries[apart.argmin(1)])

    latent = torch.randn(2, 8, 7, generator=generator)
    whole = branch.encode(latent, 3)
    monkeypatch.setattr(vq, "SEARCHED", 3)
    assert torch.equal(branch.encode(latent, 3), whole)
    error = {}
    for beam in (1, 4):
        branch.beam = beam
        z = branch.input_proj(latent) - sum(
            book.decode(c).transpose(1, 2)
            for book, c in zip(branch.books, branch.encode(latent, 3).unbind(1), strict=True)
        )
        error[beam] = float(z.square().sum())
    assert error[4] < error[1]
    branch.beam = 1
    nearest = branch.encode(latent, 3)
    projected = branch.input_proj(latent).transpose(1, 2).flatten(0, 1)
    assert torch.equal(branch.search(projected, 3).view(2, 7, 3).transpose(1, 2), nearest)


def slow_search(branch: ResidualVq, x: Tensor) -> Tensor:
    """x [N, dim] -> codes [N, Q], frame by frame: every entry after every path that was kept."""
    found = []
    for frame in x:
        kept = [(frame, list[int]())]  # what is left, and the entries that left it
        for book in branch.books:
            tried = [
                (left - c, [*path, i]) for left, path in kept for i, c in enumerate(book.centroids)
            ]
            kept = sorted(tried, key=lambda pair: float(pair[0].square().sum()))[: branch.beam]
        found.append(kept[0][1])
    return torch.tensor(found)


@torch.no_grad()
@pytest.mark.parametrize(("size", "sets"), [(24, 8), (24, 24), (20, 8), (8, 1)])
def test_a_search_looks_at_sets_of_entries_first(
    monkeypatch: pytest.MonkeyPatch, size: int, sets: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    monkeypatch.setattr(vq, "SETS", sets)
    branch = ResidualVq(8, replace(TINY.quantizer, size=size, beam=5), 4)
    for book in branch.books:
        book.embedding_sum.normal_(generator=generator)
        book.refresh()
    x = torch.randn(40, 8, generator=generator)
    assert torch.equal(branch.search(x, 4), slow_search(branch, x))
    assert branch.search(x[:0], 4).shape == (0, 4)


@torch.no_grad()
def test_codebooks_are_fitted_to_the_search() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3000, 8, generator=generator).cumsum(1)
    error = {}
    for beam in (1, 4):
        branch = ResidualVq(8, replace(TINY.quantizer, beam=beam), 3)
        branch.input_proj.weight.copy_(torch.eye(8)[..., None])
        branch.fit(latents, 5, torch.Generator().manual_seed(1))
        for searched in (1, 4):
            branch.beam = searched
            codes = branch.encode(latents.t()[None], 3)[0]
            found = sum(book.decode(c) for book, c in zip(branch.books, codes, strict=True))
            error[beam, searched] = float((latents - found).square().sum())
    assert error[4, 4] < 0.97 * error[1, 4] < 0.97 * error[1, 1]


def test_a_search_is_part_of_the_config() -> None:
    searching = replace(TINY, quantizer=replace(TINY.quantizer, beam=8))
    assert read_mimi(write_mimi(searching)).quantizer.beam == 8
    assert "beam" not in write_mimi(TINY)["quantizer"]


@torch.no_grad()
def test_a_saved_slot_continues_elsewhere(mimi: Mimi) -> None:
    wav = noise(2, 8)
    whole = mimi.encode_latent(wav)
    first = mimi.init_state(2)
    mimi.encode_latent(wav[..., : 3 * FRAME], first.encoder)
    other = mimi.init_state(1)
    other.put(0, first.take(1))
    rest = mimi.encode_latent(wav[1:, :, 3 * FRAME :], other.encoder)
    torch.testing.assert_close(rest, whole[1:, :, 3:], atol=2e-5, rtol=0)


def test_bottleneck_learns_codebooks_and_passes_gradients() -> None:
    torch.manual_seed(0)
    mimi = Mimi(TINY)
    rng = torch.Generator().manual_seed(0)
    wav = noise(4, 4)
    with torch.no_grad():
        latents = mimi.encode_latent(noise(2, 20)).transpose(1, 2).flatten(0, 1)
    mimi.quantizer.fit(latents, generator=rng)
    optimiser = torch.optim.Adam(mimi.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        out = mimi.bottleneck(wav, generator=rng)
        loss = (mimi.decode_latent(out.latent) - wav).square().mean() + out.commitment
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert out.codes.shape == (4, 4, 4)
    assert out.semantic.shape == (4, 4, 16)
    missing = [n for n, p in mimi.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    counts = torch.tensor([1, 2, 4, 4])
    quantize = torch.tensor([True, True, True, False])
    mimi.bottleneck(wav, quantize=quantize, counts=counts, generator=rng)
    mimi.eval()
    mimi.eval()  # codebooks rest, and what training decodes is what decode() gives
    with torch.no_grad():
        trained = mimi.bottleneck(wav, generator=rng)
        codes = mimi.encode(wav)
        assert torch.equal(codes, trained.codes)
        torch.testing.assert_close(mimi.decode(codes), mimi.decode_latent(trained.latent))
