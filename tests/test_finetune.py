"""Fine-tuning what exists: lags, adapters alone, results that load and are the trained model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from safetensors.torch import load_file
from test_lora import close, run, stir

from moshi_cli.core import lora
from moshi_cli.core.config import ConditionConfig, FuserConfig, ModelConfig, Sampling
from moshi_cli.core.errors import ModelError
from moshi_cli.core.hub import Source as Place
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.presets import MOSHI_7B, TTS_1_6B
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, load, save
from moshi_cli.tasks import finetune
from moshi_cli.tasks.lm_objective import LmObjective
from moshi_cli.tasks.mixture import Mixture
from moshi_cli.tasks.stages import LmStage, Lora, Shape, Source
from moshi_cli.tasks.texts import Texts
from moshi_cli.tasks.train import checkpoints, read_tensors, train

GOLDEN = Path(__file__).parent / "goldens" / "lm_ring"


@pytest.fixture
def base(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text, tmp_path: Path) -> Path:
    """A model in a folder."""
    config = ModelConfig(TINY_MIMI, TINY_LM, lags={"chat": 0.0}, text_file="text.model")
    save(Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny"), tmp_path / "base")
    return tmp_path / "base"


def stage_of(form: str = "chat", **more: object) -> LmStage:
    mix = (Source("x", form=form),)
    stage = LmStage(name="ft", mix=mix, shapes=(Shape(0.8, 2),), lr=1e-2, steps=4, warmup_steps=1)
    return replace(stage, **more)  # type: ignore[arg-type]


def objective(stage: LmStage, model: Model) -> LmObjective:
    """Trained on text, which needs no codes."""
    assert model.lm is not None
    words = Texts([5, 6, 7, 8, 9, 2] * 9, model.lm.config)
    return LmObjective(stage, model.lm, Mixture([Source("")], [words]))


def test_lags_come_from_the_stage_then_the_model(base: Path) -> None:
    model = load(base)
    model.config = replace(model.config, lags={"asr": 0.32, "chat": 0.0})
    stage = finetune.prepare(stage_of("asr", lag_s={"tts": -1.0}), model)
    assert stage.lag_s == {"asr": 0.32, "tts": -1.0, "chat": 0.0}
    assert stage.learn == ("*",)
    taught = finetune.result_config(stage, model.config)
    assert taught.lags == {"asr": 0.32} and taught.kind == "moshi"
    lm = replace(TINY_LM, conditions=(ConditionConfig("lag", "lut", 4, 3),),
                 fuser=FuserConfig(sum=("lag",)))  # fmt: skip
    told = replace(model.config, lm=lm)
    assert finetune.result_config(stage, told).lags == {"asr": 0.32, "chat": 0.0}
    tts = finetune.result_config(finetune.prepare(stage_of("tts"), model), TTS_1_6B)
    assert (tts.kind, tts.lags) == ("tts", {"tts": -0.64})
    asr = finetune.result_config(stage, TTS_1_6B)
    assert (asr.kind, asr.lags) == ("moshi", {"asr": 0.32})
    drawn = replace(stage, sampling={"tts": Sampling(temp=0.4, guidance=2.0)})
    told = finetune.result_config(drawn, model.config)
    again = ModelConfig.from_kyutai(told.to_kyutai(), told.mimi)
    assert again == told and again.sampling_of("chat") == told.sampling
    assert again.sampling_of("tts") == Sampling(temp=0.4, guidance=2.0, guide_text=False)


def test_what_a_model_cannot_learn_is_refused(base: Path, tiny_text: Text) -> None:
    model = load(base)
    config = replace(TINY_LM, dep_q=0, depth=None)
    writes = replace(model, lm=MoshiLm(config))
    with pytest.raises(ModelError, match="does not speak"):
        finetune.prepare(stage_of("tts"), writes)
    with pytest.raises(ModelError, match="codec alone"):
        finetune.prepare(stage_of(), replace(model, lm=None))


@pytest.mark.parametrize("tables", [False, True])
def test_adapters_learn_alone_resume_and_load(base: Path, tmp_path: Path, tables: bool) -> None:
    """4 steps = 2 + resume + 2; the checkpoint holds what learnt; all ways lead to one model."""
    ends = []
    for name, parts in (("once", (4,)), ("twice", (2, 2))):
        for part in parts:
            model = load(base)
            stage = finetune.prepare(stage_of(lora=Lora(4, 2.0, tables)), model)
            learnt = objective(stage, model)
            done = train(stage, learnt, tmp_path / name, resume=True, stop_after=part)
        ends.append(read_tensors(done.checkpoint / "lm.safetensors"))
    assert all(torch.equal(a, ends[1][n]) for n, a in ends[0].items())
    kinds = {n.rpartition(".")[2] for n in ends[0]}
    assert kinds == {"lora_A", "lora_B"} | ({"emb", "table"} if tables else set())
    assert model.lm is not None and checkpoints(tmp_path / "once") == [
        tmp_path / "once/step-00000004"
    ]
    before = load(base).lm
    assert before is not None
    now = dict(model.lm.named_parameters())
    moved = {n for n, p in before.named_parameters() if not torch.equal(now[n], p)}
    assert moved - {"emb"} == ({"text_emb.table"} if tables else set())
    model.lm.eval()
    after = run(model.lm)
    file = finetune.write_adapters(model, stage, tmp_path / "out", str(base))
    for again in (
        load(tmp_path / "out"),
        load(base, lora=str(file), config_file=str(tmp_path / "out" / "config.json")),
        load(finetune.write_model(model, stage, tmp_path / "whole")),
    ):
        assert again.lm is not None
        close(run(again.lm), after)
    assert json.loads((tmp_path / "whole" / "config.json").read_text()).get("lora") is None


def test_adapters_of_a_golden_model_have_the_published_layout(tmp_path: Path) -> None:
    """Names, shapes and config keys as published fine-tuning writes them."""
    config = ModelConfig.from_kyutai(json.loads((GOLDEN / "config.json").read_text()))
    assert config.lm is not None
    lm = MoshiLm(config.lm)
    model = Model(Mimi(TINY_MIMI), lm, None, config, "golden")
    stage = finetune.prepare(stage_of(lora=Lora(8, 2.0)), model)
    stir(lm)
    finetune.write_adapters(model, stage, tmp_path / "out", str(GOLDEN))
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    dim, layers, dep_q = config.lm.temporal.dim, config.lm.temporal.layers, config.lm.dep_q
    linear = [f"transformer.layers.{i}.self_attn.in_projs.0" for i in range(layers)]
    linear += [f"transformer.layers.{i}.self_attn.out_projs.0" for i in range(layers)]
    linear += [f"transformer.layers.{i}.gating.linear_{x}" for i in range(layers)
               for x in ("in", "out")]  # fmt: skip
    linear += ["text_linear", *(f"linears.{k}" for k in range(dep_q))]
    linear += [f"depformer_in.{k}" for k in range(dep_q)]
    assert config.lm.depth is not None
    for i in range(config.lm.depth.layers):
        at = f"depformer.layers.{i}"
        for k in range(dep_q):
            linear += [f"{at}.self_attn.in_projs.{k}", f"{at}.self_attn.out_projs.{k}"]
            linear += [f"{at}.gating.{k}.linear_in", f"{at}.gating.{k}.linear_out"]
    assert set(tensors) == {f"{n}.lora_{x}.weight" for n in linear for x in "AB"}
    assert tensors["transformer.layers.0.self_attn.in_projs.0.lora_B.weight"].shape == (3 * dim, 8)
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (data["lora"], data["lora_rank"], data["lora_scaling"]) == (True, 8, 2.0)
    assert data["moshi_name"] == f"file://{(GOLDEN / 'model.safetensors').resolve()}"


def test_addresses() -> None:
    repo = finetune.addresses(MOSHI_7B, Place.of("moshi-7b"))
    assert repo.lm_file == "hf://kyutai/moshiko-pytorch-bf16/model.safetensors"
    tts = finetune.addresses(TTS_1_6B, Place.of("kyutai/tts-1.6b-en_fr@abc"))
    assert tts.lm_file == "hf://kyutai/tts-1.6b-en_fr/dsm_tts_1e68beda@240.safetensors@abc"
    for config in (repo, tts):
        place = Place.of(config.lm_file)
        assert place.only == finetune.local_names(config).lm_file
    assert Place.of(tts.lm_file).revision == "abc"
    plain = Place.of("hf://kyutai/tts-1.6b-en_fr/dsm_tts_1e68beda@240.safetensors")
    assert (plain.only, plain.revision) == ("dsm_tts_1e68beda@240.safetensors", "main")
    assert finetune.addresses(repo, Place.of("a/b")) == repo


def test_merged_in_bfloat16(base: Path) -> None:
    lm = load(base, dtype="bf16").lm
    assert lm is not None
    lora.adapt(lm, 4, 1.0)
    stir(lm)
    after = run(lm)
    lora.merge(lm)
    close(run(lm), after, atol=0.3)
