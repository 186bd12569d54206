"""Excerpts of cached recordings as samples: one stream or two, at any lag.

What a stage of the paper (§4.3) draws from a cache is a `Task`, its lag or a range of lags, and
whose line is the own voice:
    speech   one line; text and voice are both learnt, the lag is drawn per sample (pre-training)
    asr      one line is given, its words are learnt
    tts      the words are steered, one line is learnt
    chat     two lines: the own one is learnt with its words, the partner's is given
Grids are undelayed; `DelayPattern.shift` does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moshi_cli.core.config import LmConfig
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.core.losses import join_shifted, learnable
from moshi_cli.core.script import multiplex
from moshi_cli.core.streams import FRAME_HZ, ZERO, DelayPattern, Role, Task
from moshi_cli.core.text import Crowding, Text, align
from moshi_cli.core.weights import Model
from moshi_cli.tasks.asr import ASR
from moshi_cli.tasks.cache import Cache, Take, Words
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.encoded import cache_of
from moshi_cli.tasks.samples import LmBatch
from moshi_cli.tasks.stages import LmStage, Source
from moshi_cli.tasks.tts import TTS

SPEECH = Task("speech", text=Role.SAMPLED, voice=Role.SAMPLED)
TASKS = {task.name: task for task in (SPEECH, ASR, TTS, CHAT)}
OWN = ("first", "second", "either")  # whose line of a take is the own voice

# The published fine-tuning data lets a word push out what is left of the one before it. Where words
# have to be told apart, in recognition and in the script of a TTS, each has its boundary instead.
CROWDING: dict[str, Crowding] = {"chat": "replace"}


def text_row(
    words: Iterable[tuple[str, float, float]],
    frames: int,
    text: Text,
    lm: LmConfig,
    task: Task,
    ahead: int = 0,
) -> Tensor:
    """Timed words as the text stream of a task, long[frames].

    ahead: words of look-ahead, for models that read a second text stream.
    """
    row = align(words, frames, text, crowding=CROWDING.get(task.name, "space"))
    two = ahead and lm.demux and task.text is Role.STEERED
    return multiplex(row, lm.text_vocab + 1, ahead) if two else row


class Excerpts:
    """Samples of one task from takes, each frame as likely as any other."""

    def __init__(
        self,
        takes: Iterable[Take],
        cache: Cache,
        text: Text,
        lm: LmConfig,
        task: Task,
        *,
        lags_s: tuple[float, float] = (0.0, 0.0),
        own: str = "first",
        ahead: int = 0,
    ):
        """own: whose line is the own voice. ahead: words of look-ahead of a second text stream."""
        self.takes, self.cache, self.text, self.lm, self.task = list(takes), cache, text, lm, task
        self.lags, self.own = tuple(int(s * FRAME_HZ) for s in lags_s), own
        self.two, self.ahead = task.partner is not Role.ABSENT, ahead
        if own not in OWN:
            raise UsageError(f"there is no line {own!r}", f"own is one of {', '.join(OWN)}")
        for take in self.takes:
            if take.lines < 2 and (self.two or own == "second"):
                hint = "encode conversations: stereo recordings, or with --layout turns"
                raise InputError(f"take {take.id!r} has one line, {task.name} needs two", hint)
        if not self.takes:
            raise InputError(f"the cache has no takes for {task.name}")
        self.ends = np.cumsum([take.frames for take in self.takes])

    @property
    def seconds(self) -> float:
        """Sound that can be drawn from."""
        return float(self.ends[-1]) / FRAME_HZ

    def pick(self, frames: int, generator: torch.Generator) -> tuple[Take, int, int]:
        """A take, the first frame of an excerpt of it, and the line that is the own voice."""
        at = int(torch.randint(int(self.ends[-1]), (), generator=generator))
        take = self.takes[int(np.searchsorted(self.ends, at, side="right"))]
        free = max(take.frames - frames, 0)
        first = int(torch.randint(free + 1, (), generator=generator))
        line = {"first": 0, "second": 1}.get(self.own)
        if line is None:
            line = int(torch.randint(take.lines, (), generator=generator))
        return take, first, line

    def grid(self, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One sample, undelayed: long[K, T]; what the codes leave of the given voice [R, T].

        Short takes of one line follow each other until the sample is full; a conversation that is
        too short is followed by nothing (ZERO), which is neither heard nor learnt.
        """
        Q, P = self.lm.voice_q, self.lm.partner_q
        grid = torch.full((self.lm.streams, frames), ZERO)
        residual = torch.zeros(self.cache.residual, frames)
        at = 0
        while at < frames:
            take, first, line = self.pick(frames - at, generator)
            voice = self.cache.read(take, first, frames - at, line)  # [Q + R, n]
            n = voice.shape[1]
            grid[0, at : at + n] = self.row(take, first, n, line)
            grid[1 : 1 + Q, at : at + n] = voice[:Q]
            if self.two:
                voice = self.cache.read(take, first, n, 1 - line)
                grid[1 + Q :, at : at + n] = voice[:P]
            if Role.GIVEN in (self.task.voice, self.task.partner):
                residual[:, at : at + n] = voice[self.cache.codebooks :]
            if self.two:
                break
            at += n
        return grid, residual

    def row(self, take: Take, first: int, frames: int, line: int) -> Tensor:
        """The words of a line as a text row long[frames]."""
        words: Words = take.partner_words if line else take.words
        shift_s = first / FRAME_HZ
        here = ((w, s - shift_s, e - shift_s) for w, s, e in words)
        return text_row(here, frames, self.text, self.lm, self.task, self.ahead)

    def batch(self, frames: int, batch: int, generator: torch.Generator) -> LmBatch:
        """`batch` samples of T frames, each with a lag of its own."""
        parts, lags = [], []
        low, high = self.lags
        for _ in range(batch):
            lag = low + int(torch.randint(high - low + 1, (), generator=generator))
            # half a frame further out, so that truncation towards zero gives `lag` itself
            task = replace(self.task, lag_s=(lag + 0.5 * np.sign(lag)) / FRAME_HZ)
            pattern = DelayPattern.of(task, self.lm)
            grid, residual = self.grid(frames, generator)
            left = residual[None] if self.lm.residual else None
            parts.append(learnable(pattern.shift(grid[None], frames, left), pattern))
            lags.append(str(lag))
        return LmBatch(join_shifted(parts), lags, [self.task.name] * batch)


def open_excerpts(source: Source, stage: LmStage, model: Model) -> Excerpts:
    """What `moshi data encode` made, for the task that is the source's form."""
    assert model.lm is not None and model.text is not None
    width = 2 * model.lm.config.residual
    cache = Cache(cache_of(source.folder), model.mimi.num_codebooks, width)
    takes = [
        t
        for t in cache.takes
        if t.kind.startswith(source.kinds or ("",)) and not t.kind.startswith(source.skip or "\0")
    ]
    task = TASKS[source.form]
    if task is SPEECH:
        lags_s = stage.lag_range_s
    else:
        lags_s = (stage.lag_s.get(task.name, 0.0),) * 2
    lm = model.lm.config
    more: dict[str, Any] = {"own": source.own, "ahead": model.config.ahead}
    return Excerpts(takes, cache, model.text, lm, task, lags_s=lags_s, **more)
