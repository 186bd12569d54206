"""Speech to text: the voice is given, its words are sampled and trail it (paper §5.7).

A `Hearing` is one channel of one recording in a slot. Text comes out re-aligned with the sound, so
all that is left of the lag is the part of a frame that frames cannot express. At the end silence is
fed until the last word is out. Long recordings begin afresh in their pauses (`refresh_s`), since
recognisers tend to fall silent when their context has filled up; times go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from moshi_cli.core.config import ModelConfig, Sampling
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import UsageError
from moshi_cli.core.search import HOLD
from moshi_cli.core.streams import FRAME_HZ, Role, Task
from moshi_cli.core.text import PAD, Word, WordStream
from moshi_cli.core.weights import Model
from moshi_cli.tasks.events import End, Event, Failed, Pause, Warning
from moshi_cli.tasks.loop import Give, Output, drive
from moshi_cli.tasks.sound import FRAME_S, FRAME_SAMPLES, Sound
from moshi_cli.tasks.subtitles import Segmenter, Transcript
from moshi_cli.tasks.watch import Ear, Repetition, Stall

ASR = Task("asr", text=Role.SAMPLED, voice=Role.GIVEN, lag_s=0.5)
REFRESH = 0.6  # of the context: a pause after that is taken for a fresh beginning

MARGIN_FRAMES = 12  # of text after the last frame of sound, at most: crowded words come late
IDLE_FRAMES = 4  # of padding after which no word is expected there
EARLY_FRAMES = 2  # by which a word may be written before it sounds
CALM_FRAMES = 8  # of quiet and padding before a fresh beginning
STALL_S = 8.0  # of speech without text


@dataclass(frozen=True)
class HearingOptions:
    """How one recording is heard."""

    refresh_s: float = 0.0  # begin afresh in a pause after so long; 0: never
    pause_threshold: float | None = None  # report pauses of models with pause heads
    stall_s: float = STALL_S


class Hearing:
    """One channel of one recording: frames in, words out."""

    def __init__(
        self,
        model: Model,
        task: Task,
        sound: Sound,
        *,
        seed: int = 0,
        channel: int = 0,
        options: HearingOptions | None = None,
        name: Any = None,
    ) -> None:
        assert model.text is not None
        self.sound, self.seed, self.channel, self.name = sound, seed, channel, name
        self.options = options or HearingOptions()
        self.lead = ceil(model.config.silence_s * FRAME_HZ)  # frames of silence it wants first
        self.stream = WordStream(
            model.text, offset_s=task.lag_s - task.lag_frames / FRAME_HZ, channel=channel
        )
        self.segmenter = Segmenter()
        self.ear, self.stall = Ear(), Stall(self.options.stall_s)
        self.repetition = Repetition()
        self.recent: deque[Tensor] = deque(maxlen=abs(task.lag_frames) + HOLD + 4)
        self.coming: deque[Tensor] = deque()  # to feed before the sound goes on
        self.heard = 0  # frames of sound fed, flush included
        self.out = 0  # frames of text that are known
        self.ignored = 0  # outputs that belong to the silence in front
        self.calm = 0  # quiet frames without text, up to now
        self.idle = 0  # frames of padding, up to now
        self.loud = self.pausing = self.primed = False
        self.fresh_at = 0  # frame of the latest beginning
        self.engine: Engine | None = None
        self.slot = 0

    def open(self, engine: Engine, slot: int) -> None:
        """Begin, or begin afresh: what has been heard but not yet written is heard again."""
        self.engine, self.slot = engine, slot
        engine.open(slot, seed=self.seed, prime=False)
        again = self.heard - self.out
        silence = torch.zeros(1, FRAME_SAMPLES)
        replayed = list(self.recent)[len(self.recent) - again :] if again else []
        self.coming = deque([*[silence] * self.lead, *replayed])
        self.ignored, self.primed = self.lead, False
        self.fresh_at = self.out

    def feed(self) -> Tensor | Give:
        """The next frame: silence in front, what is heard again, sound, silence at the end."""
        if not self.primed:
            self.primed = True
            return Give.NOTHING
        if self.coming:
            return self.coming.popleft()
        frame = self.sound.next()
        self.loud = frame is not None and self.ear(frame)
        if frame is None:
            frame = torch.zeros(1, FRAME_SAMPLES)
        self.heard += 1
        self.recent.append(frame)
        return frame

    def skip(self) -> Iterable[Event]:
        """Nothing is known yet."""
        return ()

    def take(self, output: Output) -> Iterable[Event]:
        """One more text token, for frame `out` of the sound."""
        token = output.text
        if self.ignored:  # silence in front; a word may be written a moment before it sounds
            if self.ignored <= EARLY_FRAMES:
                yield from self._segmented(self.stream.push(token, early=self.ignored))
            self.ignored -= 1
            return
        self.out += 1
        self.idle = self.idle + 1 if token == PAD else 0
        yield from self._segmented(self.stream.push(token))
        if not self.stream.tokens:
            yield from self.segmenter.wait(self.out / FRAME_HZ)
        yield from self._pause(output)
        reason = self._trouble(token)
        if reason is not None:
            yield reason
        if reason is not None or self._rested(token):
            yield from self._segmented(self.stream.flush())
            assert self.engine is not None
            self.open(self.engine, self.slot)

    def _segmented(self, words: Iterable[Word]) -> Iterator[Event]:
        end_s = self.sound.seconds
        for word in words:
            if self.sound.ended:  # not beyond the end of the sound
                start_s = min(word.start_s, end_s)
                word = replace(word, start_s=start_s, end_s=min(word.end_s, end_s))
            yield from self.segmenter.push(word)
            yield word

    def _pause(self, output: Output) -> Iterator[Event]:
        threshold = self.options.pause_threshold
        if threshold is not None and output.pauses:
            head = output.pauses[min(2, len(output.pauses) - 1)]
            if head > threshold and not self.pausing:
                yield Pause(self.out / FRAME_HZ, output.pauses)
            self.pausing = head > threshold

    def _trouble(self, token: int) -> Warning | None:
        """A warning, if the model seems to be stuck; then it begins afresh."""
        at_s = self.out * FRAME_S
        if self.stall.push(self.loud and not self.coming, token > PAD):
            message = f"{self.options.stall_s:g} s of sound without words at {at_s:.1f} s"
            return Warning("stall", message, at_s)
        if token > PAD and self.repetition.push(token):
            return Warning("repetition", f"the same words again and again at {at_s:.1f} s", at_s)
        return None

    def _rested(self, token: int) -> bool:
        """Whether this is a good moment to begin afresh."""
        self.calm = 0 if self.loud or token != PAD or self.stream.tokens else self.calm + 1
        since = (self.out - self.fresh_at) / FRAME_HZ
        due = self.options.refresh_s and since >= self.options.refresh_s
        return bool(due and self.calm >= CALM_FRAMES and not self.sound.ended)

    def finish(self) -> Iterable[Event]:
        """The words that were not final yet."""
        yield from self._segmented(self.stream.flush())
        yield from self.segmenter.flush()

    @property
    def over(self) -> bool:
        """Whether the text of the whole sound is known."""
        late = self.out - self.sound.frames
        return self.sound.ended and late >= (
            IDLE_FRAMES if self.idle >= IDLE_FRAMES else MARGIN_FRAMES
        )

    @property
    def audio_s(self) -> float:
        """Sound heard so far."""
        return self.sound.seconds


# For those who call it ----------------------------------------------------------------------------


def hearing_task(config: ModelConfig, delay_s: float | None = None) -> Task:
    """ASR as this checkpoint does it; with another lag if it was trained with several.

    ModelError if it cannot write down what it hears, UsageError naming the lags it knows.
    """
    task = config.fit(ASR)
    if delay_s is None or delay_s == task.lag_s:
        return task
    known = {task.lag_frames}
    for condition in config.lm.conditions if config.lm else ():
        if condition.name == "lag":
            known |= {int(value) for value in condition.values if int(value) >= 0}
    frames = round(delay_s * FRAME_HZ)
    if frames not in known or abs(frames - delay_s * FRAME_HZ) > 1e-6:
        allowed = ", ".join(f"{frames / FRAME_HZ:g}" for frames in sorted(known))
        if len(known) == 1:
            allowed = f"{task.lag_s:g}"
        raise UsageError(f"this model has no delay of {delay_s:g} s", f"its delays: {allowed}")
    return replace(task, lag_s=delay_s)


def hearing_sampling(
    config: ModelConfig,
    temperature: float = 0.0,
    beam: int | None = None,
    lm_weight: float | None = None,
    shifts: int | None = None,
) -> Sampling:
    """Greedy, or by a search where the model has one, unless asked otherwise.

    beam: hypotheses (None: the model's, 1 with a temperature). lm_weight: of its n-grams (None: as
    it says, if it has some). shifts: times that a search hears the sound (None: as it says).
    """
    usual = config.sampling_of(ASR.name)
    if beam is None:
        beam = 1 if temperature else usual.beam
    if shifts is None:
        shifts = usual.shifts if beam > 1 else 1
    if lm_weight is None:
        lm_weight = usual.lm_weight if config.ngram_file else 0.0
    found = replace(
        usual, temp=temperature, text_temp=temperature,
        beam=beam, lm_weight=lm_weight, token_bonus=usual.token_bonus if lm_weight else 0.0,
        shifts=shifts,
    )  # fmt: skip
    if temperature and found.beam > 1:
        raise UsageError("a search has no temperature", "leave out --temperature or --beam-size")
    return found


def refresh_s(config: ModelConfig) -> float:
    """When to begin afresh, for this checkpoint's context."""
    context = config.lm.temporal.context if config.lm else None
    return REFRESH * context / FRAME_HZ if context else 0.0


def transcribe(
    model: Model,
    sound: Tensor | Iterable[Tensor],
    *,
    delay_s: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Transcript:
    """Words and times of one recording: float32 [S] at 24 kHz, or frames [1, 1920]."""
    task = hearing_task(model.config, delay_s)
    engine = Engine(model, task, 1, sampling=hearing_sampling(model.config, temperature))
    options = HearingOptions(refresh_s=refresh_s(model.config))
    hearing = Hearing(model, task, Sound(sound), seed=seed, options=options)
    return collect(event for _, event in drive(engine, [hearing]))


def collect(events: Iterable[Event], details: Mapping[str, Any] | None = None) -> Transcript:
    """The transcript that the events of a session (or of all its channels) make."""
    words: list[Word] = []
    extra: list[Pause | Warning] = []
    audio_s = wall_s = 0.0
    for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Word):
            words.append(event)
        elif isinstance(event, Pause | Warning):
            extra.append(event)
        elif isinstance(event, End):
            audio_s, wall_s = max(audio_s, event.audio_s), max(wall_s, event.wall_s)
    words.sort(key=lambda word: word.start_s)
    return Transcript(tuple(words), audio_s, details or {}, wall_s, tuple(extra))
