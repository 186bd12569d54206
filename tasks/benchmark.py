"""How fast a model of some size learns: steps on random tokens, timed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moshi_cli.core.config import LmConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import learnable
from moshi_cli.core.presets import MOSHI_NANO, temporal
from moshi_cli.core.streams import FRAME_HZ, DelayPattern
from moshi_cli.core.text import PAD
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.lm_objective import LmObjective
from moshi_cli.tasks.machine import memory_mb
from moshi_cli.tasks.mixture import Mixture
from moshi_cli.tasks.samples import LmBatch
from moshi_cli.tasks.stages import LmStage, Shape, Source
from moshi_cli.tasks.train import Run

WARM = 2  # steps that are not timed


@dataclass(frozen=True)
class Size:
    """What is varied."""

    width: int = 256  # of the temporal transformer
    layers: int = 6
    batch: int = 4
    length_s: float = 8.0


@dataclass(frozen=True)
class Speed:
    """What was measured."""

    size: Size
    parameters: int
    frames_per_s: float  # of 80 ms, all rows together
    step_ms: tuple[float, float, float]  # fastest, median, slowest
    rss_mb: tuple[float, ...]  # memory of the process, at evenly spaced steps

    def record(self) -> dict[str, Any]:
        """One flat row."""
        rest = asdict(self)
        fastest, median, slowest = rest.pop("step_ms")
        return {
            **rest.pop("size"), **rest, "step_ms": median, "step_ms_min": fastest,
            "step_ms_max": slowest,
        }  # fmt: skip


class Noise:
    """Conversations of random tokens: as much work as any, nothing to learn."""

    seconds = 0.0

    def __init__(self, lm: LmConfig):
        self.lm, self.pattern = lm, DelayPattern.of(CHAT, lm)

    def batch(self, frames: int, batch: int, generator: torch.Generator) -> LmBatch:
        """`batch` rows of `frames` frames; a third of the text is words."""
        shape = (batch, self.lm.streams, frames)
        grid = torch.randint(self.lm.codebook_size, shape, generator=generator)
        words = torch.randint(4, self.lm.text_vocab, (batch, frames), generator=generator)
        said = torch.rand(batch, frames, generator=generator) < 0.35
        grid[:, 0] = torch.where(said, words, PAD)
        shifted = learnable(self.pattern.shift(grid, frames), self.pattern)
        return LmBatch(shifted, ["0"] * batch, ["chat"] * batch)


def shaped(size: Size) -> LmConfig:
    """The built-in model's shape at another width."""
    assert MOSHI_NANO.lm is not None
    stack = temporal(size.width, max(size.width // 64, 1), size.layers, 250, 10_000)
    return replace(MOSHI_NANO.lm, temporal=stack)


def train_speed(
    size: Size,
    steps: int,
    *,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    recompute: bool = False,
    compile: bool = False,
    looks: int = 5,
    tick: Callable[[int], None] = lambda step: None,
) -> Speed:
    """Time `steps` steps of training; memory is looked at `looks` times."""
    lm = MoshiLm(shaped(size)).to(device)
    stage = LmStage(
        name="bench", mix=(Source("noise"),), shapes=(Shape(size.length_s, size.batch),),
        steps=steps + WARM, bf16=bf16, recompute=recompute,
        compile=compile,
    )  # fmt: skip
    run = Run(stage, LmObjective(stage, lm, Mixture(stage.mix, [Noise(lm.config)])))
    lm.train()
    times, seen = [], []
    at = {WARM + round(i * (steps - 1) / max(looks - 1, 1)) for i in range(looks)}
    for step in range(steps + WARM):
        began = time.perf_counter()
        run.advance()  # reads its losses, so a device has finished
        times.append(1000 * (time.perf_counter() - began))
        if step in at:
            seen.append(round(memory_mb(), 1))
        tick(step)
    timed = sorted(times[WARM:])
    frames = size.batch * round(size.length_s * FRAME_HZ)
    step_ms = (timed[0], timed[len(timed) // 2], timed[-1])
    count = sum(p.numel() for p in lm.parameters())
    return Speed(size, count, 1000 * frames * len(timed) / sum(timed), step_ms, tuple(seen))
