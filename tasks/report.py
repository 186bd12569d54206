"""Results of evaluations as one HTML page that needs nothing else: tables, plots, players, diffs.

Style and script are inline (report.css, report.js), plots are SVG if matplotlib is installed, and
recordings are inside the page as long as they are small together, else linked. The page loads
nothing from anywhere; a policy in its head says so to the browser. It reads without its script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moshi_cli.core.files import write_text
from moshi_cli.tasks import charts
from moshi_cli.tasks.evaluation import Figure, Result
from moshi_cli.tasks.report_items import (
    Players,
    flattened,
    is_number,
    item_list,
    listing,
    measures,
    sounds,
)
from moshi_cli.tasks.suites import Outcome

EXPONENTIALS = "_ppl"  # figures that say what another one says, and dwarf the rest of a plot
POLICY = (
    "default-src 'none'; media-src 'self' file: data:; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
EMBED_BYTES = 16_000_000  # recordings of a page that go into it
MOST_ITEMS = 1000  # shown of each evaluation


def write_report(
    results: Sequence[Result],
    path: Path,
    *,
    folders: Sequence[Path] | None = None,
    passing: Path | None = None,
    embed_bytes: int = EMBED_BYTES,
    most_items: int = MOST_ITEMS,
    title: str = "Evaluation",
    suite: Sequence[Outcome] = (),
) -> None:
    """One page about several evaluations.

    suite: what `results` are the results of, in order; the page begins with its table.
    folders: where the paths in each result's items begin; None: beside the page. passing: a folder
    that will be gone; recordings in it become part of the page. So do all others if they are
    smaller than `embed_bytes` together; else they are linked to, by paths relative to the page.
    most_items: more are counted in the figures but not listed.
    """
    homes = [path.parent] * len(results) if folders is None else list(folders)
    assert len(homes) == len(results), (len(homes), len(results))
    listed = [[*map(flattened, listing(result.items, most_items))] for result in results]
    players = Players(path.parent, embed_bytes, passing)
    players.weigh(
        home / str(row[key])
        for home, rows in zip(homes, listed, strict=True)
        for row in rows
        for key in sounds(row)
    )
    names = [o.entry.name for o in suite if o.result] or [result.task for result in results]
    parts = [
        section(f"e{i}", name, result, rows, home, players)
        for i, (name, result, rows, home) in enumerate(
            zip(names, results, listed, homes, strict=True)
        )
    ]
    links = "".join(f'<a href="#e{i}">{escape(name)}</a>' for i, name in enumerate(names))
    here = Path(__file__)
    style, script = (here.with_suffix(s).read_text("utf-8") for s in (".css", ".js"))
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><button class="plain" id="theme">Light / dark</button></header>
<nav>{links}</nav>
<main>
{overview(suite)}{"".join(parts)}</main>
<script>
{script}</script>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


# One evaluation -----------------------------------------------------------------------------------


def section(
    id: str, name: str, result: Result, rows: list[dict[str, Any]], home: Path, players: Players
) -> str:
    """A heading, figures, plots, how it was made, items."""
    failed = len(result.failed)
    told = f"{len(result.items)} items"
    told += f', <span class="failed">{failed} failed</span>' if failed else ""
    model = result.context.get("model")
    told = f"{escape(str(model))}: {told}" if model else told
    told = told if name == result.task else f"{escape(result.task)} of {told}"
    return f"""<section id="{id}">
<h2>{escape(name)}</h2>
<p class="meta">{told}</p>
{figure_table(result.figures)}
{plots(id, result)}
<details><summary>How it was measured</summary>{facts(result.context)}</details>
{item_list(result, rows, home, players)}</section>
"""


def figure_table(figures: Mapping[str, Figure]) -> str:
    """Names, values, intervals, counts."""
    lines = []
    for name, figure in figures.items():
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells(figure)}</tr>\n')
    return (
        f'<div class="scroll"><table class="figures"><thead><tr><th>Figure</th>{HEADS}'
        f"</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>"
    )


HEADS = (
    '<th class="number">Value</th><th class="number">95 % interval</th>'
    '<th class="number">Items</th>'
)


def cells(figure: Figure) -> str:
    """A value, its interval, how many items are behind it."""
    low, high, between = figure.low, figure.high, ""
    if low is not None and high is not None:
        low = charts.shown(low, figure.unit)
        between = f"{charts.number(low)} … {charts.number(high, figure.unit)}"
    return (
        f'<td class="number">{charts.number(figure.value, figure.unit)}</td>'
        f'<td class="number">{between}</td><td class="number">{figure.count}</td>'
    )


def overview(suite: Sequence[Outcome]) -> str:
    """The table of a suite: a line per figure that matters, and what it should be."""
    lines, at = [], 0
    for outcome in suite:
        head = escape(outcome.entry.name)
        if outcome.result is not None:
            head, at = f'<a href="#e{at}">{head}</a>', at + 1
        head = f'<th scope="row">{head}</th>'
        if outcome.error:
            lines.append(f'<tr>{head}<td class="failed" colspan="6">{escape(outcome.error)}</td>')
        for line in outcome.lines():
            found = '<td colspan="3">not measured</td>' if not line.figure else cells(line.figure)
            told = {None: "", True: '<span class="met">met</span>',
                    False: '<span class="failed">missed</span>'}[line.met]  # fmt: skip
            lines.append(
                f"<tr>{head}<td>{escape(line.name)}</td>{found}<td>{escape(line.goal)}</td>"
                f"<td>{told}</td>"
            )
    rows = "".join(f"{line}</tr>\n" for line in lines)
    head = f"<th>Evaluation</th><th>Figure</th>{HEADS}<th>Goal</th><th></th>"
    table = f'<table class="suite"><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>\n' if suite else ""


def plots(name: str, result: Result) -> str:
    """What there is to draw."""
    if not charts.drawable():
        return '<p class="meta">No plots: matplotlib is not installed.</p>'
    good = [flattened(row) for row in result.items if not row.get("error")]
    columns = {
        key: [float(row[key]) for row in good if is_number(row.get(key))] for key in measures(good)
    }
    figures = {k: f for k, f in result.figures.items() if not k.endswith(EXPONENTIALS)}
    drawn = (charts.intervals(figures, f"{name}i"), charts.histograms(columns, f"{name}h"))
    pictures = "".join(f"<figure>{svg}</figure>\n" for svg in drawn if svg)
    return f'<div class="plots">{pictures}</div>' if pictures else ""


def facts(context: Mapping[str, Any]) -> str:
    """How the figures were made, as a list."""
    pairs = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in flat(context)
    )
    return f"<dl>{pairs}</dl>"


def flat(context: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Keys of nested mappings joined by a space, and values as text."""
    for key, value in context.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key} ")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{before}{key}", text
