"""Sentences for tokenizer and n-grams: make_texts.py OUT.jsonl, a row of words per sentence.

All open sentences of the training split, what the dictionary says of its words, utterances of the
world, questions and answers.
"""

from __future__ import annotations

import json
import random
import sys

from sentences import SELDOM_SHARES, pool
from world import load_dialogues, utterance

UTTERANCES, REPEATS = 8000, 10  # of the world, of a dialogue


def main() -> None:
    rng = random.Random(5)
    texts = [text for source in SELDOM_SHARES for text in pool(source, "train")]
    texts += [utterance(rng) for _ in range(UTTERANCES)]
    for pair in load_dialogues():
        texts += REPEATS * [*pair["questions"], pair["answer"]]
    with open(sys.argv[1], "w") as out:
        for text in texts:
            words = [word.strip(".,!?;:") for word in text.split()]
            out.write(json.dumps({"words": [[word, 0, 0] for word in words if word]}) + "\n")


if __name__ == "__main__":
    main()
