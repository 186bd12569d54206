"""The examples run, on a tiny model that does everything and nothing well."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks import TASKS


@pytest.fixture
def folder(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text, tmp_path: Path) -> Path:
    """A folder with a model and a recording."""
    lags = {"asr": 0.32, "tts": -0.32, "chat": 0.0}
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags=lags)
    save(Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny"), tmp_path / "model")
    audio.write(tmp_path / "in.wav", torch.randn(20_000) * 0.2)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("transcribe", ["in.wav"]),
        ("speak", ["one two", "out.wav"]),
        ("converse", ["in.wav", "out.wav"]),
        ("new_task", ["in.wav"]),
    ],
)
def test_example_runs(
    name: str,
    args: list[str],
    folder: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = runpy.run_path(str(root / "examples" / f"{name}.py"))["main"]
    monkeypatch.chdir(folder)
    main(*args, "model")
    assert capsys.readouterr().out.strip()
    assert "out.wav" not in args or audio.read("out.wav").shape[1] > 1920


def test_tasks_are_values_by_name() -> None:
    assert list(TASKS) == ["chat", "asr", "tts"]
    assert all(task.name == name for name, task in TASKS.items())
