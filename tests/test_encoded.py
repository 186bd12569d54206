"""moshi-finetune from its own file: a manifest is encoded, adapters learn, the result loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI

from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import InputError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, load, save
from moshi_cli.tasks import assembly as assembling
from moshi_cli.tasks.assembly import assemble, export
from moshi_cli.tasks.encoded import cache_of
from moshi_cli.tasks.recipes import load as load_recipe
from moshi_cli.tasks.train import train


@pytest.fixture
def recipe_file(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text, tmp_path: Path) -> Path:
    """Two stereo talks with alignments, a model, and a configuration of moshi-finetune."""
    config = ModelConfig(TINY_MIMI, TINY_LM, lags={"chat": 0.0}, mimi_file="mimi.safetensors")
    save(Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny"), tmp_path / "base")
    rows = []
    for name in ("a", "b"):
        audio.write(tmp_path / f"{name}.wav", torch.rand(2, 24_000 * 3) - 0.5)
        words = [["hello", [0.2, 0.6], "SPEAKER_MAIN"], ["sky", [1.0, 1.5], "SPEAKER_MAIN"]]
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": words}))
        rows.append(json.dumps({"path": f"{name}.wav", "duration": 3.0}))
    (tmp_path / "talks.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "their.yaml").write_text(
        f"""
data: {{train_data: {tmp_path}/talks.jsonl, shuffle: true}}
moshi_paths: {{hf_repo_id: {tmp_path}/base}}
lora: {{enable: true, rank: 4}}
first_codebook_weight_multiplier: 100
duration_sec: 2
batch_size: 2
max_steps: 3
param_dtype: float32
optim: {{lr: 1e-2}}
run_dir: {tmp_path}/run
"""
    )
    return tmp_path / "their.yaml"


@pytest.mark.parametrize("quick", [True, False])
def test_bf16_is_for_machines_that_have_it(
    quick: bool, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("float32", "bfloat16"))
    monkeypatch.setattr(assembling, "bf16_kernels", lambda device: quick)
    made = assemble(load_recipe(str(recipe_file)), torch.device("cpu"), tmp_path / "nowhere")
    assert made.stage.bf16 is quick


def test_from_their_file_to_adapters(recipe_file: Path, tmp_path: Path) -> None:
    recipe, nowhere = load_recipe(str(recipe_file)), tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"talks.jsonl: a manifest, not encoded yet"):
        cache_of(tmp_path / "talks.jsonl")
    assembly = assemble(recipe, torch.device("cpu"), nowhere)
    assert (tmp_path / "talks.codes" / "index.jsonl").read_text().count("\n") == 2
    done = train(assembly.stage, assembly.objective, recipe.folder, log_every=1)
    made = export(recipe, done.checkpoint, tmp_path / "model", nowhere)
    assert {p.name for p in made.iterdir()} == {"lora.safetensors", "config.json"}
    tuned, base = load(made).lm, load(tmp_path / "base").lm
    assert tuned is not None and base is not None
    assert not torch.equal(tuned.text_linear.weight, base.text_linear.weight)
    assert torch.equal(tuned.emb, base.emb)
    assert assembly.model.lm is not None
    learnt = assembly.model.lm.text_linear
    delta = learnt.scaling * (learnt.lora_B @ learnt.lora_A)  # type: ignore[operator]
    torch.testing.assert_close(tuned.text_linear.weight - base.text_linear.weight, delta)
