"""Options of `moshi eval`, and the gates that a figure must pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moshi_cli.console import Console
from moshi_cli.core.errors import UsageError
from moshi_cli.options import Json, ModelOptions, choice, flag

if TYPE_CHECKING:
    from moshi_cli.tasks.evaluation import Figure
    from moshi_cli.tasks.judges import Judge
    from moshi_cli.tasks.normalisers import Normaliser


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, where it is kept, and what must not be worse."""

    output_dir: Annotated[
        Path | None, flag("--output-dir/-o", "Report, rows and sound.", metavar="DIR")
    ] = None
    resume: Annotated[bool, flag("--resume", "Go on with what is in that folder.")] = False
    limit: Annotated[int | None, flag("--limit", "At most so many items.", min=1)] = None
    batch_size: Annotated[int, flag("--batch-size", "Items at a time.", min=1)] = 1
    fail_above: Annotated[
        list[str] | None,
        flag("--fail-above", "Exit code 1 if a figure is higher.", metavar="wer=0.08"),
    ] = None
    fail_below: Annotated[
        list[str] | None,
        flag("--fail-below", "Exit code 1 if a figure is lower.", metavar="stoi=0.9"),
    ] = None
    html: Annotated[
        Path | None, flag("--html", "One page with plots, players and diffs.", metavar="FILE")
    ] = None
    json: Json = False


@dataclass(frozen=True)
class TextOptions:
    """How texts are compared."""

    normalizer: Annotated[
        str, choice("--normalizer", "moshi-en", "whisper-en", "none", help="Of texts, before WER.")
    ] = "moshi-en"

    def open(self) -> Normaliser:
        """UsageError if it is not installed."""
        from moshi_cli.tasks.normalisers import normaliser

        return normaliser(self.normalizer)


@dataclass(frozen=True)
class JudgeOptions:
    """Who listens to sound that was made."""

    judge: Annotated[
        str | None,
        flag(
            "--judge", "A model of ours, whisper:NAME, faster-whisper:DIR, command:CMD, or none.",
            metavar="JUDGE",
        ),
    ] = None  # fmt: skip
    judge_language: Annotated[str, flag("--judge-language", "Of Whisper judges.")] = "en"

    def open(self, model: ModelOptions, batch_size: int, console: Console) -> Judge | None:
        """The judge, ready to listen. UsageError, ModelError."""
        from moshi_cli.session import BUILTIN_NAME, open_model
        from moshi_cli.slots import details
        from moshi_cli.tasks.judges import ModelJudge
        from moshi_cli.tasks.whisper_judges import judge_of

        if self.judge in (None, "none"):
            return None
        device = "cpu" if model.device == "auto" else model.device
        found = judge_of(self.judge, language=self.judge_language, device=device)
        if found is not None:
            return found
        name = None if self.judge == BUILTIN_NAME else self.judge
        options = ModelOptions(
            model=name, device=model.device, dtype=model.dtype, half=model.half,
            threads=model.threads, seed=model.seed,
        )  # fmt: skip
        opened = open_model(options, console)
        facts = details(opened, options)
        return ModelJudge(opened, batch_size, {k: v for k, v in facts.items() if k != "seed"})


@dataclass(frozen=True)
class Gate:
    """A figure that must not be above (or below) a value."""

    name: str
    limit: float
    above: bool

    def missed(self, figures: Mapping[str, Figure]) -> str | None:
        """What is wrong, or None."""
        figure = figures.get(self.name)
        if figure is None:
            return f"{self.name} was not measured"
        worse = figure.value > self.limit if self.above else figure.value < self.limit
        if not worse and math.isfinite(figure.value):
            return None
        return (
            f"{self.name} is {figure.value:.4g}, {'above' if self.above else 'below'} the limit "
            f"{self.limit:g}"
        )


def gates(options: EvalOptions, known: Sequence[str]) -> list[Gate]:
    """The gates of a command line; UsageError for a figure that its task does not have."""
    found = []
    for above, texts in ((True, options.fail_above), (False, options.fail_below)):
        for text in texts or ():
            option = "--fail-above" if above else "--fail-below"
            name, _, value = text.partition("=")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if math.isnan(limit):
                raise UsageError(
                    f"{option} {text} makes no sense", "write NAME=NUMBER, as wer=0.08"
                )
            if not any(fnmatchcase(name, pattern) for pattern in known):
                raise UsageError(
                    f"{option}: there is no figure {name!r}", f"there are {', '.join(known)}"
                )
            found.append(Gate(name, limit, above))
    return found
