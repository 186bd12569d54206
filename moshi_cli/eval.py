"""`moshi eval`: how good a model is, in figures one can trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from moshi_cli import eval_more
from moshi_cli.eval_options import EvalOptions, JudgeOptions, TextOptions
from moshi_cli.options import Inputs, LogOptions, ModelOptions, choice, flag, group, spread
from moshi_cli.slots import Compile

app = group(
    "Measure how good a model is: figures with intervals of 95 %, and a row for every item. Items "
    "that cannot be used are counted and named, and make the exit code 3."
)

Manifests = Annotated[
    list[str] | None, flag("--manifest", "JSON lines, as for `moshi data`.", metavar="FILE")
]
Recursive = Annotated[bool, flag("--recursive/-r", "Enter sub-folders.")]
Channel = Annotated[str, flag("--channel", "mix, left, right or a number from 0.")]
By = Annotated[
    str | None, choice("--by", "kind", "voice", help="Chief figures of each of them, too.")
]
Temperature = Annotated[float | None, flag("--temperature", "By default that of the model.", min=0)]


@app.command()
@spread
def asr(
    inputs: Inputs = None,
    *,
    manifest: Manifests = None,
    hyp: Annotated[
        str | None,
        flag("--hyp", "Score these transcripts (JSON lines: id, text); no model.", metavar="FILE"),
    ] = None,
    recursive: Recursive = False,
    channel: Channel = "mix",
    delay: Annotated[float | None, flag("--delay", "As in `moshi asr`.")] = None,
    temperature: Annotated[float, flag("--temperature", "As in `moshi asr`.", min=0)] = 0.0,
    beam_size: Annotated[int | None, flag("--beam-size", "As in `moshi asr`.", min=1)] = None,
    lm_weight: Annotated[float | None, flag("--lm-weight", "As in `moshi asr`.", min=0)] = None,
    shifts: Annotated[int | None, flag("--shifts", "As in `moshi asr`.", min=1)] = None,
    refresh: Annotated[float | None, flag("--refresh", "As in `moshi asr`.", min=0)] = None,
    collar: Annotated[float, flag("--collar", "Seconds that word times may be off.", min=0)] = 0.2,
    by: By = None,
    compile: Compile = False,
    texts: TextOptions,
    evaluation: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """Word and letter errors of transcripts, and when words were written.

    References come from manifests, from NAME.txt or from NAME.json beside NAME.wav.
    """
    from moshi_cli.asr_jobs import HearingFlags
    from moshi_cli.eval_tasks import Asked
    from moshi_cli.eval_tasks import asr as run

    hearing = HearingFlags(
        delay=delay, temperature=temperature, beam_size=beam_size, lm_weight=lm_weight,
        shifts=shifts, refresh=refresh, compile=compile,
    )  # fmt: skip
    return run(
        inputs, manifest, hyp, recursive, channel, hearing, collar,
        Asked(model, evaluation, texts, log.console("eval asr"), by=by),
    )  # fmt: skip


@app.command()
@spread
def tts(
    inputs: Inputs = None,
    *,
    manifest: Manifests = None,
    voice: Annotated[list[str] | None, flag("--voice", "As in `moshi tts`.")] = None,
    temperature: Temperature = None,
    cfg_coef: Annotated[float | None, flag("--cfg-coef", "As in `moshi tts`.")] = None,
    nq: Annotated[int | None, flag("--nq", "As in `moshi tts`.", min=1)] = None,
    takes: Annotated[int | None, flag("--takes", "As in `moshi tts`.", min=1)] = None,
    speed: Annotated[float, flag("--speed", "As in `moshi tts`.", min=0.25, max=4)] = 1.0,
    by: By = None,
    compile: Compile = False,
    texts: TextOptions,
    judging: JudgeOptions,
    evaluation: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """What a judge hears in spoken texts, how long they are, and how soon they begin.

    Texts are manifests (JSON lines with "text") and files with a text per line.
    """
    from moshi_cli.eval_tasks import Asked
    from moshi_cli.eval_tasks import tts as run
    from moshi_cli.tts_jobs import SpeakingFlags

    speaking = SpeakingFlags(
        voice=voice, temperature=temperature, cfg_coef=cfg_coef, nq=nq, takes=takes, speed=speed,
        compile=compile,
    )  # fmt: skip
    return run(
        inputs, manifest, speaking,
        Asked(model, evaluation, texts, log.console("eval tts"), judging, by),
    )  # fmt: skip


@app.command()
@spread
def codec(
    inputs: Inputs = None,
    *,
    manifest: Manifests = None,
    recursive: Recursive = False,
    channel: Channel = "mix",
    num_codebooks: Annotated[
        str | None, flag("--num-codebooks/-n", "One or several numbers.", metavar="8,16")
    ] = None,
    metrics: Annotated[
        str | None, flag("--metrics", "By default all that work here.", metavar="stoi,mel")
    ] = None,
    shift: Annotated[
        float, flag("--shift", "Seconds to begin later, for stability; 0: without.", min=0)
    ] = 0.01,
    degraded: Annotated[
        Path | None,
        flag("--degraded", "What another codec made of the inputs, by name.", metavar="DIR"),
    ] = None,
    texts: TextOptions,
    judging: JudgeOptions,
    evaluation: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """How far decoded sound is from the original, and how the codec uses its codebooks.

    idempotence: codes that are the same when decoded sound is encoded again; stability: when the
    recording begins a little later (--shift). Both of all codes, of the semantic codebook and of
    each. With a judge and texts of the recordings: the word errors that the codec adds.

    With --degraded, or "degraded" beside "path" in the lines of a manifest, no codec is run: pairs
    of recordings are compared, sample by sample. Their lengths may differ by 0.25 s at most.
    """
    from moshi_cli.eval_tasks import Asked
    from moshi_cli.eval_tasks import codec as run

    return run(
        inputs, manifest, recursive, channel, num_codebooks, metrics, shift, degraded,
        Asked(model, evaluation, texts, log.console("eval codec"), judging),
    )  # fmt: skip


@app.command()
@spread
def qa(
    inputs: Inputs = None,
    *,
    manifest: Manifests = None,
    channel: Channel = "mix",
    answer_now: Annotated[
        bool, flag("--answer-now", "Force a word (EPAD) when the question is over.")
    ] = False,
    temperature: Temperature = None,
    text_temperature: Annotated[
        float | None, flag("--text-temperature", "Of words.", min=0)
    ] = None,
    top_k: Annotated[int | None, flag("--top-k", "Of the voice; 0: all.", min=0)] = None,
    top_k_text: Annotated[int | None, flag("--top-k-text", "Of words; 0: all.", min=0)] = None,
    cfg_coef: Annotated[float | None, flag("--cfg-coef", "As in `moshi chat`.")] = None,
    greedy: Annotated[bool, flag("--greedy", "Always the likeliest token.")] = False,
    lead_silence: Annotated[float, flag("--lead-silence", "Seconds before it.", min=0)] = 0.0,
    tail_silence: Annotated[float, flag("--tail-silence", "Seconds to answer in.", min=0)] = 6.0,
    by: By = None,
    compile: Compile = False,
    texts: TextOptions,
    judging: JudgeOptions,
    evaluation: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """Spoken questions to `moshi chat`: are the answers right, in writing and to a judge's ears?

    Manifests name recordings with "answer" (one, or a list of good ones) and the question's "text".
    """
    from moshi_cli.chat_jobs import TalkingFlags
    from moshi_cli.eval_tasks import Asked
    from moshi_cli.eval_tasks import qa as run

    talking = TalkingFlags(
        temperature=temperature, text_temperature=text_temperature, top_k=top_k,
        top_k_text=top_k_text, cfg_coef=cfg_coef, greedy=greedy, lead_silence=lead_silence,
        tail_silence=tail_silence, compile=compile,
    )  # fmt: skip
    return run(
        inputs, manifest, channel, talking, answer_now,
        Asked(model, evaluation, texts, log.console("eval qa"), judging, by),
    )  # fmt: skip


for command in eval_more.COMMANDS:
    app.command()(command)
