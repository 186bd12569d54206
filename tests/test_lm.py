"""The RQ-Transformer: what goes in is a sum in a fixed order, what is missing is zero."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_LM
from torch import Tensor

from moshi_cli.core.conditioning import sin_positions
from moshi_cli.core.config import ConditionConfig, FuserConfig, LmConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.lm import MoshiLm

TOLD = replace(
    TINY_LM,
    temporal=replace(TINY_LM.temporal, cross_attention=True),
    conditions=(
        ConditionConfig("mood", "lut", 4, 3, ("sad", "glad")),
        ConditionConfig("topic", "lut", 4, 5),
        ConditionConfig("who", "tensor", 6),
    ),
    fuser=FuserConfig(sum=("mood", "topic"), cross=("who",), cross_positions=True, cross_scale=0.5),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_added_in_order(tiny_lm: MoshiLm, dtype: torch.dtype) -> None:
    """Audio first, then text: in bfloat16 another order would give other numbers."""
    lm = tiny_lm.to(dtype)
    columns = torch.randint(-1, 16, (2, 9, 5))
    columns[:, 0] = torch.tensor([0, 3, 288, -1, 17])

    def row(table: Tensor, ids: Tensor) -> Tensor:
        x = F.embedding(ids.clamp(min=0), table)
        return torch.where((ids < 0)[..., None], torch.zeros_like(x), x)

    want = row(lm.emb[0], columns[:, 1])
    for k in range(1, 8):
        want = want + row(lm.emb[k], columns[:, 1 + k])
    assert torch.equal(lm.embed(columns), want + row(lm.text_emb.table, columns[:, 0]))


def test_low_rank_tables_are_factors(tiny_lm: MoshiLm) -> None:
    lm = MoshiLm(replace(TINY_LM, low_rank=3))
    assert lm.emb_out is not None and lm.emb.shape == (8, 17, 3)
    full = MoshiLm(TINY_LM)
    with torch.no_grad():
        full.emb.copy_(lm.emb @ lm.emb_out.weight.transpose(1, 2))
        full.text_emb.table.copy_(lm.text_emb.table)
        columns = torch.randint(-1, 16, (2, 9, 5))
        torch.testing.assert_close(lm.embed(columns), full.embed(columns))


def test_shapes_and_heads() -> None:
    lm = MoshiLm(replace(TINY_LM, extra_heads=2, extra_classes=6, text_classes=30)).eval()
    h, text = lm.temporal(torch.randint(0, 16, (2, 9, 5)))
    assert h.shape == (2, 5, 16) and text.shape == (2, 5, 30)
    extra = lm.extra_probabilities(h)
    assert extra.shape == (2, 5, 2, 6)
    torch.testing.assert_close(extra.sum(-1), torch.ones(2, 5, 2))
    codes = torch.randint(0, 16, (2, 9, 5))
    assert lm.depth_logits(h, codes).shape == (2, 4, 5, 16)


def test_a_model_that_only_writes() -> None:
    lm = MoshiLm(replace(TINY_LM, dep_q=0, depth=None))
    assert lm.depth is None and lm.temporal(torch.zeros(1, 9, 3).long())[1].shape == (1, 3, 288)


def test_conditions_by_hand() -> None:
    lm = MoshiLm(TOLD).eval()
    who = torch.randn(3, 6)
    who[1] = torch.nan  # an empty place
    told = lm.conditioning.encode([{"mood": "glad", "who": who}, {"topic": "x"}])
    mood, topic, other = (lm.conditioning.conditioners[n] for n in ("mood", "topic", "who"))
    torch.testing.assert_close(told["mood"][0, 0], mood.out.weight @ mood.table[1])
    torch.testing.assert_close(told["mood"][1], mood.padding[0])
    row = int.from_bytes(hashlib.sha256(b"x").digest(), "big") % 5
    torch.testing.assert_close(told["topic"][1, 0], topic.out.weight @ topic.table[row])
    torch.testing.assert_close(told["who"][0, 2], other.out.weight @ who[2])
    torch.testing.assert_close(told["who"][0, 1], other.padding[0, 0])
    assert told["who"].shape == (2, 3, 16)
    total, source = lm.conditioning.fuse(told)
    torch.testing.assert_close(total, told["mood"] + told["topic"])
    at = sin_positions(3, 16, torch.device("cpu"))
    torch.testing.assert_close(source, told["who"] + 0.5 * at)
    assert torch.equal(at[0], torch.tensor([1.0] * 8 + [0.0] * 8))


def test_conditions_stay_float32() -> None:
    lm = MoshiLm(TOLD).to(torch.bfloat16)
    lm.conditioning.float()
    told = lm.condition([{"mood": "sad", "who": torch.randn(2, 6)}])
    assert told.sum is not None and told.sum.dtype == told.cross[0].k.dtype == torch.bfloat16
    assert lm.conditioning.encode([{}])["mood"].dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mood": "angry"}, "'angry' is not a value of the condition 'mood'"),
        ({"nonsense": "x"}, "no condition 'nonsense'"),
        ({"mood": torch.zeros(1, 4)}, "takes a word"),
        ({"who": "alice"}, "takes vectors of width 6"),
        ({"who": torch.zeros(3, 5)}, "takes vectors of width 6"),
    ],
)
def test_wrong_conditions_are_named(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        MoshiLm(TOLD).condition([values])  # type: ignore[list-item]


def test_every_weight_learns() -> None:
    """One training step reaches all parameters through text and audio logits."""
    config: LmConfig = replace(TOLD, low_rank=4)
    lm = MoshiLm(config)
    columns = torch.randint(0, 16, (2, 9, 5))
    told = lm.condition([{"mood": "glad", "topic": "x", "who": torch.randn(2, 6)}, {}])
    h, text = lm.temporal(columns, conditions=told)
    loss = text.logsumexp(-1).sum() + lm.depth_logits(h, columns).logsumexp(-1).sum()
    loss.backward()
    assert [name for name, p in lm.named_parameters() if p.grad is None or not p.grad.any()] == []
