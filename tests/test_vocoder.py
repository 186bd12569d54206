"""The recipe's light end for Kokoro: pulses at a pitch, filters that only shape."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from recipe import script


@pytest.fixture(scope="module")
def voc() -> ModuleType:
    return script("vocoder")


def test_pulses_are_all_harmonics_of_their_pitch_and_nothing_else(voc: ModuleType) -> None:
    pulses = voc.pulse_train(torch.full((1, 80), 190.0))[0]
    power = torch.fft.rfft(pulses.double()).abs().square()  # one second: a bin is a hertz
    harmonics = power[190:12000:190]
    assert harmonics.min() > 0.99 * harmonics.max()
    assert harmonics.sum() > 0.999 * power.sum()


def test_no_pitch_no_pulses(voc: ModuleType) -> None:
    assert not voc.pulse_train(torch.full((1, 8), 3.0)).any()


def test_a_filter_has_the_gains_it_was_told_and_rings_only_afterwards(voc: ModuleType) -> None:
    at = torch.linspace(-3, 3, voc.BANDS)
    bands = -at.square()[None, None]
    spectra = voc.Vocoder().gains(bands, 1.0)  # [1, BINS, 1]
    told = (bands @ voc.band_shapes()).exp().mT
    assert torch.allclose(spectra.abs(), told, rtol=0.01, atol=1e-3)
    rings = torch.fft.irfft(spectra[0, :, 0]).square()
    assert rings[: voc.FFT // 2].sum() > 0.99 * rings.sum()


def test_a_shorter_tract_has_its_formants_higher(voc: ModuleType) -> None:
    bands = -(torch.linspace(-5, 5, voc.BANDS) ** 2)[None, None]
    model = voc.Vocoder()
    plain, short = (model.gains(bands, tract).abs().argmax().item() for tract in (1.0, 1.2))
    assert short == pytest.approx(1.2 * plain, rel=0.05)


def test_it_makes_300_samples_a_frame_from_what_it_learns_with(voc: ModuleType) -> None:
    model = voc.Vocoder()
    f0 = torch.cat([torch.zeros(1, 8), torch.full((1, 12), 120.0)], 1)
    sound = model(torch.randn(1, 512, 20), f0, torch.randn(1, 128), breath=0.5)
    assert sound.shape == (1, 6000) and sound.isfinite().all()
    voc.distance(voc.evened(sound), voc.evened(torch.randn(1, 6000))).backward()
    assert all(value.grad is not None for value in model.parameters())
