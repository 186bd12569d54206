"""Word errors after one fixed normaliser, and how sure their rates are.

`normalise` is versioned by NORMALISER: figures of different versions are not comparable. Word error
rates are those of the whole corpus (all errors over all reference words), with the interval that
95 % of the rates lie in when utterances are drawn anew with replacement.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moshi_cli.tasks.wording import cardinal, digits, ordinal

NORMALISER = "moshi-en-2"
SPELLINGS = {  # one spelling where English has several; the key is what other tools write
    "alfa": "alpha", "cannot": "can not", "colour": "color", "favourite": "favorite",
    "gray": "grey", "juliett": "juliet", "juliette": "juliet", "ok": "okay", "quebeck": "quebec",
    "oneplus": "one plus", "whisky": "whiskey", "xray": "x ray", "good bye": "goodbye",
    "o clock": "o'clock",
}  # fmt: skip
CONTRACTIONS = {
    "can't": "can not", "won't": "will not", "shan't": "shall not", "let's": "let us",
    "it's": "it is", "that's": "that is", "what's": "what is", "who's": "who is",
    "where's": "where is", "there's": "there is", "here's": "here is", "how's": "how is",
    "he's": "he is", "she's": "she is",
}  # fmt: skip
ENDINGS = {"n't": " not", "'m": " am", "'re": " are", "'ll": " will", "'ve": " have"}
SYMBOLS = {"+": "plus", "&": "and", "%": "percent"}
LONGEST_RUN = 12  # digits whose readings are all tried


# Normaliser ---------------------------------------------------------------------------------------


def normalise(text: str, like: str | None = None) -> str:
    """Lower case, no hyphens or punctuation, no contractions, one spelling, numbers as words.

    like: the reference, if `text` is a transcript. Figures can be read in several ways ("2014": two
    thousand fourteen, twenty fourteen, two zero one four); the reading nearest to the reference
    counts, else the cardinal (digits one by one where it begins with 0).
    """
    tokens = list(_tokens(text))
    if like is None or all(len(_readings(token)) == 1 for token in tokens):
        return " ".join(word for token in tokens for word in _readings(token)[0])
    return " ".join(_nearest([_readings(token) for token in tokens], normalise(like).split()))


def _tokens(text: str) -> Iterator[str]:
    """Words, runs of figures, and "="."""
    text = unicodedata.normalize("NFKD", text.lower()).replace("’", "'")
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 12,000
    text = re.sub(
        r"(?<![\d.])(\d+)\.(\d+)(?![\d.])", lambda m: " ".join([m[1], "point", *m[2]]), text
    )
    text = re.sub(
        r"\b(\d{1,9})(?:st|nd|rd|th)\b", lambda m: " ".join(parts(ordinal(int(m[1])))), text
    )
    for symbol, word in SYMBOLS.items():
        text = text.replace(symbol, f" {word} ")
    text = re.sub(r"[^a-z0-9'= ]+", " ", text)
    text = re.sub(r"(?<=\d)(?=[a-z])|(?<=[a-z])(?=\d)|(?==)|(?<==)", " ", text)
    words = []
    for word in (word.strip("'") for word in text.split()):
        word = CONTRACTIONS.get(word, word)
        for ending, full in ENDINGS.items():
            word = word.removesuffix(ending) + full if word.endswith(ending) else word
        words += word.split()
    text = f" {' '.join(words)} "
    for other, ours in SPELLINGS.items():
        text = text.replace(f" {other} ", f" {ours} ")
    yield from text.split()


def parts(words: list[str]) -> list[str]:
    """["forty-two"] -> ["forty", "two"]"""
    return [part for word in words for part in word.split("-")]


def _readings(token: str) -> list[tuple[str, ...]]:
    """The ways to say a token, the default one first."""
    if token == "=":
        return [("equals",), ("is",)]
    if not token.isdigit():
        return [(token,)]
    single = tuple(digits(token))
    if len(token) > LONGEST_RUN:
        return [single]
    whole = single if len(token) > 1 and token[0] == "0" else tuple(parts(cardinal(int(token))))
    return list(dict.fromkeys([whole, *_cuts(token)]))


def _cuts(run: str) -> Iterator[tuple[str, ...]]:
    """Every way to say a run of figures as numbers of one or two digits."""
    if not run:
        yield ()
    for size in (1, 2)[: len(run)]:
        for rest in _cuts(run[size:]):
            yield (*_small(run[:size]), *rest)


def _small(number: str) -> list[str]:
    return digits(number) if number[0] == "0" else parts(cardinal(int(number)))


def _nearest(slots: list[list[tuple[str, ...]]], like: list[str]) -> tuple[str, ...]:
    """One reading per slot such that the whole has the fewest errors against `like`."""
    Row = list[tuple[int, tuple[str, ...]]]  # per prefix of `like`: errors, the words read so far

    def extend(row: Row, words: Iterable[str]) -> Row:
        for word in words:
            longer = [(row[0][0] + 1, (*row[0][1], word))]
            for j, target in enumerate(like, 1):
                same = (row[j - 1][0] + (target != word), (*row[j - 1][1], word))
                extra = (row[j][0] + 1, (*row[j][1], word))
                missing = (longer[j - 1][0] + 1, longer[j - 1][1])
                longer.append(min(same, extra, missing, key=lambda cell: cell[0]))
            row = longer
        return row

    row: Row = [(j, ()) for j in range(len(like) + 1)]
    for readings in slots:
        rows = [extend(row, reading) for reading in readings]
        row = [min(cells, key=lambda cell: cell[0]) for cells in zip(*rows, strict=True)]
    return row[-1][1]


# Word errors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordErrors:
    """Errors of one utterance or of many; they add up."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # of the reference

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Word error rate; without reference words, any word is an error rate of 1."""
        return self.errors / self.words if self.words else float(self.errors > 0)

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(
            self.substitutions + other.substitutions, self.deletions + other.deletions,
            self.insertions + other.insertions, self.words + other.words,
        )  # fmt: skip


def word_errors(reference: str, transcript: str) -> WordErrors:
    """Errors of a transcript, both sides normalised here."""
    import jiwer

    wanted, found = normalise(reference), normalise(transcript, like=reference)
    if not wanted:
        return WordErrors(insertions=len(found.split()))
    result = jiwer.process_words(wanted, found)
    return WordErrors(
        result.substitutions, result.deletions, result.insertions, len(wanted.split())
    )


@dataclass(frozen=True)
class Rate:
    """A word error rate and what stands behind it; `low` and `high` bound 95 % of the draws."""

    total: WordErrors
    low: float
    high: float
    mean: float  # of the utterances' own rates
    exact: float  # share of utterances without an error
    utterances: int

    @property
    def rate(self) -> float:
        return self.total.rate


def corpus_rate(parts: Sequence[WordErrors], *, draws: int = 2000, seed: int = 0) -> Rate:
    """The rate of all utterances together."""
    assert parts
    low, high = _interval(_table(parts), None, draws, seed)
    return Rate(
        sum(parts, WordErrors()), low, high,
        mean=sum(part.rate for part in parts) / len(parts),
        exact=sum(part.errors == 0 for part in parts) / len(parts),
        utterances=len(parts),
    )  # fmt: skip


def difference(
    parts: Sequence[WordErrors], minus: Sequence[WordErrors], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How much higher the rate of `parts` is than that of `minus`, same utterances.

    -> the difference, and the bounds of 95 % of the draws.
    """
    assert len(parts) == len(minus) > 0, (len(parts), len(minus))
    value = sum(parts, WordErrors()).rate - sum(minus, WordErrors()).rate
    return (value, *_interval(_table(parts), _table(minus), draws, seed))


def _table(parts: Sequence[WordErrors]) -> NDArray[np.int64]:
    return np.array([(part.errors, part.words) for part in parts], dtype=np.int64)  # [N, 2]


def _interval(
    table: NDArray[np.int64], minus: NDArray[np.int64] | None, draws: int, seed: int
) -> tuple[float, float]:
    drawn = np.random.default_rng(seed).integers(len(table), size=(draws, len(table)))

    def rates(table: NDArray[np.int64]) -> NDArray[np.float64]:
        errors, words = table[drawn].sum(axis=1).T  # [draws] each
        return errors / np.maximum(words, 1)

    values = rates(table) - (rates(minus) if minus is not None else 0.0)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
