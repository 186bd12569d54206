"""`moshi chat`: conversations with the microphone, with recordings, and along a pipe."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

from moshi_cli.batch import Run
from moshi_cli.chat_jobs import MICROPHONE, Table, TalkingFlags, items_of
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
from moshi_cli.tts_jobs import SoundFlags


@spread
def command(
    inputs: Inputs = None,
    *,
    input: Annotated[list[str] | None, flag("--input/-i", "Another way to name an input.")] = None,
    talking: TalkingFlags,
    sound: SoundFlags,
    model: ModelOptions,
    reading: AudioOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """Talk with the model: live without inputs, else it replies to each recording."""
    console = log.console("chat")
    if talking.list_devices:
        from moshi_cli.devices import list_devices

        console.line(list_devices())
        return 0
    items = items_of(inputs, input, talking.mic, batch)
    live = items == [MICROPHONE]
    if batch.output is None and batch.output_dir is None and not live and elsewhere(talking):
        batch = replace(batch, output=os.devnull)  # the sound itself is not wanted
    kind = sound.kind(batch)
    run = Run("chat", None, batch, console, suffixes=[f".{kind}"], items=items)
    to_stdout = run.destination.stdout and (not live or batch.output is not None)
    console.refuse_terminal(to_stdout, "use -o FILE, or --text-output - for the words alone")
    check(talking, to_stdout, single=run.single)
    opened = open_model(model, console)
    writer = {"format": kind, "subtype": sound.subtype}
    table = Table(run, opened, talking, writer, options=model, reading=reading)
    return run(work(table.engine(), table.job), table.settings, opened.revision or opened.name)


def elsewhere(flags: TalkingFlags) -> bool:
    """Whether something else than the reply's sound is asked for."""
    return flags.text_output is not None or flags.stereo is not None or flags.jsonl


def check(flags: TalkingFlags, to_stdout: bool, *, single: bool) -> None:
    """UsageError where two results want the same place."""
    if [to_stdout, flags.text_output == "-", flags.jsonl].count(True) > 1:
        raise UsageError("only one result can go to stdout", "use -o FILE, --text-output FILE")
    if not single and (flags.stereo is not None or flags.text_output not in (None, "-")):
        raise UsageError("--stereo and --text-output name one file", "use them with one input")
