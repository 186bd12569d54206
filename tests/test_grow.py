"""The recipe's deeper model says the same."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor

from moshi_cli.core import weights
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text

SCRIPT = Path(__file__).parent.parent / "examples" / "train_builtin" / "grow.py"


def grow(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["grow.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_deeper_model_says_the_same_and_learns(
    tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    files = {"lm_file": "model.safetensors", "text_file": "text.model"}
    local = {"mimi_file": "mimi.safetensors", "mimi_config_file": "mimi.json"}
    config = ModelConfig(mimi=TINY_MIMI, lm=TINY_LM, **files, **local)  # type: ignore[arg-type]
    weights.save(weights.Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny"), tmp_path / "small")
    layers = TINY_LM.temporal.layers
    grow(monkeypatch, tmp_path / "small", tmp_path / "deep", "--after", 1, layers)
    small, deep = (
        weights.load(tmp_path / name, device="cpu").lm for name in ("small", "deep")
    )  # fmt: skip
    assert small is not None
    assert deep is not None
    assert len(deep.transformer.layers) == layers + 2
    x = torch.randn(1, 7, TINY_LM.temporal.dim)
    y = deep.transformer.requires_grad_(True)(x, None, None, None)
    assert torch.equal(small.transformer(x, None, None, None), y)
    y.square().mean().backward()
    for place in (1, layers + 1):  # the copies
        first, again = (
            dict(deep.transformer.layers[i].named_parameters()) for i in (place - 1, place)
        )
        adds = [name for name, p in again.items() if not p.any()]
        assert len(adds) == 2
        assert all(grad(again[name]).any() for name in adds)
        assert all(torch.equal(first[name], p) for name, p in again.items() if name not in adds)
    with pytest.raises(SystemExit, match=f"has {layers} layers"):
        grow(monkeypatch, tmp_path / "small", tmp_path / "none", "--after", layers + 1)
    assert not (tmp_path / "none").exists()


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
