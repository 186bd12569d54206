"""Sound to codes and back, in constant memory: the codec as a task.

`Coder` runs one direction of Mimi over B slots, a few frames of each at a time; `encode` and
`decode` are the same for one stream, as generators. Any number of frames per step and any company
in the other slots give the same result as the whole recording at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from moshi_cli.core.errors import InputError
from moshi_cli.core.mimi import Mimi
from moshi_cli.tasks.codes import CodesInfo


class Coder:
    """One direction of a codec over `slots` independent streams, `frames` of each per step.

    direction "encode": chunks float32 [1, n · 1920] -> codes long[Q, n].
    direction "decode": chunks long[Q, n] -> float32 [1, n · 1920]. 1 ≤ n ≤ frames.
    """

    def __init__(
        self,
        mimi: Mimi,
        direction: Literal["encode", "decode"],
        *,
        slots: int = 1,
        frames: int = 1,
    ) -> None:
        self.mimi, self.direction, self.slots, self.frames = mimi, direction, slots, frames
        self.device = next(mimi.parameters()).device
        both = mimi.init_state(slots, device=self.device)
        self._encoder, self._decoder = both.encoder, both.decoder
        self._unit = mimi.frame_samples if direction == "encode" else 1  # columns of one frame

    def reset(self, slot: int) -> None:
        """A new stream begins in this slot."""
        chosen = torch.arange(self.slots, device=self.device) == slot
        state = self._encoder if self.direction == "encode" else self._decoder
        state.reset(chosen)

    @torch.inference_mode()
    def step(self, chunks: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One chunk per slot, None for slots that pause. A chunk of fewer than `frames` frames is
        the last of its stream, unless there is only one slot."""
        assert len(chunks) == self.slots, (len(chunks), self.slots)
        counts = [0 if c is None else c.shape[-1] // self._unit for c in chunks]
        if not any(counts):
            return [None] * self.slots
        width = (counts[0] if self.slots == 1 else self.frames) * self._unit
        like = next(c for c in chunks if c is not None)
        block = like.new_zeros(self.slots, like.shape[0], width, device=self.device)
        for slot, chunk in enumerate(chunks):
            if chunk is not None:
                block[slot, :, : chunk.shape[-1]] = chunk
        active = None if all(counts) else torch.tensor([n > 0 for n in counts], device=self.device)
        if self.direction == "encode":
            out, unit = self.mimi.encode(block, self._encoder, active), 1
        else:
            out, unit = self.mimi.decode(block, self._decoder, active), self.mimi.frame_samples
        out = out.cpu()
        return [out[i, :, : n * unit] if n else None for i, n in enumerate(counts)]


class Job(Protocol):
    """One recording on its way through a coder."""

    def pull(self, frames: int) -> Tensor | None:
        """The next chunk: `frames` frames, fewer only at the end, None after it. InputError."""

    def push(self, out: Tensor) -> None:
        """What the coder made of the chunk that was pulled last."""


J = TypeVar("J", bound=Job)


def drive(coder: Coder, jobs: Iterator[J]) -> Iterator[tuple[J, InputError | None]]:
    """Run jobs through the slots of a coder; each is yielded when it has ended, or failed."""
    seats: list[J | None] = [None] * coder.slots
    while True:
        for slot, seat in enumerate(seats):
            if seat is None and (job := next(jobs, None)) is not None:
                seats[slot] = job
                coder.reset(slot)
        if not any(seat is not None for seat in seats):
            return
        chunks: list[Tensor | None] = [None] * coder.slots
        for slot, seat in enumerate(seats):
            if seat is None:
                continue
            error = None
            try:
                chunks[slot] = seat.pull(coder.frames)
            except InputError as caught:
                error = caught
            if chunks[slot] is None:
                seats[slot] = None
                yield seat, error
        for seat, out in zip(seats, coder.step(chunks), strict=True):
            if seat is not None and out is not None:
                seat.push(out)


def encode(mimi: Mimi, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames float32 [1, n · 1920] -> codes long[Q, n], each as soon as its sound is there."""
    coder = Coder(mimi, "encode")
    for chunk in chunks:
        (codes,) = coder.step([chunk])
        assert codes is not None
        yield codes


def decode(mimi: Mimi, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """codes long[n, T] -> float32 [1, T · 1920]; uses as many codebooks as are given."""
    coder = Coder(mimi, "decode")
    for chunk in chunks:
        (pcm,) = coder.step([chunk])
        assert pcm is not None
        yield pcm


def describe(mimi: Mimi, codebooks: int | None = None) -> CodesInfo:
    """What codes of this codec are; codebooks: how many, if not those in use."""
    return CodesInfo(
        codebooks or mimi.num_codebooks, mimi.config.quantizer.size, None, mimi.fingerprint,
        mimi.sample_rate, mimi.frame_samples,
    )  # fmt: skip
