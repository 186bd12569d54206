"""What a frame sounds like, read out of its latent in a straight line: a teacher of the encoder.

Reconstruction alone teaches an encoder late, through a decoder that cannot draw yet. Here one
linear layer tells spectral envelope and pitch from the latent that is not quantised yet, and its
errors reach the encoder at once. Then the codebooks are `aim`ed: they quantise the latent in the
directions that the layer reads, so that what they lose is what it misses. Neither is part of the
codec.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.losses import mel_filters
from moshi_cli.core.vq import SplitVq

COLUMNS, BANDS = 8, 40  # log-mel spectra per frame, and their bands
CORRELATIONS = 4  # autocorrelations per frame
LOWEST_HZ, HIGHEST_HZ = 62.5, 400.0  # of the pitch
DECIMATION = 4  # before correlating
FLOOR = 1e-3  # of the spectra: white noise of this rms …
MIDDLE = 0.02  # … and what is told as 0
VOICED = 0.4  # least correlation of a voiced stretch
RIDGE = 1e-4  # of the latent's power, added to its second moments


class Readout(nn.Module):
    """Latents [B, T, D] -> log-mel [B, T, 8 · 40] and autocorrelation [B, T, 4, lags]."""

    def __init__(self, width: int, sample_rate: int, frame_samples: int):
        super().__init__()
        self.hop = frame_samples // COLUMNS
        self.window = self.hop * 8 // 3
        slow = sample_rate // DECIMATION
        self.first, self.last = round(slow / HIGHEST_HZ), round(slow / LOWEST_HZ)
        self.stretch = 2 * frame_samples // DECIMATION // CORRELATIONS  # half of it overlaps
        size = 2 ** (2 * self.stretch - 1).bit_length()
        taper = torch.hann_window(self.stretch)
        own = torch.fft.irfft(torch.fft.rfft(taper, size).abs().square())  # of the taper itself
        for name, value in {
            "hann": torch.hann_window(self.window),
            "filters": mel_filters(self.window // 2 + 1, BANDS, sample_rate),
            "taper": taper,
            "correction": own[0] / own[: self.last + 1],
        }.items():
            self.register_buffer(name, value, persistent=False)
        lags = self.last + 1 - self.first
        self.sizes = [COLUMNS * BANDS, CORRELATIONS * lags]
        self.layer = nn.Linear(width, sum(self.sizes))

    def envelope(self, wav: Tensor) -> Tensor:
        """wav [B, 1, S] -> natural log mel spectra over MIDDLE [B, T, 8 · 40]; no window looks
        ahead."""
        x = F.pad(wav[:, 0].float(), (self.window - self.hop, 0)).unfold(1, self.window, self.hop)
        scale = self.get_buffer("hann").square().sum().sqrt()
        power = torch.fft.rfft(x * self.get_buffer("hann")).abs() / scale  # [B, 8 T, bins]
        mel = ((power @ self.get_buffer("filters") + FLOOR) / MIDDLE).log()
        return mel.reshape(len(wav), -1, COLUMNS * BANDS)

    def correlation(self, wav: Tensor) -> Tensor:
        """wav [B, 1, S] -> normalised autocorrelation [B, T, 4, lags], lags of 400 to 62.5 Hz."""
        x = F.avg_pool1d(wav.float(), DECIMATION)[:, 0]
        x = F.pad(x, (self.stretch // 2, 0)).unfold(1, self.stretch, self.stretch // 2)
        taper, correction = self.get_buffer("taper"), self.get_buffer("correction")
        size = 2 ** (2 * self.stretch - 1).bit_length()
        power = torch.fft.rfft(x * taper, size).abs().square()
        r = torch.fft.irfft(power)[..., : self.last + 1] * correction
        r = r[..., self.first :] / (r[..., :1] + 1e-3)  # [B, 4 T, lags]
        return r.reshape(len(wav), -1, CORRELATIONS, r.shape[-1])

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        mel, pitch = self.layer(latent).split(self.sizes, -1)
        return mel, pitch.unflatten(-1, (CORRELATIONS, -1))

    def loss(self, latent: Tensor, wav: Tensor) -> dict[str, Tensor]:
        """latent [B, T, D] of wav [B, 1, T · frame] -> what of each is not told (scalars): share of
        the envelope's variance, and of the power of voiced correlations."""
        with torch.no_grad():
            mel, pitch = self.envelope(wav), self.correlation(wav)
            voiced = (pitch.amax(-1, keepdim=True) > VOICED).float()
        told_mel, told_pitch = (x.float() for x in self(latent))
        missed = ((told_pitch - pitch).square() * voiced).sum()
        return {
            "envelope": (told_mel - mel).square().mean() / mel.var().clamp_min(1.0),
            "pitch": missed / ((pitch.square() * voiced).sum() + 1e-6),
        }

    @torch.no_grad()
    def directions(self, wav: Tensor, envelope: float, pitch: float) -> Tensor:
        """The rows of the layer [712, D] in units of what their errors cost, by the weights of both
        losses; wav [B, 1, S]: sound to tell the units from."""
        told = [envelope / self.envelope(wav).var(), pitch / self.correlation(wav).square().mean()]
        sizes = torch.tensor(self.sizes)
        costs = torch.stack([c.cpu() for c in told]) / sizes
        return self.layer.weight.float() * costs.sqrt().repeat_interleave(sizes)[:, None].to(wav)


@torch.no_grad()
def aim(quantizer: SplitVq, latents: Tensor, semantic: Tensor, acoustic: Tensor) -> None:
    """Set the projections of both branches, before codebooks are fitted.

    latents [N, D]; semantic, acoustic [M, D]: directions (rows, in units of cost) that each branch
    is to keep. A branch quantises the principal components of what its directions read, with a
    distance that is their cost. Out of it comes the latent that is likeliest: the acoustic branch
    gives all that its components tell, the semantic one what of the rest its own tell.
    """
    moments = second_moments(latents)
    rest = torch.eye(len(moments)).to(moments)  # what of a latent no branch has given yet
    for branch, rows in ((quantizer.acoustic, acoustic), (quantizer.semantic, semantic)):
        seen = components(rows.double(), moments, branch.input_proj.out_channels)  # [d, D]
        given = rest @ likeliest(seen, moments)  # [D, d]
        branch.input_proj.weight.copy_(seen[..., None])
        branch.output_proj.weight.copy_(given[..., None])
        rest = rest - given @ seen


def second_moments(latents: Tensor) -> Tensor:
    """latents [N, D] -> float64 [D, D], a little more on the diagonal."""
    x = latents.double()
    moments = x.T @ x / len(x)
    return moments + RIDGE * moments.trace() / len(moments) * torch.eye(len(moments)).to(moments)


def likeliest(seen: Tensor, moments: Tensor) -> Tensor:
    """From seen [d, D] @ latent back to the likeliest latent: [D, d]."""
    return moments @ seen.T @ torch.linalg.pinv(seen @ moments @ seen.T)


def components(rows: Tensor, moments: Tensor, count: int) -> Tensor:
    """Principal components of rows @ latent, as maps of the latent: [count, D].

    The squared length of what they give is that of rows @ latent, but for what they leave out.
    """
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # rowsᵀ rows = rootᵀ root
    root = values.clamp_min(0).sqrt()[:, None] * vectors.T  # [D, D]
    _, axes = torch.linalg.eigh(root @ moments @ root.T)
    return axes[:, -count:].T.flip(0) @ root
