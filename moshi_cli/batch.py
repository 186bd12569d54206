"""One command over its inputs, one or a million: order, resume, progress, failures, Ctrl-C.

A command that handles one input at a time gives `Run.each` a function; one that fills the slots of
an engine gives `Run` a generator that pulls items when a slot is free and yields results as they
come. Both read sound through `Run.feed`, which counts progress and ends early on Ctrl-C, so that
what is begun can be finished.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from moshi_cli.console import Console, Progress
from moshi_cli.core.errors import InputError, MoshiError, UsageError
from moshi_cli.destination import Destination
from moshi_cli.inputs import SOUND, STDIN, Item, expand, stdin_items, take_shard
from moshi_cli.journal import Journal
from moshi_cli.options import BatchOptions

T = TypeVar("T")
PROBE_LIMIT = 2000  # inputs whose length is looked up beforehand, for the progress bar


@dataclass
class Result:
    """What became of one item."""

    item: Item
    outputs: list[str] = field(default_factory=list)
    audio_s: float = 0.0  # sound heard or made
    seconds: float = 0.0  # of work
    error: MoshiError | None = None
    status: str = "ok"  # ok, failed, skipped, interrupted
    fields: dict[str, Any] = field(default_factory=dict)  # more for the status line


class Guard(Generic[T]):
    """An iterator that ends when the user presses Ctrl-C; its item then counts as interrupted."""

    def __init__(self, run: Run, source: Iterable[T], live: bool, item: Item | None = None) -> None:
        self.run, self.live, self.item = run, live, item
        self._source = iter(source)

    def __iter__(self) -> Guard[T]:
        return self

    def __next__(self) -> T:
        try:
            self.run.waiting = self.live  # from here on Ctrl-C is raised: it must end a wait
            return self._last() if self.run.stopped else next(self._source)
        except KeyboardInterrupt:
            self.run.stopped = True
            return self._last()
        finally:
            self.run.waiting = False

    def _last(self) -> T:
        """After Ctrl-C: nothing more, and the item counts as interrupted."""
        if self.item is not None:
            self.run.cut.add(self.item.id)
        raise StopIteration


class Feed(Guard[Any]):
    """Frames float32 [C, 1920·n] of one item, counted by the progress bar; see `audio.frames`."""

    def __init__(self, run: Run, item: Item, stream: Any) -> None:
        super().__init__(run, stream, stream.live, item)
        self.stream = stream

    def __next__(self) -> Any:
        before = self.samples
        frame = super().__next__()
        self.run.advance((self.samples - before) / 24_000)
        return frame

    def _last(self) -> Any:
        """What was heard already is still used, up to the last sample."""
        self.run.cut.add(str(self.item and self.item.id))
        self.stream.stop()
        return next(self.stream)

    @property
    def samples(self) -> int:
        """True samples so far, without the padding of the last frame."""
        return int(self.stream.samples)

    @property
    def channels(self) -> int:
        return int(self.stream.channels)


class Run:
    """One command line: what to do, where results go, and how it ended.

    suffixes: of the outputs of every item ([".srt", ".txt"]). many_to_stdout: whether the results
    of several inputs may share stdout. accept: suffixes of inputs taken from folders.
    """

    def __init__(
        self,
        command: str,
        inputs: Sequence[str] | None,
        options: BatchOptions,
        console: Console,
        *,
        suffixes: Sequence[str],
        accept: Sequence[str] = SOUND,
        many_to_stdout: bool = False,
        items: Sequence[Item] | None = None,
    ) -> None:
        self.command, self.options, self.console = command, options, console
        self.stopped = self.waiting = False
        self.cut: set[str] = set()  # ids of items that Ctrl-C ended early
        self.counts = {"ok": 0, "failed": 0, "skipped": 0, "interrupted": 0}
        self.status = options.stdin_paths or options.status is not None
        if options.stdin_paths:
            if inputs or options.manifest:
                raise UsageError("--stdin-paths takes its inputs from standard input only")
            found: list[Item] = []
        elif items is not None:
            found = list(items)
        else:
            found = expand(
                inputs, recursive=options.recursive, include=options.include,
                manifest=options.manifest, accept=accept,
            )  # fmt: skip
        self.items = take_shard(found, options.shard)
        self.single = len(found) == 1 and not self.status
        self.destination = Destination(
            options.output, options.output_dir, suffixes, many=len(found) != 1,
            many_to_stdout=many_to_stdout, stdout_taken=self.status,
        )  # fmt: skip
        if self.destination.folder is None and (options.resume or options.retry_failed):
            raise UsageError("--resume needs --output-dir", "the journal is kept there")
        self.journal: Journal | None = None
        self._progress: Progress | None = None

    # reading

    def guard(self, source: Iterable[T], live: bool = True, item: Item | None = None) -> Guard[T]:
        """Any iterator, ended early by Ctrl-C; live: waiting for it may take for ever."""
        return Guard(self, source, live, item)

    def feed(self, item: Item, **reader: Any) -> Feed:
        """The frames of an item; arguments of `core.audio.frames`. Raises InputError."""
        from moshi_cli.core import audio

        assert item.source is not None, item.id
        return Feed(self, item, audio.frames(item.source, **reader))

    def advance(self, audio_s: float) -> None:
        """So much more sound is done (a feed says so itself)."""
        if self._progress:
            self._progress.advance(audio_s)

    # doing

    def each(
        self,
        function: Callable[[Item], Result | None],
        settings: Mapping[str, Any],
        revision: str | None = None,
    ) -> int:
        """Call `function` for one item after the other; returns the exit code.

        An InputError or UsageError fails the item, everything else ends the run.
        """

        def work(items: Iterator[Item]) -> Iterator[Result]:
            for item in items:
                began = time.monotonic()
                try:
                    result = function(item) or Result(item, self.destination.paths(item))
                except (InputError, UsageError) as error:
                    result = Result(item, error=error)
                result.seconds = time.monotonic() - began
                yield result

        return self(work, settings, revision)

    def __call__(
        self,
        work: Callable[[Iterator[Item]], Iterator[Result]],
        settings: Mapping[str, Any],
        revision: str | None = None,
    ) -> int:
        """Run `work` over the items; settings: all that results depend on; gives the exit code."""
        self.journal = self.opened_journal(settings, revision)
        if self.journal is not None:
            self.journal.load()
        total = None if self.options.stdin_paths else len(self.items)
        self._progress = self.console.progress(total, self._total_s())
        if self.status:
            self.console.record({"type": "ready", "command": self.command, "items": total})
        try:
            with self._signals():
                for result in work(self._todo()):
                    self._account(result)
                    if result.error is not None and self.options.fail_fast:
                        break
        except KeyboardInterrupt:
            self.stopped = True
        finally:
            self._progress.close()
        self._summary()
        return self._code()

    def opened_journal(self, settings: Mapping[str, Any], revision: str | None) -> Journal | None:
        """What remembers the results in a folder."""
        if self.destination.folder is None:
            return None
        return Journal(
            self.destination.folder, self.command, settings, revision=revision,
            shard=self.options.shard, checksum=self.options.checksum,
        )  # fmt: skip

    def remember(self, result: Result) -> None:
        """Write down what became of an item."""
        if self.journal is not None:
            self.journal.write(
                result.item, result.status, result.outputs, result.seconds, result.audio_s,
                str(result.error) if result.error else None,
            )  # fmt: skip

    def _total_s(self) -> float | None:
        """Seconds of all recordings, where a progress bar would show them."""
        if self.console.progress_mode == "never" or not 0 < len(self.items) <= PROBE_LIMIT:
            return None
        from moshi_cli.core import audio

        known = [i.source and i.source != STDIN and audio.duration_s(i.source) for i in self.items]
        return sum(known) if all(known) else None  # type: ignore[arg-type]

    def _todo(self) -> Iterator[Item]:
        """Items that have to be done, until Ctrl-C."""
        source: Iterable[Item] = self.items
        if self.options.stdin_paths:
            source = stdin_items(self.guard(sys.stdin))
        for item in source:
            if self.stopped:
                return
            known = self._known(item)
            if known is None:
                assert self._progress is not None
                self._progress.begin(item.id)
                yield item
            else:
                self._account(known)

    def _known(self, item: Item) -> Result | None:
        """The result of an item that needs no work, or None."""
        options, verdict = self.options, "unknown"
        resume = options.resume or options.retry_failed
        if resume and self.journal is not None:
            verdict = self.journal.verdict(item)
        if verdict == "done":
            return Result(item, self.destination.paths(item), status="skipped")
        if verdict == "failed" and not options.retry_failed:
            message = f"{item.id}: failed before, --retry-failed tries again"
            return Result(item, error=InputError(message), status="skipped")
        existing = options.existing or ("skip" if resume and verdict == "unknown" else "overwrite")
        paths = [
            path for path in self.destination.paths(item) if path != "-" and Path(path).is_file()
        ]
        if existing == "skip" and paths and len(paths) == len(self.destination.suffixes):
            return Result(item, paths, status="skipped")
        if existing == "error" and paths:
            return Result(item, error=InputError(f"{paths[0]}: exists already"))
        return None

    def _account(self, result: Result) -> None:
        """Count, journal and announce what became of an item."""
        item, error, again = result.item, result.error, result.status == "skipped"
        if error is not None:
            if self.single:
                raise error
            result.status = "failed"
            self.console.error(str(error), error.hint)
        elif item.id in self.cut:
            result.status = "interrupted"
        self.counts[result.status] += 1
        if not again:
            self.remember(result)
        if self.status:
            record = {"type": "item", "id": item.id, "status": result.status} | result.fields
            record |= {"outputs": result.outputs, "audio_s": round(result.audio_s, 3)}
            if result.audio_s:
                record["rtf"] = round(result.seconds / result.audio_s, 4)
            self.console.record(record | ({"error": str(error)} if error else {}))
        if self._progress:
            self._progress.finish_item()

    def _summary(self) -> None:
        progress = self._progress
        assert progress is not None
        audio_s, wall_s = round(progress.done_s, 2), round(progress.wall_s, 2)
        if self.status:
            facts = {"audio_s": audio_s, "wall_s": wall_s, "rtf": round(progress.rtf, 4)}
            self.console.record({"type": "summary", **self.counts, **facts})
        many = [f"{count} {name}" for name, count in self.counts.items() if count]
        what = f"{', '.join(many) or 'nothing done'}; " if not self.single else ""
        self.console.info(f"{what}{audio_s:g} s of audio in {wall_s:g} s (RTF {progress.rtf:.3f})")

    def _code(self) -> int:
        if self.stopped:
            return 130
        if not self.counts["failed"]:
            return 0
        return 3 if self.counts["ok"] + self.counts["skipped"] and not self.options.fail_fast else 1

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C: stop reading and finish. Second: abort."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupted(number: int, frame: Any) -> None:
            if self.stopped or self.waiting:
                raise KeyboardInterrupt
            self.stopped = True
            with suppress(RuntimeError):  # amid another line on stderr, which takes no second one
                self.console.warn(
                    "interrupted: finishing what is begun; press Ctrl-C again to abort"
                )

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
