"""The recurrent language model that the search may ask (core/recurrent.py), learnt from a text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moshi_cli.core.errors import InputError
from moshi_cli.core.recurrent import Recurrent
from moshi_cli.tasks.machine import bf16_kernels

Rows = Sequence[Sequence[int]]  # sentences as tokens between BOS and EOS
NOTHING = -100  # a target that is none
SORTED = 6400  # sentences among which those of a length are brought together
WARM = 200  # batches until the rate is at its height


@dataclass(frozen=True)
class Learning:
    """How a recurrent model learns."""

    passes: int = 4  # over the text
    dim: int = 256  # of the embedding
    width: int = 512  # of the layer
    dropout: float = 0.15
    batch: int = 2400  # tokens
    rate: float = 3e-3  # at its height; it falls to a thirtieth
    seed: int = 0


def learn(
    rows: Rows,
    size: int,
    how: Learning = Learning(),
    tell: Callable[[int, float], None] | None = None,
) -> Recurrent:
    """A model of the rows; size: of the vocabulary.

    tell: is called after each pass with its number, from 1, and the nats that a token has cost of
    late. InputError if there is nothing to learn from.
    """
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError("there is no text to learn from")
    quick, cost = bf16_kernels("cpu"), 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model = Recurrent(size, how.dim, how.width, how.dropout)
        nn.init.normal_(model.embedding.weight, std=0.05)
        learner = torch.optim.AdamW(
            model.parameters(), how.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        for done in range(how.passes):
            steps = batches(rows, how, how.seed + done)
            for n, step in enumerate(steps):
                share = (done + n / len(steps)) / how.passes
                warm = (done * len(steps) + n + 1) / WARM
                for group in learner.param_groups:
                    group["lr"] = how.rate * min(1.0, warm) * (1 - 0.97 * share)
                tokens = padded([rows[i] for i in step])
                with torch.autocast("cpu", torch.bfloat16, enabled=quick):
                    logits = model(tokens[:, :-1].clamp(min=0))
                loss = surprise(logits, tokens)
                learner.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                learner.step()
                cost = loss.item() if done == n == 0 else 0.99 * cost + 0.01 * loss.item()
            if tell is not None:
                tell(done + 1, cost)
    model.eval().requires_grad_(False).refresh()
    return model


def batches(rows: Rows, how: Learning, seed: int) -> list[list[int]]:
    """The rows of a pass, by number: batches of about as many tokens, in random order."""
    draw, order = random.Random(seed), list(range(len(rows)))
    draw.shuffle(order)
    found: list[list[int]] = []
    for first in range(0, len(order), SORTED):
        batch: list[int] = []
        for i in sorted(order[first : first + SORTED], key=lambda i: len(rows[i])):
            if batch and (len(batch) + 1) * len(rows[i]) > how.batch:
                found.append(batch)
                batch = []
            batch.append(i)
        found.append(batch)
    draw.shuffle(found)
    return found


def padded(rows: Rows) -> Tensor:
    """Rows of several lengths -> long[B, S], NOTHING behind them."""
    return pad_sequence([torch.tensor(row) for row in rows], True, NOTHING)


def surprise(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [B, S - 1, V] of what follows each token, tokens long[B, S] -> nats of a token."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=NOTHING
    )
