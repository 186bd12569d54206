"""Training losses: those of the codec (paper §3.3) and that of the language model (§3.4.4).

Codec losses compare wav with its reconstruction, both [B, 1, S] in [-1, 1], and return scalars.
`Balancer` weighs the ones that act through the decoder's output by the size of their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.conditioning import Conditions
from moshi_cli.core.config import LmConfig
from moshi_cli.core.discriminators import Judgement
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.streams import ZERO, DelayPattern, Shifted


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


@dataclass(frozen=True)
class LmWeights:
    """How much each kind of token counts (paper §3.4.4; published fine-tuning: 1, 0.5, 100, 1)."""

    text: float = 1.0  # the text loss as a whole
    pad: float = 0.5  # a PAD or EPAD target within it
    semantic: float = 100.0  # the first codebook, against …
    acoustic: float = 1.0  # … each of the others
    audio: float = 1.0  # the audio loss as a whole


@dataclass(frozen=True)
class LmLosses:
    """Scalars in nats; NaN-free: a part without targets is zero."""

    total: Tensor
    text: Tensor  # weighted mean over text targets
    audio: Tensor  # weighted mean over code targets
    streams: Tensor  # [1 + Q]: plain mean per stream, detached


def asked(text: Tensor, config: LmConfig) -> Tensor:
    """What the text head is to say where `text` long[...] is fed.

    The same, but in a model whose words come from a script: there the head says when a word begins
    (EPAD) and nothing else (PAD), as two tokens in one id tell, or an id that it has no class for.
    """
    said = torch.where(text < config.text_classes, text, config.text_pad)
    if config.demux:
        card = config.text_vocab + 1
        begins = torch.where(text < 2 * card, config.text_epad, config.text_pad)
        said = torch.where(text >= card, begins, said)
    return said


def lm_mass(shifted: Shifted, config: LmConfig, weights: LmWeights) -> Tensor:
    """Σ weight over the text targets and over the code targets of a batch. -> float64[2]"""
    text = asked(shifted.targets[:, 0][shifted.mask[:, 0]], config)
    blank = int(((text == config.text_pad) | (text == config.text_epad)).sum())
    codes = shifted.mask[:, 1 : 1 + config.dep_q].sum((0, 2)).double()  # [Q]
    audio = float(weights.acoustic * codes[1:].sum() + weights.semantic * codes[:1].sum())
    return torch.tensor([len(text) - blank + weights.pad * blank, audio], dtype=torch.float64)


def lm_loss(
    lm: MoshiLm,
    shifted: Shifted,
    weights: LmWeights | None = None,
    conditions: Conditions | None = None,
    mass: Tensor | None = None,
) -> LmLosses:
    """Cross-entropy of the delayed integers: Σ weight · CE / Σ weight, for text and for audio.

    shifted: from `DelayPattern.shift` (or several, see `join_shifted`), K streams of which text and
    the first Q are predicted where the mask is set. Rows that are given must not be in the mask:
    `learnable` takes care. The depth transformer runs on frames that have a code to predict.
    mass: the two sums of weights to divide by (`lm_mass`) if the batch is part of a larger one; the
    losses of the parts then add up to the loss of the whole.
    """
    w, Q = weights or LmWeights(), lm.config.dep_q
    h, text_logits = lm.temporal(shifted.inputs, conditions=conditions, residual=heard(shifted))
    targets, mask = shifted.targets[:, : 1 + Q], shifted.mask[:, : 1 + Q]
    text = asked(targets[:, 0][mask[:, 0]], lm.config)  # [N]
    text_ce = F.cross_entropy(text_logits[mask[:, 0]].float(), text, reduction="none")
    blank = (text == lm.config.text_pad) | (text == lm.config.text_epad)
    text_w = torch.where(blank, w.pad, 1.0)
    text_mass = text_w.sum() if mass is None else mass[0].to(text_w)
    text_loss = (text_ce * text_w).sum() / text_mass.clamp_min(1e-9)
    means = [text_ce.detach().sum() / max(len(text), 1)]
    audio_loss = text_loss.new_zeros(())
    frames = mask[:, 1:].any(1)  # [B, S]
    if Q and mass is not None and mass[1] > 0 and not frames.any():
        frames[0, 0] = True  # the depth transformer runs for all parts or for none
    if Q and frames.any():
        columns = targets.transpose(1, 2)[frames].t()[None]  # [1, 1 + Q, N]
        logits = lm.depth_logits(h[frames][None], columns)[0].float()  # [Q, N, C]
        valid = mask.transpose(1, 2)[frames].t()[1:]  # [Q, N]
        counts = valid.float()  # [Q, N]
        if shifted.worth is not None:
            counts = counts * shifted.worth.transpose(1, 2)[frames].t()[1 : 1 + Q]
        wanted = torch.where(valid, columns[0, 1:], 0)
        ce = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(Q, -1)
        each = torch.full((Q, 1), w.acoustic).to(ce)
        each[0] = w.semantic
        audio_mass = (each * valid).sum() if mass is None else mass[1].to(each)
        audio_loss = (ce * each * counts).sum() / audio_mass.clamp_min(1e-9)
        means += list(((ce * valid).sum(1) / valid.sum(1).clamp_min(1)).detach())
    else:
        means += [text_loss.new_zeros(())] * Q
    total = w.text * text_loss + w.audio * audio_loss
    return LmLosses(total, text_loss, audio_loss, torch.stack(means))


def heard(shifted: Shifted) -> Tensor | None:
    """Its residual as `MoshiLm.temporal` reads it, [B, S, 2 · dim]."""
    return None if shifted.residual is None else shifted.residual.transpose(1, 2)


def learnable(shifted: Shifted, pattern: DelayPattern) -> Shifted:
    """The same with the mask cleared on rows that the task gives."""
    made = torch.zeros(len(pattern.delays), 1, dtype=torch.bool, device=shifted.mask.device)
    made[list(pattern.made)] = True
    return replace(shifted, mask=shifted.mask & made)


def join_shifted(parts: Sequence[Shifted]) -> Shifted:
    """One batch out of several of different length; what is added at the end is nothing."""
    longest = max(p.inputs.shape[2] for p in parts)

    def join(name: str, fill: int) -> Tensor:
        each = [getattr(p, name) for p in parts]
        return torch.cat([F.pad(x, (0, longest - x.shape[2]), value=fill) for x in each])

    known = next((p.residual for p in parts if p.residual is not None), None)
    if known is not None:  # the others hear nothing beside codes
        size = known.shape[1]
        parts = [
            p if p.residual is not None
            else replace(p, residual=known.new_zeros(len(p.inputs), size, p.inputs.shape[2]))
            for p in parts
        ]  # fmt: skip
    residual = None if known is None else join("residual", 0)
    worth = None
    if any(p.worth is not None for p in parts):
        ones = [torch.ones_like(p.mask, dtype=torch.float32) for p in parts]
        parts = [
            replace(p, worth=one) if p.worth is None else p
            for p, one in zip(parts, ones, strict=True)
        ]
        worth = join("worth", 1)
    columns = join("inputs", ZERO), join("targets", ZERO), join("mask", False)
    return Shifted(*columns, residual, worth)
