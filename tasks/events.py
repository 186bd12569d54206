"""What a running task reports, as values, and the JSON lines they become.

Times are seconds from the start of the recording, on the 80 ms grid, every lag already removed.
What is reported is final: nothing is revised later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moshi_cli.core.errors import MoshiError
from moshi_cli.core.text import Word as Word


@dataclass(frozen=True)
class Start:
    """A session begins; `details` say with what."""

    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One text token as it is fed back, at the frame where it stands."""

    text: str
    at_s: float


@dataclass(frozen=True)
class Speech:
    """Sound that the model made: float32 [1, S] from `start_s` on."""

    pcm: Tensor
    start_s: float


@dataclass(frozen=True)
class Segment:
    """Words that belong together: a line of a transcript."""

    id: int
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def start_s(self) -> float:
        return self.words[0].start_s

    @property
    def end_s(self) -> float:
        return self.words[-1].end_s

    @property
    def channel(self) -> int:
        return self.words[0].channel


@dataclass(frozen=True)
class Pause:
    """The speaker has probably finished: probabilities of the pause heads."""

    at_s: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Turn:
    """Someone starts or stops speaking in a conversation."""

    who: str  # "moshi" or "user"
    speaking: bool
    at_s: float


@dataclass(frozen=True)
class Warning:
    """Something the user should know; the session goes on."""

    code: str  # "stall", "repetition", "unspoken", "lag", …
    message: str
    at_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The session ended early: its input is broken, or asks for what cannot be done."""

    error: MoshiError


@dataclass(frozen=True)
class End:
    """The session is over."""

    audio_s: float  # sound read or, for TTS, made
    wall_s: float = 0.0
    first_s: float | None = None  # wall seconds until the first word or sound


Event = Start | Word | Piece | Speech | Segment | Pause | Turn | Warning | Failed | End


def seconds(value: float) -> float:
    """Rounded to a millisecond, for printing."""
    return round(value, 3)


def as_json(event: Event, *, channels: bool = True) -> dict[str, Any]:
    """An event as a flat JSON object whose `type` comes first."""
    match event:
        case Start(details):
            return {"type": "start", **details}
        case Word(text, start_s, end_s, channel):
            told = {"type": "word", "text": text, "start": seconds(start_s), "end": seconds(end_s)}
            return {**told, "channel": channel} if channels else told
        case Piece(text, at_s):
            return {"type": "text", "text": text, "t": seconds(at_s)}
        case Speech(pcm, start_s):
            return {"type": "audio", "t": seconds(start_s), "samples": pcm.shape[-1]}
        case Segment(id=id, words=words):
            told = {"type": "segment", "id": id, "start": seconds(words[0].start_s)}
            told |= {"end": seconds(words[-1].end_s), "text": event.text}
            return {**told, "channel": event.channel} if channels else told
        case Pause(at_s, probabilities):
            return {
                "type": "pause",
                "t": seconds(at_s),
                "prob": [round(p, 4) for p in probabilities],
            }
        case Turn(who, speaking, at_s):
            return {"type": "turn", "who": who, "speaking": speaking, "t": seconds(at_s)}
        case Warning(code, message, at_s):
            return {"type": "warning", "code": code, "message": message, "t": seconds(at_s)}
        case Failed(error):
            return {"type": "error", "message": str(error)}
        case End(audio_s, wall_s, first_s):
            told = {"type": "end", "audio_s": seconds(audio_s), "wall_s": seconds(wall_s)}
            told["rtfx"] = round(audio_s / wall_s, 2) if wall_s else None
            return told if first_s is None else {**told, "first_s": seconds(first_s)}
