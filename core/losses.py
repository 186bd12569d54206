"""Training losses: those of the codec (paper §3.3) and that of the language model (§3.4.4).

Codec losses compare wav with its reconstruction, both [B, 1, S] in [-1, 1], and return scalars.
`Balancer` weighs the ones that act through the decoder's output by the size of their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.discriminators import Judgement


def mel_filters(bins: int, mels: int, sample_rate: int) -> Tensor:
    """Triangles on the HTK mel scale from 0 to half the sample rate. -> [bins, mels]"""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges_hz = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    bins_hz = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)[:, None]
    rise = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    fall = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    return torch.minimum(rise, fall).clamp_min(0).float()


class SpectralLoss(nn.Module):
    """Distances between log spectra over several windows, on mel bands or on plain bins.

    Per window: mean absolute difference plus root mean square over the bands of each frame, as in
    EnCodec §3.4 (hop = a quarter window). The STFT is scaled so that white noise of rms r reads r;
    `floor` is the level under which differences count no more.
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
        *,
        mel: bool = True,
        max_mels: int = 128,
        floor: float = 3e-4,
    ):
        super().__init__()
        self.windows, self.mel, self.floor = tuple(windows), mel, floor
        for size in self.windows:
            window = torch.hann_window(size)
            window /= window.square().sum().sqrt()
            self.register_buffer(f"window_{size}", window, persistent=False)
            if mel:
                mels = min(max_mels, size * 5 // 32)  # finer than the bins would leave bands empty
                filters = mel_filters(size // 2 + 1, mels, sample_rate)
                self.register_buffer(f"filters_{size}", filters, persistent=False)

    def spectrum(self, wav: Tensor, size: int) -> Tensor:
        """wav [B, S] -> natural log spectrum [B, T', bands]."""
        window = self.get_buffer(f"window_{size}")
        z = torch.stft(wav, size, size // 4, window=window, return_complex=True)  # [B, bins, T']
        x = (torch.view_as_real(z).square().sum(-1) + 1e-12).sqrt().transpose(1, 2)
        if self.mel:
            x = x @ self.get_buffer(f"filters_{size}")
        return (x + self.floor).log()

    def forward(self, wav: Tensor, real: Tensor) -> Tensor:
        """wav (made) and real [B, 1, S] -> scalar, mean over the windows."""
        with torch.autocast(wav.device.type, enabled=False):
            made, true = wav[:, 0].float(), real[:, 0].float()
            total = made.new_zeros(())
            for size in self.windows:
                with torch.no_grad():
                    target = self.spectrum(true, size)
                d = self.spectrum(made, size) - target
                total = total + d.abs().mean() + (d.square().mean(-1) + 1e-8).sqrt().mean()
        return total / len(self.windows)


def discriminator_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Hinge loss of the critics, mean over scales: real above 1, fake below -1."""
    terms = [
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
        for r, f in zip(real.logits, fake.logits, strict=True)
    ]
    return torch.stack(terms).mean()


def adversarial_loss(fake: Judgement) -> Tensor:
    """Hinge loss of the generator, mean over scales: what the critics still find fake."""
    return torch.stack([F.relu(1 - f.float()).mean() for f in fake.logits]).mean()


def feature_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Feature matching: mean absolute difference over that of the real features, per layer."""
    terms = []
    for reals, fakes in zip(real.features, fake.features, strict=True):
        for r, f in zip(reals, fakes, strict=True):
            r = r.detach().float()
            terms.append((f.float() - r).abs().mean() / (r.abs().mean() + 1e-6))
    return torch.stack(terms).mean()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine between student and teacher [B, T, D], over frames where the teacher is not zero.

    Paper §3.3.2: the semantic codebook learns what a self-supervised speech encoder hears.
    """
    present = teacher.abs().amax(-1) > 0  # [B, T]
    cosine = F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return ((1 - cosine) * present).sum() / present.sum().clamp_min(1)


class Balancer:
    """Mixes losses by the norm of their gradient on one tensor (EnCodec §3.4, "balancer").

    The first loss named in `weights` is the unit and keeps its own scale; the gradient of another
    one is scaled to weight / first weight times the first one's norm. Norms are averaged over steps
    with `decay`.
    """

    def __init__(self, weights: Mapping[str, float], *, decay: float = 0.99):
        self.weights, self.decay = {k: v for k, v in weights.items() if v}, decay
        self.norms: dict[str, list[float]] = {}  # name -> [decayed sum, decayed count]

    def gradient(self, losses: Mapping[str, Tensor], at: Tensor) -> Tensor:
        """Scalar losses, a tensor `at` [B, ...] they depend on -> the mixed gradient at `at`.

        Losses without a weight are left out; the unit must be there. Graphs are kept: some share
        branches.
        """
        unit = next(iter(self.weights))
        assert unit in losses, (unit, list(losses))
        mixed = torch.zeros_like(at)
        for name in (unit, *(n for n in self.weights if n in losses and n != unit)):
            (grad,) = torch.autograd.grad(losses[name], at, retain_graph=True)
            norm = grad.flatten(1).norm(dim=1).mean().item()
            if not math.isfinite(norm):
                return torch.full_like(at, math.nan)  # the loop's guard drops this step
            entry = self.norms.setdefault(name, [0.0, 0.0])
            entry[0] = self.decay * entry[0] + norm
            entry[1] = self.decay * entry[1] + 1
            mean = entry[0] / entry[1] + 1e-12
            if name == unit:
                size, mixed = mean, grad
            else:
                mixed = mixed + grad * (size / mean * self.weights[name] / self.weights[unit])
        return mixed
