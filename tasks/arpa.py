"""Language models of words in the ARPA format, made into tables of pieces (core/wordgrams.py).

What is kept are words, pairs and triples; longer n-grams are left out. Of pairs and triples those
stay that tell most: p(words) · p(word | before) · |log of what is gained over backing off| (Stolcke
1998, without what the weights of histories add). Histories are weighed anew, so that the words
after each sum up to one.
"""

from __future__ import annotations

import gzip
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moshi_cli.core.errors import InputError
from moshi_cli.core.listed import fold
from moshi_cli.core.text import BOS, EOS, PAD, Text
from moshi_cli.core.wordgrams import WordGrams, back_key, end_key, part_key
from moshi_cli.tasks.ngrams import begins_of, listed

ORDER = 3
LEAST = 1e-9  # probability that is not less
TEN = math.log(10)
START, MARKS = "<s>", ("</s>", "<s>", "<unk>", "<UNK>")


@dataclass
class Grams:
    """All n-grams of one length."""

    words: np.ndarray  # int64 [N, n]
    p: np.ndarray  # float64 [N], of the last word
    back: np.ndarray  # float64 [N], by which shorter ones count as a history


@dataclass
class Arpa:
    """A file's words and its n-grams, shortest first."""

    words: list[str]
    grams: list[Grams]


def read_arpa(path: Path) -> Arpa:
    """A file, gzipped or not. InputError with the line that is wrong."""
    ids: dict[str, int] = {}
    found: list[Grams] = []
    rows: list[tuple[list[int], float, float]] = []
    n = 0

    def close() -> None:
        if n == 1 and not rows:
            raise InputError(f"{path}: no 1-grams")
        if rows:
            if len(found) < n - 1:
                raise InputError(f"{path}: no {n - 1}-grams")
            words, p, back = zip(*rows, strict=True)
            found.append(Grams(np.array(words), np.exp(np.array(p)), np.exp(np.array(back))))
            rows.clear()

    for number, line in lines(path):
        if line.startswith("\\"):
            name = line.strip()
            if name == "\\data\\" or name == "\\end\\":
                continue
            close()
            n += 1
            if name != f"\\{n}-grams:":
                raise InputError(f"{path}:{number}: {name} instead of \\{n}-grams:")
            if n > ORDER:
                n = 0
                break
        elif n and (parts := line.split()):
            try:
                words = parts[1 : n + 1]
                p, back = float(parts[0]), float(parts[n + 1]) if len(parts) > n + 1 else 0.0
                if not (p <= 0 and math.isfinite(p) and math.isfinite(back)):
                    raise ValueError(f"p = 10^{p}, weight 10^{back}")
                row = [ids.setdefault(word, len(ids)) if n == 1 else ids[word] for word in words]
                if len(row) < n:
                    raise ValueError("too few words")
                rows.append((row, p * TEN, back * TEN))
            except (ValueError, KeyError) as error:
                raise InputError(f"{path}:{number}: not an {n}-gram ({error})") from None
    close()
    if not found:
        raise InputError(f"{path}: not a language model in the ARPA format")
    return Arpa(list(ids), found)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1. InputError if it cannot be read."""
    try:
        zipped = path.open("rb").read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt") if zipped else path.open() as file:
            yield from enumerate(file, 1)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path}: {error}") from None


class Spelled:
    """The words of an ARPA file in pieces, and what they begin with."""

    def __init__(self, arpa: Arpa, text: Text):
        self.arpa, self.text = arpa, text
        self.ids: dict[tuple[int, ...], int] = {}  # of all beginnings
        self.parts: list[list[int]] = []  # of each word: its beginnings, the whole word last
        for word in arpa.words:
            pieces = () if word in MARKS else tuple(text.encode(word))
            if any(piece <= PAD for piece in pieces):
                pieces = ()
            self.parts.append(
                [self.ids.setdefault(pieces[:n], len(self.ids)) for n in range(1, len(pieces) + 1)]
            )
        self.start = arpa.words.index(START) if START in arpa.words else -1
        if not self.ids:
            raise InputError("no word of the ARPA file has pieces in this vocabulary")
        self.usable = np.array([bool(parts) for parts in self.parts])
        single = arpa.grams[0]
        self.single = np.zeros(len(arpa.words))
        self.single[single.words[:, 0]] = single.p
        self.single *= self.usable
        self.single /= self.single.sum()
        self.mass = np.zeros(len(self.ids))  # of each beginning
        self.whole = np.zeros(len(self.ids))  # as a word of its own
        for parts, p in zip(self.parts, self.single, strict=True):
            self.mass[parts] += p
            if parts:
                self.whole[parts[-1]] += p

    @property
    def rows(self) -> list[list[int]]:
        """Its words as sentences of one word."""
        pieces = list(self.ids)
        return [[BOS, *pieces[parts[-1]], EOS] for parts in self.parts if parts]

    def tables(self, kept: int) -> WordGrams:
        """Everything as keys and values; kept: how many pairs and triples stay."""
        pairs, triples = self.telling(kept)
        key = self.keys()
        word = torch.zeros(len(self.parts), dtype=torch.long)  # its key; 0 begins a sentence
        for i, parts in enumerate(self.parts):
            if parts:
                word[i] = key[parts[-1]]
        self.after: dict[int, tuple[float, dict[int, float], dict[int, float]]] = {}
        masses = [(part_key(key), logs(self.mass))]
        said = torch.from_numpy(np.flatnonzero(self.whole > 0))
        ends = self.whole[said.numpy()] / self.mass[said.numpy()]
        masses.append((end_key(key[said]), logs(ends)))
        backs = []
        for n, rows in ((2, pairs), (3, triples)):
            entries, histories = self.spread(n, rows)
            if entries:
                columns = np.array([entry[:n] for entry in entries])
                before = [word[torch.from_numpy(columns[:, i])] for i in range(n - 1)]
                part = key[torch.from_numpy(columns[:, n - 1])]
                masses.append((part_key(part, *before), logs([entry[n] for entry in entries])))
                columns = np.array([history[: n - 1] for history in histories])
                before = [word[torch.from_numpy(columns[:, i])] for i in range(n - 1)]
                backs.append((back_key(*before), logs([row[n - 1] for row in histories])))
        if not backs:
            backs = [(torch.zeros(1, dtype=torch.long), torch.zeros(1))]
        return WordGrams(listed(masses), listed(backs), begins_of(self.text))

    def keys(self) -> Tensor:
        """The key of each beginning, long[N]."""
        key = torch.zeros(len(self.ids), dtype=torch.long)
        for pieces, i in self.ids.items():  # shorter ones come first
            before = key[self.ids[pieces[:-1]]] if len(pieces) > 1 else torch.tensor(0)
            key[i] = fold(before, torch.tensor(pieces[-1]))
        return key

    def telling(self, kept: int) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs and triples tell most, by number."""
        grams, gains, history = self.arpa.grams, [], self.usable.copy()
        if self.start >= 0:
            history[self.start] = True
        size = len(self.parts)
        back = np.ones(size)
        back[grams[0].words[:, 0]] = grams[0].back
        once = self.single.copy()
        if self.start >= 0:
            once[self.start] = self.single.max()  # about as often as the commonest word
        if len(grams) > 1:
            a, b = grams[1].words.T
            less = np.maximum(back[a] * self.single[b], LEAST)
            gain = once[a] * grams[1].p * np.abs(np.log(grams[1].p / less))
            gains.append(gain * history[a] * self.usable[b])
        if len(grams) > 2:
            a, b, c = grams[2].words.T
            before, there = found_in(grams[1], a, b, size)
            shorter, known = found_in(grams[1], b, c, size)
            p = np.where(known, grams[1].p[shorter], back[b] * self.single[c])
            less = np.maximum(np.where(there, grams[1].back[before], 1.0) * p, LEAST)
            often = once[a] * np.where(there, grams[1].p[before], LEAST)
            gain = often * grams[2].p * np.abs(np.log(grams[2].p / less))
            gains.append(gain * history[a] * history[b] * self.usable[c])
        gains += [np.zeros(0)] * (2 - len(gains))
        every = np.concatenate(gains)
        rising = np.sort(every)
        least = 0.0 if kept >= len(every) else math.inf if not kept else rising[-kept]
        pairs, triples = (np.flatnonzero((gain >= least) & (gain > 0)) for gain in gains)
        return pairs, triples

    def spread(self, n: int, rows: np.ndarray) -> tuple[list[tuple], list[tuple]]:
        """The n-grams of some numbers -> (history, beginning, probability) of all beginnings of
        their words, and (history, weight) of all their histories."""
        if not len(rows):
            return [], []
        grams = self.arpa.grams[n - 1]
        of: dict[tuple[int, ...], list[tuple[int, float]]] = defaultdict(list)
        for words, p in zip(grams.words[rows].tolist(), grams.p[rows].tolist(), strict=True):
            of[tuple(words[:-1])].append((words[-1], p))
        entries, histories = [], []
        for history, words in of.items():
            shorter = self.after.get(history[-1], (1.0, {}, {})) if n > 2 else (1.0, {}, {})
            less = [shorter[1].get(word, shorter[0] * self.single[word]) for word, _ in words]
            rest = max(1 - sum(p for _, p in words), 1e-4)
            back = rest / max(1 - sum(less), 1e-4)
            more: dict[int, float] = defaultdict(float)
            for (word, p), q in zip(words, less, strict=True):
                for part in self.parts[word]:
                    more[part] += p - back * q
            told = {
                part: max(d + back * shorter[2].get(part, shorter[0] * self.mass[part]), LEAST)
                for part, d in more.items()
            }
            entries += [(*history, part, p) for part, p in told.items()]
            histories.append((*history, back))
            if n == 2:
                self.after[history[0]] = (back, dict(words), told)
        return entries, histories


def found_in(
    pairs: Grams, a: np.ndarray, b: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the pairs a, b are, and whether they are, of so many words."""
    code = pairs.words[:, 0] * size + pairs.words[:, 1]
    order = np.argsort(code)
    wanted = a * size + b
    at = order[np.minimum(np.searchsorted(code[order], wanted), len(code) - 1)]
    return at, code[at] == wanted


def logs(p: Sequence[float] | np.ndarray) -> Tensor:
    """Logarithms of probabilities or weights, as a tensor."""
    return torch.from_numpy(np.log(np.maximum(np.asarray(p, dtype=float), LEAST)))
