"""The command line as such: help, errors, exit codes, settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Invoke, invoke

from moshi_cli import app as cli
from moshi_cli.core import audio

__all__ = ["invoke"]  # a fixture


# help


def test_help_loads_neither_torch_nor_other_commands() -> None:
    code = (
        "import sys\nfrom moshi_cli.app import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in"
        " ('torch', 'numpy', 'soundfile', 'rich', 'tqdm', 'moshi_cli')), file=sys.stderr)"
    )
    for args in (["--help"], ["codec", "encode", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "Usage: moshi" in done.stdout
        loaded = set(eval(done.stderr))
        assert not loaded & {"torch", "numpy", "soundfile", "rich", "tqdm"}
        commands = {name for name in cli.COMMANDS if f"moshi_cli.{name}" in loaded}
        assert commands == ({"codec"} if "codec" in args else set())


def test_help_names_every_command(invoke: Invoke) -> None:
    shown = invoke("--help").stdout
    assert all(f"  {name} " in shown for name in ("codec", "models", "doctor", "count"))


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"moshi {cli.__version__}\n"


def test_nothing_at_all_is_helped(invoke: Invoke) -> None:
    done = invoke()
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage: moshi" in done.stderr


# errors


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("usage", 2, "error: it broke\nmoshi fail: hint: mend it"), ("model", 4, "error: it broke"),
        ("memory", 5, "error: it broke"), ("device", 6, "error: it broke"),
        ("moshi", 1, "error: it broke"), ("python", 5, "error: out of memory"),
        ("cpu", 5, "error: out of memory"), ("cuda", 5, "error: out of memory"),
        ("os", 1, "error: gone.txt: No such file or directory"), ("pipe", 141, ""),
        ("ctrl-c", 130, "error: interrupted"),
        ("bug", 1, "error: internal error: ValueError: two lines"),
    ],
)  # fmt: skip
def test_failures_are_one_line_and_a_code(invoke: Invoke, kind: str, code: int, line: str) -> None:
    done = invoke("fail", kind)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(f"moshi fail: {line}" if line else "")
    assert len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr


def test_tracebacks_on_demand(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in invoke("--debug", "fail", "bug").stderr
    monkeypatch.setenv("MOSHI_DEBUG", "1")
    done = invoke("fail", "model")
    assert "Traceback" in done.stderr
    assert done.exit_code == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "moshi: error: no such command 'nonsense'"),
        (["conut"], "moshi: error: no such command 'conut', did you mean 'count'?"),
        (["count", "a.wav", "--nonsense"], "moshi count: error: no such option: --nonsense"),
        (["count", "--channel"], "moshi count: error: option '--channel' requires an argument"),
        (["count", "a.wav", "--progress", "some"], "moshi count: error: invalid value for"),
        (["count"], "moshi count: error: no input"),
        (["count", "True"], "moshi count: error: 'True' is not an input"),
        (["count", "*.mp3"], "moshi count: error: *.mp3: no file matches"),
        (["count", "a.wav", "--resume"], "moshi count: error: --resume needs --output-dir"),
        (["count", "a.wav", "b.wav", "-o", "x.txt"], "moshi count: error: several results"),
        (["count", "a.wav", "-o", "x", "--output-dir", "y"], "moshi count: error: -o is for one"),
        (["count", "@list.txt"], "moshi count: error: list.txt: cannot read the list"),
        (["count", "a.wav", "--shard", "0/2"], "moshi count: error: --shard 0/2 makes no sense"),
        (["count", "a.wav", "--status", "jsonl"], "moshi count: error: stdout is taken"),
    ],
)
def test_usage_errors(invoke: Invoke, args: list[str], message: str) -> None:
    done = invoke(*args)
    assert done.exit_code == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) <= 2
    assert not done.stdout


def test_errors_as_json(invoke: Invoke) -> None:
    done = invoke("count", "none.wav", "--log-format", "json")
    assert json.loads(done.stderr)["message"] == "none.wav: no such file"


def test_underscores_are_hyphens(invoke: Invoke) -> None:
    assert invoke("count", "a.wav", "--word_times", "--input_channels", "1", "-q").exit_code == 0


# settings


def test_settings_are_defaults(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    audio.write("two.wav", torch.stack([torch.zeros(100), torch.ones(100)]))
    Path("s.toml").write_text('channel = "nonsense"\n[count]\nword-times = true\nquiet = true\n')
    done = invoke("count", "two.wav", "--settings", "s.toml")
    assert "unknown channel 'nonsense'" in done.stderr
    done = invoke("count", "two.wav", "--settings", "s.toml", "--channel", "left")
    assert (done.exit_code, done.stderr) == (0, "frame\n")  # flags win
    Path("moshi").mkdir()
    Path("s.toml").rename("moshi/config.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", os.getcwd())
    assert "unknown channel 'nonsense'" in invoke("count", "two.wav").stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "cannot read the settings"), ("count = 3", "'count' must be a section"),
        ("[count]\nchanel = 'left'", "[count]: there is no option 'chanel'"),
    ],
)  # fmt: skip
def test_broken_settings(invoke: Invoke, text: str, message: str) -> None:
    Path("s.toml").write_text(text)
    done = invoke("count", "a.wav", "--settings", "s.toml")
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[0]
    assert invoke("count", "a.wav", "--settings", "none.toml").exit_code == 2
