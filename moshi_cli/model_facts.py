"""What can be said about a model without loading it: from its config, its files and its card."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.hub import REPOS, Source, cache_folder
from moshi_cli.session import BUILTIN, BUILTIN_NAME

KYUTAI_LICENCE = "CC-BY 4.0 (weights, as published by Kyutai)"
CARDS = ("README.md", "MODEL_CARD.md", "card.md")


def known_models() -> list[dict[str, Any]]:
    """Built-in, published, and whatever else in the hub's cache is a model of this kind."""
    from moshi_cli.core.presets import PRESETS

    rows = []
    if BUILTIN.is_dir():
        size = sum(p.stat().st_size for p in BUILTIN.glob("*.safetensors"))
        rows.append(_row(BUILTIN_NAME, tasks_of(_read(Source(folder=BUILTIN))), size, True, None))
    for name, repo in REPOS.items():
        config = PRESETS.get(name, ModelConfig())
        here = _snapshot(repo) is not None
        rows.append(_row(name, tasks_of(config), _bytes(config), here, repo))
    for folder in sorted(cache_folder().glob("models--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        snapshot = _snapshot(repo)
        if repo not in REPOS.values() and snapshot is not None and _is_ours(snapshot):
            size = sum(p.stat().st_size for p in snapshot.glob("*.safetensors"))
            rows.append(_row(repo, tasks_of(_read(Source(folder=snapshot))), size, True, repo))
    return rows


def _row(name: str, tasks: list[str], size: int, here: bool, repo: str | None) -> dict[str, Any]:
    return {"name": name, "tasks": tasks, "bytes": size or None, "here": here, "repo": repo}


def _snapshot(repo: str) -> Path | None:
    """The newest folder of a repository in the cache that holds weights."""
    folder = cache_folder() / f"models--{repo.replace('/', '--')}" / "snapshots"
    found = [path for path in folder.glob("*") if any(path.glob("*.safetensors"))]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_ours(snapshot: Path) -> bool:
    """Whether a config.json speaks of a model that this program reads."""
    try:
        data = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    kinds = ("moshi", "hibiki", "stt", "tts", "mimi")
    return isinstance(data, dict) and (data.get("model_type") in kinds or "dep_q" in data)


def _read(source: Source) -> ModelConfig:
    from moshi_cli.core.weights import read_config

    try:
        return read_config(source)
    except ModelError:
        return ModelConfig()


def tasks_of(config: ModelConfig) -> list[str]:
    """Names of what a model does."""
    return [*config.lags, "codec"]


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the codec (codebooks included) and of the language model."""
    import torch

    from moshi_cli.core.lm import MoshiLm
    from moshi_cli.core.mimi import Mimi

    with torch.device("meta"):
        mimi = Mimi(config.mimi)
        lm = None if config.lm is None else MoshiLm(config.lm)
    codec = sum(t.numel() for t in mimi.state_dict().values())
    return codec, 0 if lm is None else sum(p.numel() for p in lm.parameters())


def _bytes(config: ModelConfig) -> int:
    """As published: the codec in float32, the language model in bfloat16."""
    codec, lm = parameters(config)
    return 4 * codec + 2 * lm


def describe(place: str, revision: str | None, builtin: bool = False) -> dict[str, Any]:
    """All facts about a model by name, folder, file or repository; what is unknown is None."""
    from moshi_cli.core.presets import PRESETS
    from moshi_cli.core.weights import read_config

    preset = PRESETS.get(place) or next(
        (PRESETS[name] for name, repo in REPOS.items() if repo == place and name in PRESETS), None
    )
    source = Source.of(place, revision)
    snapshot = source.folder or _snapshot(source.repo)
    if preset is None or snapshot is not None:
        local = Source(folder=snapshot, only=source.only) if snapshot else source
        config = read_config(local)
    else:
        config = preset
    codec, lm = parameters(config)
    facts: dict[str, Any] = {
        "name": BUILTIN_NAME if builtin else place, "repo": source.repo or None,
        "files": None if snapshot is None else str(snapshot), "kind": _kind(config),
        "tasks": tasks_of(config), "lag_s": dict(config.lags),
        "codec_parameters": codec, "lm_parameters": lm or None,
        "memory_gb": _memory(codec, lm), **_codec(config), **_lm(config),
    }  # fmt: skip
    card, licence = _card(snapshot)
    facts["licence"] = licence or (KYUTAI_LICENCE if source.repo in REPOS.values() else None)
    facts["card"] = card
    return facts


def _kind(config: ModelConfig) -> str:
    return "mimi" if config.lm is None else config.kind


def _memory(codec: int, lm: int) -> dict[str, float]:
    """GB of weights by type of the language model; the codec stays in float32."""
    sizes = {"bf16": 2, "fp32": 4} if lm else {"fp32": 4}
    return {name: round((4 * codec + size * lm) / 1e9, 3) for name, size in sizes.items()}


def _codec(config: ModelConfig) -> dict[str, Any]:
    mimi = config.mimi
    bits = (mimi.quantizer.size - 1).bit_length()
    return {
        "sample_rate": mimi.sample_rate, "frame_rate": mimi.frame_rate,
        "codebooks": mimi.quantizer.codebooks, "codebook_size": mimi.quantizer.size,
        "bitrate_per_codebook": round(mimi.frame_rate * bits, 1),
    }  # fmt: skip


def _lm(config: ModelConfig) -> dict[str, Any]:
    lm = config.lm
    if lm is None:
        return {}
    context = lm.temporal.context
    runs = [(delay, len(list(run))) for delay, run in groupby(lm.delays)]
    return {
        "streams": {"text": 1, "made": lm.dep_q, "heard": lm.n_q - lm.dep_q},
        "delays": [f"{delay}×{count}" if count > 1 else str(delay) for delay, count in runs],
        "width": lm.temporal.dim, "layers": lm.temporal.layers,
        "context_s": context and round(context / config.mimi.frame_rate, 1),
        "text_vocabulary": lm.text_vocab,
        "conditions": [condition.name for condition in lm.conditions],
        "pause_heads": lm.extra_heads or None, "voice_id": config.voice_id or None,
        "temperature": {"codes": config.sampling.temp, "text": config.sampling.text_temp},
        "top_k": {"codes": config.sampling.top_k, "text": config.sampling.text_top_k},
        "task_sampling": [
            f"{name}: codes {s.temp:g}, text {s.text_temp:g}, guidance {s.guidance:g}"
            for name, s in config.samplings.items()
        ],
    }  # fmt: skip


def _card(folder: Path | None) -> tuple[str | None, str | None]:
    """The model card without its front matter, and the licence, where the folder has them."""
    if folder is None:
        return None, None
    file = next((folder / name for name in CARDS if (folder / name).is_file()), None)
    text = "" if file is None else file.read_text(encoding="utf-8", errors="replace")
    licence = None
    if text.startswith("---\n"):
        head, _, text = text[4:].partition("\n---")
        lines = dict(line.split(":", 1) for line in head.splitlines() if ":" in line)
        licence = lines.get("license", "").strip() or None
    if licence is None and (folder / "LICENSE").is_file():
        first = (folder / "LICENSE").read_text(encoding="utf-8", errors="replace").strip()
        licence = first.splitlines()[0].strip() if first else None
    return text.strip() or None, licence
