"""Where samples come from: a byte source is sniffed, and one of three decoders yields its blocks.

A decoder gives float32 [n, C] at the source's own rate. Pipes are read as they fill, files in
pieces; nothing here holds a whole recording. A compressed recording that comes through a pipe is
spooled to disk first, because libsndfile must seek.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.core.files import PIECE_BYTES, ByteSource
from moshi_cli.core.pcm import RAW_FORMATS, SAMPLE_BYTES, WavHeader, decode, read_wav_header


class Decoder(Protocol):
    """What `AudioStream` needs."""

    name: str
    channels: int
    sample_rate: int  # Hz
    samples: int | None  # of one channel; None: only the end will tell
    live: bool  # from a pipe
    warnings: list[str]  # complete after the last block

    def skip(self, samples: int) -> int: ...  # how many were skipped: all, or none
    def blocks(self) -> Iterator[NDArray[np.float32]]: ...
    def close(self) -> None: ...


EXACT = ("FLAC", "AIFF", "WAV", "WAVEX")  # forms that seek to the sample and know their length
PIECE = 4096  # samples that libsndfile decodes at a time; lost together if one is broken


class PcmDecoder:
    """WAV with plain samples, or samples without a header."""

    def __init__(self, source: ByteSource, header: WavHeader, close: Any = None) -> None:
        assert header.format is not None
        self.name, self.live = source.name, source.size is None
        self.channels, self.sample_rate = header.channels, header.sample_rate
        self._source, self._header, self._close = source, header, close
        self._left = header.data_bytes  # None: until the end
        self.samples = None if self._left is None else self._left // header.block_bytes
        self.warnings: list[str] = []
        if header.truncated and self.samples:
            self._warn_short(self.samples)

    def _warn_short(self, samples: int) -> None:
        self.warnings.append(f"truncated: only {samples / self.sample_rate:.2f} s are there")

    def skip(self, samples: int) -> int:
        count = samples * self._header.block_bytes
        if not samples or self._left is None or count > self._left:
            return 0
        if not self._source.jump(count):
            return 0
        self._left -= count
        return samples

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        unit, rest, done = self._header.block_bytes, b"", 0
        while self._left is None or self._left > 0:
            piece = self._source.some(min(PIECE_BYTES, self._left or PIECE_BYTES))
            if not piece:
                if self._left and not self._header.truncated:
                    self._warn_short(done)
                break
            if self._left is not None:
                self._left -= len(piece)
            rest += piece
            whole = len(rest) - len(rest) % unit
            if whole:
                samples = decode(rest[:whole], self._header.format or "s16le")
                rest = rest[whole:]
                done += whole // unit
                yield samples.reshape(-1, self.channels)

    def close(self) -> None:
        self._source.close()
        if self._close:
            self._close()


class FileDecoder:
    """Whatever libsndfile knows."""

    live = False

    def __init__(self, name: str, file: Path | BinaryIO, chatty: bool = False) -> None:
        import soundfile

        self.name, self._error = name, soundfile.LibsndfileError
        self._hush = hushed if chatty else nullcontext
        with self._hush():
            self._sound = soundfile.SoundFile(file if not isinstance(file, Path) else str(file))
        # soundfile seeks after every read where it can, and MP3s do not come back to the same place
        self._sound.seekable = lambda: False
        self._file = None if isinstance(file, Path) else file
        self.channels, self.sample_rate = self._sound.channels, self._sound.samplerate
        count = self._sound.frames
        self.samples: int | None = count if 0 <= count < 1 << 48 else None
        self.warnings: list[str] = []
        self._done = 0

    def skip(self, samples: int) -> int:
        exact = self._sound.format in EXACT
        if not exact or not samples or self.samples is None or samples > self.samples:
            return 0
        self._sound.seek(samples)
        self._done = samples
        return samples

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        done, broken = self._done, False
        while True:
            try:
                with self._hush():
                    block = self._sound.read(PIECE, dtype="float32", always_2d=True)
            except self._error as error:
                if not done:
                    raise InputError(f"{self.name}: cannot decode audio ({plain(error)})") from None
                broken = True
                break
            if not len(block):
                break
            done += len(block)
            yield block
        exact = self._sound.format in EXACT
        if broken or (exact and self.samples is not None and done < self.samples):
            self.warnings.append(f"truncated: only {done / self.sample_rate:.2f} s are there")

    def close(self) -> None:
        self._sound.close()
        if self._file:
            self._file.close()


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing reaches stderr meanwhile: the MP3 library within libsndfile writes notes there."""
    sys.stderr.flush()
    try:
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # no stderr at all
        yield
        return
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def ffmpeg_decoder(name: str, file: Path | BinaryIO) -> PcmDecoder | None:
    """Samples from an ffmpeg process that writes WAV; None if it makes nothing of the file."""
    name_given = str(file) if isinstance(file, Path) else "pipe:0"
    command = ["ffmpeg", "-v", "error", "-nostdin", "-i", name_given]
    command += ["-map", "0:a:0", "-f", "wav", "-c:a", "pcm_f32le", "pipe:1"]
    stdin = subprocess.DEVNULL if isinstance(file, Path) else file
    process = subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    source = ByteSource(cast(BinaryIO, process.stdout))
    source.name = name

    def close() -> None:
        process.kill()
        process.communicate()

    try:
        header = read_wav_header(source.exactly, source.skip, None)
    except InputError:
        close()
        return None
    return PcmDecoder(source, header, close)


def open_decoder(
    source: str | Path | BinaryIO, input_format: str | None, sample_rate: int, channels: int
) -> Decoder:
    """Find out what `source` is. input_format, sample_rate, channels: of PCM without a header."""
    if input_format is not None and input_format not in RAW_FORMATS:
        raise UsageError(
            f"unknown input format {input_format!r}", f"choose one of {', '.join(RAW_FORMATS)}"
        )
    if not 1000 <= sample_rate <= 768_000 or not 1 <= channels <= 64:
        raise UsageError(f"cannot read PCM at {sample_rate} Hz with {channels} channels")
    data = ByteSource(source)
    try:
        if input_format is not None:
            unit = SAMPLE_BYTES[input_format] * channels
            size = None if data.size is None else data.size - data.size % unit
            return PcmDecoder(data, WavHeader(input_format, channels, sample_rate, size))
        return _sniffed(data)
    except BaseException:
        data.close()
        raise


def _sniffed(data: ByteSource) -> Decoder:
    """The decoder for whatever the first bytes announce."""
    head = data.peek(12)
    if not head:
        raise InputError(f"{data.name}: is empty (zero bytes)")
    riff = head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] in (b"WAVE", b"")
    if riff:
        try:
            header = read_wav_header(data.exactly, data.skip, data.size)
        except InputError as error:
            raise InputError(f"{data.name}: {error}") from None
        if header.format is not None:
            return PcmDecoder(data, header)
        if data.path is None:
            raise InputError(f"{data.name}: compressed WAV cannot be read from a pipe")
    elif _is_text(head if data.path is None else data.peek(512)):  # a pipe may be slow
        raise InputError(f"{data.name}: is text, not audio")
    container = _container(head)
    if container is None and not riff and (data.path is None or _is_raw_name(data.path)):
        raise InputError(
            f"{data.name}: has no header that says what it is",
            "PCM without a header needs --input-format and --sample-rate",
        )
    return _by_libraries(data, container)


def _container(head: bytes) -> str | None:
    """The kind of file by its first bytes, as far as pipes are concerned."""
    if head[4:8] == b"ftyp":
        return "MP4"
    mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    kinds = {
        b"fLaC": "FLAC", b"OggS": "OGG", b"ID3": "MP3", b"FORM": "AIFF", b"caff": "CAF",
        b".snd": "AU", b"RIFX": "WAV", b"\x1a\x45\xdf\xa3": "WebM",
    }  # fmt: skip
    found = next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)
    return found or ("MP3" if mpeg else None)


def _is_raw_name(path: Path) -> bool:
    return path.suffix.lower() in (".raw", ".pcm")


def _by_libraries(data: ByteSource, container: str | None) -> Decoder:
    """libsndfile, then ffmpeg where there is one; a pipe is spooled for them."""
    file: Path | BinaryIO = data.path or data.spooled()
    data.close()
    reason = container or "unknown format"
    if container not in ("MP4", "WebM"):
        try:
            return FileDecoder(data.name, file, chatty=container == "MP3")
        except ImportError:
            reason = "the package soundfile is missing"
        except RuntimeError as error:  # LibsndfileError
            reason = plain(error)
            if reason.startswith("File does not exist"):  # what it says of a broken MP3
                reason = f"broken {container or 'file'}"
    if shutil.which("ffmpeg"):
        if not isinstance(file, Path):
            file.seek(0)
        found = ffmpeg_decoder(data.name, file)
        if found is not None:
            return found
    elif container in ("MP4", "WebM"):
        reason += " needs ffmpeg"
    raise InputError(f"{data.name}: cannot decode audio ({reason})")


def _is_text(head: bytes) -> bool:
    """Whether these bytes are words rather than sound."""
    try:
        words = head.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        words = head[: error.start].decode("utf-8")
    return len(head) > 0 and all(c.isprintable() or c in "\r\n\t\f" for c in words)


def plain(error: Exception) -> str:
    """What libsndfile says, in the middle of a sentence."""
    text = str(getattr(error, "error_string", error)).strip().rstrip(".")
    return text.removeprefix("Error : ")
