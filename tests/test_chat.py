"""Talking: the reply is as long as it must be, frame by frame beside the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks.chat import CHAT, Reply, Talking, TalkingOptions, converse, gather
from moshi_cli.tasks.events import Event, Speech, Turn
from moshi_cli.tasks.loop import drive
from moshi_cli.tasks.sound import Sound


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags={"chat": 0.0})
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


def noise(samples: int) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(0)) * 0.3


@pytest.mark.parametrize("samples", [1, 1920, 5 * 1920 + 1, 10 * 1920 - 1])
@pytest.mark.parametrize("tail_s", [0.0, 0.05, 0.5])
def test_the_reply_is_as_long_as_the_input_and_the_tail(
    model: Model, samples: int, tail_s: float
) -> None:
    reply = converse(model, noise(samples), options=TalkingOptions(tail_s=tail_s))
    assert len(reply.pcm) == samples + round(tail_s * 24_000)
    assert reply.pcm.abs().max() <= 1.0 or reply.pcm.isfinite().all()


def test_silence_in_front_does_not_shift_the_reply(model: Model) -> None:
    options = TalkingOptions(lead_s=0.4, tail_s=0.2)
    assert len(converse(model, noise(3000), options=options).pcm) == 3000 + 4800


def test_the_tail_is_what_silence_would_be(model: Model) -> None:
    """Feeding the silence oneself gives the same reply."""
    sound = noise(6 * 1920)
    short = converse(model, sound, options=TalkingOptions(tail_s=0.4), seed=3)
    padded = torch.cat([sound, torch.zeros(5 * 1920)])
    long = converse(model, padded, options=TalkingOptions(tail_s=0.0), seed=3)
    assert torch.equal(short.pcm, long.pcm) and short.pieces == long.pieces
    assert short.text


def test_live_gives_a_frame_for_every_frame(model: Model) -> None:
    """One frame in, one frame out, at once: what a pipe needs."""
    pulled = 0

    def source() -> Iterator[Tensor]:
        nonlocal pulled
        for frame in noise(6 * 1920).split(1920):
            pulled += 1
            yield frame[None]

    task = model.fit(CHAT)
    talking = Talking(model, task, Sound(source()), options=TalkingOptions(tail_s=0, live=True))
    came = 0
    for _, event in drive(Engine(model, task, 1), [talking]):
        if isinstance(event, Speech):
            came += event.pcm.shape[1] // 1920
            assert came == pulled
    assert came == 6


def test_a_longer_acoustic_delay_keeps_the_length(model: Model) -> None:
    """With codebooks two frames late a frame is whole one step later; live it is filled up."""
    assert model.lm is not None
    late = replace(model.lm.config, delays=(0, 0, 2, 2, 2, 0, 2, 2, 2))
    torch.manual_seed(0)
    lm = MoshiLm(late).eval().requires_grad_(False)
    model = replace(model, lm=lm, config=replace(model.config, lm=late))
    file = converse(model, noise(8 * 1920), options=TalkingOptions(tail_s=0.16))
    live = converse(model, noise(8 * 1920), options=TalkingOptions(tail_s=0.16, live=True))
    assert len(file.pcm) == len(live.pcm) == 10 * 1920
    assert torch.equal(live.pcm[1920:], file.pcm[:-1920]) and not live.pcm[:1920].any()


def test_a_batch_gives_what_one_by_one_gives(model: Model) -> None:
    task, sounds = model.fit(CHAT), [noise(n) for n in (9000, 1, 30_000, 12_345)]

    def replies(slots: int) -> list[Reply]:
        options = TalkingOptions(tail_s=0.3)
        sessions = [
            Talking(model, task, Sound(sound), seed=i, options=options, name=i)
            for i, sound in enumerate(sounds)
        ]
        found: list[list[Event]] = [[] for _ in sounds]
        for session, event in drive(Engine(model, task, slots), sessions):
            found[session.name].append(event)
        return [gather(events) for events in found]

    for one, other in zip(replies(1), replies(3), strict=True):
        assert one.pieces == other.pieces
        assert torch.allclose(one.pcm, other.pcm, atol=1e-5)


def test_the_seed_decides(model: Model) -> None:
    first, same, other = (converse(model, noise(20_000), seed=s) for s in (1, 1, 2))
    assert torch.equal(first.pcm, same.pcm) and first.pieces == same.pieces
    assert first.pieces != other.pieces


def test_turns_of_the_user_are_heard(model: Model) -> None:
    sound = torch.cat([torch.zeros(10 * 1920), noise(10 * 1920), torch.zeros(15 * 1920)])
    turns = [t for t in converse(model, sound).turns if t.who == "user"]
    assert turns == [Turn("user", True, 0.8), Turn("user", False, 1.6)]


def test_a_translator_is_told_when_the_voice_is_over(model: Model) -> None:
    """Hibiki gets start tokens instead of silence after the end, in its own slot only."""
    told: list[list[bool]] = []
    model = replace(model, config=replace(model.config, kind="hibiki"))

    class Watched(Engine):
        def step(self, pcm=None, active=None, *, codes=None, end=None):  # type: ignore[no-untyped-def]
            told.append([] if end is None else end.tolist())
            return super().step(pcm, active, codes=codes, end=end)

    task = model.fit(CHAT)
    options = TalkingOptions(tail_s=0.16)
    sessions = [Talking(model, task, Sound(noise(n * 1920)), options=options) for n in (2, 4)]
    for _ in drive(Watched(model, task, 2), sessions):
        pass
    assert told[:3] == [[]] * 3 and told[3] == [True, False] and [False, True] in told


def test_a_model_that_cannot_talk_says_so(model: Model) -> None:
    with pytest.raises(ModelError):
        converse(replace(model, config=replace(model.config, lags={"asr": 0.5})), noise(10))
