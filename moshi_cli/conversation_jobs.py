"""What `moshi eval dialogue` and `moshi eval report` do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli import __version__
from moshi_cli.batch import Result
from moshi_cli.console import Console
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.data_jobs import named
from moshi_cli.data_text import parsed
from moshi_cli.eval_items import distinct
from moshi_cli.eval_jobs import Evaluation
from moshi_cli.eval_options import EvalOptions
from moshi_cli.inputs import Item

if TYPE_CHECKING:
    from moshi_cli.tasks.activity import Detector
    from moshi_cli.tasks.evaluation import Figure
    from moshi_cli.tasks.evaluation import Result as Outcome
    from moshi_cli.tasks.manifest import Problem, Recording
    from moshi_cli.tasks.scorers import Scorer


def dialogue(
    inputs: Sequence[str] | None,
    options: EvalOptions,
    console: Console,
    detector: Detector,
    *,
    manifest: str | None,
    recursive: bool,
    scorers: Sequence[str],
) -> int:
    """Turn-taking of every recording, and what scorers say of it."""
    from moshi_cli.tasks import conversation
    from moshi_cli.tasks.manifest import Problem
    from moshi_cli.tasks.scorers import make_scorer

    made: list[Scorer] = []
    for text in scorers:
        name, settings = parsed(text, "--scorer")
        made.append(make_scorer(name, **settings))
    listed = named(inputs, recursive, manifest)
    items = distinct([item_of(found) for found in listed])
    by_id = {item.id: found for item, found in zip(items, listed, strict=True)}
    run = Evaluation("dialogue", items, options, console, known=["*"] if made else FIGURES)

    def one(item: Item) -> Result:
        found = by_id[item.id]
        if isinstance(found, Problem):
            raise InputError(str(found))
        session = conversation.open_session(replace(found, id=item.id), detector)
        row = conversation.measured(session)
        for scorer in made:
            counts = {name: list(pair) for name, pair in scorer(session).items()}
            row.setdefault("scores", {}).update(counts)
            row |= {name: a / b for name, (a, b) in counts.items() if b}
        del row["id"]
        run.advance(session.seconds)
        row["audio"] = run.relative(found.path)
        return Result(item, [], session.seconds, fields=row)

    settings = {"detector": asdict(detector), "scorers": list(scorers)}
    run.each(one, settings)
    units = {name: unit for scorer in made for name, unit in scorer.units.items()}

    def figures() -> dict[str, Figure]:
        rows = run.good()
        if made and not any(row.get("scores") for row in rows):
            console.warn("the scorers found nothing to score: too short, or silent, or no words?")
        return conversation.figures(rows) | scored(rows, units)

    return run.finish(figures, {"version": __version__, "model": "recordings", **settings})


KINDS, LINES = ("ipu", "pause", "gap", "overlap"), ("own", "partner")
FIGURES = [
    *(f"{kind}{end}" for end in ("", "_count", "_length") for kind in KINDS),
    *(f"{line}_{what}" for line in LINES for what in ("speech", "words")),
]


def scored(rows: Sequence[dict[str, Any]], units: dict[str, str]) -> dict[str, Figure]:
    """What scorers counted, over all sessions that they could score."""
    from moshi_cli.tasks.evaluation import kept, ratio

    names = dict.fromkeys(name for row in rows for name in row.get("scores", ()))
    return kept({
        name: ratio(
            (row["scores"][name] for row in rows if name in row.get("scores", ())),
            units.get(name, "share"),
        )
        for name in names
    })  # fmt: skip


def item_of(found: Recording | Problem) -> Item:
    """A recording or what is wrong with it, as an item."""
    from moshi_cli.tasks.manifest import Problem

    if isinstance(found, Problem):
        return Item(found.where, None, "problem", {"problem": found.text})
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in found.id)
    words = [[w.text, w.start_s, w.end_s, w.speaker] for w in found.words]
    record = {"start_s": found.start_s, "duration_s": found.duration_s, "words": words}
    return Item(found.id, str(found.path), name, record)


# report -------------------------------------------------------------------------------------------

TITLE = "Evaluation"


def report(
    places: Sequence[Path], html: Path, console: Console, *, title: str, embed_mb: float, most: int
) -> None:
    """A page about results that lie on disk."""
    from moshi_cli.suite_jobs import recorded
    from moshi_cli.tasks.report import write_report
    from moshi_cli.tasks.suites import SUMMARY

    if len(places) == 1 and (places[0] / SUMMARY).is_file():
        told, outcomes = recorded(places[0])
        title = title if title != TITLE else told
        found = [(o.result, places[0] / o.entry.name) for o in outcomes if o.result]
    else:
        outcomes, found = [], [read(place) for place in places]
    write_report(
        [result for result, _ in found], html, folders=[home for _, home in found],
        embed_bytes=round(1e6 * embed_mb), most_items=most, title=title, suite=outcomes,
    )  # fmt: skip
    console.line(str(html))


def read(place: Path) -> tuple[Outcome, Path]:
    """A folder of results with its rows, or a record on its own; and where its paths begin."""
    from moshi_cli.tasks.evaluation import REPORT, of_record, read_result

    if place.is_dir():
        return read_result(place), place
    if place.name == REPORT:
        return read_result(place.parent), place.parent
    try:
        told = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{place}: not the record of an evaluation ({error})") from None
    return of_record(told, [], place), place.parent
