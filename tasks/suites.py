"""Suites: evaluations to be made one after the other, as plain data in a YAML file.

    title: My test set
    entries:
    - name: meetings                # also the folder of its results
      task: asr                     # of `moshi eval`
      manifest: meetings.jsonl      # one or a list; `inputs` likewise, as on the command line
      options: {by: voice}          # of `moshi eval asr`, without the hyphens in front
      goals: {wer: at most 5 %}     # or ≤, ≥, <, >, "<=", ">=", at least, a bare number
      figures: [cer, wer/*]         # shown without a goal

Paths are relative to the file. What a task's options and figures are is for the command to say;
reading and its errors are in documents.py.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks.documents import Document, assign, nearest, overlay, read
from moshi_cli.tasks.evaluation import Figure, Result, record

FORMAT = 1  # of `summary`
SUMMARY = "suite.json"  # in the folder of a suite's results
NAME = re.compile(r"[\w+][\w.+-]*")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
GOAL = re.compile(rf"\s*(\D*?)\s*({NUMBER})\s*(?:(%|points)|dB|s|bit/s)?\s*")
SHOWN = {  # figures of entries that name none
    "asr": ("wer", "words_in_silence"), "tts": ("wer", "unspoken_words"),
    "codec": ("stoi*", "mel_db*", "idempotence", "idempotence@*", "wer_added*"),
    "qa": ("written_right", "heard_right", "both"), "lm": ("*_words_nll", "*_audio_nll"),
    "pairs": ("accuracy*",), "dialogue": ("ipu", "pause", "gap", "overlap"),
    "interrupt": ("stopped", "stop_delay"),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One evaluation."""

    name: str
    task: Literal["asr", "tts", "codec", "qa", "lm", "pairs", "dialogue", "interrupt"]
    inputs: tuple[str, ...] = ()
    manifest: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)  # figure -> as `Goal.of` reads it
    figures: tuple[str, ...] = ()  # patterns


@dataclass(frozen=True)
class Suite:
    """What a file says."""

    title: str = "Evaluation"
    entries: tuple[Entry, ...] = ()


# Goals --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What a figure should be."""

    text: str
    holds: Callable[[float, float], bool]
    limit: float  # a share where the text has per cent, or points

    @classmethod
    def of(cls, text: str) -> Goal:
        """ "at most 5 %", "≥ 0.9", "0". ValueError for anything else."""
        found = GOAL.fullmatch(text)
        holds = COMPARISONS.get(found[1]) if found else None
        if found is None or holds is None:
            raise ValueError(f"{text!r} is no goal")
        limit = float(found[2])
        return cls(text.strip(), holds, limit / 100 if found[3] else limit)

    def met(self, value: float) -> bool:
        """Whether a figure is as it should be; what is not finite is not."""
        return math.isfinite(value) and self.holds(value, self.limit)


def equal(value: float, limit: float) -> bool:
    """The same, up to rounding."""
    return math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-9)


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "at most": operator.le, "<=": operator.le, "≤": operator.le, "<": operator.lt,
    "at least": operator.ge, ">=": operator.ge, "≥": operator.ge, ">": operator.gt,
    "": equal, "=": equal,
}  # fmt: skip


# Reading ------------------------------------------------------------------------------------------


def load(path: Path, settings: Sequence[str] = ()) -> tuple[Suite, Document]:
    """The suite in a file, and where everything in it was written. UsageError.

    settings: "ENTRY.OPTION=VALUE"; ENTRY is a name, or a task and then all entries of it.
    """
    document = read(path, "a suite has `entries:`, a list")
    listed = document.data.get("entries")
    if not isinstance(listed, list) or not listed:
        where = document.place(("entries",))
        raise UsageError(f"{where}: there are no entries", "`entries:` is a list of evaluations")
    for number, raw in enumerate(listed):
        if isinstance(raw, dict):
            for key in ("inputs", "manifest", "figures"):
                raw[key] = [raw[key]] if isinstance(raw.get(key), str) else raw.get(key, [])
            refuse_empty(raw.get("goals"), document, ("entries", str(number), "goals"))
    assign(document, [text for one in settings for text in spelled(one, listed)])
    suite = overlay(Suite(), document)
    check(suite, document)
    return suite, document


def refuse_empty(goals: Any, document: Document, at: tuple[str, ...]) -> None:
    """UsageError for goals that say nothing."""
    for name, goal in goals.items() if isinstance(goals, Mapping) else ():
        if goal is None:
            where = document.place((*at, str(name)))
            raise UsageError(f"{where}: {name} has no goal", "`figures:` lists what is only shown")


def spelled(setting: str, listed: Sequence[Any]) -> list[str]:
    """A setting as `assign` takes it, for every entry that it means."""
    entry, dot, rest = setting.partition(".")
    if not dot or not rest.partition("=")[0]:
        raise UsageError(f"--set {setting}: not of the form ENTRY.OPTION=VALUE")
    known = [(raw.get("name"), raw.get("task")) for raw in listed if isinstance(raw, dict)]
    found = [i for i, pair in enumerate(known) if entry == pair[0]]
    found = found or [i for i, pair in enumerate(known) if entry == pair[1]]
    if not found:
        hint = nearest(entry, [str(name) for name, _ in known])
        raise UsageError(f"--set {setting}: there is no entry {entry!r}", hint)
    return [f"entries.{i}.options.{rest}" for i in found]


def check(suite: Suite, document: Document) -> None:
    """UsageError for what cannot be meant."""
    seen: set[str] = set()
    for number, entry in enumerate(suite.entries):
        at = ("entries", str(number))
        where = document.place((*at, "name"))
        if not NAME.fullmatch(entry.name):
            raise UsageError(
                f"{where}: the name {entry.name!r} cannot be a folder's",
                "use letters, digits, '.', '_', '+' and '-'",
            )
        if entry.name.casefold() in seen:
            raise UsageError(f"{where}: the name {entry.name!r} is there twice")
        seen.add(entry.name.casefold())
        if not entry.inputs and not entry.manifest:
            where = document.place(at)
            raise UsageError(f"{where}: {entry.name} has neither inputs nor a manifest")
        for name, text in entry.goals.items():
            try:
                Goal.of(text)
            except ValueError as error:
                where = document.place((*at, "goals", name))
                hint = "write it as in `at most 5 %`, `at least 0.9` or `0`"
                raise UsageError(f"{where}: {error}", hint) from None


def chosen(suite: Suite, only: str | None) -> Suite:
    """The entries of these names (patterns, with commas). UsageError if one means nothing."""
    if only is None:
        return suite
    names = [entry.name for entry in suite.entries]
    patterns = [part.strip() for part in only.split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--only: there is no entry {pattern!r}", nearest(pattern, names))
    kept = (e for e in suite.entries if any(fnmatchcase(e.name, p) for p in patterns))
    return replace(suite, entries=tuple(kept))


# Outcomes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A figure of a suite's table."""

    entry: str
    name: str
    figure: Figure | None  # None: it was not measured
    goal: str = ""
    met: bool | None = None  # None: there is no goal


@dataclass(frozen=True)
class Outcome:
    """What became of an entry."""

    entry: Entry
    result: Result | None = None
    error: str | None = None  # why the whole of it failed

    def lines(self) -> list[Line]:
        """Its figures with goals, then those that are only shown."""
        name, figures = self.entry.name, {} if self.result is None else self.result.figures
        found = []
        for wanted, text in self.entry.goals.items() if self.result else ():
            figure = figures.get(wanted)
            met = figure is not None and Goal.of(text).met(figure.value)
            found.append(Line(name, wanted, figure, text, met))
        patterns = self.entry.figures
        if not patterns and not self.entry.goals:
            patterns = SHOWN[self.entry.task]
        for pattern in patterns:
            known = {line.name for line in found}
            fits = [n for n in figures if n not in known and fnmatchcase(n, pattern)]
            found += [Line(name, n, figures[n]) for n in fits]
        return found


def missed(outcomes: Sequence[Outcome]) -> list[Line]:
    """Goals that were not met, or whose figure was not measured."""
    return [line for outcome in outcomes for line in outcome.lines() if line.met is False]


def summary(suite: Suite, path: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The document of `--json` and suite.json; `result` as in report.json."""
    return {
        "type": "suite", "format": FORMAT, "title": suite.title, "suite": str(path),
        "entries": [
            {
                "name": outcome.entry.name, "task": outcome.entry.task, "error": outcome.error,
                "goals": {
                    line.name: {"goal": line.goal, "met": line.met}
                    for line in outcome.lines() if line.met is not None
                },
                "shown": [line.name for line in outcome.lines()],
                "result": None if outcome.result is None else record(outcome.result),
            }
            for outcome in outcomes
        ],
        "failed": [outcome.entry.name for outcome in outcomes if outcome.error],
        "missed": [f"{line.entry}/{line.name}" for line in missed(outcomes)],
    }  # fmt: skip
