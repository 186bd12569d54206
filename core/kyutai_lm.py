"""The config.json of a published checkpoint <-> ModelConfig, LmConfig.

Keys are upstream's. Five are ours: `tasks` (name -> lag in seconds, for models that do several),
`task_gen_config` (name -> what differs from `lm_gen_config`; `beam_size`, `lm_weight`,
`token_bonus` and `shifts` of a search, `takes` of a text, too), `low_rank_embeddings` (of the
temporal transformer), `residual_dim` (`LmConfig.residual`) and `ngram_name` (the file of
core/ngram.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moshi_cli.core.config import (
    ConditionConfig,
    DepthConfig,
    FuserConfig,
    LmConfig,
    MimiConfig,
    ModelConfig,
    Sampling,
    TransformerConfig,
    need,
    refuse_unknown,
)
from moshi_cli.core.errors import ModelError

_NORMS = {"rms_norm_f32": "rms", "layer_norm": "layer"}
_ROPES = {"rope": "interleaved", "rope_concat": "half", "none": "none"}
_GATES = {"silu": True, "none": False}
_LM_KEYS = {
    "dim", "num_heads", "num_layers", "hidden_scale", "n_q", "dep_q", "card", "text_card",
    "text_card_out", "delays", "existing_text_padding_id", "existing_text_end_padding_id",
    "context", "causal", "norm", "positional_embedding", "max_period", "gating", "layer_scale",
    "kv_repeat", "norm_emb", "bias_proj", "cross_attention", "demux_second_stream",
    "demux_second_text_stream", "extra_heads_num_heads", "extra_heads_dim", "quantize",
    "extra_heads", "low_rank_embeddings", "residual_dim", "conditioners", "fuser",
}  # fmt: skip
_DEPTH_KEYS = {
    "depformer_" + key
    for key in (
        "dim", "num_heads", "num_layers", "dim_feedforward", "multi_linear", "weights_per_step",
        "weights_per_step_schedule", "low_rank_embeddings", "pos_emb", "norm", "gating",
        "layer_scale", "kv_repeat", "context", "max_period", "causal",
    )
}  # fmt: skip
_MODEL_KEYS = {
    "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type",
    "lm_gen_config", "tts_config", "stt_config", "model_id", "lora", "lora_rank", "lora_scaling",
    "tasks", "task_gen_config", "ngram_name",
}  # fmt: skip
_SAMPLING_KEYS = {  # of lm_gen_config; upstream has two spellings for the text temperature
    "temp": "temp", "top_k": "top_k", "temp_text": "text_temp", "text_temp": "text_temp",
    "top_k_text": "text_top_k", "cfg_coef": "guidance", "beam_size": "beam",
    "lm_weight": "lm_weight", "token_bonus": "token_bonus", "shifts": "shifts", "takes": "takes",
}  # fmt: skip


def pick(table: Mapping[str, Any], data: Mapping[str, Any], key: str, default: str, at: str) -> Any:
    """Our word for one of upstream's, or a ModelError listing what is supported."""
    value = data.get(key) or default
    if value not in table:
        known = ", ".join(map(repr, table))
        raise ModelError(f"{at}: {key} = {value!r} is not supported", hint=f"supported: {known}")
    return table[value]


def read_depth(data: Mapping[str, Any], where: str) -> DepthConfig | None:
    """The depth transformer, None without generated codebooks.

    What has no key of its own is inherited from the temporal transformer.
    """
    get = data.get
    steps = need(data, "dep_q", where)
    if not steps:
        return None
    if get("depformer_pos_emb", "sin") != "none" or get("depformer_layer_scale") is not None:
        raise ModelError(f"{where}: depth positions and layer scale are not supported")
    dim = need(data, "depformer_dim", where)
    per_step = get("depformer_weights_per_step", False)
    own = tuple(get("depformer_weights_per_step_schedule") or range(steps))
    norm_out = get("depformer_norm")
    return DepthConfig(
        dim=dim,
        heads=get("depformer_num_heads") or need(data, "num_heads", where),
        layers=get("depformer_num_layers") or need(data, "num_layers", where),
        ff=get("depformer_dim_feedforward") or int(get("hidden_scale", 4) * dim),
        schedule=own if per_step else (0,) * steps,
        inputs=own if get("depformer_multi_linear", False) else (0,) * steps,
        low_rank=get("depformer_low_rank_embeddings"),
        kv_repeat=get("depformer_kv_repeat") or get("kv_repeat", 1),
        norm=pick(_NORMS, data, "norm", "layer_norm", where),
        gated=pick(_GATES, data, "depformer_gating" if "depformer_gating" in data else "gating",
                   "none", where),
        norm_out=pick(_NORMS, data, "depformer_norm", "", where) if norm_out else None,
        numbered=per_step,
    )  # fmt: skip


def read_conditions(data: Mapping[str, Any], where: str) -> tuple[ConditionConfig, ...]:
    """The `conditioners` of a config."""
    found = []
    for name, entry in (data.get("conditioners") or {}).items():
        kind, at = need(entry, "type", where), f"{where}: conditioner {name!r}"
        if kind not in ("lut", "tensor"):
            raise ModelError(f"{at}: type {kind!r} is not supported")
        body = need(entry, kind, at)
        refuse_unknown(entry, {"type", kind}, at)
        refuse_unknown(body, {"n_bins", "dim", "tokenizer", "possible_values"}, at)
        if body.get("tokenizer", "noop") != "noop":
            raise ModelError(f"{at}: tokenizer {body['tokenizer']!r} is not supported")
        values = tuple(body.get("possible_values") or ())
        bins = need(body, "n_bins", at) if kind == "lut" else 0
        found.append(ConditionConfig(name, kind, need(body, "dim", at), bins, values))
    return tuple(found)


def read_fuser(data: Mapping[str, Any], where: str) -> FuserConfig | None:
    """The `fuser` of a config."""
    fuser = data.get("fuser")
    if not fuser:
        return None
    known = {"sum", "cross", "prepend", "cross_attention_pos_emb", "cross_attention_pos_emb_scale"}
    refuse_unknown(fuser, known, f"{where}: fuser")
    if fuser.get("prepend"):
        raise ModelError(f"{where}: prepended conditions are not supported")
    return FuserConfig(
        sum=tuple(fuser.get("sum") or ()),
        cross=tuple(fuser.get("cross") or ()),
        cross_positions=bool(fuser.get("cross_attention_pos_emb", False)),
        cross_scale=float(fuser.get("cross_attention_pos_emb_scale", 1.0)),
    )


def read_lm(data: Mapping[str, Any], where: str = "config.json") -> LmConfig:
    """The language model of a published config.json."""
    get = data.get
    for key, value in {"causal": True, "norm_emb": False, "bias_proj": False}.items():
        if get(key, value) != value:
            raise ModelError(f"{where}: {key} = {get(key)!r} is not supported")
    dim, vocab = need(data, "dim", where), need(data, "text_card", where)
    heads = get("extra_heads") or {}  # another spelling
    return LmConfig(
        temporal=TransformerConfig(
            dim=dim,
            heads=need(data, "num_heads", where),
            layers=need(data, "num_layers", where),
            ff=int(get("hidden_scale", 4) * dim),
            context=need(data, "context", where),
            max_period=float(get("max_period", 10_000)),
            norm=pick(_NORMS, data, "norm", "layer_norm", where),
            gated=pick(_GATES, data, "gating", "none", where),
            rope=pick(_ROPES, data, "positional_embedding", "sin", where),
            layer_scale=get("layer_scale"),
            kv_repeat=get("kv_repeat", 1),
            cross_attention=get("cross_attention", False),
        ),
        depth=read_depth(data, where),
        n_q=need(data, "n_q", where),
        dep_q=need(data, "dep_q", where),
        delays=tuple(need(data, "delays", where)),
        text_vocab=vocab,
        text_classes=get("text_card_out") or vocab,
        codebook_size=need(data, "card", where),
        text_pad=get("existing_text_padding_id", 3),
        text_epad=get("existing_text_end_padding_id", 0),
        low_rank=get("low_rank_embeddings"),
        residual=get("residual_dim") or 0,
        demux=bool(get("demux_second_stream") or get("demux_second_text_stream")),
        extra_heads=get("extra_heads_num_heads", heads.get("num_heads", 0)),
        extra_classes=get("extra_heads_dim", heads.get("dim", 6)),
        conditions=read_conditions(data, where),
        fuser=read_fuser(data, where),
        hears_lag=get("model_type") == "stt",
    )


def read_sampling(given: Mapping[str, Any] | None, usual: Sampling) -> Sampling:
    """What a file says about sampling, over what is usual; other keys are upstream's business."""
    known = {_SAMPLING_KEYS[k]: v for k, v in (given or {}).items() if k in _SAMPLING_KEYS}
    return replace(usual, **known)


def write_sampling(s: Sampling) -> dict[str, float]:
    """The same for a file."""
    return {
        "temp": s.temp, "top_k": s.top_k, "temp_text": s.text_temp, "top_k_text": s.text_top_k,
        "cfg_coef": s.guidance,
        **({} if s.beam == 1 else {
            "beam_size": s.beam, "lm_weight": s.lm_weight, "token_bonus": s.token_bonus,
            **({} if s.shifts == 1 else {"shifts": s.shifts}),
        }),
        **({} if s.takes == 1 else {"takes": s.takes}),
    }  # fmt: skip


def read_model(
    data: Mapping[str, Any], mimi: MimiConfig, where: str = "config.json"
) -> ModelConfig:
    """A published config.json, with the codec's config read before (or the published Mimi)."""
    refuse_unknown(data, _LM_KEYS | _DEPTH_KEYS | _MODEL_KEYS, where)
    kind = data.get("model_type", "moshi")
    stt, tts = data.get("stt_config") or {}, data.get("tts_config") or {}
    if tts.get("multistream"):
        raise ModelError(f"{where}: TTS of two voices at once is not supported")
    lags = data.get("tasks")
    if lags is None:
        lags = {
            "stt": {"asr": stt.get("audio_delay_seconds", 0.0)},
            "tts": {"tts": -tts.get("audio_delay", 0.0)},
        }.get(kind, {"chat": 0.0})
    usual = Sampling(temp=0.6, text_temp=0.6) if kind == "tts" else Sampling()
    sampling = read_sampling(data.get("lm_gen_config"), usual)
    special = (data.get("task_gen_config") or {}).items()
    voice = data.get("model_id") or {}
    return ModelConfig(
        mimi=mimi,
        lm=read_lm(data, where),
        kind=kind,
        lags={name: float(lag) for name, lag in lags.items()},
        sampling=sampling,
        samplings={
            name: replace(read_sampling(given, sampling), guide_text=False)
            for name, given in special
        },
        silence_s=float(stt.get("audio_silence_prefix_seconds", 0.0)),
        ahead=int(tts.get("second_stream_ahead", 0)),
        voice_id=f"{voice['sig']}@{voice['epoch']}" if {"sig", "epoch"} <= voice.keys() else "",
        lm_file=data.get("moshi_name") or ModelConfig.lm_file,
        mimi_file=data.get("mimi_name") or ModelConfig.mimi_file,
        mimi_config_file=data.get("mimi_config_name"),
        text_file=data.get("tokenizer_name") or ModelConfig.text_file,
        ngram_file=data.get("ngram_name"),
        lora_file=data.get("lora_name"),
        lora_rank=int(data.get("lora_rank", 128)),
        lora_scaling=float(data.get("lora_scaling", 2.0)),
    )


def scale(ff: int, dim: int) -> float:
    """hidden_scale for which int(scale * dim) is ff."""
    ratio = ff / dim
    return ratio if int(ratio * dim) == ff else math.nextafter(ratio, math.inf)


def word(table: Mapping[str, Any], value: Any) -> str:
    """Upstream's word for one of ours."""
    return next(name for name, ours in table.items() if ours == value)


def write_depth(config: DepthConfig, steps: int) -> dict[str, Any]:
    """The keys of the depth transformer."""
    shared_in = max(config.inputs) == 0 and steps > 1
    own = config.schedule if config.numbered else config.inputs
    plain = own == tuple(range(steps)) or not (config.numbered or not shared_in)
    return {
        "depformer_dim": config.dim,
        "depformer_num_heads": config.heads,
        "depformer_num_layers": config.layers,
        "depformer_dim_feedforward": config.ff,
        "depformer_multi_linear": not shared_in,
        "depformer_weights_per_step": config.numbered,
        "depformer_weights_per_step_schedule": None if plain else list(own),
        "depformer_low_rank_embeddings": config.low_rank,
        "depformer_kv_repeat": config.kv_repeat,
        "depformer_pos_emb": "none",
        "depformer_layer_scale": None,
        "depformer_gating": word(_GATES, config.gated),
        "depformer_norm": config.norm_out and word(_NORMS, config.norm_out),
    }


def write_condition(config: ConditionConfig) -> dict[str, Any]:
    """One entry of `conditioners`."""
    body: dict[str, Any] = {"dim": config.dim}
    if config.kind == "lut":
        body |= {"n_bins": config.bins, "tokenizer": "noop"}
        body |= {"possible_values": list(config.values)} if config.values else {}
    return {"type": config.kind, config.kind: body}


def write_model(config: ModelConfig) -> dict[str, Any]:
    """The published layout; reading it back gives the same config, but for the codec's."""
    lm = config.lm
    if lm is None:
        raise ModelError("a codec alone has no config.json of this kind")
    t, s = lm.temporal, config.sampling
    data: dict[str, Any] = {
        "model_type": config.kind,
        "moshi_name": config.lm_file,
        "mimi_name": config.mimi_file,
        "mimi_config_name": config.mimi_config_file,
        "tokenizer_name": config.text_file,
        "dim": t.dim,
        "num_heads": t.heads,
        "num_layers": t.layers,
        "hidden_scale": scale(t.ff, t.dim),
        "context": t.context,
        "max_period": t.max_period,
        "norm": word(_NORMS, t.norm),
        "gating": word(_GATES, t.gated),
        "positional_embedding": word(_ROPES, t.rope),
        "layer_scale": t.layer_scale,
        "kv_repeat": t.kv_repeat,
        "cross_attention": t.cross_attention,
        "causal": True,
        "n_q": lm.n_q,
        "dep_q": lm.dep_q,
        "card": lm.codebook_size,
        "text_card": lm.text_vocab,
        "text_card_out": lm.text_classes,
        "delays": list(lm.delays),
        "existing_text_padding_id": lm.text_pad,
        "existing_text_end_padding_id": lm.text_epad,
        "low_rank_embeddings": lm.low_rank,
        "demux_second_stream": lm.demux,
        "extra_heads_num_heads": lm.extra_heads,
        "extra_heads_dim": lm.extra_classes,
        "conditioners": {c.name: write_condition(c) for c in lm.conditions},
        "fuser": lm.fuser and {
            "sum": list(lm.fuser.sum),
            "cross": list(lm.fuser.cross),
            "cross_attention_pos_emb": lm.fuser.cross_positions,
            "cross_attention_pos_emb_scale": lm.fuser.cross_scale,
        },
        "lm_gen_config": write_sampling(s),
    }  # fmt: skip
    if lm.residual:
        data["residual_dim"] = lm.residual
    if config.ngram_file:
        data["ngram_name"] = config.ngram_file
    if config.samplings:
        data["task_gen_config"] = {k: write_sampling(v) for k, v in config.samplings.items()}
    if lm.depth is not None:
        data |= write_depth(lm.depth, lm.dep_q)
    if config.lora_file:
        data |= {"lora": True, "lora_name": config.lora_file, "lora_rank": config.lora_rank}
        data |= {"lora_scaling": config.lora_scaling}
    if config.voice_id:
        sig, _, epoch = config.voice_id.partition("@")
        data["model_id"] = {"sig": sig, "epoch": int(epoch) if epoch.isdigit() else epoch}
    if config.kind == "stt":
        data["stt_config"] = {
            "audio_delay_seconds": config.lags.get("asr", 0.0),
            "audio_silence_prefix_seconds": config.silence_s,
        }
    elif config.kind == "tts":
        lag = -config.lags.get("tts", 0.0)
        data["tts_config"] = {"audio_delay": lag, "second_stream_ahead": config.ahead}
    elif config.lags != {"chat": 0.0}:
        data["tasks"] = dict(config.lags)
    if config.kind != "stt" and config.silence_s:
        data["stt_config"] = {"audio_silence_prefix_seconds": config.silence_s}
    return data
