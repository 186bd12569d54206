"""The JSON of a published codec <-> MimiConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_cli.core.config import (
    MimiConfig,
    QuantizerConfig,
    SeanetConfig,
    TransformerConfig,
    need,
    refuse_unknown,
)
from moshi_cli.core.errors import ModelError

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
    "beam",
}  # fmt: skip
_CODEC_TRANSFORMER_KEYS = {
    "d_model", "num_heads", "num_layers", "causal", "layer_scale", "context", "conv_layout",
    "max_period", "gating", "norm", "positional_embedding", "dim_feedforward", "input_dimension",
    "output_dimensions",
}  # fmt: skip


def read_mimi(data: Mapping[str, Any], where: str = "mimi config") -> MimiConfig:
    """Read the published JSON: {sample_rate, frame_rate, seanet, quantizer, transformer}."""
    refuse_unknown(data, _MIMI_KEYS, where)
    s, q, t = (need(data, key, where) for key in ("seanet", "quantizer", "transformer"))
    refuse_unknown(s, _SEANET_KEYS, f"{where}: seanet")
    refuse_unknown(q, _QUANTIZER_KEYS, f"{where}: quantizer")
    refuse_unknown(t, _CODEC_TRANSFORMER_KEYS, f"{where}: transformer")
    for key, value in _FIXED_SEANET.items():
        if s.get(key, value) != value:
            raise ModelError(f"{where}: seanet.{key} = {s[key]!r} is not supported")
    return MimiConfig(
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
            beam=q.get("beam", 1),
        ),
        sample_rate=data.get("sample_rate", 24_000),
        frame_rate=data.get("frame_rate", 12.5),
    )


def write_mimi(config: MimiConfig) -> dict[str, Any]:
    """A codec config in the published layout."""
    s, t, q = config.seanet, config.transformer, config.quantizer
    return {
        "sample_rate": config.sample_rate,
        "channels": 1,
        "frame_rate": config.frame_rate,
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
            **({"beam": q.beam} if q.beam > 1 else {}),
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


def read_transformers_mimi(data: Mapping[str, Any], where: str = "config.json") -> MimiConfig:
    """The config of Transformers' port (kyutai/mimi); absent keys have the published values."""
    get = data.get
    known = MimiConfig()
    s, t, q = known.seanet, known.transformer, known.quantizer
    if get("use_causal_conv", True) is not True or get("hidden_act", "gelu") != "gelu":
        raise ModelError(f"{where}: only causal codecs with GELU are supported")
    return MimiConfig(
        seanet=SeanetConfig(
            dim=get("hidden_size", s.dim),
            filters=get("num_filters", s.filters),
            ratios=tuple(get("upsampling_ratios", s.ratios)),
            kernel=get("kernel_size", s.kernel),
            last_kernel=get("last_kernel_size", s.last_kernel),
            residual_kernel=get("residual_kernel_size", s.residual_kernel),
            residual_layers=get("num_residual_layers", s.residual_layers),
            dilation_base=get("dilation_growth_rate", s.dilation_base),
            compress=get("compress", s.compress),
        ),
        transformer=TransformerConfig(
            dim=get("hidden_size", t.dim),
            heads=get("num_attention_heads", t.heads),
            layers=get("num_hidden_layers", t.layers),
            ff=get("intermediate_size", t.ff),
            context=get("sliding_window", t.context),
            max_period=float(get("rope_theta", t.max_period)),
            norm="layer",
            gated=False,
            layer_scale=get("layer_scale_initial_scale", t.layer_scale),
        ),
        quantizer=QuantizerConfig(
            dim=get("codebook_dim", q.dim),
            codebooks=get("num_quantizers", q.codebooks),
            size=get("codebook_size", q.size),
            semantic=get("num_semantic_quantizers", q.semantic),
        ),
        sample_rate=get("sampling_rate", known.sample_rate),
    )
