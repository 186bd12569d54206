"""Streaming state: small dataclasses of tensors that the caller owns and passes in.

`None` in place of a state means training or offline work. Every tensor has the slot as its leading
axis, so one state serves B independent streams: a slot can be paused (`active` False: its state
does not move), reset (rewound), taken out and put back. States are mutated in place and never
change shape, so a compiled or captured step keeps working.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros. On a CPU their memory is taken page by page, when something is first written there:
    a young stream does not pay for a long memory."""
    count = prod(shape)
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, **own), dtype=dtype).view(shape)


def keep(old: Tensor, new: Tensor, active: Tensor | None) -> None:
    """Write `new` into `old` in place for the active slots. old, new [B, ...]; active bool[B]."""
    if active is None:
        old.copy_(new)
    else:
        old.copy_(torch.where(active.view(-1, *[1] * (old.dim() - 1)), new, old))


class State:
    """Base of the state dataclasses: fields are tensors, other states, lists of either, or None."""

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Tensor, State]]:
        """Yield (path, tensor, owner) of every tensor below this state."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            many = isinstance(value, list)
            for i, item in enumerate(value if many else [value]):
                path = f"{prefix}{field.name}/{i}" if many else f"{prefix}{field.name}"
                if isinstance(item, State):
                    yield from item.leaves(path + "/")
                elif isinstance(item, Tensor):
                    yield path, item, self

    def reset(self, slots: Tensor) -> None:
        """Rewind the slots marked in bool[B]. What `rewind` of each part leaves alone stays."""
        for _, tensor, owner in self.leaves():
            owner.rewind(tensor, slots)

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        """How one of this state's own tensors starts over: zeros, unless a subclass says else."""
        tensor.masked_fill_(slots.view(-1, *[1] * (tensor.dim() - 1)), 0)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by path ("layers/3/k"), as safetensors wants them."""
        return {path: tensor for path, tensor, _ in self.leaves()}

    def take(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot's state: path -> tensor without the slot axis (a voice prompt)."""
        return {path: tensor[slot].clone() for path, tensor in self.tensors().items()}

    def put(self, slot: int, saved: dict[str, Tensor]) -> None:
        """Restore what `take` gave into a slot of a state of the same model and window."""
        mine = self.tensors()
        assert mine.keys() == saved.keys(), sorted(mine.keys() ^ saved.keys())
        for path, tensor in mine.items():
            assert tensor[slot].shape == saved[path].shape, (path, tensor.shape, saved[path].shape)
            tensor[slot].copy_(saved[path])


@dataclass
class KVCache(State):
    """Keys and values of one attention layer: a ring over absolute positions."""

    k: Tensor  # [B, Hkv, R, Dh]
    v: Tensor  # [B, Hkv, R, Dh]

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        """Nothing to clear: the stack's clock hides stale keys."""


@dataclass
class Tail(State):
    """The last inputs of a causal convolution: its left context for the next call."""

    x: Tensor  # [B, C, kernel - stride]
    fresh: Tensor  # bool[B]: nothing heard yet; of a replicate-padded conv, which fills x then

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        if tensor is self.fresh:
            tensor.logical_or_(slots)
        else:
            super().rewind(tensor, slots)


@dataclass
class Overlap(State):
    """The unfinished outputs of a transposed convolution, without the bias."""

    x: Tensor  # [B, C, kernel - stride]
