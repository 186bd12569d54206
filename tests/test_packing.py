"""Packed layers compute what the plain ones do, whatever the number of rows."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY_LM
from torch import Tensor

from moshi_cli.core import packing
from moshi_cli.core.config import DepthConfig
from moshi_cli.core.conv import CausalConv, CausalConvTranspose
from moshi_cli.core.layers import Linear, RMSNorm, Rope, project
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.packing import (
    PackedLinear,
    PackedNorm,
    SplitLinear,
    conv,
    conv_transpose,
    pack,
    packable,
)
from moshi_cli.core.sampling import GREEDY
from moshi_cli.core.state import room

KINDS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("into", [24, 2000])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (5, 1), (0, 1)])
def test_product_is_the_same_for_few_rows(shape: tuple[int, ...], into: int) -> None:
    x, weight = torch.randn(*shape, into), torch.randn(7, into)
    y = project(x, weight)
    torch.testing.assert_close(y, x @ weight.T, atol=1e-4, rtol=1e-4)
    assert y.is_contiguous()


def test_gradients_pass() -> None:
    x = torch.randn(1, 5, requires_grad=True)
    layer = Linear(5, 3)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0)[None])


def need(dtype: torch.dtype) -> None:
    """Skip where the machine has no kernels for a type."""
    if not packable(torch.zeros(1, dtype=dtype)):
        pytest.skip(f"no kernels for {dtype} here")


def close(got: Tensor, want: Tensor) -> None:
    exact = got.dtype == torch.float32
    torch.testing.assert_close(
        got, want, atol=2e-5 if exact else 0.05, rtol=1e-4 if exact else 0.05
    )


def packed_and_plain(lm: MoshiLm, dtype: torch.dtype) -> tuple[MoshiLm, MoshiLm]:
    need(dtype)
    for module in lm.modules():
        if isinstance(module, RMSNorm):
            module.alpha.uniform_(0.5, 1.5)
    plain = lm.to(dtype)
    packed = copy.deepcopy(plain)
    assert pack(packed)
    return packed, plain


@pytest.mark.parametrize("wide", [1, 10_000], ids=["all", "none"])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("B", [1, 3, 6])
@torch.no_grad()
def test_packed_model_writes_the_same(
    tiny_lm: MoshiLm, B: int, dtype: torch.dtype, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all matrices of float32 go through oneDNN, or none."""
    monkeypatch.setattr(packing, "WIDE", wide)
    lm, plain = packed_and_plain(tiny_lm, dtype)
    count = sum(isinstance(m, PackedLinear) for m in lm.modules())
    assert count == (0 if dtype == torch.float32 and wide > 1 else 4 * 2 + 1)  # and text_linear
    tokens = torch.randint(16, (B, 9, 1))
    states = [m.init_state(B, dtype=dtype, device="cpu") for m in (lm, plain)]
    for step in range(3):
        active = None if step else torch.arange(B) != 1
        h, logits = lm.temporal(tokens, states[0], active)
        other, expected = plain.temporal(tokens, states[1], active)
        close(h, other)
        close(logits, expected)
    assert states[0].clock.tolist() == states[1].clock.tolist()
    close(lm.temporal(tokens.expand(-1, -1, 5))[1], plain.temporal(tokens.expand(-1, -1, 5))[1])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("B", [1, 2, 5])
@torch.no_grad()
def test_packed_depth_makes_the_same(B: int, dtype: torch.dtype, shared: bool) -> None:
    config = TINY_LM
    assert config.depth is not None
    if shared:  # weight sets, keys and low-rank embeddings
        sets = tuple(min(k, 1) for k in range(config.dep_q))
        depth: DepthConfig = replace(
            config.depth, schedule=sets, inputs=sets, kv_repeat=2, low_rank=4, norm_out="layer"
        )
        config = replace(config, depth=depth)
    lm, plain = packed_and_plain(MoshiLm(config).eval().requires_grad_(False), dtype)
    assert lm.depth is not None and plain.depth is not None
    h, text = torch.randn(B, config.temporal.dim).to(dtype), torch.randint(9, (B,))
    codes, logits = lm.depth.sample(h, text, GREEDY)
    same, expected = plain.depth.sample(h, text, GREEDY)
    assert logits.shape == expected.shape and (dtype != torch.float32 or torch.equal(codes, same))
    close(logits[:, 0].to(dtype), expected[:, 0].to(dtype))
    targets = torch.cat([text[:, None], same], 1)[..., None]
    close(lm.depth(h[:, None], targets), plain.depth(h[:, None], targets))
    if dtype == torch.float32:
        close(logits, expected)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (4, 2), (7, 1), (12, 6)])
@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("unfolded", [16, packing.ROWS << 20])
@torch.no_grad()
def test_packed_convolution(
    kernel: int, stride: int, replicate: bool, unfolded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline and streamed, in one piece and in many, with a slot that waits."""
    need(torch.float32)
    monkeypatch.setattr("moshi_cli.core.conv.UNFOLDED", unfolded)
    plain = CausalConv(5, 6, kernel, stride, bias=not replicate, replicate=replicate)
    packed = conv(copy.deepcopy(plain))
    x, active = torch.randn(2, 5, 24), torch.tensor([True, False])
    close(packed(x), plain(x))
    tails = [c.init_state(2, device="cpu") for c in (packed, plain)]
    for part, on in zip(x.split(12, -1), (None, active), strict=True):
        close(packed(part, tails[0], on), plain(part, tails[1], on))
    for mine, other in zip(*(t.tensors().values() if t else () for t in tails), strict=True):
        torch.testing.assert_close(mine, other)
    assert conv(packed) is packed and packed.weight is None


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_transposed_convolution(bias: bool) -> None:
    need(torch.float32)
    plain = CausalConvTranspose(5, 6, 8, 4, bias=bias)
    packed = conv_transpose(copy.deepcopy(plain))
    x, active = torch.randn(2, 5, 6), torch.tensor([True, False])
    close(packed(x), plain(x))
    past = [c.init_state(2, device="cpu") for c in (packed, plain)]
    for part, on in zip(x.split(2, -1), (None, active, None), strict=True):
        close(packed(part, past[0], on), plain(part, past[1], on))
        close(past[0].x, past[1].x)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_split_product(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rows, contiguous or turned."""
    need(torch.float32)
    monkeypatch.setattr(packing, "PART", 4)
    weight, b = torch.randn(5, 12), torch.randn(5) if bias else None
    layer = SplitLinear(weight, b)
    for shape in ((1,), (2,), (1, 1), (1, 2), (2, 1), (3,), (2, 3), (0, 1)):
        x = torch.randn(12, *shape).movedim(0, -1)
        close(layer(x), torch.nn.functional.linear(x, weight, b))
        close(layer(x.contiguous()), layer(x))


@pytest.mark.parametrize("B", [1, 2])
@torch.no_grad()
def test_split_codec_codes_the_same(
    tiny_mimi: Mimi, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(torch.float32)
    monkeypatch.setattr(packing, "PART", 2)
    monkeypatch.setattr(packing, "WIDE", 1)
    for layer in tiny_mimi.encoder_transformer.layers:
        layer.scale1.scale.normal_()
    mimi = copy.deepcopy(tiny_mimi)
    pack(mimi)
    assert sum(isinstance(m, SplitLinear) for m in mimi.modules()) > 5
    wav = torch.rand(B, 1, 4 * mimi.frame_samples) * 2 - 1
    codes, state = tiny_mimi.encode(wav), mimi.init_state(B)
    heard = [mimi.encode(part, state.encoder) for part in wav.split(mimi.frame_samples, -1)]
    assert torch.equal(torch.cat(heard, -1), codes) and torch.equal(mimi.encode(wav), codes)
    said = [mimi.decode(part, state.decoder) for part in codes.split(1, -1)]
    close(torch.cat(said, -1), tiny_mimi.decode(codes))
    close(mimi.decode(codes), tiny_mimi.decode(codes))


def test_other_convolutions_stay_as_they_are() -> None:
    for base in (CausalConv(4, 4, 3, dilation=2), CausalConv(4, 4, 3).half()):
        assert conv(base).weight is not None
    for other in (CausalConvTranspose(4, 4, 4, 2, groups=4), CausalConvTranspose(4, 4, 5, 2)):
        assert conv_transpose(other).weight is not None


@torch.no_grad()
def test_packed_codec_codes_the_same(tiny_mimi: Mimi) -> None:
    need(torch.float32)
    mimi = copy.deepcopy(tiny_mimi)
    assert pack(mimi) and pack(mimi)
    assert mimi.fingerprint == tiny_mimi.fingerprint
    wav = torch.rand(2, 1, 6 * mimi.frame_samples) * 2 - 1
    codes = tiny_mimi.encode(wav)
    assert torch.equal(mimi.encode(wav), codes)
    close(mimi.decode(codes), tiny_mimi.decode(codes))
    state = mimi.init_state(2)
    heard = [mimi.encode(part, state.encoder) for part in wav.split(mimi.frame_samples, -1)]
    assert torch.equal(torch.cat(heard, -1), codes)
    said = [mimi.decode(part, state.decoder) for part in codes.split(1, -1)]
    close(torch.cat(said, -1), tiny_mimi.decode(codes))


@pytest.mark.parametrize("dtype", KINDS)
def test_packed_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(12).to(dtype)
    torch.nn.init.normal_(norm.alpha)
    for scale in (0.0, 1e-6, 1.0, 1e3):
        x = torch.randn(3, 2, 12).to(dtype) * scale
        close(PackedNorm(norm)(x), norm(x))


def test_turning_by_complex_numbers_is_the_same() -> None:
    rope, x, positions = Rope(8, 100.0, True), torch.randn(2, 3, 2, 8), torch.arange(6).view(2, 3)
    with torch.no_grad():
        angles = rope.angles(positions)
        assert isinstance(angles, Tensor)
        turned = rope.rotate(x, angles)
    close(turned, rope.rotate(x, rope.angles(positions)))


def test_room_is_zeros_of_its_own() -> None:
    a, b = (room((2, 3), torch.bfloat16, "cpu") for _ in range(2))
    a += 1
    assert a.tolist() == [[1.0] * 3] * 2 and not b.any()
    assert room((2, 0), torch.float32, "cpu").shape == (2, 0)
    assert room((2,), torch.float32, "meta").device.type == "meta"


def test_other_devices_and_types_keep_their_weights(tiny_lm: MoshiLm) -> None:
    before = tiny_lm.state_dict().keys()
    assert not pack(copy.deepcopy(tiny_lm).to("meta"))
    half = copy.deepcopy(tiny_lm).half()
    pack(half)
    assert {k for k in before if "norm" not in k} <= half.state_dict().keys()
