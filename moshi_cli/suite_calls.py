"""Entries of a suite as calls of `moshi eval TASK`.

An entry's options are parsed by the command they belong to, so that a suite says nothing that a
command line could not, and means the same by it. What the command line of the suite says (model,
judge, batch size, …) holds for every entry that has the option and does not say it itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli.app import ClickException
from moshi_cli.console import Console
from moshi_cli.core.errors import UsageError
from moshi_cli.eval_options import EvalOptions, JudgeOptions, TextOptions, gates
from moshi_cli.options import LogOptions, ModelOptions

if TYPE_CHECKING:
    from moshi_cli.tasks.documents import Document
    from moshi_cli.tasks.suites import Entry, Suite

LOG = (f.name.replace("_", "-") for f in fields(LogOptions))
OWN = {"output-dir", "resume", "html", "json", *LOG}  # the suite's, not an entry's
PATHS = ("hyp", "voice", "model", "degraded")  # options that may name a file beside the suite


@dataclass(frozen=True)
class Shared:
    """What the command line says to all entries."""

    options: EvalOptions
    model: ModelOptions
    judging: JudgeOptions
    texts: TextOptions
    log: LogOptions

    @property
    def console(self) -> Console:
        return self.log.console("eval suite")


@dataclass(frozen=True)
class Call:
    """An entry, ready to be run."""

    entry: Entry
    command: Any  # of typer
    context: Any  # with all its parameters


def figure_names(task: str) -> list[str]:
    """Patterns of the figures that a task may give."""
    from moshi_cli import eval_tasks

    if task == "codec":
        each = eval_tasks.codec_names([8])
        return [*each, *(f"{name}@[0-9]*" for name in each)]
    from moshi_cli.eval_interrupt import FIGURES

    names = {
        "asr": eval_tasks.ASR, "tts": eval_tasks.TTS, "qa": eval_tasks.QA, "interrupt": FIGURES
    }.get(task)  # fmt: skip
    if names is not None:
        return eval_tasks.with_groups(names)
    return {"lm": ["*_nll", "*_ppl"], "pairs": ["accuracy", "accuracy_*", "margin"]}.get(
        task, ["*"]
    )


def shared_gates(options: EvalOptions, asked: Suite) -> dict[str, dict[str, list[str]]]:
    """--fail-above ENTRY/FIGURE=VALUE by entry. UsageError."""
    from moshi_cli.tasks.documents import nearest

    tasks = {entry.name: entry.task for entry in asked.entries}
    found: dict[str, dict[str, list[str]]] = {name: {} for name in tasks}
    for key in ("fail_above", "fail_below"):
        option = "--" + key.replace("_", "-")
        for text in getattr(options, key) or ():
            name, slash, rest = text.partition("/")
            if not slash or "=" in name:
                raise UsageError(
                    f"{option} {text} makes no sense", "write ENTRY/FIGURE=NUMBER, as test/wer=0.08"
                )
            if name not in tasks:
                raise UsageError(f"{option}: there is no entry {name!r}", nearest(name, tasks))
            found[name].setdefault(key, []).append(rest)
    for name, limits in found.items():
        some = EvalOptions(fail_above=limits.get("fail_above"), fail_below=limits.get("fail_below"))
        gates(some, figure_names(tasks[name]))
    return found


def prepared(
    entry: Entry, document: Document, at: tuple[str, ...], folder: Path, log: LogOptions
) -> Call:
    """An entry as its command understands it. UsageError, which names file and line."""
    import typer

    from moshi_cli import eval as commands
    from moshi_cli.tasks.documents import nearest

    group: Any = typer.main.get_command(commands.app)
    command = group.commands[entry.task]
    known = figure_names(entry.task)
    wanted: list[tuple[tuple[str, str], str]] = [(("goals", name), name) for name in entry.goals]
    wanted += [(("figures", str(i)), name) for i, name in enumerate(entry.figures)]
    for place, name in wanted:
        if not any(c in name for c in "*?[") and not any(fnmatchcase(name, p) for p in known):
            where = document.place((*at, *place))
            hint = nearest(name, known)
            raise UsageError(f"{where}: {entry.task} has no figure {name!r}", hint)
    words = list(arguments(entry, command, document, at, folder))
    words += ["--settings", str(log.settings)] if log.settings else []
    try:
        context = command.make_context(
            f"moshi eval {entry.task}", [*words, "--", *(beside(folder, i) for i in entry.inputs)]
        )
    except ClickException as error:
        name = str(getattr(getattr(error, "param", None), "name", None)).replace("_", "-")
        key = next((k for k in entry.options if k.replace("_", "-") == name), "")
        where, said = document.place((*at, "options", key)), error.format_message().rstrip(".")
        raise UsageError(f"{where}: {said[:1].lower()}{said[1:]}") from None
    return Call(entry, command, context)


def arguments(
    entry: Entry, command: Any, document: Document, at: tuple[str, ...], folder: Path
) -> Iterator[str]:
    """The options of an entry as words of a command line."""
    from moshi_cli.tasks.documents import nearest

    named = {
        option.removeprefix("--"): parameter
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }

    def refuse(key: str, why: str, hint: str | None = None) -> UsageError:
        return UsageError(f"{document.place((*at, 'options', key))}: {why}", hint)

    for key, value in entry.options.items():
        name = key.replace("_", "-")
        if name not in named or name in OWN or name == "manifest":
            hint = nearest(name, sorted(named.keys() - OWN - {"manifest"}))
            raise refuse(key, f"`moshi eval {entry.task}` has no option {key!r}", hint)
        parameter = named[name]
        if isinstance(value, Mapping):
            raise refuse(key, f"{key} must be one value, or a list")
        if parameter.is_flag:
            if not isinstance(value, bool):
                raise refuse(key, f"{key} must be true or false")
            both = [parameter.opts, parameter.secondary_opts]
            same, other = both if f"--{name}" in parameter.opts else both[::-1]
            yield from (same if value else other)[:1]
            continue
        several = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        if name in PATHS:
            several = [str(folder / v) if (folder / v).exists() else v for v in several]
        several = several if parameter.multiple else [",".join(several)]
        yield from (f"--{name}={v}" for v in several)
    if entry.manifest:
        parameter = named.get("manifest")
        if parameter is None or (len(entry.manifest) > 1 and not parameter.multiple):
            where = document.place((*at, "manifest"))
            why = "one manifest" if parameter else "`inputs`, no manifest"
            raise UsageError(f"{where}: `moshi eval {entry.task}` takes {why}")
        yield from (f"--manifest={beside(folder, name)}" for name in entry.manifest)


def beside(folder: Path, name: str) -> str:
    """An input, relative to the folder of the suite."""
    return f"@{folder / name[1:]}" if name.startswith("@") else str(folder / name)


def share(call: Call, shared: Shared, folder: Path, limits: Mapping[str, list[str]]) -> None:
    """What holds for all entries, where the entry itself does not say otherwise."""
    context = call.context
    said = {
        name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"
    }
    own = {name: context.params.get(name) for name in ("limit", "fail_above", "fail_below")}
    for part in (shared.options, shared.model, shared.judging, shared.texts, shared.log):
        for f in fields(part):
            if f.name in context.params and f.name not in said:
                context.params[f.name] = getattr(part, f.name)
    smallest = [n for n in (own["limit"] if "limit" in said else None, shared.options.limit) if n]
    context.params |= {
        "output_dir": folder, "html": None, "json": False, "limit": min(smallest, default=None),
        **{k: [*(own[k] or ()), *limits.get(k, ())] for k in ("fail_above", "fail_below")},
    }  # fmt: skip
