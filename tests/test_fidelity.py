"""Distances of signals against values worked out by hand."""

from __future__ import annotations

import math
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_cli.core import audio
from moshi_cli.core.errors import UsageError
from moshi_cli.tasks import codebooks, fidelity

T = torch.arange(24_000, dtype=torch.float64) / 24_000
TONE = (torch.sin(2 * math.pi * 1000 * T) * 0.5).float()
OTHER = (torch.cos(2 * math.pi * 1000 * T) * 0.5).float()  # orthogonal to it, as strong
NOISE = torch.randn(24_000, generator=torch.Generator().manual_seed(0)) * 0.1


def test_a_tenth_of_something_orthogonal_is_20_db() -> None:
    assert fidelity.si_sdr_db(TONE, TONE + 0.1 * OTHER) == pytest.approx(20, abs=1e-3)
    assert fidelity.snr_db(TONE, TONE + 0.1 * OTHER) == pytest.approx(20, abs=1e-3)


def test_scale_does_not_matter_to_si_sdr_only() -> None:
    half = 0.5 * (TONE + 0.1 * OTHER)
    assert fidelity.si_sdr_db(TONE, half) == pytest.approx(20, abs=1e-3)
    # what is missing is half of the tone: 6 dB, and the other tone's share on top
    assert fidelity.snr_db(TONE, half) == pytest.approx(-10 * math.log10(0.25 + 0.05**2), abs=1e-3)


def test_spectra_of_twice_the_amplitude_are_6_db_away() -> None:
    gain = 20 * math.log10(2)
    assert fidelity.mel_distance_db(NOISE, 2 * NOISE) == pytest.approx(gain, abs=1e-3)
    assert fidelity.stft_distance_db(NOISE, 2 * NOISE) == pytest.approx(gain, abs=2e-3)
    assert fidelity.mel_distance_db(NOISE, NOISE) == fidelity.stft_distance_db(NOISE, NOISE) == 0


def test_below_the_floor_nothing_differs() -> None:
    silence = torch.zeros(24_000)
    assert fidelity.stft_distance_db(silence, 1e-6 * NOISE) == 0
    # white noise of rms 0.1 is at -20 dB (its mean level 2.5 dB less), silence at -80
    assert fidelity.stft_distance_db(NOISE, silence) == pytest.approx(60 - 2.5, abs=0.2)


def test_silence_has_no_ratio() -> None:
    silence = torch.zeros(2400)
    plain = {n: m for n, m in fidelity.MEASURES.items() if not m.module}
    found = fidelity.compare(silence, NOISE[:2400], plain)
    assert found["si_sdr_db"] is None and found["snr_db"] is None and found["mel_db"] is not None
    found = fidelity.compare(NOISE[:2400], silence, plain)
    assert found["si_sdr_db"] is None and found["snr_db"] == 0
    assert fidelity.measures(silence, silence) == {"mel_db": 0.0, "stft_db": 0.0}


def test_lengths_must_agree() -> None:
    with pytest.raises(AssertionError):
        fidelity.compare(TONE, TONE[:-1], {})


def test_intelligibility_of_known_pairs() -> None:
    """Itself: 1. Noise that has nothing to do with it: little. Too short for its frames: none."""
    pytest.importorskip("pystoi")
    speech = NOISE * (1 + torch.sin(2 * math.pi * 4 * T)).float()
    assert fidelity.stoi(speech, speech) == pytest.approx(1)
    assert fidelity.stoi(speech, 0.5 * speech) == pytest.approx(1)
    near = fidelity.stoi(speech, speech + 0.5 * NOISE.flip(0))
    far = fidelity.stoi(speech, NOISE.flip(0))
    assert near is not None and far is not None and 1 > near > 0.5 > far
    assert fidelity.stoi(speech[:5000], speech[:5000]) is None


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **has: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(has)
    monkeypatch.setitem(sys.modules, name, module)


def test_pesq_hears_16_khz(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoUtterancesError(Exception):
        pass

    def pesq(rate: int, x: np.ndarray, y: np.ndarray, mode: str) -> float:
        if not y.any():
            raise NoUtterancesError
        assert (rate, mode, len(x), x.dtype) == (16_000, "wb", 16_000, np.float32)
        return float(np.abs(y).max() / np.abs(x).max())

    fake(monkeypatch, "pesq", pesq=pesq, NoUtterancesError=NoUtterancesError)
    assert fidelity.pesq(TONE, 2 * TONE) == pytest.approx(2, rel=1e-2)
    assert fidelity.pesq(TONE, 0 * TONE) is None


def test_pesq_of_known_pairs(root: Path) -> None:
    """Itself: raw 4.5, the best there is, on the scale of P.862.2. Silence: nothing to rate."""
    pytest.importorskip("pesq")
    speech = audio.read(root / "examples/audio/hello.wav")[0]
    best = 0.999 + 4 / (1 + math.exp(-1.3669 * 4.5 + 3.8224))
    assert best == pytest.approx(4.644, abs=1e-3)
    assert fidelity.pesq(speech, speech) == pytest.approx(best, abs=1e-3)
    assert fidelity.pesq(speech, 0.5 * speech) == pytest.approx(best, abs=1e-2)  # levels are equal
    noise = torch.randn(len(speech), generator=torch.Generator().manual_seed(0))
    level = speech.square().mean().sqrt()
    scores = [fidelity.pesq(speech, speech + g * level * noise) for g in (0.01, 0.1, 1.0)]
    assert all(a is not None and b is not None and a > b for a, b in pairwise([best, *scores]))
    assert scores[-1] is not None and 1 <= scores[-1] < 1.5  # as loud as the speech
    assert fidelity.pesq(torch.zeros(24_000), noise[:24_000]) is None


def test_visqol_hears_16_khz_as_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create(self, mode: str, use_lattice_model: bool) -> None:
            assert mode == "speech"

        def measure_from_arrays(self, x: np.ndarray, y: np.ndarray, rate: int) -> Any:
            if len(x) < 16_000:
                raise ValueError("too short")
            assert (len(y), rate, y.dtype) == (16_000, 16_000, np.float64)
            return types.SimpleNamespace(moslqo=4.5)

    fidelity._visqol.cache_clear()
    fake(monkeypatch, "visqol", VisqolApi=Api)
    assert fidelity.visqol(TONE, TONE) == 4.5
    assert fidelity.visqol(TONE[:2000], TONE[:2000]) is None
    fidelity._visqol.cache_clear()


def test_measures_are_chosen_by_any_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "missing", lambda: ["pesq"])
    assert list(fidelity.chosen(["sisdr", "SI-SDR", "mel"])) == ["si_sdr_db", "mel_db"]
    assert "pesq" not in fidelity.chosen()
    with pytest.raises(UsageError, match="pesq needs the package pesq"):
        fidelity.chosen(["pesq"])
    with pytest.raises(UsageError, match="unknown measure 'mos'"):
        fidelity.chosen(["mos"])


# codebooks


def test_entropy_and_use_by_hand() -> None:
    codes = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 3]])
    counts = codebooks.histogram(codes, 4)
    assert counts.tolist() == [[2, 2, 0, 0], [0, 0, 4, 0], [1, 1, 1, 1]]
    assert codebooks.entropy_bits(counts).tolist() == pytest.approx([1, 0, 2])
    assert codebooks.usage(counts).tolist() == [0.5, 0.25, 1]
    assert codebooks.entropy_bits(torch.zeros(1, 4)).tolist() == [0]


def test_agreement_counts_frames() -> None:
    before = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert codebooks.agreement(before, torch.tensor([[1, 2, 0], [0, 0, 0]])) == [2, 0]
    with pytest.raises(AssertionError):
        codebooks.agreement(before, before[:, :2])
