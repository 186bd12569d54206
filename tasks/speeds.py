"""Speeds: a recording is heard at several, and kept are the words of which the model is surest.

A voice unlike those that a model knows may be like one of them a little slower or quicker, which
moves its pitch, its formants and its pace together (speed perturbation, Ko et al. 2015, but while
hearing instead of in training). Every copy of the recording is heard by itself; then the model is
asked how likely it finds the words that it wrote, given what it heard. (Not in the paper.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moshi_cli.core.audio import Resampler
from moshi_cli.core.engine import Engine
from moshi_cli.core.streams import FRAME_HZ, Task
from moshi_cli.core.text import Word
from moshi_cli.core.weights import Model
from moshi_cli.tasks.asr import (
    Hearing,
    HearingOptions,
    collect,
    hearing_sampling,
    hearing_task,
    refresh_s,
)
from moshi_cli.tasks.cache import encode_whole
from moshi_cli.tasks.events import End, Event, Failed, Pause, Warning
from moshi_cli.tasks.likelihood import Examiner, Scene, nlls
from moshi_cli.tasks.loop import Give, Output, drive
from moshi_cli.tasks.sound import FRAME_S, FRAME_SAMPLES, Sound
from moshi_cli.tasks.subtitles import Segmenter, Transcript
from moshi_cli.tasks.takes import LOST

RATE_HZ = 24_000
SLOWEST, QUICKEST = 0.5, 2.0
STRETCH = 750  # frames after which what is written is examined, even if it goes on
NONE = 1.0  # nats of a token: words of which a model is less sure are no better than no words


class Copy(Hearing):
    """One channel of a recording at one speed. Times of its events are its own."""

    def __init__(self, model: Model, task: Task, sound: Sound, speed: float, **how: Any) -> None:
        super().__init__(model, task, sound, **how)
        self.speed = speed
        self.examiner = Examiner(model.lm, model.text, task) if model.lm and model.text else None
        self.mimi = model.mimi
        self.events: list[Event] = []
        self.missed = 0.0  # nats of the tokens of words, each cut at LOST
        self.tokens = 0
        self.frames: list[Tensor] = []  # of sound that is not examined yet
        self.words: list[Word] = []  # that are not, either
        self.first = 0  # frame with which they begin

    def open(self, engine: Engine, slot: int) -> None:
        """Before it begins afresh, all that is written of what was heard is examined."""
        self._examine(self.out)
        super().open(engine, slot)

    def feed(self) -> Tensor | Give:
        before = self.heard
        fed = super().feed()
        if self.heard > before and isinstance(fed, Tensor):
            self.frames.append(fed.clone())
        return fed

    def take(self, output: Output) -> Iterable[Event]:
        for event in super().take(output):
            self._note(event)
        if self.out - self.first >= STRETCH and not self.stream.tokens:  # between two words
            self._examine(self.out)
        return ()

    def finish(self) -> Iterable[Event]:
        for event in super().finish():
            self._note(event)
        self._examine(self.heard)
        return ()

    def _note(self, event: Event) -> None:
        """Nothing is told of a copy that may not be kept."""
        self.events.append(event)
        if isinstance(event, Word):
            self.words.append(event)

    def _examine(self, end: int) -> None:
        """How sure the model is of the words up to frame `end`, which are all that it wrote; what
        follows is heard, too, as it was when it wrote them."""
        count = end - self.first
        if self.words and count > 0:
            assert self.examiner is not None
            codes, residual = encode_whole(self.mimi, torch.cat(self.frames, 1))
            start_s = self.first / FRAME_HZ
            words = tuple((w.text, w.start_s - start_s, w.end_s - start_s) for w in self.words)
            lm = self.examiner.lm
            found = nlls(lm, self.examiner.batch([Scene(codes, words, residual)]))
            silent = (found.text == lm.config.text_pad) | (found.text == lm.config.text_epad)
            said = found.mask[:, 0] & ~silent
            self.missed += float(found.nats[:, 0][said].clamp(max=LOST).sum())
            self.tokens += int(said.sum())
        if count > 0:
            del self.frames[:count]
            self.first = end
        self.words.clear()

    @property
    def doubt(self) -> float:
        """Nats of a token."""
        return self.missed / self.tokens if self.tokens else NONE

    @property
    def heard_s(self) -> float:
        return self.heard * FRAME_S * self.speed

    def told(self, end_s: float) -> Iterator[Event]:
        """What it wrote, by the clock of the recording, which ends at `end_s`."""
        segmenter = Segmenter()
        for event in self.events:
            if isinstance(event, Word):
                start_s, word_end_s = (
                    min(at * self.speed, end_s) for at in (event.start_s, event.end_s)
                )
                word = replace(event, start_s=start_s, end_s=word_end_s)
                yield from segmenter.push(word)
                yield word
            elif isinstance(event, Pause | Warning):
                yield replace(event, at_s=min(event.at_s * self.speed, end_s))
        yield from segmenter.flush()


class Speeds:
    """One channel of a recording: sessions for an engine, and what is kept when all have ended."""

    def __init__(
        self, model: Model, task: Task, source: Any, speeds: Sequence[float], **how: Any
    ) -> None:
        """source: frames [1, ≤1920], which may count their true `samples`. how: as Hearing's."""
        self.sound = Counted(source)
        parts = itertools.tee(self.sound, len(speeds))
        self.sessions = [
            Copy(model, task, Sound(played(part, speed)), speed, **how)
            for part, speed in zip(parts, speeds, strict=True)
        ]
        self.left = len(self.sessions)

    def end(self) -> Iterator[Event]:
        """One more copy is over: after the last, the events of that which is kept."""
        self.left -= 1
        if not self.left:
            surest = min(self.sessions, key=lambda copy: copy.doubt)  # the first of equal ones
            yield from surest.told(self.audio_s)

    @property
    def audio_s(self) -> float:
        """Sound of the recording so far."""
        return self.sound.samples / RATE_HZ


class Counted:
    """Frames, with a count of their samples where they have none."""

    def __init__(self, source: Any) -> None:
        self.source, self.given = source, 0

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self.source:
            self.given += frame.shape[-1]
            yield frame

    @property
    def samples(self) -> int:
        """True samples so far."""
        return int(getattr(self.source, "samples", self.given))


def played(frames: Iterable[Tensor], speed: float) -> Iterator[Tensor]:
    """float32 [1, n] at 24 kHz -> frames [1, 1920] of the same, so many times as quick."""
    resampler = Resampler(round(RATE_HZ * speed))
    held = torch.zeros(1, 0)
    for frame in itertools.chain(frames, [None]):
        block = torch.zeros(0, 1) if frame is None else frame.reshape(-1, 1)
        more = torch.from_numpy(resampler(block.numpy(), last=frame is None))
        held = torch.cat([held, more.reshape(1, -1)], 1)
        while held.shape[1] >= FRAME_SAMPLES:
            yield held[:, :FRAME_SAMPLES]
            held = held[:, FRAME_SAMPLES:]
    if held.shape[1]:
        yield held


def hear_best(
    model: Model, sound: Tensor | Iterable[Tensor], speeds: Sequence[float], *, seed: int = 0
) -> Transcript:
    """Words and times of one recording, float32 [S] at 24 kHz or frames [1, ≤1920], as heard at the
    speed at which the model is surest. ModelError if it cannot write down what it hears."""
    task = hearing_task(model.config)
    if isinstance(sound, Tensor):
        sound = sound.reshape(1, -1).split(FRAME_SAMPLES, 1)
    options = HearingOptions(refresh_s=refresh_s(model.config))
    copies = Speeds(model, task, sound, speeds, seed=seed, options=options)
    engine = Engine(model, task, len(speeds), sampling=hearing_sampling(model.config))

    def events() -> Iterator[Event]:
        for _, event in drive(engine, copies.sessions):
            if isinstance(event, Failed):
                yield event
            elif isinstance(event, End):
                yield from copies.end()
        yield End(copies.audio_s)

    return collect(events())
