"""N-grams of a text, counted and smoothed (Kneser and Ney 1995, interpolated as in Chen and Goodman
1998): the table that core/ngram.py reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moshi_cli.core.errors import InputError
from moshi_cli.core.listed import Listed, brief, fold, seed
from moshi_cli.core.ngram import NGram, Words
from moshi_cli.core.text import BOS, EOS, PAD, WORD_START, Text

DISCOUNT = 0.75
EDGES = re.compile(r"^[\W_]+|[\W_]+$")


def bare(line: str) -> str:
    """A line without punctuation: what is not a letter or digit at the ends of its words."""
    return " ".join(filter(None, (EDGES.sub("", word) for word in line.split())))


def sentences(texts: Iterable[str], text: Text) -> list[list[int]]:
    """Texts as tokens between BOS and EOS, word by word as a model writes them."""
    known: dict[str, list[int]] = {}
    found = []
    for line in texts:
        tokens = [BOS]
        for word in line.split():
            if word not in known:
                known[word] = text.encode(word)
            tokens += known[word]
        if len(tokens) > 1:
            found.append([*tokens, EOS])
    return found


def begins_of(text: Text) -> Tensor:
    """Which pieces begin a word, bool[V]."""
    pieces = [text.pieces.IdToPiece(token) for token in range(text.size)]
    return torch.tensor([piece.startswith(WORD_START) for piece in pieces])


def words_of(rows: Sequence[Sequence[int]], text: Text) -> Words | None:
    """The words of token rows as `sentences` makes them; None for a tokenizer without words."""
    begins = begins_of(text)
    found: set[tuple[int, ...]] = set()
    for row in rows:
        first = [i for i, token in enumerate(row) if begins[token]]
        found.update(tuple(row[a:b]) for a, b in pairwise([*first, len(row) - 1]))
    if not found:
        return None
    words = [torch.tensor([*word, EOS]) for word in sorted(found)]
    key, known = torch.zeros(len(words), dtype=torch.long), []
    for token in pad_sequence(words, batch_first=True, padding_value=PAD).unbind(1):  # [N]
        key = fold(key, token)
        known.append(brief(key[token != PAD]))
    return Words(begins, torch.cat(known).unique())


def count(rows: Sequence[Sequence[int]], order: int, size: int, least: Sequence[int] = ()) -> NGram:
    """An n-gram model of token rows; size: of the vocabulary. InputError if there is nothing.

    least[i]: how often an n-gram of order i + 2 has to be there to be kept, 1 if it is not named.
    What is left out goes to the weight of its history.
    """
    if not any(len(row) > 1 for row in rows):
        raise InputError("there is no text to count")
    flat = torch.tensor([t for row in rows for t in row])  # [N]
    place = torch.cat([torch.arange(len(row)) for row in rows])  # in its row
    raw = {n: Grams.of(flat, place, n) for n in range(1, order + 1)}
    kept: list[tuple[Tensor, Tensor]] = []
    histories = [(raw[1].history[:1], torch.zeros(1, dtype=torch.double))]
    lower: Tensor | None = None  # p of every n-gram of the order before, and where to find it
    for n in range(1, order + 1):
        grams = raw[n]
        counts = grams.counts.double()
        if n < order:  # how many different tokens stand before it; nothing stands before BOS
            longer = raw[n + 1]
            at = torch.searchsorted(grams.keys, longer.suffix)
            before = torch.zeros(len(counts), dtype=torch.double)
            before.index_add_(0, at, torch.ones(len(at), dtype=torch.double))
            counts = torch.where(grams.first, counts, before)
        minimum = least[n - 2] if 0 <= n - 2 < len(least) else 1
        keep = (grams.counts >= minimum) & (counts > 0)
        spread, context = grams.history.unique(return_inverse=True)
        total, left = torch.zeros(2, len(spread), dtype=torch.double)
        total.index_add_(0, context, counts)
        left.index_add_(0, context, torch.where(keep, counts.clamp(max=DISCOUNT), counts))
        share = left / total.clamp(min=1e-9)  # what the history leaves to shorter ones
        if n == 1:
            shorter = torch.full((len(counts),), 1 / size, dtype=torch.double)
        else:
            assert lower is not None
            shorter = lower[torch.searchsorted(raw[n - 1].keys, grams.suffix)]
        own = torch.where(
            keep, (counts - DISCOUNT).clamp(min=0) / total[context].clamp(min=1e-9), 0
        )
        lower = own + share[context] * shorter
        kept.append((grams.keys[keep], lower[keep].log()))
        if n == 1:  # tokens that are nowhere in the text
            every = fold(torch.full((size,), seed(1)), torch.arange(size))
            missing = every[~torch.isin(every, grams.keys)]
            kept.append((missing, (share / size).log().expand(len(missing))))
        else:
            some = share < 1  # after others nothing longer is known
            histories.append((spread[some], share[some].log()))
    return NGram(order, size, listed(kept), listed(histories))


class Grams:
    """The different n-grams of an order, by rising key."""

    def __init__(
        self, keys: Tensor, counts: Tensor, suffix: Tensor, history: Tensor, first: Tensor
    ):
        self.keys, self.counts = keys, counts  # long[M]
        self.suffix = (
            suffix  # key of its last n - 1 tokens among the n-grams of that order, long[M]
        )
        self.history = history  # key of its first n - 1 tokens as a history, long[M]
        self.first = first  # whether it begins a row, bool[M]

    @classmethod
    def of(cls, flat: Tensor, place: Tensor, n: int) -> Grams:
        """Those of rows that follow each other; BOS is no token that is predicted."""
        ends = torch.nonzero(place >= max(n - 1, 1))[:, 0]  # of n-grams within a row

        def key(start: int, first: int, last: int) -> Tensor:
            """Of the tokens `first` to `last` before the end, both included."""
            x = torch.full_like(ends, start)
            for back in range(first, last - 1, -1):
                x = fold(x, flat[ends - back])
            return x

        keys, inverse, counts = key(seed(n), n - 1, 0).unique(
            return_inverse=True, return_counts=True
        )
        one = torch.zeros(len(keys), dtype=torch.long)
        one[inverse] = torch.arange(len(ends))  # some place where it stands
        suffix, history = key(seed(n - 1), n - 2, 0)[one], key(seed(-n), n - 1, 1)[one]
        return cls(keys, counts, suffix, history, (place[ends] == n - 1)[one])


def listed(parts: Sequence[tuple[Tensor, Tensor]]) -> Listed:
    """A table of long keys and their values; of keys with the same 32 bits the first one stays."""
    keys, values = (torch.cat(column) for column in zip(*parts, strict=True))
    short, order = brief(keys).sort(stable=True)
    new = torch.ones(len(short), dtype=torch.bool)
    new[1:] = short[1:] != short[:-1]
    return Listed(short[new].contiguous(), values[order][new].float())
