"""The engine: slots do not notice each other, and every task runs through the same frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor

from moshi_cli.core.config import ConditionConfig, FuserConfig, LmConfig, ModelConfig, Sampling
from moshi_cli.core.engine import Engine, Frame
from moshi_cli.core.errors import UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.sampling import GREEDY
from moshi_cli.core.script import Entry, Script
from moshi_cli.core.stepper import Step
from moshi_cli.core.streams import UNKNOWN, ZERO, Role, Task
from moshi_cli.core.weights import Model

CHAT = Task("chat", Role.SAMPLED, Role.SAMPLED, Role.GIVEN)
ASR = Task("asr", Role.SAMPLED, Role.GIVEN, lag_s=0.25)
TTS = Task("tts", Role.STEERED, Role.SAMPLED, lag_s=-0.25)
TASKS = {task.name: task for task in (CHAT, ASR, TTS)}
TOLD = replace(
    TINY_LM,
    conditions=(
        ConditionConfig("description", "lut", 4, 2, ("very_bad", "very_good")),
        ConditionConfig("lag", "lut", 4, 7, ("-3", "-2", "-1", "0", "1", "2", "3")),
    ),
    fuser=FuserConfig(sum=("description", "lag")),
)
WARM = Sampling(temp=1.0, text_temp=1.0)
SCRIPTS = [[Entry((5, 6), 1), Entry(()), Entry((7,))], [Entry((9, 10, 11))], [Entry((12,), 3)] * 4]
STEPS = 10


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm) -> Model:
    config = ModelConfig(mimi=TINY_MIMI, lm=TINY_LM, lags={"chat": 0.0})
    return Model(tiny_mimi, tiny_lm, None, config, "tiny")


def told_model(model: Model, config: LmConfig = TOLD) -> Model:
    return replace(model, lm=MoshiLm(config).eval().requires_grad_(False))


def engine(model: Model, task: Task, slots: int, sampling: Sampling = WARM, **more: Any) -> Engine:
    steer = Script(289, words=8, tokens=16) if task.text is Role.STEERED else None
    return Engine(model, task, slots, sampling=sampling, steer=steer, **more)


def sounds() -> Tensor:
    """What three speakers say: [3, 1, S]."""
    return torch.rand(3, 1, STEPS * 1920, generator=torch.Generator().manual_seed(5)) - 0.5


def talk(
    e: Engine, order: list[int], *, rest: float = 0.0, wake: int = 0
) -> list[list[tuple[int, list[int], Tensor | None]]]:
    """Run three sessions, session order[slot] in each slot, paused at random and fed garbage then;
    from step `wake` on the last slot is used. What each session said, frame by frame."""
    generator = torch.Generator().manual_seed(6)
    said: list[list[tuple[int, list[int], Tensor | None]]] = [[] for _ in range(3)]
    at, pcm = [0] * len(order), sounds()

    def begin(slot: int) -> None:
        script = SCRIPTS[order[slot]] if e.task.text is Role.STEERED else None
        e.open(slot, seed=order[slot], script=script)

    for slot in range(len(order)):
        if slot < len(order) - 1 or not wake:
            begin(slot)
    for step in range(STEPS * 5):
        if min(at) >= STEPS:
            break
        if wake and step == wake:
            begin(len(order) - 1)
        asleep = torch.arange(len(order)) >= len(order) - (step < wake)
        done = torch.tensor([n >= STEPS for n in at])
        active = (torch.rand(len(order), generator=generator) >= rest) & ~done & ~asleep
        frame = torch.stack(
            [pcm[order[s], :, min(n, STEPS - 1) * 1920 :][..., :1920] for s, n in enumerate(at)]
        )
        frame = torch.where(active[:, None, None], frame, 7.0)
        out = e.step(frame, active)
        assert not (out.ready & ~active).any()
        for s in range(len(order)):
            at[s] += int(active[s])
            if out.ready[s]:
                sound = None if out.pcm is None else out.pcm[s]
                said[order[s]].append((int(out.text[s]), out.codes[s].tolist(), sound))
    return said


def same(one: list[Any], two: list[Any]) -> None:
    assert [x[:2] for x in one] == [x[:2] for x in two]
    for x, y in zip(one, two, strict=True):
        if x[2] is not None:
            torch.testing.assert_close(x[2], y[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TASKS)
def test_batch_order_pauses_and_resets_change_nothing(model: Model, name: str) -> None:
    """Three sessions in one engine, in any order, with pauses, in used slots == one by one."""
    task = TASKS[name]
    alone = [talk(engine(model, task, 1), [i])[i] for i in range(3)]
    assert all(len(said) == STEPS - engine(model, task, 1).stepper.latency + 1 for said in alone)
    assert [x[:2] for x in alone[0]] != [x[:2] for x in alone[1]]
    e = engine(model, task, 3)
    for order, rest, wake in (([0, 1, 2], 0.0, 0), ([2, 0, 1], 0.4, 6), ([1, 2, 0], 0.3, 0)):
        for one, two in zip(alone, talk(e, order, rest=rest, wake=wake), strict=True):
            same(one, two)


@pytest.mark.parametrize("name", TASKS)
def test_a_session_is_a_training_example(model: Model, name: str) -> None:
    """What was heard and said, shifted as in training, gives the columns and logits of the run."""
    assert model.lm is not None
    e = engine(model, TASKS[name], 1)
    steps: list[Step] = []
    step = e.stepper.step

    def record(*args: Any) -> Step:
        steps.append(step(*args))
        return steps[-1]

    e.stepper.step = record  # type: ignore[method-assign]
    e.open(0, seed=1, script=SCRIPTS[0] if TASKS[name] is TTS else None)
    given = torch.randint(0, 16, (1, len(e.pattern.given), STEPS))
    frames = [e.step(codes=x if x.numel() else None) for x in given.unbind(2)]
    said = [torch.cat([f.text[:, None], f.codes], 1) for f in frames if f.ready.all()]
    T = len(said)
    codes = torch.full((1, 9, T), ZERO)
    codes[:, list(e.pattern.given)] = given[..., :T]
    codes[:, list(e.pattern.made)] = torch.stack(said, -1)
    shifted = e.pattern.shift(codes, steps=T)
    assert torch.equal(torch.stack([s.inputs for s in steps[:T]], -1), shifted.inputs)
    h, logits = model.lm.temporal(shifted.inputs)
    torch.testing.assert_close(torch.stack([s.text_logits for s in steps[:T]], 1), logits)
    late = max(e.pattern.delays)  # from here on all rows of a column are true
    if e.stepper.codebooks:
        audio = model.lm.depth_logits(h, shifted.targets)[:, :, late:]
        made = torch.stack([s.audio_logits for s in steps[late:T] if s.audio_logits is not None], 2)
        torch.testing.assert_close(made, audio)


def test_seeds_matter(model: Model) -> None:
    e, said = engine(model, CHAT, 2), []
    pcm = sounds()
    for slot in range(2):
        e.open(slot, seed=slot)
    for i in range(STEPS):
        said.append(e.step(pcm[:1, :, i * 1920 :][..., :1920].expand(2, 1, -1)).text)
    one, two = torch.stack(said).T
    assert not torch.equal(one, two)


def test_the_first_frame_is_heard(model: Model) -> None:
    """Priming makes step 0 before any sound, so the first codes given are those of step 1."""
    e = engine(model, CHAT, 1)
    e.open(0)
    codes = torch.tensor([[3, 1, 4, 1]])
    on = torch.tensor([True])
    first = e.stepper.step(e.state.step, codes, on)
    assert first.inputs[0, 5:].tolist() == [3, 16, 16, 16]  # acoustic codes are a frame late
    assert e.stepper.step(e.state.step, codes + 1, on).inputs[0, 5:].tolist() == [4, 1, 4, 1]


def test_priming_at_once_or_one_by_one(model: Model) -> None:
    one, two = engine(model, CHAT, 3), engine(model, CHAT, 3)
    for slot in range(3):
        one.open(slot, seed=slot)
        two.open(slot, seed=slot, prime=False)
    two.prime(torch.ones(3, dtype=torch.bool))
    two.prime(torch.ones(3, dtype=torch.bool))  # nothing left to do
    for (path, x), y in zip(one.state.tensors().items(), two.state.tensors().values(), strict=True):
        if not path.endswith(("/k", "/v")):  # of these, the clock says what counts
            torch.testing.assert_close(x, y, msg=path)
    assert one.state.step.clock.tolist() == [1, 1, 1]


def test_codes_instead_of_sound(model: Model) -> None:
    """Tokens in for sound: the codec's own codes give the same."""
    one, two = engine(model, CHAT, 1), engine(model, CHAT, 1)
    one.open(0)
    two.open(0)
    pcm = sounds()[:1]
    codes = model.mimi.encode(pcm)
    for i, x in enumerate(pcm.split(1920, -1)):
        a, b = one.step(x), two.step(codes=codes[..., i])
        assert torch.equal(a.text, b.text) and torch.equal(a.codes, b.codes)


def test_end_of_the_given_voice(model: Model) -> None:
    """`end` is a frame of start tokens, per slot; the codec does not hear that frame."""
    one, two = engine(model, CHAT, 2, GREEDY), engine(model, CHAT, 2, GREEDY)
    codes = torch.randint(0, 16, (2, 4))
    for e in (one, two):
        e.open(0)
        e.open(1)
    a = [one.step(codes=codes), one.step(codes=codes, end=torch.tensor([True, False]))]
    told = codes.clone()
    told[0] = 16
    b = [two.step(codes=codes), two.step(codes=told)]
    assert all(torch.equal(x.codes, y.codes) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sampling", [WARM, replace(WARM, guidance=2.0)], ids=["plain", "guided"])
def test_a_session_moves_to_another_engine(model: Model, sampling: Sampling) -> None:
    told, pcm = told_model(model), sounds()[:1].split(1920, -1)
    one, two = engine(told, CHAT, 1, sampling), engine(told, CHAT, 2, sampling)
    one.open(0, seed=3)
    two.open(0)
    two.open(1)
    for x in pcm[:6]:
        one.step(x)
    two.state.put(1, one.state.take(0))
    for x in pcm[6:]:
        a, b = one.step(x), two.step(x.expand(2, 1, -1))
        assert a.text[0] == b.text[1] and torch.equal(a.codes[0], b.codes[1])
        torch.testing.assert_close(a.pcm[0], b.pcm[1], atol=1e-5, rtol=0)  # type: ignore[index]


def test_conditions_are_per_slot(model: Model) -> None:
    """A slot is told its own word; guidance away from the same word changes nothing."""
    told = told_model(model)
    e = engine(told, CHAT, 2, GREEDY)
    e.open(0, conditions={"description": "very_bad"})
    e.open(1)  # the usual: very_good
    assert e.state.step.conditions is not None and e.state.step.conditions.sum is not None
    bad, good = e.state.step.conditions.sum
    words = [{"description": f"very_{word}", "lag": "0"} for word in ("bad", "good")]
    want = told.lm.condition(words).sum  # type: ignore[union-attr]
    torch.testing.assert_close(torch.stack([bad, good]), want)
    plain, guided = (engine(told, CHAT, 1, replace(GREEDY, guidance=g)) for g in (1.0, 3.0))
    word = {"description": "very_bad", "lag": "0"}
    plain.open(0, conditions=word)
    guided.open(0, conditions=word, null=word)
    for x in sounds()[:1].split(1920, -1):
        assert torch.equal(plain.step(x).codes, guided.step(x).codes)


def test_the_lag_is_told(model: Model) -> None:
    told = told_model(model)
    for task, word in ((CHAT, "0"), (ASR, "3"), (TTS, "-3")):
        e = engine(told, task, 1)
        e.open(0, script=[] if task is TTS else None)
        want = told.lm.condition([{"description": "very_good", "lag": word}])  # type: ignore[union-attr]
        assert torch.equal(e.state.step.conditions.sum, want.sum)  # type: ignore[union-attr,arg-type]


def test_prompts_are_said(model: Model) -> None:
    """A voice prompt comes out as it went in, per slot, then the model goes on by itself."""
    e = engine(model, TTS, 2, GREEDY, prompt_frames=4)
    prompt = torch.randint(0, 16, (9, 4))
    prompt[0] = ZERO
    e.open(0, prompt=prompt, script=SCRIPTS[0])
    e.open(1, script=SCRIPTS[1])
    frames: list[Frame] = []
    while len(frames) < 8:
        frame = e.step()
        frames += [frame] if frame.ready.all() else []
    got = torch.stack([torch.cat([f.text[:, None], f.codes], 1) for f in frames], -1)
    assert torch.equal(got[0, :, :4], prompt[:5])
    assert not torch.equal(got[1, 1:, :4], prompt[1:5])
    assert (got[..., 4:] != UNKNOWN).all() and (got[:, 1:, 4:] >= 0).all()
    assert e.state.step.steer.begun[0, 0] >= 4  # type: ignore[union-attr] # the script waits


def test_misuse_is_explained(model: Model) -> None:
    e = engine(model, CHAT, 2)
    with pytest.raises(UsageError, match="slot 2 of an engine with 2"):
        e.open(2)
    with pytest.raises(UsageError, match="one voice"):
        Engine(model, replace(CHAT, voice=Role.GIVEN), 1)


def test_text_while_both_are_silent(model: Model) -> None:
    """A task of text alone has no sound and hears none."""
    e = engine(model, Task("write", Role.SAMPLED, Role.ABSENT), 1)
    e.open(0)
    frame = e.step()
    assert frame.pcm is None and frame.codes.shape == (1, 0) and frame.ready.all()
