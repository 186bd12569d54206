"""Items of a command in the slots of an engine: what `asr`, `tts` and `chat` have in common.

A job is one item: it opens its sessions when a slot is free, uses what they report, and ends in a
`Result`. A broken item fails alone. What several jobs write to stdout comes in their order.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moshi_cli import __version__
from moshi_cli.batch import Result, Run
from moshi_cli.console import Console
from moshi_cli.core.errors import InputError, MoshiError, UsageError
from moshi_cli.inputs import Item
from moshi_cli.options import ModelOptions

if TYPE_CHECKING:
    from moshi_cli.core.engine import Engine
    from moshi_cli.core.weights import Model
    from moshi_cli.tasks.events import End, Event


Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile each frame.")]


class Job:
    """One item; subclasses say what its sessions are and what to do with their events."""

    def __init__(self, run: Run, item: Item) -> None:
        self.run, self.item = run, item
        self.began = time.monotonic()
        self.audio_s = 0.0
        self.first_s: float | None = None  # until the first word or sound
        self.outputs: list[str] = []
        self.printed = ""  # for stdout, in its turn
        self.done = False

    def sessions(self) -> Iterable[Any]:
        """What is to be done. Raises InputError and UsageError."""
        raise NotImplementedError

    def push(self, session: Any, event: Event) -> None:
        """Use what a session reports."""
        raise NotImplementedError

    def ended(self, session: Any, event: End) -> None:
        """A session is over."""
        self.audio_s = max(self.audio_s, event.audio_s)
        known = [s for s in (self.first_s, event.first_s) if s is not None]
        self.first_s = min(known, default=None)

    def complete(self) -> None:
        """Write what is to be written at the end."""

    def abort(self) -> None:
        """Leave nothing behind."""

    def warn(self, message: str) -> None:
        """Something is odd about this item."""
        self.run.console.warn(message if self.run.single else f"{self.item.id}: {message}")

    def finish(self, error: MoshiError | None = None) -> Result:
        """Complete the outputs, or leave none."""
        if error is None:
            try:
                self.complete()
            except (InputError, UsageError) as late:
                error = late
        if error is not None:
            self.abort()
        self.done = True
        seconds = time.monotonic() - self.began
        return Result(self.item, self.outputs, self.audio_s, seconds, error)


class Press:
    """Stdout of several jobs: whoever is first in line prints first."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.line: deque[Job] = deque()

    def release(self) -> None:
        """Print what is complete, in order."""
        while self.line and self.line[0].done:
            if text := self.line.popleft().printed:
                self.run.console.text(text)


def work(
    engine: Engine, make: Callable[[Item], Job]
) -> Callable[[Iterator[Item]], Iterator[Result]]:
    """The `work` of a Run: jobs made from items, through the slots of an engine."""
    from moshi_cli.tasks.events import End, Failed
    from moshi_cli.tasks.loop import drive

    def results(items: Iterator[Item]) -> Iterator[Result]:
        owner: dict[int, Job] = {}  # session -> job
        left: dict[int, int] = {}  # job -> sessions that go on
        failed: deque[tuple[Job, MoshiError]] = deque()  # before they began
        errors: dict[int, MoshiError] = {}
        press: Press | None = None

        def sessions() -> Iterator[Any]:
            nonlocal press
            for item in items:
                while press is not None and len(left) >= press.run.options.batch_size:
                    yield None  # so many go on as were asked for, however many slots each has
                job = make(item)
                press = press or Press(job.run)
                press.line.append(job)
                try:
                    found = list(job.sessions())
                except (InputError, UsageError) as error:
                    failed.append((job, error))
                    continue
                left[id(job)] = len(found)
                owner.update({id(session): job for session in found})
                yield from found

        def finished(job: Job, error: MoshiError | None = None) -> Result:
            result = job.finish(error)
            if press is not None:
                press.release()
            return result

        try:
            for session, event in drive(engine, sessions()):
                while failed:
                    yield finished(*failed.popleft())
                job = owner[id(session)]
                if isinstance(event, Failed):
                    errors.setdefault(id(job), event.error)
                elif isinstance(event, End):
                    job.ended(session, event)
                else:
                    job.push(session, event)
                if isinstance(event, Failed | End):
                    left[id(job)] -= 1
                    del owner[id(session)]
                    if not left[id(job)]:
                        del left[id(job)]
                        yield finished(job, errors.pop(id(job), None))
            while failed:
                yield finished(*failed.popleft())
        finally:
            for job in owner.values():
                if not job.done:
                    job.abort()

    return results


def slots_for(run: Run, at_least: int = 1) -> int:
    """How many slots an engine needs: no more than there are items, where they are known."""
    size = run.options.batch_size
    if not run.options.stdin_paths:
        size = min(size, max(1, len(run.items)))
    return max(size, at_least)


def build(make: Callable[[bool], Engine], compile: bool, console: Console) -> Engine:
    """An engine, compiled if that is wanted and works here; NO_TORCH_COMPILE wins."""
    import torch

    if not compile or os.environ.get("NO_TORCH_COMPILE", "0") not in ("", "0"):
        return plain(make)
    try:
        engine = make(True)
        engine.open(0, prime=False)  # a model may have to be told something
        engine.step(None, torch.zeros(engine.slots, dtype=torch.bool))  # nobody moves
        engine.close(0)
        engine.state.step.conditions = None  # of whatever length a session's are
    except MoshiError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        console.warn(f"--compile does not work here, going on without ({reason})")
        return plain(make)
    return engine


def plain(make: Callable[[bool], Engine]) -> Engine:
    """An engine that is not compiled; its model is packed where that helps."""
    from moshi_cli.core.packing import pack

    engine = make(False)
    pack(engine.stepper.lm)
    pack(engine.model.mimi)
    return engine


def details(model: Model, options: ModelOptions) -> dict[str, Any]:
    """What every JSON result tells about its making."""
    told = {
        "version": __version__, "model": model.name, "revision": model.revision or None,
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "seed": options.seed,
    }  # fmt: skip
    return {key: value for key, value in told.items() if value is not None}


def summary(job: Job, first: str, seed: int) -> None:
    """When the first word or sound came, and the seed: said of single items."""
    if job.run.single:
        came = "" if job.first_s is None else f"{first} after {job.first_s:.2f} s; "
        job.run.console.info(f"{came}seed {seed}")


def on_terminal() -> bool:
    """Whether a person reads stdout as it is written."""
    return sys.stdout.isatty()
