"""Recordings through a codec and back, several at a time, and what becomes of their codes.

Two things that a code should survive: another pass (idempotence, paper Table 16), and a recording
that begins a little later, so that the frames lie elsewhere (stability).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, cat

from moshi_cli.core.mimi import Mimi
from moshi_cli.tasks.codebooks import agreement
from moshi_cli.tasks.codec import Coder, drive

FRAMES = 10  # per step


@dataclass(frozen=True)
class Decoded:
    """What is left of a recording after some number of codebooks."""

    wav: Tensor  # float32 [S], as long as the recording
    same: list[int]  # per codebook: frames whose code is the same when decoded sound is encoded
    frames: int


@dataclass(frozen=True)
class Later:
    """The codes of a recording without its first moments, beside those of the whole."""

    same: list[int]  # per codebook: frames of one number whose code is the same
    frames: int


@dataclass(frozen=True)
class Passage:
    """One recording."""

    codes: Tensor  # long[Q, T], of as many codebooks as were asked for at most
    decoded: dict[int, Decoded]  # codebooks -> what is left
    later: Later | None = None  # None: nothing is left of it, or it was not asked for


class Whole:
    """A tensor [R, n · unit] on its way through a coder."""

    def __init__(self, source: Tensor, unit: int) -> None:
        self.source, self.unit, self.at = source, unit, 0
        self.out: list[Tensor] = []

    def pull(self, frames: int) -> Tensor | None:
        first, self.at = self.at, self.at + frames * self.unit
        part = self.source[:, first : self.at]
        return part if part.shape[1] else None

    def push(self, out: Tensor) -> None:
        self.out.append(out)


class Roundtrip:
    """A codec, `slots` recordings at a time. Uses the first max(counts) codebooks.

    shift: samples that are left out in front to see which codes stay the same; 0: not asked for.
    """

    def __init__(self, mimi: Mimi, counts: Sequence[int], slots: int = 1, shift: int = 0) -> None:
        self.mimi, self.counts, self.shift = mimi, tuple(counts), shift
        mimi.set_num_codebooks(max(counts))
        self.encoder = Coder(mimi, "encode", slots=slots, frames=FRAMES)
        self.decoder = Coder(mimi, "decode", slots=slots, frames=FRAMES)

    def _through(self, coder: Coder, sources: Sequence[Tensor], unit: int) -> list[Tensor]:
        jobs = [Whole(source, unit) for source in sources]
        for _ in drive(coder, iter(jobs)):
            pass
        return [cat(job.out, 1) for job in jobs]

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """float32 [S] each -> codes long[Q, T] each; what is missing of a frame is silence."""
        size = self.mimi.frame_samples
        padded = [F.pad(wav, (0, -len(wav) % size))[None] for wav in wavs]
        return self._through(self.encoder, padded, size)

    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """codes long[n, T] each -> float32 [T · 1920] each."""
        return [wav[0] for wav in self._through(self.decoder, codes, 1)]

    def later(self, wavs: Sequence[Tensor], codes: Sequence[Tensor]) -> list[Later | None]:
        """Recordings and their codes -> which of these stay the same if they begin later."""
        left = [wav[self.shift :] if self.shift else wav[:0] for wav in wavs]
        found = iter(self.encode([wav for wav in left if len(wav)]))
        told: list[Later | None] = []
        for wav, before in zip(left, codes, strict=True):
            after = next(found) if len(wav) else before[:, :0]
            frames = after.shape[1]
            same = agreement(before[:, :frames], after)
            told.append(Later(same, frames) if frames else None)
        return told

    def __call__(self, wavs: Sequence[Tensor]) -> list[Passage]:
        """Recordings float32 [S], none of them empty."""
        every = self.encode(wavs)
        decoded: list[dict[int, Decoded]] = [{} for _ in wavs]
        for n in self.counts:
            sounds = self.decode([codes[:n] for codes in every])
            again = self.encode(sounds)
            for i, (sound, codes) in enumerate(zip(sounds, again, strict=True)):
                same = agreement(every[i][:n], codes[:n])
                decoded[i][n] = Decoded(sound[: len(wavs[i])], same, codes.shape[1])
        return [*map(Passage, every, decoded, self.later(wavs, every))]
