"""From options to a model in memory, with one line on stderr that says which and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_cli.console import Console
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.options import ModelOptions

if TYPE_CHECKING:
    from moshi_cli.core.mimi import Mimi
    from moshi_cli.core.weights import Model

BUILTIN = Path(__file__).parent / "builtin"
BUILTIN_NAME = "built-in"


@dataclass
class Codec:
    """A codec alone, without the language model beside it."""

    mimi: Mimi
    name: str
    revision: str


def open_model(options: ModelOptions, console: Console) -> Model:
    """The whole model that the options name; raises ModelError."""
    from moshi_cli.core.weights import load

    begin(options)
    model = load(
        options.model, device=options.device, dtype="fp16" if options.half else options.dtype,
        revision=options.revision, lora=_text(options.lora_weight),
        lm_file=_text(options.moshi_weight), mimi_file=_text(options.mimi_weight),
        text_file=_text(options.tokenizer), more_ngrams=_text(options.ngrams),
        config_file=_text(options.config_path),
        builtin=BUILTIN,
    )  # fmt: skip
    if options.model is None:
        model.name = BUILTIN_NAME
    dtype = str(model.dtype).removeprefix("torch.")
    announce(console, options, model.name, f"{model.device}, {dtype}")
    return model


def open_codec(options: ModelOptions, console: Console) -> Codec:
    """The codec of the model that the options name; nothing else of it is loaded."""
    from moshi_cli.core.hub import Source
    from moshi_cli.core.packing import pack
    from moshi_cli.core.weights import (
        address,
        load_mimi,
        pick_device,
        read_config,
        revision_of,
    )

    begin(options)
    device = pick_device(options.device)
    source = Source.of(model_place(options), options.revision)
    config = read_config(source, address(_text(options.config_path)))
    alone = config.lm is None and source.only  # the file that was named is the codec
    file = address(_text(options.mimi_weight)) or alone or config.mimi_file
    path = source.file(file)
    mimi = load_mimi(path, config.mimi, device)
    pack(mimi)
    name = options.model or BUILTIN_NAME
    announce(console, options, name, f"{device}, float32")
    return Codec(mimi, name, revision_of(path))


def model_place(options: ModelOptions) -> str:
    """The name to load: what was asked for, or the built-in model's folder."""
    if options.model is not None:
        return options.model
    if not BUILTIN.is_dir():
        raise ModelError(
            "this installation has no built-in model", "name one with --model NAME|DIR|REPO"
        )
    return str(BUILTIN)


def begin(options: ModelOptions) -> None:
    """Threads and seed, before anything is computed."""
    import torch

    if options.half and options.dtype not in ("auto", "fp16"):
        raise UsageError(f"--half means fp16, but --dtype is {options.dtype}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def announce(console: Console, options: ModelOptions, name: str, where: str) -> None:
    """Which model runs where; and what to expect of the built-in one."""
    if options.model is None:
        card = BUILTIN / "can.txt"  # one line, written where the model is trained
        can = (
            card.read_text(encoding="utf-8").strip() if card.is_file() else "a small demonstration"
        )
        console.info(f"using the {BUILTIN_NAME} model ({can}); --model names another")
    console.info(f"{name} on {where}")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
