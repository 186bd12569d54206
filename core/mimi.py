"""Mimi, the causal neural codec (paper §3.3): 24 kHz waveform <-> 12.5 frames of Q codes a second.

encode: wav [B, 1, S] -> SEANet (25 Hz) -> transformer -> learnt downsampling (12.5 Hz) -> split RVQ
-> codes [B, Q, T]. decode goes back. Both take a state for streaming; T frames of 1920 samples per
call, any chunking gives the offline result. Always float32.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.attention import Transformer, TransformerState
from moshi_cli.core.config import MimiConfig
from moshi_cli.core.conv import CausalConv, CausalConvTranspose
from moshi_cli.core.seanet import Residual, SeanetDecoder, SeanetEncoder, SeanetState
from moshi_cli.core.state import Overlap, State, Tail
from moshi_cli.core.vq import SplitVq


@dataclass
class EncoderState(State):
    """Streaming state of `encode`."""

    seanet: SeanetState
    transformer: TransformerState
    downsample: Tail | None


@dataclass
class DecoderState(State):
    """Streaming state of `decode`."""

    upsample: Overlap
    transformer: TransformerState
    seanet: SeanetState


@dataclass
class MimiState(State):
    """Both directions of one codec session."""

    encoder: EncoderState
    decoder: DecoderState


@dataclass
class Bottleneck:
    """What `Mimi.bottleneck` gives to the training losses."""

    latent: Tensor  # [B, D, T]: what `decode_latent` hears, straight-through
    codes: Tensor  # [B, Q, T]
    semantic: Tensor  # [B, T, D]: the semantic branch's part of it
    commitment: Tensor  # scalar


class Mimi(nn.Module):
    """The codec. Q active codebooks are set by `set_num_codebooks`; decode takes any number."""

    printed: str | None = None  # the fingerprint, if packed (see packing.py)

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.config = config
        dim, stride = config.seanet.dim, config.stride
        self.encoder = SeanetEncoder(config.seanet)
        self.encoder_transformer = Transformer(config.transformer)
        self.downsample = CausalConv(dim, dim, 2 * stride, stride, bias=False, replicate=True)
        self.quantizer = SplitVq(dim, config.quantizer)
        self.upsample = CausalConvTranspose(dim, dim, 2 * stride, stride, groups=dim, bias=False)
        self.decoder_transformer = Transformer(config.transformer)
        self.decoder = SeanetDecoder(config.seanet)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, rms: float = 0.1) -> None:
        """Random convolutions that keep the signal's size from end to end, to train from scratch.

        PyTorch's default shrinks it layer by layer, and training then idles for hundreds of steps.
        rms: loudness of the audio; the first layer brings it to 1, the last one back.
        """
        ends = {self.encoder.layers[0]: rms**-2, self.decoder.layers[-1]: rms**2}
        inner = {block.convs[1]: 0.3 for block in self.modules() if isinstance(block, Residual)}
        plain = dict.fromkeys([self.downsample, *self.quantizer.projections()], 1.0)
        for conv in self.modules():
            if not isinstance(conv, nn.Conv1d | nn.ConvTranspose1d) or conv is self.upsample:
                continue
            taps = conv.in_channels * conv.kernel_size[0]
            if isinstance(conv, nn.ConvTranspose1d):
                taps //= conv.stride[0]
            gain = (ends | inner | plain).get(conv, 1.55)  # ELU keeps 1 / 1.55 of the power
            noise = torch.randn(conv.weight.shape, generator=generator)
            conv.weight.copy_(noise * math.sqrt(gain / taps))
            if conv.bias is not None:
                conv.bias.zero_()
        self.upsample.weight.fill_(0.5)  # two taps overlap: holds each latent

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def frame_rate(self) -> float:
        """Hz."""
        return self.config.frame_rate

    @property
    def frame_samples(self) -> int:
        """Samples per frame."""
        return self.config.frame_samples

    @property
    def num_codebooks(self) -> int:
        """Codebooks that `encode` gives."""
        return self.quantizer.active

    def set_num_codebooks(self, count: int) -> None:
        """Use the first `count` codebooks in `encode`; 1 ≤ count ≤ Q of the checkpoint."""
        total = self.config.quantizer.codebooks
        if not 1 <= count <= total:
            raise ValueError(f"the codec has {total} codebooks, {count} asked for")
        self.quantizer.active = count

    @property
    def fingerprint(self) -> str:
        """32 hex digits that tell codecs apart: the semantic codebook, small decoder weights.

        The same for every storage layout and for any number of codebooks in use.
        """
        if self.printed is not None:
            return self.printed
        digest = hashlib.sha256()
        parts = {"semantic": self.quantizer.semantic.books[0].centroids}
        for name in (
            "quantizer.semantic.output_proj",
            "quantizer.acoustic.output_proj",
            "upsample",
        ):
            parts |= {f"{name}.{k}": v for k, v in self.get_submodule(name).named_parameters()}
        parts |= {k: v for k, v in self.decoder.named_parameters() if v.numel() <= 1 << 16}
        for name in sorted(parts):
            digest.update(name.encode())
            digest.update(parts[name].detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:32]

    def init_state(
        self,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        exact_window: bool = True,
    ) -> MimiState:
        """Fresh streaming state. exact_window=False copies upstream's streaming beyond 10 s, where
        the first of a frame's two steps loses its oldest key (see `Transformer.init_state`)."""

        def stack(transformer: Transformer) -> TransformerState:
            return transformer.init_state(
                slots, dtype=dtype, device=device, chunk=self.config.stride,
                exact_window=exact_window,
            )  # fmt: skip

        encoder = EncoderState(
            self.encoder.init_state(slots, device=device),
            stack(self.encoder_transformer),
            self.downsample.init_state(slots, device=device),
        )
        decoder = DecoderState(
            self.upsample.init_state(slots, device=device),
            stack(self.decoder_transformer),
            self.decoder.init_state(slots, device=device),
        )
        return MimiState(encoder, decoder)

    def encode_latent(
        self, wav: Tensor, state: EncoderState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """wav [B, 1, S] -> unquantised latent [B, D, T].

        Offline, S is padded with zeros to whole frames; streaming needs S = T · 1920, T ≥ 1.
        """
        if state is None:
            wav = F.pad(wav, (0, -wav.shape[-1] % self.frame_samples))
        assert wav.shape[-1] and wav.shape[-1] % self.frame_samples == 0, wav.shape
        s = state
        x = self.encoder(wav, None if s is None else s.seanet, active)  # [B, D, 2T]
        x = self.encoder_transformer(
            x.transpose(1, 2), None if s is None else s.transformer, active
        ).transpose(1, 2)
        return self.downsample(x, None if s is None else s.downsample, active)  # [B, D, T]

    def decode_latent(
        self, latent: Tensor, state: DecoderState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """latent [B, D, T] -> wav [B, 1, T · 1920]."""
        s = state
        x = self.upsample(latent, None if s is None else s.upsample, active)  # [B, D, 2T]
        x = self.decoder_transformer(
            x.transpose(1, 2), None if s is None else s.transformer, active
        ).transpose(1, 2)
        return self.decoder(x, None if s is None else s.seanet, active)

    def encode(
        self, wav: Tensor, state: EncoderState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """wav float32 [B, 1, S] in [-1, 1] -> codes long[B, Q, T]; see `encode_latent`."""
        return self.quantizer.encode(self.encode_latent(wav, state, active))

    def encode_whole(
        self, wav: Tensor, state: EncoderState | None = None, active: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """wav [B, 1, S] -> codes [B, Q, T] and their residual, what they leave of the latent, as
        the quantiser's branches see it: [B, 2 · dim, T], semantic first."""
        latent = self.encode_latent(wav, state, active)
        codes = self.quantizer.encode(latent)
        return codes, self.quantizer.residual(latent, codes)

    def decode(
        self, codes: Tensor, state: DecoderState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """codes long[B, n, T], 1 ≤ n ≤ Q -> wav [B, 1, T · 1920]. Codes must be < C."""
        return self.decode_latent(self.quantizer.decode(codes), state, active)

    def bottleneck(
        self,
        wav: Tensor,
        *,
        quantize: Tensor | None = None,
        counts: Tensor | None = None,
        decay: float = 0.99,
        min_usage: float = 0.1,
        generator: torch.Generator,
    ) -> Bottleneck:
        """Training pass up to the quantised latent (paper §3.3): wav [B, 1, S]; in training mode
        the codebooks learn on the way, once they have values (`quantizer.fit`).

        quantize bool[B]: False skips quantisation for that item; counts long[B]: how many codebooks
        (1…Q) that item uses (quantiser dropout).
        """
        B, vq = len(wav), self.quantizer
        first, total = self.config.quantizer.semantic, self.config.quantizer.codebooks
        quantize = (
            torch.ones(B, dtype=torch.bool, device=wav.device) if quantize is None else quantize
        )
        counts = torch.full((B,), total, device=wav.device) if counts is None else counts
        latent = self.encode_latent(wav)
        semantic = vq.semantic.train_step(
            latent, quantize, counts.clamp(max=first), decay, min_usage, generator
        )
        acoustic = vq.acoustic.train_step(
            latent, quantize, counts - first, decay, min_usage, generator
        )
        some = (counts > first)[:, None, None] | ~quantize[:, None, None]
        out = semantic.latent + acoustic.latent * some
        return Bottleneck(
            out,
            torch.cat([semantic.codes, acoustic.codes], 1),
            semantic.latent.transpose(1, 2),
            semantic.commitment + acoustic.commitment,
        )
