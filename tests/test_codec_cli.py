"""`moshi codec` through the front door, and the code formats beneath it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MIMI
from torch import Tensor
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio
from moshi_cli.core.config import MimiConfig, ModelConfig
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks import codec, codes
from moshi_cli.tasks.codes import CodesInfo, pack, unpack
from moshi_cli.tasks.codes_reader import CodesReader
from moshi_cli.tasks.codes_writer import CodesWriter

Invoke = Callable[..., Any]


def make_codec(seed: int, config: MimiConfig = TINY_MIMI) -> Mimi:
    """A codec with random weights whose codebooks are in use."""
    torch.manual_seed(seed)
    mimi = Mimi(config).eval().requires_grad_(False)
    for name, module in mimi.named_modules():
        if name.endswith("layers.0") or ".layers." in name:
            if hasattr(module, "embedding_sum"):
                module.embedding_sum.normal_()
                module.refresh()
    return mimi


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


def load(path: Path | str) -> tuple[Tensor, CodesReader]:
    """All codes of a file, and the reader at its end."""
    reader = CodesReader(path)
    return torch.cat(list(reader), 1), reader


# formats


@pytest.mark.parametrize(("books", "size"), [(1, 2048), (8, 2048), (32, 2048), (3, 16), (5, 1000)])
def test_packing(books: int, size: int) -> None:
    info = CodesInfo(books, size)
    x = torch.randint(size, (books, 7))
    data = pack(x, info.code_bits)
    assert len(data) == 7 * info.frame_bytes
    assert torch.equal(unpack(data, books, info.code_bits), x)
    if (books, size) == (8, 2048):
        assert (info.bitrate, info.frame_bytes) == (1100.0, 11)


@pytest.mark.parametrize("format", codes.FORMATS)
@pytest.mark.parametrize("samples", [1, 1919, 1920, 1921, 9600])
@pytest.mark.parametrize("live", [False, True])
def test_codes_survive(tmp_path: Path, format: str, samples: int, live: bool) -> None:
    info = CodesInfo(3, 2048, codec="ab" * 16)
    frames = info.frames(samples)
    x = torch.randint(2048, (3, frames))
    target = io.BytesIO() if live else tmp_path / f"x.{format}"
    with CodesWriter(target, info, format) as out:
        for t in range(frames):
            out.write(x[:, t : t + 1], min(samples, (t + 1) * 1920))
    source = io.BytesIO(target.getvalue()) if isinstance(target, io.BytesIO) else target
    y, reader = load(source)
    assert torch.equal(x, y)
    assert (reader.samples, reader.info.codec, reader.warnings) == (samples, "ab" * 16, [])
    if not live and format != "jsonl":
        assert reader.info.samples == samples  # known before the end


class Slow(io.RawIOBase):
    """A pipe of single bytes that counts what was taken."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read1(self, limit: int = -1) -> bytes:
        self.at += 1
        return self.data[self.at - 1 : self.at]


@pytest.mark.parametrize("samples", [1920 * 4, 1920 * 3 + 5])
def test_a_pipe_gives_each_frame_at_once_and_its_length_in_time(samples: int) -> None:
    sink = io.BytesIO()
    x = torch.randint(2048, (8, 4))
    with CodesWriter(sink, CodesInfo(8, 2048), "mimi") as out:
        out.write(x, samples)
    pipe = Slow(sink.getvalue())
    reader = CodesReader(pipe)
    for t in range(4):
        assert torch.equal(next(reader), x[:, t : t + 1])
        extra = 20 if t == 3 and samples % 1920 else 0
        assert pipe.at == 48 + 11 * (t + 1) + extra
        if t == 3 and extra:
            assert reader.samples == samples
    assert next(reader, None) is None
    assert (reader.samples, reader.warnings) == (samples, [])


def test_frames_that_look_like_the_mark() -> None:
    data = codes.MARK + bytes(3)  # a frame of eight books that begins like the mark
    x = unpack(data * 3, 8, 11)
    sink = io.BytesIO()
    with CodesWriter(sink, CodesInfo(8, 2048), "mimi") as out:
        out.write(x, 3 * 1920)
    y, reader = load(io.BytesIO(sink.getvalue()))
    assert torch.equal(x, y)
    assert reader.samples == 3 * 1920
    small = torch.randint(2, (1, 500)) * 11  # one byte per frame, often the mark's first
    sink = io.BytesIO()
    with CodesWriter(sink, CodesInfo(1, 16), "mimi") as out:
        out.write(small, 500 * 1920)
    assert torch.equal(load(io.BytesIO(sink.getvalue()))[0], small)


def cut(data: bytes, keep: int) -> tuple[Tensor, CodesReader]:
    return load(io.BytesIO(data[:keep]))


def test_truncated_codes_give_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.mimi"
    x = torch.randint(2048, (8, 5))
    with CodesWriter(path, CodesInfo(8, 2048)) as out:
        out.write(x, 5 * 1920 - 7)
    data = path.read_bytes()
    y, reader = cut(data, 48 + 3 * 11 + 4)
    assert torch.equal(y, x[:, :3])
    assert reader.warnings == [
        "ends in the middle of a frame", "truncated: 0.24 s of 0.40 s are there"
    ]  # fmt: skip
    for keep in (0, 3, 20, 47, 48, 50):
        with pytest.raises(InputError):
            cut(data, keep)
    sink = io.BytesIO()
    with CodesWriter(sink, CodesInfo(8, 2048)) as out:
        out.write(x, 5 * 1920)
    y, reader = cut(sink.getvalue(), 48 + 5 * 11)
    assert torch.equal(y, x)
    assert reader.samples == 5 * 1920
    assert reader.warnings == ["has no end: the true length is not known"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"), (b"plain words", "holds no codes"), (b"RIFF1234WAVE", "holds no codes"),
        (b"MIMI\x02" + bytes(60), "version 2"), (b"MIMI\x01\0\x30\0" + bytes(60), "no sense"),
        (b"PK\3\4nonsense", "broken npz"), (b"\x10\0\0\0\0\0\0\0{nonsense", "broken safetensors"),
        (b"{}\n", "no sense"), (b'{"codebooks": "x"}\n', "no number"), (b"{nonsense\n", "line 1"),
        (b'{"codebooks": 2, "codebook_size": 9}\n{"codes": [1]}\n', "frame 0 is not 2 codes"),
        (b'{"codebooks": 1, "codebook_size": 9}\n{"codes": [9]}\n', "code 9 does not exist"),
        (b'{"codebooks": 1, "codebook_size": 9}\n{"codes": [-1]}\n', "code -1 does not exist"),
        (b'{"codebooks": 1, "codebook_size": 9}\n', "holds no frames"),
    ],
)  # fmt: skip
def test_broken_codes(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(io.BytesIO(data))


def test_arrays_of_others(tmp_path: Path) -> None:
    x = np.arange(12).reshape(1, 3, 4)
    np.savez(tmp_path / "x.npz", codes=x)
    y, reader = load(tmp_path / "x.npz")
    assert np.array_equal(y.numpy(), x[0])
    assert (reader.info.codebooks, reader.info.codebook_size, reader.info.codec) == (3, 2048, "")
    np.savez(tmp_path / "x.npz", codes=x[0].T, axes="frame,codebook")
    assert np.array_equal(load(tmp_path / "x.npz")[0].numpy(), x[0])
    for bad in ({"other": x}, {"codes": x[0, 0]}, {"codes": x * 0.5}):
        np.savez(tmp_path / "x.npz", **bad)
        with pytest.raises(InputError):
            load(tmp_path / "x.npz")


# the coder


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_streams_equal_the_whole(chunk: int) -> None:
    mimi = make_codec(0)
    wav = torch.rand(1, 20 * 1920) - 0.5
    whole = mimi.encode(wav[None])[0]
    got = torch.cat(list(codec.encode(mimi, wav.split(chunk * 1920, 1))), 1)
    assert torch.equal(got, whole)
    pcm = torch.cat(list(codec.decode(mimi, whole.split(chunk, 1))), 1)
    assert torch.allclose(pcm, mimi.decode(whole[None])[0], atol=1e-5)


class Script:
    """A job of a given length that records what comes back."""

    def __init__(self, chunk: Tensor, unit: int) -> None:
        self.left, self.unit, self.got = chunk, unit, []

    def pull(self, frames: int) -> Tensor | None:
        now, self.left = self.left[:, : frames * self.unit], self.left[:, frames * self.unit :]
        return now if now.shape[1] else None

    def push(self, out: Tensor) -> None:
        self.got.append(out)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 4])
def test_company_changes_nothing(slots: int, frames: int) -> None:
    mimi = make_codec(0)
    waves = [torch.rand(1, n * 1920) - 0.5 for n in (5, 1, 9, 2, 12)]
    jobs = [Script(w, 1920) for w in waves]
    ended = [
        job
        for job, error in codec.drive(
            codec.Coder(mimi, "encode", slots=slots, frames=frames), iter(jobs)
        )
    ]
    assert {id(j) for j in ended} == {id(j) for j in jobs}
    found = [torch.cat(job.got, 1) for job in jobs]
    for wav, got in zip(waves, found, strict=True):
        assert torch.equal(got, mimi.encode(wav[None])[0])
    back = [Script(x, 1) for x in found]
    list(codec.drive(codec.Coder(mimi, "decode", slots=slots, frames=frames), iter(back)))
    for x, job in zip(found, back, strict=True):
        assert torch.allclose(torch.cat(job.got, 1), mimi.decode(x[None])[0], atol=1e-5)


def test_fingerprint_belongs_to_the_weights(folder: Path) -> None:
    mimi = make_codec(0)
    print_ = codec.fingerprint(mimi)
    mimi.set_num_codebooks(2)
    assert codec.fingerprint(mimi) == print_ == codec.fingerprint(make_codec(0))
    assert codec.fingerprint(make_codec(1)) != print_
    assert len(bytes.fromhex(print_)) == 16


def test_measures() -> None:
    x = torch.sin(torch.arange(24_000) * 0.05)
    noise = torch.randn(24_000) * 0.01
    near, far = codec.measures(x, 0.5 * x + noise), codec.measures(x, 0.5 * x + 10 * noise)
    assert near["si_sdr_db"] > far["si_sdr_db"] + 15
    assert near["mel_db"] < far["mel_db"]
    assert near["snr_db"] == pytest.approx(6, abs=0.2)


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
    assert (reader.samples, reader.info.codec) == (24_000, codec.fingerprint(mimi))
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
