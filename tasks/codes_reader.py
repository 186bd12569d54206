"""Reading codes in any of the formats of `codes`, from files and from pipes as they fill."""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moshi_cli.core.errors import InputError
from moshi_cli.core.files import ByteSource
from moshi_cli.core.pcm import FRAME_SAMPLES, SAMPLE_RATE
from moshi_cli.tasks.codes import HEADER, MARK, MARK_BYTES, UNKNOWN, CodesInfo, unpack

ARRAY_LIMIT = 1 << 30  # bytes of an npz or safetensors file


class CodesReader:
    """Codes from a file, stdin (`-`) or an open stream: an iterator of codes long[Q, T], T ≥ 1.

    `info` says what they are. `samples` is the true length as far as it is known: at the latest
    together with the last frame. `warnings` is complete after that. Raises InputError.
    """

    def __init__(self, source: str | Path | BinaryIO) -> None:
        self._bytes = ByteSource(source)
        self.name, self.live = self._bytes.name, self._bytes.size is None
        self.frames = 0  # given out so far
        self.warnings: list[str] = []
        self.format, self.info = "", CodesInfo(1, 2)
        try:
            self._blocks = self._open()
        except InputError as error:
            self.close()
            raise InputError(f"{self.name}: {error}", error.hint) from None
        self.samples = self.info.samples

    def _open(self) -> Iterator[Tensor]:
        head = self._bytes.peek(9)
        if not head:
            raise InputError("is empty (zero bytes)")
        if head[:4] == b"MIMI":
            self.format, self.info = "mimi", self._mimi_header()
            return self._mimi_frames()
        if head[:1] == b"{":
            self.format = "jsonl"
            lines = self._lines()
            self.info = _info(next(lines, {}))
            return self._json_frames(lines)
        if head[:2] == b"PK":
            self.format = "npz"
        elif head[8:9] == b"{":
            self.format = "safetensors"
        else:
            raise InputError("holds no codes", "codes are .mimi, .npz, .safetensors or .jsonl")
        codes, facts = _array(self._bytes, self.format)
        self.info = _info({"codebooks": codes.shape[0], "codebook_size": 2048, **facts})
        return iter(codes.split(1024, 1))

    # .mimi

    def _mimi_header(self) -> CodesInfo:
        data = self._bytes.exactly(HEADER.size)
        if len(data) < HEADER.size:
            raise InputError("is cut off inside its header")
        _, version, _, size, rate, frame, books, _, entries, samples, codec = HEADER.unpack(data)
        if version != 1 or size < HEADER.size:
            raise InputError(f"has version {version} of the .mimi format, this program reads 1")
        self._bytes.skip(size - HEADER.size)
        known = None if samples == UNKNOWN else samples
        digest = codec.hex() if any(codec) else ""
        return _checked(CodesInfo(books, entries, known, digest, rate, frame))

    def _mimi_frames(self) -> Iterator[Tensor]:
        """As many frames at a time as have arrived."""
        info, size, rest, marked = self.info, self.info.frame_bytes, b"", False
        while piece := self._bytes.some():
            rest += piece
            ready = 0  # bytes of `rest` that are frames for sure
            while True:
                if not marked and MARK.startswith(rest[ready : ready + len(MARK)]):
                    if len(rest) < ready + MARK_BYTES:
                        break
                    count = rest[ready + len(MARK) :][:12]
                    if zlib.crc32(count[:8]) == struct.unpack("<I", count[8:])[0]:
                        self.samples, marked = struct.unpack("<Q", count[:8])[0], True
                        rest = rest[:ready] + rest[ready + MARK_BYTES :]
                if len(rest) < ready + size or (marked and self._whole(ready // size)):
                    break
                ready += size
            if ready:
                yield unpack(rest[:ready], info.codebooks, info.code_bits)
                rest = rest[ready:]
        if marked:
            return
        if whole := 0 if MARK.startswith(rest[:4]) else len(rest) - len(rest) % size:
            yield unpack(rest[:whole], info.codebooks, info.code_bits)
        if len(rest) > whole:
            self.warnings.append("ends in the middle of a frame")

    def _whole(self, more: int) -> bool:
        """Whether `more` frames complete what the mark promises."""
        return (self.frames + more) * self.info.frame_samples >= (self.samples or 0)

    # .jsonl

    def _lines(self) -> Iterator[dict[str, Any]]:
        rest, number = b"", 0
        while piece := self._bytes.some():
            *lines, rest = (rest + piece).split(b"\n")
            for line in [line for line in lines if line.strip()]:
                number += 1
                yield _json(line, number)
        if rest.strip():
            yield _json(rest, number + 1)

    def _json_frames(self, lines: Iterator[dict[str, Any]]) -> Iterator[Tensor]:
        for record in lines:
            if "samples" in record:  # the end, or the last frame if it is partly filled
                self.samples = _count(record, "samples")
            if record.get("type") != "end":
                yield self._column(record.get("codes"))

    def _column(self, codes: Any) -> Tensor:
        whole = isinstance(codes, list) and all(type(code) is int for code in codes)
        if not whole or len(codes) != self.info.codebooks:
            raise InputError(f"{self.name}: frame {self.frames} is not {self.info.codebooks} codes")
        return torch.tensor(codes)[:, None]

    # all

    def __iter__(self) -> CodesReader:
        return self

    def __next__(self) -> Tensor:
        codes = next(self._blocks, None)
        if codes is None:
            self._finish()
            raise StopIteration
        if (
            codes.numel()
            and not 0 <= int(codes.min()) <= int(codes.max()) < self.info.codebook_size
        ):
            bad = int(codes.min()) if int(codes.min()) < 0 else int(codes.max())
            raise InputError(
                f"{self.name}: code {bad} does not exist, the codebooks have "
                f"{self.info.codebook_size} entries"
            )
        self.frames += codes.shape[1]
        return codes

    def _finish(self) -> None:
        self.close()
        there = self.frames * self.info.frame_samples
        if not self.frames:
            raise InputError(f"{self.name}: holds no frames")
        if self.samples is None:
            if self.format in ("mimi", "jsonl"):
                self.warnings.append("has no end: the true length is not known")
            self.samples = there
        elif self.samples > there:
            seconds, wanted = (n / self.info.sample_rate for n in (there, self.samples))
            self.warnings.append(f"truncated: {seconds:.2f} s of {wanted:.2f} s are there")
            self.samples = there
        elif self.samples <= there - self.info.frame_samples:
            self.warnings.append("has more frames than its length needs")

    def close(self) -> None:
        """Release the file."""
        self._bytes.close()

    def __enter__(self) -> CodesReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def _checked(info: CodesInfo) -> CodesInfo:
    sane = 1 <= info.codebooks <= 256 and 2 <= info.codebook_size <= 1 << 24
    if not sane or not 1 <= info.frame_samples <= info.sample_rate <= 768_000:
        raise InputError("has a header that makes no sense")
    return info


def _info(facts: dict[str, Any]) -> CodesInfo:
    """From the facts beside codes in other formats; what is not said is Mimi."""
    return _checked(
        CodesInfo(
            codebooks=_count(facts, "codebooks") or 0,
            codebook_size=_count(facts, "codebook_size") or 0,
            samples=_count(facts, "samples"),
            codec=str(facts.get("codec", "")),
            sample_rate=_count(facts, "sample_rate") or SAMPLE_RATE,
            frame_samples=_count(facts, "frame_samples") or FRAME_SAMPLES,
        )
    )


def _count(facts: dict[str, Any], key: str) -> int | None:
    try:
        return None if facts.get(key) is None else max(0, int(facts[key]))
    except (TypeError, ValueError):
        raise InputError(f"has no number for {key!r}") from None


def _json(line: bytes, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(f"line {number} is not a JSON object")
    return record


def _array(source: ByteSource, format: str) -> tuple[Tensor, dict[str, Any]]:
    """codes [Q, T] and the facts beside them, from npz or safetensors."""
    if source.size is not None and source.size > ARRAY_LIMIT:
        raise InputError(f"is too large for {format} codes ({source.size} bytes)")
    with tempfile.SpooledTemporaryFile(1 << 24) as spool:
        while piece := source.some():
            spool.write(piece)
        spool.seek(0)
        data = spool.read()
    try:
        if format == "npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                facts = {k: found[k].item() for k in found.files if found[k].ndim == 0}
                codes = found["codes"]
        else:
            from safetensors.numpy import load

            codes = load(data)["codes"]
            length = struct.unpack("<Q", data[:8])[0]
            facts = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except KeyError:
        raise InputError("holds no array named 'codes'") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, Exception) as error:
        raise InputError(f"is a broken {format} file ({' '.join(str(error).split())})") from None
    if codes.ndim == 3 and codes.shape[0] == 1:
        codes = codes[0]
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise InputError(f"its codes are {codes.dtype} {list(codes.shape)}, not integers [Q, T]")
    if facts.get("axes") == "frame,codebook":
        codes = codes.T
    return torch.from_numpy(np.ascontiguousarray(codes).astype(np.int64)), facts
