"""Alignments -> token row -> timed words, on a tokenizer trained here in a moment."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moshi_cli.core.errors import ModelError
from moshi_cli.core.text import (
    BOS,
    EOS,
    EPAD,
    PAD,
    Text,
    Word,
    WordStream,
    align,
    timed_words,
    train_tokenizer,
)  # fmt: skip

WORDS = "one two three four say hello to the sky alfa bravo charlie a b c d e".split()
_rng = random.Random(0)
SENTENCES = [" ".join(_rng.choices(WORDS, k=6)) for _ in range(300)]


@pytest.fixture(scope="module")
def text() -> Text:
    """A tokenizer with one token for each of WORDS."""
    return train_tokenizer(SENTENCES, 320)


def tokens(text: Text, *words: str) -> list[int]:
    return [token for word in words for token in text.encode(word)]


def rows(text: Text, words: list[tuple[str, float, float]], frames: int, crowding: str) -> list:
    return align(words, frames, text, crowding=crowding).tolist()  # type: ignore[arg-type]


# Tokenizer ----------------------------------------------------------------------------------------


def test_ids_are_where_the_model_expects_them(text: Text) -> None:
    names = [text.pieces.IdToPiece(i) for i in range(4)]
    assert names == ["<unk>", "<s>", "</s>", "<pad>"]


@pytest.mark.parametrize("word", ["three", "sky", "xylophone", "naïve", "42", "don't", "日本"])
def test_any_word_survives(text: Text, word: str) -> None:
    ids = text.encode(f" {word} ")
    assert min(ids) > PAD and text.decode(ids) == word
    assert text.opens(ids[0]) and not any(map(text.opens, ids[1:]))


def test_digits_are_single_pieces() -> None:
    text = train_tokenizer(["10 20 30 42"] * 5, 300)
    assert [text.piece(t).strip() for t in text.encode("42")][-2:] == ["4", "2"]


def test_decoding_skips_what_is_no_text(text: Text) -> None:
    row = [PAD, EPAD, *text.encode("one"), -1, PAD, BOS, *text.encode("two"), EOS, -2]
    assert text.decode(row) == "one two"
    assert "".join(map(text.piece, row)) == " one two"
    assert "".join(map(text.piece, text.encode("xé"))) == " x\ufffd\ufffd"


def test_the_same_texts_give_the_same_file(tmp_path: Path) -> None:
    first = train_tokenizer(SENTENCES, 300, tmp_path / "a.model")
    assert first.model == train_tokenizer(SENTENCES, 300).model
    assert Text(tmp_path / "a.model").model == first.model


@pytest.mark.parametrize("source", [b"", b"nonsense", "missing.model"])
def test_a_broken_tokenizer_is_one_sentence(source: str | bytes) -> None:
    with pytest.raises(ModelError):
        Text(source)


# Alignment -> row ---------------------------------------------------------------------------------


def test_a_word_stands_where_it_is_spoken(text: Text) -> None:
    """0.4 s is frame 5; the frame before announces it; all else is padding."""
    (one,) = text.encode("one")
    row = rows(text, [("one", 0.4, 0.7)], 10, "replace")
    assert row == [PAD, PAD, PAD, PAD, EPAD, one, PAD, PAD, PAD, PAD]


def test_a_word_at_the_very_start_has_no_boundary(text: Text) -> None:
    (one,) = text.encode("one")
    assert rows(text, [("one", 0.0, 0.3)], 4, "queue") == [one, PAD, PAD, PAD]
    assert rows(text, [("one", 0.0, 0.3)], 4, "space") == [EPAD, one, PAD, PAD]


def test_crowded_words(text: Text) -> None:
    """A word of four tokens is cut short, pushes the next one back, or also spaces it."""
    long, (one,) = text.encode("xyz"), text.encode("one")
    assert len(long) == 4  # word start, three bytes
    words = [("xyz", 0.16, 0.3), ("one", 0.32, 0.5)]  # frames 2 and 4
    pads = [PAD] * 4
    assert rows(text, words, 9, "replace") == [PAD, EPAD, *long[:2], one, *pads]
    assert rows(text, words, 9, "queue") == [PAD, EPAD, *long, one, PAD, PAD]
    assert rows(text, words, 9, "space") == [PAD, EPAD, *long, EPAD, one, PAD]


def test_words_that_share_a_frame(text: Text) -> None:
    """Both start in frame 3: only the last survives replacement."""
    (one,), (two,) = text.encode("one"), text.encode("two")
    words = [("two", 0.31, 0.5), ("one", 0.25, 0.3)]  # given out of order
    assert rows(text, words, 6, "replace") == [PAD, PAD, EPAD, two, PAD, PAD]
    assert rows(text, words, 6, "queue") == [PAD, PAD, EPAD, one, two, PAD]
    assert rows(text, words, 7, "space") == [PAD, PAD, EPAD, one, EPAD, two, PAD]


def test_what_cannot_be_placed_is_left_out(text: Text) -> None:
    words = [("one", -0.1, 0.2), ("two", 0.5, 0.5), ("", 0.3, 0.4), ("three", 9.0, 9.4)]
    assert rows(text, words, 10, "queue") == [PAD] * 10
    assert rows(text, [("xyz", 0.16, 1.0)], 4, "queue") == [PAD, EPAD, *text.encode("xyz")[:2]]


def test_frame_times_lie_on_the_grid(text: Text) -> None:
    """k / 12.5 s is frame k for every k, whatever floating point makes of it."""
    for k in range(1, 2000, 7):
        row = align([("one", k / 12.5, k / 12.5 + 0.1)], k + 1, text)
        assert row[k] > PAD and row[k - 1] == EPAD


# Row -> timed words -------------------------------------------------------------------------------


def times(words: list[Word]) -> list[tuple[str, float, float]]:
    return [(w.text, round(w.start_s, 3), round(w.end_s, 3)) for w in words]


def test_a_word_lasts_until_the_next_boundary(text: Text) -> None:
    row = [PAD, EPAD, *tokens(text, "one"), PAD, PAD, EPAD, *tokens(text, "two"), PAD]
    assert times(timed_words(row, text)) == [("one", 0.16, 0.4), ("two", 0.48, 0.64)]


def test_a_word_before_a_pause_ends_after_a_second(text: Text) -> None:
    row = [EPAD, *tokens(text, "one"), *[PAD] * 40, EPAD, *tokens(text, "two"), *[PAD] * 40]
    assert times(timed_words(row, text)) == [("one", 0.08, 1.08), ("two", 3.44, 4.44)]
    late = timed_words(row, text, longest_s=10.0)
    assert times(late) == [("one", 0.08, 3.36), ("two", 3.44, 6.72)]


def test_words_without_a_boundary_share_the_segment(text: Text) -> None:
    xyz = text.encode("xyz")
    row = [EPAD, *xyz, *tokens(text, "one"), PAD, EPAD, PAD]
    end = round((1 + len(xyz)) * 0.08, 3)
    assert times(timed_words(row, text)) == [
        ("xyz", 0.08, end), ("one", end, round(end + 0.16, 3)),
    ]  # fmt: skip


def test_end_of_stream_token_ends_the_word(text: Text) -> None:
    row = [EPAD, *tokens(text, "one"), PAD, EOS, PAD, PAD]
    assert times(timed_words(row, text)) == [("one", 0.08, 0.24)]


def test_offset_is_subtracted_exactly(text: Text) -> None:
    """2.5 s are 31.25 frames; times before the start are the start."""
    row = [PAD, EPAD, *tokens(text, "one"), *[PAD] * 40, EPAD, *tokens(text, "two"), PAD]
    words = times(timed_words(row, text, offset_s=2.5))
    assert words == [("one", 0.0, 0.0), ("two", 1.02, 1.18)]  # frames 44 to 46


def test_a_word_comes_out_as_soon_as_it_is_final(text: Text) -> None:
    stream = WordStream(text, channel=1)
    row = [EPAD, *tokens(text, "one"), PAD, EPAD, *tokens(text, "two")]
    came = [len(stream.push(token)) for token in row]
    assert came == [0, 0, 0, 1, 0]
    assert stream.flush() == [Word("two", 0.32, 0.4, 1)]
    assert stream.flush() == []


@pytest.mark.parametrize("crowding", ["queue", "space"])
def test_round_trip(text: Text, crowding: str) -> None:
    """Random words at random times come back in order, on their frame unless pushed back."""
    rng = random.Random(0)
    for _ in range(20):
        at, spoken = 1, []
        for _ in range(8):
            word = rng.choice([*WORDS, "xyz"])
            spoken.append((word, at / 12.5, (at + 1) / 12.5))
            at += rng.randrange(1, 14)
        row = align(spoken, at + 60, text, crowding=crowding)  # type: ignore[arg-type]
        heard = timed_words(row, text)
        assert [w.text for w in heard] == [w for w, _, _ in spoken]
        free = 0.0
        for word, (said, start_s, _) in zip(heard, spoken, strict=True):
            due = max(start_s, free + (0.08 if crowding == "space" and free >= start_s else 0))
            assert word.start_s == pytest.approx(due, abs=1e-9)
            assert word.start_s < word.end_s <= word.start_s + 1.0 + 1e-9
            free = due + 0.08 * len(text.encode(said))
