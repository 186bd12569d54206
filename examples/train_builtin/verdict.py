"""Whether a reply is the right answer: strictly, and the same way for every question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moshi_cli.tasks.metrics import normalise, word_errors

MOST_ERRORS = 0.2  # of the words of an answer, for what a judge hears


@dataclass(frozen=True)
class Verdict:
    """How a reply compares with the answer that belongs to the question.

    exact: the same words, after the normaliser. holds: the answer is in it, maybe with other words
    round it. right: what is asked of a reply that a recogniser wrote down, which may mishear:
    at most 20 % word errors; every word of the answer that was not already in the question ("paris"
    in "the capital of france is paris") is there; and no other fixed answer is as near.
    """

    exact: bool
    holds: bool
    right: bool


def keys(question: str, answer: str) -> set[str]:
    """The words that make the answer: those that the question does not have (else all)."""
    words = set(normalise(answer).split())
    return words - set(normalise(question).split()) or words


def judged(reply: str, question: str, answer: str, answers: Sequence[str]) -> Verdict:
    """`answers`: all that the model knows, `answer` among them."""
    wanted, said = normalise(answer), normalise(reply, like=answer)
    errors = word_errors(answer, reply)
    right = errors.rate <= MOST_ERRORS and keys(question, answer) <= set(said.split())
    if right:
        others = (other for other in answers if normalise(other) != wanted)
        right = all(word_errors(other, reply).errors > errors.errors for other in others)
    return Verdict(said == wanted, f" {wanted} " in f" {said} ", right)
