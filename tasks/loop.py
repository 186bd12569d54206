"""One loop for every task: sessions fill the slots of an engine, frames go in, events come out.

A session is one recording, one text or one conversation; it knows what to feed and what an output
means (`asr.Hearing`, `tts.Speaking`, `chat.Talking`). The loop knows slots. Sessions wait in line,
take a slot when one is free and do not notice each other: a batch gives what one by one gives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moshi_cli.core.config import Sampling
from moshi_cli.core.engine import Engine, Frame
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.core.streams import MADE, Task
from moshi_cli.core.weights import Model
from moshi_cli.tasks.events import End, Event, Failed, Speech, Word
from moshi_cli.tasks.sound import FRAME_SAMPLES, Sound

S = TypeVar("S", bound="Session")


@dataclass
class Output:
    """What one slot made in one step: a whole frame, all streams at the same time."""

    text: int  # token
    pcm: Tensor | None = None  # float32 [1, 1920], of tasks that speak
    pauses: tuple[float, ...] = ()  # probabilities of the pause heads, where the model has them
    codes: Tensor | None = None  # long[Q], of tasks that speak


class Give(Enum):
    """What a slot gets in place of sound."""

    NOTHING = "nothing"  # the step needs no sound
    OVER = "over"  # the voice is over, and the model is told so (Hibiki)
    PAUSE = "pause"  # no step for this slot


class Session(Protocol):
    """Someone who has a slot."""

    def open(self, engine: Engine, slot: int) -> None:
        """Take the slot: rewind it without priming it, and say what it has to know."""

    def feed(self) -> Tensor | Give:
        """What the next step hears: float32 [1, 1920], or no sound.

        The first step after `open` hears nothing. May block while a live source has nothing.
        Raises InputError.
        """

    def take(self, output: Output) -> Iterable[Event]:
        """Use the next whole frame of output."""

    def skip(self) -> Iterable[Event]:
        """A frame was heard that gave no whole frame of output yet."""

    def finish(self) -> Iterable[Event]:
        """What is left to say when the session is over."""

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do."""

    @property
    def audio_s(self) -> float:
        """Sound heard or made so far."""


@dataclass
class Seat(Generic[S]):
    """A session in its slot."""

    session: S
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    def react(self, output: Output | None, heard: bool) -> Iterator[Event]:
        """Events of one step."""
        if output is not None:
            yield from self._noted(self.session.take(output))
        elif heard:
            yield from self._noted(self.session.skip())

    def finish(self) -> Iterator[Event]:
        """The last events."""
        yield from self._noted(self.session.finish())
        yield End(self.session.audio_s, time.monotonic() - self.began, self.first_s)

    def _noted(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            if self.first_s is None and isinstance(event, Word | Speech):
                self.first_s = time.monotonic() - self.began
            yield event


def drive(engine: Engine, sessions: Iterable[S | None]) -> Iterator[tuple[S, Event]]:
    """Run sessions through the slots of an engine; pairs (session, event), End or Failed last.

    Sessions are pulled when a slot is free; None is none for now, while others go on. An InputError
    ends its own session only.
    """
    waiting = iter(sessions)
    seats: list[Seat[S] | None] = [None] * engine.slots
    pcm = torch.zeros(engine.slots, 1, FRAME_SAMPLES)

    def leave(slot: int) -> None:
        engine.close(slot)
        seats[slot] = None

    while True:
        for slot, seat in enumerate(seats):
            if seat is None and (session := next(waiting, None)) is not None:
                session.open(engine, slot)
                seats[slot] = Seat(session)
        if not any(seats):
            return
        active, ended = torch.zeros(2, engine.slots, dtype=torch.bool)
        hearing = [False] * engine.slots
        for slot, seat in enumerate(seats):
            if seat is None:
                continue
            try:
                fed = seat.session.feed()
            except (InputError, UsageError) as error:
                yield seat.session, Failed(error)
                leave(slot)
                continue
            active[slot], ended[slot] = fed is not Give.PAUSE, fed is Give.OVER
            if isinstance(fed, Tensor):
                pcm[slot], hearing[slot] = fed, True
        end = ended if ended.any() else None
        outputs = _outputs(engine.step(pcm, active, end=end)) if active.any() else {}
        for slot, seat in enumerate(seats):
            if seat is None:
                continue
            for event in seat.react(outputs.get(slot), hearing[slot]):
                yield seat.session, event
            if seat.session.over:
                for event in seat.finish():
                    yield seat.session, event
                leave(slot)


def _outputs(frame: Frame) -> dict[int, Output]:
    """Slot -> output, of slots that are ready."""
    ready = frame.ready.tolist()
    text = frame.text.tolist()
    pcm = None if frame.pcm is None else frame.pcm.float().cpu()
    pauses = None if frame.extra is None else frame.extra[..., 0].tolist()
    return {
        slot: Output(
            text[slot],
            None if pcm is None else pcm[slot].clone(),
            () if pauses is None else tuple(pauses[slot]),
            frame.codes[slot].cpu() if frame.codes.shape[1] else None,
        )
        for slot, is_ready in enumerate(ready)
        if is_ready
    }


def run(
    model: Model,
    task: Task,
    source: Tensor | Iterable[Tensor],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Event]:
    """One session of a task that listens (ASR, CHAT, or one of your own): sound in, events out.

    source: a recording float32 [S] at 24 kHz, or frames [1, 1920] as they come. A task that the
    checkpoint was trained for gets the checkpoint's lag. Raises InputError and ModelError.
    """
    from moshi_cli.tasks.asr import Hearing
    from moshi_cli.tasks.chat import Talking

    if task.name in model.config.lags or model.lm is None:
        task = model.fit(task)
    kind = Talking if task.voice in MADE else Hearing
    engine = Engine(model, task, 1, sampling=sampling)
    session: Session = kind(model, task, Sound(source), seed=seed)
    for _, event in drive(engine, [session]):
        if isinstance(event, Failed):
            raise event.error
        yield event
