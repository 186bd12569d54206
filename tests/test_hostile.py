"""Recordings that want to do harm: each ends in one line and the documented exit code.

0 and perhaps one warning where there is sound to use, 2 where there is none; 3 if others were fine.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_MIMI
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio, pcm
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks.codes_reader import CodesReader

NOISE = np.random.default_rng(0).standard_normal((24_000, 1)).astype(np.float32) * 0.1
TRUNCATED = "warning: {name}: truncated: only "


def encoded(form: str, subtype: str | None = None, rate: int = 24_000, channels: int = 1) -> bytes:
    """A second of noise as a file of this form."""
    file = io.BytesIO()
    wide = np.repeat(NOISE, channels, 1)
    soundfile.write(file, wide, rate, subtype, format=form)
    return file.getvalue()


def wav(format: str = "s16le", **fields: int) -> bytes:
    """A WAV of 1000 samples in which some fields lie."""
    head = bytearray(pcm.wav_header(1, 24_000, format, 1000 * pcm.SAMPLE_BYTES[format]))
    places = {
        "riff": (4, "<I"),
        "tag": (20, "<H"),
        "channels": (22, "<H"),
        "rate": (24, "<I"),
        "bits": (34, "<H"),
        "data": (40, "<I"),
    }
    for name, value in fields.items():
        at, layout = places[name]
        struct.pack_into(layout, head, at, value)
    return bytes(head) + bytes(1000 * pcm.SAMPLE_BYTES[format])


def floats(*values: float) -> bytes:
    return pcm.wav_header(1, 24_000, "f32le", 4 * len(values)) + np.float32(values).tobytes()


def chunk_before(name: bytes, length: int) -> bytes:
    """A WAV with a chunk that claims to be long, before the format."""
    plain = wav()
    return plain[:12] + name + struct.pack("<I", length) + b"x" * 64 + plain[12:]


GOOD = {  # what can be used -> samples at 24 kHz, and whether there is a warning
    "one.wav": (pcm.wav_header(1, 24_000, "s16le", 2) + b"\1\0", 1, False),
    "one44.wav": (pcm.wav_header(1, 44_100, "s16le", 2) + b"\1\0", 1, False),
    "eight.wav": (encoded("WAV", "PCM_U8"), 24_000, False),
    "192k.wav": (encoded("WAV", "PCM_24", 192_000), 3000, False),
    "six.wav": (encoded("WAV", "PCM_16", 48_000, 6), 12_000, False),
    "six.flac": (encoded("FLAC", "PCM_16", 48_000, 6), 12_000, False),
    "truncated.wav": (encoded("WAV", "PCM_16")[:20_001], 9978, True),
    "truncated.flac": (encoded("FLAC", "PCM_16")[:20_000], None, True),
    "truncated.ogg": (encoded("OGG", "VORBIS", 8000)[:-2000], None, False),
    "truncated.mp3": (encoded("MP3")[:3000], None, False),
    "trailing.wav": (wav() + b"LIST" + struct.pack("<I", 4) + b"abcd", 1000, False),
    "unknown.wav": (wav(data=0xFFFFFFFF), 1000, False),
    "never.wav": (wav(data=0x7FFFFFFF), 1000, False),
    "zero.wav": (wav(data=0, riff=36), 1000, False),
    "billion.wav": (wav(data=2_000_000_000), 1000, False),
    "liar.wav": (wav(data=1 << 24), 1000, True),
    "silent.wav": (floats(*[0.0] * 3000), 3000, False),
    "loud.wav": (floats(*[1.5] * 3000), 3000, False),
    "wrong-name.mp3": (wav(), 1000, False),
    "wrong-name.txt": (wav(), 1000, False),
}

BAD = {  # what cannot -> what is said
    "empty.wav": (b"", "is empty (zero bytes)"),
    "no-samples.wav": (pcm.wav_header(1, 24_000, "s16le", 0), "holds no sound (zero samples)"),
    "header.wav": (wav()[:30], "broken WAV: the file ends before the sound"),
    "riff.wav": (b"RIFF", "broken WAV"),
    "riff.txt": (b"RIFF and Jets are words", "is text, not audio"),
    "text.wav": (b"Once upon a time\nthere was a recording.\n", "is text, not audio"),
    "unicode.wav": ("Es war einmal … ".encode() * 40, "is text, not audio"),
    "json.wav": (b'{"path": "a.wav"}\n', "is text, not audio"),
    "noise.wav": (os.urandom(500).replace(b"\xff", b"\0") + b"\x00\x01", "cannot decode audio"),
    "noise.mp3": (b"\xff\xfb" + bytes(range(255)) * 9, "cannot decode audio"),
    "noise.ogg": (b"OggS" + bytes(range(255)), "cannot decode audio"),
    "noise.flac": (b"fLaC" + bytes(range(255)), "cannot decode audio"),
    "tag.mp3": (b"ID3\x04" + bytes(300), "cannot decode audio"),
    "noise.raw": (bytes(range(250)), "has no header that says what it is"),
    "nan.wav": (floats(0, 0, float("nan")), "sample 2 (0.000 s) is not a number (nan)"),
    "late.wav": (floats(*[0.0] * 30_000, float("inf")), "sample 30000 (1.250 s) is not a number"),
    "infinite.wav": (floats(float("-inf")), "is not a number (-inf)"),
    "huge.wav": (floats(0, 3e38), "is 3e+38, far outside [-1, 1]"),
    "scaled.wav": (floats(0, 12_000), "is 12000, far outside [-1, 1]"),
    "chunk.wav": (chunk_before(b"LIST", 3_000_000_000), "chunk b'LIST' before the sound claims"),
    "format.wav": (chunk_before(b"fmt ", 0xFFFFFFFF), "before the sound claims 4294967295 bytes"),
    "ends.wav": (chunk_before(b"junk", 5000), "broken WAV: the file ends before the sound"),
    "channels.wav": (wav(channels=65_535), "broken WAV: it claims 65535 channels"),
    "none.wav": (wav(channels=0), "broken WAV: it claims 0 channels"),
    "rate.wav": (wav(rate=0), "broken WAV: it claims a sample rate of 0 Hz"),
    "fast.wav": (wav(rate=0xFFFFFFFF), "broken WAV: it claims a sample rate of"),
    "tag.wav": (wav(tag=0x1234), "cannot decode audio"),
    "codes.wav": (b"MIMI" + bytes(100), "cannot decode audio"),
    "zip.wav": (b"PK\3\4" + bytes(100), "cannot decode audio"),
}

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    save(Model(Mimi(TINY_MIMI), None, None, ModelConfig(mimi=TINY_MIMI), "tiny"), folder)
    return folder


@pytest.fixture
def encode(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", str(model))
    return lambda *args, **extra: CliRunner().invoke(
        cli.app, ["codec", "encode", *[str(a) for a in args]], **extra
    )


def place(name: str, data: bytes) -> Path:
    Path(name).write_bytes(data)
    return Path(name)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_what_can_be_used_is_used(encode: Invoke, name: str, way: str, capfd: Any) -> None:
    data, samples, warned = GOOD[name]
    source = place(name, data) if way == "file" else "-"
    done = encode(source, "-o", "x.mimi", input=None if way == "file" else data)
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "warning" in line or "error" in line]
    assert len(lines) == warned
    if warned:
        assert TRUNCATED.format(name=name if way == "file" else "standard input") in lines[0]
    with CodesReader("x.mimi") as reader:
        assert sum(codes.shape[1] for codes in reader) > 0
        if way == "file" or not name.startswith("trailing"):
            assert samples is None or reader.samples == samples
    assert capfd.readouterr().err == ""  # nothing from the libraries beneath


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_what_cannot_is_one_line(encode: Invoke, name: str, way: str, capfd: Any) -> None:
    data, message = BAD[name]
    source = place(name, data)
    if way == "file":
        done = encode(source, "-o", "x.mimi", "-q")
    else:
        done = encode("-", "-o", "x.mimi", "-q", input=source.read_bytes())
        name = "standard input"
        message = message if "cannot decode" not in message else ""  # a pipe says less
    assert (done.exit_code, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"moshi codec encode: error: {name}: ")
    assert message in lines[0]
    assert all("hint: " in line for line in lines[1:])
    assert len(lines) <= 2
    assert not list(Path().glob("x.mimi*"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("size", [1, 4])
def test_all_of_them_at_once(encode: Invoke, size: int) -> None:
    for name, (data, _, _) in GOOD.items():
        place(name, data)
    for name, (data, _) in BAD.items():
        place(name, data)
    done = encode(*GOOD, *BAD, "gone.wav", "--output-dir", "out", "--batch-size", size, "-q")
    assert done.exit_code == 3
    assert len([x for x in done.stderr.splitlines() if "error: " in x]) == len(BAD) + 1
    assert len(list(Path("out").glob("*.mimi"))) == len(GOOD)
    assert not list(Path("out").glob("*.tmp.*"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.wav", "gone.wav: no such file"),
        ("no/where/a.wav", "no/where/a.wav: no such file"),
        ("a.wav/b", "a.wav/b: cannot read (Not a directory)"),
        ("folder.wav", "folder.wav: nothing in this folder is an input of this command"),
        ("/dev/null", "/dev/null: is empty (zero bytes)"),
        ("x" * 5000, "cannot read (File name too long)"),
        ("two\nlines.wav", r"two\nlines.wav: no such file"),
        ("link.wav", "link.wav: no such file"),
        ("-", "standard input: is empty (zero bytes)"),
    ],
)
def test_places_without_a_recording(encode: Invoke, source: str, message: str) -> None:
    Path("a.wav").write_bytes(wav())
    Path("folder.wav").mkdir()
    Path("link.wav").symlink_to("nowhere")
    done = encode(source, "-o", "x.mimi", "-q")
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) <= 2


def test_unreadable(encode: Invoke) -> None:
    Path("a.wav").write_bytes(wav())
    Path("a.wav").chmod(0)
    if os.access("a.wav", os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot read (Permission denied)" in encode("a.wav", "-o", "x.mimi").stderr


def test_names_that_are_not_unicode(encode: Invoke) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        Path(name).write_bytes(wav())
    except OSError:
        pytest.skip("this file system wants Unicode")
    done = encode(name, "gone.wav", "--output-dir", "out", "--status", "jsonl")
    assert done.exit_code == 3
    assert [p.name for p in Path("out").glob("*.mimi")] == [os.fsdecode(b"caf\xe9.mimi")]


def test_a_pipe_without_header_is_refused_at_once() -> None:
    """It is not spooled to disk in the hope of finding one: that could take for ever."""

    class Endless(io.RawIOBase):
        taken = 0

        def read1(self, limit: int = -1) -> bytes:
            self.taken += limit
            assert self.taken < 1 << 20
            return b"\1\2\3\4\0\6\7\0"[: min(limit, 8)]

    with pytest.raises(audio.InputError, match="has no header that says what it is") as caught:
        audio.frames(Endless())
    assert "--input-format" in str(caught.value.hint)


def test_raw_pcm_with_a_broken_end(encode: Invoke) -> None:
    """Three bytes of s16le are one sample."""
    Path("a.raw").write_bytes(b"\1\0\2")
    done = encode("a.raw", "-o", "x.mimi", "--input-format", "s16le")
    assert done.exit_code == 0
    assert next(CodesReader("x.mimi")).shape[1] == 1
    assert encode("a.raw", "-o", "x.mimi", "--input-format", "f32le").exit_code == 2
    assert encode("a.raw", "-o", "x.mimi", "--input-format", "s24be").exit_code == 2


def test_output_that_grows_too_large(model: Path, tmp_path: Path) -> None:
    """A full disk: one line, exit 1, and nothing is left (a file size limit stands in for it)."""
    resource = pytest.importorskip("resource")
    import subprocess
    import sys

    place(str(tmp_path / "a.wav"), encoded("WAV", "PCM_16"))
    command = [
        sys.executable,
        "-m",
        "moshi_cli",
        "codec",
        "roundtrip",
        "a.wav",
        "-o",
        "b.wav",
        "-q",
    ]
    for extra in ([], ["--format", "flac"]):
        done = subprocess.run(
            [*command, *extra], capture_output=True, text=True, cwd=tmp_path, timeout=60,
            env={**os.environ, "MOSHI_MODEL": str(model), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("moshi codec roundtrip: error: b.wav: cannot write (")
        assert len(done.stderr.splitlines()) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
