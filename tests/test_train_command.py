"""`moshi train`: from a recipe to a model, told, resumed and refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_LM
from test_teachers import model_bin, whisper_values, write_bin
from torch import Tensor
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli import train_jobs
from moshi_cli.core import weights
from moshi_cli.core.errors import MoshiError
from moshi_cli.session import BUILTIN
from moshi_cli.tasks import benchmark, curves
from moshi_cli.tasks.cache import Cache, Clip, Variant, write_cache
from moshi_cli.tasks.data import Pack
from moshi_cli.tasks.recipes import load

FRAME = 1920
CODEC = {
    "seanet": {"dim": 16, "filters": 2},
    "transformer": {"dim": 16, "heads": 2, "layers": 1, "ff": 32, "context": 8},
    "quantizer": {"dim": 8, "codebooks": 4, "size": 16},
}
STACK = {"dim": 16, "heads": 2, "layers": 1, "ff": 32}
LM = {
    "temporal": {**STACK, "context": 12},
    "depth": {**STACK, "schedule": [0, 1, 1, 1], "inputs": [0, 1, 1, 1], "low_rank": None},
    "n_q": 8, "dep_q": 4, "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1], "low_rank": None,
    "codebook_size": 16,
}  # fmt: skip


def moshi(*args: object) -> Any:
    return CliRunner().invoke(cli.app, ["train", *map(str, args)])


class Hearer:
    """Who understands what is said first better than what is said later."""

    def __init__(self, folder: Path) -> None: ...

    def hear(self, sounds: Tensor, texts: list[list[str]]) -> list[list[float]]:
        return [[-1.0 - i] * len(text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of tones with words, and a recipe for a tiny codec on it."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "pack").mkdir()
    rows = [("question", "say one"), ("moshi-answer", "one"), ("world", "three four")]
    with (folder / "pack" / "index.jsonl").open("w") as index:
        for i, (kind, text) in enumerate(rows):
            row = {
                "id": f"c{i}", "kind": kind, "text": text, "offset_samples": i * 16 * FRAME,
                "words": [[w, 0.2 + 0.4 * j, 0.5 + 0.4 * j] for j, w in enumerate(text.split())],
                "samples": 16 * FRAME, "qa": 0,
            }  # fmt: skip
            index.write(json.dumps(row) + "\n")
    time = np.arange(48 * FRAME) / 24_000
    wave = np.sin(time * 1500 + 3 * np.sin(time * 9)) * (0.3 + 0.2 * np.sin(time * 5))
    (wave * 32767).astype(np.int16).tofile(folder / "pack" / "pcm.i16")
    recipe = {
        "stage": "codec", "mix": [{"folder": str(folder / "pack")}], "steps": 4, "warmup_steps": 1,
        "shapes": [{"window_s": 0.32, "batch": 4}], "quantize_from": 0.25, "critics_from": 1.0,
        "model": {"preset": "moshi-nano", "codec": CODEC},
        "run": {"output": str(folder / "codec"), "log_every": 2, "device": "cpu"},
    }  # fmt: skip
    (folder / "codec.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> Path:
    """A run of the codec's stage, in two parts."""
    begun = moshi(folder / "codec.yaml", "--stop-after", 1)
    assert begun.exit_code == 0, begun.output
    assert begun.stdout.strip().endswith("step-00000001")
    refused = moshi(folder / "codec.yaml")
    assert refused.exit_code == 1
    assert "already holds a run" in refused.stderr
    done = moshi(folder / "codec", "--resume", "--set", "lr=1e-3")
    assert done.exit_code == 0, done.output
    assert "lr was 0.0003 in this run and is 0.001 now" in done.stderr
    assert Path(done.stdout.strip()) == folder / "codec" / "model"
    return folder / "codec"


@pytest.fixture(scope="module")
def recipe(folder: Path, codec: Path) -> Path:
    """A recipe for a tiny language model on codes of that codec."""
    mimi = weights.load(codec / "model", device="cpu").mimi
    pack = Pack(folder / "pack")
    write_cache(mimi, [Clip(pack, row, Variant()) for row in pack.rows], folder / "codes")
    path = folder / "lm.yaml"
    recipe = {
        "stage": "finetune", "name": "small", "mix": [{"folder": str(folder / "codes")}],
        "tasks": {"asr": 1, "tts": 1, "chat": None}, "steps": 4, "lr": "3e-3", "warmup_steps": 1,
        "shapes": [{"window_s": 1.6, "batch": 2}], "ema": 0.5, "acoustic_delay": 2,
        "freeze": ["lm.text_emb*"],
        "model": {"preset": "moshi-nano", "lm": LM, "mimi": str(codec / "model")},
        "run": {"output": str(folder / "lm"), "log_every": 2, "device": "cpu"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_codec(codec: Path) -> None:
    model = weights.load(codec / "model", device="cpu")
    assert model.lm is None
    assert model.mimi.quantizer.fitted
    rows = curves.read_metrics(codec)
    assert [row["step"] for row in rows] == [2, 4]
    assert "mel" in rows[-1]


def test_codebooks_without_values_are_told(codec: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((codec.parent / "codec.yaml").read_text())
    recipe["quantize_from"], recipe["steps"] = 0.99, 2
    recipe["run"]["output"] = str(tmp_path / "run")
    path = tmp_path / "codec.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = moshi(path)
    assert done.exit_code == 0, done.output
    assert "the codebooks have no values" in done.stderr


def test_dry_run_is_a_recipe_and_what_it_needs(recipe: Path) -> None:
    done = moshi(recipe, "--dry-run", "--set", "accumulate=2")
    assert done.exit_code == 0, done.output
    whole = yaml.safe_load(done.stdout)
    assert (whole["stage"], whole["accumulate"], whole["lr"]) == ("finetune", 2, 3e-3)
    for said in ("lm.text_emb ", "frozen", "(takes)", "memory: ", "per checkpoint"):
        assert said in done.stdout, said
    assert not (recipe.parent / "lm").exists()


def test_a_language_model_can_be_used_at_once(recipe: Path, codec: Path) -> None:
    done = moshi(recipe, "--progress", "json")
    assert done.exit_code == 0, done.output
    progress = [json.loads(x) for x in done.stderr.splitlines() if x.startswith('{"type"')]
    assert [line["step"] for line in progress] == [2, 4]
    assert progress[-1]["tokens_per_s"] > 0
    made = Path(done.stdout.strip())
    model = weights.load(made, device="cpu")
    assert model.lm is not None
    assert model.lm.config.delays == (0, 0, 2, 2, 2, 0, 2, 2, 2)
    assert set(model.config.lags) >= {"asr", "tts"}
    (made.parent / "losses.png").unlink(missing_ok=True)
    if curves.draw(made.parent) is not None:
        assert (made.parent / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["codecs"], 2, "no file 'codecs', and no stage of this name"),
        (["codec"], 2, "stage codec: the mix is empty"),
        (["codec", "--set", "steps=0"], 2, "--set steps: steps must be at least 1"),
        (["codec", "--set", "model.preset=nano"], 2, "there is no preset 'nano'"),
        (["text", "--set", "mix.0.folder=a", "--set", "mix.0.form=tex"], 2, "no form 'tex'"),
        (["finetune", "--set", "mix.0.folder=nowhere"], 2, "nowhere: not a cache of codes"),
        (["text", "--device", "cuda:9"], 4, "is not available"),
        (["codec", "--device", "cuda:9"], 4, "is not available"),
    ],
)
def test_errors_are_one_line(args: list[str], code: int, said: str) -> None:
    done = moshi(*args, "--dry-run")
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_changes_are_named_entry_by_entry() -> None:
    before = load("finetune", ["losses.pad=null"])
    after = load("finetune", ["casting.chatter=0.5", "losses.pad=null", "model.preset=moshi-nano"])
    assert train_jobs.changes(before, after) == [
        ("casting.chatter", 0.1, 0.5), ("model.preset", None, "moshi-nano"),
    ]  # fmt: skip


def test_the_built_in_recipe_from_sound_to_speech(
    folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, one after the other, with a smaller model and fewer steps."""
    recipes = root / "examples" / "train_builtin"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "pack", "pack")
    write_bin(tmp_path / "whisper", model_bin(whisper_values()))
    features = ["data", "features", "pack", "--teacher", "whisper:whisper"]
    assert CliRunner().invoke(cli.app, features).exit_code == 0
    (tmp_path / "text.model").write_bytes((BUILTIN / "text.model").read_bytes())
    words = {w for row in Pack("pack").rows for w, _, _ in row.words}
    (tmp_path / "lexicon.tsv").write_text("".join(f"{w}\t{w}{w}\n" for w in words))
    small = ["steps=4", "minutes=null", "warmup_steps=1", "run.log_every=2"]
    small.append("shapes=[{window_s: 1.28, batch: 2}]")

    def run(name: str, *more: str) -> Path:
        settings = [part for text in (*small, *more) for part in ("--set", text)]
        done = moshi(recipes / f"{name}.yaml", *settings)
        assert done.exit_code == 0, done.output
        return Path(done.stdout.strip())

    shape = f"model.codec={json.dumps(CODEC)}"
    first = run("codec", shape, "quantize_from=0.5")  # the last of four steps is at 0.75
    assert weights.load(first, device="cpu").mimi.quantizer.fitted
    assert {"distillation", "envelope", "pitch", "letters"} <= curves.read_metrics(first.parent)[
        -1
    ].keys()
    refitted = run("codebooks", "fit_frames=8")
    before, after = (
        weights.load(path, device="cpu").mimi.quantizer.acoustic for path in (first, refitted)
    )
    assert not torch.equal(before.books[-1].centroids, after.books[-1].centroids)
    assert torch.equal(before.input_proj.weight, after.input_proj.weight)
    ear = "losses.listener=1"
    deaf = moshi(recipes / "decoder.yaml", "--set", shape, "--set", ear)
    assert deaf.exit_code == 2 and "the loss `listener` needs a listener" in deaf.stderr
    second = run("decoder", shape, ear, "listener=whisper")
    assert curves.read_metrics(second.parent)[-1]["listener"] > 0
    old, new = (weights.load(path, device="cpu").mimi.state_dict() for path in (refitted, second))
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed and all(key.startswith(("decoder", "upsample")) for key in changed)
    monkeypatch.syspath_prepend(str(recipes))
    recode = importlib.import_module("recode")
    monkeypatch.setattr(recode, "HELD_OUT", 8)
    monkeypatch.setattr(recode, "LISTENED", 96)
    first = tmp_path / "runs" / "recoded"
    line = f"recode {second} {first} pack --listener whisper"
    monkeypatch.setattr(sys, "argv", f"{line} --frames 512".split())
    recode.main()
    assert "runs/decoder/model runs/recoded pack --listener" in (recipes / "train.sh").read_text()
    model = weights.load(first, device="cpu")
    assert not torch.equal(after.input_proj.weight, model.mimi.quantizer.acoustic.input_proj.weight)
    old = model.mimi.state_dict()
    plan = tmp_path / "codes.yaml"
    encode = ["pack", "--plan", plan, "-o", "codes/whole", "-m", first, "--residual"]
    small_plan = yaml.safe_load((recipes / "codes.yaml").read_text())
    for windows in small_plan["windows"]:
        windows["count"] = 2
    plan.write_text(yaml.safe_dump(small_plan))
    done = CliRunner().invoke(cli.app, ["data", "encode", *map(str, encode)])
    assert done.exit_code == 0, done.output
    run("hear", shape, f"model.lm={json.dumps(LM)}", "spelled_by=1", "compile=false")
    assert curves.read_metrics(tmp_path / "runs" / "hear")[-1]["letters"] > 0
    learnt = run("lm", "spelled_by=1", "compile=false")
    third = run("voice", shape, "listener=whisper", "mix=[{folder: pack, kinds: [moshi]}]")
    new = weights.load(third, device="cpu").mimi.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed and all(key.startswith(("decoder", "upsample")) for key in changed)
    spoken = tmp_path / "runs" / "spoken"
    convert = ["models", "convert", learnt, "--mimi-weight", third / "model.safetensors"]
    done = CliRunner().invoke(cli.app, [*map(str, convert), "-o", str(spoken), "--store", "fp32"])
    assert done.exit_code == 0, done.output
    choose = importlib.import_module("choose")
    monkeypatch.setattr(choose, "Ear", Hearer)
    monkeypatch.setattr(sys, "argv", f"choose {spoken} whisper codes codes/clear".split())
    choose.main()
    assert 'choose.py" runs/spoken whisper codes codes/clear' in (recipes / "train.sh").read_text()
    answers = [t for t in Cache("codes", 4).takes if t.kind.startswith("moshi-answer")]
    clear = [t for t in answers if t.kind == "moshi-answer-clear"]
    assert {t.text for t in clear} == {t.text for t in answers} and len(clear) < len(answers)
    aloud = run("aloud", "spelled_by=1", "compile=false")
    convert = ["models", "convert", aloud, "-o", "out", "--store", "int8", "--codec-store", "fp16"]
    done = CliRunner().invoke(cli.app, [*map(str, convert)])
    assert done.exit_code == 0, done.output
    assert "runs/voice/model/model.safetensors" in (recipes / "train.sh").read_text()
    spoken = tmp_path / "out"
    assert set(weights.load(spoken, device="cpu").config.lags) == {"asr", "tts", "chat"}


def test_a_run_that_logged_nothing_has_no_curves(tmp_path: Path) -> None:
    assert curves.read_metrics(tmp_path) == []
    assert curves.draw(tmp_path) is None


def test_curves_are_grouped(tmp_path: Path) -> None:
    rows = [{"step": i, "text/loss": 1.0 / i, "norm/lm": 2.0, "steps_per_s": 1} for i in (1, 2, 3)]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 4, "te'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert list(curves.curves(curves.read_metrics(tmp_path))) == [
        "text/loss", "norm/lm", "steps_per_s",
    ]  # fmt: skip
    assert curves.smoothed([1.0, 1.0, 1.0]) == [1.0] * 3


def test_tensorboard_gets_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MoshiError, match="needs the package tensorboard"):
        curves.board(tmp_path)
    seen: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str):
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None:
            """Nothing is kept back."""

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    curves.board(tmp_path)({"step": 3, "loss": 0.5})
    assert seen == [("loss", 0.5, 3)]


def bench(*args: object) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "train", "--device", "cpu", *map(str, args)])


def test_bench_measures_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "shaped", lambda size: TINY_LM)
    done = bench("--widths", 16, "--batches", "1,2", "--lengths", 1, "--steps", 2, "--json")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["batch"], row["length_s"]) for row in rows] == [(1, 1.0), (2, 1.0)]
    assert all(row["frames_per_s"] > 0 and row["rss_mb"] for row in rows)
    refused = bench("--batches", "1,x")
    assert refused.exit_code == 2
    assert "'1,x' is not a list of numbers" in refused.stderr


def test_bench_keeps_the_shape_of_the_built_in_model() -> None:
    shape = benchmark.shaped(benchmark.Size(width=128, layers=2))
    assert (shape.temporal.dim, shape.temporal.heads, shape.temporal.layers) == (128, 2, 2)
    assert shape.dep_q == 8
