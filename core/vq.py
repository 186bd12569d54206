"""Split residual vector quantiser of Mimi (paper §3.3.2): lookup, and EMA codebooks to train it.

Two branches see the *same* latent: a plain VQ for the semantic codebook and a residual VQ for the
acoustic ones. Each has its own 1×1 projections; the branch outputs are added. Codebooks are stored
as running sums, centroid = embedding_sum / max(cluster_usage, 1e-5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.config import QuantizerConfig

EPS = 1e-5  # floor of a cluster's usage


class Codebook(nn.Module):
    """C centroids of width D, learnt by exponential moving averages."""

    embedding_sum: Tensor  # [C, D]
    cluster_usage: Tensor  # [C]
    initialized: Tensor  # [1]
    centroids: Tensor  # [C, D], derived
    half_norm: Tensor  # [C], ‖c‖² / 2, derived

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("embedding_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("initialized", torch.zeros(1))
        self.register_buffer("centroids", torch.zeros(size, dim), persistent=False)
        self.register_buffer("half_norm", torch.zeros(size), persistent=False)

    def refresh(self) -> None:
        """Derive the centroids; call after the sums changed (loading, training)."""
        self.centroids = self.embedding_sum / self.cluster_usage.clamp(min=EPS)[:, None]
        self.half_norm = self.centroids.square().sum(-1) / 2

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> index of the nearest centroid [...]."""
        return (self.half_norm - x @ self.centroids.t()).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] -> centroids [..., D]."""
        return F.embedding(codes, self.centroids)

    @torch.no_grad()
    def learn(
        self, x: Tensor, codes: Tensor, decay: float, min_usage: float, generator: torch.Generator
    ) -> None:
        """One EMA step on vectors x [N, D] with their codes [N]; dead entries restart on data.

        An entry is dead when its usage falls below `min_usage` times the mean usage.
        """
        size = len(self.cluster_usage)
        pick = torch.randint(len(x), (size,), generator=generator).to(x.device)
        if not self.initialized.item():
            noise = torch.randn(size, x.shape[1], generator=generator).to(x)
            self.embedding_sum.copy_(x[pick] + 0.01 * x.std() * noise)
            self.cluster_usage.fill_(1.0)
            self.initialized.fill_(1.0)
            self.refresh()
            return
        counts = torch.bincount(codes, minlength=size).to(x)
        sums = torch.zeros_like(self.embedding_sum).index_add_(0, codes, x)
        self.cluster_usage.mul_(decay).add_(counts, alpha=1 - decay)
        self.embedding_sum.mul_(decay).add_(sums, alpha=1 - decay)
        mean = self.cluster_usage.mean()
        dead = self.cluster_usage < min_usage * mean
        self.embedding_sum.copy_(torch.where(dead[:, None], x[pick] * mean, self.embedding_sum))
        self.cluster_usage.copy_(torch.where(dead, mean, self.cluster_usage))
        self.refresh()


@dataclass
class Quantized:
    """What a branch returns in training. Shapes [B, D, T] with D the latent width."""

    latent: Tensor  # straight-through output, in the latent space
    codes: Tensor  # [B, Q, T]
    commitment: Tensor  # scalar


class ResidualVq(nn.Module):
    """1×1 in, `codebooks` rounds of nearest centroid and subtract, sum, 1×1 out."""

    def __init__(self, latent: int, config: QuantizerConfig, codebooks: int):
        super().__init__()
        self.input_proj = nn.Conv1d(latent, config.dim, 1, bias=False)
        self.output_proj = nn.Conv1d(config.dim, latent, 1, bias=False)
        self.layers = nn.ModuleList(Codebook(config.size, config.dim) for _ in range(codebooks))

    def encode(self, x: Tensor, count: int) -> Tensor:
        """x [B, D, T] -> codes [B, count, T]."""
        r = self.input_proj(x).transpose(1, 2)  # [B, T, dim]
        codes = []
        for layer in self.layers[:count]:
            codes.append(layer.encode(r))
            r = r - layer.decode(codes[-1])
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, n, T], n ≤ codebooks -> latent [B, D, T]."""
        z = sum(layer.decode(c) for layer, c in zip(self.layers, codes.unbind(1), strict=False))
        assert isinstance(z, Tensor)
        return self.output_proj(z.transpose(1, 2))

    def train_step(
        self,
        x: Tensor,
        quantize: Tensor,
        counts: Tensor,
        decay: float,
        min_usage: float,
        generator: torch.Generator,
    ) -> Quantized:
        """x [B, D, T]; quantize bool[B]; counts long[B]: codebooks used per item (dropout).

        In training mode all levels learn from their residuals. The straight-through output uses
        `counts` levels, or the unquantised projection where `quantize` is False.
        """
        z = self.input_proj(x).transpose(1, 2)  # [B, T, dim]
        r, total, loss, codes = z.detach(), torch.zeros_like(z), z.new_zeros(()), []
        for level, layer in enumerate(self.layers):
            flat = r.reshape(-1, r.shape[-1])
            if self.training and not layer.initialized.item():
                layer.learn(flat, flat.new_zeros(0).long(), decay, min_usage, generator)
            index = layer.encode(r)
            near = layer.decode(index)
            if self.training:
                layer.learn(flat, index.reshape(-1), decay, min_usage, generator)
            used = (level < counts)[:, None, None]
            total = total + torch.where(used, near, torch.zeros_like(near))
            error = (z - total).square() * used  # pulls the encoder towards what is decoded
            loss = loss + error.mean()
            codes.append(index)
            r = r - near
        straight = z + torch.where(quantize[:, None, None], total - z, torch.zeros_like(z)).detach()
        latent = self.output_proj(straight.transpose(1, 2))
        return Quantized(latent, torch.stack(codes, 1), loss / len(self.layers))


class SplitVq(nn.Module):
    """Semantic VQ and acoustic residual VQ side by side. codes [B, Q, T]: semantic first."""

    def __init__(self, latent: int, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.semantic = ResidualVq(latent, config, config.semantic)
        self.acoustic = ResidualVq(latent, config, config.codebooks - config.semantic)
        self.active = config.codebooks  # codebooks that encode() gives

    def refresh(self) -> None:
        """Derive all centroids from the stored sums."""
        for module in self.modules():
            if isinstance(module, Codebook):
                module.refresh()

    def encode(self, x: Tensor) -> Tensor:
        """latent [B, D, T] -> codes [B, active, T]."""
        first = self.config.semantic
        codes = self.semantic.encode(x, min(first, self.active))
        if self.active <= first:
            return codes
        return torch.cat([codes, self.acoustic.encode(x, self.active - first)], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, n, T], any n ≤ Q -> latent [B, D, T]."""
        first = self.config.semantic
        latent = self.semantic.decode(codes[:, :first])
        if codes.shape[1] > first:
            latent = latent + self.acoustic.decode(codes[:, first:])
        return latent
