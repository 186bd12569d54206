"""What a frame sounds like, read out of its latent: a teacher of the codec's bottleneck.

Reconstruction alone teaches an encoder late, through a decoder that cannot draw yet. Here a small
network tells the spectral envelope, the pitch and the waveform of the fundamental from the
quantised latent, and its errors reach encoder and codebooks at once. Spectra say nothing of phase;
a decoder that is told it need not add up frequencies. It is not part of the codec.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.losses import mel_filters

COLUMNS, BANDS = 8, 40  # log-mel spectra per frame, and their bands
CORRELATIONS = 4  # autocorrelations per frame
LOWEST_HZ, HIGHEST_HZ = 62.5, 400.0  # of the pitch
DECIMATION = 4  # before correlating
FLOOR = 1e-3  # of the spectra: white noise of this rms …
MIDDLE = 0.02  # … and what is told as 0
VOICED = 0.4  # least correlation of a voiced stretch
TONE_HZ, TONE_STEPS = 360.0, 64  # upper edge of the fundamental's band, and its samples per frame
TONE_FLOOR = 3e-3  # rms under which it is not brought to a level of 1


class Readout(nn.Module):
    """Latents [B, T, D] -> log-mel [B, T, 8 · 40], autocorrelation [B, T, 4, lags] and the band of
    the fundamental [B, T, 64]. hidden None: by one linear layer."""

    def __init__(self, width: int, sample_rate: int, frame_samples: int, hidden: int | None = 512):
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
        self.sizes = [COLUMNS * BANDS, CORRELATIONS * lags, TONE_STEPS]
        self.sample_rate, self.tone_hop = sample_rate, frame_samples // TONE_STEPS
        last = nn.Linear(hidden or width, sum(self.sizes))
        inner = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
        self.layers = nn.Sequential(*inner, last)

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

    def tone(self, wav: Tensor) -> Tensor:
        """wav [B, 1, S] -> its part below 360 Hz at 800 Hz, near a level of 1 [B, T, 64]."""
        x = wav[:, 0].float()
        spectrum = torch.fft.rfft(x)
        hz = torch.arange(spectrum.shape[-1], device=x.device) * (self.sample_rate / x.shape[-1])
        low = torch.fft.irfft(spectrum * torch.sigmoid((TONE_HZ - hz) / 15), x.shape[-1])
        low = low[:, :: self.tone_hop]  # [B, 64 T]
        near = F.pad(low.square()[:, None], (TONE_STEPS // 2,) * 2, mode="reflect")
        level = F.avg_pool1d(near, TONE_STEPS + 1, 1)[:, 0].clamp_min(1e-12).sqrt()
        return (low / (level + TONE_FLOOR)).reshape(len(x), -1, TONE_STEPS)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mel, pitch, tone = self.layers(latent).split(self.sizes, -1)
        return mel, pitch.unflatten(-1, (CORRELATIONS, -1)), tone

    def loss(self, latent: Tensor, wav: Tensor) -> dict[str, Tensor]:
        """latent [B, T, D] of wav [B, 1, T · frame] -> what of each is not told (scalars): share of
        the envelope's variance, and of the power of voiced correlations and of the tone."""
        with torch.no_grad():
            mel, pitch, tone = self.envelope(wav), self.correlation(wav), self.tone(wav)
            voiced = (pitch.amax(-1, keepdim=True) > VOICED).float()
        told_mel, told_pitch, told_tone = (x.float() for x in self(latent))
        missed = ((told_pitch - pitch).square() * voiced).sum()
        return {
            "envelope": (told_mel - mel).square().mean() / mel.var().clamp_min(1.0),
            "pitch": missed / ((pitch.square() * voiced).sum() + 1e-6),
            "tone": (told_tone - tone).square().sum() / (tone.square().sum() + 1e-6),
        }
