"""One delay mechanism: what an engine feeds step by step is what training feeds at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY_LM
from torch import Tensor

from moshi_cli.core.errors import ModelError
from moshi_cli.core.presets import PRESETS
from moshi_cli.core.streams import (
    FOREVER,
    UNKNOWN,
    ZERO,
    DelayPattern,
    DelayRing,
    Role,
    Task,
)

CHAT = Task("chat", Role.SAMPLED, Role.SAMPLED, Role.GIVEN)
ASR = Task("asr", Role.SAMPLED, Role.GIVEN, lag_s=0.5)
TTS = Task("tts", Role.STEERED, Role.SAMPLED, lag_s=-1.28)
SLOPES = replace(TINY_LM, delays=(1, 0, 2, 3, 5, 2, 0, 1, 4))  # any delays will do


def test_lag_is_truncated_to_frames() -> None:
    lags = [replace(ASR, lag_s=s).lag_frames for s in (0.5, 2.5, -1.28, 0.0, 0.079)]
    assert lags == [6, 31, -16, 0, 0]


def test_patterns_of_published_models() -> None:
    def pattern(name: str, task: Task) -> DelayPattern:
        lm = PRESETS[name].lm
        assert lm is not None
        return DelayPattern.of(PRESETS[name].fit(task), lm)

    moshi = pattern("moshi-7b", CHAT)
    assert moshi.delays == moshi.starts == moshi.mutes == (0, *[0, *[1] * 7] * 2)
    assert (
        moshi.latency == 1 and moshi.made == tuple(range(9)) and moshi.given == tuple(range(9, 17))
    )
    tts = pattern("tts-1.6b", TTS)
    assert tts.delays == (0, 16, *[18] * 31) and tts.starts == (0, 0, *[2] * 31)
    stt = pattern("stt-1b", ASR)
    assert stt.delays == (6, *[0] * 32) and stt.mutes == (0,) * 33  # its own first text is heard
    hibiki = pattern("hibiki-2b", CHAT)
    assert hibiki.delays == (0, *[0, *[2] * 15] * 2)


@pytest.mark.parametrize(
    ("task", "lm", "reason"),
    [
        (TTS, replace(TINY_LM, dep_q=0, depth=None), "does not speak"),
        (CHAT, replace(TINY_LM, n_q=4, delays=(0, 0, 1, 1, 1)), "one voice"),
        (replace(CHAT, partner=Role.SAMPLED), TINY_LM, "partner"),
        (replace(CHAT, voice=Role.STEERED), TINY_LM, "only text"),
    ],
)
def test_impossible_tasks_are_refused(task: Task, lm: object, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        DelayPattern.of(task, lm)  # type: ignore[arg-type]


def test_rows_without_a_part_are_silent() -> None:
    pattern = DelayPattern.of(ASR, TINY_LM)
    assert pattern.mutes[5:] == (FOREVER,) * 4  # no partner
    shifted = pattern.shift(torch.ones(2, 9, 7, dtype=torch.long))
    assert (shifted.inputs[:, 5:] == ZERO).all() and not shifted.mask[:, 5:].any()
    fewer = DelayPattern.of(TTS, TINY_LM, codebooks=2)
    assert fewer.made == (0, 1, 2)
    inputs = fewer.shift(torch.ones(1, 9, 7, dtype=torch.long)).inputs[0]
    assert (inputs[3, :2] == 16).all() and (inputs[3, 2:] == ZERO).all()  # start, then nothing


def test_shift_by_hand() -> None:
    lm = replace(TINY_LM, n_q=2, dep_q=2, delays=(0, 0, 1), depth=replace(
        TINY_LM.depth, schedule=(0, 1), inputs=(0, 1)))  # fmt: skip
    codes = torch.tensor([[[7, 8, 9], [1, 2, 3], [4, ZERO, 6]]])
    chat = DelayPattern.of(Task("x", Role.SAMPLED, Role.SAMPLED), lm).shift(codes)
    V, C = lm.text_vocab, lm.codebook_size
    assert chat.inputs[0].tolist() == [[V, 7, 8, 9], [C, 1, 2, 3], [C, C, 4, ZERO]]
    assert chat.targets[0].tolist() == [[7, 8, 9, ZERO], [1, 2, 3, ZERO], [C, 4, ZERO, 6]]
    assert chat.mask[0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 0, 1]]
    late = DelayPattern.of(Task("x", Role.SAMPLED, Role.SAMPLED, lag_s=-0.16), lm).shift(codes, 4)
    assert late.inputs[0, 1].tolist() == [C, ZERO, ZERO, 1]  # starts at once, sounds two frames on
    assert late.mask[0].int().tolist() == [[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("task", [CHAT, ASR, TTS, replace(ASR, lag_s=-0.3)], ids=lambda t: t.name)
@pytest.mark.parametrize("lm", [TINY_LM, SLOPES, replace(TINY_LM, hears_lag=True)])
def test_engine_feeds_what_training_feeds(task: Task, lm: object) -> None:
    """Teacher-forced ring == shift, and outputs come back re-aligned; pauses, garbage, a reset."""
    pattern = DelayPattern.of(task, lm)  # type: ignore[arg-type]
    B, K, T = 3, 9, 15
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (B, K, T), generator=generator)
    shifted = pattern.shift(codes)
    ring, clock = DelayRing.of(pattern, B), torch.zeros(B, dtype=torch.long)
    given, made = torch.tensor(pattern.given), torch.tensor(pattern.made)
    S, D = T + pattern.span, pattern.latency
    seen: list[list[Tensor]] = [[] for _ in range(B)]
    outs: list[list[Tensor]] = [[] for _ in range(B)]
    for step in range(6 * S):
        if step == S:
            clock[1], seen[1], outs[1] = 0, [], []  # a reset is a rewound clock
        active = (torch.rand(B, generator=generator) < 0.6) & (clock < S)
        if len(given):
            frame = (clock - 1).clamp(0, T - 1)[:, None, None].expand(-1, K, 1)
            tokens = codes.gather(2, frame)[:, given, 0]
            tokens = torch.where(active[:, None] & (clock[:, None] <= T), tokens, 99)
            at = clock[:, None] + ring.grid.delays[given]
            ring.write(given, at, tokens, active & (clock > 0))
        column = ring.read(clock)
        target = shifted.targets.gather(2, clock.clamp(max=S - 1)[:, None, None].expand(-1, K, 1))
        spoken = torch.where(active[:, None], target[:, made, 0], 77)
        ring.write(made, (clock + 1)[:, None].expand(-1, len(made)), spoken, active)
        out, ready = ring.out(made, clock + 1, D)
        for b in range(B):
            if active[b]:
                seen[b].append(column[b])
                outs[b].append(out[b])
                assert bool(ready[b]) == (int(clock[b]) >= D)
        clock += active
    for b in range(B):
        columns = torch.stack(seen[b], -1)
        heard = shifted.inputs[b].clone()
        heard[columns == 99] = 99  # beyond the end of what was given
        if pattern.mutes[0] < pattern.delays[0]:  # text sampled during the lag is heard
            columns[0, : pattern.delays[0] + 1] = heard[0, : pattern.delays[0] + 1]
        assert torch.equal(columns, heard)
        frames = torch.stack(outs[b], -1)
        assert (frames[:, :D] == UNKNOWN).all()
        assert torch.equal(frames[:, D : D + T], codes[b, made])
