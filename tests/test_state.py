"""Streaming equals offline, slots do not notice each other, and a session can be kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY_LM
from safetensors.torch import load, save
from torch import Tensor

from moshi_cli.core.config import ConditionConfig, FuserConfig, LmConfig
from moshi_cli.core.lm import MoshiLm

RINGED = replace(TINY_LM, temporal=replace(TINY_LM.temporal, context=5))
CONFIGS = {
    "plain": TINY_LM,
    "ring wraps": RINGED,
    "grouped keys": replace(TINY_LM, temporal=replace(RINGED.temporal, kv_repeat=2, rope="half")),
    "conditions": replace(
        TINY_LM,
        temporal=replace(RINGED.temporal, cross_attention=True),
        conditions=(ConditionConfig("mood", "lut", 4, 3), ConditionConfig("who", "tensor", 6)),
        fuser=FuserConfig(sum=("mood",), cross=("who",), cross_positions=True),
    ),
}
B, T = 3, 24


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def config(request: pytest.FixtureRequest) -> LmConfig:
    return CONFIGS[request.param]


class Run:
    """A model, B sequences of columns and what the model makes of them offline."""

    def __init__(self, config: LmConfig):
        self.lm = MoshiLm(config).eval()
        self.columns = torch.randint(0, 16, (B, config.streams, T))
        self.conditions = None
        if config.conditions:
            told = [{"mood": str(b), "who": torch.randn(2, 6)} for b in range(B)]
            self.conditions = self.lm.condition(told)
        self.offline = self.call(self.columns)
        self.state = self.lm.init_state(B, dtype=torch.float32, device="cpu")

    def call(self, columns: Tensor, state: object = None, active: Tensor | None = None) -> Tensor:
        return self.lm.temporal(columns, state, active, self.conditions)[0]  # type: ignore[arg-type]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 4, 7])
@pytest.mark.parametrize("prepared", [False, True])
def test_any_chunking_is_offline(config: LmConfig, chunk: int, prepared: bool) -> None:
    run = Run(config)
    if prepared:  # a longer ring, whole chunks at once
        run.state = run.lm.init_state(B, dtype=torch.float32, device="cpu", chunk=chunk)
    got = torch.cat([run.call(x, run.state) for x in run.columns.split(chunk, 2)], 1)
    close(got, run.offline)
    assert run.state.clock.tolist() == [T] * B


def test_slots_pause_and_start_over(config: LmConfig) -> None:
    """Slots move at random; a paused one is fed garbage; one is reset half-way."""
    run, at = Run(config), [0] * B
    got: list[list[Tensor]] = [[] for _ in range(B)]
    for step in range(5 * T):
        if step == 20:
            run.state.reset(torch.tensor([False, True, False]))
            at[1], got[1] = 0, []
        active = (torch.rand(B) < 0.6) & torch.tensor([i < T for i in at])
        columns = torch.stack([run.columns[b, :, min(at[b], T - 1)] for b in range(B)])
        columns[~active] = torch.randint(0, 16, columns[~active].shape)
        h = run.call(columns[..., None], run.state, active)
        for b in range(B):
            if active[b]:
                got[b].append(h[b, 0])
                at[b] += 1
    for b in range(B):
        close(torch.stack(got[b]), run.offline[b])


def test_a_session_can_be_kept(config: LmConfig) -> None:
    """Half a sequence, taken out, through a file, into another slot of another state."""
    run = Run(config)
    run.call(run.columns[..., : T // 2], run.state)
    kept = {b: load(save(run.state.take(b))) for b in range(B)}
    other = run.lm.init_state(B, dtype=torch.float32, device="cpu")
    for b in range(B):
        other.put(b, kept[b])
    rest = run.call(run.columns[..., T // 2 :], other)
    close(rest, run.offline[:, T // 2 :])


def test_two_sessions_share_one_model(config: LmConfig) -> None:
    run = Run(config)
    second = run.lm.init_state(B, dtype=torch.float32, device="cpu")
    flipped = run.columns.flip(2)
    one, two = [], []
    for x, y in zip(run.columns.split(1, 2), flipped.split(1, 2), strict=True):
        one.append(run.call(x, run.state))
        two.append(run.call(y, second))
    close(torch.cat(one, 1), run.offline)
    close(torch.cat(two, 1), run.call(flipped))


def test_paths_name_every_tensor(config: LmConfig) -> None:
    state = Run(config).state
    layers = config.temporal.layers
    want = {"clock", *(f"layers/{i}/{x}" for i in range(layers) for x in "kv")}
    assert set(state.tensors()) == want
