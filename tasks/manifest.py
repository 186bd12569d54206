"""Data sets as lists of recordings: manifests, packs, and the words and turns that go with them.

A manifest is JSON lines, a recording each, as moshi-finetune has them: {"path", "duration"}, with
the words beside the sound in NAME.json: {"alignments": [[word, [start, end], speaker], …]}. More
keys may stand in the line itself: id, kind, voice, text, answer, qa; start and end (a part of it);
words [[word, start, end], …] or alignments; turns [[speaker, start, end], …], which otherwise come
from NAME.rttm; degraded, a recording to compare with. Times are seconds from the start of the part.
A stereo file has the model's own voice on the left. A pack (see data.py) is a data set too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moshi_cli.core import audio
from moshi_cli.core.decoders import open_decoder
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.tasks.turns import Turn, parse_turns, read_turns

MAIN = "SPEAKER_MAIN"  # whose words are the text of the own voice
OTHER = "SPEAKER_OTHER"
PATH_KEYS = ("path", "audio_filepath", "audio", "file")  # where a line may name the recording
PACKED = "pcm.i16"  # the sound of a pack
SEEKING = (".wav", ".flac", ".aif", ".aiff")


@dataclass(frozen=True)
class Spoken:
    """A word, in seconds from the start of its recording."""

    text: str
    start_s: float
    end_s: float
    speaker: str = MAIN


@dataclass(frozen=True)
class Recording:
    """One recording of a data set, or one part of a file."""

    id: str
    path: Path
    where: str  # file and line that name it
    duration_s: float | None = None  # as the line says; None: it says nothing
    start_s: float = 0.0  # within the file
    whole: bool = True  # the whole file, not a part of it
    words: tuple[Spoken, ...] = ()
    words_from: str = ""  # where the words are, or should be
    turns: tuple[Turn, ...] = ()
    kind: str = ""
    voice: str = ""
    text: str = ""
    silent: bool = False  # it is known that nobody says anything
    answers: tuple[str, ...] = ()  # good ones, if it is a question
    qa: int | None = None
    degraded: Path | None = None  # what a codec made of it

    @property
    def packed(self) -> bool:
        """Whether it lies in a pack."""
        return self.path.name == PACKED

    @property
    def seeks(self) -> bool:
        """Whether its middle can be read without what is before it."""
        return self.packed or self.path.suffix.lower() in SEEKING

    def facts(self) -> tuple[int, float]:
        """Channels, and seconds of the file by its header (0: it does not say). InputError."""
        if self.packed:
            return 1, self.path.stat().st_size / 2 / audio.SAMPLE_RATE
        decoder = open_decoder(self.path, None, audio.SAMPLE_RATE, 1)
        decoder.close()
        return decoder.channels, (decoder.samples or 0) / decoder.sample_rate

    @property
    def length_s(self) -> float:
        """Seconds, by the manifest or else by the file. InputError."""
        return self.facts()[1] - self.start_s if self.duration_s is None else self.duration_s

    def read(self, start_s: float, duration_s: float, channel: str = "mix") -> Tensor:
        """A stretch of the sound, float32 [C, S] at 24 kHz; nothing else is decoded if possible."""
        at = self.start_s + start_s
        if self.packed:
            first, count = round(at * audio.SAMPLE_RATE), round(duration_s * audio.SAMPLE_RATE)
            pcm = np.memmap(self.path, np.int16, "r")[first : first + count]
            return torch.from_numpy(pcm.astype(np.float32) / 32768)[None]
        return audio.read(self.path, channel=channel, start_s=at, duration_s=duration_s)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line of a data set."""

    where: str  # file and line
    kind: str  # one word: json, audio, duration, channel, words, order, …
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass
class DataSet:
    """Recordings that can be used, and what is wrong with the others."""

    recordings: list[Recording] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def parse_words(data: Any) -> tuple[Spoken, ...]:
    """[[word, start, end], …], [[word, [start, end], speaker], …] or objects, as recognisers write.

    The order is kept. ValueError, KeyError or TypeError for anything else.
    """
    found = []
    for item in data:
        if isinstance(item, Mapping):
            word = item["word"] if "word" in item else item["text"]
            item = (word, item["start"], item["end"])
        word, start, *rest = item
        if isinstance(start, Sequence) and not isinstance(start, str):
            start, end = start
            speaker = str(rest[0]) if rest else MAIN
        else:
            end, speaker = rest[0], str(rest[1]) if len(rest) > 1 else MAIN
        found.append(Spoken(str(word).strip(), float(start), float(end), speaker))
    return tuple(found)


def words_of(data: Any) -> tuple[Spoken, ...] | None:
    """The words in a JSON object, under any of the usual keys; None if there are no such keys."""
    for key in ("alignments", "words"):
        if isinstance(data, Mapping) and data.get(key) is not None:
            return parse_words(data[key])
    if isinstance(data, Mapping) and "segments" in data:
        return tuple(w for segment in data["segments"] for w in parse_words(segment["words"]))
    return None


def read_words(path: Path) -> tuple[Spoken, ...]:
    """The words of a side file. InputError."""
    try:
        found = words_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: cannot read the words ({error!r})") from None
    if found is None:
        raise InputError(f"{path}: has neither alignments nor words")
    return found


def alignments(words: Iterable[Spoken]) -> dict[str, Any]:
    """The content of a side file."""
    rows = [[w.text, [round(w.start_s, 3), round(w.end_s, 3)], w.speaker] for w in words]
    return {"alignments": rows}


def main_speaker(words: Iterable[Spoken]) -> str:
    """Whose words are the own voice's: MAIN, or the only one who is heard; "" if unclear."""
    names = {w.speaker for w in words}
    return MAIN if MAIN in names or not names else names.pop() if len(names) == 1 else ""


# Reading ------------------------------------------------------------------------------------------


def read_data(place: str | Path) -> Iterator[Recording | Problem]:
    """The recordings of a manifest, a pack, or a folder with a manifest.jsonl, line by line."""
    path = Path(place)
    if path.is_dir():
        pack = path / "index.jsonl"
        path = pack if pack.is_file() and (path / PACKED).is_file() else path / "manifest.jsonl"
    if not path.is_file():
        hint = "name a manifest (JSON lines), or a folder that has a manifest.jsonl or a pack"
        raise InputError(f"{place}: is no data set", hint)
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                found = _recording(json.loads(line), path, where, number)
            except json.JSONDecodeError as error:
                yield Problem(where, "json", f"is not JSON ({error.msg})")
                continue
            except (KeyError, TypeError, ValueError, IndexError) as error:
                yield Problem(where, "row", f"is not a recording ({_reason(error)})")
                continue
            except InputError as error:
                yield Problem(where, "side", str(error))
                continue
            first = seen.setdefault(found.id, number)
            if first != number:
                yield Problem(where, "id", f"has the id {found.id!r} of line {first}")
                continue
            yield found


def _reason(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def file_recording(path: Path, name: str) -> Recording:
    """A file as a recording, with what lies beside it. InputError."""
    return replace(_recording({"path": str(path), "id": name}, path, str(path), 1), path=path)


def _recording(row: Any, manifest: Path, where: str, number: int) -> Recording:
    """A line of a manifest or of a pack's index."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    facts: dict[str, Any] = {
        key: str(row[key]) for key in ("kind", "text") if row.get(key) is not None
    }
    voice = row.get("voice") or row.get("speaker") or ""
    facts["voice"] = voice if isinstance(voice, str) else json.dumps(voice, sort_keys=True)
    facts["qa"] = None if row.get("qa") is None else int(row["qa"])
    answers = row.get("answers") or () if row.get("answer") is None else row["answer"]
    facts["answers"] = (answers,) if isinstance(answers, str) else tuple(map(str, answers))
    if row.get("degraded"):
        facts["degraded"] = _find(str(row["degraded"]), manifest.parent)
    if "offset_samples" in row:  # of a pack
        start, duration = (row[key] / audio.SAMPLE_RATE for key in ("offset_samples", "samples"))
        path, whole = manifest.parent / PACKED, False
    else:
        name = next((row[key] for key in PATH_KEYS if row.get(key)), None)
        if name is None:
            raise KeyError(PATH_KEYS[0])
        path = _find(str(name), manifest.parent)
        whole, start = "start" not in row, float(row.get("start", 0.0))
        duration = row.get("duration")
        if duration is None and "end" in row:
            duration = float(row["end"]) - start
        duration = None if duration is None else float(duration)
        if duration is not None and not duration > 0:
            raise ValueError(f"a duration of {duration:g} s")
    words, turns, words_from = words_of(row), row.get("turns"), where
    if words is None and whole:
        side = path.with_suffix(".json")
        words_from = str(side)
        words = read_words(side) if side.is_file() else None
    facts["silent"] = not facts.get("text") and (words == () or row.get("text") == "")
    rttm = path.with_suffix(".rttm")
    if turns is not None:
        facts["turns"] = parse_turns(turns)
    elif whole and rttm.is_file():
        facts["turns"] = read_turns(rttm)
    own = str(row.get("id") or (path.stem if whole else f"{path.stem}@{start:g}"))
    return Recording(own, path, where, duration, start, whole, words or (), words_from, **facts)


def _find(name: str, folder: Path) -> Path:
    """Relative paths are looked up beside the manifest first, then in the working directory."""
    beside = folder / name
    return beside if beside.exists() or not Path(name).exists() else Path(name)


def load_data(
    places: Iterable[str | Path], layout: str = "auto", *, words: bool = True, skip: bool = False
) -> DataSet:
    """All recordings of several data sets that can be used as `layout` (see inspection.py).

    skip: leave bad ones out and list what is wrong; otherwise the first one is an InputError.
    """
    from moshi_cli.tasks.inspection import inspect

    found = DataSet()
    for place in places:
        for item in read_data(place):
            wrong = [item] if isinstance(item, Problem) else list(inspect(item, layout, words))
            found.problems += wrong
            if wrong and not skip:
                hint = "`moshi data check` lists all problems; --bad skip leaves such lines out"
                raise InputError(str(wrong[0]), hint)
            if not wrong and isinstance(item, Recording):
                found.recordings.append(item)
    if not found.recordings:
        raise UsageError("there is no recording to use")
    return found
