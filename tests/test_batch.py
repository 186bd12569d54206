"""Many inputs: names, manifests, journal, resume, shards, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Invoke, invoke

from moshi_cli.core import audio
from moshi_cli.core import errors as kinds
from moshi_cli.inputs import Item, expand, take_shard

__all__ = ["invoke"]  # a fixture


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


COUNT = """\
import sys; sys.path.insert(0, sys.argv[1]); import commands, types
from importlib.machinery import ModuleSpec
m = types.ModuleType('moshi_cli.count'); m.command = commands.count
m.__spec__ = ModuleSpec('moshi_cli.count', None); sys.modules[m.__name__] = m
commands.cli.COMMANDS['count'] = 'x'
"""  # a process of its own, with the command


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_in_the_middle_of_a_line(invoke: Invoke) -> None:
    """A handler cannot write to a stream that is being written to: it must not fail for that."""
    code = COUNT + (
        "import io, os, signal\n"
        "class Raw(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, part):\n"
        "        if bytes(part) == b'frame\\n': os.kill(os.getpid(), signal.SIGINT)\n"
        "        return os.write(2, part)\n"
        "sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw()), line_buffering=True)\n"
        "commands.cli.app(['count', 'a.wav', 'b.wav', '--output-dir', 'out', '--word-times'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert b"frame\n" in done.stderr
    assert b"internal error" not in done.stderr
    assert Path("out/a.txt").is_file()
    assert not Path("out/b.txt").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_while_waiting_for_a_pipe(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a live recording: everything heard is in the result, exit 130."""
    code = COUNT + (
        "commands.cli.app(['count', '-', '--input-format', 's16le', '-o', 'x.txt',"
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
    heard = (tmp_path / "x.txt").read_text()  # by whether it waits already when the signal comes
    assert heard in ("stdin 5000\n", "stdin 3840\n")
