"""One recording of `moshi asr`: how it is heard, and what becomes of its words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from moshi_cli.batch import Feed, Run
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.inputs import Item
from moshi_cli.options import AudioOptions, ModelOptions, flag
from moshi_cli.slots import Compile, Job, build, details, on_terminal, slots_for, summary

if TYPE_CHECKING:
    from moshi_cli.core.engine import Engine
    from moshi_cli.core.weights import Model
    from moshi_cli.tasks.asr import Hearing
    from moshi_cli.tasks.events import Event
    from moshi_cli.tasks.subtitles import Layout

MICROPHONE = Item("microphone", None, "microphone")
LIVE = ("txt", "jsonl")  # formats that can be written while listening
ALL = ("txt", "srt", "vtt", "tsv", "json", "jsonl", "alignments")


@dataclass(frozen=True)
class HearingFlags:
    """How recordings are heard."""

    mic: Annotated[bool, flag("--mic", "Listen to the microphone until Ctrl-C.")] = False
    input_device: Annotated[str | None, flag("--input-device", "Name or number.")] = None
    vad: Annotated[bool, flag("--vad", "Report pauses (models with pause heads).")] = False
    vad_threshold: Annotated[
        float, flag("--vad-threshold", "Probability that counts.", min=0, max=1)
    ] = 0.5
    delay: Annotated[
        float | None, flag("--delay", "Seconds that text trails the voice, where one may choose.")
    ] = None
    temperature: Annotated[float, flag("--temperature", "0 takes the best word.", min=0)] = 0.0
    beam_size: Annotated[
        int | None,
        flag("--beam-size", "Hypotheses of the text; 1: greedy, which tells it a second earlier. "
             "Default: the model's; 1 for the microphone.", min=1),
    ] = None  # fmt: skip
    lm_weight: Annotated[
        float | None, flag("--lm-weight", "Of the model's n-grams in the search; 0: none.", min=0)
    ] = None
    shifts: Annotated[
        int | None,
        flag("--shifts", "Times that the search hears the sound, each a part of a frame later, to "
             "go by the mean: fewer errors, more time. Default: the model's.", min=1),
    ] = None  # fmt: skip
    refresh: Annotated[
        float | None, flag("--refresh", "Begin afresh in a pause after so many s; 0: never.", min=0)
    ] = None
    rtf: Annotated[
        float | None, flag("--rtf", "Read no faster than so many seconds per second.", min=0.01)
    ] = None
    compile: Compile = False


def formats_of(asked: str | None, output: str | None) -> tuple[str, ...]:
    """The formats that are asked for: by name, by the name of the output, else text."""
    if asked == "all":
        return ALL
    if asked is not None:
        names = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
        for name in names:
            if name not in ALL:
                raise UsageError(f"unknown format {name!r}", f"choose {', '.join(ALL)} or all")
        return names
    suffix = (output or "").rpartition(".")[2].lower()
    return (suffix,) if suffix in ALL else ("txt",)


def suffixes_of(formats: tuple[str, ...]) -> list[str]:
    """Names of output files; the side file of training data is called like its recording."""
    both = {"json", "alignments"} <= set(formats)
    return [
        f".{'alignments.json' if both else 'json'}" if name == "alignments" else f".{name}"
        for name in formats
    ]


@dataclass(frozen=True)
class Style:
    """What is written, and how."""

    formats: tuple[str, ...]
    layout: Layout
    word_times: bool = True


class Paced:
    """A source that gives sound no faster than it was spoken: `rate` seconds per second."""

    def __init__(self, source: Any, rate: float) -> None:
        self.source, self.rate = source, rate
        self.frames_left, self.began = iter(source), time.monotonic()

    @property
    def samples(self) -> int:
        return int(self.source.samples)

    def __iter__(self) -> Iterator[Any]:
        for frame in self.frames_left:
            due = self.began + self.source.samples / 24_000 * self.rate
            time.sleep(max(0.0, due - time.monotonic()))
            yield frame


class Desk:
    """What all recordings of one command line share."""

    def __init__(
        self, run: Run, model: Model, style: Style, hearing: HearingFlags, *,
        options: ModelOptions, reading: AudioOptions,
    ) -> None:  # fmt: skip
        from moshi_cli.tasks import asr

        self.run, self.model, self.style, self.hearing = run, model, style, hearing
        self.reading, self.seed = reading, options.seed
        self.task = asr.hearing_task(model.config, hearing.delay)
        self.options = asr.HearingOptions(
            refresh_s=asr.refresh_s(model.config) if hearing.refresh is None else hearing.refresh,
            pause_threshold=threshold_of(model, hearing),
        )
        beam = 1 if hearing.mic and hearing.beam_size is None else hearing.beam_size
        self.sampling = asr.hearing_sampling(
            model.config, hearing.temperature, beam, hearing.lm_weight, hearing.shifts
        )
        if options.ngrams is not None and not (self.sampling.beam > 1 and self.sampling.lm_weight):
            raise UsageError(
                "nothing asks the n-grams", "--beam-size 6 --lm-weight 0.3, for example"
            )
        self.details = {
            "sample_rate": 24_000, "frame_ms": 80, "delay_s": self.task.lag_s,
            "temperature": hearing.temperature, "beam_size": self.sampling.beam,
            "lm_weight": self.sampling.lm_weight, "shifts": self.sampling.shifts,
            **details(model, options),
        }  # fmt: skip
        self.settings = {
            **self.details, "style": style, "reading": reading, "hearing": self.options,
        }  # fmt: skip

    def engine(self) -> Engine:
        """Slots for them."""
        from moshi_cli.core.engine import Engine

        slots = slots_for(self.run, 2 if self.reading.channel == "separate" else 1)

        def make(compile: bool) -> Engine:
            return Engine(self.model, self.task, slots, sampling=self.sampling, compile=compile)

        return build(make, self.hearing.compile, self.run.console)

    def source(self, item: Item) -> Feed:
        """The sound of an item: its file, or the microphone."""
        if item is MICROPHONE:
            from moshi_cli.devices import Microphone

            return Feed(self.run, item, Microphone(self.hearing.input_device))
        return self.run.feed(item, **self.reading.reader())

    def job(self, item: Item) -> Listening:
        """One recording."""
        return Listening(self, item)


class Listening(Job):
    """Sound in, words out: live on stdout, or into files at the end."""

    def __init__(self, desk: Desk, item: Item) -> None:
        super().__init__(desk.run, item)
        self.desk, self.style, self.seed = desk, desk.style, item.seed(desk.seed)
        direct = self.run.destination.stdout and self.run.single
        self.live = self.style.formats[0] if direct and self.style.formats[0] in LIVE else None
        self.words_shown = self.live == "txt" and on_terminal()
        self.events: list[Event] = []
        self.details = {"input": item.id, **desk.details, "item_seed": self.seed}

    def sessions(self) -> list[Hearing]:
        from moshi_cli.tasks.asr import Hearing
        from moshi_cli.tasks.events import Start
        from moshi_cli.tasks.sound import Sound, Split

        feed, rtf = self.desk.source(self.item), self.desk.hearing.rtf
        source, count = Paced(feed, rtf) if rtf else feed, feed.channels
        parts: list[Any] = [source] if count == 1 else list(Split(source, count).channels)
        if self.live == "jsonl":
            self._show(Start(self.details))
        return [
            Hearing(
                self.desk.model, self.desk.task, Sound(part), seed=self.seed, channel=channel,
                options=self.desk.options,
            )
            for channel, part in enumerate(parts)
        ]  # fmt: skip

    def push(self, session: Hearing, event: Event) -> None:
        from moshi_cli.tasks.events import Segment, Warning

        if isinstance(event, Warning):
            self.warn(event.message)
        if self.live is not None:
            self._show(event)
        elif not isinstance(event, Segment):
            self.events.append(event)

    def _show(self, event: Event) -> None:
        """One event on stdout, at once."""
        from moshi_cli.tasks.events import Segment, Word, as_json

        console = self.run.console
        if self.live == "jsonl":
            console.record(as_json(event))
        elif isinstance(event, Segment):
            console.text("\n" if self.words_shown else f"{event.text}\n")
        elif self.words_shown and isinstance(event, Word):
            console.text(f"{event.text} ")

    def complete(self) -> None:
        from moshi_cli.core.files import write_text
        from moshi_cli.tasks.asr import collect
        from moshi_cli.tasks.events import End
        from moshi_cli.tasks.subtitles import render

        wall_s = time.monotonic() - self.began
        summary(self, "first word", self.desk.seed)
        if self.live is not None:
            if self.live == "jsonl":
                self._show(End(self.audio_s, wall_s, self.first_s))
            return
        end = End(self.audio_s, wall_s, self.first_s)
        transcript = collect([*self.events, end], self.details)
        targets = self.run.destination.paths(self.item)
        for format, target in zip(self.style.formats, targets, strict=True):
            text = render(transcript, format, self.style.layout, self.style.word_times)
            if target == "-":
                self.printed += text
            else:
                write_text(target, text)
                self.outputs.append(target)


def threshold_of(model: Model, hearing: HearingFlags) -> float | None:
    """The pause threshold, if pauses are to be reported; ModelError if the model has no heads."""
    if not hearing.vad:
        return None
    assert model.lm is not None
    if not model.lm.config.extra_heads:
        raise ModelError(
            "this model has no pause heads, which --vad needs",
            "use --model hf://kyutai/stt-1b-en_fr-candle/model.safetensors, which has them",
        )
    return hearing.vad_threshold
