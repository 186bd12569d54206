"""Rehearsals: what a model says is kept as it was said, and counts by how it is understood."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY_LM
from torch import Tensor

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.engine import Engine
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text, align
from moshi_cli.core.weights import Model
from moshi_cli.tasks.cache import FRAME_HZ, Cache
from moshi_cli.tasks.chat import CHAT, TalkingOptions, converse
from moshi_cli.tasks.events import Event
from moshi_cli.tasks.loop import Output
from moshi_cli.tasks.samples import Samples
from moshi_cli.tasks.tts import speak, speaking_engine

TEXTS = ("one two sky", "hello, four!", "alfa three one bravo")


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    lags = {"tts": -0.32, "chat": 0.0}
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags=lags)
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


@pytest.fixture
def rehearse(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(root / "examples" / "train_builtin"))
    import rehearse

    yield rehearse
    sys.modules.pop("rehearse")


class Ear:
    """Hears a word the better the longer it is, and takes one better than the other."""

    def hear(self, sounds: Tensor, texts: list[list[str]]) -> list[list[float]]:
        assert len(sounds) == len(texts)
        return [[0.1 * i - 1 / len(w) for w in text] for i, text in enumerate(texts)]


def row(i: int, kind: str = "open") -> dict[str, object]:
    return {"id": f"clip{i}", "kind": kind, "text": TEXTS[i], "qa": 7}


def test_takes_are_what_the_model_says(model: Model, rehearse: ModuleType, tmp_path: Path) -> None:
    rows = [row(0), row(1, "moshi-answer"), row(2)]
    takes = rehearse.performed(
        speaking_engine(model, 2, decode=False), rehearse.readings(model, rows, 2, seed=5)
    )
    found = rehearse.write(tmp_path, model, takes, Ear())
    assert sorted(r["id"] for r in found) == [f"clip{i}/{n}" for i in range(3) for n in range(2)]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    cache = Cache(tmp_path, 4)
    for take in cache.takes:
        i, n = int(take.id[4]), int(take.id[-1])
        recording = speak(model, TEXTS[i], seed=5 + 2 * i + n)
        sound = model.mimi.decode(cache.read(take)[None])[0, 0]
        torch.testing.assert_close(sound, recording.pcm, atol=1e-5, rtol=1e-4)
        assert take.kind == ("moshi-answer-self" if i == 1 else "moshi-open-self")
        assert take.qa == (7 if i == 1 else None)
        assert [w for w, _, _ in take.words] == [w.text for w in recording.words]


def test_words_lie_where_they_were_fed(
    model: Model, tiny_text: Text, rehearse: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    keep = rehearse.Reading.take

    def spy(self: object, output: Output) -> Iterable[Event]:
        fed.append(output.text)
        return keep(self, output)

    monkeypatch.setattr(rehearse.Reading, "take", spy)
    sessions = rehearse.readings(model, [row(2)], 1, seed=1)
    (one,) = rehearse.performed(speaking_engine(model, 1, decode=False), sessions)
    spelled = align(one.take.words, one.take.frames, tiny_text, crowding="space")
    assert spelled.tolist() == fed


def test_right_answers_are_cut_out(
    model: Model, rehearse: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearse, "ANSWER_S", 1.2)
    sound = torch.randn(7 * 1920, generator=torch.Generator().manual_seed(2)) * 0.3
    reply = converse(model, sound, options=TalkingOptions(tail_s=1.2), seed=3)
    words = [word.text for word in reply.words]
    assert words
    for right in (True, False):
        written = " ".join(rehearse.plain(word) or "?" for word in words)
        answers = {rehearse.plain(words): written} if right else {"no": "No"}
        question = {"id": "q", "qa": 4, "answers": answers, "sound": sound}
        asked = rehearse.Answering(model, model.fit(CHAT), question, 0, 3)
        engine = Engine(model, model.fit(CHAT), 1, decode=False)
        found = list(rehearse.performed(engine, [asked]))
        if not right:
            assert not found
            continue
        (one,) = found
        assert one.take.kind == "moshi-answer-self" and one.take.qa == 4
        first = max(int(reply.words[0].start_s * FRAME_HZ) - rehearse.BEFORE, 0)
        assert torch.equal(one.codes, torch.stack(asked.codes[first:][: one.take.frames], 1))
        for (_, start_s, _), word in zip(one.take.words, reply.words, strict=True):
            assert int(start_s * FRAME_HZ) == round(word.start_s * FRAME_HZ) - first
        whole = model.mimi.decode(torch.stack(asked.codes, 1)[None])[0, 0]
        torch.testing.assert_close(whole[: len(reply.pcm)], reply.pcm, atol=1e-5, rtol=1e-4)


def test_a_word_is_worth_what_it_is_clearer_than_elsewhere(rehearse: ModuleType) -> None:
    rows = [
        {"id": "a/0", "text": "one two", "sure": [-0.1, -4.0]},
        {"id": "a/1", "text": "one two", "sure": [-0.3, -1.0]},
        {"id": "b/0", "text": "sky", "sure": [-3.0]},
    ]
    assert [r["worth"] for r in rehearse.weighed(rows, 0.5)] == [[0.1, -0.5], [-0.05, 1.0], [0.0]]


def test_words_that_whisper_writes_otherwise(rehearse: ModuleType) -> None:
    said = "Forty-one, nine, alfa. Hello"
    assert [rehearse.figures(word) for word in said.split()] == ["41,", "9,", "Alpha.", "Hello"]


def test_a_cache_of_takes_is_learnt_from(
    model: Model, tiny_text: Text, rehearse: ModuleType, tmp_path: Path
) -> None:
    sessions = rehearse.readings(model, [row(0), row(2)], 3, seed=5)
    takes = rehearse.performed(speaking_engine(model, 3, decode=False), sessions)
    rows = list(rehearse.weighed(rehearse.write(tmp_path, model, takes, Ear()), 0.5))
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = Samples(Cache(tmp_path, 4), tiny_text, TINY_LM, {"tts": -0.32})
    batch = samples.batch({"tts": 1}, 40, 24, torch.Generator().manual_seed(0))
    assert batch.shifted.worth is not None
    counted = batch.shifted.worth[batch.shifted.mask]
    assert (counted < 0).any() and ((counted > 0) & (counted < 1)).any()
