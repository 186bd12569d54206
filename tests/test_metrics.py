"""Word error rates and their intervals."""

from __future__ import annotations

import pytest

from moshi_cli.tasks.metrics import WordErrors, corpus_rate, difference, word_errors


def test_word_errors_are_told_apart() -> None:
    assert word_errors("one two three", "1, too, 3, 4") == WordErrors(1, 0, 1, 3)
    assert word_errors("go left", "Go left!") == WordErrors(words=2)
    assert word_errors("go left", "") == WordErrors(deletions=2, words=2)
    assert word_errors("", "thank you") == WordErrors(insertions=2)
    assert word_errors("", "").rate == 0 and word_errors("", "you").rate == 1


def test_the_corpus_rate_weighs_words_and_the_mean_utterances() -> None:
    rate = corpus_rate([WordErrors(1, 0, 0, 1), WordErrors(0, 0, 0, 9)])
    assert rate.rate == pytest.approx(0.1)
    assert rate.mean == rate.exact == 0.5
    assert rate.total == WordErrors(1, 0, 0, 10) and rate.utterances == 2


def test_intervals_hold_the_rate_and_repeat() -> None:
    parts = [WordErrors(i % 5 == 0, 0, 0, 4) for i in range(200)]
    rate = corpus_rate(parts)
    assert rate.low < rate.rate < rate.high
    assert rate == corpus_rate(parts)
    assert rate.high - rate.low == pytest.approx(2 * 1.96 * (0.2 * 0.8 / 200) ** 0.5 / 4, rel=0.2)
    flawless = corpus_rate([WordErrors(words=3)] * 10)
    assert flawless.low == flawless.rate == flawless.high == 0


def test_differences_are_paired() -> None:
    noisy = [WordErrors(i % 3, 0, 0, 4) for i in range(60)]
    worse = [WordErrors(e.substitutions, 1, 0, 4) for e in noisy]
    assert difference(worse, noisy) == pytest.approx((0.25, 0.25, 0.25))
    assert difference(noisy, noisy) == (0, 0, 0)
