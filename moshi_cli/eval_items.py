"""What an evaluation is made on: recordings or texts with what is known of them, as items."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.inputs import PATH_KEYS, Item, expand, named

if TYPE_CHECKING:
    from moshi_cli.tasks.manifest import Problem, Recording

MANIFESTS = (".jsonl",)


def recordings(
    inputs: Sequence[str] | None, manifests: Sequence[str] | None, recursive: bool = False
) -> list[Item]:
    """Recordings of manifests, packs, folders and files, each with what is said in it.

    Words and texts come from the manifest, from NAME.json or NAME.txt beside the sound. A line that
    cannot be read is an item that fails. UsageError if there is nothing.
    """
    from moshi_cli.tasks.manifest import file_recording, read_data

    found: list[Item] = []
    for place in manifests or ():
        found += map(_item, read_data(place))
    for token in inputs or ():
        if _is_data(Path(token)):
            found += map(_item, read_data(token))
            continue
        for item in expand([token], recursive=recursive):
            try:
                recording = file_recording(Path(str(item.source)), item.id)
            except InputError as error:
                found.append(Item(item.id, None, item.name, {"problem": str(error)}))
                continue
            found.append(_item(recording, item.name))
    if not found:
        raise UsageError("no input", "name manifests, folders or files")
    return distinct(found)


def _is_data(path: Path) -> bool:
    """Whether this is a manifest, a pack, or a folder with either."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("manifest.jsonl", "index.jsonl"))
    return path.suffix in MANIFESTS


def _item(found: Recording | Problem, name: str = "") -> Item:
    from moshi_cli.tasks.manifest import Problem

    if isinstance(found, Problem):
        return Item(found.where, None, _name(found.where), {"problem": str(found)})
    record: dict[str, Any] = {
        "text": reference(found), "words": own_words(found), "kind": found.kind,
        "voice": found.voice, "answers": list(found.answers),
        "degraded": str(found.degraded or ""),
    }  # fmt: skip
    if found.packed:
        record |= {"packed": True}
    if not found.whole:
        record |= {"start": found.start_s, "duration": found.duration_s}
    known = {key: value for key, value in record.items() if value not in (None, "", [])}
    if record["text"] == "":
        known["text"] = ""
    return Item(found.id, str(found.path), name or _name(found.id), known)


def _name(id: str) -> str:
    """An id as the name of a file."""
    return "".join(c if c.isalnum() or c in "._,+=@-" else "_" for c in id).strip(".") or "item"


def reference(recording: Recording) -> str | None:
    """What is said: the text, the words, NAME.txt; "" where nobody speaks; None: not known."""
    if recording.text or recording.silent:
        return recording.text
    if recording.words:
        return " ".join(word for word, _, _ in own_words(recording))
    side = recording.path.with_suffix(".txt")
    if not recording.whole or not side.is_file():
        return None
    try:
        return " ".join(side.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return None


def own_words(recording: Recording) -> list[tuple[str, float, float]]:
    """Words and times of the main speaker; of all, if it is not clear who that is."""
    from moshi_cli.tasks.manifest import main_speaker

    main = main_speaker(recording.words)
    return [(w.text, w.start_s, w.end_s) for w in recording.words if not main or w.speaker == main]


def distinct(items: Sequence[Item]) -> list[Item]:
    """Items whose ids and names are each their own; later ones get a number."""
    seen: dict[str, int] = {}
    found = []
    for item in items:
        seen[item.id] = count = seen.get(item.id, 0) + 1
        id = item.id if count == 1 else f"{item.id}~{count}"
        found.append(Item(id, item.source, item.name, item.record, item.names))
    return named(found)


def reader(item: Item) -> dict[str, Any]:
    """Arguments of `core.audio.frames` for the part of the file that an item is."""
    record = item.record
    part = {"start_s": float(record.get("start", 0.0)), "duration_s": record.get("duration")}
    return {**part, **({"input_format": "s16le"} if record.get("packed") else {})}


def said(item: Item) -> str:
    """The reference of an item. InputError if it is not known, or the item could not be read."""
    if problem := item.record.get("problem"):
        raise InputError(str(problem))
    if "text" not in item.record:
        raise InputError(f"{item.id}: it is not known what is said in it")
    return str(item.record["text"])


# Texts --------------------------------------------------------------------------------------------


def texts(inputs: Sequence[str] | None, manifests: Sequence[str] | None) -> list[Item]:
    """Texts to speak: manifests (JSON lines with "text") and text files, a text per line.

    A manifest's recording of the text, if it names one, is kept for its length.
    """
    found: list[Item] = []
    for place in [*(inputs or ()), *(manifests or ())]:
        path = Path(place)
        path = path / "manifest.jsonl" if path.is_dir() else path
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"{place}: cannot read ({reason})") from None
        rows = _rows(lines, path) if path.suffix in MANIFESTS else _plain(lines, path)
        found += rows
    if not found:
        raise UsageError("no text", "name manifests or text files")
    return distinct(found)


def _plain(lines: Iterable[str], path: Path) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            id = f"{path.stem}-{number:04d}"
            yield Item(id, None, _name(id), {"text": " ".join(line.split())})


def _rows(lines: Iterable[str], path: Path) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            record = {"text": " ".join(str(row["text"]).split())}
            record |= {key: row[key] for key in ("kind", "duration") if row.get(key)}
            if name := next((row[key] for key in PATH_KEYS if row.get(key)), None):
                record["recording"] = str(path.parent / str(name))
            elif row.get("voice"):  # to speak with; with a recording it is who spoke
                record["voice"] = row["voice"]
            id = str(row.get("id") or f"{path.stem}-{number:04d}")
        except (ValueError, KeyError, TypeError, AttributeError):
            yield Item(where, None, _name(where), {"problem": f"{where}: has no text"})
            continue
        yield Item(id, None, _name(id), record)
