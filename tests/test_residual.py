"""What codes leave of a given voice: heard beside them, in streaming as in training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import weights
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import InputError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import join_shifted
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.presets import MOSHI_NANO
from moshi_cli.core.streams import DelayPattern, Role, Task
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks.asr import ASR
from moshi_cli.tasks.cache import REST, Cache, Clip, Take, Variant, write_cache
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.data import Pack
from moshi_cli.tasks.excerpts import Excerpts
from moshi_cli.tasks.inspection import inspect_cache
from moshi_cli.tasks.likelihood import Examiner, Scene
from moshi_cli.tasks.lm_objective import LmObjective
from moshi_cli.tasks.samples import Samples
from moshi_cli.tasks.seeding import seed_embeddings, seed_residual
from moshi_cli.tasks.stages import LmStage, Shape, Source

FRAME = 1920
HEARING = replace(TINY_LM, residual=TINY_MIMI.quantizer.dim)
WIDTH = 2 * TINY_MIMI.quantizer.dim
LAGS = {"asr": 0.24, "tts": -0.16, "chat": 0.0}


@pytest.fixture
def hearing(tiny_mimi: Mimi) -> Model:
    """The tiny model with ears for it."""
    lm = MoshiLm(HEARING).eval().requires_grad_(False)
    return Model(tiny_mimi, lm, None, ModelConfig(mimi=TINY_MIMI, lm=HEARING), "tiny")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Questions, answers in the own voice, and a stranger; noise, so that codes leave something."""
    folder, offset = tmp_path / "pack", 0
    folder.mkdir()
    kinds = [("question", 0), ("moshi-answer", 0), ("world", None), ("moshi-world", None)]
    with (folder / "index.jsonl").open("w") as index:
        for i, (kind, qa) in enumerate(kinds):
            words = [["one", 0.1, 0.4], ["two", 0.5, 0.8]]
            row = {
                "id": f"c{i}", "kind": kind, "text": "one two", "words": words,
                "offset_samples": offset, "samples": (12 + i) * FRAME,
            }  # fmt: skip
            index.write(json.dumps(row | ({} if qa is None else {"qa": qa})) + "\n")
            offset += (12 + i) * FRAME
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, offset)
    (noise * 32767).astype(np.int16).tofile(folder / "pcm.i16")
    return folder


def write(mimi: Mimi, pack: Path, folder: Path, *, residual: bool, rows: int = 4) -> Path:
    source = Pack(pack)
    jobs = [Clip(source, row, Variant()) for row in source.rows][:rows]
    write_cache(mimi, jobs, folder, residual=residual)
    return folder


def whole(mimi: Mimi, codes: Tensor, residual: Tensor) -> Tensor:
    """Both as the latent's projections [B, 2 · dim, T]."""
    vq = mimi.quantizer
    first = vq.config.semantic
    totals = [vq.semantic.total(codes[:, :first]), vq.acoustic.total(codes[:, first:])]
    return torch.cat([t.transpose(1, 2) for t in totals], 1) + residual


def test_codes_and_residual_are_the_latent(tiny_mimi: Mimi) -> None:
    wav = torch.rand(2, 1, 5 * FRAME) - 0.5
    codes, residual = tiny_mimi.encode_whole(wav)
    assert torch.equal(codes, tiny_mimi.encode(wav))
    latent, vq = tiny_mimi.encode_latent(wav), tiny_mimi.quantizer
    projected = torch.cat([vq.semantic.input_proj(latent), vq.acoustic.input_proj(latent)], 1)
    torch.testing.assert_close(whole(tiny_mimi, codes, residual), projected)
    tiny_mimi.set_num_codebooks(1)
    assert not tiny_mimi.encode_whole(wav)[1][:, WIDTH // 2 :].any()


@pytest.mark.parametrize("task", [ASR, CHAT, Task("back", Role.SAMPLED, Role.GIVEN, lag_s=-0.25)])
def test_engine_hears_what_training_hears(
    hearing: Model, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    wav = torch.rand(1, 1, 6 * FRAME) - 0.5
    pattern = DelayPattern.of(task, HEARING)
    residual = hearing.mimi.encode_whole(wav)[1]
    grid = torch.zeros(1, HEARING.streams, 6, dtype=torch.long)
    expected = pattern.shift(grid, 7, residual).residual
    assert expected is not None and hearing.lm is not None
    heard: list[Tensor] = []
    temporal = hearing.lm.temporal

    def listen(*args: Tensor) -> tuple[Tensor, Tensor]:
        heard.append(args[4].clone())
        return temporal(*args)

    monkeypatch.setattr(hearing.lm, "temporal", listen)
    engine = Engine(hearing, task, 2)
    for attempt in range(2):  # a slot that is opened again has forgotten what it heard
        heard.clear()
        engine.open(0, prime=False)
        engine.step(active=torch.tensor([True, False]))
        for t in range(6):
            for active in (False, True):  # a pause before every frame
                pcm = torch.zeros(2, 1, FRAME)
                pcm[0] = wav[0, :, t * FRAME : (t + 1) * FRAME]
                engine.step(pcm, torch.tensor([active, False]))
        steps = torch.stack([heard[0], *heard[2::2]], 2)[0, 0]  # [S, 2 · dim]
        torch.testing.assert_close(steps.T, expected[0], atol=1e-5, rtol=1e-4, msg=str(attempt))
    assert expected.abs().sum() > 0


def test_what_is_heard_matters_and_codes_alone_do(hearing: Model) -> None:
    assert hearing.lm is not None
    inputs = torch.randint(16, (1, HEARING.streams, 5))
    deaf = hearing.lm.temporal(inputs)[0]
    torch.testing.assert_close(
        deaf, hearing.lm.temporal(inputs, residual=torch.zeros(1, 5, WIDTH))[0]
    )
    other = hearing.lm.temporal(inputs, residual=torch.ones(1, 5, WIDTH))[0]
    assert (deaf - other).abs().max() > 1e-3
    engine = Engine(hearing, ASR, 1)
    engine.open(0)
    engine.step(codes=torch.zeros(1, 4, dtype=torch.long))  # codes can still be given


@pytest.mark.parametrize("low_rank", [None, 12])
def test_seeded_tables_hear_the_latent(tiny_mimi: Mimi, low_rank: int | None) -> None:
    lm = MoshiLm(replace(TINY_LM, low_rank=low_rank))
    seed_embeddings(lm, tiny_mimi, torch.Generator().manual_seed(0))
    seed_residual(lm, tiny_mimi)
    assert lm.config.residual == TINY_MIMI.quantizer.dim and lm.residual is not None
    wav = torch.rand(1, 1, 5 * FRAME) - 0.5
    codes, residual = tiny_mimi.encode_whole(wav)
    worse = torch.randint(16, codes.shape)
    sums = [whole(tiny_mimi, worse, torch.zeros(1, WIDTH, 5)), whole(tiny_mimi, codes, residual)]
    text = torch.full((1, 1, 5), -1)
    partner = torch.full((1, 4, 5), -1)

    def x(codes: Tensor, residual: Tensor) -> Tensor:
        assert lm.residual is not None
        grid = torch.cat([text, codes, partner], 1)
        return lm.embed(grid) + lm.residual(residual.transpose(1, 2))

    torch.testing.assert_close(
        x(codes, residual), x(worse, sums[1] - sums[0]), atol=1e-4, rtol=1e-3
    )


def test_cache_keeps_it(tiny_mimi: Mimi, pack: Path, tmp_path: Path) -> None:
    folder = write(tiny_mimi, pack, tmp_path / "codes", residual=True)
    cache, plain = Cache(folder, 4, WIDTH), Cache(folder, 4)
    take = cache.takes[1]
    voice = cache.read(take, 2, 5)
    assert voice.shape == (4 + WIDTH, 5)
    assert torch.equal(voice[:4].long(), plain.read(take, 2, 5))
    assert plain.read(take).dtype == torch.long
    nothing = cache.nothing(3)
    assert (nothing[:4] == -1).all() and not nothing[4:].any()
    # stopped half-way, with a row of each file begun
    part = write(tiny_mimi, pack, tmp_path / "part", residual=True, rows=2)
    for name in ("codes.i16", REST):
        with (part / name).open("ab") as file:
            file.write(b"\1" * 77)
    write(tiny_mimi, pack, part, residual=True)
    for name in ("codes.i16", REST, "index.jsonl"):
        assert (part / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(InputError, match="residual"):
        write(tiny_mimi, pack, part, residual=False)
    bare = write(tiny_mimi, pack, tmp_path / "bare", residual=False)
    assert not (bare / REST).exists()
    with pytest.raises(InputError, match=r"0 numbers a frame .* the model hears 16"):
        Cache(bare, 4, WIDTH)
    assert all(isinstance(found, Take) for found in inspect_cache(part))
    (part / REST).write_bytes(b"\1" * 32)
    told = [found for found in inspect_cache(part) if not isinstance(found, Take)]
    assert [(p.kind, Path(p.where).name) for p in told] == [("residual", REST)]
    with pytest.raises(InputError, match=f"{REST} is shorter"):
        Cache(part, 4, WIDTH)


def test_samples_give_it_for_the_voice_that_is_given(
    tiny_mimi: Mimi, pack: Path, tmp_path: Path, tiny_text: Text
) -> None:
    folder = write(tiny_mimi, pack, tmp_path / "codes", residual=True)
    cache = Cache(folder, 4, WIDTH)
    known = torch.cat([cache.read(take)[4:] for take in cache.takes], 1).T  # [N, 2 · dim]
    samples = Samples(cache, tiny_text, HEARING, LAGS)
    for name in ("asr", "tts", "chat"):
        residual = samples.grid(name, 30, torch.Generator().manual_seed(1))[1]
        assert residual.shape == (WIDTH, 30)
        assert bool(residual.any()) == (name != "tts")
        there = residual.T[residual.T.any(1)]
        assert all((known == row).all(1).any() for row in there)
    take = cache.takes[0]
    asr = Excerpts([take], cache, tiny_text, HEARING, ASR)
    grid, residual = asr.grid(take.frames, torch.Generator().manual_seed(0))
    assert torch.equal(residual, cache.read(take)[4:])
    batch = asr.batch(take.frames, 1, torch.Generator().manual_seed(0))
    pattern = DelayPattern.of(ASR, HEARING)
    expected = pattern.shift(grid[None], take.frames, residual[None]).residual
    assert batch.shifted.residual is not None and expected is not None
    assert torch.equal(batch.shifted.residual, expected)
    deaf = Excerpts([take], Cache(folder, 4), tiny_text, TINY_LM, ASR)
    assert deaf.batch(9, 1, torch.Generator().manual_seed(0)).shifted.residual is None
    both = join_shifted([deaf.batch(9, 1, torch.Generator()).shifted, batch.shifted])
    assert both.residual is not None and not both.residual[0].any()


def test_training_hides_it_with_the_codes(
    tiny_mimi: Mimi, pack: Path, tmp_path: Path, tiny_text: Text
) -> None:
    folder = write(tiny_mimi, pack, tmp_path / "codes", residual=True)
    samples = Samples(Cache(folder, 4, WIDTH), tiny_text, HEARING, LAGS)
    stage = LmStage(
        name="lm", mix=(Source(str(folder)),), shapes=(Shape(1.6, 16),), lag_s=LAGS,
        tasks={"asr": 1.0, "tts": 0.0, "chat": 1.0}, hide=0.2, narrow_given=0.5,
    )  # fmt: skip
    objective = LmObjective(stage, MoshiLm(HEARING), samples)
    (batch,) = objective.draw(0).batches
    s = batch.shifted
    assert s.residual is not None
    heard = s.residual.unflatten(1, (2, -1)).any(2)  # [B, 2, S]
    for row, name in enumerate(batch.names):
        rows = slice(1, 5) if name == "asr" else slice(5, 9)
        seen = (s.inputs[row, rows] >= 0) & (s.inputs[row, rows] < 16)
        if not seen.any(1).all():  # a codebook that is hidden throughout
            assert not heard[row].any()
    assert 0.2 < float(heard.float().mean()) < 0.8
    lost = objective.backward(0, 0.0)
    assert np.isfinite(lost["loss"])
    lm = objective.lm
    assert lm.residual is not None and lm.residual.weight.grad is not None
    assert lm.residual.weight.grad.abs().sum() > 0


def test_likelihood_hears_it(hearing: Model, tiny_text: Text) -> None:
    assert hearing.lm is not None
    codes, residual = hearing.mimi.encode_whole(torch.rand(1, 1, 9 * FRAME) - 0.5)
    words = (("one", 0.1, 0.3), ("two", 0.4, 0.6))
    examiner = Examiner(hearing.lm, tiny_text, ASR)
    with_it, without = (
        examiner.examine([Scene(codes, words, r)])[0]["text"][0] for r in (residual, None)
    )
    assert with_it != without


def test_a_model_learns_it_by_one_word_in_a_recipe(
    tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text, pack: Path, tmp_path: Path
) -> None:
    local = {"mimi_file": "mimi.safetensors", "mimi_config_file": "mimi.json"}
    files = {"lm_file": "model.safetensors", "text_file": "text.model", **local}
    config = ModelConfig(mimi=TINY_MIMI, lm=TINY_LM, lags=LAGS, **files)  # type: ignore[arg-type]
    weights.save(Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny"), tmp_path / "model")
    assert "residual_dim" not in json.loads((tmp_path / "model" / "config.json").read_text())
    done = CliRunner().invoke(cli.app, [
        "data", "encode", str(pack), "--model", str(tmp_path / "model"), "--residual",
        "-o", str(tmp_path / "codes"), "--layout", "mono",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    recipe = {
        "stage": "finetune", "name": "ears", "residual": True, "steps": 2, "warmup_steps": 1,
        "mix": [{"folder": str(tmp_path / "codes"), "form": "asr"}],
        "shapes": [{"window_s": 0.8, "batch": 2}],
        "model": {"model": str(tmp_path / "model")},
        "run": {"output": str(tmp_path / "run"), "device": "cpu"},
    }  # fmt: skip
    (tmp_path / "ears.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "ears.yaml")])
    assert done.exit_code == 0, done.output
    made = weights.load(tmp_path / "run" / "model", device="cpu")
    assert made.lm is not None and made.lm.residual is not None
    assert made.config.lm == replace(TINY_LM, residual=8)
    assert made.lm.residual.weight.abs().sum() > 0


def test_published_layouts_do_not_name_it() -> None:
    assert "residual_dim" not in MOSHI_NANO.to_kyutai() or MOSHI_NANO.lm.residual  # type: ignore[union-attr]
    data = replace(MOSHI_NANO, lm=replace(MOSHI_NANO.lm, residual=64)).to_kyutai()  # type: ignore[type-var]
    assert ModelConfig.from_kyutai(data).lm.residual == 64  # type: ignore[union-attr]
