"""Models as a CPU's kernels want them, for inference only.

A step of a stream multiplies every matrix by one row or a few, so it is as fast as the weights come
from memory. oneDNN reads its own blocked layout up to twice as fast as rows: bfloat16 always,
float32 where rows are long. Between two large matrices caches are cold, so every call costs, too:
what can be prepared is, and a single row is doubled once per step. `pack` does all this in place,
one weight at a time: a model then computes the same, but has not all its weights to save, adapt or
train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.conv import CausalConv, CausalConvTranspose
from moshi_cli.core.depth import StackedLinear
from moshi_cli.core.layers import WIDE, Linear, RMSNorm, turned
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi

NEEDED = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
ROWS = 4  # of the product that is computed for fewer: the kernel for one row is slower


class PackedLinear(nn.Module):
    """A linear layer [..., in] -> [..., out]; its weight is in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in], bias [out]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        flat = x.reshape(rows, self.in_features)
        if 0 < rows < ROWS:
            flat = F.pad(flat, (0, 0, 0, ROWS - rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, self.packed, self.bias, "none", [], "")
        return (y if rows >= ROWS else y[:rows]).view(*x.shape[:-1], self.out_features)


class PackedNorm(nn.Module):
    """RMSNorm in half the time: numbers that do not change are ready, as tensors of their type."""

    def __init__(self, base: RMSNorm):
        super().__init__()
        dim = base.alpha.numel()
        self.gain = base.alpha.detach().float().flatten() * math.sqrt(dim)
        self.floor = torch.tensor(math.sqrt(base.eps * dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        size = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        return (x32 * (self.gain / torch.hypot(size, self.floor))).to(x.dtype)


def packable(weight: Tensor) -> bool:
    """Whether this machine and PyTorch have oneDNN's kernels for such a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in NEEDED):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def slow(weight: Tensor) -> bool:
    """Whether a matrix [out, in] is read slowly as it lies: not so float32 of short rows."""
    return weight.dtype != torch.float32 or weight.shape[-1] > WIDE


@torch.no_grad()
def pack(model: MoshiLm | Mimi) -> bool:
    """Make a model quick on a CPU, in place; whether it is on one. Twice is as good as once."""
    like = next(model.parameters())
    if like.device.type != "cpu":
        return False
    if isinstance(model, Mimi):
        model.printed = model.fingerprint
    found = [path for path, module in model.named_modules() if type(module) in PACKED]
    for path in found:  # names, not modules: each is freed before the next is packed
        parent, _, name = path.rpartition(".")
        owner, module = model.get_submodule(parent), model.get_submodule(path)
        other = PACKED[type(module)](module)
        if other is not module:
            setattr(owner, name, other)
    if isinstance(model, MoshiLm):
        rows = 2 if like.dtype == torch.float32 else ROWS if packable(like) else 1
        model.transformer.rows = rows
        if model.depth is not None:
            model.depth.rows = rows
            model.depth.steps = model.depth.plan()
    for module in model.modules():  # PyTorch looks for these last, and slowly
        module.__dict__.update(module._modules | module._parameters)
    return True


def linear(base: Linear) -> nn.Module:
    """As it is, if that is quick."""
    return PackedLinear(base.weight) if slow(base.weight) and packable(base.weight) else base


def stacked(base: StackedLinear) -> nn.Module:
    """With its sets one by one, which are read where they lie if that is quick."""
    if base.sets is not None:
        return base
    if slow(base.weight) and packable(base.weight):
        base.sets = [PackedLinear(weight).forward for weight in base.weight]
        base.register_parameter("weight", None)
    elif base.weight.dtype == torch.float32:
        base.sets = [partial(turned, weight=weight) for weight in base.weight]
    return base


def conv(base: CausalConv) -> nn.Module:
    """A product of windows, unless dilated."""
    if base.product is not None or base.dilation != (1,) or not packable(base.weight):
        return base
    weight = base.weight.transpose(1, 2).flatten(1)  # [C', k · C]
    return without_weight(base, PackedLinear(weight, base.bias))


def conv_transpose(base: CausalConvTranspose) -> nn.Module:
    """A product with both halves of the kernel, if it has two and is not by groups."""
    half, bias = base.stride[0], base.bias
    if base.product is not None or base.groups > 1 or base.kernel_size[0] != 2 * half:
        return base
    if not packable(base.weight):
        return base
    if bias is not None:
        bias = torch.cat([bias.repeat(half), torch.zeros_like(bias).repeat(half)])
    weight = base.weight.permute(2, 1, 0).flatten(0, 1)  # [k · C', C]
    return without_weight(base, PackedLinear(weight, bias))


def without_weight(base: CausalConv | CausalConvTranspose, product: PackedLinear) -> nn.Module:
    """The layer, with a product in place of its weight and bias."""
    base.product = product
    base.register_parameter("weight", None)
    base.register_parameter("bias", None)
    return base


PACKED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Linear: linear, StackedLinear: stacked, RMSNorm: PackedNorm, CausalConv: conv,
    CausalConvTranspose: conv_transpose,
}  # fmt: skip
