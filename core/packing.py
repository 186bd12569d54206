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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core import native
from moshi_cli.core.attention import Layer, Transformer
from moshi_cli.core.config import DepthConfig, TransformerConfig
from moshi_cli.core.conv import CausalConv, CausalConvTranspose
from moshi_cli.core.depth import DepthLayer, StackedLinear
from moshi_cli.core.layers import WIDE, Linear, RMSNorm, project, turned
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.vq import ResidualVq

NEEDED = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
PART = 512  # numbers of a row that are multiplied at a time in SplitLinear
ROWS = 4  # of the product that is computed for fewer: the kernel for one row is slower
SOME, NUMBERS = 8, 4352  # rows, and numbers in all of them, up to which `turned` is the quickest
NORMS = {"rms": 1e-8, "layer": 1e-5}  # their eps (see layers.make_norm)


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


class SplitLinear(nn.Module):
    """A linear layer [..., in] -> [..., out] of long rows of float32, for one row or two.

    `turned` is quickest for rows of PART numbers: the weight lies in such stretches, whose products
    are added. With the first call of more rows it becomes a PackedLinear: a file is read in longer
    pieces than a stream, and the weight is not kept twice.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in], `in` a multiple of PART; bias [out]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        parts = weight.detach().reshape(self.out_features, -1, PART)
        self.parts: Tensor | None = parts.transpose(0, 1).contiguous()  # [in / PART, out, PART]
        self.bias = None if bias is None else bias.detach().contiguous()
        self.many: PackedLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.parts is None or not 0 < rows <= 2:
            return self.packed()(x)
        flat = x.reshape(rows, self.in_features)
        if native.library() is not None and PART % native.WIDTH == 0:
            y = native.product(flat.contiguous(), self.parts, self.bias, PART)
            return y.view(*x.shape[:-1], self.out_features)
        flat = flat.repeat(2, 1) if rows == 1 else flat.contiguous()
        columns = flat.view(2, -1, PART).permute(1, 2, 0)  # [in / PART, PART, 2]
        y = torch.bmm(self.parts, columns).sum(0)
        if self.bias is not None:
            y += self.bias[:, None]
        return (y if rows == 2 else y[:, :1]).t().view(*x.shape[:-1], self.out_features)

    def packed(self) -> PackedLinear:
        """The same layer for more rows, and from then on for all."""
        if self.many is None:
            assert self.parts is not None
            weight = self.parts.transpose(0, 1).reshape(self.out_features, self.in_features)
            self.many = PackedLinear(weight, self.bias)
            self.parts = None
        return self.many


def brief(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [out, in], both float32 -> [N, out], as quickly as it goes."""
    rows, into = x.shape
    if (
        0 < rows <= native.ROWS
        and not into % native.WIDTH
        and native.library() is not None
        and native.alone(weight.numel(), native.MATRIX)
    ):
        return native.product(x.contiguous(), weight)
    if 1 < rows <= SOME and rows * into <= NUMBERS:
        return turned(x, weight)
    return project(x, weight)


class TurnedLinear(nn.Module):
    """A linear layer [..., in] -> [..., out] whose weight is read where it lies (see `turned`)."""

    def __init__(self, weight: Tensor):
        """weight [out, in], float32."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        into = x.shape[-1]
        rows = x.numel() // into
        return brief(x.reshape(rows, into), self.weight).view(*x.shape[:-1], self.weight.shape[0])


class Point(nn.Module):
    """A convolution [B, C, T] -> [B, C', T] of kernel 1."""

    def __init__(self, product: nn.Module):
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.product(x.transpose(1, 2))
        return y.transpose(1, 2)


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


Maker = type[PackedLinear] | type[SplitLinear]


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
        prepare(model)
    found = [path for path, module in model.named_modules() if type(module) in PACKED]
    for path in found:  # names, not modules: each is freed before the next is packed
        parent, _, name = path.rpartition(".")
        owner, module = model.get_submodule(parent), model.get_submodule(path)
        other = PACKED[type(module)](module)
        if other is not module:
            setattr(owner, name, other)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.native = stack(list(map(layer_weights, module.layers)), module.config)
        elif isinstance(module, ResidualVq):
            books = [b.centroids for b in module.books], [b.half_norm for b in module.books]
            if native.Books.fits(*books, module.beam):
                module.native = native.Books(*books, module.beam)
    if isinstance(model, MoshiLm):
        rows = 2 if like.dtype == torch.float32 else ROWS if packable(like) else 1
        model.transformer.rows = rows
        if model.depth is not None:
            model.depth.steps = model.depth.plan()
            for step, which in zip(model.depth.steps, model.depth.config.schedule, strict=True):
                layers = [depth_weights(layer, which) for layer in model.depth.layers]
                step.native = stack(layers, model.depth.config)
            model.depth.rows = rows if model.depth.steps[0].native is None else 1
    for module in model.modules():  # PyTorch looks for these last, and slowly
        module.__dict__.update(module._modules | module._parameters)
    return True


def stack(
    layers: list[native.Weights | None], config: TransformerConfig | DepthConfig
) -> native.Stack | None:
    """Layers as native.c walks them, if it can."""
    known = [layer for layer in layers if layer is not None]
    straight = isinstance(config, DepthConfig) or config.rope in ("none", "interleaved")
    if not straight or len(known) < len(layers) or not native.Stack.fits(known, config.heads):
        return None
    kv_heads = config.heads // config.kv_repeat
    eps = NORMS[config.norm]
    return native.Stack(known, config.heads, kv_heads, eps, config.gated)


def layer_weights(layer: nn.Module) -> native.Weights | None:
    """What a packed layer multiplies by; None if native.c knows no such layer."""
    assert isinstance(layer, Layer)
    down = layer.mlp.down
    parts = down.parts if isinstance(down, SplitLinear) else weight_of(down)
    qkv, out, up = map(weight_of, (layer.attn.qkv, layer.attn.out, layer.mlp.up))
    scaled = layer.scale1.scale is not None or layer.scale2.scale is not None
    if qkv is None or out is None or up is None or parts is None or scaled or layer.cross:
        return None
    return native.Weights(*gains(layer.norm1), qkv, out, *gains(layer.norm2), up, parts)


def depth_weights(layer: nn.Module, which: int) -> native.Weights | None:
    """The same for one set of a layer of the depth transformer."""
    assert isinstance(layer, DepthLayer)
    stacks = (layer.qkv, layer.out, layer.up, layer.down)
    if any(getattr(s, "weight", None) is None for s in stacks):
        return None
    qkv, out, up, down = (s.weight[which].detach() for s in stacks)
    return native.Weights(*gains(layer.norm1), qkv, out, *gains(layer.norm2), up, down)


def weight_of(base: nn.Module | Tensor) -> Tensor | None:
    """The weight of a linear layer that lies as it was."""
    return base.weight.detach() if isinstance(base, TurnedLinear) else None


def gains(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Factor and shift [D] of a norm."""
    if isinstance(norm, PackedNorm):
        return norm.gain / math.sqrt(norm.gain.numel()), None
    if isinstance(norm, RMSNorm):
        return norm.alpha.detach().flatten(), None
    assert isinstance(norm, nn.LayerNorm)
    return norm.weight.detach(), norm.bias.detach()


def linear(base: Linear) -> nn.Module:
    """In oneDNN's layout, unless it is quick as it lies."""
    if slow(base.weight) and packable(base.weight):
        return PackedLinear(base.weight)
    return TurnedLinear(base.weight) if base.weight.dtype == torch.float32 else base


def stacked(base: StackedLinear) -> nn.Module:
    """With its sets one by one, which are read where they lie if that is quick."""
    if base.sets is not None:
        return base
    if slow(base.weight) and packable(base.weight):
        base.sets = [PackedLinear(weight).forward for weight in base.weight]
        base.register_parameter("weight", None)
    elif base.weight.dtype == torch.float32:
        base.sets = [partial(brief, weight=weight) for weight in base.weight]
    return base


def prepare(mimi: Mimi) -> None:
    """Layers that see one step or two of a frame, and factors that products can hold."""
    for stack in (mimi.encoder_transformer, mimi.decoder_transformer):
        for layer in cast("list[Layer]", list(stack.layers)):
            for scale, last in ((layer.scale1, layer.attn.out), (layer.scale2, layer.mlp.down)):
                if scale.scale is not None and isinstance(last, Linear):
                    last.weight.mul_(scale.scale[:, None])
                    scale.scale = None
            down = layer.mlp.down
            if isinstance(down, Linear) and slow(down.weight) and splittable(down.weight):
                layer.mlp.down = SplitLinear(down.weight)
    inner, outer = mimi.encoder.layers, mimi.decoder.layers
    for each in (inner[-3], inner[-1], mimi.downsample, outer[0]):
        conv(cast(CausalConv, each), SplitLinear)
    conv_transpose(cast(CausalConvTranspose, outer[2]), SplitLinear)


def splittable(weight: Tensor) -> bool:
    """Whether SplitLinear takes a weight [out, in]."""
    return packable(weight) and weight.dtype == torch.float32 and weight.shape[-1] % PART == 0


def point(base: nn.Conv1d) -> nn.Module:
    """A convolution of single inputs [B, C, T] as a product."""
    if base.kernel_size != (1,) or base.bias is not None or base.weight.dtype != torch.float32:
        return base
    return Point(TurnedLinear(base.weight[..., 0]))


def conv(base: CausalConv, make: Maker = PackedLinear) -> nn.Module:
    """A product of windows, unless dilated."""
    if base.product is not None or base.dilation != (1,) or not packable(base.weight):
        return base
    weight = base.weight.transpose(1, 2).flatten(1)  # [C', k · C]
    if make is SplitLinear and not splittable(weight):
        return base
    return without_weight(base, make(weight, base.bias))


def conv_transpose(base: CausalConvTranspose, make: Maker = PackedLinear) -> nn.Module:
    """A product with both halves of the kernel, if it has two and is not by groups."""
    half, bias = base.stride[0], base.bias
    if base.product is not None or base.groups > 1 or base.kernel_size[0] != 2 * half:
        return base
    if not packable(base.weight):
        return base
    if bias is not None:
        bias = torch.cat([bias.repeat(half), torch.zeros_like(bias).repeat(half)])
    weight = base.weight.permute(2, 1, 0).flatten(0, 1)  # [k · C', C]
    if make is SplitLinear and not splittable(weight):
        return base
    return without_weight(base, make(weight, bias))


def without_weight(base: CausalConv | CausalConvTranspose, product: nn.Module) -> nn.Module:
    """The layer, with a product in place of its weight and bias."""
    base.product = product
    base.register_parameter("weight", None)
    base.register_parameter("bias", None)
    return base


PACKED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Linear: linear, StackedLinear: stacked, RMSNorm: PackedNorm, CausalConv: conv,
    CausalConvTranspose: conv_transpose, nn.Conv1d: point,
}  # fmt: skip
