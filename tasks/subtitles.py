"""Timed words as text: segments, and the file formats that other tools read.

txt, srt, vtt, tsv and json look as whisper's do, so that what reads those reads these; `alignments`
is the side file of moshi-finetune, with which a transcript becomes training data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moshi_cli.core.errors import UsageError
from moshi_cli.core.text import Word
from moshi_cli.tasks.events import End, Segment, Start, as_json, seconds

FORMATS = ("txt", "srt", "vtt", "tsv", "json", "jsonl", "alignments")
PAUSE_S = 1.4  # from the start of a word to the start of the next: a longer wait ends the segment
LONGEST_S = 10.0  # of a segment
LONGEST_CHARACTERS = 84  # two lines of subtitles


# Segments -----------------------------------------------------------------------------------------


class Segmenter:
    """Words of one channel -> segments, each given out once it is complete."""

    def __init__(self, first_id: int = 0) -> None:
        self.id = first_id
        self.words: list[Word] = []

    def push(self, word: Word) -> list[Segment]:
        """Add a word; the segment that it ends, if any."""
        done = self.flush() if self._parts(word) else []
        self.words.append(word)
        return done

    def wait(self, now_s: float) -> list[Segment]:
        """No word has come until now; the segment that this silence ends, if any."""
        silent = self.words and now_s - self.words[-1].start_s > PAUSE_S
        return self.flush() if silent else []

    def flush(self) -> list[Segment]:
        """What is left."""
        if not self.words:
            return []
        segment, self.words = Segment(self.id, tuple(self.words)), []
        self.id += 1
        return [segment]

    def _parts(self, word: Word) -> bool:
        if not self.words:
            return False
        last = self.words[-1]
        return (
            word.start_s - last.start_s > PAUSE_S
            or last.text.endswith((".", "?", "!"))
            or word.end_s - self.words[0].start_s > LONGEST_S
            or sum(len(w.text) + 1 for w in self.words) + len(word.text) > LONGEST_CHARACTERS
        )


def segments(words: Iterable[Word]) -> list[Segment]:
    """All words of a recording -> segments in time order, numbered from 0; channels apart."""
    channels: dict[int, Segmenter] = {}
    found: list[Segment] = []
    for word in words:
        found += channels.setdefault(word.channel, Segmenter()).push(word)
    found += [segment for rest in channels.values() for segment in rest.flush()]
    found.sort(key=lambda segment: (segment.start_s, segment.channel))
    return [Segment(i, segment.words) for i, segment in enumerate(found)]


# Cues ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How subtitles are broken into lines; None: as the segments are."""

    line_width: int | None = None  # characters
    line_count: int | None = None  # lines per cue
    words_per_line: int | None = None
    highlight: bool = False  # one cue per word, the word underlined

    def __post_init__(self) -> None:
        for value in (self.line_width, self.line_count, self.words_per_line):
            if value is not None and value < 1:
                raise UsageError("a subtitle limit must be at least 1")
        if self.line_count and not self.line_width:
            raise UsageError("--max-line-count needs --max-line-width")
        if self.words_per_line and self.line_width:
            raise UsageError("--max-words-per-line and --max-line-width exclude each other")


Lines = list[list[Word]]


def cues(segment: Segment, layout: Layout) -> Iterator[tuple[float, float, str]]:
    """What is shown of one segment, in turn: (start_s, end_s, text with line breaks)."""
    for lines in _blocks(segment.words, layout):
        first, last = lines[0][0].start_s, lines[-1][-1].end_s
        if not layout.highlight:
            yield first, last, _shown(lines)
            continue
        at = first
        for word in (word for line in lines for word in line):
            if word.start_s > at:
                yield at, word.start_s, _shown(lines)
            yield word.start_s, word.end_s, _shown(lines, word)
            at = word.end_s


def _blocks(words: tuple[Word, ...], layout: Layout) -> Iterator[Lines]:
    """Words -> cues -> lines."""
    if layout.words_per_line:
        for i in range(0, len(words), layout.words_per_line):
            yield [list(words[i : i + layout.words_per_line])]
        return
    lines: Lines = [[]]
    for word in words:
        used = sum(len(w.text) + 1 for w in lines[-1])
        if layout.line_width and lines[-1] and used + len(word.text) > layout.line_width:
            if layout.line_count and len(lines) == layout.line_count:
                yield lines
                lines = []
            lines.append([])
        lines[-1].append(word)
    yield lines


def _shown(lines: Lines, marked: Word | None = None) -> str:
    def word(w: Word) -> str:
        return f"<u>{_plain(w.text)}</u>" if w is marked else _plain(w.text)

    return "\n".join(" ".join(map(word, line)) for line in lines)


def _plain(text: str) -> str:
    """An arrow inside a cue would end it."""
    return text.replace("-->", "->")


def _stamp(value_s: float, point: str, hours: bool) -> str:
    ms = round(value_s * 1000)
    head = f"{ms // 3_600_000:02d}:" if hours or ms >= 3_600_000 else ""
    return f"{head}{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{point}{ms % 1000:03d}"


# Formats ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcript:
    """The words of one recording and how they came about."""

    words: tuple[Word, ...]
    audio_s: float
    details: Mapping[str, Any] = field(default_factory=dict)  # model, seed, version, …
    wall_s: float = 0.0
    extra: tuple[Any, ...] = ()  # other events to show in jsonl: pauses, warnings

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def segments(self) -> list[Segment]:
        return segments(self.words)


def render(
    transcript: Transcript, format: str, layout: Layout | None = None, word_times: bool = True
) -> str:
    """A transcript in one of FORMATS, ending in a newline unless it is empty."""
    layout = layout or Layout()
    if format == "txt":
        return "".join(f"{segment.text}\n" for segment in transcript.segments)
    if format == "srt":
        return _numbered(transcript, layout)
    if format == "vtt":
        body = (
            f"{_stamp(a, '.', False)} --> {_stamp(b, '.', False)}\n{text}\n\n"
            for a, b, text in _all_cues(_escaped(transcript), layout)
        )
        return "WEBVTT\n\n" + "".join(body)
    if format == "tsv":
        rows = (
            f"{round(s.start_s * 1000)}\t{round(s.end_s * 1000)}\t{' '.join(s.text.split())}\n"
            for s in transcript.segments
        )
        return "start\tend\ttext\n" + "".join(rows)
    if format == "json":
        return json.dumps(as_whisper(transcript, word_times), ensure_ascii=False, indent=2) + "\n"
    if format == "jsonl":
        return "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in _events(transcript))
    if format == "alignments":
        return json.dumps(alignments(transcript), ensure_ascii=False) + "\n"
    raise UsageError(f"unknown output format {format!r}", f"choose one of {', '.join(FORMATS)}")


def _numbered(transcript: Transcript, layout: Layout) -> str:
    shown = enumerate(_all_cues(transcript, layout), 1)
    return "".join(
        f"{i}\n{_stamp(a, ',', True)} --> {_stamp(b, ',', True)}\n{text}\n\n"
        for i, (a, b, text) in shown
    )


def _all_cues(transcript: Transcript, layout: Layout) -> Iterator[tuple[float, float, str]]:
    for segment in transcript.segments:
        yield from cues(segment, layout)


def _escaped(transcript: Transcript) -> Transcript:
    """WebVTT reads & and < as markup."""
    words = tuple(
        Word(w.text.replace("&", "&amp;").replace("<", "&lt;"), w.start_s, w.end_s, w.channel)
        for w in transcript.words
    )
    return Transcript(words, transcript.audio_s)


def as_whisper(transcript: Transcript, word_times: bool = True) -> dict[str, Any]:
    """text, segments with their words, then the details."""
    several = len({word.channel for word in transcript.words}) > 1
    parts = []
    for segment in transcript.segments:
        part: dict[str, Any] = {
            "id": segment.id, "start": seconds(segment.start_s), "end": seconds(segment.end_s),
            "text": segment.text,
        }  # fmt: skip
        if several:
            part["channel"] = segment.channel
        if word_times:
            part["words"] = [
                {"word": w.text, "start": seconds(w.start_s), "end": seconds(w.end_s)}
                for w in segment.words
            ]
        parts.append(part)
    told = {"text": transcript.text, "segments": parts, "audio_s": seconds(transcript.audio_s)}
    return {**told, **transcript.details}


def alignments(transcript: Transcript) -> dict[str, Any]:
    """The side file of a training recording; the first channel is the model's own voice."""
    return {
        "alignments": [
            [w.text, [seconds(w.start_s), seconds(w.end_s)],
             "SPEAKER_OTHER" if w.channel else "SPEAKER_MAIN"]
            for w in transcript.words
        ]
    }  # fmt: skip


def _events(transcript: Transcript) -> Iterator[dict[str, Any]]:
    """The same lines as a live session, in time order: each segment after its last word."""
    yield as_json(Start(transcript.details))
    timed: list[tuple[float, int, Any]] = [(w.start_s, 0, w) for w in transcript.words]
    timed += [(s.words[-1].start_s, 1, s) for s in transcript.segments]
    timed += [(e.at_s, 2, e) for e in transcript.extra]
    for _, _, event in sorted(timed, key=lambda item: item[:2]):
        yield as_json(event)
    yield as_json(End(transcript.audio_s, transcript.wall_s))
