"""Letters, or sounds, as a second label (tasks/spelling.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from moshi_cli.core.errors import InputError
from moshi_cli.core.streams import Shifted
from moshi_cli.tasks.lm_objective import join_batches
from moshi_cli.tasks.samples import LmBatch
from moshi_cli.tasks.spelling import (
    AFTER,
    ROWS,
    UNKNOWN,
    LatentSpeller,
    Speller,
    Spelling,
    Word,
    cut,
    labels,
    read_spelling,
    spell,
)

LETTERS = Spelling()


def row_of(text: str) -> list[int]:
    """'.': silence, '?': unknown."""
    special = {".": 0, "?": UNKNOWN}
    return [special.get(c, ord(c) - 96) for c in text]


def written(*words: Word, frames: int) -> torch.Tensor:
    """`spell` in letters."""
    return spell(LETTERS.spelled(words), frames)


def test_a_word_shares_its_time_among_its_letters() -> None:
    letters = written(("Hi", 0.08, 0.24), ("42", 0.24, 0.32), ("It's", 0.32, 0.44), frames=7)
    assert letters.shape == (2, 7)
    assert letters.t().flatten().tolist() == row_of("..hhii??its...")


def test_words_beyond_the_row_and_words_of_no_length() -> None:
    letters = written(("ab", -0.08, 0.08), ("c", 0.16, 0.16), ("dd", 0.24, 9.0), frames=4)
    assert letters.t().flatten().tolist() == row_of("bb..c.dd")
    assert (spell(None, 3) == UNKNOWN).all()


def test_a_word_that_breaks_off_has_the_letters_that_were_said() -> None:
    one, four, six = ((15, 14, 5), 0.0, 0.3), ((6, 15, 21, 18), 0.4, 0.8), ((19, 9, 24), 0.9, 1.2)
    words = LETTERS.spelled([("one", 0.0, 0.3), ("four", 0.4, 0.8), ("six", 0.9, 1.2)])
    assert words == [one, four, six]
    assert cut(words, 1.2) == words
    assert cut(words, 0.6) == [one, ((6, 15), 0.4, 0.6)]
    assert cut(words, 0.42) == [one] and cut(words, -1.0) == []
    assert cut([((1,), 0.5, 0.5)], 0.4) == []
    strange = LETTERS.spelled([("42", 0.1, 0.3), ("7", 0.4, 0.8), ("9", 0.9, 1.0)])
    assert cut(strange, 0.6) == [((), 0.1, 0.3), ((), 0.4, 0.6)]  # unknown, not silent
    assert cut([((1,), 0.5, 0.5)], 0.5) == [((1,), 0.5, 0.5)]


def lexicon(folder: Path, text: str) -> str:
    (folder / "lexicon.tsv").write_text(text, encoding="utf-8")
    return str(folder / "lexicon.tsv")


def test_a_lexicon_says_how_words_sound(tmp_path: Path) -> None:
    spelling = read_spelling(lexicon(tmp_path, "though\tððOOO\ndon't\tddOOOnntt\n"))
    assert spelling.symbols == "Odntð" and spelling.classes == 6
    assert spelling.classes_of("Though,") == (5, 5, 1, 1, 1)
    assert spelling.classes_of("'Don't'") == (2, 2, 1, 1, 1, 3, 3, 4, 4)
    assert spelling.classes_of("through") == spelling.classes_of("42") == ()
    row = spell(spelling.spelled([("though", 0.08, 0.28), ("tough", 0.28, 0.36)]), 5)
    assert row.t().flatten().tolist() == [0, 0, 5, 5, 1, 1, 1, UNKNOWN, UNKNOWN, 0]
    assert read_spelling(None) == LETTERS and LETTERS.classes == 27


@pytest.mark.parametrize("text", ["", "word\n", "word\t\n", "\tw\n"])
def test_a_broken_lexicon_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"lexicon\.tsv"):
        read_spelling(lexicon(tmp_path, text))
    with pytest.raises(InputError, match="missing"):
        read_spelling(str(tmp_path / "missing"))


def test_a_latent_is_asked_one_frame_later_in_a_straight_line() -> None:
    speller, letters = LatentSpeller(5, 4), torch.full((2, 2, 6), UNKNOWN)
    letters[0, 1, 2], letters[1, 0, 4], letters[1, 1, 5] = 3, 0, 2  # the last one is never asked
    x = torch.randn(2, 6, 5)
    logits = speller(x)
    assert logits.shape == (2, 6, 2, 4)
    by_hand = F.cross_entropy(logits[0, 3, 1], torch.tensor(3))
    by_hand = (by_hand + F.cross_entropy(logits[1, 5, 0], torch.tensor(0))) / 2
    loss, right = speller.loss(x, letters)
    torch.testing.assert_close(loss, by_hand)
    assert right == (logits[0, 3, 1].argmax() == 3)
    told = (speller.directions @ torch.randn(5)).view(2, 4)  # what softmax cannot see is left out
    torch.testing.assert_close(told.mean(1), torch.zeros(2), atol=1e-5, rtol=0)


def test_letters_are_told_some_frames_after_they_were_heard() -> None:
    T = AFTER + 4
    heard, spoken = (written((word, 0.0, 0.16), frames=T) for word in ("abcd", "efgh"))
    rows = labels(heard, spoken, 3)
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
    speller = Speller(8, LETTERS.classes)
    x, letters = torch.randn(2, 5, 8), torch.full((2, 4, 5), UNKNOWN)
    letters[0, 1, 3], letters[1, 0, 2] = 4, 0
    logits = speller(x)
    assert logits.shape == (2, 5, 4, 27)
    by_hand = F.cross_entropy(logits[0, 3, 1], torch.tensor(4))
    by_hand = by_hand + F.cross_entropy(logits[1, 2, 0], torch.tensor(0))
    torch.testing.assert_close(speller.loss(x, letters), by_hand)
    assert speller.loss(x, torch.full_like(letters, UNKNOWN)) == 0
