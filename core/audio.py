"""Sound in and out: files, pipes and raw PCM at any rate, as float32 [C, S] at 24 kHz.

`read` gives a whole recording, `frames` the same samples in steps of 80 ms with bounded memory and,
from a pipe, as soon as they exist. Both run one streaming resampler, so they agree exactly. WAV and
raw PCM are parsed here; FLAC, OGG, MP3, AIFF and rarer WAVs by libsndfile; what is left by ffmpeg,
if there is one. A recording that ends before its header says is used as far as it goes, with a
warning. `Writer` and `write` are the way back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moshi_cli.core.audio_writer import Writer as Writer
from moshi_cli.core.audio_writer import write as write
from moshi_cli.core.decoders import Decoder, open_decoder
from moshi_cli.core.errors import InputError, ModelError, UsageError
from moshi_cli.core.pcm import FRAME_HZ as FRAME_HZ
from moshi_cli.core.pcm import FRAME_SAMPLES as FRAME_SAMPLES
from moshi_cli.core.pcm import RAW_FORMATS as RAW_FORMATS
from moshi_cli.core.pcm import SAMPLE_RATE as SAMPLE_RATE

Block = NDArray[np.float32]  # [n, C]

LOUDEST = 1000.0  # |sample| beyond this is not sound in [-1, 1], whatever else it is

log = logging.getLogger(__name__)


class Resampler:
    """A streaming change of sample rate: any split of the input gives the same output.

    n samples at `rate` become max(1, round(n * to / rate)) in all; up to 40 ms of them arrive late.
    """

    def __init__(self, rate: int, channels: int = 1, to: int = SAMPLE_RATE) -> None:
        self.rate, self.to, self.channels = rate, to, channels
        self._taken = self._given = 0
        self._stream: Any = None
        if rate != to:
            try:
                import soxr
            except ImportError:
                raise ModelError(
                    f"sound at {rate} Hz needs the package soxr", "pip install soxr", exit_code=1
                ) from None
            self._stream = soxr.ResampleStream(rate, to, channels, dtype="float32", quality="HQ")

    def __call__(self, block: Block, last: bool = False) -> Block:
        """[n, C] at `rate` -> [m, C] at `to`; `last` lets out what was held back."""
        if self._stream is None:
            return block
        self._taken += len(block)
        out: Block = self._stream.resample_chunk(np.ascontiguousarray(block), last=last)
        if last:
            due = self.length(self._taken) - self._given
            out = np.pad(out[:due], ((0, max(0, due - len(out))), (0, 0)))
        self._given += len(out)
        return out

    def length(self, samples: int) -> int:
        """How many samples `samples` become."""
        exact = (samples * self.to + self.rate // 2) // self.rate
        return max(1, exact) if samples else 0


class AudioStream:
    """A recording as an iterator of frames float32 [C, 1920]; see `frames`.

    The last frame is padded with zeros; `samples` counts the true ones given out so far.
    """

    def __init__(
        self,
        source: str | Path | BinaryIO,
        *,
        channel: str | int = "mix",
        start_s: float = 0.0,
        duration_s: float | None = None,
        input_format: str | None = None,
        sample_rate: int = SAMPLE_RATE,
        input_channels: int = 1,
        chunk_frames: int = 1,
    ) -> None:
        if start_s < 0 or (duration_s is not None and duration_s <= 0):
            raise UsageError("a start must not be negative, and a duration must be positive")
        self._decoder: Decoder = open_decoder(source, input_format, sample_rate, input_channels)
        self.name = self._decoder.name
        try:
            self._columns = self._pick(channel)
        except InputError:
            self._decoder.close()
            raise
        self.channels = len(self._columns or [0])
        self.samples = 0  # true samples given out so far, at 24 kHz
        self._start = round(start_s * self._decoder.sample_rate)  # in samples of the source
        self._limit = None if duration_s is None else round(duration_s * self._decoder.sample_rate)
        self._resampler = Resampler(self._decoder.sample_rate, self.channels)
        self._chunk = chunk_frames * FRAME_SAMPLES
        self._held: list[Block] = []
        self._held_samples = 0
        self._blocks = self._resampled()
        self._ended = False

    def _pick(self, channel: str | int) -> list[int] | None:
        """Columns to keep; None: their mean."""
        count, text = self._decoder.channels, str(channel)
        if text == "mix":
            return [0] if count == 1 else None
        if text == "separate":
            return list(range(count))
        index = {"left": 0, "right": 1}.get(text, int(text) if text.isdecimal() else -1)
        if index < 0:
            raise UsageError(
                f"unknown channel {text!r}", "choose mix, left, right, separate or a number from 0"
            )
        if index >= count:
            raise InputError(f"{self.name}: has no channel {index}, it has {count}")
        return [index]

    @property
    def total_s(self) -> float | None:
        """Seconds to expect in all; None where only the end will tell."""
        if self._decoder.samples is None:
            return None
        left = max(0, self._decoder.samples - self._start)
        return min(left, left if self._limit is None else self._limit) / self._decoder.sample_rate

    @property
    def live(self) -> bool:
        """Whether the sound comes through a pipe, perhaps while it happens."""
        return self._decoder.live

    def _trimmed(self) -> Iterator[Block]:
        """Blocks [n, C] at the source's rate: checked, cut to start and duration."""
        rate, left = self._decoder.sample_rate, self._limit
        skipped = self._decoder.skip(self._start)
        at, seen = skipped, 0
        for block in self._decoder.blocks():
            if at < self._start:  # a decoder that cannot jump
                drop = min(len(block), self._start - at)
                at, block = at + drop, block[drop:]
            if left is not None:
                block = block[: left - seen]
            self._check(block, at, rate)
            at, seen = at + len(block), seen + len(block)
            if len(block):
                yield block
            if left is not None and seen >= left:
                return
        if not seen:
            if at or skipped:
                raise InputError(
                    f"{self.name}: starts at {self._start / rate:g} s, but it ends before that"
                )
            raise InputError(f"{self.name}: holds no sound (zero samples)")

    def _check(self, block: Block, at: int, rate: int) -> None:
        """InputError where a sample cannot be sound."""
        bad = ~(np.abs(block) <= LOUDEST)  # NaN compares false
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            value = float(block[row, column])
            where = f"sample {at + row} ({(at + row) / rate:.3f} s)"
            if np.isfinite(value):
                raise InputError(
                    f"{self.name}: {where} is {value:g}, far outside [-1, 1]",
                    "float recordings must be scaled to [-1, 1]",
                )
            raise InputError(f"{self.name}: {where} is not a number ({value})")

    def _resampled(self) -> Iterator[Block]:
        """Blocks [n, C] at 24 kHz of the chosen channels."""
        for block in self._trimmed():
            if self._columns is None:
                block = block.mean(axis=1, keepdims=True, dtype=np.float32)
            else:
                block = block[:, self._columns]
            yield self._resampler(block)
        yield self._resampler(np.zeros((0, self.channels), np.float32), last=True)
        for warning in self._decoder.warnings:
            log.warning("%s: %s", self.name, warning)

    def __iter__(self) -> AudioStream:
        return self

    def __next__(self) -> Tensor:
        while self._held_samples < self._chunk and not self._ended:
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
                self.close()
            elif len(block):
                self._held.append(block)
                self._held_samples += len(block)
        if not self._held_samples:
            raise StopIteration
        joined = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        chunk, rest = joined[: self._chunk], joined[self._chunk :]
        self._held, self._held_samples = [rest] if len(rest) else [], len(rest)
        self.samples += len(chunk)
        missing = -len(chunk) % FRAME_SAMPLES
        return torch.from_numpy(np.pad(chunk, ((0, missing), (0, 0))).T.copy())  # [C, S]

    def whole(self) -> Tensor:
        """Everything that is left, without padding: [C, S]."""
        blocks = [*self._held, *self._blocks]
        self._held, self._held_samples, self._ended = [], 0, True
        self.close()
        joined = np.concatenate(blocks)  # [S, C]
        self.samples += len(joined)
        return torch.from_numpy(joined.T.copy())

    def stop(self) -> None:
        """Read no more; what was read already is still given out."""
        self._ended, self._blocks = True, iter(())
        self._decoder.close()

    def close(self) -> None:
        """Release the file or the decoder process; iterating is over."""
        self._ended = True
        self._decoder.close()

    def __enter__(self) -> AudioStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def frames(
    source: str | Path | BinaryIO,
    *,
    channel: str | int = "mix",
    start_s: float = 0.0,
    duration_s: float | None = None,
    input_format: str | None = None,
    sample_rate: int = SAMPLE_RATE,
    input_channels: int = 1,
    chunk_frames: int = 1,
) -> AudioStream:
    """Sound in steps of one frame: an iterator of float32 [C, 1920], each as soon as it exists.

    source: a path, `-` for stdin, or a binary stream. channel: mix, left, right, a number from 0,
    or separate (all of them). input_format names headerless PCM (s16le, s32le, f32le, mulaw) of
    sample_rate Hz and input_channels. The last frame is padded; `.samples` has the true count.
    chunk_frames > 1 gives steps of that many frames. Raises InputError.
    """
    return AudioStream(
        source, channel=channel, start_s=start_s, duration_s=duration_s,
        input_format=input_format, sample_rate=sample_rate, input_channels=input_channels,
        chunk_frames=chunk_frames,
    )  # fmt: skip


def read(
    source: str | Path | BinaryIO,
    *,
    channel: str | int = "mix",
    start_s: float = 0.0,
    duration_s: float | None = None,
    input_format: str | None = None,
    sample_rate: int = SAMPLE_RATE,
    input_channels: int = 1,
) -> Tensor:
    """A whole recording as float32 [C, S] at 24 kHz, exactly as `frames` gives it, unpadded."""
    return frames(
        source, channel=channel, start_s=start_s, duration_s=duration_s,
        input_format=input_format, sample_rate=sample_rate, input_channels=input_channels,
    ).whole()  # fmt: skip


def duration_s(source: str | Path) -> float | None:
    """Seconds of sound according to the header; None where there is none to ask."""
    try:
        decoder = open_decoder(source, None, SAMPLE_RATE, 1)
    except InputError:
        return None
    decoder.close()
    return None if decoder.samples is None else decoder.samples / decoder.sample_rate
