"""What words usually follow each other, told piece by piece: n-grams of whole words for the search.

A language model of words (an ARPA file's) says how likely a word is after the two before it. A
search goes on by pieces of words, and wants to know early. So its tables hold, for a history of
words and the beginning of a word, how likely any word with that beginning is there: the sum of all
such words, which backs off like the words themselves do. A piece is as likely as the longer
beginning is against the shorter one. That a word ends, and does not go on, is told where the next
one begins, as it is after no word in particular.

A place in a sentence is the word before the last one, the last one, and what there is of the one
that is being written, as keys of `fold`: long[3], zeros begin a sentence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_cli.core.listed import Listed, fold, seed

UNHEARD = -20.0  # log-probability of what begins no word


class WordGrams:
    """log p(piece | the words before it and the pieces of its own) of a vocabulary."""

    def __init__(self, masses: Listed, backs: Listed, begins: Tensor):
        """masses: of a history and a beginning, log-probabilities, and of a word, that it ends.
        backs: of a history, what is added where it has nothing of its own. begins: bool[V], whether
        a token begins a word."""
        self.masses, self.backs, self.begins = masses, backs, begins

    def to(self, device: torch.device | str) -> WordGrams:
        """The same on a device."""
        return WordGrams(self.masses.to(device), self.backs.to(device), self.begins.to(device))

    def begin(self, tokens: Tensor) -> Tensor:
        """Which tokens, long[...], begin a word; those beyond the vocabulary do not."""
        last = len(self.begins) - 1
        return self.begins[tokens.clamp(0, last)] & (tokens >= 0) & (tokens <= last)

    def __call__(self, place: Tensor, tokens: Tensor) -> Tensor:
        """place long[R, 3], tokens long[R, k] -> float32 [R, k] in nats."""
        second, first, part = place.unsqueeze(1).unbind(2)  # [R, 1]
        new, inside = self.begin(tokens), part != 0
        so_far, ends = self.mass(second, first, part), self.masses.find(end_key(part))[0]
        score = torch.where(new, torch.where(inside, ends, 0), -so_far)
        over = new & inside  # the word before is whole
        second, first = torch.where(over, first, second), torch.where(over, part, first)
        mass = self.mass(second, first, fold(torch.where(new, 0, part), tokens))
        heard = (new | inside) & (mass > UNHEARD)
        return torch.where(heard, score + mass, UNHEARD).clamp(UNHEARD, 0)

    def mass(self, second: Tensor, first: Tensor, part: Tensor) -> Tensor:
        """How likely a word that begins with `part` is after two others, in nats; all long[...]."""
        score, known = self.masses.find(part_key(part))
        for history in ((first,), (second, first)):
            own, there = self.masses.find(part_key(part, *history))
            score = torch.where(there, own, score + self.backs.find(back_key(*history))[0])
        return torch.where(known, score, UNHEARD)


def moved(place: Tensor, token: Tensor, new: Tensor) -> Tensor:
    """place long[R, 3], token long[R] that is written, bool[R] if it begins a word -> the place
    after it."""
    second, first, part = place.unbind(1)
    inside = part != 0
    ends = new & inside
    longer = torch.where(new | inside, fold(torch.where(new, 0, part), token), 0)
    second, first = torch.where(ends, first, second), torch.where(ends, part, first)
    return torch.stack([second, first, longer], 1)


def part_key(part: Tensor, *history: Tensor) -> Tensor:
    """The key of a beginning after some words, long[...]."""
    key = torch.zeros_like(part) + seed(11 + len(history))
    for word in history:
        key = fold(key, word)
    return fold(key, part)


def back_key(*history: Tensor) -> Tensor:
    """The key of a history, long[...]."""
    key = torch.zeros_like(history[0]) + seed(-11 - len(history))
    for word in history:
        key = fold(key, word)
    return key


def end_key(word: Tensor) -> Tensor:
    """The key of a word that ends, long[...]."""
    return fold(torch.zeros_like(word) + seed(21), word)
