"""Suites of pairs, as public ones are laid out and as one writes one's own.

    x.jsonl           {"id", "good", "bad"}, perhaps "group"; or rows of the Story Cloze Test
    x.csv             the Story Cloze Test: InputSentence1 to 4, RandomFifthSentenceQuiz1 and 2,
                      AnswerRightEnding (1 or 2), InputStoryid
    folder/gold.csv   sWUGGY and sBLIMP of ZeroSpeech 2021 (lexical/dev, syntactic/dev): filename,
                      id, voice, correct (1 or 0); type or frequency make groups
    folder of sound   spoken and topic StoryCloze: 0_STORY_correct.wav, 1_STORY_incorrect.wav, …;
                      any names that differ in _correct and _incorrect alone

A side is a text, the name of a recording beside the file, {"text": …} or {"path": …}. The layouts
are those that evaluation code of these suites reads; the data sets are not part of the tests.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_cli.core.errors import InputError

SOUND = (".wav", ".flac", ".ogg", ".opus", ".mp3")  # a string that ends so is a recording
ENDS = ("_correct", "_incorrect")  # of the names of recordings
STORIES = (  # id, sentences, endings, number of the right one
    ("InputStoryid", [f"InputSentence{i}" for i in range(1, 5)],
     [f"RandomFifthSentenceQuiz{i}" for i in (1, 2)], "AnswerRightEnding"),
    ("story_id", [f"input_sentence_{i}" for i in range(1, 5)],
     [f"sentence_quiz{i}" for i in (1, 2)], "answer_right_ending"),
)  # fmt: skip
KNOWN, UNKNOWN = "in_vocabulary", "oov"  # groups of words by their frequency


@dataclass(frozen=True)
class Side:
    """What is scored: a recording or a text."""

    path: Path | None = None
    text: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two sides, the first of which should be likelier."""

    id: str
    good: Side
    bad: Side
    group: str = ""  # of which figures are wanted for themselves


def read_suite(place: str | Path) -> list[Pair]:
    """The pairs of a file or folder; see above. InputError, which names the line."""
    path = Path(place)
    if path.is_dir():
        if not (path / "gold.csv").is_file():
            return unique(list(_named(path)), path)
        path = path / "gold.csv"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{path}: cannot read ({reason})") from None
    return unique(
        list(_table(path, text) if path.suffix.lower() == ".csv" else _lines(path, text)), path
    )


def unique(pairs: list[Pair], path: Path) -> list[Pair]:
    """Pairs with an id each. InputError if there are none, or two have the same."""
    if not pairs:
        raise InputError(f"{path}: has no pairs")
    for id, count in Counter(pair.id for pair in pairs).items():
        if count > 1:
            raise InputError(f"{path}: the id {id!r} is there twice")
    return pairs


def _lines(path: Path, text: str) -> Iterator[Pair]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if names := _names(row):
                yield _story(row, names, number)
                continue
            good, bad = (_side(row[name], path.parent) for name in ("good", "bad"))
            yield Pair(str(row.get("id", number)), good, bad, str(row.get("group", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{number}: not a pair ({error!r})", 'a line is {"id", "good", "bad"}'
            ) from None


def _side(value: Any, folder: Path) -> Side:
    if isinstance(value, Mapping):
        (key, content), *more = value.items()
        if more or key not in ("path", "text"):
            raise ValueError("a side has a path or a text")
    else:
        content = value
        key = "path" if str(value).lower().endswith(SOUND) else "text"
    if not isinstance(content, str) or not content.strip():
        raise ValueError("an empty side")
    return Side(path=folder / content) if key == "path" else Side(text=content)


def _table(path: Path, text: str) -> Iterable[Pair]:
    """Rows of a .csv with a head."""
    rows = csv.DictReader(text.splitlines(keepends=True))
    if not _names(rows.fieldnames or ()):
        return _gold(path, rows)
    return _stories(path, rows)


# The Story Cloze Test -----------------------------------------------------------------------------


def _names(row: Iterable[str]) -> Any:
    """How its columns are named, if these are its columns."""
    return next((names for names in STORIES if names[3] in row), None)


def _stories(path: Path, rows: csv.DictReader[str]) -> Iterator[Pair]:
    for row in rows:
        try:
            yield _story(row, _names(row), rows.line_num)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{rows.line_num}: not a story ({error!r})",
                "it has four sentences, two endings and the number of the right one",
            ) from None


def _story(row: Mapping[str, Any], names: Any, number: int) -> Pair:
    """A text, and the same with the wrong ending."""
    id, sentences, endings, right = names
    first = int(row[right]) - 1
    if first not in (0, 1):
        raise ValueError(f"{right} is {row[right]}")
    start = " ".join(row[name].strip() for name in sentences)
    good, bad = (Side(text=f"{start} {row[endings[i]].strip()}") for i in (first, 1 - first))
    return Pair(str(row.get(id) or number), good, bad)


# Recordings ---------------------------------------------------------------------------------------


def _gold(path: Path, rows: csv.DictReader[str]) -> Iterator[Pair]:
    """Rows of one id, type and voice make a pair."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        where = f"{path}:{rows.line_num}"
        try:
            kind = (row.get("type") or "", row.get("subtype") or "")
            key: tuple[str, ...] = (*kind, row["id"], row["voice"])
            correct = str(int(row["correct"]))
            row["filename"].strip()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{where}: not a row of a gold file",
                "it has the columns id, filename, voice and correct",
            ) from None
        if correct in found.setdefault(key, {}):
            raise InputError(f"{where}: pair {key[2:]} has two sides of correct={correct}")
        found[key][correct] = row
    several = Counter(key[2:] for key in found)
    for key, sides in found.items():
        if sides.keys() != {"0", "1"}:
            raise InputError(f"{path}: pair {key[2]!r}, voice {key[3]!r}, has one side")
        good, bad = (Side(path=_recording(path.parent, sides[c]["filename"])) for c in "10")
        id = "/".join(key[2:] if several[key[2:]] == 1 else filter(None, key))
        yield Pair(id, good, bad, key[0] or _band(sides["1"].get("frequency")))


def _band(frequency: str | None) -> str:
    """The group of a word that is so frequent in the training data; "" if that is not said."""
    try:
        return KNOWN if float(frequency or "") > 0 else UNKNOWN
    except ValueError:
        return ""


def _recording(folder: Path, name: str) -> Path:
    return folder / (name if name.lower().endswith(SOUND) else f"{name}.wav")


def _named(folder: Path) -> Iterator[Pair]:
    """Recordings that belong together by their names. InputError if one is alone."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.iterdir()):
        end = next((end for end in reversed(ENDS) if path.stem.endswith(end)), None)
        if end is None or path.suffix.lower() not in SOUND:
            continue
        start = path.stem.removesuffix(end)
        story = re.fullmatch(r"\d+_(.+)", start)  # the number counts files, not stories
        sides = found.setdefault(story[1] if story else start, {name: [] for name in ENDS})
        sides[end].append(path)
    if not found:
        raise InputError(
            f"{folder}: has neither a gold.csv nor recordings NAME_correct and NAME_incorrect"
        )
    for name, sides in found.items():
        good, bad = (sorted(sides[end], key=_number) for end in ENDS)
        if len(good) != len(bad):
            raise InputError(f"{folder}: {name} has {len(good)} right and {len(bad)} wrong sides")
        for i, (one, other) in enumerate(zip(good, bad, strict=True), 1):
            id = name if len(good) == 1 else f"{name}~{i}"
            yield Pair(id, Side(path=one), Side(path=other))


def _number(path: Path) -> int:
    """That a file's name begins with; 0 if it does not."""
    found = re.match(r"\d+", path.name)
    return int(found[0]) if found else 0
