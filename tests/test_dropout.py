"""Dropout of what layers add."""

from __future__ import annotations

import torch
from torch import nn

from moshi_cli.tasks.dropout import Dropout
from moshi_cli.tasks.randomness import generator_of


class Adds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2.0


def test_a_share_of_the_update_is_left_out_of_the_rows_asked_for() -> None:
    layer, x = Adds(), torch.full((3, 50, 40), 5.0)
    dropout = Dropout([layer], 0.25)
    assert torch.equal(layer(x), x + 2)
    rows = torch.tensor([True, False, True])
    with dropout.on(rows, [generator_of(i) for i in range(3)]):
        out = layer(x)
    assert torch.equal(out[1], x[1] + 2)
    left = (out[rows] - 5).abs() < 1e-5
    assert 0.22 < float(left.float().mean()) < 0.28
    assert torch.allclose(out[rows][~left], torch.tensor(5 + 2 / 0.75))
    assert not torch.equal(out[0], out[2])
    assert torch.equal(layer(x), x + 2)  # it is over


def test_a_row_drops_the_same_whatever_is_beside_it() -> None:
    layers, x = [Adds(), Adds()], torch.zeros(3, 10, 8)
    dropout, every = Dropout(layers, 0.5), torch.ones(3, dtype=torch.bool)

    def run(rows: list[int]) -> torch.Tensor:
        with dropout.on(every[rows], [generator_of(7, i) for i in rows]):
            return layers[1](layers[0](x[rows]))

    assert torch.equal(run([0, 1, 2])[1:], run([1, 2]))
    first = run([0])
    assert not torch.equal((first == 0), (first == 8))  # the layers do not drop alike
    assert {0.0, 4.0, 8.0} == set(first.unique().tolist())
