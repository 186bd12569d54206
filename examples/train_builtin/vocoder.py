"""A light end for Kokoro, whose generator is nine tenths of its work.

vocoder.py OUT CORPORA --minutes 15 learns, from clips that Kokoro has spoken and what its graph
says before the generator, how the spectra follow. `engines.LightKokoro` then speaks like Kokoro in
a seventh of the time, and as speakers that Kokoro has not: with another pitch, another length of
the vocal tract, another breath. How loud it is means nothing.

Per frame of 300 samples a small network gives two filters: one for pulses at the pitch that Kokoro
has chosen, one for noise (the harmonic-plus-noise model; Engel et al. 2020, DDSP, learn one so).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

RATE, HOP, FFT, BANDS = 24_000, 300, 1200, 96
BINS = FFT // 2 + 1
UNVOICED_HZ = 10.0  # Kokoro's own threshold
TOP_HZ = RATE / 2


def band_shapes() -> Tensor:
    """[BANDS, BINS]: straight lines between bands that are evenly spaced in mel."""
    mel = torch.linspace(0, 2595 * math.log10(1 + TOP_HZ / 700), BANDS)
    centres = 700 * (10 ** (mel / 2595) - 1)
    hertz = torch.linspace(0, TOP_HZ, BINS)
    right = torch.searchsorted(centres, hertz).clamp(1, BANDS - 1)
    share = (hertz - centres[right - 1]) / (centres[right] - centres[right - 1])
    shapes = torch.zeros(BANDS, BINS)
    shapes[right - 1, torch.arange(BINS)] = 1 - share.clamp(0, 1)
    shapes[right, torch.arange(BINS)] = share.clamp(0, 1)
    return shapes


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        y = self.norm(self.mix(x.mT).mT)
        return x + self.down(F.gelu(self.up(y)))


class Vocoder(nn.Module):
    """What Kokoro's decoder says at 80 Hz, [B, 512, T], and its pitch in Hz, [B, T], to sound."""

    def __init__(self, dim: int = 256, blocks: int = 5) -> None:
        super().__init__()
        self.enter = nn.Conv1d(512, dim, 3, padding=1)
        self.style, self.pitch = nn.Linear(128, dim), nn.Linear(2, dim)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(blocks)))
        self.norm, self.leave = nn.LayerNorm(dim), nn.Linear(dim, 2 * BANDS)
        self.register_buffer("shapes", band_shapes(), persistent=False)
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)

    def filters(self, x: Tensor, f0: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of both gains, [B, T, BANDS]."""
        voiced = f0 > UNVOICED_HZ
        pitch = torch.stack([voiced.float(), (f0.clamp_min(50) / 200).log() * voiced], -1)
        y = self.enter(x / 2.6).mT + self.style(style)[:, None] + self.pitch(pitch)
        harmonic, noise = self.leave(self.norm(self.blocks(y))).chunk(2, -1)
        return harmonic - 1, noise - 3

    def gains(self, bands: Tensor, tract: float) -> Tensor:
        """Minimum-phase spectra of logarithms of gains, [B, BINS, T]; `tract` 2: an octave up."""
        logs = bands @ self.shapes  # [B, T, BINS]
        if tract != 1:
            at = (torch.arange(BINS) / tract).clamp(max=BINS - 1)
            low = at.long().clamp(max=BINS - 2)
            logs = torch.lerp(logs[..., low], logs[..., low + 1], at - low)
        cepstrum = torch.fft.irfft(logs, n=FFT)
        cepstrum = torch.cat(
            [cepstrum[..., :1], 2 * cepstrum[..., 1 : FFT // 2], cepstrum[..., FFT // 2 : BINS]], -1
        )
        return torch.fft.rfft(cepstrum, n=FFT).exp().mT

    def forward(
        self, x: Tensor, f0: Tensor, style: Tensor, *, tract: float = 1, breath: float = 0
    ) -> Tensor:
        """Sound, [B, 300 T]; `breath` is what the noise gains in nats while there is a pitch."""
        harmonic, noise = self.filters(x, f0, style)
        noise = noise + breath * (f0 > UNVOICED_HZ)[..., None]
        pulses = pulse_train(f0)
        hiss = torch.randn_like(pulses)
        total = torch.zeros((), dtype=torch.complex64)
        for sound, bands in ((pulses, harmonic), (hiss, noise)):
            spectrum = torch.stft(sound, FFT, HOP, window=self.window, return_complex=True)
            gains = self.gains(bands, tract)
            gains = torch.cat([gains, gains[..., -1:]], -1)  # one frame more than T
            total = total + spectrum * gains
        return torch.istft(total, FFT, HOP, window=self.window, length=f0.shape[1] * HOP)


def pulse_train(f0: Tensor) -> Tensor:
    """[B, T] in Hz to [B, 300 T]: all harmonics below 12 kHz, none where there is no pitch."""
    voiced = (f0 > UNVOICED_HZ).float()
    held = torch.where(f0 > UNVOICED_HZ, f0, torch.full_like(f0, 150.0))
    hertz = F.interpolate(held[:, None], scale_factor=HOP, mode="linear")[:, 0].double()
    phase = 2 * math.pi * (hertz / RATE).cumsum(-1)
    count = (TOP_HZ / hertz).floor()
    half = torch.sin(phase / 2)
    peak = half.abs() < 1e-6  # where the sum of cosines in closed form is 0 / 0
    pulses = torch.sin((count + 0.5) * phase) / (2 * torch.where(peak, 1.0, half)) - 0.5
    pulses = torch.where(peak, count, pulses)
    on = F.interpolate(voiced[:, None], scale_factor=HOP, mode="linear")[:, 0]
    return (pulses / count.sqrt()).float() * on


def log_spectra(sound: Tensor, size: int) -> Tensor:
    window = torch.hann_window(size)
    spectrum = torch.stft(sound, size, size // 4, window=window, return_complex=True)
    return (spectrum.abs() + 2e-3).log()


def distance(said: Tensor, meant: Tensor) -> Tensor:
    """Mean difference of logarithms of magnitudes, three resolutions, nats."""
    parts = [F.l1_loss(log_spectra(said, n), log_spectra(meant, n)) for n in (512, 1024, 2048)]
    return torch.stack(parts).mean()


def evened(sound: Tensor) -> Tensor:
    """At a level of 0.1 (RMS)."""
    return sound * 0.1 / (sound.square().mean(1, keepdim=True) + 1e-7).sqrt()


def examples(corpora: list[Path], clips: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(x, f0, style, samples) of clips that Kokoro spoke; made anew in a tenth of its time."""
    import soundfile
    from engines import LightKokoro

    engine, found = LightKokoro(), []
    lines = [(path, line) for path in corpora for line in (path / "manifest.jsonl").open()]
    rows = [(path, json.loads(line)) for path, line in lines]
    rows = [(path, row) for path, row in rows if row.get("engine") == "kokoro"]
    for path, row in random.Random(1).sample(rows, min(clips, len(rows))):
        x, f0, style, _ = engine.sketch(row["text"], row["voice"], row["speed"])
        samples, rate = soundfile.read(path / row["file"], dtype="float32")
        if rate == RATE and len(samples) == HOP * len(f0):
            found.append((x.half(), f0, style, torch.from_numpy(samples)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the weights, .safetensors")
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--frames", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(1)
    rng = random.Random(1)
    found = [row for row in examples(args.corpora, args.clips) if len(row[1]) > args.frames]
    kept, found = found[:24], found[24:]
    if not found:
        sys.exit(
            f"vocoder.py: fewer than 25 clips of Kokoro's in {', '.join(map(str, args.corpora))}"
        )
    print(f"{len(found)} clips", flush=True)

    def draw(rows: list, pick: random.Random) -> list[Tensor]:
        cut = []
        for x, f0, style, samples in rows:
            at = pick.randrange(len(f0) - args.frames)
            end = at + args.frames
            cut.append((x[:, at:end].float(), f0[at:end], style, samples[HOP * at : HOP * end]))
        return [torch.stack(part) for part in zip(*cut, strict=True)]

    def loss_of(rows: list[Tensor]) -> Tensor:
        x, f0, style, samples = rows
        said = model(x, f0, style)
        # The edges lack what is around them, and each clip's level had been evened out.
        said, samples = said[:, FFT:-FFT], samples[:, FFT:-FFT]
        return distance(evened(said), evened(samples))

    model = Vocoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    begun, step, shown = time.time(), 0, 0.0
    while (part := (time.time() - begun) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 50) * (0.02 + 0.98 * (1 - part))
        loss = loss_of(draw(rng.choices(found, k=args.batch), rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.time() > shown + 30:
            shown = time.time()
            with torch.no_grad():
                held = loss_of(draw(kept, random.Random(2)))
            print(f"step {step} loss {loss.item():.3f} held out {held.item():.3f}", flush=True)
    part = args.out.with_suffix(".part")  # renamed when it is whole
    save_file(model.state_dict(), part)
    part.rename(args.out)


if __name__ == "__main__":
    main()
