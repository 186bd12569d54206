"""What `moshi eval asr|tts|codec|qa` do: items, a model at work on them, a judge, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli.console import Console
from moshi_cli.core.errors import UsageError
from moshi_cli.eval_items import recordings
from moshi_cli.eval_items import texts as spoken_texts
from moshi_cli.eval_jobs import Evaluation, Row
from moshi_cli.eval_options import EvalOptions, JudgeOptions, TextOptions
from moshi_cli.inputs import Item
from moshi_cli.options import AudioOptions, ModelOptions
from moshi_cli.slots import details, work

if TYPE_CHECKING:
    from moshi_cli.asr_jobs import HearingFlags
    from moshi_cli.chat_jobs import TalkingFlags
    from moshi_cli.core.weights import Model
    from moshi_cli.tasks.evaluation import Figure
    from moshi_cli.tasks.judges import Judge
    from moshi_cli.tts_jobs import SpeakingFlags

Names = Sequence[str] | None
WAV = {"format": "wav", "subtype": "pcm16"}
WORDS = (
    "wer", "wer_mean", "cer", "cer_mean", "exact", "substitutions", "deletions", "insertions",
    "hits", "reference_words", "empty_transcripts", "words_in_silence",
)  # fmt: skip
ASR = (*WORDS, "rtf", "audio", "timestamp_f1", "timestamp_miou", "emission_delay", "first_word")
TTS = (*WORDS, "length_ratio", "duration_ratio", "unspoken_words", "first_audio", "rtf", "audio")
QA = (
    "written_exact", "written_holds", "written_right", "heard_exact", "heard_holds", "heard_right",
    "both", "silent_replies", "reply_delay", "heard_wer", "rtf", "audio",
)  # fmt: skip


def codec_names(counts: Sequence[int]) -> list[str]:
    """Figures of `moshi eval codec`."""
    from moshi_cli.tasks.fidelity import MEASURES

    each = [*MEASURES, "idempotence", "idempotence_semantic", "idempotence_q[0-9]*", "stability"]
    each += ["bitrate", "entropy_rate"]
    ends = [f"@{n}" for n in counts] if len(counts) > 1 else [""]
    return [
        *(f"{name}{end}" for end in ends for name in [*each, "wer", "cer", "wer_added"]),
        "original_wer", "original_cer", "entropy_q[0-9]*", "usage_q[0-9]*",
        "stability_semantic", "stability_q[0-9]*",
    ]  # fmt: skip


def with_groups(names: Sequence[str]) -> list[str]:
    """Figures of a task, those of groups of items included."""
    from moshi_cli.tasks.scoring import CHIEF

    return [*names, *(f"{name}/*" for name in CHIEF if name in names)]


@dataclass(frozen=True)
class Asked:
    """What all tasks are asked for in the same way."""

    model: ModelOptions
    options: EvalOptions
    texts: TextOptions
    console: Console
    judging: JudgeOptions = field(default_factory=JudgeOptions)
    by: str | None = None  # key of rows: figures of each of its values, too

    def run(self, task: str, items: Sequence[Item], known: Sequence[str]) -> Evaluation:
        """The run of a task that has the figures `known`."""
        names = with_groups(known)
        return Evaluation(task, items, self.options, self.console, known=names)

    def judge(self) -> Judge | None:
        """Ready to listen. UsageError, ModelError."""
        return self.judging.open(self.model, self.options.batch_size, self.console)

    def told(self, model: Model, **more: Any) -> dict[str, Any]:
        """The context of a result."""
        return {**details(model, self.model), "normaliser": self.texts.open().name, **more}


def asr(
    inputs: Names, manifests: Names, hyp: str | None, recursive: bool, channel: str,
    hearing: HearingFlags, collar_s: float, asked: Asked,
) -> int:  # fmt: skip
    """Recordings to transcripts, or transcripts that there are, against references."""
    from moshi_cli.tasks import scoring

    normaliser = asked.texts.open()
    run = asked.run("asr", recordings(inputs, manifests, recursive), ASR)

    def figures() -> dict[str, Figure]:
        def score(rows: Sequence[Row]) -> dict[str, Figure]:
            return scoring.asr(rows, normaliser, collar_s)

        return scoring.grouped(score, run.good(), asked.by)

    if hyp is not None:
        return score(run, hyp, figures, {"normaliser": normaliser.name})
    from moshi_cli.asr_jobs import Style
    from moshi_cli.eval_trials import HearingTrials
    from moshi_cli.session import open_model
    from moshi_cli.tasks.subtitles import Layout

    one_channel(channel)
    opened = open_model(asked.model, asked.console)
    desk = HearingTrials(
        run, opened, Style(("json",), Layout()), hearing, options=asked.model,
        reading=AudioOptions(channel=channel),
    )  # fmt: skip
    run(work(desk.engine(), desk.job), desk.settings, opened.revision or opened.name)
    settings = {"delay_s": desk.task.lag_s, "temperature": hearing.temperature, "channel": channel}
    settings |= {"beam_size": desk.sampling.beam, "lm_weight": desk.sampling.lm_weight}
    settings |= {"shifts": desk.sampling.shifts}
    settings |= {"refresh_s": desk.options.refresh_s, "collar_s": collar_s}
    return run.finish(figures, asked.told(opened, settings=settings))


def score(
    run: Evaluation, hyp: str, figures: Callable[[], dict[str, Figure]], context: Mapping[str, Any]
) -> int:
    """Transcripts that were made elsewhere."""
    from moshi_cli.eval_trials import hypotheses, scored

    run.begin({})
    for row in scored(run.items, hypotheses(hyp), hyp):
        if row.get("error"):
            run.console.error(row["error"])
        run.keep(row)
    return run.finish(figures, {**context, "transcripts": hyp})


def tts(inputs: Names, manifests: Names, speaking: SpeakingFlags, asked: Asked) -> int:
    """Texts to speech, and what a judge hears."""
    from moshi_cli.eval_trials import SpeakingTrials
    from moshi_cli.session import open_model
    from moshi_cli.tasks import scoring

    normaliser = asked.texts.open()
    run = asked.run("tts", spoken_texts(inputs, manifests), TTS)
    judge = asked.judge()
    opened = open_model(asked.model, asked.console)
    studio = SpeakingTrials(run, opened, speaking, WAV, options=asked.model)
    run(work(studio.engine(), studio.job), studio.settings, opened.revision or opened.name)
    run.listen(judge, lambda row: {"speech": row["audio"]})

    def figures() -> dict[str, Figure]:
        for row in run.good():
            row["hypothesis"] = row.get("heard", {}).get("speech")
        return scoring.grouped(lambda r: scoring.tts(r, normaliser), run.good(), asked.by)

    settings = asdict(studio.manner) | {"voice": speaking.voice, "takes": studio.takes}
    context = asked.told(opened, settings=settings)
    return run.finish(figures, context | judged(judge))


def qa(
    inputs: Names, manifests: Names, channel: str, talking: TalkingFlags, answer_now: bool,
    asked: Asked,
) -> int:  # fmt: skip
    """Spoken questions to replies, and whether they are right."""
    from moshi_cli.eval_trials import TalkingTrials
    from moshi_cli.session import open_model
    from moshi_cli.tasks import scoring

    one_channel(channel)
    normaliser = asked.texts.open()
    run = asked.run("qa", recordings(inputs, manifests), QA)
    judge = asked.judge()
    opened = open_model(asked.model, asked.console)
    table = TalkingTrials(
        run, opened, talking, WAV, options=asked.model, reading=AudioOptions(channel=channel)
    )
    if answer_now:
        table.answer_now()
    table.settings["answer_now"] = answer_now
    run(work(table.engine(), table.job), table.settings, opened.revision or opened.name)
    run.listen(judge, lambda row: {"reply": row["audio"]})

    def figures() -> dict[str, Figure]:
        rows = run.good()
        for row in rows:
            row["heard_reply"] = row.get("heard", {}).get("reply")
        every = scoring.answers_of(rows)
        return scoring.grouped(lambda r: scoring.qa(r, normaliser, every), rows, asked.by)

    settings = asdict(table.sampling) | {"answer_now": answer_now, "channel": channel}
    settings |= {"lead_silence": talking.lead_silence, "tail_silence": talking.tail_silence}
    context = asked.told(opened, settings=settings)
    return run.finish(figures, context | judged(judge))


def codec(
    inputs: Names, manifests: Names, recursive: bool, channel: str, codebooks: str | None,
    metrics: str | None, shift_s: float, degraded: Path | None, asked: Asked,
) -> int:  # fmt: skip
    """Recordings through the codec and back; or beside what another one made of them."""
    from moshi_cli.eval_codec import Passages
    from moshi_cli.eval_compare import DEGRADED, paired
    from moshi_cli.session import open_codec
    from moshi_cli.tasks import fidelity, scoring

    one_channel(channel)
    normaliser = asked.texts.open()
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    measures = fidelity.chosen(names)
    items = recordings(inputs, manifests, recursive)
    if names is None and (absent := fidelity.missing()):
        asked.console.info(f"not measured, since not installed: {', '.join(absent)}")
    if degraded is not None:
        items = paired(items, inputs or (), degraded, recursive, asked.console)
    if degraded is not None or any(DEGRADED in item.record for item in items):
        if codebooks is not None:
            raise UsageError("--num-codebooks is of our codec: pairs are compared without one")
        return compare(items, names, channel, asked)
    wanted = numbers(codebooks) if codebooks is not None else None
    run = asked.run("codec", items, codec_names(wanted or [8]))
    judge = asked.judge()
    opened = open_codec(asked.model, asked.console)
    has = opened.mimi.config.quantizer.codebooks
    counts = wanted or [min(8, has)]
    if max(counts) > has:
        raise UsageError(f"{max(counts)} codebooks are asked for, the codec has {has}")
    passages = Passages(run, opened.mimi, counts, measures, channel, shift_s)
    run(passages, passages.settings, opened.revision or opened.name)
    run.listen(judge, passages.sounds)

    def figures() -> dict[str, Figure]:
        semantic = opened.mimi.config.quantizer.semantic
        return scoring.codec(run.good(), counts, normaliser, semantic) | passages.figures()

    device = next(opened.mimi.parameters()).device
    context: dict[str, Any] = {
        "model": opened.name, "revision": opened.revision or None, "dtype": "float32",
        "device": str(device), "codec": passages.info.codec, "settings": passages.settings,
        "packages": fidelity.versions(list(measures)), "normaliser": normaliser.name,
    }  # fmt: skip
    return run.finish(figures, context | judged(judge))


def compare(items: Sequence[Item], names: Names, channel: str, asked: Asked) -> int:
    """Recordings beside degraded ones; no codec is run."""
    from moshi_cli import __version__
    from moshi_cli.eval_compare import DEGRADED, Comparison, stamped
    from moshi_cli.tasks import fidelity, scoring

    normaliser, measures = asked.texts.open(), fidelity.chosen(names)
    run = asked.run("codec", stamped(items), codec_names([1]))
    judge = asked.judge()
    comparison = Comparison(run, measures, channel)
    run.each(comparison, comparison.settings)
    run.listen(judge, comparison.sounds)
    context = {
        "version": __version__, "model": "pairs", "settings": comparison.settings,
        "packages": fidelity.versions(list(measures)), "normaliser": normaliser.name,
    }  # fmt: skip
    return run.finish(
        lambda: scoring.compared(run.good(), DEGRADED, normaliser), context | judged(judge)
    )


def judged(judge: Any) -> dict[str, Any]:
    """Who judged, for the context."""
    return {} if judge is None else {"judge": dict(judge.facts)}


def one_channel(channel: str) -> None:
    """UsageError if several channels are asked for."""
    if channel == "separate":
        raise UsageError("an evaluation hears one channel", "choose --channel mix, left or right")


def numbers(text: str) -> list[int]:
    """ "4,8" as numbers, sorted. UsageError if they are none."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UsageError(f"--num-codebooks {text} makes no sense", "write numbers, as in 4,8")
    return found
