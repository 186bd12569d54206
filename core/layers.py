"""The small layers every transformer here is made of: products, norms, RoPE, feed-forward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.config import TransformerConfig

FEW = 4  # rows up to which `project` turns the product round
WIDE = 1536  # inputs from which one row, or FEW, are as quick the usual way


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] -> [..., out], without bias.

    A step of a stream has one row or a few, and what counts is how fast the weights come from
    memory. On a CPU in float32, weight · x as a product of two or three columns reads them two to
    three times as fast as x · weight of so few rows; a single row is doubled for it.
    """
    rows, into = x.numel() // x.shape[-1], x.shape[-1]
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or not 0 < rows <= FEW
        or (rows in (1, FEW) and into > WIDE)
    ):
        return F.linear(x, weight)
    columns = x.reshape(rows, into)
    if rows == 1:
        y = torch.mm(weight, torch.cat((columns, columns)).t())[:, 0].contiguous()  # [out]
    else:
        y = turned(columns, weight).contiguous()
    return y.view(*x.shape[:-1], -1)


def quick(x: Tensor, rows: int) -> bool:
    """Whether so many rows like x [..., in] are best multiplied as weight · x."""
    few = rows in (2, 3) or (rows == FEW and x.shape[-1] <= WIDE)
    return few and x.device.type == "cpu" and x.dtype == torch.float32


def turned(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [out, in] -> [N, out], as weight · x; not contiguous."""
    return F.linear(weight, x.contiguous()).t()


class Linear(nn.Linear):
    """nn.Linear without a bias, quick for few rows (see `project`)."""

    def __init__(self, into: int, out: int):
        super().__init__(into, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


def table(*shape: int, std: float) -> nn.Parameter:
    """Rows drawn from N(0, std²). Nothing is drawn on "meta": it would load PyTorch's compiler."""
    rows = torch.empty(shape)
    return nn.Parameter(rows if rows.is_meta else torch.randn(shape) * std)


class RMSNorm(nn.Module):
    """x · α/rms(x), computed in float32 whatever the dtype (`rms_norm_f32` in Kyutai configs)."""

    def __init__(self, dim: int, eps: float = 1e-8):
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))  # as it is published

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(self.eps + x32.square().mean(-1, keepdim=True))
        return (x32 * (self.alpha.float().flatten() * scale)).to(x.dtype)


def make_norm(kind: str, dim: int) -> nn.Module:
    """The norm a config names: "rms" (eps 1e-8, float32) or "layer" (LayerNorm, eps 1e-5)."""
    if kind == "rms":
        return RMSNorm(dim)
    assert kind == "layer", kind
    return nn.LayerNorm(dim, eps=1e-5)


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual update; identity when `init` is None."""

    def __init__(self, dim: int, init: float | None):
        super().__init__()
        self.scale = None if init is None else nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale


def gated_width(dim: int, ff: int) -> int:
    """Hidden width of the gated feed-forward for a nominal width `ff` (upstream's rule)."""
    return 21 * dim // 8 if ff == 4 * dim else 2 * ff // 3


class GatedMlp(nn.Module):
    """SiLU-gated feed-forward: the first half of `up` gates the second. [..., D] -> [..., D]"""

    def __init__(self, dim: int, ff: int):
        super().__init__()
        hidden = gated_width(dim, ff)
        self.up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Mlp(nn.Module):
    """Plain feed-forward with the exact (erf) GELU, as in Mimi. [..., D] -> [..., D]"""

    def __init__(self, dim: int, ff: int):
        super().__init__()
        self.up = Linear(dim, ff)
        self.down = Linear(ff, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def make_mlp(config: TransformerConfig) -> nn.Module:
    """Gated (language models) or plain (Mimi) feed-forward."""
    return (GatedMlp if config.gated else Mlp)(config.dim, config.ff)


Angles = tuple[Tensor, Tensor] | Tensor  # cos and sin, or both in one complex number


class Rope:
    """Rotary positions. Angles are made once per step and shared by all layers."""

    def __init__(self, head_dim: int, max_period: float, interleaved: bool):
        self.head_dim, self.max_period, self.interleaved = head_dim, max_period, interleaved

    def angles(self, positions: Tensor) -> Angles:
        """positions long[B|1, T] -> cos, sin float32 [B|1, T, 1, Dh/2].

        In steps on a CPU pairs are turned as complex numbers: the same sums in fewer calls.
        """
        cos, sin = self.turns(positions)
        stepping = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if self.interleaved and stepping and positions.device.type == "cpu":
            return torch.complex(cos, sin)
        return cos, sin

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions long[...] -> cos, sin float32 [..., 1, Dh/2]."""
        i = torch.arange(self.head_dim // 2, device=positions.device, dtype=torch.float32)
        freqs = torch.exp(i * (-2 * math.log(self.max_period) / self.head_dim))
        angle = (positions[..., None].float() * freqs)[..., None, :]
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """x [B, T, H, Dh], rotated in float32, in x's dtype again."""
        pairs = x.float()
        if isinstance(angles, Tensor):
            turned = torch.view_as_complex(pairs.contiguous().unflatten(-1, (-1, 2))) * angles
            return torch.view_as_real(turned).flatten(-2).to(x.dtype)
        cos, sin = angles
        if self.interleaved:
            a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1)  # (2i, 2i + 1)
        else:
            a, b = pairs.chunk(2, -1)  # (i, i + Dh/2)
        ab = (a * cos - b * sin, a * sin + b * cos)
        out = torch.stack(ab, -1).flatten(-2) if self.interleaved else torch.cat(ab, -1)
        return out.to(x.dtype)
