"""Spread over batches, workers and processes, a step of training stays the same."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_LM
from torch import Tensor, nn

from moshi_cli.core.config import TransformerConfig
from moshi_cli.core.errors import InputError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import learnable
from moshi_cli.core.streams import ZERO, DelayPattern
from moshi_cli.tasks import parallel
from moshi_cli.tasks.asr import ASR
from moshi_cli.tasks.lm_objective import LmObjective
from moshi_cli.tasks.mixture import Mixture
from moshi_cli.tasks.samples import LmBatch
from moshi_cli.tasks.stages import LmStage, Shape, Source
from moshi_cli.tasks.train import Run, checkpoints, read_tensors, train
from moshi_cli.tasks.tts import TTS
from moshi_cli.tasks.workers import Ahead

SMALL = replace(TINY_LM, temporal=TransformerConfig(dim=16, heads=2, layers=2, ff=32, context=12))
STAGE = LmStage(
    name="lm", mix=(Source("a"), Source("b", family="text")), shapes=(Shape(0.8, 4),), lr=1e-2,
    steps=4, warmup_steps=1, ema=0.9, hide=0.1, depth_share=0.7, clip=0.3, seed=3,
    family_rates={"text": {"lm.text*": 0.5}},
)  # fmt: skip


class Noise:
    """Rows of random tokens of a task; rows of text alone have no sound."""

    seconds = 1.0

    def __init__(self, spoken: bool):
        self.spoken = spoken

    def batch(self, frames: int, batch: int, generator: torch.Generator) -> LmBatch:
        task = TTS if torch.rand((), generator=generator) < 0.5 else ASR
        pattern = DelayPattern.of(replace(task, lag_s=0.0), SMALL)
        grid = torch.randint(4, 16, (batch, SMALL.streams, frames), generator=generator)
        grid[:, 0, ::2] = 3
        if not self.spoken:
            grid[:, 1:] = ZERO
        return LmBatch(
            learnable(pattern.shift(grid, frames), pattern), ["0"] * batch, ["x"] * batch
        )


def objective(stage: LmStage, workers: int = 0) -> LmObjective:
    """The same weights every time."""
    torch.manual_seed(0)
    mixture = Mixture(stage.mix, [Noise(True), Noise(False)])
    return LmObjective(stage, MoshiLm(SMALL), mixture, workers=workers)


def trained(stage: LmStage, folder: Path, **more: object) -> dict[str, Tensor]:
    """Everything in the last checkpoint."""
    made = objective(stage, int(str(more.pop("workers", 0))))
    path = train(stage, made, folder, **more).checkpoint  # type: ignore[arg-type]
    return {f"{p.stem}/{k}": v for p in path.iterdir() for k, v in read_tensors(p).items()}


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Equal but for the order of additions, of which AdamW makes much where gradients are tiny."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].shape == b[key].shape, key
        apart = (a[key] - b[key]).abs().mean().item()
        assert apart <= 1e-4 * a[key].abs().mean().item() + 1e-7, (key, apart)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    once = trained(STAGE, tmp_path / "once")
    parts = trained(replace(STAGE, shapes=(Shape(0.8, 1),), accumulate=4), tmp_path / "parts")
    close(once, parts)
    assert any(k.startswith("resume/optimizer:text/lm.text_linear") for k in once)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    again = trained(replace(STAGE, recompute=True), tmp_path / "again")
    close(trained(STAGE, tmp_path / "kept"), again)


def test_compiled_layers_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    gradients = []
    for compile in (False, True):
        made = objective(replace(STAGE, compile=compile))
        made.backward(0, 0.0)
        gradients.append({n: p.grad for n, p in made.lm.named_parameters() if p.grad is not None})
    if "going on without" in caplog.text:
        pytest.skip("no compiler here")
    assert gradients[0].keys() == gradients[1].keys()
    assert "transformer.layers.0.attn.qkv.weight" in gradients[0]
    for name, wanted in gradients[0].items():
        assert (gradients[1][name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name


def test_without_a_compiler_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise RuntimeError("no working\n C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    run = Run(STAGE, objective(replace(STAGE, compile=True)))
    assert run.advance()["skipped"] == 0
    assert "going on without (no working C++ compiler)" in caplog.text


def test_families_have_rates_and_states_of_their_own() -> None:
    run = Run(STAGE, objective(STAGE))
    bases = {
        family: {group["base"] for group in optimizers[0].param_groups}
        for family, optimizers in run.optimizers.items()
    }
    assert bases == {"": {1e-2}, "text": {1e-2, 5e-3}}
    seen = set()
    for _ in range(4):
        metrics = run.advance()
        family = run.objective.family  # type: ignore[attr-defined]
        assert ("text/loss" in metrics) == (family == "text")
        seen.add(family)
    assert seen == {"", "text"}
    steps = [int(next(iter(o[0].state.values()))["step"]) for o in run.optimizers.values()]
    assert sum(steps) == 4
    assert run.names["lm.depth.heads.weight"] not in run.optimizers["text"][0].state


def test_workers_change_nothing(tmp_path: Path) -> None:
    alone = trained(STAGE, tmp_path / "alone", stop_after=2)
    close(alone, trained(STAGE, tmp_path / "two", stop_after=2, workers=2))


def refuse(step: int) -> int:
    if step == 7:
        raise InputError("take 7 is broken")
    return step


def test_workers_hand_over_what_a_user_may_be_told() -> None:
    ahead = Ahead(refuse, 1)
    assert [ahead(5), ahead(6)] == [5, 6]
    with pytest.raises(InputError, match="take 7 is broken"):
        ahead(7)
    ahead.close()


LEFT_OPEN = """
from moshi_cli.tasks.workers import Ahead

class Drawer:
    def __init__(self):
        self.ahead = Ahead(self.draw, 1)  # a cycle: not freed before the end

    def draw(self, step):
        return step

print(Drawer().ahead(3), flush=True)
"""


def test_a_program_ends_with_workers_left_open() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_a_run_leaves_no_workers_behind(tmp_path: Path) -> None:
    trained(STAGE, tmp_path, stop_after=2, workers=2)
    assert not multiprocessing.active_children()


class ByHand:
    """Leaves its gradients itself, as the codec's objective does."""

    def __init__(self, rank: int):
        self.modules: dict[str, nn.Module] = {"toy": nn.Linear(2, 2)}
        self.rank = rank

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restored(self, tensors: dict[str, Tensor]) -> None:
        """Nothing."""

    def backward(self, step: int, progress: float) -> dict[str, float]:
        for p in self.modules["toy"].parameters():
            p.grad = torch.full_like(p, 1.0 + self.rank)
        return {}


def process(rank: int, port: int, folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    half = replace(STAGE, shapes=(Shape(0.8, 1),), accumulate=2)
    with parallel.joined(torch.device("cpu")):
        for kind in ("ddp", "fsdp"):
            train(half, objective(half), folder / kind, kind=kind, stop_after=2)
            train(half, objective(half), folder / kind, kind=kind, resume=True)
        run = Run(replace(STAGE, mix=(), clip=0.0, family_rates={}), ByHand(rank))
        run.advance()
        for p in run.names.values():
            assert p.grad is not None
            torch.testing.assert_close(p.grad, torch.full_like(p, 1.5))
    os._exit(0)  # the work is done and written; torch's threads may abort an orderly end


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over localhost")
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, tmp_path), nprocs=2)
    once = trained(STAGE, tmp_path / "once")
    for kind in ("ddp", "fsdp"):
        found = checkpoints(tmp_path / kind)[-1]
        files = found.iterdir()
        close(once, {f"{p.stem}/{k}": v for p in files for k, v in read_tensors(p).items()})
