"""`moshi codec`: sound to codes and back, from files, folders and pipes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from moshi_cli.batch import Run
from moshi_cli.core.errors import UsageError
from moshi_cli.inputs import CODES, expand
from moshi_cli.options import (
    AudioOptions,
    BatchOptions,
    Inputs,
    Json,
    LogOptions,
    ModelOptions,
    choice,
    flag,
    group,
    spread,
)
from moshi_cli.session import open_codec

if TYPE_CHECKING:
    from moshi_cli.core.mimi import Mimi

app = group("Turn sound into codes and back.")

DEFAULT_CODEBOOKS = 8
BY_NAME = "By default as -o says, else the first."
Codebooks = Annotated[int | None, flag("--num-codebooks/-n", "Codes per frame.", min=1)]
Bitrate = Annotated[float | None, flag("--bitrate/-b", "The same in kbit/s.", min=0)]
Format = Annotated[
    str | None, choice("--format", "mimi", "npz", "safetensors", "jsonl", help=BY_NAME)
]
AudioFormat = Annotated[str | None, choice("--format", "wav", "flac", "ogg", "raw", help=BY_NAME)]
Subtype = Annotated[str, choice("--subtype", "pcm16", "pcm24", "float", help="Of the samples.")]


@app.command()
@spread
def encode(
    inputs: Inputs = None,
    *,
    num_codebooks: Codebooks = None,
    bitrate: Bitrate = None,
    format: Format = None,
    force: Annotated[bool, flag("--force/-f", "Overwrite what exists.")] = False,
    model: ModelOptions,
    reading: AudioOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """Sound to codes; 8 codebooks if nothing else is said (1.1 kbit/s)."""
    from moshi_cli.codec_jobs import EncodeJob, frames_per_step, work
    from moshi_cli.tasks import codec, codes

    console = log.console("codec encode")
    one_channel(reading)
    kind = codes.format_of(named(batch), format)
    run = Run("codec encode", inputs, forced(batch, force), console, suffixes=[f".{kind}"])
    if kind != "jsonl":
        console.refuse_terminal(run.destination.stdout)
    opened = open_codec(model, console)
    set_codebooks(opened.mimi, num_codebooks, bitrate)
    info = codec.describe(opened.mimi)
    coder = codec.Coder(
        opened.mimi, "encode", slots=batch.batch_size, frames=frames_per_step(run.items)
    )
    settings = {"codec": info.codec, "n": info.codebooks, "format": kind, "reading": reading}
    return run(
        work(coder, lambda item: EncodeJob(run, item, info, kind, reading)), settings,
        opened.revision or opened.name,
    )  # fmt: skip


@app.command()
@spread
def decode(
    inputs: Inputs = None,
    *,
    num_codebooks: Codebooks = None,
    format: AudioFormat = None,
    subtype: Subtype = "pcm16",
    force: Annotated[
        bool, flag("--force/-f", "Overwrite what exists; decode codes of another codec.")
    ] = False,
    model: ModelOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """Codes to sound, exactly as long as the original."""
    from moshi_cli.codec_jobs import DecodeJob, frames_per_step, work
    from moshi_cli.core import audio_writer
    from moshi_cli.tasks import codec

    console = log.console("codec decode")
    kind = audio_writer.format_of(named(batch), format)
    run = Run(
        "codec decode", inputs, forced(batch, force), console, suffixes=[f".{kind}"], accept=CODES
    )
    console.refuse_terminal(run.destination.stdout)
    opened = open_codec(model, console)
    info = codec.describe(opened.mimi, opened.mimi.config.quantizer.codebooks)
    coder = codec.Coder(
        opened.mimi, "decode", slots=batch.batch_size, frames=frames_per_step(run.items)
    )
    writer = {"format": kind, "subtype": subtype}
    settings = {"codec": info.codec, "n": num_codebooks, **writer}
    return run(
        work(coder, lambda item: DecodeJob(run, item, info, writer, num_codebooks, force)),
        settings, opened.revision or opened.name,
    )  # fmt: skip


@app.command()
@spread
def roundtrip(
    inputs: Inputs = None,
    *,
    num_codebooks: Codebooks = None,
    bitrate: Bitrate = None,
    metrics: Annotated[
        bool, flag("--metrics", "JSON on stdout: distances to the original.")
    ] = False,
    format: AudioFormat = None,
    subtype: Subtype = "pcm16",
    force: Annotated[bool, flag("--force/-f", "Overwrite what exists.")] = False,
    model: ModelOptions,
    reading: AudioOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """Sound to codes and back: what the codec leaves of it."""
    from moshi_cli.codec_jobs import Roundtrip
    from moshi_cli.core import audio_writer
    from moshi_cli.tasks import codec

    console = log.console("codec roundtrip")
    one_channel(reading)
    kind = audio_writer.format_of(named(batch), format)
    if metrics and batch.output is None and batch.output_dir is None:
        batch = replace(batch, output=os.devnull)  # only the figures are wanted
    run = Run("codec roundtrip", inputs, forced(batch, force), console, suffixes=[f".{kind}"])
    if metrics and run.destination.stdout:
        raise UsageError("sound and --metrics cannot both go to stdout", "use -o FILE")
    console.refuse_terminal(run.destination.stdout)
    opened = open_codec(model, console)
    set_codebooks(opened.mimi, num_codebooks, bitrate)
    writer = {"format": kind, "subtype": subtype}
    info = codec.describe(opened.mimi)
    settings = {"codec": info.codec, "n": info.codebooks, "reading": reading, **writer}
    return run.each(
        Roundtrip(run, opened.mimi, reading, writer, metrics), settings,
        opened.revision or opened.name,
    )  # fmt: skip


@app.command()
@spread
def info(inputs: Inputs = None, *, json: Json = False, log: LogOptions) -> None:
    """What a file of codes holds."""
    from moshi_cli.codec_jobs import facts

    console = log.console("codec info")
    for item in expand(inputs, accept=CODES):
        found = facts(item)
        if json:
            console.record(found)
            continue
        for key, value in found.items():
            shown = "; ".join(value) if isinstance(value, list) else value
            console.line(f"{key.replace('_', ' ') + ':':15}{shown}")


def named(batch: BatchOptions) -> str:
    """The file that the result goes to, if a name was given; "-" tells nothing about its format."""
    folder = batch.output is None or batch.output.endswith(("/", os.sep))
    return "-" if folder or os.path.isdir(str(batch.output)) else str(batch.output)


def forced(batch: BatchOptions, force: bool) -> BatchOptions:
    """--force is --existing overwrite."""
    return replace(batch, existing="overwrite") if force else batch


def one_channel(reading: AudioOptions) -> None:
    """UsageError if several channels are asked for."""
    if reading.channel == "separate":
        raise UsageError("the codec has one channel", "choose --channel mix, left or right")


def set_codebooks(mimi: Mimi, count: int | None, kbit_s: float | None) -> None:
    """Use as many codebooks as asked for, directly or by bit rate; 8 by default."""
    total, size = mimi.config.quantizer.codebooks, mimi.config.quantizer.size
    each = mimi.frame_rate * (size - 1).bit_length() / 1000  # kbit/s of one codebook
    if count is not None and kbit_s is not None:
        raise UsageError("--num-codebooks and --bitrate say the same: give one of them")
    if kbit_s is not None:
        count = round(kbit_s / each)
    count = min(DEFAULT_CODEBOOKS, total) if count is None else count
    if not 1 <= count <= total:
        raise UsageError(
            f"{count} codebooks are asked for, the codec has {total}",
            f"that is {each:g} to {total * each:g} kbit/s",
        )
    mimi.set_num_codebooks(count)
