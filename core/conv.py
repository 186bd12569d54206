"""Causal convolutions of the codec (paper §3.3.1): one `forward`, offline or with a tail.

Offline a convolution pads on the left only, by kernel - stride (dilated); a transposed convolution
drops its last kernel - stride outputs. Streaming keeps exactly these samples between calls, so any
chunking into multiples of the stride gives the offline result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.state import Overlap, Tail, keep


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

    def init_state(self, slots: int, *, device: torch.device | str) -> Tail | None:
        """Empty left context; None when the kernel needs none."""
        if self.context <= 0:
            return None
        x = torch.zeros(slots, self.in_channels, self.context, device=device)
        return Tail(x, torch.ones(slots, dtype=torch.bool, device=device))

    def forward(self, x: Tensor, tail: Tail | None = None, active: Tensor | None = None) -> Tensor:
        assert x.shape[-1] % self.stride[0] == 0, (x.shape, self.stride)
        if self.context <= 0:
            return super().forward(x)
        if tail is None:
            return super().forward(F.pad(x, (self.context, 0), mode=self._padding))
        past = tail.x
        if self.replicate:
            past = torch.where(tail.fresh[:, None, None], x[..., :1], past)
        x = torch.cat([past, x], -1)
        y = super().forward(x)
        keep(tail.x, x[..., x.shape[-1] - self.context :], active)
        keep(tail.fresh, torch.zeros_like(tail.fresh), active)
        return y

    @property
    def _padding(self) -> str:
        return "replicate" if self.replicate else "constant"


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

    def init_state(self, slots: int, *, device: torch.device | str) -> Overlap:
        """No unfinished outputs yet."""
        return Overlap(torch.zeros(slots, self.out_channels, self.overlap, device=device))

    def forward(  # type: ignore[override]
        self, x: Tensor, overlap: Overlap | None = None, active: Tensor | None = None
    ) -> Tensor:
        length = x.shape[-1] * self.stride[0]
        if overlap is None:
            return super().forward(x)[..., :length]
        y = F.conv_transpose1d(x, self.weight, None, self.stride, groups=self.groups)
        y = torch.cat([y[..., : self.overlap] + overlap.x, y[..., self.overlap :]], -1)
        keep(overlap.x, y[..., length:], active)
        y = y[..., :length]
        return y if self.bias is None else y + self.bias[:, None]
