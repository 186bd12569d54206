"""The same weights under other names: every published spelling gives the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from safetensors.torch import save_file
from torch import Tensor, nn

from moshi_cli.core import names, weights
from moshi_cli.core.config import ConditionConfig, FuserConfig
from moshi_cli.core.errors import MemoryLimitError, ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.tensors import int8_rows
from moshi_cli.core.weights import load_lm, load_mimi

RICH = replace(  # every kind of tensor that a language model can have
    TINY_LM,
    temporal=replace(TINY_LM.temporal, cross_attention=True),
    depth=replace(TINY_LM.depth, low_rank=5, norm_out="layer"),
    demux=True, low_rank=4, extra_heads=2,
    conditions=(
        ConditionConfig("mood", "lut", 4, 3, ("a", "b")), ConditionConfig("who", "tensor", 6),
    ),
    fuser=FuserConfig(sum=("mood",), cross=("who",)),
)  # fmt: skip


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return weights.published(model, "fp32")


def equal(one: nn.Module, two: nn.Module, **tolerance: float) -> None:
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], msg=name, **({"atol": 0, "rtol": 0} | tolerance)
        )


@pytest.fixture
def rich() -> MoshiLm:
    lm = MoshiLm(RICH).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(torch.randn_like(p))
    return lm


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention by weight set, as re-saved files have it."""
    out = {}
    for name, x in tensors.items():
        sets = 3 if name.startswith("depformer.") else 1
        base, _, kind = name.partition("attn.") if "self_attn" in name else (name, "", "")
        if name.endswith(("attention.in_proj_weight", "attention.out_proj.weight")):
            base, kind = name.split("cross_attention.")[0] + "cross_", name.split("attention.")[1]
            base += "attention."
        elif kind in ("in_proj_weight", "out_proj.weight"):
            base += "attn."
        else:
            out[name] = x
            continue
        for w, part in enumerate(x.chunk(sets)):
            out[f"{base}{kind.split('_')[0]}_projs.{w}.weight"] = part.clone()
    return out


def dotted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("in_proj_weight", "in_proj.weight"): x for name, x in tensors.items()}


@pytest.mark.parametrize("respell", [dict, split, dotted])
def test_spellings_of_attention(rich: MoshiLm, tmp_path: Path, respell: Callable[..., Any]) -> None:
    tensors = respell(tensors_of(rich))
    save_file(tensors, tmp_path / "x.safetensors")
    equal(load_lm(tmp_path / "x.safetensors", RICH), rich)
    if respell is split:
        del tensors["depformer.layers.1.self_attn.in_projs.2.weight"]
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(
            ModelError, match=r"missing tensor .*depformer.layers.1.self_attn.in_proj"
        ):
            load_lm(tmp_path / "x.safetensors", RICH)


def test_int8_files(rich: MoshiLm, tmp_path: Path) -> None:
    """Rows of int8 beside their maxima: what the published q8 files have, and ours."""
    tensors: dict[str, Tensor] = {}
    for name, x in split(tensors_of(rich)).items():
        if x.dim() == 2 and "emb" not in name and "condition" not in name:
            tensors[name], tensors[name + "_scb"] = int8_rows(x)
        else:
            tensors[name] = x
    save_file(tensors, tmp_path / "q8.safetensors")
    lm = load_lm(tmp_path / "q8.safetensors", RICH)
    equal(lm, rich, atol=0.03, rtol=0)
    w = rich.text_linear.weight.detach()
    torch.testing.assert_close(lm.text_linear.weight, w, atol=float(w.abs().max()) / 250, rtol=0)
    tensors["linears.2.weight_scb"] = tensors["linears.2.weight_scb"][:-1]
    save_file(tensors, tmp_path / "q8.safetensors")
    with pytest.raises(ModelError, match=r"'linears.2.weight' is int8 without"):
        load_lm(tmp_path / "q8.safetensors", RICH)


def test_heads_the_config_does_not_mention(rich: MoshiLm, tmp_path: Path) -> None:
    save_file(tensors_of(rich), tmp_path / "x.safetensors")
    lm = load_lm(tmp_path / "x.safetensors", replace(RICH, extra_heads=0))
    assert lm.config.extra_heads == 2
    equal(lm, rich)


def test_end_of_text_sounds_like_a_pause_in_hibiki(rich: MoshiLm, tmp_path: Path) -> None:
    save_file(tensors_of(rich), tmp_path / "x.safetensors")
    lm = load_lm(tmp_path / "x.safetensors", RICH, kind="hibiki")
    assert torch.equal(lm.text_emb.table[2], rich.text_emb.table[3])
    assert lm.depth is not None and rich.depth is not None
    assert torch.equal(lm.depth.text_emb.table, rich.depth.text_emb.table)


def test_conditioners_stay_float32(rich: MoshiLm, tmp_path: Path) -> None:
    save_file(tensors_of(rich), tmp_path / "x.safetensors")
    lm = load_lm(tmp_path / "x.safetensors", RICH, dtype=torch.bfloat16)
    kinds = {name.split(".")[0]: p.dtype for name, p in lm.named_parameters()}
    assert kinds.pop("conditioning") is torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


def test_lora_is_merged(rich: MoshiLm, tmp_path: Path) -> None:
    save_file(tensors_of(rich), tmp_path / "x.safetensors")
    shapes = {
        "text_linear": (288, 16),
        "transformer.layers.0.self_attn.in_projs.0": (48, 16),
        "transformer.layers.1.gating.linear_in": (64, 16),
        "depformer.layers.1.self_attn.out_projs.2": (16, 16),
        "depformer.layers.0.gating.1.linear_out": (16, 32),
        "linears.3": (16, 16),
    }
    adapter = {}
    for module, (rows, columns) in shapes.items():
        adapter[f"{module}.lora_A.weight"] = torch.randn(2, columns)
        adapter[f"{module}.lora_B.weight"] = torch.randn(rows, 2)
    adapter["emb.3.weight"] = torch.randn(17, 4)  # trained whole
    save_file(adapter, tmp_path / "lora.safetensors")

    def merged(**more: Any) -> dict[str, Tensor]:
        lora = tmp_path / "lora.safetensors"
        return split(tensors_of(load_lm(tmp_path / "x.safetensors", RICH, lora=lora, **more)))

    want = split(tensors_of(rich))
    for module in shapes:
        a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
        want[f"{module}.weight"] = want[f"{module}.weight"] + 0.5 * (b @ a)
    want["emb.3.weight"] = adapter["emb.3.weight"]
    got = merged(lora_scaling=0.5)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)

    broken = [
        ({**adapter, "nonsense.lora_A.weight": torch.ones(1, 1)}, "unknown tensor 'nonsense"),
        ({**adapter, "linears.3.lora_B.weight": torch.ones(16, 3)}, r"'linears.3.lora_B.weight'"),
        ({k: v for k, v in adapter.items() if "linears.3.lora_B" not in k}, "no lora_B"),
    ]
    for tensors, reason in broken:
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(ModelError, match=reason):
            merged()


def transformers_layout(mimi: Mimi) -> dict[str, Tensor]:
    rules = names.expand(names.MIMI_TRANSFORMERS, mimi, mimi.config.transformer.heads)
    state = mimi.state_dict()
    return {name: place.read(state).contiguous() for name, place in rules.items()}


def test_codec_layouts(tiny_mimi: Mimi, tmp_path: Path) -> None:
    """Published, legacy codebook names, and Transformers' names with turned rotary rows."""
    published = tensors_of(tiny_mimi)
    legacy = {
        name.replace("_initialized", "inited")
        .replace("cluster_usage", "cluster_size")
        .replace("embedding_sum", "embed_avg"): x
        for name, x in published.items()
    }
    ported = transformers_layout(tiny_mimi)
    assert "encoder.layers.0.conv.weight" in ported and len(ported) == len(published) + 8
    old, new = (f"encoder_transformer.{x}layers.0.self_attn." for x in ("transformer.", ""))
    q = published[old + "in_proj_weight"][:16].view(2, 4, 2, 16)  # [head, pair, 2, in]
    assert torch.equal(ported[new + "q_proj.weight"].view(2, 2, 4, 16), q.transpose(1, 2))
    assert torch.equal(ported[new + "v_proj.weight"], published[old + "in_proj_weight"][32:])
    wav = torch.rand(1, 1, 1920 * 3) - 0.5
    for tensors in (published, legacy, ported):
        save_file(tensors, tmp_path / "mimi.safetensors")
        mimi = load_mimi(tmp_path / "mimi.safetensors", TINY_MIMI)
        equal(mimi, tiny_mimi)
        assert torch.equal(mimi.encode(wav), tiny_mimi.encode(wav))  # centroids are derived


@pytest.mark.parametrize(
    ("tensor", "layout_name"),
    [("depformer.slices.0.linear_in.weight", "MLX"), ("depth_decoder.x", "Transformers Moshi"),
     ("depformer.0.linear_in.weight", "candle")],
)  # fmt: skip
def test_other_layouts_are_recognised(tmp_path: Path, tensor: str, layout_name: str) -> None:
    save_file({tensor: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=layout_name):
        load_lm(tmp_path / "x.safetensors", TINY_LM)


def test_types_that_carry_no_weights(tiny_lm: MoshiLm, tmp_path: Path) -> None:
    tensors = tensors_of(tiny_lm)
    tensors["linears.0.weight"] = tensors["linears.0.weight"].long()
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"'linears.0.weight' has type I64"):
        load_lm(tmp_path / "x.safetensors", TINY_LM)


def test_too_little_memory(
    tiny_lm: MoshiLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tensors_of(tiny_lm), tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="are free"):
        load_lm(tmp_path / "x.safetensors", TINY_LM)
