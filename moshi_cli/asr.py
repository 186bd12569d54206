"""`moshi asr`: words and their times, from files, folders, pipes and the microphone."""

from __future__ import annotations

from typing import Annotated

import typer

from moshi_cli.asr_jobs import LIVE, MICROPHONE, Desk, HearingFlags, Style, formats_of, suffixes_of
from moshi_cli.batch import Run
from moshi_cli.core.errors import UsageError
from moshi_cli.options import (
    AudioOptions,
    BatchOptions,
    Inputs,
    LogOptions,
    ModelOptions,
    flag,
    spread,
)
from moshi_cli.session import open_model
from moshi_cli.slots import work

KINDS = "txt|srt|vtt|tsv|json|jsonl|alignments|all"
Limit = Annotated[int | None, typer.Option(min=1, help="Of subtitles.")]


@spread
def command(
    inputs: Inputs = None,
    *,
    output_format: Annotated[
        str | None,
        flag("--output-format/-f", "One or more; by default as -o says, else txt.", metavar=KINDS),
    ] = None,
    word_timestamps: Annotated[
        bool, typer.Option("--word-timestamps/--no-word-timestamps", help="In json.")
    ] = True,
    max_line_width: Limit = None,
    max_line_count: Limit = None,
    max_words_per_line: Limit = None,
    highlight_words: Annotated[bool, flag("--highlight-words", "Underline in srt, vtt.")] = False,
    hearing: HearingFlags,
    model: ModelOptions,
    reading: AudioOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """Write down what is said. One input goes to stdout, line by line as it is heard."""
    from moshi_cli.tasks.subtitles import Layout

    if hearing.mic and inputs:
        raise UsageError("--mic takes no other input")
    console = log.console("asr")
    layout = Layout(max_line_width, max_line_count, max_words_per_line, highlight_words)
    style = Style(formats_of(output_format, batch.output), layout, word_timestamps)
    run = Run(
        "asr", inputs, batch, console, suffixes=suffixes_of(style.formats),
        many_to_stdout=len(style.formats) == 1 and style.formats[0] in LIVE,
        items=[MICROPHONE] if hearing.mic else None,
    )  # fmt: skip
    opened = open_model(model, console)
    desk = Desk(run, opened, style, hearing, options=model, reading=reading)
    return run(work(desk.engine(), desk.job), desk.settings, opened.revision or opened.name)
