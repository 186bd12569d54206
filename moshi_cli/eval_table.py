"""An evaluation for people: one line per figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moshi_cli.tasks.evaluation import Figure, Result
    from moshi_cli.tasks.suites import Outcome


def table(outcome: Result) -> Iterator[str]:
    """A result for people: a line per figure, its interval and the number of items."""
    yield heading(outcome)
    width = max((len(name) for name in outcome.figures), default=0)
    for name, figure in outcome.figures.items():
        yield f"{name.replace('_', ' '):{width}}  {cells(figure)}"


def cells(figure: Figure) -> str:
    """A figure, its interval and the number of items behind it."""
    value, sure = shown(figure.value, figure.unit), ""
    if figure.low is not None and figure.high is not None:
        sure = f"[{shown(figure.low, figure.unit)}, {shown(figure.high, figure.unit)}]"
    return f"{value:>10}  {sure:22}  n={figure.count}"


def suite_table(outcome: Outcome) -> Iterator[str]:
    """An entry of a suite for people: the figures that it is about, and what they should be."""
    head = outcome.entry.name
    if outcome.result is not None:
        head += f" – {heading(outcome.result)}"
    yield head + (f": failed: {outcome.error}" if outcome.error else "")
    lines = outcome.lines()
    width = max((len(line.name) for line in lines), default=0)
    for line in lines:
        found = cells(line.figure) if line.figure else f"{'not measured':>12}"
        goal = ""
        if line.met is not None:
            goal = f"goal {line.goal}: {'met' if line.met else 'missed'}"
        yield f"  {line.name.replace('_', ' '):{width}}  {found:41}  {goal}".rstrip()


def heading(outcome: Result) -> str:
    """What was measured, on how much, compared how."""
    parts = [f"{outcome.task}: {outcome.context.get('model', 'transcripts')}"]
    parts += [f"{len(outcome.items) - len(outcome.failed)} items"]
    judge = outcome.context.get("judge")
    parts += [f"judge {judge['judge']} {judge.get('model', '')}".rstrip()] if judge else []
    parts += [name] if (name := outcome.context.get("normaliser")) else []
    return ", ".join(parts)


def shown(value: float, unit: str) -> str:
    """A number with its unit, as people read it."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    text = f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()
