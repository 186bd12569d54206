"""The code formats, and the coder that runs streams through slots."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MIMI
from torch import Tensor

from moshi_cli.core.config import MimiConfig
from moshi_cli.core.errors import InputError
from moshi_cli.core.mimi import Mimi
from moshi_cli.tasks import codec, codes
from moshi_cli.tasks.codes import CodesInfo, pack, unpack
from moshi_cli.tasks.codes_reader import CodesReader
from moshi_cli.tasks.codes_writer import CodesWriter


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


def test_fingerprint_belongs_to_the_weights() -> None:
    mimi = make_codec(0)
    print_ = mimi.fingerprint
    mimi.set_num_codebooks(2)
    assert mimi.fingerprint == print_ == make_codec(0).fingerprint
    assert make_codec(1).fingerprint != print_
    assert len(bytes.fromhex(print_)) == 16
