"""Items of `moshi eval asr|tts|qa`: the jobs of those commands, whose outcome is a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli.asr_jobs import Desk, Listening
from moshi_cli.batch import Feed, Result
from moshi_cli.chat_jobs import FRAME_S, Conversation, Table
from moshi_cli.core.errors import InputError, MoshiError
from moshi_cli.eval_items import reader, said
from moshi_cli.eval_jobs import Evaluation, Row
from moshi_cli.inputs import Item
from moshi_cli.slots import Job
from moshi_cli.tts_jobs import Speech, Studio

if TYPE_CHECKING:
    from torch import Tensor

    from moshi_cli.tasks.asr import Hearing
    from moshi_cli.tasks.chat import Talking
    from moshi_cli.tasks.events import Event, Word
    from moshi_cli.tasks.tts import Speaking


class Trial(Job):
    """A job whose outcome is a row."""

    run: Evaluation
    facts: Row

    def finish(self, error: MoshiError | None = None) -> Result:
        """Complete it; what is known of it goes with the result."""
        self.facts = {}
        result = super().finish(error)
        if result.error is None:
            first_s = None if self.first_s is None else round(self.first_s, 4)
            result.fields = {"first_s": first_s, **self.facts}
        return result


def written(words: list[Word]) -> list[tuple[str, float, float]]:
    """Words as rows have them."""
    return [(w.text, round(w.start_s, 4), round(w.end_s, 4)) for w in words]


# Speech to text -----------------------------------------------------------------------------------


class HearingTrials(Desk):
    """`moshi asr` on recordings, or parts of them."""

    def source(self, item: Item) -> Feed:
        return self.run.feed(item, channel=self.reading.channel, **reader(item))

    def job(self, item: Item) -> Transcription:
        return Transcription(self, item)


class Transcription(Trial, Listening):
    """One recording: what was said in it, what was written, and when."""

    run: Evaluation

    def __init__(self, desk: Desk, item: Item) -> None:
        super().__init__(desk, item)
        self.words: list[tuple[Word, float]] = []  # and the sound that was heard by then

    def sessions(self) -> list[Hearing]:
        self.reference = said(self.item)
        return super().sessions()

    def push(self, session: Hearing, event: Event) -> None:
        from moshi_cli.tasks.events import Word

        super().push(session, event)
        if isinstance(event, Word):
            self.words.append((event, session.heard * FRAME_S))

    def complete(self) -> None:
        self.words.sort(key=lambda pair: pair[0].start_s)
        words = [word for word, _ in self.words]
        self.facts = {
            "audio": self.run.relative(str(self.item.source)), "reference": self.reference,
            "hypothesis": " ".join(word.text for word in words),
            "hypothesis_words": written(words),
            "emitted_s": [round(at, 4) for _, at in self.words],
        }  # fmt: skip
        for name in ("start", "duration"):
            if name in self.item.record:
                self.facts[name] = self.item.record[name]
        if times := self.item.record.get("words"):
            self.facts["reference_words"] = times


# Text to speech -----------------------------------------------------------------------------------


class SpeakingTrials(Studio):
    """`moshi tts` on texts."""

    def job(self, item: Item) -> Utterance:
        return Utterance(self, item)


class Utterance(Trial, Speech):
    """One text, and the sound that it became."""

    run: Evaluation

    def sessions(self) -> Sequence[Speaking]:
        if not said(self.item):
            raise InputError(f"{self.item.id}: there is nothing to say")
        return super().sessions()

    def complete(self) -> None:
        super().complete()
        record = self.item.record
        unspoken = self.unspoken.partition(": ")[2].split()
        self.facts = {
            "reference": str(record["text"]), "audio": self.run.relative(str(self.target)),
            "words_spoken": written(self.words), "unspoken": unspoken,
        }  # fmt: skip
        if length := self.length_s():
            self.facts["reference_s"] = length

    def length_s(self) -> float | None:
        """Seconds of the recording of the text, if there is one."""
        from moshi_cli.core import audio

        if known := self.item.record.get("duration"):
            return float(known)
        path = self.item.record.get("recording")
        return audio.duration_s(str(path)) if path else None


# Spoken questions ---------------------------------------------------------------------------------


class TalkingTrials(Table):
    """`moshi chat` on questions. `now`: the model is made to answer when the question is over."""

    now = False

    def source(self, item: Item) -> Feed:
        return self.run.feed(item, channel=self.reading.channel, **reader(item))

    def job(self, item: Item) -> Reply:
        return Reply(self, item)

    def answer_now(self) -> None:
        """Force a word at the end of every question; its length is asked of its file."""
        self.now = True
        lengths = [self.length_s(item) for item in self.run.items if "problem" not in item.record]
        self.prompt_frames = max((self.frames(s) for s in lengths if s), default=0) + 1

    def length_s(self, item: Item) -> float | None:
        """Seconds of a question, if that can be told beforehand."""
        from moshi_cli.core import audio

        if known := item.record.get("duration"):
            return float(known)
        found = audio.duration_s(str(item.source))
        return None if found is None else found - float(item.record.get("start", 0.0))

    def frames(self, length_s: float) -> int:
        """Frames until a question is over, silence in front of it included."""
        lead = round(self.flags.lead_silence / FRAME_S)
        return lead + -(-round(length_s * 24_000) // 1920)


class Reply(Trial, Conversation):
    """One question, and what was answered, in words and in sound."""

    run: Evaluation
    table: TalkingTrials
    transcript = None  # rows have the words

    def sessions(self) -> list[Talking]:
        self.question = self.item.record.get("text", "")
        if problem := self.item.record.get("problem"):
            raise InputError(str(problem))
        if not self.item.record.get("answers"):
            raise InputError(f"{self.item.id}: the answer is not known")
        (self.talking,) = found = super().sessions()
        return found

    def prompt(self, feed: Feed) -> Tensor | None:
        from moshi_cli.tasks.chat import answer_now

        if not self.table.now:
            return None
        length_s = self.table.length_s(self.item)
        if length_s is None:
            raise InputError(f"{self.item.id}: its header does not say how long it is")
        return answer_now(self.table.model, self.table.frames(length_s))

    def push(self, session: Talking, event: Event) -> None:
        from moshi_cli.tasks.events import Speech as Sound

        super().push(session, event)
        if not isinstance(event, Sound):
            self.events.append(event)

    def complete(self) -> None:
        from moshi_cli.tasks.chat import gather

        super().complete()
        reply, end_s = gather(self.events), self.talking.sound.seconds
        first = reply.words[0].start_s - end_s if reply.words else None
        self.facts = {
            "question": self.question, "answers": self.item.record["answers"],
            "written": reply.text, "words_spoken": written(list(reply.words)),
            "question_audio": self.run.relative(str(self.item.source)),
            "audio": self.run.relative(str(self.target)), "question_s": round(end_s, 4),
            "reply_s": first and round(first, 4),
        }  # fmt: skip


# Transcripts that were made elsewhere -------------------------------------------------------------


def hypotheses(path: str) -> dict[str, Any]:
    """id -> the row of a JSON lines file with "id" and "text" (or "hypothesis"). InputError."""
    from moshi_cli.tasks.evaluation import read_rows

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    return {row["id"]: row for row in read_rows(Path(path))}


def scored(items: list[Item], found: dict[str, Any], path: str) -> Iterator[Row]:
    """A row per reference, and one per transcript that belongs to none: both fail if alone."""
    from moshi_cli.tasks.manifest import words_of

    for item in items:
        try:
            row: Row = {"id": item.id, "reference": said(item)}
        except InputError as error:
            yield {"id": item.id, "error": str(error)}
            continue
        theirs = found.get(item.id)
        if theirs is None:
            yield row | {"error": f"{item.id}: {path} has no transcript of it"}
            continue
        row["hypothesis"] = str(theirs.get("text", theirs.get("hypothesis", "")))
        if times := item.record.get("words"):
            row["reference_words"] = times
            if words := words_of(theirs):
                row["hypothesis_words"] = [(w.text, w.start_s, w.end_s) for w in words]
        yield row
    for id in found.keys() - {item.id for item in items}:
        yield {"id": id, "error": f"{id}: {path} has a transcript of it, but there is no reference"}
