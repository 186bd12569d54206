"""Causal convolutions of the codec (paper §3.3.1): one `forward`, offline or with a tail.

Offline a convolution pads on the left only, by kernel - stride (dilated); a transposed convolution
drops its last kernel - stride outputs. Streaming keeps exactly these samples between calls, so any
chunking into multiples of the stride gives the offline result.

A packed convolution (see packing.py) has no weight but a product: rows of inputs -> rows of
outputs. It works with time before channels, where a window of inputs is one stretch of memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.layers import project
from moshi_cli.core.state import Overlap, Tail, keep

SHORT = 16  # outputs of all rows up to which a convolution on a CPU is one product
UNFOLDED = 1 << 20  # numbers of windows that are laid out at a time: 4 MB


class CausalConv(nn.Conv1d):
    """Conv1d that never looks ahead. [B, C, T] -> [B, C', T / stride]; T a multiple of the stride.

    replicate: pad with the first input frame instead of zeros (Mimi's learnt downsampling).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        replicate: bool = False,
    ):
        super().__init__(channels, out_channels, kernel, stride, dilation=dilation, bias=bias)
        self.context = (kernel - 1) * dilation + 1 - stride  # samples of left context
        self.replicate = replicate
        self.product: nn.Module | None = None  # if packed: [..., k · C] -> [..., C']

    def init_state(self, slots: int, *, device: torch.device | str) -> Tail | None:
        """Empty left context; None when the kernel needs none."""
        if self.context <= 0:
            return None
        x = torch.zeros(slots, self.context, self.in_channels, device=device).transpose(1, 2)
        return Tail(x, torch.ones(slots, dtype=torch.bool, device=device))

    def forward(self, x: Tensor, tail: Tail | None = None, active: Tensor | None = None) -> Tensor:
        assert x.shape[-1] % self.stride[0] == 0, (x.shape, self.stride)
        if self.context <= 0:
            return self.convolve(x)
        if tail is None:
            first = x[..., :1] if self.replicate else torch.zeros_like(x[..., :1])
            return self.convolve(self.join(first.expand(-1, -1, self.context), x))
        past = tail.x
        if self.replicate:
            past = torch.where(tail.fresh[:, None, None], x[..., :1], past)
        x = self.join(past, x)
        y = self.convolve(x)
        keep(tail.x, x[..., x.shape[-1] - self.context :], active)
        if self.replicate:
            keep(tail.fresh, torch.zeros_like(tail.fresh), active)
        return y

    def join(self, past: Tensor, x: Tensor) -> Tensor:
        """past [B, C, context] and x [B, C, T] -> [B, C, context + T]."""
        if self.product is None:
            return torch.cat([past, x], -1)
        return torch.cat([past.transpose(1, 2), x.transpose(1, 2)], 1).transpose(1, 2)

    def convolve(self, x: Tensor) -> Tensor:
        """x [B, C, T], padded -> [B, C', T'].

        PyTorch's convolution is slow on a CPU where a large kernel makes few outputs, as the inner
        ones do in every frame; there it is one product with the unfolded input.
        """
        (kernel,), (stride,), B = self.kernel_size, self.stride, len(x)
        if self.product is not None:
            _, C, length = x.shape
            x = x.transpose(1, 2)
            if kernel == stride == 1:
                return self.product(x).transpose(1, 2)
            x = x.contiguous()
            size = (B, (length - kernel) // stride + 1, kernel * C)
            windows = x.as_strided(size, (length * C, stride * C, 1))  # [B, T', k · C]
            rows = max(1, UNFOLDED // (B * size[2]))
            if size[1] <= rows:
                return self.product(windows).transpose(1, 2)
            return torch.cat([self.product(w) for w in windows.split(rows, 1)], 1).transpose(1, 2)
        T = (x.shape[-1] - kernel) // stride + 1
        if x.device.type != "cpu" or B * T > SHORT or self.dilation[0] > 1:
            return super().forward(x)
        columns = x.unfold(2, kernel, stride).transpose(1, 2).reshape(B, T, -1)  # [B, T, C · k]
        y = project(columns, self.weight.flatten(1))  # [B, T, C']
        return (y if self.bias is None else y + self.bias).transpose(1, 2)


class CausalConvTranspose(nn.ConvTranspose1d):
    """Transposed Conv1d trimmed on the right. [B, C, T] -> [B, C', T · stride]."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(channels, out_channels, kernel, stride, groups=groups, bias=bias)
        self.overlap = kernel - stride
        self.product: nn.Module | None = None  # if packed: [..., C] -> [..., k · C']

    def init_state(self, slots: int, *, device: torch.device | str) -> Overlap:
        """No unfinished outputs yet."""
        return Overlap(torch.zeros(slots, self.out_channels, self.overlap, device=device))

    def forward(  # type: ignore[override]
        self, x: Tensor, overlap: Overlap | None = None, active: Tensor | None = None
    ) -> Tensor:
        length = x.shape[-1] * self.stride[0]
        if self.product is not None:
            return self.multiply(x, overlap, active)
        if overlap is None:
            return super().forward(x)[..., :length]
        y = self.spread(x)
        y = torch.cat([y[..., : self.overlap] + overlap.x, y[..., self.overlap :]], -1)
        keep(overlap.x, y[..., length:], active)
        y = y[..., :length]
        return y if self.bias is None else y + self.bias[:, None]

    def spread(self, x: Tensor) -> Tensor:
        """x [B, C, T] -> [B, C', T · stride + overlap], without the bias.

        PyTorch multiplies by the transposed kernel, which is slow on a CPU where T is small; there
        the product is turned round and its parts are added where they overlap.
        """
        (kernel,), (stride,), B, T = self.kernel_size, self.stride, len(x), x.shape[-1]
        if x.device.type != "cpu" or B * T > SHORT or self.groups > 1 or kernel != 2 * stride:
            return F.conv_transpose1d(x, self.weight, None, self.stride, groups=self.groups)
        y = x.transpose(1, 2).reshape(B * T, -1) @ self.weight.flatten(1)  # [B · T, C' · k]
        first, second = y.view(B, T, -1, 2, stride).permute(
            3, 0, 2, 1, 4
        )  # each [B, C', T, stride]
        whole = F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))
        return whole.flatten(2)

    def multiply(self, x: Tensor, overlap: Overlap | None, active: Tensor | None) -> Tensor:
        """`forward` of a packed layer, whose kernel is two strides: half of it falls on the next.

        The product has the bias in the first half.
        """
        assert self.product is not None
        B, T = len(x), x.shape[-1]
        first, second = self.product(x.transpose(1, 2)).chunk(2, -1)  # [B, T, stride · C']
        past = torch.zeros_like(second[:, :1])
        if overlap is not None:
            past = overlap.x.transpose(1, 2).reshape(past.shape)
        second = torch.cat([past, second], 1)
        if overlap is not None:
            keep(overlap.x, second[:, T].view(B, self.overlap, -1).transpose(1, 2), active)
        return (first + second[:, :T]).reshape(B, T * self.overlap, -1).transpose(1, 2)
