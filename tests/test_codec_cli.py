"""`moshi codec` through the front door."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MIMI
from test_codes import load, make_codec
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import UsageError
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks import codes
from moshi_cli.tasks.codes import CodesInfo
from moshi_cli.tasks.codes_writer import CodesWriter

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved codecs and a few recordings."""
    folder = tmp_path_factory.mktemp("codec")
    for name, seed in {"model": 0, "other": 1}.items():
        save(Model(make_codec(seed), None, None, ModelConfig(mimi=TINY_MIMI), name), folder / name)
    noise = torch.Generator().manual_seed(0)
    for name, samples in {"a": 24_000, "b": 5000, "c": 1, "d": 1920 * 3}.items():
        audio.write(folder / f"{name}.wav", torch.rand(samples, generator=noise) - 0.5)
    return folder


@pytest.fixture
def moshi(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `moshi codec …` with the first codec in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", str(folder / "model"))
    return lambda *args, **extra: CliRunner().invoke(
        cli.app, ["codec", *[str(a) for a in args]], **extra
    )


# the command


def test_there_and_back(moshi: Invoke, folder: Path) -> None:
    done = moshi("encode", folder / "a.wav", "-o", "a.mimi", "-n", "3")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "1 s of audio in" in done.stderr
    mimi = make_codec(0)
    mimi.set_num_codebooks(3)
    x, reader = load("a.mimi")
    want = mimi.encode(audio.read(folder / "a.wav")[None])[0]
    assert torch.equal(x, want)
    assert (reader.samples, reader.info.codec) == (24_000, mimi.fingerprint)
    done = moshi("decode", "a.mimi", "-o", "a.wav", "--subtype", "float")
    assert done.exit_code == 0, done.stderr
    pcm = audio.read("a.wav")
    assert pcm.shape == (1, 24_000)
    assert torch.allclose(pcm, mimi.decode(want[None])[0, :, :24_000], atol=1e-5)
    assert sorted(os.listdir()) == ["a.mimi", "a.wav"]


@pytest.mark.parametrize("format", codes.FORMATS)
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_pipes_keep_every_sample(moshi: Invoke, folder: Path, name: str, format: str) -> None:
    sound = (folder / f"{name}.wav").read_bytes()
    there = moshi("encode", "-", "-o", "-", "--format", format, input=sound)
    assert there.exit_code == 0, there.stderr
    back = moshi("decode", "-", "-q", input=there.stdout_bytes)
    assert (back.exit_code, back.stderr) == (0, "")
    want = audio.read(folder / f"{name}.wav").shape
    assert audio.read(io.BytesIO(back.stdout_bytes)).shape == want
    assert moshi("encode", folder / f"{name}.wav", "-o", f"x.{format}").exit_code == 0
    assert torch.equal(load(f"x.{format}")[0], load(io.BytesIO(there.stdout_bytes))[0])
    if format == "jsonl":
        assert json.loads(there.stdout.splitlines()[-1])["type"] == "end"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_equal_single_runs(moshi: Invoke, folder: Path, size: int) -> None:
    names = [folder / f"{n}.wav" for n in "abcd"]
    done = moshi("encode", *names, "--output-dir", "codes", "--batch-size", size)
    assert done.exit_code == 0, done.stderr
    for name in names:
        moshi("encode", name, "-o", "one.mimi")
        assert load(f"codes/{name.stem}.mimi")[1].samples == load("one.mimi")[1].samples
        assert torch.equal(load(f"codes/{name.stem}.mimi")[0], load("one.mimi")[0])
    assert moshi("decode", "codes", "--output-dir", "sound", "--batch-size", size).exit_code == 0
    for name in names:
        moshi("decode", f"codes/{name.stem}.mimi", "-o", "one.wav")
        one, many = audio.read("one.wav"), audio.read(f"sound/{name.stem}.wav")
        assert torch.allclose(one, many, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_a_bad_recording_spoils_nothing(moshi: Invoke, folder: Path, size: int) -> None:
    audio.write("nan.wav", torch.full((30_000,), float("nan")), subtype="float")
    inputs = [folder / "a.wav", "nan.wav", "none.wav", folder / "b.wav", folder / "d.wav"]
    done = moshi("encode", *inputs, "--output-dir", "out", "--batch-size", size)
    assert done.exit_code == 3
    assert "error: nan.wav: sample 0 (0.000 s) is not a number (nan)" in done.stderr
    assert sorted(p.name for p in Path("out").glob("*.mimi*")) == ["a.mimi", "b.mimi", "d.mimi"]
    again = moshi("encode", *inputs, "--output-dir", "out", "--batch-size", size, "--resume")
    assert again.exit_code == 3
    assert "3 skipped" in again.stderr or "2 failed, 3 skipped" in again.stderr


def test_number_of_codebooks(moshi: Invoke, folder: Path) -> None:
    assert moshi("encode", folder / "a.wav", "-o", "x.mimi").exit_code == 0
    assert load("x.mimi")[0].shape == (4, 13)  # the tiny codec has no more
    assert moshi("encode", folder / "a.wav", "-o", "x.mimi", "-b", "0.1").exit_code == 0
    assert load("x.mimi")[0].shape == (2, 13)  # 12.5 Hz x 4 bit = 50 bit/s each
    for wrong in (["-n", "5"], ["-b", "9"], ["-n", "2", "-b", "0.1"], ["-n", "0"]):
        done = moshi("encode", folder / "a.wav", "-o", "y.mimi", *wrong)
        assert done.exit_code == 2
        assert not Path("y.mimi").exists()
    moshi("encode", folder / "a.wav", "-o", "x.mimi")
    assert moshi("decode", "x.mimi", "-o", "4.wav").exit_code == 0
    assert moshi("decode", "x.mimi", "-o", "1.wav", "-n", "1").exit_code == 0
    assert Path("1.wav").read_bytes() != Path("4.wav").read_bytes()


def test_codes_of_another_codec(moshi: Invoke, folder: Path) -> None:
    moshi("encode", folder / "b.wav", "-o", "b.mimi", "--model", folder / "other")
    done = moshi("decode", "b.mimi", "-o", "b.wav")
    assert done.exit_code == 4
    assert "was encoded with another codec" in done.stderr
    assert "--force" in done.stderr
    assert not Path("b.wav").exists()
    assert moshi("decode", "b.mimi", "-o", "b.wav", "--force").exit_code == 0
    with CodesWriter("c.mimi", CodesInfo(2, 2048)) as out:
        out.write(torch.zeros(2, 1, dtype=torch.long), 1)
    assert moshi("decode", "c.mimi", "-o", "c.wav", "--force").exit_code == 4


def test_truncated_codes_are_decoded_with_a_warning(moshi: Invoke, folder: Path) -> None:
    moshi("encode", folder / "a.wav", "-o", "a.mimi")
    Path("a.mimi").write_bytes(Path("a.mimi").read_bytes()[: 48 + 5 * 2])
    done = moshi("decode", "a.mimi", "-o", "a.wav")
    assert done.exit_code == 0
    assert "warning: a.mimi: truncated: 0.40 s of 1.00 s are there" in done.stderr
    assert audio.read("a.wav").shape == (1, 5 * 1920)


def test_roundtrip(moshi: Invoke, folder: Path) -> None:
    done = moshi("roundtrip", folder / "a.wav", "-o", "x.wav", "-n", "2", "--metrics")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record.keys() >= {"id", "codebooks", "bitrate", "si_sdr_db", "snr_db", "mel_db"}
    moshi("encode", folder / "a.wav", "-o", "a.mimi", "-n", "2")
    moshi("decode", "a.mimi", "-o", "a.wav")
    assert torch.allclose(audio.read("a.wav"), audio.read("x.wav"), atol=1e-4)
    before = sorted(os.listdir())
    assert moshi("roundtrip", folder / "a.wav", "--metrics").exit_code == 0
    assert sorted(os.listdir()) == before
    done = moshi("roundtrip", folder / "a.wav", "-o", "-", "--metrics")
    assert done.exit_code == 2
    assert moshi("roundtrip", folder / "a.wav", "-o", "-").stdout_bytes[:4] == b"RIFF"


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "raw"])
def test_sound_formats(moshi: Invoke, folder: Path, suffix: str) -> None:
    moshi("encode", folder / "b.wav", "-o", "b.mimi")
    assert moshi("decode", "b.mimi", "-o", f"b.{suffix}").exit_code == 0
    raw = "s16le" if suffix == "raw" else None
    assert audio.read(f"b.{suffix}", input_format=raw).shape == (1, 5000)
    assert moshi("decode", "b.mimi", "--output-dir", "o", "--format", suffix).exit_code == 0
    assert Path(f"o/b.{suffix}").exists()


def test_info(moshi: Invoke, folder: Path) -> None:
    for format in codes.FORMATS:
        moshi("encode", folder / "b.wav", "-o", f"b.{format}")
        record = json.loads(moshi("info", f"b.{format}", "--json").stdout)
        assert (record["format"], record["samples"], record["frames"]) == (format, 5000, 3)
        assert (record["codebooks"], record["bitrate"], record["warnings"]) == (4, 200.0, [])
    shown = moshi("info", "b.mimi").stdout
    assert "seconds:       0.2083\n" in shown
    assert moshi("info", folder / "a.wav").exit_code == 2


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["encode", "a.wav", "--model", "nowhere"], 4, "no model at 'nowhere'"),
        (["encode", "a.wav", "b.wav"], 2, "several results need a folder"),
        (["encode", "a.wav", "-o", "x.mp3"], 2, "unknown code format '.mp3'"),
        (["encode", "a.wav", "-o", "x.mimi", "--channel", "separate"], 2, "one channel"),
        (["encode", "a.wav", "-o", "x.mimi", "--device", "tpu"], 4, "no device 'tpu'"),
        (["decode", "a.wav", "-o", "x.wav"], 2, "holds no codes"),
        (["decode", "a.mimi", "-o", "x.mp3"], 2, "unknown audio format '.mp3'"),
        (["decode", "none.mimi", "-o", "x.wav"], 2, "none.mimi: no such file"),
        (["info", "none.mimi"], 2, "none.mimi: no such file"),
        (["encode"], 2, "no input"),
    ],
)
def test_refusals(moshi: Invoke, folder: Path, args: list[str], code: int, message: str) -> None:
    for name in ("a.wav", "b.wav"):
        Path(name).write_bytes((folder / name).read_bytes())
    done = moshi(*args)
    assert done.exit_code == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(Path().glob("x.*"))


def test_binary_is_not_poured_onto_a_terminal(
    moshi: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moshi_cli.console import Console

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(UsageError, match="does not go to a terminal"):
        Console("codec encode").refuse_terminal(True)
    Console("codec encode").refuse_terminal(False)


def test_frame_by_frame_through_processes(folder: Path) -> None:
    """`… | moshi codec encode - -o - | moshi codec decode - -o - | …` passes each 80 ms on."""
    env = {**os.environ, "MOSHI_MODEL": str(folder / "model"), "OMP_NUM_THREADS": "1"}

    def start(direction: str, stdin: Any, *args: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moshi_cli", "codec", direction, "-", "-o", "-", *args]
        return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, env=env)

    first = start("encode", subprocess.PIPE, "--input-format", "s16le", "-q")
    second = start("decode", first.stdout, "-q")
    assert first.stdin is not None
    assert second.stdout is not None
    head = 44
    for _ in range(3):
        first.stdin.write(bytes(3840))
        first.stdin.flush()
        assert len(second.stdout.read(head + 3840)) == head + 3840  # would hang here
        head = 0
    first.stdin.write(bytes(200))
    first.stdin.close()
    assert len(second.stdout.read()) == 200
    assert (first.wait(60), second.wait(60)) == (0, 0)


def test_a_reader_that_leaves(folder: Path, tmp_path: Path) -> None:
    env = {**os.environ, "MOSHI_MODEL": str(folder / "model"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "moshi_cli",
        "codec",
        "roundtrip",
        "-",
        "--input-format",
        "s16le",
    ]
    with (tmp_path / "err").open("w+") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, env=env
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(bytes(3840))
        child.stdin.flush()
        child.stdout.read(44 + 3840)
        child.stdout.close()
        try:
            for _ in range(1000):
                child.stdin.write(bytes(3840))
                child.stdin.flush()
            child.stdin.close()
        except BrokenPipeError:
            pass
        assert child.wait(60) == 141
        err.seek(0)
        assert "rror" not in err.read()
