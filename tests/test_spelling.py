"""Letters as a second label (tasks/spelling.py)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moshi_cli.core.streams import Shifted
from moshi_cli.tasks.lm_objective import join_batches
from moshi_cli.tasks.samples import LmBatch
from moshi_cli.tasks.spelling import AFTER, LETTERS, ROWS, UNKNOWN, Speller, cut, labels, spell


def row_of(text: str) -> list[int]:
    """'.': silence, '?': unknown."""
    special = {".": 0, "?": UNKNOWN}
    return [special.get(c, ord(c) - 96) for c in text]


def test_a_word_shares_its_time_among_its_letters() -> None:
    letters = spell([("Hi", 0.08, 0.24), ("42", 0.24, 0.32), ("It's", 0.32, 0.44)], 7)
    assert letters.shape == (2, 7)
    assert letters.t().flatten().tolist() == row_of("..hhii??its...")


def test_words_beyond_the_row_and_words_of_no_length() -> None:
    letters = spell([("ab", -0.08, 0.08), ("c", 0.16, 0.16), ("dd", 0.24, 9.0)], 4)
    assert letters.t().flatten().tolist() == row_of("bb..c.dd")
    assert (spell(None, 3) == UNKNOWN).all()


def test_a_word_that_breaks_off_has_the_letters_that_were_said() -> None:
    words = [("one", 0.0, 0.3), ("four", 0.4, 0.8), ("six", 0.9, 1.2)]
    assert cut(words, 1.2) == words
    assert cut(words, 0.6) == [("one", 0.0, 0.3), ("fo", 0.4, 0.6)]
    assert cut(words, 0.42) == [("one", 0.0, 0.3)] and cut(words, -1.0) == []
    assert cut([("a", 0.5, 0.5)], 0.4) == [] and cut([("a", 0.5, 0.5)], 0.5) == [("a", 0.5, 0.5)]


def test_letters_are_told_some_frames_after_they_were_heard() -> None:
    T = AFTER + 4
    rows = labels(spell([("abcd", 0.0, 0.16)], T), spell([("efgh", 0.0, 0.16)], T), 3)
    assert rows.shape == (1, 4, T)
    heard, spoken = rows[0].split(2)
    assert heard[:, : 1 + AFTER].eq(UNKNOWN).all()
    assert heard[:, 1 + AFTER :].t().flatten().tolist() == row_of("abcd..")
    assert spoken.t().flatten().tolist() == row_of("??????efgh" + "." * 2 * (T - 5))


def test_rows_without_letters_join_those_with_some() -> None:
    def row(steps: int, letters: bool) -> LmBatch:
        grid = torch.zeros(1, 3, steps, dtype=torch.long)
        known = torch.ones(1, ROWS, steps, dtype=torch.long) if letters else None
        return LmBatch(Shifted(grid, grid, grid > 0), ["0"], ["asr"], known)

    joined = join_batches([row(2, True), row(4, False), row(3, True)]).letters
    assert joined is not None
    assert joined.shape == (3, ROWS, 4)
    assert joined[:, 0].tolist() == [[1, 1, *[UNKNOWN] * 2], [UNKNOWN] * 4, [1, 1, 1, UNKNOWN]]
    assert join_batches([row(2, False)] * 2).letters is None


def test_the_loss_is_that_of_known_letters() -> None:
    speller = Speller(8)
    x, letters = torch.randn(2, 5, 8), torch.full((2, 4, 5), UNKNOWN)
    letters[0, 1, 3], letters[1, 0, 2] = 4, 0
    logits = speller(x)
    assert logits.shape == (2, 5, 4, LETTERS)
    by_hand = F.cross_entropy(logits[0, 3, 1], torch.tensor(4))
    by_hand = by_hand + F.cross_entropy(logits[1, 2, 0], torch.tensor(0))
    torch.testing.assert_close(speller.loss(x, letters), by_hand)
    assert speller.loss(x, torch.full_like(letters, UNKNOWN)) == 0
