"""The recipe speaks words that it has seldom spoken."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
from recipe import script

COMMON, RARE, ONCE = "We see the sea.", "Honeymoon analysis.", "Sgfhj xqwz."
WRITTEN = 40 * (COMMON,) + 8 * (RARE,) + (ONCE,)


@pytest.fixture
def sentences(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("sentences")
    texts = {"chitchat": WRITTEN, "facts": (), "wordnet": ()}
    monkeypatch.setattr(module, "pool", lambda source, split: texts[source])
    monkeypatch.setattr(module, "SELDOM_SHARES", {"chitchat": 1.0, "facts": 0.0, "wordnet": 0.0})
    return module


def test_words_that_were_spoken_seldom_come_first(sentences: ModuleType) -> None:
    seldom = sentences.Seldom(200 * [COMMON])
    assert seldom.worth(RARE) > seldom.worth(ONCE) > seldom.worth(COMMON)
    assert seldom.sentence(random.Random(1)) == RARE


def test_what_was_chosen_counts_as_spoken(sentences: ModuleType) -> None:
    seldom = sentences.Seldom([])
    chosen = [seldom.sentence(random.Random(i)) for i in range(60)]
    assert {COMMON, RARE} <= set(chosen)
    assert seldom.spoken["honeymoon"] == chosen.count(RARE)


def test_a_corpus_that_goes_on_chooses_the_same(sentences: ModuleType) -> None:
    whole, first = sentences.Seldom([]), sentences.Seldom([])
    said = [whole.sentence(random.Random(i)) for i in range(10)]
    half = [first.sentence(random.Random(i)) for i in range(5)]
    again = sentences.Seldom(half)
    assert said == half + [again.sentence(random.Random(i)) for i in range(5, 10)]
