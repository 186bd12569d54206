"""`moshi bench`: how fast things are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer

from moshi_cli.core.errors import UsageError
from moshi_cli.options import Json, LogOptions, choice, flag, group, spread

if TYPE_CHECKING:
    from moshi_cli.bench_jobs import Bench

app = group("Measure how fast things are here.")

PEERS = ("kyutai", "transformers")
Context = Annotated[
    str | None,
    flag("--contexts", "Frames the temporal transformer looks back.", metavar="250,3000"),
]
Past = Annotated[str, flag("--lengths", "Seconds of the conversation so far.", metavar="0,60")]
Against = Annotated[
    str | None, choice("--against", *PEERS, help="An installed package, measured in turns with us.")
]
Rounds = Annotated[int, flag("--rounds", "With --against: turns of each side.", min=1)]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how often and where."""

    config: Annotated[
        str | None,
        flag(
            "--config/-c", "A published size with random weights: moshi-7b, stt-1b, mimi, small, …"
        ),
    ] = None
    model: Annotated[
        str | None,
        flag("--model/-m", "A model that is there; the built-in one if neither is given."),
    ] = None
    layers: Annotated[
        int | None, flag("--layers", "With --config: of the temporal transformer.", min=1)
    ] = None
    batches: Annotated[str, flag("--batches", "Streams at a time.", metavar="1,4")] = "1"
    codebooks: Annotated[int | None, flag("--codebooks", "Of the codec.", min=1)] = None
    steps: Annotated[int, flag("--steps", "That are timed, for each row.", min=1)] = 50
    warm: Annotated[int, flag("--warm", "Steps before them.", min=0)] = 5
    paced: Annotated[
        bool,
        typer.Option(
            "--paced/--burst", help="A frame every 80 ms, counting late ones; or one after another."
        ),
    ] = False
    dtype: Annotated[
        str, choice("--dtype", "auto", "bf16", "fp16", "fp32", help="Of the language model.")
    ] = "auto"
    device: Annotated[
        str, flag("--device", "auto, cpu, mps, cuda or cuda:N.", envvar="MOSHI_DEVICE")
    ] = "auto"
    threads: Annotated[int | None, flag("--threads", "CPU threads.", min=1)] = None
    seed: Annotated[int, flag("--seed", "Of weights and inputs.", min=0)] = 0


@app.callback()
def root() -> None:
    """Measure how fast things are here."""


def start(what: str, options: BenchOptions, json: bool, log: LogOptions) -> Bench:
    """The measurement of a subcommand."""
    from moshi_cli.bench_jobs import Bench

    if options.config and options.model:
        raise UsageError("--config has random weights, --model its own: give one of them")
    return Bench(what, options, log.console(f"bench {what}"), json)


@app.command()
@spread
def codec(
    *,
    lengths: Annotated[
        str, flag("--lengths", "Seconds of whole files; 0: only frames.", metavar="10,60")
    ] = "10",
    against: Against = None,
    rounds: Rounds = 7,
    options: BenchOptions,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Frames that are encoded and decoded as they come, and whole files."""
    bench = start("codec", options, json, log)
    rows = [
        bench.job(batch=int(batch), file_s=length)
        for batch, length in product(
            numbers(options.batches, int), numbers(lengths, float, least=0)
        )
    ]
    bench.run(rows, against, rounds)


@app.command()
@spread
def lm(
    *,
    contexts: Context = None,
    lengths: Past = "0",
    against: Against = None,
    rounds: Rounds = 7,
    options: BenchOptions,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Steps of the language model on tokens, greedy: one frame of all streams each."""
    bench = start("lm", options, json, log)
    bench.run(bench.grid(contexts, lengths), against, rounds)


Sound = Annotated[str | None, flag("--audio", "What is heard, again and again; else noise.")]


@app.command()
@spread
def asr(
    *,
    contexts: Context = None,
    audio: Sound = None,
    options: BenchOptions,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Frames of recognition, from sound to tokens; the time to the first word."""
    bench = start("asr", options, json, log)
    bench.run(bench.grid(contexts, "0", audio))


@app.command()
@spread
def tts(
    *, contexts: Context = None, options: BenchOptions, json: Json = False, log: LogOptions
) -> None:
    """Frames of speech, from tokens to sound; the time to the first sound."""
    bench = start("tts", options, json, log)
    bench.run(bench.grid(contexts, "0"))


@app.command()
@spread
def chat(
    *,
    contexts: Context = None,
    audio: Sound = None,
    options: BenchOptions,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Frames of a conversation, from sound to sound; the time to the first sound and word."""
    bench = start("chat", options, json, log)
    bench.run(bench.grid(contexts, "0", audio))


@app.command()
@spread
def latency(*, options: BenchOptions, json: Json = False, log: LogOptions) -> None:
    """Where the time between speaking and hearing goes, piece by piece.

    A frame has to be spoken before it is heard, and the codes of a reply come in two steps (160 ms
    together for Moshi); what this machine adds is measured.
    """
    bench = start("latency", options, json, log)
    bench.latency()


@app.command()
@spread
def train(
    *,
    widths: Annotated[str, flag("--widths", "Of the temporal transformer.")] = "128,256",
    batches: Annotated[str, flag("--batches", "Rows at a time.")] = "1,4",
    lengths: Annotated[str, flag("--lengths", "Seconds of a row.")] = "4,8",
    layers: Annotated[int, flag("--layers", "Of the temporal transformer.", min=1)] = 6,
    steps: Annotated[int, flag("--steps", "That are timed, for each size.", min=1)] = 5,
    device: Annotated[str, flag("--device", "auto, cpu, mps, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, flag("--threads", "CPU threads.", min=1)] = None,
    bf16: Annotated[bool, flag("--bf16", "Autocast.")] = False,
    recompute: Annotated[bool, flag("--recompute", "Activations are not kept.")] = False,
    compile: Annotated[bool, flag("--compile", "The temporal layers; takes a while.")] = False,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Training of language models of the built-in model's kind, on random tokens.

    frames/s counts the 80 ms frames of all rows; RSS is the memory of the process, first and last.
    """
    import torch

    from moshi_cli.core.weights import pick_device
    from moshi_cli.tasks.benchmark import Size, train_speed

    console = log.console("bench train")
    if threads is not None:
        torch.set_num_threads(threads)
    place = pick_device(device)
    console.info(f"torch {torch.__version__} on {place}, {torch.get_num_threads()} threads")
    sizes = product(numbers(widths, int), numbers(batches, int), numbers(lengths, float))
    if not json:
        console.line("width  batch  length  parameters   frames/s   ms/step  RSS MB")
    for width, batch, length in sizes:
        size = Size(int(width), layers, int(batch), length)
        speed = train_speed(
            size, steps, device=place, bf16=bf16, recompute=recompute, compile=compile
        )
        if json:
            console.record(speed.record())
            continue
        rss = f"{speed.rss_mb[0]:.0f} … {speed.rss_mb[-1]:.0f}"
        console.line(
            f"{width:5.0f}  {batch:5.0f}  {length:5.1f}s  {speed.parameters:10,}  "
            f"{speed.frames_per_s:9.0f}  {speed.step_ms[1]:8.0f}  {rss}"
        )


def numbers(text: str, kind: type[int] | type[float], least: float | None = None) -> list[float]:
    """ "1,2,4" as numbers. UsageError if they are none, or not above zero (not below `least`)."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers like 1,2,4") from None
    if not all(n > 0 if least is None else n >= least for n in found):
        raise UsageError(f"{text!r}: sizes are above zero")
    return [float(n) for n in found]
