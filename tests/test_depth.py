"""The depth transformer: all codebooks at once equals one after the other, for every variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_LM

from moshi_cli.core.config import LmConfig, Sampling
from moshi_cli.core.depth import DepthTransformer, StackedLinear, TextEmbedding
from moshi_cli.core.sampling import GREEDY, Noise

assert TINY_LM.depth is not None
DEPTH = TINY_LM.depth
VARIANTS = {
    "shared sets": TINY_LM,
    "own sets": replace(TINY_LM, depth=replace(DEPTH, schedule=(0, 1, 2, 3), inputs=(0, 1, 2, 3))),
    "one set": replace(TINY_LM, depth=replace(DEPTH, schedule=(0,) * 4, inputs=(0,) * 4)),
    "low rank": replace(TINY_LM, depth=replace(DEPTH, low_rank=5)),
    "two texts": replace(TINY_LM, demux=True, depth=replace(DEPTH, low_rank=5)),
    "last norms": replace(TINY_LM, depth=replace(DEPTH, norm_out="layer", kv_repeat=2)),
    "ungated": replace(TINY_LM, depth=replace(DEPTH, gated=False, norm="layer")),
}
N = 5


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def lm(request: pytest.FixtureRequest) -> LmConfig:
    return VARIANTS[request.param]


def test_sampling_is_teacher_forcing_on_its_own_codes(lm: LmConfig) -> None:
    depth = DepthTransformer(lm).eval()
    h, text = torch.randn(N, 16), torch.tensor([4, 0, -1, 288, 7])
    noise = Noise(torch.arange(N), torch.full((N,), 3))
    with torch.no_grad():
        codes, logits = depth.sample(h, text, Sampling(temp=1.0, top_k=0), noise)
        columns = torch.cat([text[:, None], codes], 1)[..., None]
        again = depth(h[:, None], columns)[:, :, 0]
    torch.testing.assert_close(logits, again, atol=1e-6, rtol=1e-5)
    assert codes.shape == (N, 4) and codes.unique().numel() > 3


def test_codebooks_see_only_those_before(lm: LmConfig) -> None:
    depth = DepthTransformer(lm).eval()
    h, columns = torch.randn(2, 3, 16), torch.randint(0, 16, (2, 5, 3))
    changed = columns.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 16  # code 1: seen from codebook 2 on
    with torch.no_grad():
        before, after = depth(h, columns), depth(h, changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[:, 2:], after[:, 2:]).all(-1).any()


def test_every_weight_learns(lm: LmConfig) -> None:
    depth = DepthTransformer(lm)
    text = torch.tensor([[3, 293]]) if lm.demux else torch.tensor([[3, 4]])
    columns = torch.cat([text[:, None], torch.randint(0, 16, (1, 4, 2))], 1)
    depth(torch.randn(1, 2, 16), columns).logsumexp(-1).sum().backward()
    idle = [name for name, p in depth.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == (["text_emb.low_rank.weight"] if lm.demux else [])  # dead weight of the files


def test_fewer_codebooks_are_the_first_ones(lm: LmConfig) -> None:
    depth = DepthTransformer(lm).eval()
    h, text = torch.randn(N, 16), torch.randint(0, 16, (N,))
    with torch.no_grad():
        codes = depth.sample(h, text, GREEDY)[0]
        fewer = depth.sample(h, text, GREEDY, codebooks=2)[0]
    assert torch.equal(fewer, codes[:, :2])


def test_guidance_mixes_logits_and_feeds_one_token() -> None:
    depth = DepthTransformer(TINY_LM).eval()
    real, null, text = torch.randn(N, 16), torch.randn(N, 16), torch.randint(0, 16, (N,))
    guided = replace(GREEDY, guidance=2.5)
    with torch.no_grad():
        codes, logits = depth.sample(torch.cat([real, null]), text, guided)
        columns = torch.cat([text[:, None], codes], 1)[..., None]
        a, b = depth(real[:, None], columns)[:, :, 0], depth(null[:, None], columns)[:, :, 0]
    torch.testing.assert_close(logits, b + 2.5 * (a - b), atol=1e-5, rtol=1e-5)


def test_stacked_linear_by_schedule() -> None:
    stacked, x = StackedLinear(3, 4, 2), torch.randn(5, 7, 4)
    schedule = (0, 2, 2, 1, 0)
    want = torch.stack([F.linear(x[k], stacked.weight[w]) for k, w in enumerate(schedule)])
    torch.testing.assert_close(stacked(x, schedule), want)
    torch.testing.assert_close(stacked.one(x[1], 2), want[1])


def test_text_embedding_holds_one_or_two_tokens() -> None:
    E = 11
    one, two = TextEmbedding(E, 6), TextEmbedding(E, 6, low_rank=3, demux=True)
    ids = torch.tensor([-1, 0, 10])
    assert torch.equal(one(ids)[0], torch.zeros(6)) and torch.equal(one(ids)[1], one.table[0])
    assert two.left is not None and two.right is not None
    left, right = 4, 7
    got = two(torch.tensor([left, left + (right + 1) * E, left + E, -1]))
    torch.testing.assert_close(got[0], two.left(two.table[left]))
    torch.testing.assert_close(got[1], two.left(two.table[left]) + two.right(two.table[right]))
    torch.testing.assert_close(got[2], two.left(two.table[left]) + two.right(two.table[0]))
    assert not got[3].any()
