"""Recognisers that judge: they write down what is heard in sound files, and say what they are.

Here are our own checkpoints, and any command that prints transcripts; see whisper_judges.py for
Whisper. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any, Protocol

from moshi_cli.core import audio
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import InputError, MoshiError, UsageError
from moshi_cli.core.weights import Model
from moshi_cli.tasks import asr
from moshi_cli.tasks.events import End, Event, Failed
from moshi_cli.tasks.loop import drive
from moshi_cli.tasks.sound import Sound

LIMIT_S = 600.0  # in which a command must have written one transcript

Heard = tuple[Path, str | MoshiError]


class Judge(Protocol):
    """Someone who listens."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it is, for the record; judges of equal facts write equal transcripts."""

    def hear(self, paths: Iterable[Path]) -> Iterator[Heard]:
        """The transcript of each file, or why there is none; in any order, as they come."""


def identity(judge: Judge) -> str:
    """A short name for a judge: the hash of its facts."""
    text = json.dumps(dict(judge.facts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Our own ------------------------------------------------------------------------------------------


class ModelJudge:
    """A checkpoint of ours that recognises speech, `slots` recordings at a time, greedy or by the
    model's own search."""

    def __init__(self, model: Model, slots: int = 1, facts: Mapping[str, Any] | None = None):
        self.model, self.slots = model, slots
        self.facts = {"judge": "moshi", "model": model.name, **(facts or {})}
        self.task = asr.hearing_task(model.config)

    def hear(self, paths: Iterable[Path]) -> Iterator[Heard]:
        config = self.model.config
        sampling = asr.hearing_sampling(config)
        engine = Engine(self.model, self.task, self.slots, sampling=sampling)
        options = asr.HearingOptions(refresh_s=asr.refresh_s(config))
        broken: list[Heard] = []
        events: dict[Path, list[Event]] = {}

        def sessions() -> Iterator[asr.Hearing]:
            for path in paths:
                try:
                    sound = Sound(audio.frames(path))
                except InputError as error:
                    broken.append((path, error))
                    continue
                yield asr.Hearing(self.model, self.task, sound, options=options, name=path)

        for session, event in drive(engine, sessions()):
            yield from _taken(broken)
            events.setdefault(session.name, []).append(event)
            if isinstance(event, Failed):
                yield session.name, event.error
            elif isinstance(event, End):
                yield session.name, asr.collect(events.pop(session.name)).text
        yield from _taken(broken)


def _taken(waiting: list[Heard]) -> Iterator[Heard]:
    while waiting:
        yield waiting.pop()


# A command ----------------------------------------------------------------------------------------


class CommandJudge:
    """Any program that prints transcripts.

    With {input} in its command line it is run once per file, and all it prints is the transcript.
    Without, it is run once: it reads a path per line and answers each with a line, at once.
    """

    def __init__(self, command: str) -> None:
        self.words = shlex.split(command)
        if not self.words:
            raise UsageError("--judge command: names no program", "write command:'PROGRAM {input}'")
        self.facts = {"judge": "command", "command": command}

    def hear(self, paths: Iterable[Path]) -> Iterator[Heard]:
        if not any("{input}" in word for word in self.words):
            yield from self.line_by_line(paths)
            return
        for path in paths:
            try:
                yield path, self.one(path)
            except InputError as error:
                yield path, error

    def one(self, path: Path) -> str:
        """InputError if it fails on this file, UsageError if it does not even start."""
        filled = [re.sub(r"\{input\}", lambda _: str(path), word) for word in self.words]
        try:
            done = subprocess.run(
                filled, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=LIMIT_S, check=False,
            )  # fmt: skip
        except OSError as error:
            raise self._unstarted(error) from None
        except subprocess.TimeoutExpired:
            raise InputError(f"{path}: the judge did not end within {LIMIT_S:g} s") from None
        if done.returncode:
            raise InputError(f"{path}: the judge failed ({_last(done.stderr, done.returncode)})")
        return " ".join(done.stdout.split())

    def line_by_line(self, paths: Iterable[Path]) -> Iterator[Heard]:
        """A path in, a line out. MoshiError if it ends, or does not answer in time."""
        with tempfile.TemporaryFile("w+") as said:
            try:
                program = subprocess.Popen(
                    self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                    text=True,
                )  # fmt: skip
            except OSError as error:
                raise self._unstarted(error) from None
            assert program.stdin is not None and program.stdout is not None
            try:
                for path in paths:
                    clock = Timer(LIMIT_S, program.kill)
                    clock.start()
                    with suppress(BrokenPipeError):
                        program.stdin.write(f"{path}\n")
                        program.stdin.flush()
                    line = program.stdout.readline()
                    clock.cancel()
                    if not line:
                        code = program.wait()
                        said.seek(0)
                        raise MoshiError(f"{path}: the judge ended ({_last(said.read(), code)})")
                    yield path, " ".join(line.split())
            finally:
                program.kill()
                program.stdout.close()
                with suppress(BrokenPipeError):
                    program.stdin.close()
                program.wait()

    def _unstarted(self, error: OSError) -> UsageError:
        return UsageError(f"{self.words[0]}: cannot run ({error.strerror})")


def _last(said: str, code: int) -> str:
    """The last line of stderr, else the exit code."""
    return (said.strip().splitlines() or [f"exit code {code}"])[-1]
