"""The command line as such: help, errors, exit codes, many inputs, resume, Ctrl-C, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
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
from moshi_cli.inputs import Item, expand, take_shard
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


def python(*args: str, **extra: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moshi_cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **extra)


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


# inputs


def names(*args: Any, **extra: Any) -> list[str]:
    return [item.name for item in expand(*args, **extra)]


def test_inputs_are_named_apart(invoke: Invoke, tmp_path: Path) -> None:
    assert names(["a.wav", "b.wav"]) == ["a", "b"]
    assert names(["a.wav", "a.wav", "./a.wav"]) == ["a"]
    assert names(["a.wav", "sub/a.wav", "b.wav"]) == ["a", "sub/a", "b"]
    Path("a.flac").touch()
    assert names(["a.wav", "a.flac"]) == ["a.wav", "a.flac"]
    assert names([f"{tmp_path}/sub", "a.wav"]) == ["sub/a", "a"]
    assert names(["."]) == ["a.flac", "a.wav", "b"]
    assert names(["."], include=["*.wav"], recursive=True) == ["a", "b", "sub/a"]
    assert names(["**/*.wav"]) == names(["a.wav", "b.wav", "sub/a.wav"])
    Path("list.txt").write_text("b.wav\n\nsub\n")
    assert names(["@list.txt"]) == ["b", "a"]
    assert names(["-", "a.wav"]) == ["stdin", "a"]
    assert len({n.casefold() for n in names(["A.wav", "a.wav", "sub/a.wav", "sub/a.wav"])}) == 3


def test_manifest(invoke: Invoke) -> None:
    lines = [
        {"path": "a.wav", "duration": 1.0}, {"audio_filepath": "b.wav", "text": "hi"},
        {"id": "x/../../y z", "audio": "sub/a.wav"}, {"id": "t", "text": "say this"},
        {"text": "and that", "voice": "v"}, {"id": "a", "path": "b.wav"},
    ]  # fmt: skip
    Path("m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    items = expand(None, manifest="m.jsonl")
    assert [i.record for i in items] == lines
    assert [i.source for i in items] == ["a.wav", "b.wav", "sub/a.wav", None, None, "b.wav"]
    assert len({i.name for i in items}) == 6
    assert not any(".." in i.name or i.name.startswith("/") for i in items)
    for bad in ("nonsense", "[1]", '{"id": "x"}'):
        Path("m.jsonl").write_text(bad)
        with pytest.raises(kinds.UsageError, match=r"m\.jsonl: line 1"):
            expand(None, manifest="m.jsonl")


def test_manifest_paths_are_beside_it(invoke: Invoke) -> None:
    Path("sub/m.jsonl").write_text('{"path": "a.wav"}')
    assert expand(None, manifest="sub/m.jsonl")[0].source == os.path.join("sub", "a.wav")


def test_shards_share_the_work() -> None:
    items = [Item(str(i), None, str(i)) for i in range(7)]
    parts = [take_shard(items, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(i.id for part in parts for i in part) == [i.id for i in items]


def test_seeds_belong_to_items() -> None:
    a, b = Item("a", None, "x"), Item("b", None, "x")
    assert a.seed(1) == Item("a", "y", "z").seed(1)
    assert len({a.seed(1), b.seed(1), a.seed(2)}) == 3


# runs


def test_one_input_goes_to_stdout(invoke: Invoke) -> None:
    done = invoke("count", "a.wav")
    assert (done.exit_code, done.stdout) == (0, "a 1000\n")
    assert done.stderr.startswith("moshi count: 0.04 s of audio in")
    assert invoke("count", "a.wav", "-q").stderr == ""


def test_stdin(invoke: Invoke) -> None:
    done = invoke("count", "-", "--input-format", "s16le", input=bytes(5000))
    assert done.stdout == "stdin 2500\n"


@pytest.mark.parametrize("place", [["-o", "out/"], ["--output-dir", "out"]])
def test_a_folder_is_mirrored(invoke: Invoke, place: list[str]) -> None:
    done = invoke("count", ".", "-r", *place)
    assert (done.exit_code, done.stdout) == (0, "")
    assert Path("out/sub/a.txt").read_text() == "sub/a 3000\n"
    assert not list(Path("out").rglob("*.tmp.*"))
    lines = [json.loads(x) for x in Path("out/moshi-count.journal.jsonl").read_text().splitlines()]
    assert [x["outputs"] for x in lines] == [["a.txt"], ["b.txt"], ["sub/a.txt"]]
    assert {x["status"] for x in lines} == {"ok"}
    assert lines[0]["size"] == Path("a.wav").stat().st_size


def test_bad_items_do_not_stop_the_others(invoke: Invoke) -> None:
    Path("b.wav").write_text("no sound at all")
    done = invoke("count", "a.wav", "b.wav", "none.wav", "sub/a.wav", "--output-dir", "out")
    assert done.exit_code == 3
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert lines == [
        "moshi count: error: b.wav: is text, not audio",
        "moshi count: error: none.wav: no such file",
    ]
    assert len(list(Path("out").rglob("*.txt"))) == 2
    done = invoke("count", "b.wav", "a.wav", "--output-dir", "fast", "--fail-fast")
    assert done.exit_code == 1
    assert not list(Path("fast").glob("*.txt"))
    assert invoke("count", "b.wav", "none.wav", "--output-dir", "out").exit_code == 1
    assert invoke("count", "b.wav").exit_code == 2


def done_items(done: Any) -> dict[str, str]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["type"] == "ready"
    assert lines[-1]["type"] == "summary"
    return {line["id"]: line["status"] for line in lines[1:-1]}


def test_resume(invoke: Invoke) -> None:
    again = ["count", "a.wav", "b.wav", "sub/a.wav", "--output-dir", "out", "--status", "jsonl"]
    Path("b.wav").write_text("no sound at all")
    assert invoke(*again).exit_code == 3
    before = Path("out/moshi-count.journal.jsonl").read_text()

    done = invoke(*again, "--resume")
    assert done.exit_code == 3
    assert done_items(done) == {"a.wav": "skipped", "b.wav": "failed", "sub/a.wav": "skipped"}
    assert "failed before, --retry-failed tries again" in done.stderr
    assert Path("out/moshi-count.journal.jsonl").read_text() == before

    audio.write("b.wav", torch.zeros(50))  # mended: another file now
    assert done_items(invoke(*again, "--resume"))["b.wav"] == "ok"
    Path("out/b.txt").unlink()  # a result that went away
    assert done_items(invoke(*again, "--resume"))["b.wav"] == "ok"
    other = done_items(invoke(*again, "--resume", "--channel", "left"))  # other settings
    assert set(other.values()) == {"ok"}


def test_retry_failed(invoke: Invoke) -> None:
    again = ["count", "a.wav", "none.wav", "--output-dir", "out", "--status", "jsonl"]
    invoke(*again)
    assert "failed before" in invoke(*again, "--resume").stderr
    done = invoke(*again, "--retry-failed")
    assert "none.wav: no such file" in done.stderr
    assert done_items(done)["a.wav"] == "skipped"


def test_resume_without_a_journal_keeps_what_exists(invoke: Invoke) -> None:
    Path("out").mkdir()
    Path("out/a.txt").write_text("mine")
    done = invoke("count", "a.wav", "b.wav", "--output-dir", "out", "--resume")
    assert done.exit_code == 0
    assert Path("out/a.txt").read_text() == "mine"
    assert Path("out/b.txt").exists()


@pytest.mark.parametrize(
    ("existing", "code", "text"),
    [("overwrite", 0, "a 1000\n"), ("skip", 0, "x"), ("error", 2, "x")],
)
def test_existing(invoke: Invoke, existing: str, code: int, text: str) -> None:
    Path("o.txt").write_text("x")
    done = invoke("count", "a.wav", "-o", "o.txt", "--existing", existing)
    assert (done.exit_code, Path("o.txt").read_text()) == (code, text)


def test_shards_have_journals_of_their_own(invoke: Invoke) -> None:
    inputs = ["a.wav", "b.wav", "sub/a.wav"]
    for shard in ("1/2", "2/2"):
        assert invoke("count", *inputs, "--output-dir", "out", "--shard", shard).exit_code == 0
    assert len(list(Path("out").glob("moshi-count.journal.*-of-2.jsonl"))) == 2
    done = invoke("count", *inputs, "--output-dir", "out", "--resume", "--status", "jsonl")
    assert set(done_items(done).values()) == {"skipped"}


def test_paths_on_stdin(invoke: Invoke) -> None:
    done = invoke(
        "count", "--stdin-paths", "--output-dir", "out", input="a.wav\nnone.wav\nsub/a.wav\n"
    )
    assert done.exit_code == 3
    assert done_items(done) == {"a.wav": "ok", "none.wav": "failed", "sub/a.wav": "ok"}
    item = json.loads(done.stdout.splitlines()[1])
    assert item["outputs"] == [os.path.join("out", "a.txt")]
    assert item["audio_s"] == 0.042
    assert len(list(Path("out").rglob("*.txt"))) == 2


def test_a_bug_is_not_a_bad_item(invoke: Invoke) -> None:
    done = invoke("count", "a.wav", "boom", "b.wav", "--output-dir", "out")
    assert done.exit_code == 1
    assert "internal error: RuntimeError: what a mess" in done.stderr


def test_progress_as_json(invoke: Invoke) -> None:
    done = invoke("count", "a.wav", "b.wav", "--output-dir", "out", "--progress", "json")
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert lines[-1]["done"] == lines[-1]["items"] == 2
    assert lines[-1]["total_s"] == pytest.approx(0.125, abs=0.01)
    assert "RTF" in invoke("count", "a.wav", "--progress", "always").stderr


def test_first_interrupt_finishes_what_is_begun(invoke: Invoke) -> None:
    audio.write("press.wav", torch.zeros(24_000))
    done = invoke("count", "a.wav", "press.wav", "b.wav", "--output-dir", "out")
    assert done.exit_code == 130
    heard = int(Path("out/press.txt").read_text().split()[1])
    assert 1920 <= heard <= 24_000
    assert not Path("out/b.txt").exists()
    lines = [json.loads(x) for x in Path("out/moshi-count.journal.jsonl").read_text().splitlines()]
    assert [x["status"] for x in lines] == ["ok", "interrupted"]
    assert "interrupted: finishing" in done.stderr
    lines = done_items(
        invoke("count", "a.wav", "b.wav", "--output-dir", "out", "--resume", "--status", "jsonl")
    )
    assert lines == {"a.wav": "skipped", "b.wav": "ok"}


def test_second_interrupt_aborts(invoke: Invoke) -> None:
    audio.write("twice.wav", torch.zeros(24_000))
    done = invoke("count", "a.wav", "twice.wav", "b.wav", "--output-dir", "out")
    assert done.exit_code == 130
    assert [p.name for p in Path("out").glob("*.txt*")] == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_while_waiting_for_a_pipe(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a live recording: everything heard is in the result, exit 130."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_cli, typer, types\n"
        "from importlib.machinery import ModuleSpec\n"
        "m = types.ModuleType('moshi_cli.count'); m.command = test_cli.count\n"
        "m.__spec__ = ModuleSpec('moshi_cli.count', None); sys.modules[m.__name__] = m\n"
        "test_cli.cli.COMMANDS['count'] = 'x'\n"
        "test_cli.cli.app(['count', '-', '--input-format', 's16le', '-o', 'x.txt',"
        " '--word-times'])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)], cwd=tmp_path,
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(bytes(2 * 5000))
    child.stdin.flush()
    assert child.stderr is not None
    for _ in range(2):
        assert child.stderr.readline() == b"frame\n"  # the rest is not a whole frame: it waits
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert (tmp_path / "x.txt").read_text() == "stdin 5000\n"
