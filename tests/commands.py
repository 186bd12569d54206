"""Two commands made for the tests, and a fixture that runs the command line with them."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.batch import Result, Run
from moshi_cli.core import audio
from moshi_cli.core import errors as kinds
from moshi_cli.core.files import write_text
from moshi_cli.inputs import Item
from moshi_cli.options import AudioOptions, BatchOptions, Inputs, LogOptions, spread

Invoke = Callable[..., Any]


@spread
def count(
    inputs: Inputs = None,
    *,
    word_times: bool = False,
    reading: AudioOptions,
    batch: BatchOptions,
    log: LogOptions,
) -> int:
    """A command of the shared kind: how many samples each recording has."""
    run = Run("count", inputs, batch, log.console("count"), suffixes=[".txt"], many_to_stdout=True)

    def one(item: Item) -> Result:
        if item.id == "boom":
            raise RuntimeError("what a mess")
        feed = run.feed(item, **reading.reader())
        for _ in feed:
            if item.id == "twice.wav" or (item.id == "press.wav" and feed.samples == 1920):
                os.kill(os.getpid(), signal.SIGINT)
            if word_times:
                print("frame", file=sys.stderr, flush=True)
        target = run.destination.path(item, ".txt")
        write_text(target, f"{item.name} {feed.samples}\n")
        return Result(item, [target], feed.samples / 24_000)

    return run.each(one, {"reading": reading})


def fail(kind: str) -> None:
    """Raise something."""
    raise {
        "usage": kinds.UsageError("it broke", "mend it"),
        "model": kinds.ModelError("it broke"),
        "memory": kinds.MemoryLimitError("it broke"),
        "device": kinds.DeviceError("it broke"),
        "moshi": kinds.MoshiError("it broke"),
        "python": MemoryError(),
        "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        "os": FileNotFoundError(2, "No such file or directory", "gone.txt"),
        "pipe": BrokenPipeError(32, "Broken pipe"),
        "ctrl-c": KeyboardInterrupt(),
        "bug": ValueError("two\nlines"),
    }[kind]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """Run the command with two more subcommands, in a folder with three recordings."""
    for name, function in {"count": count, "fail": fail}.items():
        module = types.ModuleType(f"moshi_cli.{name}")
        module.command = function  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec(f"moshi_cli.{name}", None)
        monkeypatch.setitem(sys.modules, f"moshi_cli.{name}", module)
        monkeypatch.setitem(cli.COMMANDS, name, "For this test.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for index, name in enumerate(("a.wav", "b.wav", "sub/a.wav"), 1):
        Path(name).parent.mkdir(exist_ok=True)
        audio.write(name, torch.zeros(1000 * index))
    return lambda *args, **extra: CliRunner().invoke(cli.app, [str(a) for a in args], **extra)
