"""One text of `moshi tts`: where it comes from, whose voice says it, where the sound goes."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moshi_cli.batch import Run
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.inputs import STDIN, Item, expand
from moshi_cli.options import BatchOptions, ModelOptions, choice, flag
from moshi_cli.slots import Compile, Job, build, details, slots_for, summary

if TYPE_CHECKING:
    from torch import Tensor

    from moshi_cli.core.engine import Engine
    from moshi_cli.core.weights import Model
    from moshi_cli.devices import Loudspeaker
    from moshi_cli.tasks.events import End, Event, Word
    from moshi_cli.tasks.manner import Manner
    from moshi_cli.tasks.takes import Choice
    from moshi_cli.tasks.tts import Speaking

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TEXT]...", help="The text, or - for stdin.", show_default=False),
]

PROMPT_S = 10.0  # of a recording whose voice is continued
PIECE = 1 << 12  # bytes of standard input at a time


@dataclass(frozen=True)
class SpeakingFlags:
    """How texts are spoken."""

    voice: Annotated[
        list[str] | None, flag("--voice", "Voice file or name; one per speaker.", metavar="VOICE")
    ] = None
    temperature: Annotated[
        float | None, flag("--temperature", "By default that of the model.", min=0)
    ] = None
    cfg_coef: Annotated[float | None, flag("--cfg-coef", "Guidance, where it was learnt.")] = None
    nq: Annotated[int | None, flag("--nq", "Codebooks: fewer are quicker and coarser.", min=1)] = (
        None
    )
    takes: Annotated[
        int | None,
        flag("--takes", "Times that each sentence is spoken, to keep what the model itself hears "
             "best; by default as the model says, and 1 for --play and stdin.", min=1),
    ] = None  # fmt: skip
    speed: Annotated[float, flag("--speed", "Above 1: shorter waits.", min=0.25, max=4)] = 1.0
    sentence_silence: Annotated[
        float, flag("--sentence-silence", "Seconds after a sentence.", min=0)
    ] = 0.0
    stream_input: Annotated[
        str, choice("--stream-input", "auto", "words", "all", help="Wait for all of stdin?")
    ] = "auto"
    strict: Annotated[bool, flag("--strict", "Words left unspoken are an error (3).")] = False
    play: Annotated[bool, flag("--play", "On the loudspeakers.")] = False
    output_device: Annotated[str | None, flag("--output-device", "Name or number.")] = None
    timestamps: Annotated[
        str | None,
        choice("--timestamps", "json", "srt", "vtt", help="Times of words, beside the sound."),
    ] = None
    compile: Compile = False


@dataclass(frozen=True)
class SoundFlags:
    """How sound is written."""

    format: Annotated[
        str | None,
        choice("--format/-f", "wav", "flac", "ogg", "raw", help="By default as -o says, else wav."),
    ] = None
    subtype: Annotated[
        str, choice("--subtype", "pcm16", "pcm24", "float", help="Of the samples.")
    ] = "pcm16"

    def kind(self, batch: BatchOptions) -> str:
        """The format of the output."""
        from moshi_cli.core.audio_writer import format_of

        folder = batch.output is None or batch.output[-1:] in "/\\" or Path(batch.output).is_dir()
        return format_of("-" if folder else batch.output, self.format)


def items_of(
    words: Sequence[str] | None,
    text: str | None,
    files: Sequence[Path] | None,
    manifest: str | None,
) -> list[Item]:
    """What is to be said: the arguments, --text, --input-file, `-` or a manifest; one of them."""
    given = [bool(words), text is not None, bool(files), manifest is not None]
    if sum(given) > 1:
        raise UsageError("text comes from one place: arguments, --text, --input-file or --manifest")
    if not any(given):
        raise UsageError("no text", "give it as an argument, or - for standard input")
    if manifest is not None:
        return expand(None, manifest=manifest)
    if files:
        return expand([str(file) for file in files])
    if words == [STDIN] or text == STDIN:
        return [Item(STDIN, STDIN, "stdin")]
    said = " ".join(words or []) if text is None else text
    return [Item("text", None, "speech", {"text": said})]


def arriving_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for piece in pieces:
            if part := decoder.decode(piece):
                yield part
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InputError("the text is not UTF-8") from None


class Studio:
    """What all texts of one command line share."""

    def __init__(
        self, run: Run, model: Model, flags: SpeakingFlags, sound: dict[str, Any], *,
        options: ModelOptions,
    ) -> None:  # fmt: skip
        from moshi_cli.tasks.manner import Manner

        self.run, self.model, self.flags, self.sound = run, model, flags, sound
        self.seed = options.seed
        self.manner: Manner = Manner(
            temperature=flags.temperature, cfg_coef=flags.cfg_coef, codebooks=flags.nq,
            speed=flags.speed, sentence_silence_s=flags.sentence_silence,
        )  # fmt: skip
        at_once = flags.play or any(item.source == STDIN for item in run.items)
        usual = 1 if at_once else model.config.sampling_of("tts").takes
        self.takes = usual if flags.takes is None else flags.takes
        self.details = details(model, options)
        self.settings = {**self.details, **sound, "flags": flags, "takes": self.takes}
        self.voices: dict[str, Tensor] = {}
        self.speaker: Loudspeaker | None = None
        if flags.play:
            from moshi_cli.devices import Loudspeaker

            self.speaker = Loudspeaker(flags.output_device)

    def engine(self) -> Engine:
        """Slots for them."""
        from moshi_cli.tasks.tts import speaking_engine
        from moshi_cli.tasks.voices import takes_embeddings

        config, slots = self.model.config, slots_for(self.run)
        prompts = config.kind == "tts" and not takes_embeddings(config)
        frames = int(PROMPT_S * 12.5) + 1 if prompts else 0

        def make(compile: bool) -> Engine:
            return speaking_engine(
                self.model, slots * self.takes, self.manner,
                prompt_frames=frames, decode=self.takes == 1, compile=compile,
            )  # fmt: skip

        return build(make, self.flags.compile, self.run.console)

    def voice(self, name: str) -> Tensor:
        """A voice, read once: an embedding [T, D], or the codes of a recording [K, T]."""
        from moshi_cli.core import audio
        from moshi_cli.tasks.manner import voice_prompt
        from moshi_cli.tasks.voices import find_voice, read_embedding, takes_embeddings

        if name not in self.voices:
            path = find_voice(name, self.model.config)
            if takes_embeddings(self.model.config):
                self.voices[name] = read_embedding(path)
            else:
                sound = audio.read(path, duration_s=PROMPT_S)[0]
                self.voices[name] = voice_prompt(self.model, sound)
        return self.voices[name]

    def job(self, item: Item) -> Speech:
        """One text."""
        return Speech(self, item)


class Speech(Job):
    """Words in, sound out, as soon as there is some."""

    def __init__(self, studio: Studio, item: Item) -> None:
        super().__init__(studio.run, item)
        self.studio = studio
        listed = self.run.options.manifest is not None or not self.run.single
        self.seed = item.seed(studio.seed) if listed else studio.seed
        self.target: str | None = None
        if not studio.flags.play or self.run.options.output or not self.run.destination.stdout:
            self.target = self.run.destination.path(item, f".{studio.sound['format']}")
        self.out: Any = None
        self.words: list[Word] = []
        self.unspoken = ""
        self.choice: Choice | None = None  # of several takes

    def sessions(self) -> Sequence[Speaking]:
        from moshi_cli.tasks.manner import speaking_conditions
        from moshi_cli.tasks.takes import Choice
        from moshi_cli.tasks.tts import Speaking
        from moshi_cli.tasks.voices import takes_embeddings

        studio, config = self.studio, self.studio.model.config
        names = self.item.record.get("voices") or self.item.record.get("voice")
        names = [names] if isinstance(names, str) else names or studio.flags.voice or []
        voices = [studio.voice(str(name)) for name in names]
        embeddings = voices if takes_embeddings(config) else []
        if len(voices) > 1 and not embeddings:
            raise UsageError("this model takes one voice")
        if takes_embeddings(config) and not voices:
            self.warn("without --voice this model makes one up")
        source = self._source(dialogue=len(embeddings) > 1)
        how: dict[str, Any] = {
            "seed": self.seed, "manner": studio.manner, "speakers": len(embeddings) > 1,
            "conditions": speaking_conditions(config, studio.manner, embeddings),
            "prompt": voices[0] if voices and not embeddings else None,
        }  # fmt: skip
        if studio.takes == 1:
            return [Speaking(studio.model, source, **how)]
        items = chain.from_iterable(source)
        self.choice = Choice(studio.model, items, studio.takes, **how)
        return self.choice.sessions

    def _source(self, dialogue: bool) -> Any:
        """Groups of words and rests, as they come."""
        from moshi_cli.tasks.tts import arriving, reader_for

        studio, record = self.studio, self.item.record
        assert studio.model.text is not None
        reader = reader_for(studio.model.text, studio.manner, dialogue=dialogue)
        turns = record.get("turns")
        if isinstance(turns, list):
            return self._turns(reader, [str(turn) for turn in turns], dialogue)
        if self.item.source is None:
            return arriving([str(record.get("text", ""))], reader)
        if self.item.source != STDIN:
            return arriving([self._file(self.item.source)], reader)
        read = getattr(sys.stdin.buffer, "read1", sys.stdin.buffer.read)
        pieces = self.run.guard(iter(lambda: read(PIECE), b""), True, self.item)
        chunks: Iterable[str] = arriving_text(pieces)
        if studio.flags.stream_input == "all":
            chunks = iter(["".join(chunks)])
        return arriving(chunks, reader)

    def _turns(self, reader: Any, turns: list[str], dialogue: bool) -> Iterator[list[Any]]:
        for i, turn in enumerate(turns):
            reader.speaker = i % 2 if dialogue else 0
            yield [*reader.push(turn), *reader.flush()]

    def _file(self, source: str) -> str:
        try:
            return "".join(arriving_text([Path(source).read_bytes()]))
        except OSError as error:
            raise InputError(f"{source}: cannot read ({error.strerror})") from None
        except InputError:
            raise InputError(f"{source}: is not a text in UTF-8") from None

    def ended(self, session: Any, event: End) -> None:
        if self.choice is None:
            return super().ended(session, event)
        for kept in self.choice.end(session):
            self.first_s = self.first_s or time.monotonic() - self.began
            self.push(session, kept)
        self.audio_s = self.choice.samples / 24_000

    def push(self, session: Speaking, event: Event) -> None:
        from moshi_cli.tasks import events

        if isinstance(event, events.Speech):
            self._write(event.pcm)
        elif isinstance(event, events.Word):
            self.words.append(event)
        elif isinstance(event, events.Warning):
            self.warn(event.message)
            self.unspoken = event.message if event.code == "unspoken" else self.unspoken

    def _write(self, pcm: Tensor) -> None:
        from moshi_cli.core.audio import Writer

        if self.target is not None:
            if self.out is None:
                self.out = Writer(self.target, **self.studio.sound)
                self.outputs.append(self.out.name)
            self.out.write(pcm)
        if self.studio.speaker is not None:
            self.studio.speaker.write(pcm)
        self.run.advance(pcm.shape[-1] / 24_000)

    def complete(self) -> None:
        if self.out is not None:
            self.out.close()
        if self.studio.flags.timestamps:
            self._timestamps(self.studio.flags.timestamps)
        summary(self, "first sound", self.studio.seed)
        if self.unspoken and self.studio.flags.strict:
            raise InputError(self.unspoken, exit_code=3)

    def _timestamps(self, format: str) -> None:
        from moshi_cli.core.files import write_text
        from moshi_cli.tasks.subtitles import Transcript, render

        told = {**self.studio.details, "item_seed": self.seed}
        target = str(Path(str(self.target)).with_suffix(f".{format}"))
        write_text(target, render(Transcript(tuple(self.words), self.audio_s, told), format))
        self.outputs.append(target)

    def abort(self) -> None:
        if self.out is not None:
            self.out.abort()
