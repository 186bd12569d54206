"""A language model of n-grams over text tokens: what is usually said, for the search (search.py).

Interpolated Kneser-Ney probabilities as a table that backs off: an n-gram that is in the table has
its own value, another one that of its last n - 1 tokens and the weight of its history. The words of
the text stand beside it: others are much less likely, which a few pieces do not tell. Keys are
hashes of 32 bits: of a million entries, one look-up in four thousand finds what is not there.
A recurrent model of the same text may have half a say (recurrent.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moshi_cli.core.errors import ModelError
from moshi_cli.core.recurrent import Recurrent
from moshi_cli.core.sampling import mix
from moshi_cli.core.text import EOS, PAD

UNKNOWN = 10.0  # nats by which a piece that makes no word of the text is less likely
PIECES = 7  # of a word, the last of which are looked at; a longer word counts as known
BESIDE = 0.2  # the rest of it keeps what else is said as probable as it was, or nearly
REMEMBERED = 0.5  # what a recurrent model has to say against its n-grams
NOTHING = -1  # a place in the past before anything was said
RECURRENT = "recurrent."  # what its tensors' names begin with
PARTS = {"keys": 0, "values": 0, "histories": 1, "weights": 1}  # file's tensors, by what they list


def fold(key: Tensor, token: Tensor) -> Tensor:
    """The 64-bit key of an n-gram and one more token, long -> long (they broadcast)."""
    return mix(key * 31 + token + 2)


def seed(order: int) -> int:
    """Where the keys of n-grams of an order begin."""
    return order * 0x51ED270B


def brief(key: Tensor) -> Tensor:
    """The 32 bits of a key that the table holds, as int32."""
    return (key >> 32).to(torch.int32)


def look_up(keys: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """keys int32[M], rising; key long[...] -> where it may be, long[...]; if it is, bool[...]."""
    wanted = brief(key)
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return at, keys[at] == wanted


@dataclass
class Listed:
    """A map from n-grams to numbers: sorted keys and their values."""

    keys: Tensor  # int32 [M], rising
    values: Tensor  # float32 [M]

    def find(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """long[...] -> values [...] (0 where there is none), whether there is one, bool[...]."""
        at, there = look_up(self.keys, key)
        return torch.where(there, self.values[at], 0.0), there


@dataclass
class Words:
    """The words of a text, and what they begin with, piece by piece."""

    begins: Tensor  # bool[V], whether a token begins a word
    known: Tensor  # int32 [M], rising: keys of beginnings, and of words with EOS behind them

    def unknown(self, past: Tensor, tokens: Tensor) -> Tensor:
        """past long[R, n], tokens long[R, k] -> bool[R, k]: it makes, or leaves behind, no word."""
        key, inside = torch.zeros_like(past[:, 0]), torch.zeros_like(past[:, 0], dtype=torch.bool)
        for token in past.unbind(1):
            first = self.begin(token)
            key = fold(torch.where(first, 0, key), token)
            inside = first | (inside & (token > PAD))
        first, key, inside = self.begin(tokens), key[:, None], inside[:, None]
        ends = self.has(fold(key, torch.full_like(key, EOS)))
        broken = inside & self.has(key) & ~ends
        new = ~self.has(fold(torch.where(first, 0, key), tokens))
        return torch.where(first, broken | new, inside & new)

    def begin(self, tokens: Tensor) -> Tensor:
        """Which tokens, long[...], begin a word; those beyond the vocabulary do not."""
        last = len(self.begins) - 1
        return self.begins[tokens.clamp(0, last)] & (tokens >= 0) & (tokens <= last)

    def has(self, key: Tensor) -> Tensor:
        """Which keys, long[...], are of the text."""
        return look_up(self.known, key)[1]


class NGram:
    """log p(token | the tokens before it) over a vocabulary: by its own table, for a share of
    `REMEMBERED` by its recurrent model, if it has one, and for one of `BESIDE` by another table."""

    def __init__(
        self,
        order: int,
        size: int,
        grams: Listed,
        histories: Listed,
        beside: NGram | None = None,
        words: Words | None = None,
        recurrent: Recurrent | None = None,
    ):
        self.order, self.size, self.grams, self.histories = order, size, grams, histories
        self.beside, self.words, self.recurrent = beside, words, recurrent

    @property
    def context(self) -> int:
        """How many tokens before one count."""
        own = max(self.order - 1, PIECES if self.words else 0)
        return max(own, self.beside.context if self.beside else 0)

    @property
    def memory(self) -> int:
        """How many numbers tell what was said long before; 0: none are needed."""
        return 0 if self.recurrent is None else self.recurrent.memory

    def mixed(self, beside: NGram) -> NGram:
        """With the table of another one beside; their files stay apart."""
        return NGram(
            self.order, self.size, self.grams, self.histories, beside, self.words, self.recurrent
        )

    def to(self, device: torch.device | str) -> NGram:
        """The same on a device."""
        grams, histories = (
            Listed(t.keys.to(device), t.values.to(device)) for t in (self.grams, self.histories)
        )
        beside = None if self.beside is None else self.beside.to(device)
        words = self.words
        if words is not None:
            words = Words(words.begins.to(device), words.known.to(device))
        recurrent = None if self.recurrent is None else self.recurrent.to(device)
        return NGram(self.order, self.size, grams, histories, beside, words, recurrent)

    def __call__(self, past: Tensor, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        """past long[R, context or more] (newest last, NOTHING before the first), tokens long[R, k],
        memory float32 [R, M] of the recurrent model, or None to do without -> float32 [R, k] in
        nats."""
        score = self.table(past, tokens)
        if self.recurrent is not None and memory is not None:
            said = self.recurrent.after(memory, tokens.clamp(max=self.size - 1))
            score = shared(score, said, REMEMBERED)
        if self.words is not None:
            score = score - UNKNOWN * self.words.unknown(past[:, -PIECES:], tokens)
        return score if self.beside is None else shared(score, self.beside(past, tokens), BESIDE)

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
        """Write its own table and recurrent model as safetensors, values in half precision."""
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
        order, size = int(facts["order"]), int(facts["size"])
    except Exception as error:
        raise ModelError(f"{path}: not n-grams of a language ({error})") from None
    try:
        recurrent = recurrent_of(found, size) if found else None
    except (IndexError, KeyError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"{path}: its recurrent model is broken ({said})") from None
    grams, before = Listed(keys, values.float()), Listed(histories, weights.float())
    fit = len(keys) == len(values) and len(histories) == len(weights) and len(keys) > 0
    if words is not None:
        fit &= len(words.begins) == size and words.begins.dtype == torch.bool
        fit &= len(words.known) > 0 and words.known.dtype == torch.int32
    if not (fit and 1 <= order <= 9 and keys.dtype == histories.dtype == torch.int32):
        raise ModelError(f"{path}: not n-grams of a language (its tables do not fit)")
    return NGram(order, size, grams, before, words=words, recurrent=recurrent).to(device)


def recurrent_of(tensors: Mapping[str, Tensor], size: int) -> Recurrent:
    """The recurrent model of a file's tensors; size: of the vocabulary. IndexError, KeyError or
    RuntimeError if they are not one."""
    weights = {name.removeprefix(RECURRENT): value.float() for name, value in tensors.items()}
    width, dim = weights["lstm.weight_hh_l0"].shape[1], weights["lstm.weight_ih_l0"].shape[1]
    model = Recurrent(size, dim, width)
    model.load_state_dict(weights)
    model.refresh()
    return model.eval().requires_grad_(False)


def shared(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Log-probabilities of two models as one, in which the second has a share."""
    return torch.logaddexp(first + math.log(1 - share), second + math.log(share))
