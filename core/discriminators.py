"""Multi-scale STFT discriminator: the critics that teach Mimi's decoder to sound real (§3.3.2).

Each critic looks at one STFT resolution as a two-channel image (real, imaginary), through a stack
of 2-D convolutions that grow in time by dilation and shrink in frequency by stride, as in EnCodec
(Défossez et al. 2022, §3.4). In: wav [B, 1, S]. Out per scale: logits [B, 1, T', F'] and the
activations of every layer, for feature matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the critics. Cost grows with filters² and with 1 / (hop · first stride)."""

    windows: tuple[int, ...] = (1024, 512, 256)  # STFT sizes, samples
    hop: float = 0.5  # hop as a part of the window
    filters: int = 32  # channels of every layer
    kernel: tuple[int, int] = (3, 9)  # taps in time, in frequency
    strides: tuple[int, ...] = (4, 2, 2, 2)  # in frequency, one layer each
    dilations: tuple[int, ...] = (1, 1, 2, 4)  # in time, one layer each


@dataclass(frozen=True)
class Judgement:
    """What all critics say of one batch."""

    logits: list[Tensor]  # per scale [B, 1, T', F']
    features: list[list[Tensor]]  # per scale, per layer [B, filters, T', F']

    def split(self, first: int) -> tuple[Judgement, Judgement]:
        """The same for rows [:first] and [first:]."""
        halves = [
            Judgement([x[part] for x in self.logits], [[x[part] for x in f] for f in self.features])
            for part in (slice(None, first), slice(first, None))
        ]
        return halves[0], halves[1]


class StftDiscriminator(nn.Module):
    """One critic at one resolution."""

    window: Tensor

    def __init__(self, config: DiscriminatorConfig, size: int):
        super().__init__()
        self.size, self.hop = size, int(size * config.hop)
        window = torch.hann_window(size)
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        channels = [2] + [config.filters] * len(config.strides)
        kt, kf = config.kernel
        self.layers = nn.ModuleList(
            weight_norm(
                nn.Conv2d(
                    a, b, (kt, kf), (1, stride), (dilation * (kt // 2), kf // 2), (dilation, 1)
                )
            )
            for (a, b), stride, dilation in zip(
                pairwise(channels), config.strides, config.dilations, strict=True
            )
        )
        self.last = weight_norm(nn.Conv2d(config.filters, 1, 3, padding=1))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wav [B, 1, S] -> logits [B, 1, T', F'], features per layer [B, filters, T', F']."""
        with torch.autocast(wav.device.type, enabled=False):
            z = torch.stft(
                wav[:, 0].float(), self.size, self.hop, window=self.window, return_complex=True
            )
        x = torch.view_as_real(z).permute(0, 3, 2, 1)  # [B, 2, T, F]
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


class Discriminator(nn.Module):
    """All critics. wav [B, 1, S] -> Judgement."""

    def __init__(self, config: DiscriminatorConfig | None = None):
        super().__init__()
        self.config = config or DiscriminatorConfig()
        self.scales = nn.ModuleList(StftDiscriminator(self.config, n) for n in self.config.windows)

    def forward(self, wav: Tensor) -> Judgement:
        """wav [B, 1, S], at least one window long."""
        judged = [scale(wav) for scale in self.scales]
        return Judgement([logits for logits, _ in judged], [features for _, features in judged])
