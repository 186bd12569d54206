"""The options that commands share: one spelling, one help text, one default each.

Options that belong together are a frozen dataclass. A command takes such a dataclass as one
parameter and is decorated with `spread`, which shows typer the fields instead:

    @spread
    def command(inputs: Inputs = None, *, model: ModelOptions, log: LogOptions) -> int: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from moshi_cli import settings

if TYPE_CHECKING:
    from moshi_cli.console import Console

Function = TypeVar("Function", bound=Callable[..., Any])

RAW = ("s16le", "s32le", "f32le", "mulaw")


def choice(names: str, *values: str, help: str, **extra: Any) -> Any:
    """An option with a fixed set of values; names as in "--dtype/-t"."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(values)}")
        return value

    return typer.Option(
        *names.split("/"), metavar="|".join(values), help=help, callback=check,
        autocompletion=lambda: list(values), **extra,
    )  # fmt: skip


def flag(names: str, help: str, **extra: Any) -> Any:
    """An option; names as in "--seed/-s"."""
    return typer.Option(*names.split("/"), help=help, **extra)


Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUTS...",
        help="Files, folders, quoted patterns, @LIST.txt, or - for standard input.",
        show_default=False,
    ),
]
Json = Annotated[bool, flag("--json", "One JSON record on stdout.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where and how it computes."""

    model: Annotated[
        str | None,
        flag(
            "--model/-m", "A name, folder, file, repository id or hf:// address.",
            envvar="MOSHI_MODEL", metavar="MODEL",
        ),
    ] = None  # fmt: skip
    revision: Annotated[str | None, flag("--revision", "Of the repository.")] = None
    moshi_weight: Annotated[Path | None, flag("--moshi-weight", "Language model file.")] = None
    mimi_weight: Annotated[Path | None, flag("--mimi-weight", "Codec file.")] = None
    tokenizer: Annotated[Path | None, flag("--tokenizer", "SentencePiece file.")] = None
    ngrams: Annotated[
        Path | None, flag("--ngrams", "N-grams for the search of asr, beside the model's own.")
    ] = None
    config_path: Annotated[
        Path | None, flag("--config-path/--config/--lm-config", "The checkpoint's JSON.")
    ] = None
    lora_weight: Annotated[Path | None, flag("--lora-weight", "LoRA file to merge.")] = None
    device: Annotated[
        str, flag("--device", "auto, cpu, mps, cuda or cuda:N.", envvar="MOSHI_DEVICE")
    ] = "auto"
    dtype: Annotated[
        str, choice("--dtype", "auto", "bf16", "fp16", "fp32", help="Of the language model.")
    ] = "auto"
    half: Annotated[bool, flag("--half", "Short for --dtype fp16.")] = False
    threads: Annotated[int | None, flag("--threads", "CPU threads.", min=1)] = None
    seed: Annotated[int, flag("--seed", "Of everything that is drawn.", min=0)] = 0


@dataclass(frozen=True)
class AudioOptions:
    """How a recording is read."""

    channel: Annotated[str, flag("--channel", "mix, left, right, separate or a number from 0.")] = (
        "mix"
    )
    start: Annotated[float, flag("--start", "Seconds to skip.", min=0)] = 0.0
    duration: Annotated[float | None, flag("--duration", "Seconds to use.", min=0)] = None
    input_format: Annotated[
        str | None, choice("--input-format", *RAW, help="PCM without a header.")
    ] = None
    sample_rate: Annotated[
        int, flag("--sample-rate", "Hz, with --input-format.", min=1000, max=768_000)
    ] = 24_000
    input_channels: Annotated[
        int, flag("--input-channels", "With --input-format.", min=1, max=64)
    ] = 1

    def reader(self) -> dict[str, Any]:
        """Arguments of `core.audio.frames` and `core.audio.read`."""
        return {
            "channel": self.channel, "start_s": self.start, "duration_s": self.duration,
            "input_format": self.input_format, "sample_rate": self.sample_rate,
            "input_channels": self.input_channels,
        }  # fmt: skip


@dataclass(frozen=True)
class BatchOptions:
    """Many inputs, where their results go, and what is done twice."""

    output: Annotated[
        str | None, flag("--output/-o", "Result file, a folder, or - for stdout.", metavar="PATH")
    ] = None
    output_dir: Annotated[
        Path | None, flag("--output-dir", "Folder of the results; sub-folders are kept.")
    ] = None
    recursive: Annotated[bool, flag("--recursive/-r", "Enter sub-folders.")] = False
    include: Annotated[
        list[str] | None, flag("--include", "Names to take from folders.", metavar="'*.wav'")
    ] = None
    manifest: Annotated[
        str | None, flag("--manifest", "JSON lines that name the inputs, or -.", metavar="FILE|-")
    ] = None
    existing: Annotated[
        str | None,
        choice(
            "--existing", "overwrite", "skip", "error", help="Results that exist.",
            show_default="overwrite",
        ),
    ] = None  # fmt: skip
    resume: Annotated[bool, flag("--resume", "Skip what the journal says is done.")] = False
    retry_failed: Annotated[
        bool, flag("--retry-failed", "Like --resume, but try failed inputs again.")
    ] = False
    checksum: Annotated[bool, flag("--checksum", "Journal the SHA-256 of inputs.")] = False
    shard: Annotated[
        str | None, flag("--shard", "Every N-th input, from the I-th.", metavar="I/N")
    ] = None
    fail_fast: Annotated[bool, flag("--fail-fast", "Stop at the first bad input.")] = False
    batch_size: Annotated[int, flag("--batch-size", "Inputs at a time.", min=1)] = 1
    status: Annotated[
        str | None, choice("--status", "jsonl", help="A JSON line on stdout per input.")
    ] = None
    stdin_paths: Annotated[
        bool, flag("--stdin-paths", "Read one path per line from stdin; implies --status jsonl.")
    ] = False


@dataclass(frozen=True)
class LogOptions:
    """What is said on stderr; and where the user's own defaults are."""

    quiet: Annotated[bool, flag("--quiet/-q", "Errors only.")] = False
    verbose: Annotated[int, flag("--verbose/-v", "More; -vv even more.", count=True)] = 0
    progress: Annotated[
        str, choice("--progress", "auto", "always", "never", "json", help="On stderr.")
    ] = "auto"
    log_format: Annotated[str, choice("--log-format", "text", "json", help="On stderr.")] = "text"
    debug: Annotated[bool, flag("--debug", "Show tracebacks.")] = False
    settings: Annotated[
        Path | None,
        flag(
            "--settings", "Defaults, instead of ~/.config/moshi/config.toml.", metavar="FILE",
            envvar="MOSHI_SETTINGS", is_eager=True, callback=settings.apply,
        ),
    ] = None  # fmt: skip

    def console(self, command: str) -> Console:
        """The console of a command, as loud as asked for."""
        from moshi_cli.console import Console

        return Console(
            command, quiet=self.quiet, verbose=self.verbose, progress=self.progress,
            log_format=self.log_format,
        )  # fmt: skip


def spread(function: Function) -> Function:
    """Show typer the fields of every options dataclass in place of the parameter."""
    hints = get_type_hints(function, include_extras=True)
    packed: dict[str, tuple[Any, list[str]]] = {}
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            shown.append(parameter.replace(annotation=kind))
            continue
        packed[name] = (kind, [field.name for field in fields(kind)])
        types = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            assert field.default is not MISSING, field.name
            shown.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=types[field.name],
                )
            )

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        for name, (kind, names) in packed.items():
            given[name] = kind(**{n: given.pop(n) for n in names})
        return function(**given)

    shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in shown}
    return command  # type: ignore[return-value]


def group(help: str) -> typer.Typer:
    """A command that has subcommands."""
    return typer.Typer(help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
