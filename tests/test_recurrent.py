"""The recurrent language model: step by step as in one go, and what it learns."""

from __future__ import annotations

import math
import random

import pytest
import torch

from moshi_cli.core.errors import InputError
from moshi_cli.core.recurrent import Recurrent
from moshi_cli.core.text import BOS, EOS
from moshi_cli.tasks.recurrent import NOTHING, Learning, batches, learn, padded, surprise

SIZE = 16
SMALL = Learning(passes=100, dim=8, width=16, dropout=0.0, batch=60, rate=3e-2)


def sentences(count: int) -> list[list[int]]:
    """The last token is the first one again, whatever stands between them: triples cannot tell."""
    draw, rows = random.Random(4), []
    for _ in range(count):
        first, between = draw.randint(4, 6), [draw.randint(7, 8) for _ in range(draw.randint(1, 2))]
        rows.append([BOS, first, *between, 9, first, EOS])
    return rows


def test_steps_are_the_whole() -> None:
    model = Recurrent(SIZE, 6, 10).eval().requires_grad_(False)
    model.refresh()
    rows = torch.randint(4, SIZE, (3, 7))
    rows[:, 0] = BOS
    whole = model(rows).log_softmax(-1)  # [3, 7, V]
    memory = torch.zeros(3, model.memory)  # zeros begin a sentence
    for n in range(7):
        every = torch.arange(SIZE).expand(3, SIZE)
        torch.testing.assert_close(model.after(memory, every), whole[:, n])
        if n < 6:
            memory = model.step(memory, rows[:, n + 1])


def test_it_remembers_how_a_sentence_began() -> None:
    model = learn(sentences(120), SIZE, SMALL)
    new = [[BOS, first, 8, 7, 9] for first in (4, 5, 6)]
    last = model(torch.tensor(new))[:, -1].softmax(-1)
    for row, first in zip(last, (4, 5, 6), strict=True):
        assert float(row[first]) > 0.8, row
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training


def test_it_is_the_same_again_and_leaves_other_numbers_alone() -> None:
    told: list[tuple[int, float]] = []
    how, rows = Learning(passes=2, dim=4, width=4, batch=60, seed=3), sentences(20)
    before = torch.random.get_rng_state()
    one = learn(rows, SIZE, how, lambda done, nats: told.append((done, nats)))
    assert torch.equal(torch.random.get_rng_state(), before)
    two = learn(rows, SIZE, how)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [done for done, _ in told] == [1, 2]
    assert all(0 < nats < 2 * math.log(SIZE) for _, nats in told)


def test_batches_hold_every_row_once() -> None:
    rows = sentences(101)
    found = batches(rows, SMALL, 0)
    assert sorted(i for batch in found for i in batch) == list(range(101))
    assert all(len(batch) * max(len(rows[i]) for i in batch) <= 60 for batch in found)
    assert found != batches(rows, SMALL, 1)
    assert batches([[BOS] * 99], SMALL, 0) == [[0]]  # longer than a batch


def test_what_is_behind_a_row_costs_nothing() -> None:
    rows = [[BOS, 4, EOS], [BOS, 4, 5, 6, 7, EOS]]
    tokens = padded(rows)
    assert tokens[0].tolist() == [BOS, 4, EOS, NOTHING, NOTHING, NOTHING]
    logits = torch.randn(2, 5, SIZE)
    parts = [
        -logits[b, n].log_softmax(-1)[row[n + 1]]
        for b, row in enumerate(rows)
        for n in range(len(row) - 1)
    ]
    torch.testing.assert_close(surprise(logits, tokens), torch.stack(parts).mean())


def test_nothing_to_learn_from() -> None:
    with pytest.raises(InputError, match="no text"):
        learn([[BOS]], SIZE)
