"""From a recipe to what the loop needs: the model, the data, the objective; and back to a model.

`OBJECTIVES` is the table from the kind of a stage to what it computes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from moshi_cli.core import weights
from moshi_cli.core.config import LmConfig, ModelConfig
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.presets import PRESETS
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks import finetune, parallel
from moshi_cli.tasks.checkpoints import read_tensors
from moshi_cli.tasks.data import Windows
from moshi_cli.tasks.documents import Document, nearest, overlay
from moshi_cli.tasks.encoded import encode_manifest
from moshi_cli.tasks.excerpts import TASKS
from moshi_cli.tasks.lm_objective import LmObjective
from moshi_cli.tasks.machine import bf16_kernels
from moshi_cli.tasks.mixture import Mixture
from moshi_cli.tasks.objectives import CodecObjective
from moshi_cli.tasks.randomness import generator_of
from moshi_cli.tasks.recipes import Recipe, Start
from moshi_cli.tasks.seeding import seed_embeddings, seed_residual
from moshi_cli.tasks.spelling import read_spelling
from moshi_cli.tasks.stages import CodecStage, LmStage, Stage
from moshi_cli.tasks.train import Objective
from moshi_cli.tasks.utterances import Utterances
from moshi_cli.tasks.whisper import WhisperListener

Config = TypeVar("Config")

log = logging.getLogger(__name__)


@dataclass
class Assembly:
    """Everything the loop needs. The recipe's stage is as it is for this model."""

    recipe: Recipe
    model: Model
    objective: Objective
    data: dict[str, float]  # source -> seconds that can be drawn from

    @property
    def stage(self) -> Stage:
        return self.recipe.stage


def assemble(recipe: Recipe, device: torch.device, builtin: Path) -> Assembly:
    """Open the model and the data of a recipe. MoshiError for everything that can be wrong."""
    model = open_model(recipe, device, builtin)
    recipe = adjusted(recipe, model)
    if recipe.stage.bf16 and not bf16_kernels(device):
        log.warning("this CPU has no instructions for bf16, which float32 replaces")
        recipe = replace(recipe, stage=replace(recipe.stage, bf16=False))
    if recipe.model.fresh_codebooks:
        model.mimi.quantizer.reset()
    objective, data = OBJECTIVES[type(recipe.stage)](recipe, model)
    for module in objective.modules.values():
        module.to(device)
    return Assembly(recipe, model, objective, data)


def adjusted(recipe: Recipe, model: Model) -> Recipe:
    """The recipe as it is for this model, which is changed where the stage says so."""
    stage = recipe.stage
    if not isinstance(stage, LmStage):
        return recipe
    if model.lm is not None and stage.acoustic_delay is not None:
        lm = delayed(model.lm.config, stage.acoustic_delay)
        model.lm.config, model.config = lm, replace(model.config, lm=lm)
    if model.lm is not None and stage.residual and model.lm.residual is None:
        seed_residual(model.lm, model.mimi)
        model.config = replace(model.config, lm=model.lm.config)
    return replace(recipe, stage=finetune.prepare(stage, model))


def delayed(lm: LmConfig, frames: int) -> LmConfig:
    """With acoustic codes `frames` behind the semantic ones (paper §3.4.4)."""
    voices = (lm.voice_q, lm.partner_q)
    rows = [d for q in voices if q for d in (0, *[frames] * (q - 1))]
    return replace(lm, delays=(lm.delays[0], *rows)) if lm.dep_q else lm


def open_model(recipe: Recipe, device: torch.device, builtin: Path) -> Model:
    """The model that a recipe starts from, in float32; a preset's weights depend on the seed."""
    start = recipe.model
    if start.preset is not None:
        return fresh(recipe, device, builtin)
    model = weights.load(
        start.model, device=device, dtype="fp32", lm_file=start.weights, mimi_file=start.mimi,
        text_file=start.text, config_file=start.config, builtin=builtin,
    )  # fmt: skip
    if start.model is None:
        model.name = "built-in"
    for part in (model.mimi, model.lm):
        if part is not None:
            part.requires_grad_(True)
    return model


def fresh(recipe: Recipe, device: torch.device, builtin: Path) -> Model:
    """A preset's shape with random weights, and the codec and tokenizer that are named."""
    start, seed = recipe.model, recipe.stage.seed
    assert start.preset is not None
    if start.preset not in PRESETS:
        hint = nearest(start.preset, PRESETS)
        raise UsageError(f"model.preset: there is no preset {start.preset!r}", hint)
    config = PRESETS[start.preset]
    codec = changed(config.mimi, start.codec, "model.codec")
    config = replace(config, mimi=codec, **local_files(config))
    mimi = open_codec(start, config, builtin)
    if mimi is None:
        mimi = Mimi(config.mimi)
        mimi.init_weights(generator_of(seed))
    config = replace(config, mimi=mimi.config)
    if isinstance(recipe.stage, CodecStage):
        alone = replace(config, lm=None, mimi_file=ModelConfig.lm_file)
        return Model(mimi.to(device), None, None, alone, start.preset)
    assert config.lm is not None
    text = Text(Path(start.text) if start.text else builtin / "text.model")
    shape = changed(config.lm, start.lm, "model.lm")
    shape = replace(shape, text_vocab=text.size, text_classes=text.size)
    config = replace(config, lm=shape)
    if shape.codebook_size != config.mimi.quantizer.size:
        raise ModelError(
            f"model.lm: codebook_size {shape.codebook_size} is not that of the codec, "
            f"{config.mimi.quantizer.size}"
        )
    mimi.set_num_codebooks(min(config.codebooks, config.mimi.quantizer.codebooks))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = MoshiLm(shape)
    if start.seed_tables:
        seed_embeddings(lm, mimi, generator_of(seed))
    return Model(mimi.to(device), lm.to(device), text, config, start.preset)


def local_files(config: ModelConfig) -> dict[str, Any]:
    """Names under which a fresh model is written."""
    return {
        "lm_file": ModelConfig.lm_file, "mimi_file": "mimi.safetensors",
        "mimi_config_file": "mimi.json", "text_file": "text.model", "lora_file": None,
    }  # fmt: skip


def changed(config: Config, changes: dict[str, Any], where: str) -> Config:
    """A shape with the changes of a recipe."""
    try:
        return overlay(config, Document(changes, {}, where))
    except ModelError as error:
        raise UsageError(f"{where}: {error}", error.hint) from None


def open_codec(start: Start, config: ModelConfig, builtin: Path) -> Mimi | None:
    """The codec that model.mimi names: a model, or a file of a codec, perhaps of a checkpoint."""
    if start.mimi is None:
        return None
    if start.mimi == "built-in":
        return weights.load(builtin, device="cpu").mimi.requires_grad_(True)
    if not Path(start.mimi).is_file():
        return weights.load(start.mimi, device="cpu", dtype="fp32").mimi.requires_grad_(True)
    mimi, tensors = Mimi(config.mimi), read_tensors(Path(start.mimi))
    if tensors.keys() == mimi.state_dict().keys():  # of a checkpoint
        try:
            mimi.load_state_dict(tensors)
        except RuntimeError:
            raise ModelError(f"{start.mimi}: a codec of another shape", "see model.codec") from None
        mimi.quantizer.refresh()
        return mimi
    return weights.load_mimi(Path(start.mimi), config.mimi).requires_grad_(True)


def make_codec(recipe: Recipe, model: Model) -> tuple[Objective, dict[str, float]]:
    """Mimi on packs of sound."""
    stage = recipe.stage
    assert isinstance(stage, CodecStage)
    refuse_empty(stage)
    windows, data = open_windows(recipe, model.mimi)
    ear = None
    if stage.losses.get("listener"):
        if stage.listener is None:
            hint = "--set listener=FOLDER, or losses: {listener: 0}"
            raise UsageError(f"stage {stage.name}: the loss `listener` needs a listener", hint)
        ear = WhisperListener(Path(stage.listener), model.mimi.sample_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)  # of the critics; what is drawn differs between processes
        own = replace(stage, seed=stage.seed + 1000 * parallel.rank())
        return CodecObjective(own, model.mimi, windows, listener=ear), data


def open_windows(recipe: Recipe, mimi: Mimi) -> tuple[Windows | Utterances, dict[str, float]]:
    """Where a codec's windows come from, and the seconds in each source."""
    stage = recipe.stage
    assert isinstance(stage, CodecStage)
    if stage.flow is None:
        windows = Windows(stage.mix, mimi.frame_samples)
        pairs = zip(stage.mix, windows.runs, strict=True)
        return windows, {s.folder: sum(n for _, n in runs) / mimi.frame_rate for s, runs in pairs}
    words = Text(Path(recipe.model.text)) if recipe.model.text else None
    if words is None and stage.losses.get("recognition"):
        hint = "model: {text: FILE}; `moshi data tokenizer` makes one"
        raise UsageError(f"stage {stage.name}: the loss `recognition` needs a tokenizer", hint)
    spelling = read_spelling(stage.lexicon) if stage.losses.get("letters") else None
    scenes = Utterances(stage.mix, words, stage.flow, stage.augment, mimi.sample_rate, spelling)
    data = {str(pack.folder): 0.0 for pack in scenes.packs}
    for pack, row in scenes.clips:
        data[str(pack.folder)] += row.samples / mimi.sample_rate
    return scenes, data


def make_lm(recipe: Recipe, model: Model) -> tuple[Objective, dict[str, float]]:
    """The language model on the sources of the mix."""
    stage = recipe.stage
    assert isinstance(stage, LmStage) and model.lm is not None
    refuse_empty(stage)
    for source in stage.mix if recipe.run.encode else ():
        if source.form in TASKS and Path(source.folder).is_file():
            residual = bool(model.lm.config.residual)
            task = TASKS[source.form]
            encode_manifest(Path(source.folder), model.mimi, task, residual=residual)
    mixture = Mixture.open(stage, model)
    pairs = zip(stage.mix, mixture.sources, strict=True)
    data = {f"{place.folder} ({place.form})": source.seconds for place, source in pairs}
    return LmObjective(stage, model.lm, mixture, workers=recipe.run.workers), data


def refuse_empty(stage: Stage) -> None:
    """UsageError if there is nothing to learn from."""
    if not stage.mix:
        hint = "name data: mix: [{folder: DIR}], or --set mix.0.folder=DIR"
        raise UsageError(f"stage {stage.name}: the mix is empty", hint)


OBJECTIVES: dict[type[Stage], Callable[[Recipe, Model], tuple[Objective, dict[str, float]]]] = {
    CodecStage: make_codec,
    LmStage: make_lm,
}


def export(recipe: Recipe, checkpoint: Path, folder: Path, builtin: Path) -> Path:
    """The model of a checkpoint as a folder for --model; averaged weights if the stage kept them.

    With adapters: the adapters alone, unless the recipe says to merge them.
    """
    model = open_model(recipe, torch.device("cpu"), builtin)
    stage = adjusted(recipe, model).stage
    parts: dict[str, nn.Module | None] = {"lm": model.lm, "mimi": model.mimi}
    for name, part in parts.items():
        paths = [checkpoint / f"{name}{suffix}.safetensors" for suffix in (".ema", "")]
        path = next((p for p in paths if p.is_file()), None)
        if part is not None and path is not None:
            whole = getattr(stage, "lora", None) is None
            part.load_state_dict(read_tensors(path), strict=whole)
    model.mimi.quantizer.refresh()
    if isinstance(stage, CodecStage) and not model.mimi.quantizer.fitted:
        log.warning(
            "the codebooks have no values, since the run ended before quantize_from = %g: "
            "the model can be trained further, not used", stage.quantize_from,
        )  # fmt: skip
    part_folder = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part_folder, ignore_errors=True)
    if not isinstance(stage, LmStage):
        weights.save(replace(model, lm=None, config=replace(model.config, lm=None)), part_folder)
    elif stage.lora is not None and not recipe.run.merge:
        base = recipe.model.model or str(builtin)
        finetune.write_adapters(model, stage, part_folder, base)
    else:
        finetune.write_model(model, stage, part_folder)
    shutil.rmtree(folder, ignore_errors=True)
    part_folder.replace(folder)
    return folder
