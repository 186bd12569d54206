"""`moshi tts`: speech from arguments, files, manifests, and text that is still being written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from moshi_cli.batch import Run
from moshi_cli.core.errors import UsageError
from moshi_cli.options import BatchOptions, LogOptions, ModelOptions, flag, spread
from moshi_cli.session import open_model
from moshi_cli.slots import work
from moshi_cli.tts_jobs import SoundFlags, SpeakingFlags, Studio, Words, items_of


@spread
def command(
    words: Words = None,
    *,
    text: Annotated[str | None, flag("--text", "The text; - is stdin.")] = None,
    input_file: Annotated[list[Path] | None, flag("--input-file", "Text files.")] = None,
    speaking: SpeakingFlags,
    sound: SoundFlags,
    model: ModelOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """Say what is written. Standard input is spoken while it arrives."""
    console = log.console("tts")
    kind = sound.kind(batch)
    run = Run(
        "tts", None, batch, console, suffixes=[f".{kind}"],
        items=items_of(words, text, input_file, batch.manifest),
    )  # fmt: skip
    console.refuse_terminal(run.destination.stdout and not speaking.play, "use -o FILE or --play")
    if run.destination.stdout and speaking.timestamps:
        raise UsageError("--timestamps needs -o FILE", "the times are written beside the sound")
    opened = open_model(model, console)
    writer = {"format": kind, "subtype": sound.subtype}
    studio = Studio(run, opened, speaking, writer, options=model)
    code = run(work(studio.engine(), studio.job), studio.settings, opened.revision or opened.name)
    if studio.speaker is not None:
        studio.speaker.close()
    return code
