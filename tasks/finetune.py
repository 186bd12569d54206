"""Fine-tuning a model that exists: what its stage takes from it, and how the result is written.

Chat, recognition and synthesis differ in roles and in one signed lag only; a lag that the stage
does not name is the one that the model was trained with. With adapters (LoRA) the result is a small
file and a config.json that says which model it belongs to, in the layout of published fine-tuning.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moshi_cli.core import lora, weights
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.hub import Source as Place
from moshi_cli.core.streams import DelayPattern
from moshi_cli.core.weights import Model, Store
from moshi_cli.tasks import TASKS
from moshi_cli.tasks.lm_objective import known_lags
from moshi_cli.tasks.randomness import generator_of
from moshi_cli.tasks.stages import LmStage

LAGS = {"asr": 0.64, "tts": -0.64, "chat": 0.0}  # of a task that is new to a model
ADAPTERS = "lora.safetensors"
LEARNT = ("lm.*.lora_A", "lm.*.lora_B")  # with adapters …
TABLES = ("lm.emb", "lm.*.emb", "lm.*.table")  # … and with embeddings


def tasks_of(stage: LmStage) -> list[str]:
    """The tasks that a stage teaches, by its sources and their shares."""
    named = {source.form for source in stage.mix}
    if "takes" in named:
        named |= {name for name, share in stage.tasks.items() if share > 0}
    return [name for name in TASKS if name in named]


def prepare(stage: LmStage, model: Model) -> LmStage:
    """The stage as it is for this model, which gets its adapters here if it is to have some.

    ModelError if the model cannot do one of the tasks.
    """
    lm = model.lm
    if lm is None:
        raise ModelError(f"{model.name}: a codec alone has no language model to train")
    lags = {**LAGS, **model.config.lags, **stage.lag_s}
    for name in tasks_of(stage):
        words = known_lags(lm.config)
        others = stage.other_lags_s.get(name, ())
        for lag_s in (lags[name], *others):
            task = replace(TASKS[name], lag_s=lag_s)
            DelayPattern.of(task, lm.config)
            if (words or lag_s != lags[name]) and str(task.lag_frames) not in words:
                told = f"{model.name}: it cannot be told the lag of {name!r}"
                known = "it knows " + (", ".join(words) or "none but its own")
                raise ModelError(f"{told}, {task.lag_frames} frames", known)
    stage = replace(stage, lag_s=lags)
    if stage.lora is None:
        return stage
    lora.adapt(lm, stage.lora.rank, stage.lora.scaling, generator_of(stage.seed))
    return replace(stage, learn=(*LEARNT, *(TABLES if stage.lora.embeddings else ())))


def result_config(stage: LmStage, config: ModelConfig) -> ModelConfig:
    """What the model is after the stage: it can do what it was taught, at the lags it was taught.

    What it could do before stays only if it is told the lag, which keeps tasks apart.
    """
    taught = {name: stage.lag_s[name] for name in tasks_of(stage)}
    if not taught:
        return config
    told = config.lm is not None and any(c.name == "lag" for c in config.lm.conditions)
    only = {"stt": "asr", "tts": "tts"}.get(config.kind)  # what such a config.json can say
    kind = config.kind if only is None or list(taught) == [only] else "moshi"
    lags = {**config.lags, **taught} if told else taught
    drawn = {name: replace(s, guide_text=False) for name, s in stage.sampling.items()}
    return replace(config, lags=lags, kind=kind, samplings={**config.samplings, **drawn})


def addresses(config: ModelConfig, place: Place) -> ModelConfig:
    """The same with every file named by where it is, so that it is found from anywhere."""

    def of(name: str) -> str:
        if name.startswith(("hf://", "file://")):
            return name
        if place.folder is not None:
            return f"file://{(place.folder / name).resolve()}"
        at = "" if place.revision == "main" else f"@{place.revision}"
        return f"hf://{place.repo}/{name}{at}"

    codec = config.mimi_config_file
    return replace(
        config, lm_file=of(place.only or config.lm_file), mimi_file=of(config.mimi_file),
        text_file=of(config.text_file), mimi_config_file=None if codec is None else of(codec),
        ngram_file=None if config.ngram_file is None else of(config.ngram_file),
    )  # fmt: skip


def write_adapters(model: Model, stage: LmStage, folder: Path, base: str) -> Path:
    """The adapters of a model and a config.json that names the rest of it; `base` as for --model.

    -> the file for --lora-weight; the folder itself serves for --model.
    """
    assert model.lm is not None and stage.lora is not None
    config = replace(
        addresses(result_config(stage, model.config), Place.of(base)),
        lora_file=ADAPTERS, lora_rank=stage.lora.rank, lora_scaling=stage.lora.scaling,
    )  # fmt: skip
    tensors = lora.adapters(model.lm)
    if stage.lora.embeddings:
        tensors |= lora.embeddings(model.lm)
    write_pair(folder, ADAPTERS, tensors, config)
    return folder / ADAPTERS


def write_model(model: Model, stage: LmStage, folder: Path, store: Store = "fp32") -> Path:
    """The whole model, adapters folded in. -> the folder, for --model"""
    assert model.lm is not None
    lora.merge(model.lm)
    whole = replace(model, config=local_names(result_config(stage, model.config)))
    weights.save(whole, folder, lm=store)
    return folder


def local_names(config: ModelConfig) -> ModelConfig:
    """The same with plain file names instead of addresses."""

    def of(name: str) -> str:
        return (Place.of(name).only or name) if "://" in name else name

    codec = config.mimi_config_file
    return replace(
        config, lm_file=of(config.lm_file), mimi_file=of(config.mimi_file),
        text_file=of(config.text_file), mimi_config_file=None if codec is None else of(codec),
        ngram_file=None if config.ngram_file is None else of(config.ngram_file), lora_file=None,
    )  # fmt: skip


def write_pair(folder: Path, name: str, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """A file of tensors and its config.json, the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.tmp.{os.getpid()}"
    save_file(tensors, str(part))
    part.chmod(0o644)
    part.replace(folder / name)
    text = json.dumps(config.to_kyutai(), indent=1) + "\n"
    part = folder / f"config.json.tmp.{os.getpid()}"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / "config.json")
