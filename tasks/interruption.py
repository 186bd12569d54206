"""Speaking into the model's reply, to see how soon it stops (barge-in; paper §3.4: full duplex).

A `Breach` is what the partner says: a question, silence, and something else as soon as the model
has answered for a while. Beside every interrupted conversation goes the same one in which nobody
interrupts: up to the interruption both are equal, so what the model would have said is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.errors import InputError
from moshi_cli.core.streams import Task
from moshi_cli.core.weights import Model
from moshi_cli.tasks.activity import Detector, levels_db
from moshi_cli.tasks.chat import Talking, TalkingOptions
from moshi_cli.tasks.evaluation import Figure, kept, mean
from moshi_cli.tasks.events import Event
from moshi_cli.tasks.loop import Output
from moshi_cli.tasks.sound import FRAME_S, FRAME_SAMPLES, Heard, Sound

INTO_S = 0.4  # of the model's speech, before it is interrupted
WITHIN_S = 1.0  # in which it should stop
PATIENCE_S = 4.0  # for the answer to begin
AFTER_S = 3.0  # silence at the end
PAUSE = Detector(bridge_s=0.5)  # a shorter silence of the model is a pause: it goes on
SOUND = Detector()


class Breach:
    """A question, silence until `now`, and what is said then; frames [1, 1920], whole ones."""

    def __init__(self, question: Tensor, then: Tensor | None, patience_s: float = PATIENCE_S):
        """question, then: float32 [S]; then None: nobody interrupts, and silence goes on."""
        self.question = whole(question)
        self.then = None if then is None else whole(then)
        self.patience, self.after = (round(s / FRAME_S) for s in (patience_s, AFTER_S))  # frames
        self.frames = len(self.question)  # until the question is over
        self.now = False
        self.at: int | None = None  # frame at which the interruption begins

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.question
        silence = torch.zeros(1, FRAME_SAMPLES)
        for waited in range(self.patience):
            if self.now and self.then is not None:
                self.at = self.frames + waited
                yield from self.then
                break
            yield silence
        for _ in range(self.after):
            yield silence


class Interrupted(Talking):
    """A conversation whose partner is a `Breach`, told when the model has spoken for INTO_S."""

    def __init__(self, model: Model, task: Task, breach: Breach, *, seed: int = 0) -> None:
        self.breach, self.partner = breach, Heard(breach)
        options = TalkingOptions(tail_s=0)
        super().__init__(model, task, Sound(self.partner), seed=seed, options=options)
        self.spoken = 0  # frames of its voice since the question was over

    def take(self, output: Output) -> Iterable[Event]:
        yield from super().take(output)
        if self.frame > self.breach.frames and self.moshi[1].speaking:
            self.spoken += 1
        self.breach.now = self.spoken * FRAME_S >= INTO_S


def whole(sound: Tensor) -> Sequence[Tensor]:
    """float32 [S] as frames [1, 1920], the last one filled up with silence."""
    return F.pad(sound, (0, -len(sound) % FRAME_SAMPLES))[None].split(FRAME_SAMPLES, 1)


def spoken_part(sound: Tensor, name: str) -> Tensor:
    """float32 [S] from where somebody begins to speak. InputError where nobody does."""
    spans = SOUND.spans(levels_db([sound[None]])[0])
    if not spans:
        raise InputError(f"{name}: nobody speaks in it")
    return sound[round(spans[0][0] * 24_000) :]


def goes_on_s(reply: Tensor, at_s: float) -> float:
    """How long a reply float32 [S] goes on from a moment of it, pauses included; 0: it does not."""
    for start_s, end_s in PAUSE.spans(levels_db([reply[None]])[0]) if len(reply) else ():
        if start_s <= at_s < end_s:
            return end_s - at_s
    return 0.0


def figures(rows: Sequence[Mapping[str, Any]], within_s: float = WITHIN_S) -> dict[str, Figure]:
    """Rows with at_s (None: the model did not answer); with alone_s, how long it goes on from there
    if nobody interrupts, and stop_s, how long it does if somebody does.

    stopped, stop_delay: of the conversations in which it would have gone on for longer than
    within_s; interruptible: how many of those in which it answered at all these are.
    """
    good = [row for row in rows if not row.get("error")]
    answered = [row for row in good if row["at_s"] is not None]
    long = [row for row in answered if row["alone_s"] > within_s]
    return kept({
        "stopped": mean((float(row["stop_s"] <= within_s) for row in long), "share"),
        "stop_delay": mean((row["stop_s"] for row in long), "s"),
        "goes_on_alone": mean((row["alone_s"] for row in long), "s"),
        "answered": mean((float(row["at_s"] is not None) for row in good), "share"),
        "interruptible": mean((float(row["alone_s"] > within_s) for row in answered), "share"),
    })  # fmt: skip
