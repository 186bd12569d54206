"""Text to speech: the words are given one by one, the voice is sampled and trails them (§5.7).

A `Speaking` is one text in a slot. The model decides when the next word begins, the script says
which word it is (core/script.py). Text may still be arriving: a slot pauses until the words are
there that the model has to see ahead, so a text in pieces sounds exactly like the whole text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_cli.core.conditioning import Value
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import UsageError
from moshi_cli.core.script import Script, ScriptState
from moshi_cli.core.streams import FRAME_HZ, Role, Task
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks.events import Event, Failed, Speech, Warning, Word
from moshi_cli.tasks.loop import Give, Output, drive
from moshi_cli.tasks.manner import Manner, speaking_conditions, speaking_sampling
from moshi_cli.tasks.prompter import Prompter, Scribe, form_of
from moshi_cli.tasks.sound import FRAME_SAMPLES
from moshi_cli.tasks.wording import Item, Reader

TTS = Task("tts", text=Role.STEERED, voice=Role.SAMPLED, lag_s=-1.28)

LONGEST_WORD_S = 1.0  # shown for a word that is followed by a pause


# One text in a slot -------------------------------------------------------------------------------


class Speaking:
    """One text: words in, frames of speech and the times of the words out."""

    def __init__(
        self,
        model: Model,
        source: str | Iterable[Iterable[Item]],
        *,
        seed: int = 0,
        manner: Manner | None = None,
        conditions: dict[str, Value] | None = None,
        prompt: Tensor | None = None,
        speakers: bool = False,
        name: Any = None,
    ) -> None:
        """source: a text, or groups of items as they come (see `wording.Reader`).

        prompt: codes long[K, T] of a recording whose voice is to be continued.
        """
        assert model.text is not None and model.lm is not None
        self.manner = manner or Manner()
        if isinstance(source, str):
            source = [read(source, model.text, self.manner, dialogue=speakers)]
        self.source = iter(source)
        self.seed, self.conditions, self.prompt, self.name = seed, conditions or {}, prompt, name
        self.prefix = 0 if prompt is None else prompt.shape[1]  # frames
        self.scribe = Scribe(
            model.text, padding_between=self.manner.padding_between, speakers=speakers
        )
        self.offset = self.prefix - (not model.lm.config.demux)  # of a word's step, to its frame
        self.frame = 0  # of the next output
        self.samples = 0
        self.told: deque[int] = deque()  # lines that have begun and are not reported yet
        self.known = 0  # lines that were looked at
        self.spelled: list[str] = []
        self.engine: Engine | None = None
        self.slot = 0

    def open(self, engine: Engine, slot: int) -> None:
        script = engine.stepper.steer
        assert isinstance(script, Script)
        self.engine, self.slot, self.prompter = engine, slot, Prompter(script)
        engine.open(
            slot, seed=self.seed, conditions=self.conditions, prompt=self.prompt, prime=False
        )

    @property
    def script(self) -> ScriptState:
        """The pump's memory of all slots."""
        assert self.engine is not None
        state = self.engine.state.step.steer
        assert isinstance(state, ScriptState)
        return state

    def feed(self) -> Give:
        """Fetch text until the next step may be made. May block. UsageError without any words."""
        prompter = self.prompter
        while not prompter.sync(self.script, self.slot):
            items = next(self.source, None)
            if items is None:
                prompter.complete = True
                if not any(line.word for line in prompter.lines):
                    raise UsageError("there is nothing to say: the text has no words")
            else:
                prompter.lines += self.scribe.write(items)
        return Give.NOTHING

    def skip(self) -> Iterable[Event]:
        """No frame of speech yet."""
        return ()

    def take(self, output: Output) -> Iterable[Event]:
        """One frame of speech."""
        self.prompter.sync(self.script, self.slot)
        yield from self._words(last=False)
        at, self.frame = self.frame, self.frame + 1
        if at >= self.prefix and (self.frames is None or at < self.frames):
            yield from self.made(output)

    def made(self, output: Output) -> Iterable[Event]:
        """A frame that belongs to the text."""
        assert output.pcm is not None
        yield Speech(output.pcm, self.samples / FRAME_HZ / FRAME_SAMPLES)
        self.samples += output.pcm.shape[1]

    @property
    def frames(self) -> int | None:
        """Frames in all, the prefix included, once that is known."""
        ended = self.prompter.ended
        return None if ended is None else ended + self.manner.final_padding

    def _words(self, last: bool) -> Iterator[Event]:
        """Words whose end is known: the beginning of the next one."""
        lines, began = self.prompter.lines, self.prompter.began
        for i in range(self.known, len(began)):
            self.known = i + 1
            if lines[i].word is not None:
                self.told.append(i)
                self.spelled += [str(lines[i].word)] if lines[i].spelled else []
        while len(self.told) > (0 if last else 1):
            i = self.told.popleft()
            start_s = (began[i] - self.offset) / FRAME_HZ
            end_s = start_s + LONGEST_WORD_S
            if self.told:
                end_s = min(end_s, (began[self.told[0]] - self.offset) / FRAME_HZ)
            if last:
                end_s = max(start_s, min(end_s, self.audio_s))
            yield Word(str(lines[i].word), start_s, end_s)

    def finish(self) -> Iterable[Event]:
        """The last word, and what could not be said as it should."""
        yield from self._words(last=True)
        unsaid = [line.word for line in self.prompter.lines[self.known :] if line.word]
        if unsaid:
            yield Warning("unspoken", f"not spoken: {' '.join(unsaid)}", self.audio_s)
        if self.spelled:
            words = ", ".join(dict.fromkeys(self.spelled))
            yield Warning("vocabulary", f"words this model has not learnt: {words}")

    @property
    def over(self) -> bool:
        """Whether all is said."""
        return self.frames is not None and self.frame >= self.frames

    @property
    def audio_s(self) -> float:
        """Speech made so far."""
        return self.samples / FRAME_HZ / FRAME_SAMPLES


# For those who call it ----------------------------------------------------------------------------


def read(text: str, tokenizer: Text, manner: Manner, *, dialogue: bool = False) -> list[Item]:
    """The items of a whole text."""
    reader = reader_for(tokenizer, manner, dialogue=dialogue)
    return reader.push(text) + reader.flush()


def reader_for(tokenizer: Text, manner: Manner, *, dialogue: bool = False) -> Reader:
    """A reader of text in the form that this tokenizer wants."""
    return Reader(
        form=form_of(tokenizer), dialogue=dialogue, sentence_silence_s=manner.sentence_silence_s
    )


def arriving(chunks: Iterable[str], reader: Reader) -> Iterator[list[Item]]:
    """Items of a text that comes in pieces."""
    for chunk in chunks:
        yield reader.push(chunk)
    yield reader.flush()


def speaking_engine(
    model: Model,
    slots: int = 1,
    manner: Manner | None = None,
    *,
    prompt_frames: int = 0,
    decode: bool = True,
    compile: bool = False,
) -> Engine:
    """An engine for `Speaking`s. ModelError if the model does not speak."""
    manner, task = manner or Manner(), model.fit(TTS)
    assert model.lm is not None
    script = Script(
        model.lm.config.text_vocab + 1, ahead=model.config.ahead,
        max_padding=manner.max_padding, initial_padding=manner.initial_padding,
    )  # fmt: skip
    return Engine(
        model, task, slots, sampling=speaking_sampling(model.config, manner), steer=script,
        codebooks=manner.codebooks, prompt_frames=prompt_frames, hide_prompt=prompt_frames > 0,
        decode=decode, compile=compile,
    )  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """What was said."""

    pcm: Tensor  # float32 [S]
    words: tuple[Word, ...]
    warnings: tuple[Warning, ...]


def speak(
    model: Model,
    text: str,
    *,
    seed: int = 0,
    manner: Manner | None = None,
    embeddings: Sequence[Tensor] = (),
) -> Recording:
    """One text, spoken."""
    manner = manner or Manner()
    engine = speaking_engine(model, 1, manner)
    told = speaking_conditions(model.config, manner, embeddings)
    speaking = Speaking(
        model, text, seed=seed, manner=manner, conditions=told, speakers=len(embeddings) > 1
    )
    return keep(event for _, event in drive(engine, [speaking]))


def keep(events: Iterable[Event]) -> Recording:
    """What the events of a session amount to."""
    pcm: list[Tensor] = []
    words: list[Word] = []
    warnings: list[Warning] = []
    for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Speech):
            pcm.append(event.pcm.reshape(-1))
        elif isinstance(event, Word):
            words.append(event)
        elif isinstance(event, Warning):
            warnings.append(event)
    return Recording(torch.cat(pcm) if pcm else torch.zeros(0), tuple(words), tuple(warnings))
