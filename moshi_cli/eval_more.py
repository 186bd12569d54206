"""More subcommands of `moshi eval`; each is a plain function decorated with `spread`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moshi_cli.eval_options import EvalOptions, JudgeOptions, TextOptions
from moshi_cli.options import Inputs, LogOptions, ModelOptions, choice, flag, spread
from moshi_cli.slots import Compile


@spread
def lm(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA", help="Caches of codes, manifests, packs or folders with either.",
            show_default=False,
        ),
    ],
    *,
    task: Annotated[
        list[str] | None,
        flag(
            "--task", "asr, tts, chat or speech, with =LAG for another lag in seconds. Default: "
            "what the model was trained for, at its lags.", metavar="NAME[=LAG]",
        ),
    ] = None,
    window: Annotated[float, flag("--window", "Seconds that are judged at once.", min=0.08)] = 30.0,
    kind: Annotated[
        list[str] | None, flag("--kind", "Only of caches: takes whose kind begins so.")
    ] = None,
    skip: Annotated[list[str] | None, flag("--skip", "Takes of these kinds are left out.")] = None,
    layout: Annotated[
        str,
        choice(
            "--layout", "auto", "mono", "stereo", "turns",
            help="Lines of a recording: one, left and right, or a speaker against the rest.",
        ),
    ] = "auto",
    no_words: Annotated[bool, flag("--no-words", "Recordings without words: sound alone.")] = False,
    options: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:  # fmt: skip
    """Negative log-likelihood and perplexity of text and of each codebook, per task.

    Text is counted apart: words, EPAD (a word begins) and PAD. Perplexities of different delays
    are not comparable, nor are those of different codecs and tokenizers.
    """
    from moshi_cli.likelihood_jobs import lm as run
    from moshi_cli.session import open_model

    console = log.console("eval lm")
    return run(
        data, options, console, lambda: open_model(model, console), model, tasks=task or (),
        window_s=window, kinds=kind or (), skip=skip or (), layout=layout, words=not no_words,
    )  # fmt: skip


@spread
def pairs(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE", show_default=False,
            help='JSON lines {"id", "good", "bad"}; the folder of a public suite, see below.',
        ),
    ],
    *,
    by_length: Annotated[
        bool, typer.Option("--by-length/--by-sum", help="Compare means per token, or sums.")
    ] = True,
    semantic: Annotated[
        float, flag("--semantic", "Weight of the first codebook.", min=0)
    ] = 100.0,
    acoustic: Annotated[float, flag("--acoustic", "Weight of each other one.", min=0)] = 1.0,
    options: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:  # fmt: skip
    """How often the likelier of two recordings (or texts) is the right one: sWUGGY, sBLIMP, …

    A side is a text, the name of a recording beside the suite, {"text": …} or {"path": …}. Of
    recordings the sound alone is judged, without text.

    Public suites as they are: lexical/dev and syntactic/dev of ZeroSpeech 2021 (sWUGGY, sBLIMP), by
    their gold.csv; folders of recordings N_STORY_correct.wav and N_STORY_incorrect.wav (spoken
    StoryCloze); the .csv of the Story Cloze Test, as text.
    """
    from moshi_cli.likelihood_jobs import pairs as run
    from moshi_cli.session import open_model

    console = log.console("eval pairs")
    return run(
        suite, options, console, lambda: open_model(model, console), model, by_length=by_length,
        semantic=semantic, acoustic=acoustic,
    )  # fmt: skip


@spread
def dialogue(
    inputs: Inputs = None,
    *,
    manifest: Annotated[
        str | None, flag("--manifest", "JSON lines that name recordings or parts of them.")
    ] = None,
    recursive: Annotated[bool, flag("--recursive/-r", "Enter sub-folders.")] = False,
    scorer: Annotated[
        list[str] | None,
        flag(
            "--scorer", "NAME[:KEY=VALUE,…]: voice, toxicity or package.module:Class, with "
            "settings of its own.", metavar="SCORER",
        ),
    ] = None,
    quiet_db: Annotated[float, flag("--quiet-db", "What is softer is no speech.")] = -50.0,
    above_floor_db: Annotated[
        float, flag("--above-floor-db", "Speech is so much louder than the noise.", min=0)
    ] = 12.0,
    bridge: Annotated[
        float, flag("--bridge", "Seconds: a shorter silence is part of the speech.", min=0)
    ] = 0.2,
    least: Annotated[
        float, flag("--least", "Seconds: a shorter sound is no speech.", min=0)
    ] = 0.06,
    options: EvalOptions,
    log: LogOptions,
) -> int:  # fmt: skip
    """How two people take turns in stereo recordings: speech, pauses, gaps, overlaps per minute.

    Left is the model's own voice, as `moshi chat --stereo` writes it. Words come from NAME.json
    beside the sound or from the manifest.
    """
    from moshi_cli.conversation_jobs import dialogue as run
    from moshi_cli.tasks.activity import Detector

    console = log.console("eval dialogue")
    detector = Detector(quiet_db, above_floor_db, bridge, least)
    return run(
        inputs, options, console, detector, manifest=manifest, recursive=recursive,
        scorers=scorer or (),
    )  # fmt: skip


@spread
def interrupt(
    inputs: Inputs = None,
    *,
    manifest: Annotated[
        list[str] | None, flag("--manifest", "JSON lines, as for `moshi data`.", metavar="FILE")
    ] = None,
    channel: Annotated[str, flag("--channel", "mix, left, right or a number from 0.")] = "mix",
    within: Annotated[float, flag("--within", "Seconds to stop in.", min=0)] = 1.0,
    temperature: Annotated[
        float | None, flag("--temperature", "By default that of the model.", min=0)
    ] = None,
    text_temperature: Annotated[
        float | None, flag("--text-temperature", "Of words.", min=0)
    ] = None,
    greedy: Annotated[bool, flag("--greedy", "Always the likeliest token.")] = False,
    by: Annotated[
        str | None, choice("--by", "kind", "voice", help="Chief figures of each of them, too.")
    ] = None,
    compile: Compile = False,
    texts: TextOptions,
    options: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """How soon `moshi chat` stops when somebody speaks into its answer (barge-in).

    Each question is asked twice: in peace, and with the next one of the list spoken 0.4 s into the
    answer. Counted are conversations in which the model, undisturbed, goes on for longer than
    --within; it has stopped when it is silent for 0.5 s. Sound: the model left, the partner right.
    """
    from moshi_cli.chat_jobs import TalkingFlags
    from moshi_cli.eval_interrupt import interrupt as run
    from moshi_cli.eval_tasks import Asked

    talking = TalkingFlags(
        temperature=temperature, text_temperature=text_temperature, greedy=greedy, compile=compile
    )
    return run(
        inputs, manifest, channel, talking, within,
        Asked(model, options, texts, log.console("eval interrupt"), by=by),
    )  # fmt: skip


@spread
def suite(
    suite: Annotated[
        Path, typer.Argument(metavar="SUITE.yaml", show_default=False, help="What is measured.")
    ],
    *,
    only: Annotated[
        list[str] | None, flag("--only", "These entries, with commas; * stands for anything.")
    ] = None,
    set: Annotated[
        list[str] | None,
        flag("--set", "An option of an entry, or of a task's.", metavar="ENTRY.OPTION=VALUE"),
    ] = None,
    strict: Annotated[bool, flag("--strict", "Exit code 1 if a goal is missed.")] = False,
    texts: TextOptions,
    judging: JudgeOptions,
    options: EvalOptions,
    model: ModelOptions,
    log: LogOptions,
) -> int:
    """Several evaluations that a YAML file lists, one after the other, in one table and page.

    An entry has a name, a task (asr, tts, …), a manifest or inputs, options of that command, goals
    such as "wer: at most 5 %", and figures to show. Gates name their entry: --fail-above
    meetings/wer=0.08. Entries that fail are counted and named; --resume goes on.
    """
    from moshi_cli.suite_calls import Shared
    from moshi_cli.suite_jobs import suite as run

    shared = Shared(options, model, judging, texts, log)
    return run(suite, shared, only=",".join(only or ()) or None, settings=set or (), strict=strict)


@spread
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS", help="Folders of --output-dir, or records of --json.",
            show_default=False,
        ),
    ],
    *,
    html: Annotated[Path, flag("--html", "The page.", metavar="FILE")],
    title: Annotated[str, flag("--title", "Of the page.")] = "Evaluation",
    embed: Annotated[
        float, flag("--embed", "MB of recordings to put into the page; more are linked.", min=0)
    ] = 16.0,
    most_items: Annotated[
        int, flag("--most-items", "Items to list of each evaluation.", min=0)
    ] = 1000,
    log: LogOptions,
) -> None:  # fmt: skip
    """One HTML page about evaluations that were made: tables, plots, players, word by word."""
    from moshi_cli.conversation_jobs import report as run

    run(results, html, log.console("eval report"), title=title, embed_mb=embed, most=most_items)


COMMANDS: tuple[Callable[..., Any], ...] = (lm, pairs, dialogue, interrupt, suite, report)
