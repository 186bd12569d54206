"""Samples for the language model: grids of tokens [K, T] for each task, put together from takes.

All three tasks fill the same streams; who is given, who is sampled and the lag make the difference:
    asr     takes of anyone as the voice, their words as text
    tts     takes of the model's own voice, their words as text
    chat    a question as the partner, then its answer as text and own voice
A grid is undelayed; `DelayPattern.shift` does the rest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moshi_cli.core.config import LmConfig
from moshi_cli.core.errors import InputError
from moshi_cli.core.losses import join_shifted, learnable
from moshi_cli.core.streams import ZERO, DelayPattern, Shifted, Task
from moshi_cli.core.text import PAD, Text, align
from moshi_cli.tasks.asr import ASR
from moshi_cli.tasks.cache import FRAME_HZ, HISS, SILENCE, Cache, Take, draw
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.spelling import Spelled, Spelling, Word, cut, labels, spell
from moshi_cli.tasks.stages import Casting, weight_of
from moshi_cli.tasks.tts import TTS

Words = list[Word]


@dataclass(frozen=True)
class LmBatch:
    """What a step of the language model learns from."""

    shifted: Shifted  # the mask holds what is to be predicted
    lags: Sequence[str | None]  # per row, the value of the condition `lag`; None: it is not told
    names: list[str]  # per row, the task
    letters: Tensor | None = None  # long[B, 4, S], see spelling.py


class Samples:
    """Draws grids of T frames from a cache. What is drawn depends on the generator alone."""

    def __init__(
        self,
        cache: Cache,
        text: Text,
        lm: LmConfig,
        lag_s: Mapping[str, float],
        casting: Casting | None = None,
        other_lags_s: Mapping[str, Sequence[float]] | None = None,
        spelling: Spelling | None = None,
    ):
        self.spelling = spelling or Spelling()
        self.cache, self.text, self.lm = cache, text, lm
        self.casting = c = casting or Casting()
        self.tasks: dict[str, Task] = {
            task.name: replace(task, lag_s=lag_s[task.name])
            for task in (ASR, TTS, CHAT)
            if task.name in lag_s
        }
        others = other_lags_s or {}
        self.others = {
            name: [replace(task, lag_s=lag) for lag in others.get(name, ())]
            for name, task in self.tasks.items()
        }
        takes = cache.takes
        self.silence = next((t for t in takes if t.kind == SILENCE), None)
        self.hiss = [t for t in takes if t.kind == HISS]
        self.spoken = [t for t in takes if t.words]
        self.heard = [t for t in self.spoken if t.kind.startswith(c.heard)] if c.heard else []
        if c.heard:
            self.spoken = [t for t in self.spoken if not t.kind.startswith(c.heard)]
        self.own = [t for t in self.spoken if t.kind.startswith(c.own)]
        self.other = [t for t in self.spoken if not t.kind.startswith((*c.own, c.asks))]
        self.strangers = self.other + self.heard  # whose words are spoken, too
        self.questions = [t for t in self.spoken if t.kind.startswith(c.asks) and t.qa is not None]
        self.answers: dict[int, list[Take]] = defaultdict(list)
        for t in self.spoken:
            if t.kind.startswith(c.answers) and t.qa is not None:
                self.answers[t.qa].append(t)
        self.questions = [t for t in self.questions if t.qa in self.answers]
        self.sums: dict[int, Tensor] = {}  # list of takes -> cumulative odds

    def pick(self, takes: list[Take], generator: torch.Generator) -> Take:
        """One of them, by the odds of its kind."""
        if not takes:
            raise InputError("the cache has no takes for one of the tasks")
        if id(takes) not in self.sums:
            weights = [weight_of(take.kind, self.casting.odds) for take in takes]
            self.sums[id(takes)] = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        sums = self.sums[id(takes)]
        at = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
        return takes[min(int(torch.searchsorted(sums, at, right=True)), len(takes) - 1)]

    def quiet(self, frames: int) -> Tensor:
        """Silence as `Cache.read` gives it; nothing at all if the cache has none."""
        if self.silence is None:
            return self.cache.nothing(frames)
        return self.looped(self.silence, frames)

    def looped(self, take: Take, frames: int) -> Tensor:
        """A take, again and again, as `Cache.read` gives it."""
        codes = self.cache.read(take)
        return codes.repeat(1, -(-frames // codes.shape[1]))[:, :frames]

    def line(self, frames: int, generator: torch.Generator) -> Tensor:
        """A partner who says nothing: silence or faint noise."""
        if not self.hiss or float(torch.rand((), generator=generator)) >= self.casting.hiss:
            return self.quiet(frames)
        return self.looped(self.pick(self.hiss, generator), frames)

    def row(self, words: Sequence[tuple[str, float, float]], frames: int) -> Tensor:
        """Text row long[T]: every word with a boundary of its own."""
        return align(words, frames, self.text, crowding="space")

    def monologue(
        self, takes: list[Take], frames: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Words, Tensor]:
        """Takes one after the other, cut to T frames. -> grid [K, T], partner absent; what its
        codes leave of the voice [R, T]; its words; what its frames are worth [T]"""
        voice, words, worth, at = [], [], [], 0
        while at < frames:
            take = self.pick(takes, generator)
            voice.append(self.cache.read(take))
            words += [(w, s + at / FRAME_HZ, e + at / FRAME_HZ) for w, s, e in take.words]
            worth.append(worth_of(take))
            at += take.frames
        grid = torch.full((self.lm.streams, frames), ZERO)
        grid[0] = self.row(words, frames)
        whole = torch.cat(voice, 1)[:, :frames]
        grid[1 : 1 + self.lm.voice_q] = whole[: self.lm.voice_q]
        return grid, whole[self.cache.codebooks :], words, torch.cat(worth)[:frames]

    def dialogue(
        self, frames: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[Spelled], list[Spelled], Tensor]:
        """Questions and answers in turns, cut to T frames. -> grid [K, T], what its codes leave of
        the partner [R, T], what both say, partner's first, what the own voice's frames are worth
        [T]

        The partner may speak into an answer, which then breaks off: its voice and its words.
        """
        c, Q = self.casting, self.lm.voice_q
        own, partner = self.quiet(frames), self.line(frames, generator)
        worth = torch.ones(frames)
        words: Words = []  # of the text row
        said: list[Spelled] = []  # of the sound: the same, unless broken off
        asked: Words = []
        at, spoken = 0, 0  # frames of the partner, of the model, that are settled
        over_s = 0.0  # end of the partner's last word
        into_s: float | None = None  # when the next one speaks into what the model says
        while at < frames:
            if into_s is None and float(torch.rand((), generator=generator)) < c.wait:
                at += round(draw(c.wait_s, generator) * FRAME_HZ)
                if at >= frames:
                    break
            chatter = float(torch.rand((), generator=generator)) < c.chatter and self.other
            ask = self.pick(self.other if chatter else self.questions, generator)
            if into_s is not None:
                earliest = math.ceil(over_s * FRAME_HZ)  # what is left of the last take is silence
                at = max(earliest, round((into_s - ask.words[0][1]) * FRAME_HZ))
                onset_s = at / FRAME_HZ + ask.words[0][1]
                stop = round((onset_s + draw(c.stop_s, generator)) * FRAME_HZ)
                if stop < spoken:
                    own[:, stop:] = self.quiet(frames)[:, stop:]
                    worth[stop:] = 1
                    words = [word for word in words if word[1] < stop / FRAME_HZ]
                    said = cut(said, stop / FRAME_HZ)
                    spoken = stop
                into_s = None
                if at >= frames:
                    break
            end = min(at + ask.frames, frames)
            partner[:, at:end] = self.cache.read(ask)[:, : end - at]
            over_s = at / FRAME_HZ + ask.words[-1][2]
            asked += [(w, s + at / FRAME_HZ, e + at / FRAME_HZ) for w, s, e in ask.words]
            at += ask.frames
            if chatter or ask.qa is None:
                continue
            answer = self.pick(self.answers[ask.qa], generator)
            start_s = over_s + draw(c.gap_s, generator)  # of its first word
            first = round((start_s - answer.words[0][1]) * FRAME_HZ)
            skip = max(spoken - first, 0)  # silence in front that there is no room for
            first += skip
            end = min(first + answer.frames - skip, frames)
            if end > first:
                own[:, first:end] = self.cache.read(answer)[:, skip : skip + end - first]
                worth[first:end] = worth_of(answer)[skip : skip + end - first]
            shift_s = (first - skip) / FRAME_HZ
            replied = [(w, s + shift_s, e + shift_s) for w, s, e in answer.words]
            words += replied
            said += self.spelling.spelled(replied)
            spoken = first + answer.frames - skip
            begin_s, done_s = (x + shift_s for x in (answer.words[0][1], answer.words[-1][2]))
            if c.interrupt and float(torch.rand((), generator=generator)) < c.interrupt:
                into_s = draw((begin_s + 0.2, max(done_s - 0.3, begin_s + 0.2)), generator)
            else:
                at = max(at, round((done_s + draw(c.rest_s, generator)) * FRAME_HZ))
        grid = torch.full((self.lm.streams, frames), ZERO)
        grid[0] = self.row(words, frames)
        grid[1 : 1 + Q] = own[:Q]
        grid[1 + Q :] = partner[: self.lm.partner_q]
        residual = partner[self.cache.codebooks :]
        return grid, residual, self.spelling.spelled(asked), said, worth

    def grid(
        self, task: str, frames: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[Spelled] | None, list[Spelled] | None, Tensor]:
        """One sample of a task. -> long[K, T], what codes leave of the given voice [R, T], what is
        heard and what is spoken (None: nothing), what frames of the own voice are worth [T]"""
        if task == "chat":
            return self.dialogue(frames, generator)
        if task == "asr":
            grid, residual, words, worth = self.monologue(
                self.heard or self.spoken, frames, generator
            )
            return grid, residual, self.spelling.spelled(words), None, worth
        takes, others = self.own, self.casting.others
        if others and self.strangers and float(torch.rand((), generator=generator)) < others:
            takes = self.strangers
        grid, residual, words, worth = self.monologue(takes, frames, generator)
        return grid, torch.zeros_like(residual), None, self.spelling.spelled(words), worth

    def batch(
        self, shares: Mapping[str, float], frames: int, batch: int, generator: torch.Generator
    ) -> LmBatch:
        """`batch` samples of T frames, their tasks drawn by share."""
        names = [name for name in shares if name in self.tasks and shares[name] > 0]
        odds = torch.tensor([float(shares[name]) for name in names])
        picked = torch.multinomial(odds, batch, replacement=True, generator=generator)
        drawn = [names[i] for i in picked.tolist()]
        parts, lags, letters = [], [], []
        for name in drawn:
            task = self.timed(name, generator)
            pattern = DelayPattern.of(task, self.lm)
            grid, residual, heard, spoken, worth = self.grid(name, frames, generator)
            left = residual[None] if self.lm.residual else None
            counts = None if bool((worth == 1).all()) else worth[None]
            parts.append(learnable(pattern.shift(grid[None], frames, left, counts), pattern))
            late = max(-task.lag_frames, 0)
            letters.append(labels(spell(heard, frames), spell(spoken, frames), late))
            lags.append(str(task.lag_frames))
        return LmBatch(join_shifted(parts), lags, drawn, torch.cat(letters))

    def timed(self, name: str, generator: torch.Generator) -> Task:
        """A task with its own lag, or as often with one of its others."""
        others = self.others[name]
        if not others or float(torch.rand((), generator=generator)) < 0.5:
            return self.tasks[name]
        return others[int(torch.randint(len(others), (), generator=generator))]


def worth_of(take: Take) -> Tensor:
    """What each frame of a take is worth to who learns to say it, float32 [T]: as much as the word
    that began last, and 1 before the first."""
    worth = torch.ones(take.frames)
    for (_, start_s, _), each in zip(take.words, take.worth, strict=False):
        worth[int(start_s * FRAME_HZ) :] = each
    return worth


def blank_share(batch: LmBatch) -> float:
    """Part of the text targets that are PAD."""
    text = batch.shifted.targets[:, 0][batch.shifted.mask[:, 0]]
    return float((text == PAD).float().mean())
