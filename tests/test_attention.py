"""The quick ways to attend give what PyTorch's float32 kernel gives, for a stream and to learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.attention import attend


def inputs(queries: int, keys: int) -> tuple[list[Tensor], Tensor]:
    """q [2, 3, queries, 16], k and v [2, 3, keys, 16]; a causal mask with a window of 20 keys."""
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 3, n, 16, generator=g) for n in (queries, keys, keys)]
    ago = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return qkv, ((ago >= 0) & (ago < 20))[None, None]


def close(found: Tensor, wanted: Tensor) -> None:
    """As close as bfloat16 can be."""
    assert (found.float() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (4, 50), (9, 50), (40, 40), (520, 520)])
def test_half_precision(queries: int, keys: int) -> None:
    qkv, mask = inputs(queries, keys)
    wanted = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    half = [x.bfloat16() for x in qkv]
    close(attend(half[0], half[1], half[2], mask), wanted)


@pytest.mark.parametrize("keys", [40, 520])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradients(keys: int, autocast: bool) -> None:
    qkv, mask = inputs(keys, keys)
    leaves = [x.clone().requires_grad_() for x in qkv]
    F.scaled_dot_product_attention(*leaves, attn_mask=mask).square().sum().backward()
    wanted = [x.grad for x in leaves]
    leaves = [x.clone().requires_grad_() for x in qkv]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = attend(*(x.bfloat16() for x in leaves), mask)
    assert made.dtype == torch.bfloat16
    made.float().square().sum().backward()
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None and gradient is not None
        close(leaf.grad, gradient)
