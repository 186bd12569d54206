"""Whole models: saved and loaded, named in every way, and refused with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from safetensors.torch import load_file, save_file
from test_spellings import equal, transformers_layout

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, load, revision_of, save
from moshi_cli.tasks.asr import ASR

CONFIG = ModelConfig(
    mimi=TINY_MIMI, lm=TINY_LM, lags={"asr": 0.5, "chat": 0.0}, mimi_file="mimi.safetensors"
)


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    return Model(tiny_mimi, tiny_lm, tiny_text, CONFIG, "tiny")


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    save(model, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_saved_and_loaded(model: Model, folder: Path) -> None:
    again = load(folder)
    assert again.lm is not None and model.lm is not None
    equal(again.lm, model.lm)
    equal(again.mimi, model.mimi)
    assert again.config == replace(CONFIG, mimi_config_file="mimi.json")
    assert again.text is not None and again.text.size == 288
    assert again.mimi.num_codebooks == 4 and again.dtype is torch.float32
    published = load_file(folder / "model.safetensors")
    assert published["transformer.layers.0.self_attn.in_proj_weight"].shape == (48, 16)
    assert published["depformer.layers.0.self_attn.in_proj_weight"].shape == (3 * 48, 16)
    assert not [p for p in folder.iterdir() if ".tmp" in p.name]


@pytest.mark.parametrize("store", ["bf16", "fp16", "int8"])
def test_saved_small(model: Model, tmp_path: Path, store: Any) -> None:
    assert model.lm is not None
    save(model, tmp_path / "big")
    save(model, tmp_path / "small", lm=store, mimi=store)
    again = load(tmp_path / "small")
    assert again.lm is not None
    equal(again.lm, model.lm, atol=0.02, rtol=0.01)
    wav = torch.rand(1, 1, 1920 * 2) - 0.5
    one, two = again.mimi.encode_latent(wav), model.mimi.encode_latent(wav)
    torch.testing.assert_close(one, two, atol=0.1 * float(two.abs().max()), rtol=0)
    centroids = [m.mimi.quantizer.semantic.layers[0].centroids for m in (again, model)]
    torch.testing.assert_close(*centroids, atol=1e-3, rtol=1e-3)
    size = [(tmp_path / x / "model.safetensors").stat().st_size for x in ("small", "big")]
    assert size[0] < {"bf16": 0.65, "fp16": 0.65, "int8": 0.6}[store] * size[1]


def test_ways_to_name_a_model(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a file in it, addresses, a repository in the hub's cache: all without network."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--someone--tiny" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text("abc123")
    for name in (
        snapshot, str(snapshot), f"file://{snapshot}", snapshot / "model.safetensors",
        "someone/tiny", "someone/tiny@abc123", "hf://someone/tiny", "hf://someone/tiny@main",
        "hf://someone/tiny/model.safetensors@abc123",
    ):  # fmt: skip
        got = load(name)
        assert got.lm is not None and got.revision == "abc123", name
    assert load("someone/tiny", revision="abc123").name == "someone/tiny"
    assert load(None, builtin=snapshot).lm is not None
    other = tmp_path / "other.safetensors"
    (snapshot / "model.safetensors").rename(other)
    assert load(snapshot, lm_file=str(other)).lm is not None
    assert load(snapshot, lm_file=f"file://{other}").lm is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "no model at 'nowhere'"),
        ("file:///nowhere/at/all", "no model at"),
        ("a/b/c", "no model at"),
        ("no-one/nothing", "not in the local cache"),
        ("hf://no-one/nothing@v1", "not in the local cache"),
        ("stt-1b", "kyutai/stt-1b-en_fr: not in the local cache"),
    ],
)
def test_models_that_are_not_there(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=reason):
        load(name)


def test_no_built_in_model(tmp_path: Path) -> None:
    for builtin in (None, tmp_path / "none"):
        with pytest.raises(ModelError, match="no model named"):
            load(builtin=builtin)


def test_parts_must_fit(model: Model, folder: Path) -> None:
    def edit(**changes: Any) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **changes}))

    def refused(reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            load(folder)

    edit(card=8)
    refused("codebooks of 16 and 8 entries")
    edit(card=16, text_card=200, text_card_out=200)
    refused("tokenizer has 288 pieces, the model knows 200")
    edit(text_card=288, text_card_out=288, tokenizer_name="none.model")
    refused("no file 'none.model'")
    edit(tokenizer_name="tokenizer_spm_32k_3.model", dim=32)
    refused("has shape")
    edit(dim=16, num_laiers=3)
    refused("unknown key 'num_laiers'")
    whole = json.loads((folder / "config.json").read_text())
    del whole["num_laiers"]
    (folder / "config.json").write_text(json.dumps(whole))
    for changes in (
        {"task_gen_config": [1]}, {"tasks": {"asr": "soon"}}, {"lm_gen_config": {"temp": "hot"}},
        {"dim": "wide"}, {"delays": 3}, {"tts_config": 1},
    ):  # fmt: skip
        before = (folder / "config.json").read_text()
        edit(**changes)
        refused("config.json: a value of a wrong kind: ")
        (folder / "config.json").write_text(before)
    (folder / "config.json").write_text("{")
    refused("cannot read")
    (folder / "config.json").write_text("[1]")
    refused("not a JSON object")
    (folder / "config.json").unlink()
    refused("no file 'tokenizer-e351c8d8-checkpoint125.safetensors'")  # Moshi 7B is assumed
    refused(str(folder))


def test_a_codec_alone(model: Model, tmp_path: Path) -> None:
    """Ours, and Transformers' folder; no task can be done with it."""
    save(Model(model.mimi, None, None, ModelConfig(mimi=TINY_MIMI), "codec"), tmp_path / "ours")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(transformers_layout(model.mimi), theirs / "model.safetensors")
    config = {
        "model_type": "mimi", "hidden_size": 16, "num_filters": 2, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "sliding_window": 8, "codebook_dim": 8,
        "codebook_size": 16, "num_quantizers": 4, "torch_dtype": "float32",
    }  # fmt: skip
    (theirs / "config.json").write_text(json.dumps(config))
    for name in (tmp_path / "ours", theirs, theirs / "model.safetensors"):
        codec = load(name)
        assert codec.lm is None and codec.text is None
        equal(codec.mimi, model.mimi)
        with pytest.raises(ModelError, match="codec alone"):
            codec.fit(ASR)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"device": "cuda:99"}, "not available"),
        ({"dtype": "fp3"}, "no dtype 'fp3'"),
    ],
)
def test_devices_and_types(folder: Path, wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        load(folder, **wrong)


def test_half_precision(folder: Path) -> None:
    got = load(folder, dtype="bf16")
    assert got.dtype is torch.bfloat16 and next(got.mimi.parameters()).dtype is torch.float32
    assert load(folder, device="meta").device.type == "meta"


def test_the_revision_of_files_is_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(300_000))
    second.write_bytes(bytes(300_000))
    before = revision_of(first, second)
    assert before == revision_of(second, first) and before.startswith("local-")
    second.write_bytes(bytes(150_000) + b"1" + bytes(149_999))
    assert revision_of(first, second) not in (before, revision_of(second, first))
    assert revision_of(tmp_path / "snapshots" / "abc" / "model.safetensors") == "abc"
