"""Recipes: what `moshi train` is told, as plain data that maps one to one to YAML.

    stage: pretrain             # a value of stages.STAGES; further keys of the top level change it
    lr: 2e-3
    mix: [{folder: codes, form: takes}]
    model: {preset: moshi-nano}
    run: {output: runs/pretrain}

Reading, merging and the errors are in documents.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks.documents import Document, assign, nearest, overlay, read
from moshi_cli.tasks.moshi_finetune import translated
from moshi_cli.tasks.stages import LOSSES, SHARES, STAGES, LmStage, Stage


@dataclass(frozen=True)
class Start:
    """The model that is trained: one that exists, or a preset's shape with random weights."""

    model: str | None = None  # as for --model; None: the built-in one, unless a preset is named
    preset: str | None = None  # a name of core.presets.PRESETS
    codec: dict[str, Any] = field(default_factory=dict)  # changes to the preset's MimiConfig …
    lm: dict[str, Any] = field(default_factory=dict)  # … and to its LmConfig
    mimi: str | None = None  # weights of the codec, instead of the model's own or random ones
    weights: str | None = None  # … of the language model, instead of the model's own
    config: str | None = None  # config.json, instead of the model's own
    text: str | None = None  # tokenizer, instead of the model's; a preset takes its size from it
    fresh_codebooks: bool = False  # a codec's are fitted again, at `quantize_from`
    seed_tables: bool = False  # fresh tables of codes begin where the codec's codebooks are


@dataclass(frozen=True)
class Loop:
    """How the loop runs; nothing here changes what is learnt."""

    output: str = ""  # folder of the run; empty: runs/NAME
    device: str = "auto"
    threads: int = 0  # of the CPU; 0: as torch chooses
    workers: int = 0  # processes that prepare batches
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: copies of the model, or shards
    log_every: int = 20  # steps
    save_minutes: float = 10.0
    keep: int = 2  # checkpoints
    plot: bool = True  # losses.png at the end, if matplotlib is installed
    tensorboard: bool = False
    encode: bool = True  # manifests in the mix become caches of codes first, beside themselves
    export: bool = True  # a folder for --model at the end …
    merge: bool = False  # … in which adapters are folded into the weights


@dataclass(frozen=True)
class Recipe:
    """A stage, what it starts from and how it runs."""

    base: str  # key of STAGES
    stage: Stage
    model: Start = Start()
    run: Loop = Loop()

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.run.output or f"runs/{self.stage.name}")


def recipe_of(document: Document) -> Recipe:
    """The recipe that a document describes, which may be a file of moshi-finetune."""
    document = translated(document)
    data = dict(document.data)
    base, shown = data.pop("stage", None), ", ".join(STAGES)
    if base is None:
        raise UsageError(f"{document.name}: it does not say `stage: NAME`", f"stages: {shown}")
    if base not in STAGES:
        where = document.place(("stage",))
        raise UsageError(f"{where}: there is no stage {base!r}", nearest(str(base), STAGES))
    model, run = data.pop("model", None) or {}, data.pop("run", None) or {}
    own = {"stage": data, "model": model, "run": run}
    known = [f.name for f in fields(STAGES[base])]
    for key in data:
        if key not in known:
            hint = nearest(str(key), [*known, "model", "run"])
            raise UsageError(f"{document.place((str(key),))}: unknown key {key!r}", hint)
    stage = overlay(STAGES[base], Document(data, document.places, document.name))
    whole = Document(own, document.places, document.name)
    recipe = Recipe(
        base, stage, overlay(Start(), whole, ("model",)), overlay(Loop(), whole, ("run",))
    )
    check(recipe, document)
    return recipe


def check(recipe: Recipe, document: Document) -> None:
    """UsageError for values that cannot be meant."""
    stage, start = recipe.stage, recipe.model
    for name in stage.losses:
        if name not in (known := LOSSES[type(stage)]):
            where = document.place(("losses", name))
            raise UsageError(f"{where}: there is no loss {name!r}", nearest(name, known))
    for key, least in {"lr": 0.0, "weight_decay": 0.0, "clip": 0.0, "muon": 0.0}.items():
        if not getattr(stage, key) >= least:
            raise UsageError(f"{document.place((key,))}: {key} must not be negative")
    for key in SHARES:
        if not 0 <= getattr(stage, key, 0.0) <= 1:
            raise UsageError(f"{document.place((key,))}: {key} must be from 0 to 1")
    for key, rest in {"gaps": "to hear", "dropout": "of a layer"}.items():
        if isinstance(stage, LmStage) and getattr(stage, key) == 1:
            raise UsageError(f"{document.place((key,))}: {key} must leave something {rest}")
    for key in ("accumulate", "steps"):
        if getattr(stage, key) < 1:
            raise UsageError(f"{document.place((key,))}: {key} must be at least 1")
    if not stage.shapes or any(s.batch < 1 or s.window_s <= 0 or s.share < 0 for s in stage.shapes):
        raise UsageError(
            f"{document.place(('shapes',))}: shapes need a window_s and a batch above 0"
        )
    if any(source.weight < 0 for source in stage.mix):
        raise UsageError(f"{document.place(('mix',))}: weights must not be negative")
    if stage.muon and recipe.run.parallel == "fsdp":
        where = document.place(("muon",))
        raise UsageError(f"{where}: Muon needs whole matrices", "use run.parallel=ddp, or muon=0")
    if start.model and start.preset:
        raise UsageError(
            f"{document.place(('model',))}: a model and a preset are named: choose one"
        )
    if (start.codec or start.lm) and not start.preset:
        where = document.place(("model",))
        raise UsageError(f"{where}: only a preset's shape can be changed", "name model.preset")


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a stage's name, a YAML file or the folder of a run, with settings put over."""
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    if path.is_file():
        document = read(path, "a recipe begins with `stage: NAME`")
    elif name in STAGES:
        document = Document({"stage": name}, {}, name)
    else:
        there = f"{name} is a folder without config.yaml" if path.is_dir() else f"no file {name!r}"
        raise UsageError(f"{there}, and no stage of this name", nearest(name, STAGES))
    assign(document, settings)
    return recipe_of(document)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what YAML can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def dump(recipe: Recipe) -> str:
    """YAML that `load` turns into the same recipe."""
    data = {"stage": recipe.base, **plain(recipe.stage)}
    for key, value in plain(STAGES[recipe.base]).items():
        if isinstance(value, dict):  # entries that were taken out
            data[key] |= dict.fromkeys(value.keys() - data[key].keys())
    data |= {"model": plain(recipe.model), "run": plain(recipe.run)}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
