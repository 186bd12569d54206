"""A map from hashes of sequences to numbers, as tensors: what the tables of n-grams are made of.

Keys are hashes of 32 bits: of a million entries, one look-up in four thousand finds what is not
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_cli.core.sampling import mix


def fold(key: Tensor, token: Tensor) -> Tensor:
    """The 64-bit key of an n-gram and one more token, long -> long (they broadcast)."""
    return mix(key * 31 + token + 2)


def seed(order: int) -> int:
    """Where the keys of n-grams of an order begin."""
    return order * 0x51ED270B


def brief(key: Tensor) -> Tensor:
    """The 32 bits of a key that the table holds, as int32."""
    return (key >> 32).to(torch.int32)


def look_up(keys: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """keys int32[M], rising; key long[...] -> where it may be, long[...]; if it is, bool[...]."""
    wanted = brief(key)
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return at, keys[at] == wanted


@dataclass
class Listed:
    """A map from n-grams to numbers: sorted keys and their values."""

    keys: Tensor  # int32 [M], rising
    values: Tensor  # float32 [M]

    def find(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """long[...] -> values [...] (0 where there is none), whether there is one, bool[...]."""
        at, there = look_up(self.keys, key)
        return torch.where(there, self.values[at], 0.0), there

    def to(self, device: torch.device | str) -> Listed:
        """The same on a device."""
        return Listed(self.keys.to(device), self.values.to(device))
