"""A text as the word pump wants it: lines of a script, shown a window at a time.

The pump (core/script.py) has tables of fixed size; texts have any length and may still be arriving.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moshi_cli.core.errors import UsageError
from moshi_cli.core.script import Entry, Script, ScriptState
from moshi_cli.core.streams import FRAME_HZ
from moshi_cli.core.text import Text
from moshi_cli.tasks.wording import Item, Rest

SPEAKER_TOKENS = (1, 2)  # main speaker, the other one


def form_of(text: Text) -> str:
    """How words are written for this tokenizer (see `wording.Reader`), going by its pieces."""
    pieces = [text.piece(token) for token in range(4, text.size) if not text.pieces.IsByte(token)]
    if any(piece != piece.lower() for piece in pieces):
        return "written"
    return "plain" if any("-" in piece for piece in pieces) else "split"


@dataclass(frozen=True)
class Line:
    """A word or a rest in a script; word is None for a rest."""

    entry: Entry
    word: str | None = None
    spelled: bool = False  # in bytes, since the tokenizer has no pieces for it


class Scribe:
    """Items of a text -> lines of a script."""

    def __init__(self, text: Text, *, padding_between: int = 1, speakers: bool = False) -> None:
        self.text, self.padding_between, self.speakers = text, padding_between, speakers
        self.speaker: int | None = None

    def write(self, items: Iterable[Item]) -> Iterator[Line]:
        """Words without any token are left out."""
        for item in items:
            if isinstance(item, Rest):
                yield Line(Entry((), round(item.seconds * FRAME_HZ)))
                continue
            for word in self._tidy(item.word):
                line = self._word(word, item.speaker)
                if line is not None:
                    yield line

    def _tidy(self, word: str) -> list[str]:
        word = word.replace("’", "'").replace(":", " ")
        return word.replace("(", "").replace(")", "").split()

    def _word(self, word: str, speaker: int) -> Line | None:
        tokens = self.text.encode(word)
        spelled = any(self.text.pieces.IsByte(token) for token in tokens)
        if not tokens:
            return None
        if self.speakers and speaker != self.speaker:
            if speaker >= len(SPEAKER_TOKENS):
                raise UsageError("a dialogue has two speakers, A and B")
            tokens = [SPEAKER_TOKENS[speaker], *tokens]
        self.speaker = speaker
        between = self.padding_between
        padding = max(0, between + len(tokens) - 1) if between > 0 else 0
        return Line(Entry(tuple(tokens), padding), word, spelled)


class Prompter:
    """Shows a script of any length, still growing, to the word pump of one slot.

    The pump's tables hold a window of the script; words that were said leave it, new ones enter.
    While the pump is busy with a word or a pause, the next word need not be known.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.lines: list[Line] = []
        self.first = 0  # line that is entry 0 of the window
        self.loaded = 0  # lines in the window
        self.begun = False  # whether the pump has got a window at all
        self.complete = False  # no line will be added
        self.began: dict[int, int] = {}  # line -> step
        self.ended: int | None = None  # step at which the script was over

    def ready(self, entry: int) -> bool:
        """Whether a step may be made that begins line `first` + entry: what it shows is known."""
        if self.complete and self.first + self.loaded == len(self.lines):
            return True
        later = self.lines[self.first + entry + 1 : self.first + self.loaded]
        words = sum(line.word is not None for line in later)
        return entry < self.loaded and words >= self.script.ahead

    def sync(self, state: ScriptState, slot: int) -> bool:
        """Look what was said, move the window on if need be; whether the next step may be made."""
        entry = int(state.entry[slot])
        for i in range(len(self.began) - self.first, entry):
            self.began[self.first + i] = int(state.begun[slot, i])
        if self.ended is None and int(state.ended[slot]) >= 0:
            self.ended = int(state.ended[slot])
        if not self.begun or (not self.ready(entry) and self.first + self.loaded < len(self.lines)):
            self._move(state, slot, entry)
            entry = int(state.entry[slot])
            if self.first + self.loaded < len(self.lines):  # no more fits
                return True
        busy = bool(state.cursor[slot] < state.until[slot]) or bool(state.pause[slot] > 0)
        return busy or self.ready(entry)

    def _move(self, state: ScriptState, slot: int, entry: int) -> None:
        """Load the lines from the current one on, without the pump noticing."""
        keep = max(0, entry - 1)  # its tokens may still be in use
        gone = int(state.bounds[slot, keep])
        names = ("entry", "cursor", "until", "peek", "peek_until", "patience", "pause")
        saved = {name: int(getattr(state, name)[slot]) for name in names}
        begun = state.begun[slot, keep:entry].clone()
        fresh, self.begun = not self.begun, True
        self.first += keep
        lines = self._window()
        self.loaded = len(lines)
        self.script.load(state, slot, [line.entry for line in lines])
        if fresh:
            return
        shift = {"entry": keep, "cursor": gone, "until": gone, "peek": gone, "peek_until": gone}
        for name in names if entry else ("patience", "pause"):
            getattr(state, name)[slot] = saved[name] - shift.get(name, 0)
        state.begun[slot, : len(begun)] = begun

    def _window(self) -> list[Line]:
        """As many lines as the tables hold."""
        taken, tokens = [], 0
        for line in self.lines[self.first : self.first + self.script.words]:
            tokens += len(line.entry.tokens)
            if tokens > self.script.tokens:
                break
            taken.append(line)
        return taken
