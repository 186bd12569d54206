"""Dropout of what the layers of a transformer add (Srivastava et al. 2014), for some rows of a
batch.

It is put on from outside, since layers may be compiled and need not know of training. Each row has
a generator of its own, so a step repeats however its rows are spread over batches and processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Dropout:
    """Leaves out a share of each layer's update, channel by channel; what is left counts more."""

    def __init__(self, layers: Iterable[nn.Module], share: float):
        """layers: their first argument and their result are [B, S, D]. share: below 1."""
        self.share = share
        self.rows: Tensor | None = None
        self.generators: Sequence[torch.Generator] = ()
        for layer in layers:
            layer.register_forward_hook(self.thinned)

    @contextmanager
    def on(self, rows: Tensor, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Within this, for the rows of bool[B]; a generator for each of the B."""
        self.rows, self.generators = rows, generators
        try:
            yield
        finally:
            self.rows, self.generators = None, ()

    def thinned(self, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """The hook: None leaves a result as it is."""
        if self.rows is None or not self.rows.any():
            return None
        more = torch.zeros(out.shape)  # of the update
        for i, generator in enumerate(self.generators):
            if self.rows[i]:
                kept = torch.rand(out.shape[1:], generator=generator) >= self.share
                more[i] = kept / (1 - self.share) - 1
        return out + (out - given[0]) * more.to(out)
