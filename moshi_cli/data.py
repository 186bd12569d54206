"""`moshi data`: from recordings to what `moshi train` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_cli import data_text
from moshi_cli.core.errors import UsageError
from moshi_cli.options import (
    Inputs,
    Json,
    LogOptions,
    ModelOptions,
    choice,
    flag,
    group,
    spread,
)

app = group("Prepare, check and encode training data; make dialogues.")

Places = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA", help="Manifests (JSON lines), packs, or folders with either.",
        show_default=False,
    ),
]  # fmt: skip
Folder = Annotated[Path, flag("--output-dir/-o", "Folder of the results.", metavar="DIR")]
Layout = Annotated[
    str,
    choice(
        "--layout", "auto", "mono", "stereo", "turns",
        help="Lines of a recording: one, left and right, or a speaker against the rest.",
    ),
]  # fmt: skip
Bad = Annotated[str, choice("--bad", "fail", "skip", help="Lines that cannot be used.")]
NoWords = Annotated[bool, flag("--no-words", "Recordings need no words (as for the codec).")]
Shard = Annotated[
    str | None, flag("--shard", "Every N-th, from the I-th, in a folder of its own.", metavar="I/N")
]


@app.command()
@spread
def prepare(
    inputs: Inputs = None,
    *,
    output_dir: Folder,
    manifest: Annotated[
        str | None, flag("--manifest", "JSON lines that name recordings or parts of them.")
    ] = None,
    recursive: Annotated[bool, flag("--recursive/-r", "Enter sub-folders.")] = False,
    convert: Annotated[
        bool, flag("--convert", "Copy the sound as 24 kHz WAV, words beside it.")
    ] = False,
    pack: Annotated[bool, flag("--pack", "One flat file of all sound (for the codec).")] = False,
    transcribe: Annotated[
        bool, flag("--transcribe", "Write down recordings that have no words.")
    ] = False,
    diarise: Annotated[
        int | None, flag("--diarise", "Guess the turns of so many speakers.", min=2, max=26)
    ] = None,
    bad: Bad = "fail",
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """Recordings to a manifest: lengths, words, turns; or to a pack. What is done is not redone.

    Words come from NAME.json beside the sound (as `moshi asr -f alignments` writes it), from the
    manifest, or from the model.
    """
    from moshi_cli.data_jobs import named
    from moshi_cli.data_jobs import prepare as run
    from moshi_cli.session import open_model

    console = log.console("data prepare")
    if convert and pack:
        raise UsageError("--convert and --pack are two ways to copy the sound: give one of them")
    found = named(inputs, recursive, manifest)
    opened = open_model(model, console) if transcribe else None
    return run(
        found, output_dir, console, convert=convert, pack=pack, model=opened, diarise=diarise,
        skip=bad == "skip",
    )  # fmt: skip


@app.command()
@spread
def check(
    data: Places,
    *,
    layout: Layout = "auto",
    no_words: NoWords = False,
    output: Annotated[
        Path | None, flag("--output/-o", "Write the good lines to this manifest.", metavar="FILE")
    ] = None,
    fast: Annotated[bool, flag("--fast", "Do not listen where the words are.")] = False,
    fail_fast: Annotated[bool, flag("--fail-fast", "Stop at the first bad line.")] = False,
    json: Json = False,
    log: LogOptions,
) -> int:
    """What is wrong with manifests, packs and caches, by file and line; exit code 3 if anything."""
    from moshi_cli.data_jobs import check as run

    console = log.console("data check")
    return run(
        data, console, layout=layout, words=not no_words, output=output, listen=not fast,
        fail_fast=fail_fast, as_json=json,
    )  # fmt: skip


@app.command()
@spread
def stats(data: Places, *, json: Json = False, log: LogOptions) -> None:
    """How much there is: hours, words, speakers, and how they talk."""
    from moshi_cli.core.errors import InputError
    from moshi_cli.tasks.statistics import describe

    console = log.console("data stats")
    for place in data:
        try:
            found = describe(place)
        except OSError as error:
            raise InputError(f"{place}: {error.strerror}") from None
        if json:
            console.record(found)
            continue
        for key, value in found.items():
            console.line(f"{key.replace('_', ' ') + ':':22}{value}")


@app.command()
@spread
def encode(
    data: Places,
    *,
    output_dir: Folder,
    layout: Layout = "auto",
    no_words: NoWords = False,
    bad: Bad = "fail",
    piece: Annotated[
        float, flag("--piece", "Seconds of a piece of a long recording.", min=1)
    ] = 300.0,
    variants: Annotated[
        int, flag("--variants", "Takes of each piece; with turns, of another speaker.", min=1)
    ] = 1,
    microphone: Annotated[
        bool, flag("--microphone", "The partner with other levels, noise, echo and room.")
    ] = False,
    noise: Annotated[
        list[str] | None, flag("--noise", "Recordings of noise for it.", metavar="FILE")
    ] = None,
    plan: Annotated[
        Path | None,
        flag("--plan", "YAML: takes of the clips of packs, and windows of many.", metavar="FILE"),
    ] = None,
    shard: Shard = None,
    residual: Annotated[
        bool, flag("--residual", "What codes leave of the sound, too, for models that hear it.")
    ] = False,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """Recordings to codes, once, for training; goes on where it was stopped."""
    from moshi_cli.data_jobs import encode as run
    from moshi_cli.data_jobs import encode_plan
    from moshi_cli.session import open_codec
    from moshi_cli.tasks import plans

    console = log.console("data encode")
    takes = plans.load(plan) if plan is not None else None
    mimi = open_codec(model, console).mimi
    if takes is not None:
        return encode_plan(
            data, output_dir, mimi, console, takes, seed=model.seed, shard=shard,
            residual=residual,
        )  # fmt: skip
    return run(
        data, output_dir, mimi, console, layout=layout, words=not no_words, skip=bad == "skip",
        piece_s=piece, variants=variants, seed=model.seed, shard=shard, residual=residual,
        noises=tuple(noise or ()) if microphone or noise else None,
    )  # fmt: skip


@app.command()
@spread
def features(
    pack: Annotated[
        Path,
        typer.Argument(
            metavar="PACK",
            help="Folder that `moshi data prepare --pack` made.",
            show_default=False,
        ),
    ],
    *,
    teacher: Annotated[
        str,
        flag("--teacher", "whisper:FOLDER, or wavlm: and a folder or id.", metavar="KIND:PLACE"),
    ],
    device: Annotated[
        str, flag("--device", "auto, cpu, mps, cuda or cuda:N.", envvar="MOSHI_DEVICE")
    ] = "auto",
    force: Annotated[bool, flag("--force", "Begin again, whatever there is.")] = False,
    log: LogOptions,
) -> None:
    """What a speech encoder makes of a pack, to teach the codec; goes on where it was stopped.

    whisper: a folder with model.bin (CTranslate2) or model.safetensors (Transformers). wavlm:
    WavLM, HuBERT or wav2vec 2.0 through the package transformers. Nothing is downloaded.
    """
    from moshi_cli.data_jobs import features as run

    run(pack, teacher, log.console("data features"), device=device, force=force)


@app.command()
@spread
def dialogue(
    scripts: Annotated[
        list[Path], typer.Argument(metavar="SCRIPTS", help="JSON lines.", show_default=False)
    ],
    *,
    output_dir: Folder,
    speak: Annotated[
        str | None,
        flag("--speak", "Command that speaks {text} as {voice} into {output}.", metavar="COMMAND"),
    ] = None,
    clips: Annotated[
        list[str] | None, flag("--clips", "Recorded lines to use instead.", metavar="DATA")
    ] = None,
    own_voice: Annotated[str, flag("--own-voice", "The model's voice, always the same.")] = "moshi",
    voices: Annotated[
        str | None, flag("--voices", "Of users, with commas.", metavar="NAME,NAME")
    ] = None,
    variants: Annotated[int, flag("--variants", "Recordings of each script.", min=1)] = 1,
    bad: Bad = "fail",
    shard: Shard = None,
    seed: Annotated[int, flag("--seed", "Of everything that is drawn.", min=0)] = 0,
    log: LogOptions,
) -> int:
    """Scripts to stereo recordings with pauses, overlaps, interruptions, nods and silence.

    A script is a line of JSON: {"id", "turns": [{"speaker": "user", "text": "…"}, …]}; turns may
    have gap_s, interrupts and nod. The model's own voice is on the left.
    """
    from moshi_cli.dialogue_jobs import dialogue as run

    console = log.console("data dialogue")
    if (speak is None) == (clips is None):
        raise UsageError("say who speaks: --speak COMMAND or --clips DATA")
    users = tuple(v.strip() for v in (voices or "").split(",") if v.strip())
    return run(
        scripts, output_dir, console, speak=speak, clips=clips, own_voice=own_voice, users=users,
        variants=variants, skip=bad == "skip", shard=shard, seed=seed,
    )  # fmt: skip


app.command()(data_text.tokenizer)
app.command()(data_text.ngrams)
app.command()(data_text.text)
