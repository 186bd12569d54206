"""What the model is told beside the streams: a word from a list, or a sequence of vectors.

Every conditioner ends in a projection to the temporal width D and has a learnt vector for
"nothing". The fuser adds some conditions to every input and lets the layers attend to others. All
in float32, whatever the model's dtype; the fused result is cast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.attention import CrossCache
from moshi_cli.core.config import ConditionConfig, FuserConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.layers import table
from moshi_cli.core.state import State

Value = str | Tensor | None  # a word; vectors [N, dim] (rows of NaN are left out); nothing


@dataclass
class Conditions(State):
    """Fused conditions per slot, ready for the temporal transformer."""

    sum: Tensor | None  # [B, 1, D], added to every input
    cross: list[CrossCache]  # one per layer, or empty

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        """Conditions outlive a reset; a new session writes its own."""


class Conditioner(nn.Module):
    """One condition: values of B slots -> [B, N, D] in float32."""

    def __init__(self, config: ConditionConfig, dim: int):
        super().__init__()
        self.config = config
        self.out = nn.Linear(config.dim, dim, bias=False)
        self.padding = nn.Parameter(torch.zeros(1, 1, dim))
        lut = config.kind == "lut"
        self.table = table(config.bins + 1, config.dim, std=1.0) if lut else None

    def row(self, value: str) -> int:
        """Table row of a word; ModelError if it is not one of the known words."""
        c = self.config
        if not c.values:
            return int.from_bytes(hashlib.sha256(value.encode()).digest(), "big") % c.bins
        if value not in c.values:
            raise ModelError(
                f"{value!r} is not a value of the condition {c.name!r}",
                hint=f"known values: {', '.join(c.values)}",
            )
        return c.values.index(value)

    def forward(self, values: Sequence[Value]) -> Tensor:
        """One value per slot; None gives the learnt vector. -> [B, N, D]"""
        c, device = self.config, self.padding.device
        if self.table is not None:
            words = [v for v in values if v is not None]
            if not all(isinstance(v, str) for v in words):
                raise ModelError(f"the condition {c.name!r} takes a word")
            rows = [c.bins if v is None else self.row(str(v)) for v in values]
            x = F.embedding(torch.tensor(rows, device=device)[:, None], self.table)
            mask = torch.tensor([v is not None for v in values], device=device)[:, None]
        else:
            tensors = [v for v in values if isinstance(v, Tensor)]
            if any(isinstance(v, str) or (v is not None and v.dim() != 2) for v in values) or any(
                v.shape[1] != c.dim for v in tensors
            ):
                raise ModelError(f"the condition {c.name!r} takes vectors of width {c.dim}")
            longest = max((len(v) for v in tensors), default=1)
            x = torch.full((len(values), longest, c.dim), math.nan, device=device)
            for i, v in enumerate(values):
                if isinstance(v, Tensor):
                    x[i, : len(v)] = v.to(x)
            mask = ~x.isnan().any(-1)  # [B, N]
            x = x.nan_to_num(0.0)
        y = self.out(x.float())
        there = mask[..., None].to(y)
        return there * y + (1 - there) * self.padding


def sin_positions(length: int, dim: int, device: torch.device) -> Tensor:
    """cos in the first half, sin in the second, periods from 2π to 10000 · 2π. -> [length, D]"""
    half = dim // 2
    i = torch.arange(half, device=device, dtype=torch.float32)
    t = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    phase = t / 10_000 ** (i / (half - 1))
    return torch.cat([phase.cos(), phase.sin()], -1)


class Conditioning(nn.Module):
    """All conditioners of a model and its fuser."""

    def __init__(self, configs: Sequence[ConditionConfig], fuser: FuserConfig | None, dim: int):
        super().__init__()
        self.conditioners = nn.ModuleDict({c.name: Conditioner(c, dim) for c in configs})
        self.fuser = fuser or FuserConfig()

    def encode(self, values: Sequence[Mapping[str, Value]]) -> dict[str, Tensor]:
        """One mapping per slot, condition -> value; missing is None. -> name: [B, N, D]"""
        for name in {name for each in values for name in each}:
            if name not in self.conditioners:
                known = ", ".join(self.conditioners) or "none"
                raise ModelError(f"no condition {name!r} here", hint=f"conditions: {known}")
        return {
            name: conditioner([each.get(name) for each in values])
            for name, conditioner in self.conditioners.items()
        }

    def fuse(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """-> (sum [B, 1, D] or None, cross source [B, N, D] or None), float32."""
        total = None
        for name in self.fuser.sum:
            x = encoded[name]
            if x.shape[1] != 1:
                raise ModelError(f"the condition {name!r} is summed but has {x.shape[1]} vectors")
            total = x if total is None else total + x
        if not self.fuser.cross:
            return total, None
        source = torch.cat([encoded[name] for name in self.fuser.cross], 1)
        if self.fuser.cross_positions:
            at = sin_positions(source.shape[1], source.shape[2], source.device)
            source = source + self.fuser.cross_scale * at
        return total, source
