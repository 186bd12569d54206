"""A language model of n-grams over text tokens: what is usually said, for the search (search.py).

Interpolated Kneser-Ney probabilities as a table that backs off: an n-gram that is in the table has
its own value, another one that of its last n - 1 tokens and the weight of its history. The words of
the text stand beside it: others are much less likely, which a few pieces do not tell. A recurrent
model of the same text may have half a say (recurrent.py), n-grams of words a third (wordgrams.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moshi_cli.core.errors import ModelError
from moshi_cli.core.listed import Listed, fold, look_up, seed
from moshi_cli.core.recurrent import Recurrent
from moshi_cli.core.text import EOS
from moshi_cli.core.wordgrams import WordGrams, moved

UNKNOWN = 10.0  # nats by which a piece that makes no word of the text is less likely
BESIDE = 0.2  # the rest of it keeps what else is said as probable as it was, or nearly
REMEMBERED = 0.5  # what a recurrent model has to say against its n-grams
WORDED = 0.35  # what n-grams of words have to say against both
NOTHING = -1  # a place in the past before anything was said
RECURRENT, WORDGRAMS = "recurrent.", "wordgrams."  # what their tensors' names begin with
PARTS = {"keys": 0, "values": 0, "histories": 1, "weights": 1}  # file's tensors, by what they list


@dataclass
class Words:
    """The words of a text, and what they begin with, piece by piece."""

    begins: Tensor  # bool[V], whether a token begins a word
    known: Tensor  # int32 [M], rising: keys of beginnings, and of words with EOS behind them

    def unknown(self, place: Tensor, tokens: Tensor) -> Tensor:
        """place long[R, 3], tokens long[R, k] -> bool[R, k]: this makes, or leaves, no word."""
        first, part = self.begin(tokens), place[:, 2:]
        inside, ends = part != 0, self.has(fold(part, torch.full_like(part, EOS)))
        broken = inside & self.has(part) & ~ends
        new = ~self.has(fold(torch.where(first, 0, part), tokens))
        return torch.where(first, broken | new, inside & new)

    def step(self, place: Tensor, token: Tensor) -> Tensor:
        """place long[R, 3] and the tokens that are written, long[R] -> place after them."""
        return moved(place, token, self.begin(token))

    def begin(self, tokens: Tensor) -> Tensor:
        """Which tokens, long[...], begin a word; those beyond the vocabulary do not."""
        last = len(self.begins) - 1
        return self.begins[tokens.clamp(0, last)] & (tokens >= 0) & (tokens <= last)

    def has(self, key: Tensor) -> Tensor:
        """Which keys, long[...], are of the text."""
        return look_up(self.known, key)[1]


class NGram:
    """log p(token | the tokens before it) over a vocabulary: by its own table, for a share of
    `REMEMBERED` by its recurrent model, for one of `WORDED` by n-grams of words, if it has them,
    and for one of `BESIDE` by another table."""

    def __init__(
        self,
        order: int,
        size: int,
        grams: Listed,
        histories: Listed,
        beside: NGram | None = None,
        words: Words | None = None,
        recurrent: Recurrent | None = None,
        wordgrams: WordGrams | None = None,
    ):
        self.order, self.size, self.grams, self.histories = order, size, grams, histories
        self.beside, self.words, self.recurrent = beside, words, recurrent
        self.wordgrams = wordgrams

    @property
    def context(self) -> int:
        """How many tokens before one count."""
        return max(self.order - 1, self.beside.context if self.beside else 0)

    @property
    def worded(self) -> bool:
        """Whether the place among words counts."""
        return self.words is not None or (self.beside is not None and self.beside.worded)

    @property
    def memory(self) -> int:
        """How many numbers tell what was said long before; 0: none are needed."""
        return 0 if self.recurrent is None else self.recurrent.memory

    def mixed(self, beside: NGram) -> NGram:
        """With the table of another one beside; their files stay apart."""
        mine = copy(self)
        mine.beside = beside
        return mine

    def to(self, device: torch.device | str) -> NGram:
        """The same on a device."""
        grams, histories = self.grams.to(device), self.histories.to(device)
        beside = None if self.beside is None else self.beside.to(device)
        words = self.words
        if words is not None:
            words = Words(words.begins.to(device), words.known.to(device))
        recurrent = None if self.recurrent is None else self.recurrent.to(device)
        wordgrams = None if self.wordgrams is None else self.wordgrams.to(device)
        return NGram(self.order, self.size, grams, histories, beside, words, recurrent, wordgrams)

    def __call__(
        self,
        past: Tensor,
        tokens: Tensor,
        memory: Tensor | None = None,
        place: Tensor | None = None,
    ) -> Tensor:
        """past long[R, context or more] (newest last, NOTHING before the first), tokens long[R, k],
        memory float32 [R, M] of the recurrent model and place long[R, 3] of the words (`placed`),
        None to do without -> float32 [R, k] in nats."""
        score = self.table(past, tokens)
        if self.recurrent is not None and memory is not None:
            said = self.recurrent.after(memory, tokens.clamp(max=self.size - 1))
            score = shared(score, said, REMEMBERED)
        if self.wordgrams is not None and place is not None:
            score = shared(score, self.wordgrams(place, tokens), WORDED)
        if self.words is not None and place is not None:
            score = score - UNKNOWN * self.words.unknown(place, tokens)
        if self.beside is None:
            return score
        return shared(score, self.beside(past, tokens, None, place), BESIDE)

    def placed(self, place: Tensor, token: Tensor) -> Tensor:
        """place long[R, 3] among the words of a text (see wordgrams.py) and the tokens that are
        said, long[R] -> place after them."""
        worded = self if self.words is not None or self.beside is None else self.beside
        return place if worded.words is None else worded.words.step(place, token)

    def remember(self, memory: Tensor, token: Tensor) -> Tensor:
        """memory [R, M] and the tokens that are said, long[R] -> memory after them."""
        assert self.recurrent is not None
        return self.recurrent.step(memory, token.clamp(max=self.size - 1))

    def table(self, past: Tensor, tokens: Tensor) -> Tensor:
        """What its own table says, of any words."""
        start = torch.zeros_like(tokens[:, :1])
        score = self.grams.find(fold(start + seed(1), tokens))[0]
        for n in range(2, self.order + 1):
            key, before = start + seed(n), start + seed(-n)
            for token in past[:, past.shape[1] - n + 1 :].unbind(1):
                key, before = fold(key, token[:, None]), fold(before, token[:, None])
            value, there = self.grams.find(fold(key, tokens))
            score = torch.where(there, value, score + self.histories.find(before)[0])
        return score

    def save(self, path: Path) -> None:
        """Write its own tables and recurrent model as safetensors, values in half precision."""
        tables = (self.grams, self.histories)
        tensors = {
            name: (tables[i].keys if name in ("keys", "histories") else tables[i].values.half())
            for name, i in PARTS.items()
        }
        if self.words is not None:
            tensors |= {"words": self.words.known, "begins": self.words.begins}
        if self.recurrent is not None:
            weights = self.recurrent.state_dict()
            tensors |= {f"{RECURRENT}{name}": value.half() for name, value in weights.items()}
        if self.wordgrams is not None:
            assert self.words is not None  # they share what begins a word
            for name in ("masses", "backs"):
                table = getattr(self.wordgrams, name)
                tensors[f"{WORDGRAMS}{name}.keys"] = table.keys
                tensors[f"{WORDGRAMS}{name}.values"] = table.values.half()
        facts = {"order": str(self.order), "size": str(self.size)}
        part = path.with_name(f"{path.name}.tmp.{os.getpid()}")  # whole or absent
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(part), facts)
        part.chmod(0o644)
        part.replace(path)


def load_ngram(path: Path, device: torch.device | str = "cpu") -> NGram:
    """What `NGram.save` wrote. ModelError for anything else."""
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            keys, values, histories, weights = (file.get_tensor(name) for name in PARTS)
            words = None
            if "words" in file.keys():
                words = Words(file.get_tensor("begins"), file.get_tensor("words"))
            found = {name: file.get_tensor(name) for name in file.keys() if RECURRENT in name}
            worded = {name: file.get_tensor(name) for name in file.keys() if WORDGRAMS in name}
        order, size = int(facts["order"]), int(facts["size"])
    except Exception as error:
        raise ModelError(f"{path}: not n-grams of a language ({error})") from None
    try:
        recurrent = recurrent_of(found, size) if found else None
    except (IndexError, KeyError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"{path}: its recurrent model is broken ({said})") from None
    try:
        wordgrams = wordgrams_of(worded, words) if worded else None
    except (IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"{path}: its n-grams of words are broken ({error})") from None
    grams, before = Listed(keys, values.float()), Listed(histories, weights.float())
    fit = len(keys) == len(values) and len(histories) == len(weights) and len(keys) > 0
    if words is not None:
        fit &= len(words.begins) == size and words.begins.dtype == torch.bool
        fit &= len(words.known) > 0 and words.known.dtype == torch.int32
    if not (fit and 1 <= order <= 9 and keys.dtype == histories.dtype == torch.int32):
        raise ModelError(f"{path}: not n-grams of a language (its tables do not fit)")
    ngram = NGram(order, size, grams, before, words=words, recurrent=recurrent, wordgrams=wordgrams)
    return ngram.to(device)


def recurrent_of(tensors: Mapping[str, Tensor], size: int) -> Recurrent:
    """The recurrent model of a file's tensors; size: of the vocabulary. IndexError, KeyError or
    RuntimeError if they are not one."""
    weights = {name.removeprefix(RECURRENT): value.float() for name, value in tensors.items()}
    width, dim = weights["lstm.weight_hh_l0"].shape[1], weights["lstm.weight_ih_l0"].shape[1]
    model = Recurrent(size, dim, width)
    model.load_state_dict(weights)
    model.refresh()
    return model.eval().requires_grad_(False)


def wordgrams_of(tensors: Mapping[str, Tensor], words: Words | None) -> WordGrams:
    """The n-grams of words of a file's tensors. KeyError or TypeError if they are not some."""
    tables = []
    for name in ("masses", "backs"):
        keys = tensors[f"{WORDGRAMS}{name}.keys"]
        values = tensors[f"{WORDGRAMS}{name}.values"]
        if words is None or len(keys) != len(values) or not len(keys) or keys.dtype != torch.int32:
            raise TypeError(f"{name} do not fit")
        tables.append(Listed(keys, values.float()))
    assert words is not None
    return WordGrams(tables[0], tables[1], words.begins)


def shared(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Log-probabilities of two models as one, in which the second has a share."""
    return torch.logaddexp(first + math.log(1 - share), second + math.log(share))
