"""Spoken dialogue: the partner is heard, words and voice of the model are sampled (paper §3.4).

A `Talking` is one conversation in a slot. Its sound is exactly as long as what it hears plus the
silence at the end, and frame f of the reply belongs beside frame f of the input: both may be put
into one stereo file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_cli.core.config import Sampling
from moshi_cli.core.engine import Engine
from moshi_cli.core.streams import FRAME_HZ, UNKNOWN, Role, Task
from moshi_cli.core.text import EPAD, PAD, WordStream
from moshi_cli.core.weights import Model
from moshi_cli.tasks.events import Event, Failed, Piece, Speech, Turn, Word
from moshi_cli.tasks.loop import Give, Output, drive
from moshi_cli.tasks.sound import FRAME_SAMPLES, Sound
from moshi_cli.tasks.watch import Ear, Voice

CHAT = Task("chat", text=Role.SAMPLED, voice=Role.SAMPLED, partner=Role.GIVEN)


@dataclass(frozen=True)
class TalkingOptions:
    """The frame of one conversation."""

    lead_s: float = 0.0  # silence before the sound, for the model to settle; its reply is dropped
    tail_s: float = 6.0  # silence after it, for the model to finish
    live: bool = False  # one frame out for every frame in, at once; silence where none is whole


class Talking:
    """One conversation: the user's frames in; the model's frames, words and turns out."""

    def __init__(
        self,
        model: Model,
        task: Task,
        sound: Sound,
        *,
        seed: int = 0,
        options: TalkingOptions | None = None,
        prompt: Tensor | None = None,
        name: Any = None,
    ) -> None:
        """prompt: long[K, T], what the model is made to say in its first frames (UNKNOWN: free)."""
        assert model.text is not None
        self.text, self.sound, self.seed, self.name = model.text, sound, seed, name
        self.options, self.prompt = options or TalkingOptions(), prompt
        self.translates = model.config.kind == "hibiki"  # and wants to be told when all is said
        self.lead = round(self.options.lead_s * FRAME_HZ)  # frames
        self.tail_samples = round(self.options.tail_s * FRAME_HZ * FRAME_SAMPLES)
        self.words = WordStream(model.text)
        self.given = 0  # samples of reply
        self.frame = -self.lead  # of the next output
        self.user, self.moshi = (Ear(), Voice()), (Ear(), Voice())
        self.heard = -self.lead  # frames
        self.told: list[Event] = []  # to be said with the next output
        self.primed = False

    def open(self, engine: Engine, slot: int) -> None:
        self.primed = False
        engine.open(slot, seed=self.seed, prompt=self.prompt, prime=False)

    def feed(self) -> Tensor | Give:
        """Silence in front, the user's sound, silence for as long as a reply is due."""
        if not self.primed:
            self.primed = True
            return Give.NOTHING
        frame = self.sound.next() if self.heard >= 0 else None
        if frame is None:
            if self.translates and self.sound.ended:
                return Give.OVER
            frame = torch.zeros(1, FRAME_SAMPLES)
        if self.heard >= 0:
            self.told += _turns("user", self.user, frame, self.heard)
        self.heard += 1
        return frame

    def skip(self) -> Iterable[Event]:
        """No whole frame yet: silence, where someone waits for it."""
        if self.options.live:
            yield from self._speech(torch.zeros(1, FRAME_SAMPLES))

    def take(self, output: Output) -> Iterable[Event]:
        """One frame of reply."""
        assert output.pcm is not None
        at, self.frame = self.frame, self.frame + 1
        told, self.told = self.told, []
        yield from told
        if at < 0 or self.over:
            return
        if output.text > PAD:
            yield Piece(self.text.piece(output.text), at / FRAME_HZ)
        yield from self.words.push(output.text)
        yield from _turns("moshi", self.moshi, output.pcm, at)
        yield from self._speech(output.pcm)

    def _speech(self, pcm: Tensor) -> Iterator[Event]:
        due = self.due - self.given
        if due > 0:
            pcm = pcm[:, :due]
            yield Speech(pcm, self.given / FRAME_HZ / FRAME_SAMPLES)
            self.given += pcm.shape[1]

    def finish(self) -> Iterable[Event]:
        """The last word."""
        yield from self.words.flush()

    @property
    def due(self) -> int:
        """Samples of reply that are due by now."""
        return self.sound.samples + (self.tail_samples if self.sound.ended else 0)

    @property
    def over(self) -> bool:
        """Whether the whole reply is out."""
        return self.sound.ended and self.given >= self.due

    @property
    def audio_s(self) -> float:
        """Sound of the reply so far."""
        return self.given / FRAME_HZ / FRAME_SAMPLES


def answer_now(model: Model, frames: int) -> Tensor:
    """A prompt that makes the model begin a word after so many frames: an EPAD there.

    frames: of the question, the silence in front of it included. -> long[K, frames + 1]
    """
    assert model.lm is not None
    prompt = torch.full((model.lm.config.streams, frames + 1), UNKNOWN)
    prompt[0, frames] = EPAD
    return prompt


def _turns(who: str, ears: tuple[Ear, Voice], frame: Tensor, at: int) -> Iterator[Turn]:
    """The beginning or end of a turn that this frame reveals."""
    ear, voice = ears
    back = voice.begin_frames if not voice.speaking else voice.stop_frames
    if voice.push(ear(frame)):
        yield Turn(who, voice.speaking, max(0, at + 1 - back) / FRAME_HZ)


# For those who call it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What the model said in one conversation."""

    pcm: Tensor  # float32 [S]
    words: tuple[Word, ...]
    pieces: tuple[Piece, ...]  # its inner monologue, token by token
    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def converse(
    model: Model,
    sound: Tensor | Iterable[Tensor],
    *,
    sampling: Sampling | None = None,
    options: TalkingOptions | None = None,
    seed: int = 0,
) -> Reply:
    """The reply to one recording: float32 [S] at 24 kHz, or frames [1, 1920]."""
    task = model.fit(CHAT)
    engine = Engine(model, task, 1, sampling=sampling)
    talking = Talking(model, task, Sound(sound), seed=seed, options=options)
    return gather(event for _, event in drive(engine, [talking]))


def gather(events: Iterable[Event]) -> Reply:
    """The reply that the events of a session make."""
    found: dict[type, list[Any]] = {Speech: [], Word: [], Piece: [], Turn: []}
    for event in events:
        if isinstance(event, Failed):
            raise event.error
        if type(event) in found:
            found[type(event)].append(event)
    sound = [event.pcm.reshape(-1) for event in found[Speech]]
    pcm = torch.cat(sound) if sound else torch.zeros(0)
    return Reply(pcm, tuple(found[Word]), tuple(found[Piece]), tuple(found[Turn]))
