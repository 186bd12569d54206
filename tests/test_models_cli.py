"""`moshi models` and `moshi doctor`: facts without loading or downloading anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_LM, TINY_MIMI
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli import doctor, session
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, save

Invoke = Callable[..., Any]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command, with an empty cache and without a built-in model."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOSHI_MODEL", raising=False)
    monkeypatch.setattr(session, "BUILTIN", tmp_path / "builtin")
    monkeypatch.setattr("moshi_cli.model_facts.BUILTIN", tmp_path / "builtin")
    return lambda *args: CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    config = ModelConfig(
        mimi=TINY_MIMI, lm=TINY_LM, lags={"asr": 0.5, "chat": 0.0}, text_file="text.model"
    )
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


def records(done: Any) -> dict[str, dict[str, Any]]:
    """JSON lines on stdout by name."""
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_list(invoke: Invoke, model: Model, tmp_path: Path) -> None:
    lines = invoke("models", "list").stdout.splitlines()
    assert lines[0].split() == ["name", "does", "size", "here"]
    assert "stt-1b     asr, codec   2.36 GB   no" in lines
    save(model, tmp_path / "cache" / "models--me--mine" / "snapshots" / "abc")
    save(model, tmp_path / "cache" / "models--kyutai--mimi" / "snapshots" / "abc")
    save(model, tmp_path / "builtin")
    (tmp_path / "cache" / "models--someone--else" / "snapshots" / "abc").mkdir(parents=True)
    rows = {
        r["name"]: r
        for r in map(json.loads, invoke("models", "list", "--json").stdout.splitlines())
    }
    assert [n for n, row in rows.items() if row["here"]] == ["built-in", "mimi", "me/mine"]
    assert rows["me/mine"]["tasks"] == ["asr", "chat", "codec"]


@pytest.mark.parametrize(
    ("name", "lm", "tasks"),
    [
        ("moshi-7b", 7_687_729_152, ["chat", "codec"]),
        ("stt-2.6b", 2_617_118_720, ["asr", "codec"]),
        ("kyutai/tts-1.6b-en_fr", 1_836_550_272, ["tts", "codec"]),
    ],
)  # fmt: skip
def test_facts_of_published_models(invoke: Invoke, name: str, lm: int, tasks: list[str]) -> None:
    facts = json.loads(invoke("models", "info", name, "--json").stdout)
    assert (facts["lm_parameters"], facts["tasks"]) == (lm, tasks)
    assert facts["codec_parameters"] == 96_151_393
    assert "CC-BY 4.0" in facts["licence"]
    assert "lag s:" in invoke("models", "info", name).stdout


def test_facts_of_a_folder(invoke: Invoke, model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\nKnows nothing.\n")
    for args in ([tmp_path / "m"], ["-m", tmp_path / "m"]):
        facts = json.loads(invoke("models", "info", *args, "--json").stdout)
        assert (facts["licence"], facts["card"]) == ("mit", "# Tiny\nKnows nothing.")
        assert facts["lag_s"] == {"asr": 0.5, "chat": 0.0}
        assert facts["lm_parameters"] == sum(p.numel() for p in model.lm.parameters())
    assert invoke("models", "info", tmp_path / "m").stdout.endswith("\n\n# Tiny\nKnows nothing.\n")


def test_facts_of_the_built_in_model(invoke: Invoke, model: Model, tmp_path: Path) -> None:
    done = invoke("models", "info")
    assert done.exit_code == 4
    assert "this installation has no built-in model" in done.stderr
    save(model, tmp_path / "builtin")
    facts = json.loads(invoke("models", "info", "--json").stdout)
    assert (facts["name"], facts["tasks"]) == ("built-in", ["asr", "chat", "codec"])


def test_models_that_are_not_there(invoke: Invoke) -> None:
    for name in ("nonsense", "no/such"):
        done = invoke("models", "info", name)
        assert done.exit_code == 4
        assert len(done.stderr.splitlines()) <= 2


def test_doctor(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "NO built-in model   none" in done.stdout
    (tmp_path / "builtin").mkdir()
    done = invoke("doctor", "--json")
    assert done.exit_code == 0
    rows = records(done)
    assert rows["torch"]["status"] == rows["device"]["status"] == "ok"
    assert rows["ffmpeg"]["status"] in ("ok", "missing")


def test_doctor_names_what_is_missing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.NEEDED, "no-such-package", "nothing")
    assert "NO no-such-package  none  (needed for nothing)" in invoke("doctor").stdout
