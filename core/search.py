"""Beam search over the text that a model writes down: several hypotheses per slot, the best first.

A hypothesis is a row of its own for the language model: caches, delays, what was fed. Every frame
each one goes on with its likeliest tokens; hypotheses with the same words, whose tokens stand in
other frames, become one, with the sum of their probabilities; the best stay. Words may count what
an n-gram model thinks of them (`Sampling.lm_weight`). What is told is the text of the best one,
`HOLD` frames late; hypotheses that say something else are dropped then, so it is final.

A slot may hear its sound several times, each a part of a frame later (`Sampling.shifts`): a codec
that cuts it into frames elsewhere makes other mistakes. A hypothesis has a row for each of these
then, and a token's likelihood is the mean of theirs, in logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moshi_cli.core import native
from moshi_cli.core.config import LmConfig, Sampling
from moshi_cli.core.errors import UsageError
from moshi_cli.core.listed import fold
from moshi_cli.core.ngram import NOTHING, NGram
from moshi_cli.core.state import State, keep
from moshi_cli.core.text import BOS

if TYPE_CHECKING:
    from moshi_cli.core.stepper import StepState

HOLD = 12  # frames after which the text of the best hypothesis is told
LATEST = HOLD + 2  # keys in which hypotheses differ after a step …
OWN = LATEST + 1  # … and in the next one
LIKELIEST = 12  # tokens with which a hypothesis may go on
PAUSE = 12  # frames without text after which a new sentence may begin
LOST = -1e9  # score of what is no hypothesis


@dataclass
class SearchState(State):
    """The hypotheses of each slot, one after the other: H = slots · beam, the best first."""

    score: Tensor  # [H], log-probability against the best of the slot
    words: Tensor  # long[H], key of all tokens of text
    past: Tensor  # long[H, n], the latest tokens of text, newest last
    quiet: Tensor  # long[H], frames without text
    memory: Tensor  # [H, n], what a recurrent model remembers of its text
    place: Tensor  # long[H, 3 or 0], where it is among words
    beam: int
    shifts: int = 1

    def reset(self, slots: Tensor) -> None:
        """Rewind the slots whose rows of the language model are marked in bool[R]."""
        super().reset(slots.view(-1, self.shifts, self.beam)[:, 0].flatten())

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        super().rewind(tensor, slots)
        if tensor is self.score:
            others = torch.arange(len(slots), device=slots.device) % self.beam > 0
            tensor.masked_fill_(slots & others, LOST)
        elif tensor is self.past:
            tensor.masked_fill_(slots[:, None], NOTHING)
            tensor[:, -1].masked_fill_(slots, BOS)


class Search:
    """Chooses the text of a language model's rows, and moves their states along.

    The R = slots · shifts · beam rows come slot by slot, in each the hypotheses of one shift after
    those of another, in the same order.
    """

    def __init__(self, lm: LmConfig, sampling: Sampling, ngram: NGram | None = None):
        """ngram: what `sampling.lm_weight` weighs. UsageError if it is asked for and not there."""
        if sampling.lm_weight and ngram is None:
            raise UsageError("this model has no n-grams that could be weighed", "--lm-weight 0")
        self.lm, self.beam, self.shifts = lm, sampling.beam, sampling.shifts
        self.ngram = ngram if sampling.lm_weight else None
        self.worded = self.ngram is not None and self.ngram.worded
        self.weight, self.bonus = sampling.lm_weight, sampling.token_bonus

    def init_state(self, rows: int, device: torch.device | str) -> SearchState:
        """Fresh state for R rows of the language model."""
        rows, size = rows // self.shifts, 1 if self.ngram is None else max(self.ngram.context, 1)
        state = SearchState(
            torch.zeros(rows, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.full((rows, size), NOTHING, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, 0 if self.ngram is None else self.ngram.memory, device=device),
            torch.zeros(rows, 3 * self.worded, dtype=torch.long, device=device),
            self.beam,
            self.shifts,
        )
        state.reset(torch.ones(rows * self.shifts, dtype=torch.bool, device=device))
        return state

    def __call__(
        self, logits: Tensor, state: StepState, clock: Tensor, active: Tensor, latency: int
    ) -> Tensor:
        """logits float32 [R, V] of step clock long[R], active bool[R] -> text long[R].

        Row i of the result goes on from where row i of `state` is afterwards. latency: of the text,
        HOLD included.
        """
        mine, W = state.search, self.beam
        assert mine is not None
        each = logits.log_softmax(-1).view(-1, self.shifts, W, logits.shape[1])
        likely = each.mean(1).flatten(0, 1)  # [H, V]
        clock, active = self.first(clock), self.first(active)
        H, k = len(likely), min(max(LIKELIEST, W), logits.shape[1])
        value, token = likely.topk(k)  # [H, k]
        text = (token != self.lm.text_pad) & (token != self.lm.text_epad)
        if self.ngram is not None:
            memory = mine.memory if self.ngram.memory else None
            place = mine.place if self.worded else None
            usual = self.ngram(mine.past, token, memory, place)
            value = value + text * (self.weight * usual + self.bonus)
        score = (mine.score[:, None] + value).view(-1, W * k)  # [B, C]
        words = torch.where(text, fold(mine.words[:, None], token), mine.words[:, None])
        ends = torch.where(text, -1, token)  # the same words may go on differently
        score = merged(score, fold(words, ends).view(-1, W * k))
        best, at = score.topk(W)  # [B, W], falling
        first = torch.arange(H, device=logits.device)
        parent = (at // k + first.view(-1, W)[:, :1]).flatten()  # [H]
        chosen = token.view(-1, W * k).gather(1, at).flatten()
        # Nothing that is said before the text begins is fed, so there is nothing to choose.
        going = active & (clock + 1 > state.ring.grid.mutes[0])
        parent, chosen = torch.where(going, parent, first), torch.where(going, chosen, token[:, 0])
        self.follow(state, parent, clock)
        said = going & (chosen != self.lm.text_pad) & (chosen != self.lm.text_epad)
        keep(mine.words, fold(mine.words, chosen), said)
        keep(mine.past, torch.cat([mine.past[:, 1:], chosen[:, None]], 1), said)
        keep(mine.quiet, torch.where(said, 0, mine.quiet + 1), going)
        rest, rests = torch.full_like(mine.past, NOTHING), going & (mine.quiet == PAUSE)
        rest[:, -1] = BOS
        keep(mine.past, rest, rests)
        self.remember(mine, chosen, said, rests)
        # What is told of this step is final: others say it, too, or are lost.
        ring = self.first(state.ring.cells[:, 0])
        told = clock + 1 - latency + state.ring.grid.delays[0]
        cell = ring.gather(1, (told % ring.shape[1])[:, None])
        same = (cell.view(-1, W) == cell.view(-1, W)[:, :1]).flatten() | (clock < latency)
        score = torch.where(same, (best - best[:, :1]).flatten(), LOST)
        keep(mine.score, score, going)
        return chosen.view(-1, 1, W).expand(-1, self.shifts, -1).flatten()

    def first(self, x: Tensor) -> Tensor:
        """x [R, ...] of the language model's rows -> [H, ...], those of the first shift."""
        return x.view(-1, self.shifts, self.beam, *x.shape[1:])[:, 0].flatten(0, 1)

    def every(self, hypotheses: Tensor) -> Tensor:
        """Numbers of hypotheses, long[N] -> of the language model's rows, shift by shift each,
        long[N · shifts]."""
        W, shifts = self.beam, torch.arange(self.shifts, device=hypotheses.device)
        first = hypotheses // W * (W * self.shifts) + hypotheses % W
        return (first[:, None] + W * shifts).flatten()

    def remember(self, mine: SearchState, token: Tensor, said: Tensor, rests: Tensor) -> None:
        """The models of the text take up the tokens long[H] where something was said, bool[H];
        where a sentence may begin, bool[H], they forget."""
        if self.ngram is None:
            return
        if self.worded:
            keep(mine.place, self.ngram.placed(mine.place, token), said)
            mine.place.masked_fill_(rests[:, None], 0)
        if not self.ngram.memory:
            return
        if immediate(said):
            rows = torch.nonzero(said)[:, 0]
            if len(rows):
                mine.memory[rows] = self.ngram.remember(mine.memory[rows], token[rows])
        else:
            keep(mine.memory, self.ngram.remember(mine.memory, token), said)
        mine.memory.masked_fill_(rests[:, None], 0)

    def follow(self, state: StepState, parent: Tensor, clock: Tensor) -> None:
        """Every hypothesis becomes a copy of its parent, long[H], after step clock long[H].

        Of keys and values only the latest are copied: hypotheses agree on all that was told, and
        one that did not is a copy of another a step later.
        """
        mine = state.search
        assert mine is not None
        rows = torch.arange(len(parent), device=parent.device)
        if immediate(parent):
            rows = torch.nonzero(parent != rows)[:, 0]
            if not len(rows):
                return
        parent = parent[rows]
        for tensor in (mine.words, mine.past, mine.quiet, mine.memory, mine.place):
            copy_rows(tensor, rows, parent)
        clock = clock[rows].repeat_interleave(self.shifts)
        rows, parent = self.every(rows), self.every(parent)
        if not immediate(parent):  # all rows: in their order; a slot has one clock
            rows, parent = (
                x.view(-1, self.beam, self.shifts).transpose(1, 2).flatten() for x in (rows, parent)
            )
        copy_rows(state.ring.cells, rows, parent)
        steps = clock[:, None] - torch.arange(LATEST, device=clock.device)
        at = steps % state.lm.layers[0].k.shape[2]  # [rows, LATEST]
        rings = [tensor for cache in state.lm.layers for tensor in (cache.k, cache.v)]
        if immediate(parent) and native.usable(*rings) and native.library() is not None:
            native.follow(rings, rows, parent, at)
            return
        for tensor in rings:
            tensor[rows[:, None], :, at] = tensor[parent[:, None], :, at]


def copy_rows(tensor: Tensor, rows: Tensor, parent: Tensor) -> None:
    """Rows long[N] become what other ones, long[N], were. In a graph these are all, in order."""
    if immediate(tensor):
        tensor[rows] = tensor[parent]
    else:  # not a scatter: Inductor makes one in place, and reads what it has just written
        tensor.copy_(tensor[parent])


def immediate(tensor: Tensor) -> bool:
    """Whether what is done may depend on what a tensor holds, at no cost."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def merged(score: Tensor, key: Tensor) -> Tensor:
    """score [B, C], key long[B, C] -> the likeliest of those with the same key has the probability
    of all of them, the others are lost."""
    alike = key[:, :, None] == key[:, None]  # [B, C, C]
    each = torch.where(alike, score[:, None], float("-inf"))
    first = each.max(2).indices == torch.arange(score.shape[1], device=score.device)
    return torch.where(first, each.logsumexp(2), LOST)
