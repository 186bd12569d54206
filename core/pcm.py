"""Samples as bytes: PCM formats to and from float32 [-1, 1], and the headers of WAV files.

Everything a pipe may carry is read here, without a library, so that sound can be handled while it
is still arriving. Numbers are little-endian; sample blocks are NumPy [n] or interleaved [n * C].
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_cli.core.errors import InputError

SAMPLE_RATE = 24_000  # Hz, inside and at every default border
FRAME_SAMPLES = 1920  # samples in one codec frame
FRAME_HZ = SAMPLE_RATE / FRAME_SAMPLES  # 12.5 Hz: 80 ms

SAMPLE_BYTES = {
    "u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4, "f64le": 8, "mulaw": 1, "alaw": 1,
}  # fmt: skip
RAW_FORMATS = ("s16le", "s32le", "f32le", "mulaw")  # what may come without a header

UNKNOWN_BYTES = 0xFFFFFFFF  # size field of a WAV that is still being written
HEADER_LIMIT = 64 << 20  # bytes of chunks to skip before the sound; more is not a header


def decode(data: bytes, format: str) -> NDArray[np.float32]:
    """Bytes of whole samples to float32 [n]; floats are taken as they are."""
    if format == "s16le":
        return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
    if format in ("f32le", "f64le"):
        return np.frombuffer(data, "<f4" if format == "f32le" else "<f8").astype(np.float32)
    if format == "s32le":
        return (np.frombuffer(data, "<i4") / 2147483648.0).astype(np.float32)
    if format == "s24le":
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)  # the low byte stays 0
        return (padded.view("<i4")[:, 0] / 2147483648.0).astype(np.float32)
    if format == "u8":
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(128)
    return _law(format)[np.frombuffer(data, np.uint8)]


@cache
def _law(format: str) -> NDArray[np.float32]:
    """The 256 values of ITU-T G.711 mu-law or A-law."""
    code = np.arange(256)
    code = code ^ (0xFF if format == "mulaw" else 0x55)
    segment, step = (code >> 4) & 7, code & 15
    if format == "mulaw":
        size = (((step << 3) + 132) << segment) - 132
        sign = np.where(code & 0x80, -1, 1)
    else:
        size = np.where(
            segment > 0, ((step << 4) + 264) << np.maximum(segment - 1, 0), (step << 4) + 8
        )
        sign = np.where(code & 0x80, 1, -1)
    return (sign * size / 32768).astype(np.float32)


def encode(samples: NDArray[np.float32], format: str) -> bytes:
    """Float32 [n] to bytes; integers are rounded and clipped, floats are kept as they are."""
    if format == "f32le":
        return samples.astype("<f4").tobytes()
    bits = {"s16le": 16, "s24le": 24}[format]
    full = 1 << (bits - 1)
    whole = np.clip(np.rint(samples.astype(np.float64) * full), -full, full - 1).astype("<i4")
    if format == "s16le":
        return whole.astype("<i2").tobytes()
    return whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


# WAV


@dataclass(frozen=True)
class WavHeader:
    """What precedes the sound in a RIFF file."""

    format: str | None  # a key of SAMPLE_BYTES; None: compressed, another decoder may know it
    channels: int
    sample_rate: int  # Hz
    data_bytes: int | None  # None: until the end
    truncated: bool = False  # a file that is shorter than it says

    @property
    def block_bytes(self) -> int:
        """Bytes of one sample of every channel."""
        return SAMPLE_BYTES[self.format or "u8"] * self.channels


def wav_header(
    channels: int, sample_rate: int, format: str, data_bytes: int | None = None
) -> bytes:
    """The 44 bytes before the sound (58 for floats); no size means "until the pipe closes"."""
    width = SAMPLE_BYTES[format]
    tag = 3 if format == "f32le" else 1
    fmt = struct.pack(
        "<HHIIHH", tag, channels, sample_rate, sample_rate * channels * width, channels * width,
        8 * width,
    )  # fmt: skip
    extra = (
        b"" if tag == 1 else b"fact" + struct.pack("<II", 4, _blocks(data_bytes, channels * width))
    )
    fmt += b"" if tag == 1 else b"\0\0"  # the size of no extension
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(fmt)) + fmt + extra + b"data"
    size = UNKNOWN_BYTES if data_bytes is None else min(data_bytes, UNKNOWN_BYTES)
    whole = min(size + len(body) + 4, UNKNOWN_BYTES)
    return b"RIFF" + struct.pack("<I", whole) + body + struct.pack("<I", size)


def _blocks(data_bytes: int | None, block_bytes: int) -> int:
    return UNKNOWN_BYTES if data_bytes is None else min(data_bytes // block_bytes, UNKNOWN_BYTES)


def read_wav_header(
    read: Callable[[int], bytes], skip: Callable[[int], int], size: int | None
) -> WavHeader:
    """Read up to the first sample.

    read(n) returns n bytes or fewer at the end, skip(n) passes over n bytes and returns how many
    there were; size is the length of a file, None for a pipe. InputError where it is no WAV.
    """
    magic, riff_bytes, kind = _unpack("<4sI4s", read)
    if magic not in (b"RIFF", b"RF64", b"BW64") or kind != b"WAVE":
        raise InputError("not a WAV file")
    at, long_bytes, fmt = 12, None, None
    while True:
        name, length = _unpack("<4sI", read)
        at += 8
        if name == b"data":
            break
        if length > HEADER_LIMIT:
            raise InputError(f"broken WAV: chunk {name!r} before the sound claims {length} bytes")
        if name == b"fmt ":
            if length < 16:
                raise InputError(f"broken WAV: its format chunk has {length} bytes")
            fmt = read(length)
            skip(length & 1)
        elif name == b"ds64":
            body = read(length)
            long_bytes = struct.unpack_from("<Q", body, 8)[0] if len(body) >= 16 else None
        elif skip(length + (length & 1)) < length:
            raise InputError("broken WAV: the file ends before the sound")
        at += length + (length & 1)
    if fmt is None or len(fmt) < 16:
        raise InputError("broken WAV: no format chunk before the sound")
    header = _wav_format(fmt)
    if long_bytes is not None and length == UNKNOWN_BYTES:
        length = long_bytes
    return _bounded(header, length, riff_bytes, None if size is None else size - at, size)


def _unpack(layout: str, read: Callable[[int], bytes]) -> tuple[Any, ...]:
    data = read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise InputError("broken WAV: the file ends before the sound")
    return struct.unpack(layout, data)


def _wav_format(fmt: bytes) -> WavHeader:
    """The `fmt ` chunk; size fields come later."""
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", fmt)
    if tag == 0xFFFE and len(fmt) >= 26:  # extensible: the true tag opens the GUID
        tag = struct.unpack_from("<H", fmt, 24)[0]
    if not 1 <= channels <= 64:
        raise InputError(f"broken WAV: it claims {channels} channels")
    if not 1000 <= rate <= 768_000:
        raise InputError(f"broken WAV: it claims a sample rate of {rate} Hz")
    known = {
        (1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le", (3, 32): "f32le",
        (3, 64): "f64le", (6, 8): "alaw", (7, 8): "mulaw",
    }  # fmt: skip
    return WavHeader(known.get((tag, bits)), channels, rate, None)


def _bounded(
    header: WavHeader, length: int, riff_bytes: int, left: int | None, size: int | None
) -> WavHeader:
    """How much sound there is, given what the size fields claim and what is really left.

    Writers that cannot seek leave 0, 0x7FFFFFFF, 0xFFFFFFFF or a billion samples behind; all of
    them mean "until the end".
    """
    endless = length >= 0x7FFF0000 or length == 1_000_000_000 * header.block_bytes
    count: int | None
    if left is None:  # a pipe
        count = None if endless or length == 0 else length
    elif length == 0:
        count = 0 if riff_bytes + 8 == size else left
    else:
        count = min(length, left)
    short = left is not None and length > left and not endless
    return WavHeader(header.format, header.channels, header.sample_rate, count, short)
