"""Configs are plain data: read strictly from the published JSON, and written back the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import TINY_LM, TINY_MIMI

from moshi_cli.core.config import (
    ConditionConfig,
    DepthConfig,
    FuserConfig,
    LmConfig,
    MimiConfig,
    ModelConfig,
    TransformerConfig,
)
from moshi_cli.core.errors import ModelError
from moshi_cli.core.presets import PRESETS
from moshi_cli.core.streams import Role, Task

DEPTH = TINY_LM.depth
assert DEPTH is not None
TINY = ModelConfig(mimi=TINY_MIMI, lm=TINY_LM)
VARIANTS = {
    **PRESETS,
    "tiny": TINY,
    "one set": replace(
        TINY, lm=replace(TINY_LM, depth=replace(DEPTH, schedule=(0,) * 4, numbered=False))
    ),
    "shared input": replace(TINY, lm=replace(TINY_LM, depth=replace(DEPTH, inputs=(0,) * 4))),
    "odd width": replace(TINY, lm=replace(TINY_LM, temporal=TransformerConfig(48, 3, 1, 199, 7))),
    "rare": replace(
        TINY,
        lm=replace(
            TINY_LM, low_rank=3, extra_heads=1, text_classes=9,
            temporal=replace(TINY_LM.temporal, rope="half", kv_repeat=2, layer_scale=0.5),
            depth=replace(DEPTH, norm_out="rms", kv_repeat=2, low_rank=2),
            conditions=(ConditionConfig("x", "lut", 3, 5),), fuser=FuserConfig(cross=("x",)),
        ),
        lags={"asr": 0.5, "tts": -0.4}, lora_file="lora.safetensors", lora_scaling=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_written_and_read_back(name: str) -> None:
    config = VARIANTS[name]
    data = json.loads(json.dumps(config.to_kyutai()))
    assert ModelConfig.from_kyutai(data, config.mimi) == config
    codec = json.loads(json.dumps(config.mimi.to_kyutai()))
    assert MimiConfig.from_kyutai(codec) == config.mimi


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heds": 2}, "unknown key 'num_heds'"),
        ({"dim": None}, "missing key 'dim'"),
        ({"delays": [0, 0]}, "2 delays for 9 streams"),
        ({"delays": [0] * 8 + [-1]}, "negative"),
        ({"num_heads": 3}, "do not divide"),
        ({"norm": "batch_norm"}, "norm = 'batch_norm' is not supported"),
        ({"positional_embedding": "sin"}, "'sin' is not supported"),
        ({"depformer_pos_emb": "sin"}, "depth positions"),
        ({"depformer_weights_per_step_schedule": [0, 1, 3, 3]}, "must use every set"),
        ({"depformer_weights_per_step_schedule": [0, 1]}, "not for 4 steps"),
        ({"dep_q": 9}, "cannot make 9 of 8"),
        ({"bias_proj": True}, "bias_proj = True is not supported"),
        ({"fuser": {"sum": ["mood"]}}, "uses 'mood', which no conditioner makes"),
        ({"fuser": {"prepend": ["mood"]}}, "prepended"),
        ({"conditioners": {"a": {"type": "t5", "t5": {}}}}, "type 't5' is not supported"),
        ({"conditioners": {"a": {"type": "lut", "lut": {"dim": 3}}}}, "missing key 'n_bins'"),
        ({"tts_config": {"multistream": True}}, "two voices"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], reason: str) -> None:
    data = {**TINY.to_kyutai(), **changes}
    data = {key: value for key, value in data.items() if value is not None or key not in changes}
    with pytest.raises(ModelError, match=reason):
        ModelConfig.from_kyutai(data, TINY_MIMI)


def test_unknown_keys_have_a_hint() -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_kyutai({**TINY.to_kyutai(), "num_heds": 2})
    assert caught.value.hint == "did you mean 'num_heads'?"
    with pytest.raises(ModelError, match="unknown key 'ration'"):
        MimiConfig.from_kyutai({**TINY_MIMI.to_kyutai(), "ration": 1})


def test_codecs_of_another_kind_are_refused() -> None:
    data = TINY_MIMI.to_kyutai()
    data["seanet"]["pad_mode"] = "reflect"
    with pytest.raises(ModelError, match=r"pad_mode = 'reflect'"):
        MimiConfig.from_kyutai(data)


def test_shares_of_the_streams() -> None:
    assert (TINY_LM.streams, TINY_LM.voice_q, TINY_LM.partner_q) == (9, 4, 4)
    writer: LmConfig = replace(TINY_LM, dep_q=0, depth=None)
    assert (writer.voice_q, writer.partner_q) == (8, 0)
    assert TINY_LM.start_tokens == (288, *[16] * 8)
    books = {name: config.codebooks for name, config in PRESETS.items()}
    assert books["moshi-7b"] == books["hibiki-1b"] == books["moshi-nano"] == 8
    assert books["hibiki-2b"] == books["tts-0.75b"] == 16
    assert books["stt-1b"] == books["tts-1.6b"] == 32


def test_a_checkpoint_says_what_it_can_do() -> None:
    asr = Task("asr", Role.SAMPLED, Role.GIVEN)
    assert PRESETS["stt-2.6b"].fit(asr).lag_s == 2.5
    with pytest.raises(ModelError, match="cannot do 'asr'") as caught:
        PRESETS["moshi-7b"].fit(asr)
    assert caught.value.hint == "it can do: chat"


def test_depth_sets_must_be_whole() -> None:
    with pytest.raises(ModelError, match="one entry per codebook"):
        DepthConfig(8, 2, 1, 16, (0, 1), (0,))
