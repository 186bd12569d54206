"""Open sentences: what people write to each other, examples of a dictionary, facts.

What a dictionary says of its words is spoken, too, where seldom words are asked for (`Seldom`).

Read from three packages that teachers.sh puts in place: chitchat-dataset (MIT), WordNet's examples
(WordNet licence) and randfacts (MIT). Every sentence can be spoken as it is written: letters and
plain punctuation, 3 to 30 words. One in forty is kept for the test set and one for the dev set,
by its own hash, so that no corpus of any seed holds them.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

TEACHERS = Path(os.environ.get("TEACHERS", Path.home() / "teachers"))
WORDNET = Path("/usr/share/wordnet")
SHARES = {"chitchat": 0.65, "facts": 0.2, "wordnet": 0.15}
SELDOM_SHARES = {"chitchat": 0.5, "facts": 0.12, "wordnet": 0.13, "glosses": 0.25}
SPLITS = {0: "test", 1: "dev"}  # of 40
CONTRACTIONS = {
    short.replace("'", "").lower(): short
    for short in (
        "don't can't won't I'm I've didn't that's what's you're isn't doesn't haven't wasn't "
        "couldn't wouldn't shouldn't aren't they're there's you've"
    ).split()
}
LEFT_OUT = re.compile(  # slurs and obscenities are not taught
    r"\b(fuck|shit|bitch|cunt|dick|cock|pussy|whore|slut|nigg|fag|rape|porn|penis|vagina)\w*", re.I
)
SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,.'!?;:-]*")
# An acronym, a letter on its own, or punctuation in a row has no one way to be said.
UNSPEAKABLE = re.compile(r"\b[A-Z]{2,}\b|[.,;:!?]{2,}|(?:^|\s)[b-hj-zB-HJ-Z](?=\W|$)(?!')")


def tidy(text: str) -> str:
    """One sentence with plain quotes, a capital, a full stop and the commonest apostrophes."""
    text = text.translate({0x2019: "'", 0x201C: None, 0x201D: None, ord('"'): None})
    words = text.split()
    for i, word in enumerate(words):
        bare = word.rstrip(".,;:!?")
        if bare == "i":
            words[i] = "I" + word[1:]
        elif bare.lower() in CONTRACTIONS:
            words[i] = CONTRACTIONS[bare.lower()] + word[len(bare) :]
    text = " ".join(words)
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else text + "."


def speakable(text: str) -> bool:
    return (
        3 <= len(text.split()) <= 30
        and len(text) < 220
        and SPEAKABLE.fullmatch(text) is not None
        and not UNSPEAKABLE.search(text)
        and not LEFT_OUT.search(text)
    )


def _chitchat() -> Iterator[str]:
    path = TEACHERS / "text" / "chitchat_dataset" / "dataset.json"
    for talk in json.loads(path.read_text()).values():
        for turn in talk["messages"]:
            whole = " ".join(message["text"] for message in turn)
            yield from re.split(r"(?<=[.!?])\s+", whole)


def _wordnet() -> Iterator[str]:
    for path in sorted(WORDNET.glob("data.*")):
        for line in path.read_text(errors="replace").splitlines():
            yield from re.findall(r'"([^"]+)"', line.partition("|")[2])


def _glosses() -> Iterator[str]:
    """What the dictionary says of its words: 17,000 words that the other texts have not."""
    for path in sorted(WORDNET.glob("data.*")):
        for line in path.read_text(errors="replace").splitlines():
            told = re.sub(r'"[^"]*"?', "", line.partition("|")[2])
            for part in told.split(";"):
                part = re.sub(r"\([^)]*\)", "", part).strip(" ;,:")
                if part:
                    yield part


def _facts() -> Iterator[str]:
    yield from (TEACHERS / "text" / "randfacts" / "safe.txt").read_text().splitlines()


SOURCES = {"chitchat": _chitchat, "facts": _facts, "wordnet": _wordnet, "glosses": _glosses}


def split_of(text: str) -> str:
    """train, dev or test: a sentence is in the same one whatever its capitals and commas."""
    key = re.sub(r"[^a-z]", "", text.lower())
    return SPLITS.get(zlib.crc32(key.encode()) % 40, "train")


@functools.cache
def pool(source: str, split: str) -> tuple[str, ...]:
    """The speakable sentences of a source that are in a split, each once."""
    tidied = dict.fromkeys(tidy(text) for text in SOURCES[source]())
    return tuple(text for text in tidied if speakable(text) and split_of(text) == split)


def any_source(rng: random.Random, shares: Mapping[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def open_sentence(rng: random.Random, split: str = "train") -> str:
    return rng.choice(pool(any_source(rng, SHARES), split))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


class Seldom:
    """Open sentences of words that have been spoken seldom, for how often they are written.

    Drawn at random, four in five words are among the thousand commonest, and a recogniser errs
    on those that it has heard a few times. What one more hearing of a word is worth falls with
    the hearings it has had, and fast once they are many.
    """

    DRAWS, MANY, PAUSE = 32, 100, 4

    def __init__(self, spoken: Iterable[str]) -> None:
        self.spoken = Counter(word for text in spoken for word in words_of(text))
        every = (text for source in SELDOM_SHARES for text in pool(source, "train"))
        self.written = Counter(word for text in every for word in words_of(text))

    def worth(self, text: str) -> float:
        """What hearing its words once more is worth, for the time it takes."""
        words = words_of(text)
        total = 0.0
        for word in words:
            heard = self.spoken[word]
            total += self.written[word] / (1 + heard) * (1.0 if heard < self.MANY else 0.2)
        return total / (self.PAUSE + len(words))  # as if so many words were silence

    def sentence(self, rng: random.Random) -> str:
        """The best of a few that are drawn; it counts as spoken from here on."""
        texts = pool(any_source(rng, SELDOM_SHARES), "train")
        best = max(rng.choices(texts, k=self.DRAWS), key=self.worth)
        self.spoken.update(words_of(best))
        return best


if __name__ == "__main__":
    for name in SOURCES:
        for part in ("train", "dev", "test"):
            texts = pool(name, part)
            words = sum(len(text.split()) for text in texts)
            print(name, part, len(texts), "sentences", words, "words")
