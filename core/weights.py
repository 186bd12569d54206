"""Loading and saving whole models: codec, language model, tokenizer and configuration.

Every published layout is read (see names.py): checked against the header of its file first, then
copied into a model made on the target device in the target type. The codec and the conditioners
stay in float32. `save` writes the published layout, on request with int8 rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moshi_cli.core import names
from moshi_cli.core.config import LmConfig, MimiConfig, ModelConfig
from moshi_cli.core.errors import MemoryLimitError, ModelError
from moshi_cli.core.hub import Source
from moshi_cli.core.kyutai_mimi import read_transformers_mimi
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.ngram import NGram, load_ngram
from moshi_cli.core.presets import MOSHI_7B
from moshi_cli.core.streams import Task
from moshi_cli.core.tensors import SCALE, TensorFile, int8_rows, match, merge_lora
from moshi_cli.core.text import EOS, PAD, Text
from moshi_cli.core.vq import Codebook

PIECE = 1 << 16  # bytes, of files that are told apart by samples
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Store = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass
class Model:
    """What `load` gives. lm and text are None for a codec alone."""

    mimi: Mimi
    lm: MoshiLm | None
    text: Text | None
    config: ModelConfig
    name: str
    revision: str = ""
    ngram: NGram | None = None

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return next(self.mimi.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the language model's weights."""
        return torch.float32 if self.lm is None else self.lm.like.dtype

    def fit(self, task: Task) -> Task:
        """The task with the lag this model was trained with; ModelError if it cannot do it."""
        if self.lm is None:
            raise ModelError(f"{self.name}: a codec alone cannot do {task.name!r}")
        return self.config.fit(task)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name; auto: cuda, else mps, else cpu. ModelError if it is not there."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ModelError(
            f"no device {str(device)!r}", hint="auto, cpu, mps, cuda or cuda:1"
        ) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {str(found)!r} is not available")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' is not available")
    return found


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The type of a name; auto: float32 on cpu, else bfloat16."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ModelError(f"no dtype {dtype!r}", hint="auto, " + ", ".join(DTYPES))
    return DTYPES[dtype]


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(row.split()[1]) * 1024 for row in file if row.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        return None


def allocate(model: nn.Module, device: torch.device, what: str) -> None:
    """Give a model on meta real memory, after looking whether there is enough of it."""
    if device.type == "meta":
        return
    need = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    free = free_bytes(device)
    hint = "use --dtype bf16, or a smaller model"
    if free is not None and need > free:
        text = f"{what}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}"
        raise MemoryLimitError(text, hint=hint)
    try:
        # as to_empty, which imports sympy (40 MB) for tensors on "meta"
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    except (torch.OutOfMemoryError, MemoryError):
        text = f"{what}: {need / 1e9:.1f} GB do not fit on {device}"
        raise MemoryLimitError(text, hint=hint) from None


def fill(model: nn.Module, file: TensorFile, plan: Mapping[str, names.Place]) -> None:
    """Copy the tensors of a file to their places, one at a time."""
    state = model.state_dict()
    for name, place in plan.items():
        place.write(state, file.read(name))


def load_mimi(path: Path, config: MimiConfig, device: torch.device | str = "cpu") -> Mimi:
    """A codec in float32 from a file in Kyutai's, a legacy or Transformers' layout."""
    device, file = torch.device(device), TensorFile(path)
    with torch.device("meta"):
        mimi = Mimi(config)
    main, also = names.expand(names.MIMI, mimi), names.expand(names.MIMI_ALSO, mimi)
    if "encoder.layers.0.conv.weight" in file.entries:
        main = names.expand(names.MIMI_TRANSFORMERS, mimi, config.transformer.heads)
    plan = match(file, mimi, main, also)
    allocate(mimi, device, str(path))
    if device.type != "meta":
        fill(mimi, file, plan)
        mimi.quantizer.refresh()
    return mimi.eval()


def load_lm(
    path: Path,
    config: LmConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: str = "moshi",
    lora: Path | None = None,
    lora_scaling: float = 2.0,
) -> MoshiLm:
    """A language model from any of the published layouts, adapters merged.

    Heads on top of h that the file has and the config does not mention are taken along. Of the kind
    "hibiki", the end of text gets the embedding of a pause, as upstream does.
    """
    device, file = torch.device(device), TensorFile(path)
    if not config.extra_heads and "extra_heads.0.weight" in file.entries:
        count = sum(name.startswith("extra_heads.") for name in file.names)
        classes = file.entries["extra_heads.0.weight"].shape[0]
        config = replace(config, extra_heads=count, extra_classes=classes)
    with torch.device("meta"):
        lm = MoshiLm(config)
    lm.to(dtype).conditioning.float()
    main, also = names.expand(names.LM, lm), names.expand(names.LM_ALSO, lm)
    plan = match(file, lm, main, also)
    adapter = None if lora is None else TensorFile(lora)
    allocate(lm, device, str(path))
    if device.type != "meta":
        with torch.no_grad():
            fill(lm, file, plan)
            if adapter is not None:
                merge_lora(adapter, lm, {**also, **main}, lora_scaling)
            if kind == "hibiki":
                lm.text_emb.table[EOS] = lm.text_emb.table[PAD]
    return lm.eval()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot read ({error})") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: not a JSON object")
    return data


def read_config(source: Source, config_file: str | None = None) -> ModelConfig:
    """The configuration at a source; Moshi 7B if there is no config.json."""
    path = source.find(config_file or "config.json")
    if path is None:
        if config_file:
            raise ModelError(f"{source.folder or source.repo}: there is no file {config_file!r}")
        return MOSHI_7B
    data = read_json(path)
    with well_formed(path):
        if "seanet" in data:
            mimi = MimiConfig.from_kyutai(data, str(path))
            return ModelConfig(mimi=mimi, mimi_file=ModelConfig.lm_file)
        if data.get("model_type") == "mimi":
            mimi = read_transformers_mimi(data, str(path))
            return ModelConfig(mimi=mimi, mimi_file=ModelConfig.lm_file)
    mimi = MimiConfig()
    if data.get("mimi_config_name"):
        codec = source.file(data["mimi_config_name"])
        with well_formed(codec):
            mimi = MimiConfig.from_kyutai(read_json(codec), str(codec))
    with well_formed(path):
        return ModelConfig.from_kyutai(data, mimi, str(path))


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """ModelError where a value of a configuration is of another kind than belongs there."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(f"{path}: a value of a wrong kind: {error}") from error


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    lora: str | None = None,
    lm_file: str | None = None,
    mimi_file: str | None = None,
    text_file: str | None = None,
    ngram_file: str | None = None,
    more_ngrams: str | None = None,
    config_file: str | None = None,
    lora_scaling: float | None = None,
    builtin: Path | None = None,
) -> Model:
    """A model by folder, file, repository, address or short name (see hub.py).

    None: the built-in one, at the folder `builtin`. The other arguments replace files of the source
    by paths or addresses; more_ngrams stand beside those that the model has. ModelError, one
    sentence, for everything that can be wrong.
    """
    if name is None:
        if builtin is None or not builtin.is_dir():
            raise ModelError("no model named, and there is no built-in one here")
        name = builtin
    where = pick_device(device)
    source = Source.of(name, revision)
    config = read_config(source, address(config_file))
    if source.only and lm_file is None and mimi_file is None:
        lm_file = None if config.lm is None or source.only == config.mimi_file else source.only
        mimi_file = source.only if config.lm is None else None
    mimi_path = source.file(address(mimi_file) or config.mimi_file)
    mimi = load_mimi(mimi_path, config.mimi, where)
    if config.lm is None:
        return Model(mimi, None, None, config, str(name), revision_of(mimi_path))
    type_ = pick_dtype(dtype, where)
    if config.lm.codebook_size != config.mimi.quantizer.size:
        raise ModelError(
            f"{name}: codec and language model have codebooks of {config.mimi.quantizer.size} and "
            f"{config.lm.codebook_size} entries"
        )
    if config.codebooks > config.mimi.quantizer.codebooks:
        raise ModelError(
            f"{name}: the language model wants {config.codebooks} codebooks, the codec has "
            f"{config.mimi.quantizer.codebooks}"
        )
    mimi.set_num_codebooks(config.codebooks)
    text = Text(source.file(address(text_file) or config.text_file))
    if text.size > config.lm.text_vocab:
        raise ModelError(
            f"{name}: the tokenizer has {text.size} pieces, the model knows {config.lm.text_vocab}"
        )
    path = source.file(address(lm_file) or config.lm_file)
    adapter = address(lora) or config.lora_file
    lm = load_lm(
        path, config.lm, device=where, dtype=type_, kind=config.kind,
        lora=None if adapter is None else source.file(adapter),
        lora_scaling=config.lora_scaling if lora_scaling is None else lora_scaling,
    )  # fmt: skip
    files = [path, mimi_path, *([source.file(adapter)] if adapter else [])]
    own = address(ngram_file) or config.ngram_file
    tables = [source.file(named) for named in (own, address(more_ngrams)) if named is not None]
    if tables and (ngram_file or not own):
        config = replace(config, ngram_file=tables[0].name)
    ngram = load_ngrams(tables, where, lm.config.text_vocab)
    config = replace(config, lm=lm.config)
    return Model(mimi, lm, text, config, str(name), revision_of(*files, *tables), ngram)


def load_ngrams(paths: Sequence[Path], where: torch.device, vocabulary: int) -> NGram | None:
    """The first one with the others beside it. ModelError."""
    found: NGram | None = None
    for path in reversed(paths):
        ngram = load_ngram(path, where)
        if ngram.size > vocabulary:
            raise ModelError(f"{path}: n-grams of {ngram.size} pieces, not of this tokenizer")
        found = ngram if found is None else ngram.mixed(found)
    return found


def address(file: str | None) -> str | None:
    """A file argument: a local path becomes a file:// address, other names are left alone."""
    return f"file://{Path(file).resolve()}" if file and Path(file).is_file() else file


def revision_of(*paths: Path) -> str:
    """What tells the content of files from another: a commit of the hub's cache, else a digest of
    their sizes and of nine pieces of each."""
    parts = paths[0].parts
    if "snapshots" in parts[:-1]:
        return parts[parts.index("snapshots") + 1]
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for i in range(9):
                file.seek(max(size - PIECE, 0) * i // 8)
                digest.update(file.read(PIECE))
    return f"local-{digest.hexdigest()[:12]}"


def published(model: nn.Module, store: Store) -> dict[str, Tensor]:
    """Tensors of an LM or a codec by their published names, on the CPU.

    All but fp32 keep norms and conditioners as they are; codebooks become centroids in float16.
    int8: matrices as rows of int8 beside their maxima.
    """
    rules = names.MIMI if isinstance(model, Mimi) else names.LM
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    if store != "fp32":
        for path, module in model.named_modules():
            if isinstance(module, Codebook):
                module.refresh()
                state[path + ".embedding_sum"] = module.centroids.detach().cpu().half()
                state[path + ".cluster_usage"] = torch.ones_like(state[path + ".cluster_usage"])
    found = {}
    for name, place in names.expand(rules, model).items():
        value = place.read(state).contiguous()
        vector = value.numel() == value.shape[-1]
        if store == "fp32" or vector or "condition" in name or "_codebook" in name:
            found[name] = value
        elif store == "int8" and value.numel() >= 2048:  # less would save nothing
            found[name], found[name + SCALE] = int8_rows(value)
        else:
            found[name] = value.half() if store == "fp16" else value.bfloat16()
    return found


def save(model: Model, folder: Path, *, lm: Store = "fp32", mimi: Store = "fp32") -> None:
    """Write a folder that `load` reads: tensors in the published layout, configs, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(model.config, mimi_config_file=model.config.mimi_config_file or "mimi.json")
    files = [(config.mimi_file, published(model.mimi, mimi))]
    texts = {str(config.mimi_config_file): config.mimi.to_kyutai()}
    if model.lm is not None:
        config = replace(config, lora_file=None)  # merged
        files.append((config.lm_file, published(model.lm, lm)))
        texts["config.json"] = config.to_kyutai()
    else:
        texts = {"config.json": config.mimi.to_kyutai()}
        files = [(ModelConfig.lm_file, files[0][1])]
    for name, tensors in files:
        part = folder / f"{name}.tmp.{os.getpid()}"
        save_file(tensors, str(part))
        part.chmod(0o644)  # it is written for the owner alone
        part.replace(folder / name)
    for name, data in texts.items():
        part = folder / f"{name}.tmp.{os.getpid()}"
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / name)
    if model.ngram is not None:
        model.ngram.save(folder / str(config.ngram_file))
    if model.text is not None:
        (folder / config.text_file).write_bytes(model.text.model)
