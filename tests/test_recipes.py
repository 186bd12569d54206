"""Recipes: YAML over stages, settings, and what is said when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks import plans
from moshi_cli.tasks.recipes import Recipe, dump, load
from moshi_cli.tasks.stages import STAGES, CodecStage, LmStage, Shape, Source

TEXT = """\
stage: pretrain
name: mine
lr: 2e-3                    # a string, says YAML
losses: {text: 3, pad: null}
mix:
  - folder: codes
    form: takes
  - {folder: other, weight: 2, kinds: [world]}
shapes: [{window_s: 4, batch: 8}]
model:
  preset: moshi-nano
  lm: {temporal: {dim: 32}}
run: {keep: 3, output: out}
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_is_put_over_its_stage(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, TEXT), ["run.keep=4", "mix.0.weight=3", "losses.audio=0.5"])
    stage, base = recipe.stage, STAGES["pretrain"]
    assert isinstance(stage, LmStage)
    assert isinstance(base, LmStage)
    assert (stage.name, stage.lr, stage.steps) == ("mine", 2e-3, base.steps)
    assert stage.losses == {"text": 3.0, "audio": 0.5, "semantic": 100.0, "acoustic": 1.0}
    assert stage.mix == (Source("codes", weight=3.0), Source("other", weight=2.0, kinds=("world",)))
    assert stage.shapes == (Shape(4.0, 8),)
    assert stage.lag_range_s == base.lag_range_s
    assert recipe.model.lm == {"temporal": {"dim": 32}}
    assert (recipe.run.keep, recipe.folder) == (4, Path("out"))


@pytest.mark.parametrize("name", STAGES)
def test_what_is_dumped_loads_again(name: str, tmp_path: Path) -> None:
    shape = ["model.preset=moshi-nano", "model.lm.temporal.dim=32"]
    recipe = load(name, ["losses.pad=null", "mix=[{folder: a}]", "minutes=3", *shape])
    (tmp_path / "config.yaml").write_text(dump(recipe))
    assert load(str(tmp_path)) == recipe
    assert "pad" not in recipe.stage.losses


def test_a_name_alone_is_a_recipe() -> None:
    assert load("codec") == Recipe("codec", STAGES["codec"])
    assert isinstance(load("codec").stage, CodecStage)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("stage: pretrane", "a.yaml:1: there is no stage 'pretrane'", "'pretrain'"),
        ("lr: 1", "does not say `stage: NAME`", "codec"),
        ("stage: text\nlearning: 1\nstep: 2", "a.yaml:2: unknown key 'learning'", ""),
        ("stage: text\n\nwarmup_step: 2", "a.yaml:3: unknown key 'warmup_step'", "'warmup_steps'"),
        ("stage: text\nrun:\n  keeps: 3", "a.yaml:3: unknown key 'run.keeps'", "'keep'"),
        ("stage: text\nmix: [{folder: a, wait: 3}]", "unknown key 'mix.0.wait'", "'weight'"),
        ("stage: text\nmix: [{weight: 3}]", "mix.0 lacks 'folder'", ""),
        ("stage: text\nmix: {folder: a}", "mix must be a list", ""),
        ("stage: text\nsteps: 1.5", "a.yaml:2: steps must be a whole number", ""),
        ("stage: text\nlr: fast", "a.yaml:2: lr must be a number", ""),
        ("stage: text\nlr: yes", "a.yaml:2: lr must be a number", ""),
        ("stage: text\nbf16: 3", "bf16 must be true or false", ""),
        ("stage: text\nbetas: [0.9]", "betas must be a list of 2", ""),
        ("stage: text\nlosses: {texts: 1}", "there is no loss 'texts'", "'text'"),
        ("stage: codec\nlosses: {text: 1}", "there is no loss 'text'", ""),
        ("stage: text\naccumulate: 0", "accumulate must be at least 1", ""),
        ("stage: text\nhide: 1.5", ":2: hide must be from 0 to 1", ""),
        ("stage: codec\ndropout: -0.1", ":2: dropout must be from 0 to 1", ""),
        ("stage: text\ngaps: 1", ":2: gaps must leave something to hear", ""),
        ("stage: text\ndropout: 1", ":2: dropout must leave something of a layer", ""),
        ("stage: text\nlr: -1", "lr must not be negative", ""),
        ("stage: text\nrun: {parallel: ddq}", "cannot be 'ddq'", "'ddp'"),
        ("stage: text\nmodel: {lm: {n_q: 2}}", "only a preset's shape", "model.preset"),
        ("stage: text\nshapes: []", "shapes need", ""),
        ("- a", "not a mapping", "stage: NAME"),
        ("stage: [", "a.yaml:1: not YAML", ""),
    ],
)
def test_errors_name_the_line(text: str, said: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(written(tmp_path, text))
    assert said in str(caught.value)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lr", "not of the form key=value"),
        ("lrr=1", "--set lrr: unknown key 'lrr'"),
        ("mix.1.folder=a", "the list has 0 entries"),
        ("lr.a=1", "--set lr.a: lr must be a number"),
    ],
)
def test_settings_are_checked(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load("text", [setting])


def test_nothing_of_this_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file 'codex', and no stage") as caught:
        load("codex")
    assert caught.value.hint == "did you mean 'codec'?"
    with pytest.raises(UsageError, match="a folder without config"):
        load(str(tmp_path))


FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted((FOLDER / "train").glob("*.yaml"))
BUILTIN = [p for p in sorted((FOLDER / "train_builtin").glob("*.yaml")) if p.stem != "codes"]


@pytest.mark.parametrize("path", EXAMPLES + BUILTIN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_examples_are_recipes(path: Path) -> None:
    recipe = load(str(path))
    assert recipe.stage.name == path.stem == recipe.folder.name
    assert recipe.stage.mix


def test_the_plan_of_the_built_in_model() -> None:
    plan = plans.load(FOLDER / "train_builtin" / "codes.yaml")
    assert plan.takes["moshi-answer"][0].count == 6
    assert [window.flow.rest for window in plan.windows] == [0.0, 0.0, 0.4, 0.0, 0.4]
    assert [window.flow.excerpt for window in plan.windows] == [0.9, 0, 0, 0, 0]
    assert plan.windows[1].flow.odds == plan.windows[2].flow.odds


def test_every_stage_has_an_example() -> None:
    assert {load(str(path)).base for path in EXAMPLES} == STAGES.keys()
