"""A frame, from sound to sound, is one graph for all steps, pauses, resets and sessions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from conftest import TINY_LM, TINY_MIMI
from torch._dynamo.utils import counters

from moshi_cli.core.config import ConditionConfig, FuserConfig, ModelConfig, Sampling
from moshi_cli.core.engine import Engine
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.sampling import Noise
from moshi_cli.core.script import Entry, Script
from moshi_cli.core.streams import Role, Task
from moshi_cli.core.weights import Model

# Smaller still than tiny: what is traced is the same, only less often.
LM = replace(
    TINY_LM,
    temporal=replace(TINY_LM.temporal, layers=1),
    depth=replace(TINY_LM.depth, layers=1, schedule=(0, 1), inputs=(0, 1)),
    n_q=4, dep_q=2, delays=(0, 0, 1, 0, 1), extra_heads=1, demux=True,
    conditions=(ConditionConfig("lag", "lut", 4, 3, ("-2", "0", "2")),),
    fuser=FuserConfig(sum=("lag",)),
)  # fmt: skip
CHAT = Task("chat", Role.SAMPLED, Role.SAMPLED, Role.GIVEN)
ASR = Task("asr", Role.SAMPLED, Role.GIVEN, lag_s=0.2)
TTS = Task("tts", Role.STEERED, Role.SAMPLED, lag_s=-0.2)
WARM = Sampling(temp=1.0, text_temp=1.0, pad_bonus=0.5, top_p=0.9)
GUIDED = replace(WARM, guidance=2.0, guide_text=False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    logging.disable()  # the compiler's traces, which pytest would collect
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    logging.disable(logging.NOTSET)


@pytest.fixture
def model(tiny_mimi: Mimi) -> Model:
    tiny_mimi.set_num_codebooks(2)
    lm = MoshiLm(LM).eval().requires_grad_(False)
    return Model(tiny_mimi, lm, None, ModelConfig(mimi=TINY_MIMI, lm=LM), "tiny")


@pytest.mark.parametrize(
    ("task", "sampling"),
    [(CHAT, WARM), (ASR, WARM), (TTS, GUIDED)],
    ids=["chat", "asr", "tts guided"],
)
def test_one_graph(model: Model, task: Task, sampling: Sampling) -> None:
    """Compiled == eager over pauses, a reset and a second session of the same engine."""

    def engine() -> Engine:
        speaks = task.text is Role.STEERED
        return Engine(
            model, task, 2, sampling=sampling, prompt_frames=3 if speaks else 0,
            steer=Script(289, ahead=1, words=4, tokens=8) if speaks else None,
            hide_prompt=speaks,
        )  # fmt: skip

    compiled, eager = engine(), engine()
    compiled._frame = torch.compile(
        compiled.frame, fullgraph=True, dynamic=False, backend="aot_eager"
    )

    def open_slot(slot: int, seed: int) -> None:
        for e in (compiled, eager):
            speaks = task.text is Role.STEERED
            prompt = torch.ones(5, 2, dtype=torch.long) if speaks else None
            script = [Entry((5, 6), 1), Entry((7,))] if speaks else None
            e.open(slot, seed=seed, prompt=prompt, script=script)

    first = compiled.state
    for step in range(12):
        if step == 0:
            open_slot(0, 1)
            open_slot(1, 2)
        if step == 5:
            open_slot(1, 3)
        if step == 9:  # another session, the same function
            compiled.state = engine().state
            compiled.state.step.conditions = first.step.conditions
            for slot in range(2):
                compiled.state.put(slot, first.take(slot))
        pcm = torch.rand(2, 1, 1920) - 0.5
        active = torch.tensor([True, step % 3 != 1])
        a, b = compiled.step(pcm, active), eager.step(pcm, active)
        assert torch.equal(a.text, b.text) and torch.equal(a.codes, b.codes)
        assert torch.equal(a.ready, b.ready)
        for x, y in ((a.pcm, b.pcm), (a.extra, b.extra)):
            if x is not None:
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.fixture
def compiler() -> None:
    try:
        torch.compile(lambda x: x * 2)(torch.ones(2))
    except Exception as e:
        pytest.skip(f"no working compiler: {e}")


@pytest.mark.usefixtures("compiler")
def test_draws_of_the_real_compiler() -> None:
    """Their integers wrap around; an index, for which Inductor may take them, must not."""
    seed = torch.arange(5) * 12345
    noise = Noise(seed, seed % 7)
    compiled = torch.compile(lambda count: noise.exponential(3, count), dynamic=False)
    for count in (25, 2048):
        torch.testing.assert_close(compiled(count), noise.exponential(3, count))


@pytest.mark.usefixtures("compiler")
def test_a_search_of_the_real_compiler(model: Model) -> None:
    """Hypotheses become copies of one another in place, in slots whose clocks differ."""
    sampling = Sampling(0, 0, 0, 0, beam=6, shifts=2)
    compiled, eager = (
        Engine(model, ASR, 2, sampling=sampling, compile=compile) for compile in (True, False)
    )
    for slot in range(2):
        compiled.open(slot, seed=slot)
        eager.open(slot, seed=slot)
    for step in range(20):
        pcm, active = torch.rand(2, 1, 1920) - 0.5, torch.tensor([True, step % 3 != 1])
        a, b = compiled.step(pcm, active), eager.step(pcm, active)
        assert torch.equal(a.text, b.text)
        assert torch.equal(compiled.state.step.ring.cells, eager.state.step.ring.cells)


def test_training_pass_is_one_graph() -> None:
    """The same forward passes, without a state."""
    lm = MoshiLm(LM)

    def loss(columns: torch.Tensor) -> torch.Tensor:
        h, text = lm.temporal(columns, conditions=lm.condition([{"lag": "0"}] * 2))
        return text.logsumexp(-1).mean() + lm.depth_logits(h, columns).logsumexp(-1).mean()

    columns = torch.randint(0, 16, (2, 5, 6))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(columns), loss(columns))
    compiled(columns).backward()
    assert all(p.grad is not None for name, p in lm.named_parameters() if "extra" not in name)
    assert counters["stats"]["unique_graphs"] == 1
