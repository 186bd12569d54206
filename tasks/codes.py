"""Codes at rest and on the way: the `.mimi` container, and npz, safetensors and JSON lines.

A .mimi stream, all numbers little-endian:

    header  48 bytes   "MIMI", version u8 (1), 0 u8, header bytes u16 (48), sample rate u32,
                       samples per frame u32, codebooks Q u16, 0 u16, codebook size C u32,
                       true samples u64 (all ones: not known yet), codec hash 16 bytes
    frame              Q codes of ceil(log2 C) bits, highest bit first, filled up to whole bytes
    mark    20 bytes   MARK, true samples u64, CRC-32 of these 8 bytes

The mark stands before the last frame when that one is only partly filled, else after all frames: a
reader on a pipe can play every frame at once and still cut the last one to its true length. Where
the output can seek, the header is corrected as well. A stream that stops early is usable. JSON
lines say the true length in the last frame, if it is partly filled, and in a record at the end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moshi_cli.core.errors import UsageError
from moshi_cli.core.pcm import FRAME_SAMPLES, SAMPLE_RATE

FORMATS = ("mimi", "npz", "safetensors", "jsonl")
HEADER = struct.Struct("<4sBBHIIHHIQ16s")
MARK = bytes.fromhex("b1d3a95e73c6f82d")
MARK_BYTES = len(MARK) + 12
UNKNOWN = (1 << 64) - 1


@dataclass(frozen=True)
class CodesInfo:
    """What one must know about codes [Q, T] to decode them."""

    codebooks: int  # Q
    codebook_size: int  # C
    samples: int | None = None  # true length of the sound; None: not known
    codec: str = ""  # fingerprint of the codec, 32 hex digits; "": not known
    sample_rate: int = SAMPLE_RATE  # Hz
    frame_samples: int = FRAME_SAMPLES

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (self.codebook_size - 1).bit_length()

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in a .mimi stream."""
        return -(-self.codebooks * self.code_bits // 8)

    @property
    def bitrate(self) -> float:
        """Bits per second of sound, without the container."""
        return self.sample_rate / self.frame_samples * self.codebooks * self.code_bits

    def frames(self, samples: int) -> int:
        """Frames that hold so many samples."""
        return -(-samples // self.frame_samples)


def format_of(target: object, format: str | None = None) -> str:
    """The format asked for, or the one a file name asks for; .mimi where nothing is said."""
    suffix = Path(target).suffix.lower() if isinstance(target, str | Path) else ""
    known = {f".{name}": name for name in FORMATS}
    if format is None and suffix and suffix not in known and not str(target).startswith("/dev/"):
        raise UsageError(f"{target}: unknown code format {suffix!r}", "use " + ", ".join(known))
    format = format or known.get(suffix, "mimi")
    if format not in FORMATS:
        raise UsageError(f"unknown code format {format!r}", f"choose one of {', '.join(FORMATS)}")
    return format


def pack(codes: Tensor, bits: int) -> bytes:
    """codes [Q, T] -> T frames of ceil(Q · bits / 8) bytes."""
    shifts = np.arange(bits - 1, -1, -1)
    grid = codes.cpu().numpy().astype(np.int64).T[:, :, None] >> shifts & 1  # [T, Q, bits]
    return np.packbits(grid.astype(np.uint8).reshape(len(grid), -1), axis=1).tobytes()


def unpack(data: bytes, codebooks: int, bits: int) -> Tensor:
    """Whole frames -> codes long[Q, T]."""
    size = -(-codebooks * bits // 8)
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    grid = np.unpackbits(rows, axis=1)[:, : codebooks * bits].reshape(-1, codebooks, bits)
    codes = grid.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))  # [T, Q]
    return torch.from_numpy(np.ascontiguousarray(codes.T))
