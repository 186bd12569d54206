"""Pairs of which a language model should find one likelier: words, grammar, story endings.

The paper's textless suites (§5.3, Table 7): sWUGGY (a word or none), sBLIMP (grammatical or not),
sTopic-StoryCloze and sStoryCloze (the right ending). A side is scored as sound or as text:
    sound   codes of one voice, the text stream empty; -Σ weight · nats, the semantic codebook 100,
            the others 1, as in training
    text    tokens one per frame, nothing heard, as in training on text; the end counts as a token
By length, a score is divided by the weights of its tokens, and sides of different length compare.
Scores of equal size are half a right answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moshi_cli.core import audio
from moshi_cli.core.errors import InputError, ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import LmWeights, join_shifted
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.streams import Role
from moshi_cli.core.text import EOS, Text
from moshi_cli.tasks.cache import encode_lines
from moshi_cli.tasks.evaluation import Figure, kept, mean
from moshi_cli.tasks.excerpts import SPEECH
from moshi_cli.tasks.likelihood import Examiner, Scene, nlls
from moshi_cli.tasks.pair_suites import Side
from moshi_cli.tasks.samples import LmBatch
from moshi_cli.tasks.texts import Texts, encode

TEXTLESS = replace(SPEECH, text=Role.ABSENT)
WEIGHTS = LmWeights()  # 100 to 1


# Scores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How likely a side is: log-likelihood in weighted nats, and the weights of its tokens."""

    loglik: float
    mass: float

    def value(self, by_length: bool) -> float:
        """What is compared."""
        return self.loglik / self.mass if by_length else self.loglik


class Judge:
    """Sides to scores."""

    def __init__(self, lm: MoshiLm, text: Text, mimi: Mimi, weights: LmWeights = WEIGHTS):
        self.lm, self.text, self.mimi, self.weights = lm, text, mimi, weights

    def batch(self, side: Side) -> LmBatch:
        """A side on its own. InputError if there is nothing to score, ModelError."""
        if side.text is not None:
            tokens = [*encode(self.text, side.text), EOS]
            if len(tokens) == 1:
                raise InputError(f"{side.text!r}: has no tokens")
            return Texts(tokens, self.lm.config).whole()
        assert side.path is not None
        if not self.lm.config.dep_q:
            raise ModelError("this model writes but does not speak: it can judge texts only")
        sound = audio.read(side.path)  # [1, S]
        if not sound.shape[1]:
            raise InputError(f"{side.path}: is empty")
        scene = Scene(encode_lines(self.mimi, sound), None)
        return Examiner(self.lm, self.text, TEXTLESS).batch([scene])

    def scores(self, batches: Sequence[LmBatch]) -> list[Score]:
        """Of several sides at once; company changes nothing."""
        joined = LmBatch(
            join_shifted([b.shifted for b in batches]),
            [lag for b in batches for lag in b.lags],
            [name for b in batches for name in b.names],
        )
        found, w = nlls(self.lm, joined), self.weights
        each = torch.full((found.nats.shape[1], 1), w.acoustic, dtype=torch.float64)
        each[0] = w.text
        each[1:2] = w.semantic

        def total(x: Tensor) -> list[float]:
            return (x.double() * each).sum((1, 2)).tolist()

        pairs = zip(total(found.nats), total(found.mask), strict=True)
        return [Score(-nats, mass) for nats, mass in pairs]


def right(good: Score, bad: Score, by_length: bool) -> float:
    """1 if the good side is likelier, 0.5 if both are as likely, else 0."""
    a, b = good.value(by_length), bad.value(by_length)
    return 0.5 if a == b else float(a > b)


def figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Of rows with right and margin, perhaps group: accuracy, of all and of each group."""
    good = list(rows)
    groups = sorted({row["group"] for row in good if row.get("group")})
    found = {"accuracy": mean((row["right"] for row in good), "share")}
    for group in groups if len(groups) > 1 else ():
        some = (row["right"] for row in good if row.get("group") == group)
        found[f"accuracy_{group}"] = mean(some, "share")
    found["margin"] = mean((row["margin"] for row in good), "nat")
    return kept(found)
