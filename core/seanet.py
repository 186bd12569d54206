"""SEANet: Mimi's convolutional encoder (waveform -> 25 Hz latents) and decoder (paper §3.3.1).

Each is a plain list of layers whose indices are those of the published tensor names. The streaming
state is a list with one entry per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.config import SeanetConfig
from moshi_cli.core.conv import CausalConv, CausalConvTranspose
from moshi_cli.core.state import Overlap, State, Tail


@dataclass
class ResidualState(State):
    """Tails of the two convolutions of a residual block."""

    convs: list[Tail | None]


@dataclass
class SeanetState(State):
    """One entry per layer; None where a layer keeps nothing."""

    layers: list[Tail | Overlap | ResidualState | None]


class Elu(nn.Module):
    """ELU as a stateless layer of the list."""

    def init_state(self, slots: int, *, device: torch.device | str) -> None:
        return None

    def forward(self, x: Tensor, state: None = None, active: Tensor | None = None) -> Tensor:
        return F.elu(x)


class Residual(nn.Module):
    """x + conv1(ELU(conv3(ELU(x)))), half the channels inside. [B, C, T] -> same."""

    def __init__(self, channels: int, kernel: int, dilation: int, compress: int):
        super().__init__()
        hidden = channels // compress
        self.convs = nn.ModuleList(
            [
                CausalConv(channels, hidden, kernel, dilation=dilation),
                CausalConv(hidden, channels, 1),
            ]
        )

    def init_state(self, slots: int, *, device: torch.device | str) -> ResidualState:
        convs = cast("list[CausalConv]", list(self.convs))
        return ResidualState([c.init_state(slots, device=device) for c in convs])

    def forward(
        self, x: Tensor, state: ResidualState | None = None, active: Tensor | None = None
    ) -> Tensor:
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(F.elu(y), None if state is None else state.convs[i], active)
        return x + y


class Seanet(nn.Module):
    """The layer list and its streaming walk; `SeanetEncoder` and `SeanetDecoder` fill it."""

    layers: nn.ModuleList

    def init_state(self, slots: int, *, device: torch.device | str) -> SeanetState:
        """Fresh tails for `slots` streams."""
        layers = cast("list[Residual]", list(self.layers))  # any layer: they share the signature
        return SeanetState([layer.init_state(slots, device=device) for layer in layers])

    def forward(
        self, x: Tensor, state: SeanetState | None = None, active: Tensor | None = None
    ) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, None if state is None else state.layers[i], active)
        return x


def residuals(c: SeanetConfig, channels: int) -> list[nn.Module]:
    """The residual blocks of one stage."""
    return [
        Residual(channels, c.residual_kernel, c.dilation_base**i, c.compress)
        for i in range(c.residual_layers)
    ]


class SeanetEncoder(Seanet):
    """[B, 1, S] -> [B, D, S / hop]."""

    def __init__(self, c: SeanetConfig):
        super().__init__()
        width = c.filters
        layers: list[nn.Module] = [CausalConv(1, width, c.kernel)]
        for ratio in reversed(c.ratios):
            layers += residuals(c, width)
            layers += [Elu(), CausalConv(width, 2 * width, 2 * ratio, ratio)]
            width *= 2
        layers += [Elu(), CausalConv(width, c.dim, c.last_kernel)]
        self.layers = nn.ModuleList(layers)


class SeanetDecoder(Seanet):
    """[B, D, T] -> [B, 1, T · hop]."""

    def __init__(self, c: SeanetConfig):
        super().__init__()
        width = c.filters * 2 ** len(c.ratios)
        layers: list[nn.Module] = [CausalConv(c.dim, width, c.kernel)]
        for ratio in c.ratios:
            layers += [Elu(), CausalConvTranspose(width, width // 2, 2 * ratio, ratio)]
            width //= 2
            layers += residuals(c, width)
        layers += [Elu(), CausalConv(width, 1, c.last_kernel)]
        self.layers = nn.ModuleList(layers)
