"""Models written anew: adapters folded in, layouts and number types changed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.options import ModelOptions
from moshi_cli.session import begin, model_place

if TYPE_CHECKING:
    from moshi_cli.core.weights import Model


def settings(options: ModelOptions, store: str) -> dict[str, Any]:
    """Arguments of `core.weights.load` to write a model as `store`: it is held no wider than that,
    unless the user says how."""
    dtype = "fp16" if options.half else options.dtype
    if dtype == "auto":
        dtype = "fp32" if store == "int8" else store
    files = {
        "lora": options.lora_weight, "lm_file": options.moshi_weight,
        "mimi_file": options.mimi_weight, "text_file": options.tokenizer,
        "ngram_file": options.ngrams, "config_file": options.config_path,
    }  # fmt: skip
    named = {key: None if path is None else str(path) for key, path in files.items()}
    device = "cpu" if options.device == "auto" else options.device
    return {"device": device, "dtype": dtype, "revision": options.revision, **named}


def write(model: Model, folder: Path, store: str, codec_store: str, force: bool) -> str:
    """Save under plain file names; a line that says what was written."""
    from moshi_cli.core import weights
    from moshi_cli.tasks.finetune import local_names

    if any(folder.glob("*.safetensors")) and not force:
        raise UsageError(f"{folder} holds a model", "choose another folder, or use --force")
    model = replace(model, config=local_names(model.config))
    weights.save(model, folder, lm=store, mimi=codec_store)  # type: ignore[arg-type]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{model.name} -> {folder} ({size / 1e9:.3f} GB)"


def rewrite(
    name: str | None, options: ModelOptions, folder: Path, store: str, codec_store: str,
    *, force: bool = False,
) -> str:  # fmt: skip
    """Load and save; what was written."""
    from moshi_cli.core.weights import load

    begin(options)
    place = name or model_place(options)
    model = load(place, **settings(options, store))
    return write(model, folder, store, codec_store, force)


def merge_adapters(
    adapters: Path, options: ModelOptions, folder: Path, store: str,
    *, scaling: float | None = None, force: bool = False,
) -> str:  # fmt: skip
    """Load the model of adapters with them folded in, and save it; what was written."""
    from moshi_cli.core.weights import load, read_json

    begin(options)
    home = adapters if adapters.is_dir() else adapters.parent
    beside = home / "config.json"
    data = read_json(beside) if beside.is_file() else {}
    is_theirs = bool(data.get("lora") or data.get("lora_name"))
    file = adapters
    if adapters.is_dir():
        file = adapters / str(data.get("lora_name") or "lora.safetensors")
    if not file.is_file():
        raise ModelError(f"{file}: no such file", "give lora.safetensors or its folder")
    given = settings(options, store) | {"lora": str(file), "lora_scaling": scaling}
    if is_theirs and options.config_path is None:
        given["config_file"] = str(beside)
    place, named = options.model, is_theirs and "://" in str(data.get("moshi_name", ""))
    if named and place in (None, os.environ.get("MOSHI_MODEL")):  # what the adapters say is closer
        place = str(home)
    if place is None:
        raise UsageError(f"{file}: nothing says which model it is for", "name it with --model")
    model = load(place, **given)
    assert model.lm is not None
    return write(replace(model, name=file.name), folder, store, "fp32", force)
