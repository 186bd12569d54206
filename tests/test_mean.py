"""The recipe's mean of weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parent.parent / "examples" / "train_builtin" / "mean.py"


def mean(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mean.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_mean_of_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("a", 0.0), ("b", 4.0)):
        (tmp_path / name).mkdir()
        save_file(
            {"linears.0": torch.full((2,), value), "layers.0": torch.full((3,), value)},
            tmp_path / name / "model.safetensors",
        )
    (tmp_path / "b" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    mean(monkeypatch, "a", "b", "half")
    found = load_file("half/model.safetensors")
    assert {k: v.unique().tolist() for k, v in found.items()} == {"linears.0": [2], "layers.0": [2]}
    assert Path("half/config.json").read_text() == "{}"
    mean(monkeypatch, "a", "b", "some", "--share", 0.75, "--keep", "linears", "depformer")
    found = load_file("some/model.safetensors")
    assert {k: v.unique().tolist() for k, v in found.items()} == {"linears.0": [4], "layers.0": [3]}
    save_file({"layers.0": torch.zeros(3)}, "a/model.safetensors")
    with pytest.raises(SystemExit, match="not of one shape"):
        mean(monkeypatch, "a", "b", "none")
    assert not Path("none").exists()
