"""Takes: a sentence is spoken several times, and kept is what the model itself hears best.

A model that hears and speaks with one set of weights can listen to itself. What was to be said is
known, so nothing is searched for: one pass over all takes of a sentence tells how likely each of
its words is, given what is heard. (Best of n; not in the paper.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.config import LmConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.streams import ZERO
from moshi_cli.core.weights import Model
from moshi_cli.tasks.asr import ASR
from moshi_cli.tasks.events import End, Event, Failed, Speech, Warning, Word
from moshi_cli.tasks.likelihood import Examiner, Scene, nlls
from moshi_cli.tasks.loop import Output, drive
from moshi_cli.tasks.manner import Manner
from moshi_cli.tasks.sound import FRAME_SAMPLES
from moshi_cli.tasks.tts import Recording, Speaking, keep, read, speaking_engine
from moshi_cli.tasks.wording import Item, Say

RATE_HZ = 24_000
LOST = 2.0  # nats from which a token is not heard: by how far it is missed is no matter
LEAST, MOST = 3, 40  # words of a sentence that is spoken by itself


class Take(Speaking):
    """A sentence in a slot, whose codes are kept and not decoded."""

    def __init__(self, model: Model, items: Sequence[Item], part: int, **how: Any) -> None:
        super().__init__(model, [list(items)], **how)
        self.part = part  # number of the sentence in its text
        self.codes: list[Tensor] = []  # long[Q] each
        self.spoken: list[Word] = []
        self.warnings: list[Warning] = []

    def made(self, output: Output) -> Iterable[Event]:
        """One frame of codes."""
        assert output.codes is not None
        self.codes.append(output.codes)
        self.samples += FRAME_SAMPLES
        return ()

    def take(self, output: Output) -> Iterable[Event]:
        return self._noted(super().take(output))

    def finish(self) -> Iterable[Event]:
        return self._noted(super().finish())

    def _noted(self, events: Iterable[Event]) -> Iterable[Event]:
        """Nothing is told of a take that may not be kept."""
        for event in events:
            if isinstance(event, Word):
                self.spoken.append(event)
            elif isinstance(event, Warning):
                self.warnings.append(event)
        return ()

    def voice(self) -> Tensor:
        """What was said, long[Q, T]."""
        return torch.stack(self.codes, 1)


class Ear:
    """A model that listens to what it said."""

    def __init__(self, model: Model) -> None:
        """ModelError if it does not hear."""
        assert model.lm is not None and model.text is not None
        if ASR.name not in model.config.lags:
            raise ModelError("this model cannot hear what it says", hint="use --takes 1")
        self.examiner = Examiner(model.lm, model.text, model.config.fit(ASR))

    def missed(self, takes: Sequence[Take]) -> list[float]:
        """How much of the words of each take is not heard, in nats: by a quarter of its codebooks,
        by half of them and by all. What is clear is understood by few; by all of them a model knows
        words of its small world however they are said.
        """
        lm = self.examiner.lm.config
        widths = (max(lm.voice_q // 4, 1), max(lm.voice_q // 2, 1), lm.voice_q)
        scenes = [scene(take, lm, width) for width in widths for take in takes]
        found = nlls(self.examiner.lm, self.examiner.batch(scenes))
        silent = (found.text == lm.text_pad) | (found.text == lm.text_epad)
        words = found.mask[:, 0] & ~silent  # [B, S]
        each = (found.nats[:, 0].clamp(max=LOST) * words).sum(1)
        return each.view(len(widths), -1).sum(0).tolist()


def scene(take: Take, lm: LmConfig, width: int) -> Scene:
    """The first codebooks of a take as the ear is given them; of the others it hears nothing."""
    codes = take.voice()[:width].cpu()
    codes = F.pad(codes, (0, 0, 0, lm.voice_q - len(codes)), value=ZERO)
    return Scene(codes[None], tuple((w.text, w.start_s, w.end_s) for w in take.spoken))


class Choice:
    """One text in several takes of each sentence: sessions for an engine that does not decode, and
    what is kept of those that have ended, in the order of the text."""

    def __init__(
        self, model: Model, items: Iterable[Item], takes: int, *, seed: int = 0, **how: Any
    ) -> None:
        """how: as `Speaking` takes it."""
        self.model, self.ear, self.count = model, Ear(model), takes
        self.sessions = [
            Take(model, part, i, seed=seed + i * takes + n, **how)
            for i, part in enumerate(sentences(items)) for n in range(takes)
        ]  # fmt: skip
        self.ended: dict[int, list[Take]] = {}  # sentence -> its takes, until one is kept
        self.part = 0  # sentence to be kept next
        self.samples = 0

    def end(self, take: Take) -> Iterator[Event]:
        """A take is over: words, sound and warnings of all sentences that can be kept now."""
        self.ended.setdefault(take.part, []).append(take)
        while len(self.ended.get(self.part, ())) == self.count:
            yield from self._kept(self.ended.pop(self.part))
            self.part += 1

    def _kept(self, takes: list[Take]) -> Iterator[Event]:
        takes.sort(key=lambda take: take.seed)  # they end in any order
        missed = self.ear.missed(takes)
        take = takes[missed.index(min(missed))]
        at_s = self.samples / RATE_HZ
        assert self.model.lm is not None
        with torch.no_grad():
            codes = take.voice().clamp(0, self.model.lm.config.codebook_size - 1)
            sound = self.model.mimi.decode(codes[None].to(self.model.device))[0].float().cpu()
        for word in take.spoken:
            yield Word(word.text, at_s + word.start_s, at_s + word.end_s)
        yield Speech(sound, at_s)
        yield from take.warnings
        self.samples += sound.shape[1]


def sentences(items: Iterable[Item]) -> list[list[Item]]:
    """A text in parts of at least `LEAST` words that end with a sentence, or after `MOST` words; a
    rest belongs to the part after it, and at the end of the text to the last one."""
    parts: list[list[Item]] = [[]]
    words = 0
    for item in items:
        parts[-1].append(item)
        if isinstance(item, Say) and any(c.isalnum() for c in item.word):
            words += 1
            if words >= MOST or (words >= LEAST and item.ends):
                parts.append([])
                words = 0
    if len(parts) > 1 and (not words or words < LEAST):
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def speak_best(
    model: Model, text: str, takes: int, *, seed: int = 0, manner: Manner | None = None
) -> Recording:
    """A text, the best of so many takes of each sentence. ModelError if the model cannot hear."""
    manner = manner or Manner()
    assert model.text is not None
    items = read(text, model.text, manner)
    choice = Choice(model, items, takes, seed=seed, manner=manner)
    engine = speaking_engine(model, takes, manner, decode=False)

    def events() -> Iterator[Event]:
        for take, event in drive(engine, choice.sessions):
            if isinstance(event, End):
                yield from choice.end(take)
            elif isinstance(event, Failed):
                yield event

    return keep(events())
