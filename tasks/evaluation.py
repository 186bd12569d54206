"""What an evaluation gives: figures with their intervals, a row per item, and how they were made.

A folder of results has `report.json` (`record`: all but the items) and `items.jsonl` (a JSON object
per item). Rows have at least `id`; `error` where the item failed, so that it counts in no figure;
the others as their task has them: `reference`, `hypothesis`, counts, `audio` and other paths,
relative to the folder. Values are shares (0.08, not 8 %), seconds, decibels; never rounded.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_cli.core.errors import InputError
from moshi_cli.core.files import write_text
from moshi_cli.tasks.machine import processor

REPORT, ITEMS = "report.json", "items.jsonl"
FORMAT = 1  # of both files
DRAWS = 2000  # samples of the bootstrap
CHUNK = 1 << 22  # numbers drawn at a time
TOLD = ("python", "torch", "numpy", "jiwer", "soxr", "soundfile")  # packages that figures depend on


@dataclass(frozen=True)
class Figure:
    """One number. `low` and `high` bound 95 % of the bootstrap's draws; None: nothing to draw."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""  # "share" (shown in per cent), "s", "dB", "bit", …; "": a plain number
    count: int = 0  # items behind it


@dataclass
class Result:
    """One evaluation."""

    task: str  # "asr", "codec", …
    figures: dict[str, Figure]
    items: list[dict[str, Any]]
    context: dict[str, Any] = field(default_factory=dict)  # see `record`

    @property
    def failed(self) -> list[str]:
        """Ids of the items that failed."""
        return [str(row["id"]) for row in self.items if row.get("error")]


# Figures ------------------------------------------------------------------------------------------


def ratios(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> Any:
    """Element by element; nothing by nothing is 0, something by nothing 1."""
    safe = np.where(denominators > 0, denominators, 1.0)
    return np.where(denominators > 0, numerators / safe, (numerators > 0).astype(np.float64))


def bootstrap(
    counts: Sequence[tuple[float, float]],
    minus: Sequence[tuple[float, float]] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """What 95 % of the draws of Σ numerators / Σ denominators lie between.

    counts: a pair per item; a draw takes as many items anew, with replacement (Bisani & Ney 2004).
    minus: pairs of the same items whose ratio is subtracted in every draw.
    """
    assert counts and (minus is None or len(minus) == len(counts)), len(counts)
    tables = [np.array(t, dtype=np.float64) for t in (counts, minus) if t is not None]  # [N, 2]
    generator, size = np.random.default_rng(seed), len(counts)
    values = []
    for first in range(0, draws, rows := max(1, CHUNK // size)):
        drawn = generator.integers(size, size=(min(rows, draws - first), size))
        sums = [table[drawn].sum(axis=1) for table in tables]  # [rows, 2] each
        each = [ratios(total[:, 0], total[:, 1]) for total in sums]
        values.append(each[0] if minus is None else each[0] - each[1])
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def ratio(counts: Iterable[tuple[float, float]], unit: str = "share") -> Figure | None:
    """Σ numerators / Σ denominators of pairs, one per item; None without items."""
    pairs = [(float(a), float(b)) for a, b in counts]
    if not pairs:
        return None
    table = np.array(pairs)
    value = float(ratios(*table.sum(axis=0)))
    low, high = bootstrap(pairs) if len(pairs) > 1 else (None, None)
    return Figure(value, low, high, unit, len(pairs))


def difference(
    counts: Iterable[tuple[float, float]], minus: Iterable[tuple[float, float]], unit: str = "share"
) -> Figure | None:
    """The ratio of some pairs less that of others of the same items; draws are paired, too."""
    pairs, others = list(counts), list(minus)
    first, second = ratio(pairs), ratio(others)
    if first is None or second is None:
        return None
    low, high = bootstrap(pairs, others) if len(pairs) > 1 else (None, None)
    return Figure(first.value - second.value, low, high, unit, len(pairs))


def mean(values: Iterable[float | None], unit: str = "") -> Figure | None:
    """The mean over items that have a finite value; None if there is none."""
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return ratio(((v, 1.0) for v in known), unit)


def total(values: Iterable[float], unit: str = "") -> Figure:
    """A sum over items, without an interval."""
    known = list(values)
    return Figure(float(sum(known)), unit=unit, count=len(known))


def kept(figures: Mapping[str, Figure | None]) -> dict[str, Figure]:
    """Those that could be measured."""
    return {name: figure for name, figure in figures.items() if figure is not None}


# Records ------------------------------------------------------------------------------------------


def record(result: Result) -> dict[str, Any]:
    """The document of `--json` and report.json: figures, counts, failures and the context.

    context: version, model, revision, dtype, device, seed, normaliser, judge, settings, `machine`,
    `packages`, `date` (UTC), as far as the task has them.
    """
    return {
        "type": "evaluation", "format": FORMAT, "task": result.task,
        "figures": {name: asdict(figure) for name, figure in result.figures.items()},
        "items": len(result.items), "failed": result.failed, "context": result.context,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What computed: system, processor, cores, threads, load and, if there is one, the GPU."""
    import torch

    from moshi_cli.core import native

    told: dict[str, Any] = {
        "system": platform.platform(), "processor": processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "native": native.library() is not None,
    }  # fmt: skip
    if hasattr(os, "getloadavg"):
        told["load"] = round(os.getloadavg()[0], 2)  # mean of the last minute
    if torch.cuda.is_available():
        told["gpu"] = torch.cuda.get_device_name()
    return told


def packages(*more: str) -> dict[str, str]:
    """Versions of what figures depend on, of those that are installed."""
    found = {}
    for name in (*TOLD, *more):
        try:
            found[name] = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            continue
    return found


# Files --------------------------------------------------------------------------------------------


def write_result(result: Result, folder: Path) -> None:
    """report.json and items.jsonl in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / ITEMS, result.items)
    write_text(folder / REPORT, json.dumps(record(result), ensure_ascii=False, indent=1) + "\n")


def read_result(folder: Path) -> Result:
    """What `write_result` wrote. InputError if it is not there or not whole."""
    path = folder / REPORT
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not the report of an evaluation ({error!r})") from None
    return of_record(told, read_rows(folder / ITEMS), path)


def of_record(told: Any, rows: list[dict[str, Any]], where: Path) -> Result:
    """A document of `record` with its rows. InputError, which names `where`."""
    try:
        figures = {name: Figure(**facts) for name, facts in told["figures"].items()}
        return Result(str(told["task"]), figures, rows, dict(told["context"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not the report of an evaluation ({error!r})") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON line per item."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, the last one of every id; a line that was cut short is skipped."""
    rows: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows[str(row["id"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return list(rows.values())
