"""What one step of a stage computes: batch, losses, gradients. The loop is in `train`."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moshi_cli.core.discriminators import Discriminator, DiscriminatorConfig
from moshi_cli.core.errors import MoshiError
from moshi_cli.core.losses import (
    Balancer,
    SpectralLoss,
    adversarial_loss,
    discriminator_loss,
    distillation_loss,
    feature_loss,
)
from moshi_cli.core.mimi import Bottleneck, Mimi
from moshi_cli.core.vq import Codebook, together
from moshi_cli.tasks.data import Batch, Windows
from moshi_cli.tasks.patterns import frozen, learns
from moshi_cli.tasks.readout import Readout, aim
from moshi_cli.tasks.recogniser import Recogniser
from moshi_cli.tasks.spelling import LatentSpeller
from moshi_cli.tasks.stages import CodecStage, Shape
from moshi_cli.tasks.train import step_generator
from moshi_cli.tasks.utterances import Utterances

Part = tuple[Tensor, Tensor, int]  # items, first frames, frames: what is decoded of a batch
MEANT = 0.1  # what the sounds are worth to the acoustic codebooks, beside envelope and pitch
AUDIBLE = ("mel", "stft", "wave", "listener", "adversarial")  # losses of the decoded sound


def pick_shape(shapes: tuple[Shape, ...], generator: torch.Generator) -> Shape:
    """One of the batch shapes, by their shares."""
    shares = torch.tensor([s.share for s in shapes])
    return shapes[int(torch.multinomial(shares, 1, generator=generator))]


def encoder_learns(stage: CodecStage, mimi: Mimi) -> bool:
    """Whether anything before the quantizer does."""
    return any(
        learns(f"mimi.{name}", stage)
        for name, _ in mimi.named_parameters() if name.startswith(("encoder", "downsample"))
    )  # fmt: skip


def refuse_left_behind(stage: CodecStage, mimi: Mimi) -> None:
    """MoshiError if the encoder learns while codebooks, which follow it by averages, are frozen."""
    still = any(
        frozen(f"mimi.{name}", stage)
        for name, module in mimi.named_modules() if isinstance(module, Codebook)
    )  # fmt: skip
    if still and encoder_learns(stage, mimi):
        raise MoshiError(
            f"stage {stage.name}: the encoder would leave its frozen codebooks behind",
            hint='"mimi.quantizer.*_proj*" freezes the projections alone',
        )


class CodecObjective:
    """Mimi against its reconstruction, its critics and the semantic teacher (paper §3.3)."""

    def __init__(
        self,
        stage: CodecStage,
        mimi: Mimi,
        windows: Windows | Utterances,
        critics: DiscriminatorConfig | None = None,
        listener: nn.Module | None = None,
    ):
        self.stage, self.mimi, self.windows = stage, mimi, windows
        self.device = next(mimi.parameters()).device
        self.modules: dict[str, nn.Module] = {"mimi": mimi}
        refuse_left_behind(stage, mimi)
        if stage.critics_from < 1:
            self.modules["critics"] = Discriminator(critics)
        if windows.width is not None and stage.losses.get("distillation"):
            width = mimi.config.seanet.dim
            self.modules["projection"] = nn.Linear(width, windows.width)
            self.teacher = tuple(x.to(self.device) for x in windows.teacher())
        if isinstance(windows, Utterances) and windows.text and stage.losses.get("recognition"):
            width, classes = mimi.config.seanet.dim, windows.text.size
            self.modules["recogniser"] = Recogniser(width, classes, delay=stage.hears_after)
        if isinstance(windows, Utterances) and windows.spelling and stage.losses.get("letters"):
            width, classes = mimi.config.seanet.dim, windows.spelling.classes
            self.modules["speller"] = LatentSpeller(width, classes)
        teachers = self.modules.keys() & {"projection", "recogniser", "speller"}
        if teachers and not encoder_learns(stage, mimi):
            raise MoshiError(
                f"stage {stage.name}: the encoder is frozen; distillation, recognition and letters "
                "teach it",
                hint="set losses.distillation, losses.recognition and losses.letters to 0",
            )
        if any(stage.losses.get(name) for name in ("envelope", "pitch")):
            width = mimi.config.seanet.dim
            self.modules["readout"] = Readout(width, mimi.sample_rate, mimi.frame_samples)
        self.audible = any(stage.losses.get(name) for name in AUDIBLE)
        spectra = {"mel": True, "stft": False}
        self.spectral = {
            name: SpectralLoss(mimi.sample_rate, mel=mel, floor=stage.floor).to(self.device)
            for name, mel in spectra.items() if stage.losses.get(name)
        }  # fmt: skip
        self.listener = listener  # (made, real) wav -> scalar: how differently it hears them
        weights = {k: stage.losses.get(k, 0.0) for k in ("mel", "stft", "wave", "listener")}
        self.balancer = Balancer(weights | {"critics": stage.losses.get("adversarial", 0.0)})

    def tensors(self) -> dict[str, Tensor]:
        norms = self.balancer.norms.items()
        return {f"balancer/{k}": torch.tensor(v, dtype=torch.float64) for k, v in norms}

    def restored(self, tensors: dict[str, Tensor]) -> None:
        self.balancer.norms = {k.split("/")[1]: v.tolist() for k, v in tensors.items()}
        self.mimi.quantizer.refresh()

    def draw(self, generator: torch.Generator) -> Batch:
        """A batch of one of the shapes, where the codec is."""
        shape = pick_shape(self.stage.shapes, generator)
        frames = round(shape.window_s * self.mimi.frame_rate)
        if isinstance(self.windows, Utterances):
            batch = self.windows.draw(frames, shape.batch, generator)
        else:
            batch = self.windows.draw(
                frames, shape.batch, generator, self.stage.gain_db, self.stage.tries
            )
        return batch.to(self.device)

    def backward(self, step: int, progress: float) -> dict[str, float]:
        stage, mimi = self.stage, self.mimi
        g = step_generator(stage.seed, step)
        if progress >= stage.quantize_from and not mimi.quantizer.fitted:
            self.fit(g)
        batch = self.draw(g)
        B, total = len(batch.wav), mimi.config.quantizer.codebooks
        late = progress >= stage.critics_from
        p = stage.quantize_late if late else stage.quantize
        quantize = torch.rand(B, generator=g) < p
        fewer = torch.rand(B, generator=g) < stage.dropout
        counts = torch.randint(1, total + 1, (B,), generator=g)
        counts = torch.where(fewer, counts, total)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=stage.bf16):
            out = self.reduce(batch.wav, quantize.to(self.device), counts.to(self.device), g)
        metrics = {"audio_s": batch.wav.numel() / mimi.sample_rate}
        metrics["commitment"] = out.commitment.item()
        inner = self.teach(batch, out, metrics)
        if not self.audible:
            inner.backward()
            return metrics
        (items, first, frames), real = self.cut(batch, g)
        at = first[:, None] + torch.arange(frames, device=self.device)  # [N, frames]
        latent = out.latent.transpose(1, 2)[items[:, None], at].transpose(1, 2)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=stage.bf16):
            made = mimi.decode_latent(latent).float()
        leaf = made.detach().requires_grad_()
        losses = {name: loss(leaf, real) for name, loss in self.spectral.items()}
        if stage.losses.get("wave"):
            losses["wave"] = (leaf - real).abs().mean() / (real.abs().mean() + 1e-4)
        if self.listener is not None and stage.losses.get("listener"):
            losses["listener"] = self.listener(leaf, real)
        metrics |= {name: loss.item() for name, loss in losses.items()}
        if late:
            critics, seen = self.judge(real, leaf, g)
            metrics |= seen
            if progress >= stage.critics_from + stage.critics_ramp:
                losses["critics"] = critics
        grad = self.balancer.gradient(losses, leaf)
        if inner.requires_grad:
            torch.autograd.backward([made, inner], [grad, None])
        else:  # the codes are fixed
            made.backward(grad)
        return metrics

    def teach(self, batch: Batch, out: Bottleneck, metrics: dict[str, float]) -> Tensor:
        """The losses of the bottleneck itself, weighted; told in `metrics`."""
        weights = self.stage.losses
        inner = weights.get("commitment", 0.0) * out.commitment.float()
        if "projection" in self.modules and batch.features is not None:
            student = self.modules["projection"](out.semantic.float())
            mean, scale = self.teacher
            present = batch.features.abs().amax(-1, keepdim=True) > 0
            distilled = distillation_loss(student, (batch.features - mean) / scale * present)
            inner = inner + weights["distillation"] * distilled
            metrics["distillation"] = distilled.item()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.bf16):
            if "readout" in self.modules:
                readout = cast("Readout", self.modules["readout"])
                for name, missed in readout.loss(out.latent.transpose(1, 2), batch.wav).items():
                    inner = inner + weights.get(name, 0.0) * missed
                    metrics[name] = missed.item()
            if "speller" in self.modules and batch.letters is not None:
                speller = cast("LatentSpeller", self.modules["speller"])
                spelled, right = speller.loss(out.latent.transpose(1, 2), batch.letters)
                inner = inner + weights["letters"] * spelled
                metrics |= {"letters": spelled.item(), "spelled": right.item()}
            if "recogniser" in self.modules and batch.text is not None:
                listener = cast("Recogniser", self.modules["recogniser"])
                assert batch.spans is not None
                heard, right, during = listener.loss(
                    out.semantic, batch.text, batch.spans, weights.get("pad", 0.2)
                )
                inner = inner + weights["recognition"] * heard
                metrics |= {"recognition": heard.item(), "heard": right.item()}
                metrics["during"] = during.item()
        return inner

    def cut(self, batch: Batch, generator: torch.Generator) -> tuple[Part, Tensor]:
        """What of a batch is decoded: items, first frames, frames; and its audio [N, 1, S]."""
        hop, total = self.mimi.frame_samples, batch.wav.shape[-1] // self.mimi.frame_samples
        clean = torch.ones(len(batch.wav)) if batch.clean is None else batch.clean.float().cpu()
        items = clean.nonzero()[:, 0] if clean.any() else torch.zeros(1, dtype=torch.long)
        frames = total
        if self.stage.crop_s is not None:
            frames = min(round(self.stage.crop_s * self.mimi.frame_rate), total)
        first = torch.randint(total - frames + 1, (len(items),), generator=generator)
        items, first = items.to(self.device), first.to(self.device)
        at = first[:, None] * hop + torch.arange(frames * hop, device=self.device)  # [N, S]
        return (items, first, frames), batch.wav[:, 0][items[:, None], at][:, None]

    def reduce(
        self, wav: Tensor, quantize: Tensor, counts: Tensor, generator: torch.Generator
    ) -> Bottleneck:
        """`Mimi.bottleneck`; with a frozen encoder the codes are fixed and only decoding learns. A
        latent that is read out is whole until codebooks are aimed by what is read."""
        mimi = self.mimi
        if "readout" in self.modules and not mimi.quantizer.fitted:
            latent = mimi.encode_latent(wav)  # [B, D, T]
            codes = torch.zeros(len(wav), 0, latent.shape[-1], dtype=torch.long)
            return Bottleneck(latent, codes, latent.transpose(1, 2), latent.new_zeros(()))
        if any(p.requires_grad for p in mimi.encoder.parameters()):
            decay = self.stage.codebook_decay
            return mimi.bottleneck(
                wav, quantize=quantize, counts=counts, decay=decay, generator=generator
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            codes = mimi.encode(wav)
            latent = mimi.quantizer.decode(codes)  # [B, D, T]
        return Bottleneck(latent, codes, latent.new_zeros(0), latent.new_zeros(()))

    @torch.no_grad()
    def fit(self, generator: torch.Generator) -> None:
        """Give the codebooks their first values, of fresh windows; aimed, if latents are read."""
        mimi, weights = self.mimi, self.stage.losses
        count, found = self.stage.fit_frames * mimi.config.quantizer.size, list[Tensor]()
        while sum(map(len, found)) < count:
            wav = self.draw(generator).wav
            found.append(mimi.encode_latent(wav).transpose(1, 2).flatten(0, 1))
        latents = torch.cat(found)  # [N, D]
        if "readout" in self.modules:
            readout = cast("Readout", self.modules["readout"])
            costs = weights.get("envelope", 0.0), weights.get("pitch", 0.0)
            heard = readout.directions(wav, *costs)
            meant = self.meanings(latents)
            if meant is None:
                aim(mimi.quantizer, latents, heard, heard)
            else:  # of which the acoustic codebooks are to keep some, too
                share = MEANT * (latents @ heard.T).var(0).sum()
                aim(mimi.quantizer, latents, meant, torch.cat([heard, meant * share.sqrt()]))
            for projection in mimi.quantizer.projections() if together() else ():
                dist.broadcast(projection.weight, 0)
        mimi.quantizer.fit(latents, generator=generator)

    def meanings(self, latents: Tensor) -> Tensor | None:
        """What the semantic codebook is to keep of latents [N, D]: directions [M, D] that tell what
        the teacher hears and which symbols are spoken, worth 1 each; None without either."""
        rows = []
        if "projection" in self.modules:
            rows.append(cast("nn.Linear", self.modules["projection"]).weight.float())
        if "speller" in self.modules:
            rows.append(cast("LatentSpeller", self.modules["speller"]).directions)
        rows = [r / (latents @ r.T).var(0).sum().sqrt() for r in rows]
        return torch.cat(rows) if rows else None

    def judge(
        self, real: Tensor, leaf: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Critics on a crop: their own gradients are left in them, the generator's loss returned.

        One pass serves both sides, so both learn against the same critics.
        """
        size = min(round(self.stage.critics_window_s * self.mimi.sample_rate), real.shape[-1])
        at = int(torch.randint(real.shape[-1] - size + 1, (), generator=generator))
        pair = torch.cat([real[..., at : at + size], leaf[..., at : at + size]])
        critics = self.modules["critics"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.bf16):
            true, fake = critics(pair).split(len(real))
        hinge = discriminator_loss(true, fake)
        params = [p for p in critics.parameters() if p.requires_grad]
        for p, grad in zip(
            params, torch.autograd.grad(hinge, params, retain_graph=True), strict=True
        ):
            p.grad = grad
        adversarial, feature = adversarial_loss(fake), feature_loss(true, fake)
        metrics = {
            "critics": hinge.item(), "adversarial": adversarial.item(), "feature": feature.item(),
        }  # fmt: skip
        weights = self.stage.losses
        ratio = weights.get("feature", 0.0) / max(weights.get("adversarial", 0.0), 1e-9)
        return adversarial + ratio * feature, metrics
