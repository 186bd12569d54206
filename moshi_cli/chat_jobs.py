"""One conversation of `moshi chat`: who is heard, and where the reply and its words go."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from moshi_cli.batch import Feed, Run
from moshi_cli.core.errors import ModelError, MoshiError, UsageError
from moshi_cli.inputs import STDIN, Item, expand
from moshi_cli.options import AudioOptions, BatchOptions, ModelOptions, choice, flag
from moshi_cli.slots import Compile, Job, build, details, slots_for, summary

if TYPE_CHECKING:
    from torch import Tensor

    from moshi_cli.core.config import ModelConfig, Sampling
    from moshi_cli.core.engine import Engine
    from moshi_cli.core.weights import Model
    from moshi_cli.devices import Loudspeaker, Microphone
    from moshi_cli.tasks.chat import Talking
    from moshi_cli.tasks.events import Event
    from moshi_cli.tasks.sound import Heard

MICROPHONE = Item("microphone", None, "microphone")
FRAME_S = 0.08
TRIAL_FRAMES = 10  # of nobody, to see how fast this machine is
SLOWEST = 0.8  # seconds of conversation per second that are still let through


@dataclass(frozen=True)
class TalkingFlags:
    """How the model talks."""

    mic: Annotated[bool, flag("--mic", "Talk now; the same as no input at all.")] = False
    text_output: Annotated[
        str | None, flag("--text-output", "JSON of what it says.", metavar="PATH|-")
    ] = None
    stereo: Annotated[
        Path | None, flag("--stereo", "Both sides: the model left, the user right.")
    ] = None
    temperature: Annotated[
        float | None, flag("--temperature", "Of the voice; by default that of the model.", min=0)
    ] = None
    text_temperature: Annotated[float | None, flag("--text-temperature", "Of words.", min=0)] = None
    top_k: Annotated[int | None, flag("--top-k", "Of the voice; 0: all.", min=0)] = None
    top_k_text: Annotated[int | None, flag("--top-k-text", "Of words; 0: all.", min=0)] = None
    cfg_coef: Annotated[float | None, flag("--cfg-coef", "Guidance, where it was learnt.")] = None
    greedy: Annotated[bool, flag("--greedy", "Always the likeliest token.")] = False
    lead_silence: Annotated[float, flag("--lead-silence", "Seconds before the sound.", min=0)] = 0.0
    tail_silence: Annotated[
        float, flag("--tail-silence", "Seconds after it, to answer in.", min=0)
    ] = 6.0
    text_prompt: Annotated[str | None, flag("--text-prompt", "A role (not all models).")] = None
    voice_prompt: Annotated[str | None, flag("--voice-prompt", "A voice (not all models).")] = None
    jsonl: Annotated[bool, flag("--jsonl", "Events on stdout, as they happen.")] = False
    input_device: Annotated[str | None, flag("--input-device", "Name or number.")] = None
    output_device: Annotated[str | None, flag("--output-device", "Name or number.")] = None
    list_devices: Annotated[bool, flag("--list-devices", "And exit.")] = False
    on_lag: Annotated[
        str, choice("--on-lag", "warn", "drop", help="When this machine is too slow for talking.")
    ] = "warn"
    force: Annotated[bool, flag("--force", "Talk even if it is much too slow.")] = False
    compile: Compile = False


def items_of(
    inputs: Sequence[str] | None, named: Sequence[str] | None, mic: bool, batch: BatchOptions
) -> list[Item] | None:
    """Who is heard: arguments, -i and manifests, else the microphone."""
    given = [*(inputs or []), *(named or [])]
    if mic and (given or batch.manifest is not None or batch.stdin_paths):
        raise UsageError("--mic takes no other input")
    if not given and batch.manifest is None:
        return None if batch.stdin_paths else [MICROPHONE]
    return expand(given, recursive=batch.recursive, include=batch.include, manifest=batch.manifest)


def talking_sampling(config: ModelConfig, flags: TalkingFlags) -> Sampling:
    """How tokens are drawn; ModelError for what this model was not trained for."""
    for name in ("text_prompt", "voice_prompt"):
        if getattr(flags, name) is not None:
            raise ModelError(f"this model cannot be told a --{name.replace('_', '-')}")
    usual, guidance, own = config.sampling_of("chat"), flags.cfg_coef, "chat" in config.samplings
    if guidance is None and not own:
        guidance = 1.0  # none unless asked for
    if guidance not in (None, 1.0) and config.kind != "hibiki" and not (own and usual.guided):
        raise ModelError("this model was not trained for --cfg-coef")
    asked = {
        "temp": flags.temperature, "text_temp": flags.text_temperature, "top_k": flags.top_k,
        "text_top_k": flags.top_k_text, "guidance": guidance,
    }  # fmt: skip
    if flags.greedy:
        asked |= {"temp": 0.0, "text_temp": 0.0}
    changed: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(usual, **changed)


class Table:
    """What all conversations of one command line share."""

    def __init__(
        self, run: Run, model: Model, flags: TalkingFlags, sound: dict[str, Any], *,
        options: ModelOptions, reading: AudioOptions,
    ) -> None:  # fmt: skip
        from moshi_cli.tasks.chat import CHAT

        self.run, self.model, self.flags, self.sound = run, model, flags, sound
        self.reading, self.seed = reading, options.seed
        self.sampling = talking_sampling(model.config, flags)
        self.task = model.fit(CHAT)
        self.prompt_frames = 0  # room for what conversations are made to say
        self.details = details(model, options)
        self.settings = {
            **self.details, **sound, "sampling": self.sampling, "reading": reading,
            "silence": (flags.lead_silence, flags.tail_silence),
        }  # fmt: skip

    def engine(self) -> Engine:
        """Slots for them."""
        from moshi_cli.core.engine import Engine

        slots = slots_for(self.run)

        def make(compile: bool) -> Engine:
            return Engine(
                self.model, self.task, slots, sampling=self.sampling, compile=compile,
                prompt_frames=self.prompt_frames,
            )  # fmt: skip

        engine = build(make, self.flags.compile, self.run.console)
        if self.run.items and self.run.items[0] is MICROPHONE:
            self._try(engine)
        return engine

    def _try(self, engine: Engine) -> None:
        """Refuse to start a conversation that could not keep up."""
        import torch

        nobody = torch.zeros(engine.slots, dtype=torch.bool)
        engine.step(None, nobody)  # what is made on first use
        began = time.monotonic()
        for _ in range(TRIAL_FRAMES):
            engine.step(None, nobody)
        took_s = (time.monotonic() - began) / TRIAL_FRAMES
        said = f"{took_s * 1000:.0f} ms per 80 ms frame"
        if took_s * SLOWEST > FRAME_S and not self.flags.force:
            raise MoshiError(f"this machine is too slow to talk ({said})", "--force tries")
        if took_s > FRAME_S:
            self.run.console.warn(f"this machine is slower than talking ({said})")

    def source(self, item: Item) -> Feed:
        """The sound of an item."""
        return self.run.feed(item, **self.reading.reader())

    def job(self, item: Item) -> Conversation:
        """One conversation."""
        return Conversation(self, item)


class Conversation(Job):
    """Sound in, sound and words out, frame by frame."""

    def __init__(self, table: Table, item: Item) -> None:
        super().__init__(table.run, item)
        self.table, self.seed = table, item.seed(table.seed)
        self.mic: Microphone | None = None
        self.speaker: Loudspeaker | None = None
        self.heard: Heard | None = None
        self.events: list[Event] = []
        self.writers: list[Any] = []
        self.frames, self.warned_at = 0, 0.0
        self.target: str | None = None
        if item is not MICROPHONE or self.run.options.output is not None:
            self.target = self.run.destination.path(item, f".{table.sound['format']}")

    def sessions(self) -> list[Talking]:
        from moshi_cli.tasks.chat import Talking, TalkingOptions
        from moshi_cli.tasks.sound import Heard, Sound

        feed, flags, live = self._open(), self.table.flags, self.item.source == STDIN
        if feed.channels != 1:
            raise UsageError("a conversation has one voice", "choose --channel mix, left or right")
        self.heard = Heard(feed) if flags.stereo else None
        options = TalkingOptions(
            lead_s=0 if self.mic else flags.lead_silence,
            tail_s=0 if self.mic else flags.tail_silence, live=live or self.mic is not None,
        )  # fmt: skip
        return [
            Talking(
                self.table.model, self.table.task, Sound(self.heard or feed), seed=self.seed,
                options=options, prompt=self.prompt(feed),
            )
        ]  # fmt: skip

    def prompt(self, feed: Feed) -> Tensor | None:
        """What the model is made to say, long[K, T]; see `Talking`."""
        return None

    def _open(self) -> Feed:
        if self.item is not MICROPHONE:
            return self.table.source(self.item)
        from moshi_cli.devices import Loudspeaker, Microphone

        flags = self.table.flags
        self.mic = Microphone(flags.input_device, drop=flags.on_lag == "drop")
        self.speaker = Loudspeaker(flags.output_device)
        self.run.console.info("listening; headphones are advised; Ctrl-C ends the conversation")
        return Feed(self.run, self.item, self.mic)

    def push(self, session: Talking, event: Event) -> None:
        from moshi_cli.tasks.events import Piece, Speech, as_json

        if isinstance(event, Speech):
            self._write(event.pcm)
        elif self.transcript is not None:
            self.events.append(event)
        if self.table.flags.jsonl:
            self.run.console.record(as_json(event, channels=False))
        elif self.mic is not None and isinstance(event, Piece):
            self.run.console.text(event.text)

    def _write(self, pcm: Tensor) -> None:
        """One frame of the reply, everywhere it is wanted."""
        import torch

        from moshi_cli.core.audio import Writer

        stereo = self.table.flags.stereo
        if not self.writers:
            if self.target is not None:
                self.writers.append(Writer(self.target, **self.table.sound))
            if stereo is not None:
                self.writers.append(Writer(stereo, subtype=self.table.sound["subtype"], channels=2))
        if self.target is not None:
            self.writers[0].write(pcm)
        if self.heard is not None:
            self.writers[-1].write(torch.cat([pcm, self.heard.take(pcm.shape[1])]))
        if self.speaker is not None:
            self.speaker.write(pcm)
        self.frames += 1
        self._check_lag()

    def _check_lag(self) -> None:
        """Say, at most every ten seconds, that the conversation runs behind."""
        now = time.monotonic()
        if self.mic is None or self.mic.late < 1 / FRAME_S or now - self.warned_at < 10:
            return
        took_ms = (now - self.began) / self.frames * 1000
        self.warned_at = now
        dropped = f", {self.mic.dropped} frames dropped" if self.mic.dropped else ""
        self.run.console.warn(
            f"running behind real time: {took_ms:.0f} ms per 80 ms frame, "
            f"{self.mic.late * FRAME_S:.1f} s late{dropped}"
        )

    def complete(self) -> None:
        for writer in self.writers:
            writer.close()
            self.outputs.append(writer.name)
        if self.speaker is not None:
            self.speaker.close()
        if self.transcript is not None:
            self._transcribe(self.transcript)
        summary(self, "first sound", self.table.seed)

    @property
    def transcript(self) -> str | None:
        """Where its words go as JSON: as asked for, and beside every result in a folder."""
        if self.table.flags.text_output is not None:
            return self.table.flags.text_output
        if self.run.destination.folder is not None:
            return str(Path(str(self.target)).with_suffix(".json"))
        return None

    def _transcribe(self, target: str) -> None:
        from moshi_cli.core.files import write_text

        told = json.dumps(self._told(), ensure_ascii=False, indent=2) + "\n"
        if target == STDIN:
            self.printed += told
        else:
            write_text(target, told)
            self.outputs.append(target)

    def _told(self) -> dict[str, Any]:
        from moshi_cli.tasks.chat import gather
        from moshi_cli.tasks.events import as_json, seconds

        reply = gather(self.events)
        return {
            "text": reply.text,
            "tokens": [{"t": seconds(p.at_s), "piece": p.text} for p in reply.pieces],
            "words": [
                {"word": w.text, "start": seconds(w.start_s), "end": seconds(w.end_s)}
                for w in reply.words
            ],
            "turns": [as_json(turn) for turn in reply.turns],
            "input": self.item.id, "audio_s": seconds(self.audio_s), **self.table.details,
            "item_seed": self.seed,
        }  # fmt: skip

    def abort(self) -> None:
        for writer in self.writers:
            writer.abort()
        if self.speaker is not None:
            self.speaker.abort()
