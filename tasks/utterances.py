"""Windows of speech put together clip by clip, with their words: for a codec that learns to listen.

A window starts anywhere, also within a clip and between two frames; clips follow each other with
or without silence between them, each at a pace of its own. What is drawn depends on the generator
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moshi_cli.core.errors import InputError
from moshi_cli.core.text import PAD, Text, align
from moshi_cli.tasks.augment import Augment, resample, spoil
from moshi_cli.tasks.cache import FRAME_HZ, Words
from moshi_cli.tasks.data import Batch, Pack, Row, teacher_scale, teacher_width
from moshi_cli.tasks.randomness import rng_of
from moshi_cli.tasks.spelling import UNKNOWN, Spelling, spell
from moshi_cli.tasks.stages import Flow, Source, weight_of

FADE_S = 0.005  # at the cuts of an excerpt


@dataclass(frozen=True)
class Scene:
    """A window of speech. Times in seconds from its start; words may reach beyond it."""

    wav: np.ndarray  # [S]
    features: np.ndarray | None  # [T, D]
    words: Words
    unknown: tuple[tuple[int, int], ...]  # frames whose words nobody wrote down
    clean: bool  # neither room nor noise


def excerpt(words: Words, rng: np.random.Generator) -> tuple[float, float, Words]:
    """Some words of a clip in a row: from second, to second (half-way to their neighbours; the
    last word's is infinity), the words."""
    count = int(rng.integers(1, len(words) + 1))
    first = int(rng.integers(0, len(words) - count + 1))
    last = first + count
    begin_s = (words[first - 1][2] + words[first][1]) / 2 if first else 0.0
    end_s = (words[last - 1][2] + words[last][1]) / 2 if last < len(words) else np.inf
    return begin_s, end_s, words[first:last]


def faded(clip: np.ndarray, size: int) -> np.ndarray:
    """clip [S] that comes and goes within `size` samples."""
    ramp = np.minimum(np.arange(1, len(clip) + 1) / max(size, 1), 1).astype(np.float32)
    return clip * ramp * ramp[::-1]


class Utterances:
    """Draws windows of the clips of a mix of packs. `text` None: no words; `spelling` None: no
    symbols."""

    def __init__(
        self,
        mix: Sequence[Source],
        text: Text | None,
        flow: Flow | None = None,
        augment: Augment | None = None,
        sample_rate: int = 24_000,
        spelling: Spelling | None = None,
    ):
        self.spelling = spelling
        self.text, self.flow = text, flow or Flow()
        self.augment, self.sample_rate = augment or Augment(), sample_rate
        self.packs = [Pack(source.folder) for source in mix]
        self.clips: list[tuple[Pack, Row]] = []
        odds = []
        for pack, source in zip(self.packs, mix, strict=True):
            for row in pack.rows:
                weight = source.weight * weight_of(row.kind, self.flow.odds)
                if weight > 0 and source.wants(row.kind):
                    self.clips.append((pack, row))
                    odds.append(weight)
        if not self.clips:
            raise InputError("no clip of the packs is of a kind that is wanted")
        self.sums = np.cumsum(odds)
        self.width = teacher_width(self.packs)

    def teacher(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `teacher_scale`."""
        return teacher_scale(self.packs)

    def window(self, frames: int, rng: np.random.Generator) -> Scene:
        """One window of `frames` frames."""
        a, flow, rate = self.augment, self.flow, self.sample_rate
        hop = self.packs[0].frame_samples
        size = frames * hop
        wav = np.zeros(size, np.float32)
        features = None if self.width is None else np.zeros((frames, self.width), np.float32)
        words: list[tuple[str, float, float]] = []
        unknown: list[tuple[int, int]] = []
        at: int | None = None
        while at is None or at < size:
            picked = np.searchsorted(self.sums, rng.random() * self.sums[-1], side="right")
            pack, row = self.clips[min(int(picked), len(self.clips) - 1)]
            clip = pack.pcm[row.offset : row.offset + row.samples].astype(np.float32) / 32768
            pace = 1.0
            if rng.random() < a.speed_share and not row.kind.startswith(flow.own):
                pace = rng.uniform(*a.speed)
                clip = resample(clip, pace)
            begin, said = 0, row.words
            if flow.excerpt and said and rng.random() < flow.excerpt:
                begin_s, end_s, said = excerpt(said, rng)
                begin = int(begin_s / pace * rate)
                end = len(clip) if end_s == np.inf else int(end_s / pace * rate)
                clip = faded(clip[begin:end], int(FADE_S * rate))
            if at is None:
                inside = rng.random() < flow.inside or len(clip) > size
                lead = -rng.random() * len(clip) if inside else rng.uniform(*flow.lead_s) * rate
                at = int(lead)
            first, last = max(at, 0), min(at + len(clip), size)
            gain = 10 ** (rng.uniform(*a.gain_db) / 20)
            wav[first:last] += clip[first - at : last - at] * np.float32(gain)
            shift_s = (at - begin) / rate
            words += [(w, s / pace + shift_s, e / pace + shift_s) for w, s, e in said]
            if not row.words:
                unknown.append((first // hop, -(-last // hop)))
            if features is not None and pack.features is not None:
                self.teach(features, pack, row, at, pace, len(clip), begin)
            gap = 0.0 if rng.random() < flow.tight else rng.uniform(*flow.gap_s)
            if flow.rest and rng.random() < flow.rest:
                gap = rng.uniform(*flow.rest_s)
            at += len(clip) + int(gap * rate)
        wav, clean = spoil(wav, a, rng, rate)
        wav *= 0.99 / max(0.99, float(np.abs(wav).max()))
        return Scene(wav, features, tuple(words), tuple(unknown), clean)

    def row(self, scene: Scene) -> torch.Tensor:
        """Its words as a text row long[T]."""
        assert self.text is not None
        frames = len(scene.wav) // self.packs[0].frame_samples
        row = align(scene.words, frames, self.text, crowding="space")
        for start, end in scene.unknown:
            row[start:end] = UNKNOWN
        return row

    def spans(self, scene: Scene) -> torch.Tensor:
        """The word that is spoken at each frame, long[T]; long ones pass their pieces."""
        assert self.text is not None
        frames = len(scene.wav) // self.packs[0].frame_samples
        row = torch.full((frames,), PAD)
        for word, start_s, end_s in scene.words:
            tokens = self.text.encode(word)
            first, last = round(start_s * FRAME_HZ), round(end_s * FRAME_HZ)
            for t in range(max(first, 0), min(last, frames)):
                row[t] = tokens[(t - first) * len(tokens) // (last - first)] if tokens else PAD
        for start, end in scene.unknown:
            row[start:end] = UNKNOWN
        return row

    def letters(self, scene: Scene) -> torch.Tensor:
        """The symbols of each half frame, long[2, T]."""
        assert self.spelling is not None
        frames = len(scene.wav) // self.packs[0].frame_samples
        row = spell(self.spelling.spelled(scene.words), frames)
        for start, end in scene.unknown:
            row[:, start:end] = UNKNOWN
        return row

    def teach(
        self,
        features: np.ndarray,
        pack: Pack,
        row: Row,
        at: int,
        pace: float,
        samples: int,
        begin: int = 0,
    ) -> None:
        """The teacher's rows of a clip that lies at sample `at`, between its own frames; `begin`
        samples were cut off its front."""
        assert pack.features is not None
        hop, frames = pack.frame_samples, len(features)
        first, last = max(-(-at // hop), 0), min((at + samples) // hop, frames)
        if last <= first:
            return
        base = row.offset // hop
        own = np.asarray(pack.features[base : base + row.frames], np.float32)
        place = ((np.arange(first, last) + 0.5) * hop - at + begin) * pace / hop - 0.5
        place = np.clip(place, 0, len(own) - 1)
        low = np.minimum(place.astype(int), len(own) - 1)
        high = np.minimum(low + 1, len(own) - 1)
        part = (place - low)[:, None].astype(np.float32)
        features[first:last] = own[low] * (1 - part) + own[high] * part

    def draw(self, frames: int, batch: int, generator: torch.Generator) -> Batch:
        """`batch` windows of `frames` frames."""
        rng = rng_of(generator)
        parts = [self.window(frames, rng) for _ in range(batch)]
        wav = torch.from_numpy(np.stack([p.wav for p in parts]))[:, None].float()  # [B, 1, S]
        features = None
        if self.width is not None:
            features = torch.from_numpy(
                np.stack([p.features for p in parts if p.features is not None])
            )
        text = spans = None
        if self.text is not None:
            text = torch.stack([self.row(p) for p in parts])
            spans = torch.stack([self.spans(p) for p in parts])
        clean = torch.tensor([p.clean for p in parts])
        letters = None
        if self.spelling is not None:
            letters = torch.stack([self.letters(p) for p in parts])
        return Batch(wav, features, text, spans, clean, letters)


@dataclass(frozen=True)
class SceneJob:
    """A window to encode, whole words only (see `cache.write_cache`)."""

    utterances: Utterances
    seconds: float
    row: Row

    def sound(self, generator: torch.Generator, rate: int) -> tuple[torch.Tensor, Words]:
        """float32 [S] and the words in it, in time order."""
        rng = rng_of(generator)
        scene = self.utterances.window(round(self.seconds * FRAME_HZ), rng)
        whole = ((w, s, e) for w, s, e in scene.words if s >= 0 and e <= self.seconds)
        return torch.from_numpy(scene.wav), tuple(sorted(whole, key=lambda word: word[1]))
