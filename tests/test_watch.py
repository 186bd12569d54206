"""Detectors, fed by hand."""

from __future__ import annotations

import torch

from moshi_cli.tasks.watch import Ear, Repetition, Stall, Voice

QUIET, NOISE, SPEECH = 0.0, 0.01, 0.2  # amplitudes


def heard(*amplitudes: float) -> list[bool]:
    ear, g = Ear(), torch.Generator().manual_seed(0)
    return [ear(torch.randn(1, 1920, generator=g) * a) for a in amplitudes]


def test_speech_stands_out_from_silence_and_noise() -> None:
    assert heard(QUIET, SPEECH, QUIET) == [False, True, False]
    assert heard(NOISE, NOISE, SPEECH, NOISE) == [False, False, True, False]


def test_loud_from_the_beginning_is_speech() -> None:
    assert heard(SPEECH, SPEECH) == [True, True]


def test_a_voice_begins_and_stops_once() -> None:
    voice = Voice(begin_frames=2, stop_frames=3)
    loud = [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    changes = [i for i, x in enumerate(loud) if voice.push(bool(x))]
    assert changes == [4, 11] and not voice.speaking


def test_stall_needs_sound_and_no_text() -> None:
    stall = Stall(limit_s=0.8)
    assert not any(stall.push(False, False) for _ in range(100))
    assert [stall.push(True, False) for _ in range(20)].count(True) == 2
    assert not any(stall.push(True, i % 5 == 0) for i in range(100))


def test_a_loop_is_noticed() -> None:
    loop = Repetition()
    assert [loop.push(7) for _ in range(24)].index(True) == 23
    phrase = [5, 6, 7, 8]
    came = [loop.push(token) for token in phrase * 8]
    assert came.count(True) == 1 and came[-1]


def test_what_people_say_is_no_loop() -> None:
    loop = Repetition()
    assert not any(loop.push(t) for t in [9] * 20 + list(range(30)) + [4, 5] * 8 + [6])
