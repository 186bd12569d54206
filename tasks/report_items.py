"""The items of an evaluation in a page: a table to sort and filter, with players and word diffs."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks import charts
from moshi_cli.tasks.differences import differences
from moshi_cli.tasks.evaluation import Result
from moshi_cli.tasks.normalisers import NAMES, Normaliser, normaliser
from moshi_cli.tasks.timeline import timeline

SOUNDS = {
    ".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".opus": "audio/ogg",
    ".mp3": "audio/mpeg", ".m4a": "audio/mp4",
}  # fmt: skip
TEXTS = ("reference", "hypothesis")
HIDDEN = ("id", "error", "events", *TEXTS)  # not shown by their names
UNLISTED = (  # what only figures and --resume need
    "key", "judge", "seconds", "start", "duration", "hits", "letters", "letter_errors",
    "times_found", "times_of", "timed_words", "overlap", "delay_s", "delays", "errors",
    "heard_errors", "frames", "same",
)  # fmt: skip
ERRORS = ("wer",)  # above 0: something is wrong
SUCCESSES = ("right", "both", "written_exact")  # below 1: the same


def listing(items: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rows that are shown: the first ones, those that failed in front if there are too many."""
    if len(items) <= most:
        return list(items)
    return sorted(items, key=lambda row: not row.get("error"))[:most]


def flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what is not shown; keys of nested mappings are joined by a space."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key in UNLISTED:
            continue
        if isinstance(value, Mapping):
            found |= {f"{key} {k}": v for k, v in flattened(value).items()}
        elif isinstance(value, list) and value and all(isinstance(x, str) for x in value):
            found[key] = " / ".join(value)
        else:
            found[key] = value
    return found


def is_number(value: Any) -> bool:
    """Something to sort by; of yes and no, too."""
    return isinstance(value, bool | int | float) and math.isfinite(value)


def sounds(row: Mapping[str, Any]) -> list[str]:
    """Keys of paths of recordings."""
    return [
        key
        for key, value in row.items()
        if key not in HIDDEN and isinstance(value, str) and Path(value).suffix.lower() in SOUNDS
    ]


def measures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of numbers: what tells good from bad, then the others in order of appearance."""
    found = [key for row in rows for key, value in row.items() if is_number(value)]
    first = [key for key in (*ERRORS, *SUCCESSES) if key in found]
    return [key for key in dict.fromkeys([*first, *found]) if key not in HIDDEN]


def item_list(result: Result, rows: list[dict[str, Any]], home: Path, players: Players) -> str:
    """The table of items with what filters it."""
    if not rows:
        return ""
    columns, words = measures(rows), any(key in row for row in rows for key in TEXTS)
    heads = ['<th class="text">', *(['<th class="text">'] if words else [])]
    heads += ['<th class="number">'] * len(columns)
    names = ["item", *(["reference and hypothesis"] if words else []), *columns]
    head = "".join(
        f'{start}<button type="button">{escape(name)}</button></th>'
        for start, name in zip(heads, names, strict=True)
    )
    way = same_normaliser(str(result.context.get("normaliser", "")))
    body = "".join(item(row, columns, words, way, home, players) for row in rows)
    more = len(result.items) - len(rows)
    told = f" · {more} more are not listed" if more else ""
    some = any(wrong(row) is not None for row in rows)
    box = '<label><input type="checkbox"> only those with errors</label>' if some else ""
    legend = TIMELINE_KEY if any("events" in row for row in rows) else ""
    return f"""<div class="list"><h3>Items</h3>
<div class="tools"><input type="search" placeholder="Filter" aria-label="Filter items">{box}
<span class="meta"><output>{len(rows)}</output>{told}</span>{legend}</div>
<div class="scroll"><table class="items"><thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table></div></div>
"""


TIMELINE_KEY = (
    '<span class="meta key"><i style="background:var(--accent)"></i>own voice'
    '<i style="background:var(--partner)"></i>partner'
    '<i style="background:var(--gone-back)"></i>overlap'
    '<i style="background:var(--hush)"></i>pause or gap</span>'
)


def wrong(row: Mapping[str, Any]) -> bool | None:
    """Whether an item has errors; None: that is not known."""
    if row.get("error"):
        return True
    found = [row[key] > 0 for key in ERRORS if is_number(row.get(key))]
    found += [row[key] < 1 for key in SUCCESSES if is_number(row.get(key))]
    return any(found) if found else None


def item(
    row: Mapping[str, Any],
    columns: Sequence[str],
    words: bool,
    way: Normaliser,
    home: Path,
    players: Players,
) -> str:
    """One row of the table."""
    heard = sounds(row)
    cells = [f'<div class="id">{escape(str(row["id"]))}</div>']
    if row.get("error"):
        cells.append(f'<div class="failed">{escape(str(row["error"]))}</div>')
    for key, value in row.items():
        if isinstance(value, str) and key not in (*HIDDEN, *heard) and value:
            cells.append(f'<div class="meta">{escape(key)}: {escape(value)}</div>')
    cells += [players.player(key, home / str(row[key])) for key in heard]
    if row.get("events"):
        cells.append(timeline(row["events"], float(row.get("audio_s") or 0.0)))
    found = [f'<td data-value="{escape(str(row["id"]))}">{"".join(cells)}</td>']
    if words:
        found.append(f'<td class="words">{diff(row, way)}</td>')
    for key in columns:
        x: Any = row.get(key)
        if not is_number(x):
            found.append('<td class="number"></td>')
            continue
        text = ("no", "yes")[x] if isinstance(x, bool) else charts.number(float(x))
        found.append(f'<td class="number" data-value="{float(x)}">{text}</td>')
    mark = " data-wrong" if wrong(row) else ""
    return f"<tr{mark}>{''.join(found)}</tr>\n"


def same_normaliser(name: str) -> Normaliser:
    """The one that a record names, as far as it is installed here; else none."""
    base = next((known for known in NAMES if name.startswith(known)), "none")
    try:
        return normaliser(base)
    except UsageError:
        return normaliser("none")


def diff(row: Mapping[str, Any], way: Normaliser) -> str:
    """Reference and hypothesis in one line, as they were compared; as they are, on request."""
    wanted, found = (str(row.get(key) or "") for key in TEXTS)
    if row.get(TEXTS[1]) is None:
        return escape(wanted)
    marked = []
    for piece in differences(wanted, found, way):
        if piece.kind == "same":
            marked.append(escape(piece.reference))
            continue
        old, new = piece.reference, piece.hypothesis
        marked += [f"<del>{escape(old)}</del>"] * bool(old)
        marked += [f"<ins>{escape(new)}</ins>"] * bool(new)
    shown = " ".join(marked) or '<span class="faint">nothing on both sides</span>'
    named = zip(TEXTS, (wanted, found), strict=True)
    pairs = "".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in named)
    return f"<div>{shown}</div><details><summary>as written</summary><dl>{pairs}</dl></details>"


# Recordings ---------------------------------------------------------------------------------------


class Players:
    """Recordings of a page: inside it if they are small together, else linked."""

    def __init__(self, folder: Path, embed_bytes: int, passing: Path | None = None):
        """folder: of the page. passing: a folder that will be gone."""
        self.folder, self.embed_bytes, self.passing = folder, embed_bytes, passing
        self.small = False

    def weigh(self, paths: Iterable[Path]) -> None:
        """Decide by the size of all recordings that are there."""
        sizes = [path.stat().st_size for path in set(paths) if path.is_file()]
        self.small = sum(sizes) <= self.embed_bytes

    def address(self, path: Path) -> str:
        """What src says."""
        if self.small or (self.passing is not None and path.is_relative_to(self.passing)):
            data = base64.b64encode(path.read_bytes()).decode()
            return f"data:{SOUNDS[path.suffix.lower()]};base64,{data}"
        return quote(os.path.relpath(path, self.folder).replace(os.sep, "/"))

    def player(self, key: str, path: Path) -> str:
        """One player, or what is missing."""
        label = escape(key)
        if not path.is_file():
            return f'<div class="meta">{label}: {escape(path.name)} is not there</div>'
        source = escape(self.address(path))
        return (
            f'<div class="player"><span class="meta">{label}</span>'
            f'<audio controls preload="none" aria-label="{label}" src="{source}"></audio></div>'
        )
