"""What `moshi eval interrupt` does: every question once in peace, and once with an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moshi_cli.chat_jobs import Conversation, Table, TalkingFlags
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.eval_items import reader, recordings
from moshi_cli.eval_tasks import WAV, Asked, Names, one_channel
from moshi_cli.eval_trials import Trial
from moshi_cli.inputs import STDIN, Item
from moshi_cli.options import AudioOptions
from moshi_cli.slots import work

if TYPE_CHECKING:
    from torch import Tensor

    from moshi_cli.eval_jobs import Evaluation, Row
    from moshi_cli.tasks.chat import Talking
    from moshi_cli.tasks.evaluation import Figure
    from moshi_cli.tasks.events import Event

FIGURES = ("stopped", "stop_delay", "goes_on_alone", "answered", "interruptible", "rtf", "audio")


class Interruptions(Table):
    """`moshi chat` on questions; the next question of the list is what the partner breaks in with,
    and after the last one the first."""

    run: Evaluation

    def job(self, item: Item) -> Interruption:
        return Interruption(self, item)

    def recording(self, item: Item, counted: bool = True) -> Tensor:
        """The whole recording, float32 [S]; counted: progress bars see it. InputError."""
        import torch

        from moshi_cli.core import audio

        if problem := item.record.get("problem"):
            raise InputError(str(problem))
        assert item.source is not None, item.id
        asked = {"channel": self.reading.channel, **reader(item)}
        source = self.run.feed(item, **asked) if counted else audio.frames(item.source, **asked)
        frames = list(source)
        return torch.cat(frames, 1)[0, : source.samples] if frames else torch.zeros(0)

    def after(self, item: Item) -> Item:
        """The next one."""
        items = self.run.items
        return items[(items.index(item) + 1) % len(items)]


class Interruption(Trial, Conversation):
    """One question: the reply as it is, and how it ends when somebody speaks into it."""

    run: Evaluation
    table: Interruptions
    transcript = None

    def sessions(self) -> list[Talking]:
        from moshi_cli.tasks.interruption import Breach, Interrupted, spoken_part

        other = self.table.after(self.item)
        question, then = self.table.recording(self.item), self.table.recording(other, False)
        self.pair = [
            Interrupted(
                self.table.model, self.table.task, Breach(question, said), seed=self.seed
            )
            for said in (None, spoken_part(then, other.id))
        ]  # fmt: skip
        self.told: dict[int, list[Event]] = {id(session): [] for session in self.pair}
        return list(self.pair)

    def push(self, session: Talking, event: Event) -> None:
        self.told[id(session)].append(event)

    def complete(self) -> None:
        import torch

        from moshi_cli.core import audio
        from moshi_cli.tasks.chat import gather
        from moshi_cli.tasks.interruption import goes_on_s
        from moshi_cli.tasks.sound import FRAME_S

        alone, broken = (gather(self.told[id(session)]) for session in self.pair)
        breach = self.pair[1].breach
        partner = self.pair[1].partner.take(len(broken.pcm))
        assert self.target is not None
        audio.write(self.target, torch.cat([broken.pcm[None], partner]))
        self.outputs.append(self.target)
        self.facts = {
            "question": self.item.record.get("text", ""), "written": broken.text,
            "interrupted_by": self.table.after(self.item).id,
            "written_alone": alone.text, "at_s": None,
            "audio": self.run.relative(str(self.target)),
        }  # fmt: skip
        if breach.at is not None:
            at_s = breach.at * FRAME_S
            self.facts |= {
                "at_s": round(at_s, 2), "alone_s": round(goes_on_s(alone.pcm, at_s), 2),
                "stop_s": round(goes_on_s(broken.pcm, at_s), 2),
            }  # fmt: skip


def interrupt(
    inputs: Names, manifests: Names, channel: str, talking: TalkingFlags, within_s: float,
    asked: Asked,
) -> int:  # fmt: skip
    """Questions, and how soon the model stops when somebody speaks into its answer."""
    from moshi_cli.session import open_model
    from moshi_cli.tasks import interruption, scoring

    one_channel(channel)
    run = asked.run("interrupt", recordings(inputs, manifests), FIGURES)
    if len(run.items) < 2:
        raise UsageError("one recording cannot interrupt another", "name two or more")
    if any(item.source == STDIN for item in run.items):
        raise UsageError("standard input is not heard twice", "name files")
    opened = open_model(asked.model, asked.console)
    table = Interruptions(
        run, opened, talking, WAV, options=asked.model, reading=AudioOptions(channel=channel)
    )
    run(work(table.engine(), table.job), table.settings, opened.revision or opened.name)

    def figures() -> dict[str, Figure]:
        def score(rows: Sequence[Row]) -> dict[str, Figure]:
            return interruption.figures(rows, within_s) | scoring.speed(rows)

        return scoring.grouped(score, run.good(), asked.by)

    settings = asdict(table.sampling) | {"within_s": within_s, "channel": channel}
    settings |= {"into_s": interruption.INTO_S}
    return run.finish(figures, asked.told(opened, settings=settings))
