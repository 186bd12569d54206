"""What `moshi eval suite` does: the entries of a file, in turn, then one table, record and page."""

from __future__ import annotations

import gc
import io
import json
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_cli.app import explain
from moshi_cli.console import Console
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.eval_jobs import GATE_MISSED, INTERRUPTED, SOME_FAILED
from moshi_cli.eval_table import suite_table
from moshi_cli.suite_calls import Call, Shared, prepared, share, shared_gates

if TYPE_CHECKING:
    from moshi_cli.tasks.suites import Outcome, Suite


def suite(
    path: Path, shared: Shared, *, only: str | None, settings: Sequence[str], strict: bool
) -> int:
    """Run the entries of a file, then tell what they gave."""
    from moshi_cli.tasks.suites import chosen, load

    options, console = shared.options, shared.console
    if options.resume and options.output_dir is None:
        raise UsageError("--resume needs --output-dir", "the rows are kept there")
    whole, document = load(path, settings)
    places = {entry.name: ("entries", str(i)) for i, entry in enumerate(whole.entries)}
    asked = chosen(whole, only)
    limits = shared_gates(options, asked)
    with tempfile.TemporaryDirectory("-moshi-eval") as passing:
        home = options.output_dir or Path(passing)
        calls = []
        for entry in asked.entries:
            call = prepared(entry, document, places[entry.name], path.parent, shared.log)
            share(call, shared, home / entry.name, limits[entry.name])
            calls.append(call)
        outcomes, codes = [], []
        for number, call in enumerate(calls, 1):
            console.info(f"[{number}/{len(calls)}] {call.entry.name}")
            outcome, code = run(call, home / call.entry.name, console, shared.log.debug)
            if code == INTERRUPTED:
                hint = "; --resume goes on" if options.output_dir else ""
                console.warn(f"{number - 1} of {len(calls)} entries are done{hint}")
                return INTERRUPTED
            outcomes.append(outcome)
            codes.append(code)
            if not options.json:
                for line in suite_table(outcome):
                    console.line(line)
        told(asked, path, outcomes, shared, home)
    return verdict(outcomes, codes, console, strict)


# At work, and afterwards --------------------------------------------------------------------------


def run(call: Call, folder: Path, console: Console, debug: bool) -> tuple[Outcome, int]:
    """One entry; and its exit code. Whatever is wrong is its own affair, but for Ctrl-C."""
    from moshi_cli.tasks.evaluation import read_result
    from moshi_cli.tasks.suites import Outcome

    try:
        with redirect_stdout(io.StringIO()), call.context:  # the table comes from the suite
            code = call.command.invoke(call.context) or 0
        result = None if code == INTERRUPTED else read_result(folder)
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message, hint = explain(error)
        console.error(f"{call.entry.name}: {message}", hint)
        return Outcome(call.entry, error=message or type(error).__name__), code
    finally:
        gc.collect()  # the model, before the next one is read
    none = result is not None and len(result.failed) == len(result.items)
    error_text = f"all of its {len(result.items)} items failed" if result and none else None
    return Outcome(call.entry, result, error_text), code


def told(asked: Suite, path: Path, outcomes: Sequence[Outcome], shared: Shared, home: Path) -> None:
    """The record, on disk and on stdout, and the page."""
    from moshi_cli.core.files import write_text
    from moshi_cli.tasks.report import write_report
    from moshi_cli.tasks.suites import SUMMARY, summary

    options, console = shared.options, shared.console
    record = summary(asked, path, outcomes)
    if options.output_dir is not None:
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        write_text(home / SUMMARY, text)
        console.info(f"{home}: {SUMMARY}, a folder per entry")
    if options.html is not None:
        done = [outcome for outcome in outcomes if outcome.result is not None]
        write_report(
            [outcome.result for outcome in done if outcome.result], options.html,
            folders=[home / outcome.entry.name for outcome in done],
            passing=None if options.output_dir else home, title=asked.title, suite=outcomes,
        )  # fmt: skip
        console.info(f"{options.html}: the report as a page")
    if options.json:
        console.record(record)


def verdict(
    outcomes: Sequence[Outcome], codes: Sequence[int], console: Console, strict: bool
) -> int:
    """What failed, said at the end, and the exit code that goes with it."""
    from moshi_cli.tasks.suites import missed

    failed = [outcome.entry.name for outcome in outcomes if outcome.error]
    some = [o.entry.name for o in outcomes if o.result and o.result.failed and not o.error]
    gated = [
        outcome.entry.name for outcome, code in zip(outcomes, codes, strict=True)
        if code == GATE_MISSED and outcome.error is None
    ]  # fmt: skip
    short = [f"{line.entry}/{line.name}" for line in missed(outcomes)]
    if failed:
        console.error(f"{len(failed)} of {len(outcomes)} entries failed: {', '.join(failed)}")
    if some:
        console.error(f"items failed of {', '.join(some)}")
    if short:
        say = console.error if strict else console.warn
        say(f"goals missed: {', '.join(short)}")
    if gated or (strict and short):
        return GATE_MISSED
    if len(failed) == len(outcomes):
        return codes[0] if len(set(codes)) == 1 else 1
    return SOME_FAILED if failed or some else 0


def recorded(place: Path) -> tuple[str, list[Outcome]]:
    """Title and outcomes of a suite that was run, from the folder of its results. InputError."""
    from moshi_cli.tasks.evaluation import read_result
    from moshi_cli.tasks.suites import SUMMARY, Entry, Outcome

    path = place / SUMMARY
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Outcome(
                Entry(
                    row["name"], row["task"], figures=tuple(row["shown"]),
                    goals={name: goal["goal"] for name, goal in row["goals"].items()},
                ),
                None if row["result"] is None else read_result(place / row["name"]), row["error"],
            )
            for row in told["entries"]
        ]  # fmt: skip
        return str(told["title"]), found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a suite ({error!r})") from None
