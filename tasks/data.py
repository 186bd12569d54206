"""Training data: packs of recordings on disk, and the windows cut from them.

A pack is a folder: `pcm.i16` (flat int16, mono, the codec's rate), `index.jsonl` (one row per clip,
`offset_samples` a multiple of the frame) and, if a teacher was run (teachers.py), `feat.f16` (one
float16 row per frame, all zeros where the teacher heard nothing). Everything is memory-mapped. A
manifest (see manifest.py) serves as well: of its recordings, however long, the windows alone are
read. What is drawn depends on the generator alone, so a resumed run sees the same batches.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.audio import SAMPLE_RATE
from moshi_cli.core.errors import InputError
from moshi_cli.tasks.manifest import load_data
from moshi_cli.tasks.stages import Source

LOUD_DB = -50.0  # what is softer is no sound


@dataclass(frozen=True)
class Row:
    """One clip of a pack; times in seconds from its start."""

    id: str
    kind: str
    text: str
    words: tuple[tuple[str, float, float], ...]  # word, start, end
    offset: int  # samples, a multiple of the frame
    samples: int
    voice: str = ""
    qa: int | None = None  # row of the dialogue this clip belongs to

    @property
    def frames(self) -> int:
        """Whole frames of 1920 samples that hold the clip."""
        return -(-self.samples // 1920)


def read_row(line: str, where: str) -> Row:
    """One line of index.jsonl. Raises InputError naming `where`."""
    try:
        d = json.loads(line)
        words = tuple((str(w), float(s), float(e)) for w, s, e in d.get("words") or ())
        voice = d.get("voice") or ""
        return Row(
            id=str(d["id"]), kind=str(d["kind"]), text=d.get("text") or "", words=words,
            offset=int(d["offset_samples"]), samples=int(d["samples"]), qa=d.get("qa"),
            voice=voice if isinstance(voice, str) else json.dumps(voice, sort_keys=True),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not a row of a pack ({error!r})") from error


class Pack:
    """A folder of clips. `pcm` int16 [samples], `rows`, `features` float16 [frames, D] or None."""

    def __init__(self, folder: str | Path, frame_samples: int = 1920):
        self.folder, self.frame_samples = Path(folder), frame_samples
        index, pcm, feat = (self.folder / n for n in ("index.jsonl", "pcm.i16", "feat.f16"))
        for path in (index, pcm):
            if not path.is_file():
                raise InputError(f"{path}: no such file", hint="a pack has pcm.i16 and index.jsonl")
        with index.open(encoding="utf-8") as lines:
            self.rows = [read_row(x, f"{index}:{i}") for i, x in enumerate(lines, 1) if x.strip()]
        self.pcm = np.memmap(pcm, dtype=np.int16, mode="r")
        for row in self.rows:
            if row.offset % frame_samples or row.offset + row.samples > len(self.pcm):
                raise InputError(f"{index}: clip {row.id} does not lie in pcm.i16")
        self.frames = -(-len(self.pcm) // frame_samples)  # the last one may be cut short
        self.features: np.memmap | None = None
        if feat.is_file():
            width, rest = divmod(feat.stat().st_size, 2 * max(self.frames, 1))
            if rest or not width:
                hint = "`moshi data features --force` makes it anew"
                raise InputError(f"{feat}: its size does not fit {self.frames} frames", hint)
            self.features = np.memmap(feat, np.float16, "r", shape=(self.frames, width))

    def loud(self, first: int, frames: int) -> int:
        """Frames of sound among `frames` frames from frame `first`."""
        return int(self.sounding[first + frames] - self.sounding[first])

    @cached_property
    def sounding(self) -> np.ndarray:
        """Frames louder than LOUD_DB, counted from the start: int64 [frames + 1]."""
        whole = self.pcm[: len(self.pcm) // self.frame_samples * self.frame_samples]
        parts = whole.reshape(-1, self.frame_samples)
        square = np.zeros(self.frames, np.float32)
        for i in range(0, len(parts), 4096):
            square[i : i + 4096][: len(parts) - i] = np.square(
                parts[i : i + 4096], dtype=np.float32
            ).mean(1)
        loud = square > (32768 * 10 ** (LOUD_DB / 20)) ** 2
        return np.concatenate([[0], np.cumsum(loud)])

    def wav(self, first: int, frames: int) -> Tensor:
        """Audio of `frames` frames from frame `first`. -> float32 [samples] in [-1, 1]"""
        size = self.frame_samples
        part = torch.from_numpy(self.pcm[first * size : (first + frames) * size].astype(np.float32))
        return F.pad(part / 32768, (0, frames * size - len(part)))


class Library:
    """The recordings of a manifest as a pack that nobody has to make; read where they lie."""

    features: np.ndarray | None = None

    def __init__(self, place: str | Path, frame_samples: int = 1920):
        self.frame_samples = frame_samples
        self.recordings = load_data([place], "mono", words=False).recordings
        self.rows, offset = [], 0
        for r in self.recordings:
            row = Row(r.id, r.kind, r.text, (), offset, round(r.length_s * SAMPLE_RATE), r.voice)
            self.rows.append(row)
            offset += (row.frames + 1) * frame_samples  # recordings are no neighbours
        self.frames = offset // frame_samples
        self.firsts = [row.offset // frame_samples for row in self.rows]

    def wav(self, first: int, frames: int) -> Tensor:
        """Audio of `frames` frames from frame `first`, all of one recording. -> float32 [S]"""
        at, size = bisect_right(self.firsts, first) - 1, frames * self.frame_samples
        start_s = (first - self.firsts[at]) * self.frame_samples / SAMPLE_RATE
        r = self.recordings[at]
        part = r.read(start_s, min(size / SAMPLE_RATE, r.length_s - start_s))[0, :size]
        return F.pad(part, (0, size - len(part)))

    def loud(self, first: int, frames: int) -> int:
        """Frames of sound among `frames` frames from frame `first`."""
        parts = self.wav(first, frames).view(frames, -1)
        return int((parts.square().mean(1) > 10 ** (LOUD_DB / 10)).sum())


def open_pack(place: str | Path, frame_samples: int = 1920) -> Pack | Library:
    """A pack, or a manifest as one."""
    folder = Path(place)
    pack = folder.is_dir() and not (folder / "manifest.jsonl").is_file()
    return Pack(folder, frame_samples) if pack else Library(place, frame_samples)


def runs_of(pack: Pack | Library, source: Source) -> list[tuple[int, int]]:
    """Stretches of neighbouring clips that `source` wants: (first frame, frames)."""
    runs: list[tuple[int, int]] = []
    for row in sorted(pack.rows, key=lambda r: r.offset):
        if not source.wants(row.kind):
            continue
        first = row.offset // pack.frame_samples
        frames = min(-(-row.samples // pack.frame_samples), pack.frames - first)
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + frames)
        else:
            runs.append((first, frames))
    return runs


def teacher_width(packs: Sequence[Pack | Library]) -> int | None:
    """D of the teacher's features; None without a teacher. InputError if packs differ."""
    widths = {p.features.shape[1] for p in packs if p.features is not None}
    if len(widths) > 1:
        raise InputError(f"the packs have teacher features of different widths {widths}")
    return widths.pop() if widths else None


def teacher_scale(packs: Sequence[Pack | Library]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of the teacher's features, over every 8th frame.

    Most of a raw feature vector is the same in every frame; what is said is in the rest.
    """
    parts = [np.asarray(p.features[::8]) for p in packs if p.features is not None]
    x = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    x = x[x.abs().amax(1) > 0]
    return x.mean(0), x.std(0).clamp_min(1e-4)


@dataclass(frozen=True)
class Batch:
    """Windows for the codec."""

    wav: Tensor  # [B, 1, S]
    features: Tensor | None  # [B, T, D], rows of zeros where absent; None: no teacher anywhere
    text: Tensor | None = None  # long[B, T]: tokens where their words start; -100: not known
    spans: Tensor | None = None  # long[B, T]: tokens as long as their words last; -100: not known
    clean: Tensor | None = None  # bool[B]: worth reconstructing; None: all are
    letters: Tensor | None = None  # long[B, 2, T]: symbols of each half frame (see spelling.py)

    def to(self, device: torch.device) -> Batch:
        """The same, there."""
        parts = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if part is None else part.to(device) for part in parts))  # type: ignore


class Windows:
    """Random frame-aligned windows from several packs, drawn in proportion to their weights.

    Windows may span neighbouring clips; stretches shorter than the window are not used.
    """

    def __init__(self, sources: Sequence[Source], frame_samples: int = 1920):
        self.sources = list(sources)
        self.packs = [open_pack(s.folder, frame_samples) for s in self.sources]
        self.runs = [runs_of(p, s) for p, s in zip(self.packs, self.sources, strict=True)]
        self.width = teacher_width(self.packs)
        self.starts: dict[tuple[int, int], np.ndarray] = {}  # (source, frames) -> cumulative count

    @property
    def seconds(self) -> float:
        """Audio that can be drawn from, in seconds at 24 kHz frames of 80 ms."""
        return sum(n for runs in self.runs for _, n in runs) * 0.08

    def teacher(self) -> tuple[Tensor, Tensor]:
        """See `teacher_scale`."""
        return teacher_scale(self.packs)

    def _pick(self, source: int, frames: int, generator: torch.Generator) -> int:
        runs = self.runs[source]
        key = (source, frames)
        if key not in self.starts:
            self.starts[key] = np.cumsum([max(n - frames + 1, 0) for _, n in runs])
        ends = self.starts[key]
        if not len(ends) or not ends[-1]:
            name = self.sources[source].folder
            raise InputError(f"{name}: no stretch of {frames} frames to draw from")
        at = int(torch.randint(int(ends[-1]), (), generator=generator))
        run = int(np.searchsorted(ends, at, side="right"))
        return runs[run][0] + at - int(ends[run - 1] if run else 0)

    def draw(
        self,
        frames: int,
        batch: int,
        generator: torch.Generator,
        gain_db: tuple[float, float] = (0.0, 0.0),
        tries: int = 1,
    ) -> Batch:
        """`batch` windows of `frames` frames, each with its own gain (peaks kept below 1).

        Of `tries` candidates the one with the most frames of sound is taken.
        """
        weights = torch.tensor([s.weight for s in self.sources])
        chosen = torch.multinomial(weights, batch, replacement=True, generator=generator)
        wavs, features = [], []
        for source in chosen.tolist():
            pack = self.packs[source]
            starts = [self._pick(source, frames, generator) for _ in range(tries)]
            first = starts[0]
            if tries > 1:
                first = max(starts, key=lambda i: pack.loud(i, frames))
            wavs.append(pack.wav(first, frames))
            if self.width is not None:
                row = torch.zeros(frames, self.width)
                if pack.features is not None:
                    part = pack.features[first : first + frames].astype(np.float32)
                    row = torch.from_numpy(part)
                features.append(row)
        wav = torch.stack(wavs)[:, None]  # [B, 1, S]
        low, high = gain_db
        db = low + (high - low) * torch.rand(batch, 1, 1, generator=generator)
        wav = wav * 10 ** (db / 20)
        wav = wav * (0.99 / wav.abs().amax(-1, keepdim=True).clamp_min(0.99))
        return Batch(wav, torch.stack(features) if features else None)
