"""Configuration as plain data: frozen dataclasses, every field with its unit, unknown keys refused.

`from_kyutai` reads the JSON layout of the published checkpoints, `to_kyutai` writes it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from moshi_cli.core.errors import ModelError


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ModelError naming the first unknown key and the nearest known one."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ModelError(f"{where}: unknown key {key!r}", hint=hint)


def need(data: Mapping[str, Any], key: str, where: str) -> Any:
    """data[key], or a ModelError that names what is missing."""
    if key not in data:
        raise ModelError(f"{where}: missing key {key!r}")
    return data[key]


@dataclass(frozen=True)
class TransformerConfig:
    """One causal stack: Mimi's two, or the temporal transformer."""

    dim: int  # width D
    heads: int
    layers: int
    ff: int  # nominal feed-forward width (gated stacks use about 2/3 of it)
    context: int | None  # keys each step may see, itself included; None: all
    max_period: float = 10_000.0  # RoPE
    norm: str = "rms"  # "rms" or "layer"
    gated: bool = True  # SiLU gate, else GELU
    rope: str = "interleaved"  # "interleaved", "half" or "none"
    layer_scale: float | None = None  # initial value
    kv_repeat: int = 1  # query heads per key head
    cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.heads % self.kv_repeat:
            raise ModelError(f"heads {self.heads} do not divide width {self.dim} / kv_repeat")
        if self.rope != "none" and (self.dim // self.heads) % 2:
            raise ModelError(f"head width {self.dim // self.heads} must be even for RoPE")


@dataclass(frozen=True)
class SeanetConfig:
    """Mimi's convolutional encoder and decoder (paper §3.3.1)."""

    dim: int = 512  # latent channels
    filters: int = 64  # channels at 24 kHz; doubled at every stage
    ratios: tuple[int, ...] = (8, 6, 5, 4)  # decoder order: up-sampling per stage
    kernel: int = 7
    last_kernel: int = 3
    residual_kernel: int = 3
    residual_layers: int = 1  # residual blocks per stage
    dilation_base: int = 2
    compress: int = 2  # channel reduction inside a residual block

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return prod(self.ratios)


@dataclass(frozen=True)
class QuantizerConfig:
    """Split residual vector quantiser (paper §3.3.2): 1 semantic + (codebooks - 1) acoustic."""

    dim: int = 256  # width inside each branch
    codebooks: int = 32  # Q in the file
    size: int = 2048  # C, entries per codebook
    semantic: int = 1


@dataclass(frozen=True)
class MimiConfig:
    """The codec. Defaults are the published Mimi (96,151,393 parameters)."""

    seanet: SeanetConfig = SeanetConfig()
    transformer: TransformerConfig = TransformerConfig(
        dim=512, heads=8, layers=8, ff=2048, context=250, norm="layer", gated=False,
        layer_scale=0.01,
    )  # fmt: skip
    quantizer: QuantizerConfig = QuantizerConfig()
    sample_rate: int = 24_000  # Hz
    frame_rate: float = 12.5  # Hz

    def __post_init__(self) -> None:
        if (
            self.sample_rate % self.seanet.hop
            or self.stride * self.seanet.hop != self.frame_samples
        ):
            raise ModelError(
                f"ratios {self.seanet.ratios} do not divide a frame of {self.frame_samples} samples"
            )
        if self.transformer.dim != self.seanet.dim:
            raise ModelError("the codec transformers must be as wide as the SEANet latent")

    @property
    def frame_samples(self) -> int:
        """Samples per frame: 1920 at 24 kHz and 12.5 Hz."""
        return round(self.sample_rate / self.frame_rate)

    @property
    def stride(self) -> int:
        """Latents per frame: 2 for Mimi (25 Hz -> 12.5 Hz)."""
        return round(self.sample_rate / self.seanet.hop / self.frame_rate)

    @classmethod
    def from_kyutai(cls, data: Mapping[str, Any], where: str = "mimi config") -> MimiConfig:
        """Read the published JSON: {sample_rate, frame_rate, seanet, quantizer, transformer}."""
        refuse_unknown(data, _MIMI_KEYS, where)
        s, q, t = (need(data, key, where) for key in ("seanet", "quantizer", "transformer"))
        refuse_unknown(s, _SEANET_KEYS, f"{where}: seanet")
        refuse_unknown(q, _QUANTIZER_KEYS, f"{where}: quantizer")
        refuse_unknown(t, _CODEC_TRANSFORMER_KEYS, f"{where}: transformer")
        for key, value in _FIXED_SEANET.items():
            if s.get(key, value) != value:
                raise ModelError(f"{where}: seanet.{key} = {s[key]!r} is not supported")
        return cls(
            seanet=SeanetConfig(
                dim=need(s, "dimension", where),
                filters=need(s, "n_filters", where),
                ratios=tuple(need(s, "ratios", where)),
                kernel=s.get("kernel_size", 7),
                last_kernel=s.get("last_kernel_size", 3),
                residual_kernel=s.get("residual_kernel_size", 3),
                residual_layers=s.get("n_residual_layers", 1),
                dilation_base=s.get("dilation_base", 2),
                compress=s.get("compress", 2),
            ),
            transformer=TransformerConfig(
                dim=need(t, "d_model", where),
                heads=need(t, "num_heads", where),
                layers=need(t, "num_layers", where),
                ff=need(t, "dim_feedforward", where),
                context=need(t, "context", where),
                max_period=float(t.get("max_period", 10_000)),
                norm="layer",
                gated=False,
                layer_scale=t.get("layer_scale", 0.01),
            ),
            quantizer=QuantizerConfig(
                dim=need(q, "dimension", where),
                codebooks=need(q, "n_q", where),
                size=need(q, "bins", where),
                semantic=q.get("n_q_semantic", 1),
            ),
            sample_rate=data.get("sample_rate", 24_000),
            frame_rate=data.get("frame_rate", 12.5),
        )

    def to_kyutai(self) -> dict[str, Any]:
        """The published JSON layout."""
        s, t, q = self.seanet, self.transformer, self.quantizer
        return {
            "sample_rate": self.sample_rate,
            "channels": 1,
            "frame_rate": self.frame_rate,
            "seanet": {
                **_FIXED_SEANET,
                "dimension": s.dim,
                "n_filters": s.filters,
                "n_residual_layers": s.residual_layers,
                "compress": s.compress,
                "dilation_base": s.dilation_base,
                "kernel_size": s.kernel,
                "residual_kernel_size": s.residual_kernel,
                "last_kernel_size": s.last_kernel,
                "ratios": list(s.ratios),
            },
            "quantizer": {
                "dimension": q.dim,
                "n_q": q.codebooks,
                "bins": q.size,
                "input_dimension": s.dim,
                "output_dimension": s.dim,
            },
            "transformer": {
                "d_model": t.dim,
                "num_heads": t.heads,
                "num_layers": t.layers,
                "causal": True,
                "layer_scale": t.layer_scale,
                "context": t.context,
                "conv_layout": True,
                "max_period": t.max_period,
                "gating": "none",
                "norm": "layer_norm",
                "positional_embedding": "rope",
                "dim_feedforward": t.ff,
                "input_dimension": s.dim,
                "output_dimensions": [s.dim],
            },
        }


# What every published SEANet has; other values would need other code.
_FIXED_SEANET: dict[str, Any] = {
    "channels": 1, "causal": True, "activation": "ELU", "disable_norm_outer_blocks": 0,
    "norm": "none", "pad_mode": "constant", "true_skip": True,
}  # fmt: skip
_MIMI_KEYS = {"sample_rate", "channels", "frame_rate", "seanet", "quantizer", "transformer"}
_SEANET_KEYS = {
    *_FIXED_SEANET, "dimension", "n_filters", "ratios", "kernel_size", "last_kernel_size",
    "residual_kernel_size", "n_residual_layers", "dilation_base", "compress",
}  # fmt: skip
_QUANTIZER_KEYS = {
    "dimension", "n_q", "bins", "input_dimension", "output_dimension", "n_q_semantic",
}  # fmt: skip
_CODEC_TRANSFORMER_KEYS = {
    "d_model", "num_heads", "num_layers", "causal", "layer_scale", "context", "conv_layout",
    "max_period", "gating", "norm", "positional_embedding", "dim_feedforward", "input_dimension",
    "output_dimensions",
}  # fmt: skip

# The codec of the built-in model: Mimi's classes, small enough to train on a laptop.
MIMI_NANO = MimiConfig(
    seanet=SeanetConfig(dim=192, filters=16, ratios=(6, 5, 4, 8)),
    transformer=TransformerConfig(
        dim=192, heads=3, layers=4, ff=768, context=250, norm="layer", gated=False,
        layer_scale=0.01,
    ),
    quantizer=QuantizerConfig(dim=64, codebooks=8),
)  # fmt: skip
