"""Tokens from logits: distribution, cut-offs, and noise that depends on nobody else."""

from __future__ import annotations

import math

import pytest
import torch

from moshi_cli.core.config import Sampling
from moshi_cli.core.errors import UsageError
from moshi_cli.core.sampling import Noise, choose, guide


def noise(count: int) -> Noise:
    return Noise(torch.zeros(count, dtype=torch.long), torch.arange(count))


def test_noise_is_exponential() -> None:
    e = noise(400).exponential(3, 500).double()
    assert (e > 0).all() and e.isfinite().all()
    assert abs(e.mean() - 1) < 0.01 and abs(e.var() - 1) < 0.03
    assert abs((e > math.log(20)).double().mean() - 0.05) < 0.003
    rows = (e - e.mean(1, keepdim=True)) / e.std(1, keepdim=True)
    assert abs((rows[1:] * rows[:-1]).mean()) < 0.01  # neighbouring steps are unrelated
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 0.01  # and so are neighbouring ranks


def test_noise_is_a_function_of_seed_step_and_stream() -> None:
    def draw(seed: int, step: int, stream: int) -> float:
        return float(Noise(torch.tensor([seed]), torch.tensor([step])).exponential(stream, 1))

    points = [(s, t, k) for s in (0, 1, 42, 2**40) for t in (0, 1, 999) for k in (0, 1, 32)]
    assert len({draw(*p) for p in points}) == len(points)
    together = Noise(torch.tensor([1, 42]), torch.tensor([999, 0])).exponential(1, 7)
    alone = Noise(torch.tensor([42]), torch.tensor([0])).exponential(1, 7)
    assert torch.equal(together[1:], alone)


def test_choose_follows_the_softmax() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens = choose((2 * p.log()).expand(20_000, 4), 2.0, 0, 1.0, noise(20_000), 0)
    torch.testing.assert_close(tokens.bincount() / 20_000, p, atol=0.012, rtol=0)


def test_cut_offs() -> None:
    logits = torch.tensor([3.0, 1.0, 2.9, 0.0]).expand(500, 4)

    def seen(top_k: int, top_p: float) -> set[int]:
        return set(choose(logits, 5.0, top_k, top_p, noise(500), 0).tolist())

    assert seen(0, 1.0) == {0, 1, 2, 3} and seen(9, 1.0) == {0, 1, 2, 3}
    assert seen(2, 1.0) == {0, 2} and seen(1, 1.0) == {0}
    assert seen(0, 0.5) == {0, 2} and seen(0, 1e-6) == {0}


def test_greedy_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert choose(logits, 0.0, 1, 1.0, noise(2), 0).tolist() == [1, 0]
    assert choose(logits, 1.0, 0, 1.0, None, 0).tolist() == [1, 0]


def test_guidance() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0]])  # conditional, null
    assert guide(logits, 1.0).tolist() == [[1.0, 2.0]]
    assert guide(logits, 3.0).tolist() == [[-3.0, 4.0]]
    assert Sampling(guidance=2.0).guided and not Sampling().guided


@pytest.mark.parametrize(
    "wrong",
    [{"temp": -1.0}, {"text_temp": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)  # type: ignore[arg-type]
