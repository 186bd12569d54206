"""Sources of sound for the sessions of a loop: frames of one channel, counted to the sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME_SAMPLES = 1920
FRAME_S = 0.08


class Sound:
    """Frames of one channel from anything that yields sound, with a count of the true samples.

    source: a tensor float32 [S] or [1, S] (a whole recording), or an iterable of frames [1, ≤1920]
    such as `audio.frames` gives; only the last frame may be short or, if the source counts its
    `.samples`, padded.
    """

    def __init__(self, source: Tensor | Iterable[Tensor]) -> None:
        if isinstance(source, Tensor):
            source = source.reshape(-1).split(FRAME_SAMPLES)
        self.source = source
        self.frames_left = iter(source)
        self.frames = 0
        self.ended = False
        self._samples = 0

    def next(self) -> Tensor | None:
        """The next frame, float32 [1, 1920], or None at the end."""
        frame = None if self.ended else next(self.frames_left, None)
        if frame is None:
            self.ended = True
            return None
        frame = frame.reshape(1, -1)
        self._samples += frame.shape[1]
        self.frames += 1
        assert frame.shape[1] <= FRAME_SAMPLES, tuple(frame.shape)
        self.ended = self.samples < self.frames * FRAME_SAMPLES
        return F.pad(frame, (0, FRAME_SAMPLES - frame.shape[1]))

    @property
    def samples(self) -> int:
        """True samples so far, at 24 kHz."""
        return int(getattr(self.source, "samples", self._samples))

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return self.samples / 24_000


class Split:
    """The channels of one source as sources of their own, each with its count of samples.

    What one of them has not taken yet is kept, so they should be heard side by side.
    """

    def __init__(self, source: Iterable[Tensor], channels: int) -> None:
        self.source, self.frames_left = source, iter(source)
        self.channels = [Channel(self) for _ in range(channels)]
        self.samples = 0

    def pull(self) -> None:
        """One more frame for everybody; StopIteration at the end."""
        frame = next(self.frames_left)
        self.samples += frame.shape[-1]
        samples = int(getattr(self.source, "samples", self.samples))
        for channel, part in zip(self.channels, frame, strict=True):
            channel.waiting.append((part[None], samples))


class Channel:
    """One channel of a `Split`: an iterator of frames [1, 1920]."""

    def __init__(self, split: Split) -> None:
        self.split, self.samples = split, 0
        self.waiting: deque[tuple[Tensor, int]] = deque()

    def __iter__(self) -> Channel:
        return self

    def __next__(self) -> Tensor:
        if not self.waiting:
            self.split.pull()
        frame, self.samples = self.waiting.popleft()
        return frame


class Heard:
    """A source that remembers what it gave until somebody wants to write it down."""

    def __init__(self, source: Iterable[Tensor]) -> None:
        self.source = source
        self.kept: list[Tensor] = []
        self._samples = 0

    @property
    def samples(self) -> int:
        """True samples so far."""
        return int(getattr(self.source, "samples", self._samples))

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self.source:
            self.kept.append(frame)
            self._samples += frame.shape[-1]
            yield frame

    def take(self, samples: int) -> Tensor:
        """The next samples [1, samples], silence where there are none."""
        joined = torch.cat(self.kept, 1) if self.kept else torch.zeros(1, 0)
        self.kept = [joined[:, samples:]]
        return F.pad(joined[:, :samples], (0, max(0, samples - joined.shape[1])))
