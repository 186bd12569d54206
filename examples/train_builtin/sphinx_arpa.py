"""Pocketsphinx's words that usually follow each other, as an ARPA file: sphinx_arpa.py > en-us.arpa

Its package has a model of 72,547 English words, two million pairs and 1.7 million triples (Carnegie
Mellon University, BSD licence), in a format of its own: a tree, from the last word of an n-gram to
the one before, and so on; numbers have 16 bits, and a table tells what they mean.
"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import numpy as np
import pocketsphinx

MAGIC = b"Trie Language Model"
BINS = 65536
LOG = math.log10(1.0001)  # of the base of its logarithms


def fields(memory: np.ndarray, first: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits (57 at most), which begin at these bits of the bytes."""
    value = np.zeros(len(first), np.uint64)
    for i in range(8):
        value |= memory[(first >> 3) + i].astype(np.uint64) << np.uint64(8 * i)
    value >>= (first & 7).astype(np.uint64)
    return (value & np.uint64((1 << bits) - 1)).astype(np.int64)


def main() -> None:
    path = Path(pocketsphinx.get_model_path()) / "en-us" / "en-us.lm.bin"
    raw = path.read_bytes()
    order, *counts, kind = struct.unpack_from("<B3Ii", raw, len(MAGIC))
    if not raw.startswith(MAGIC) or (order, kind) != (3, 1):
        sys.exit(f"{path}: not the model that this was written for")
    singles, pairs, triples = counts
    at = len(MAGIC) + 1 + 4 * 3 + 4
    bins = LOG * np.frombuffer(raw, "<f4", 3 * BINS, at).reshape(3, BINS)
    at += bins.size * 4
    single = np.frombuffer(raw, [("p", "<f4"), ("back", "<f4"), ("next", "<u4")], singles + 1, at)
    at += single.nbytes
    name, pointer = singles.bit_length(), triples.bit_length()
    memory = np.frombuffer(raw + bytes(8), np.uint8)
    # A pair: its first word, p and weight as places in their tables, where its triples begin. The
    # pairs of one last word follow each other, and so do the triples of a pair.
    size = name + 32 + pointer
    here = 8 * at + np.arange(pairs + 1, dtype=np.int64) * size
    at += ((1 + pairs) * size + 7) // 8 + 8
    first, values = fields(memory, here, name), fields(memory, here + name, 32)
    begins = fields(memory, here + name + 32, pointer)
    here = 8 * at + np.arange(triples, dtype=np.int64) * (name + 16)
    at += ((1 + triples) * (name + 16) + 7) // 8 + 8
    before, value = fields(memory, here, name), fields(memory, here + name, 16)
    (length,) = struct.unpack_from("<I", raw, at)
    words = raw[at + 4 : at + 4 + length].decode().split("\0")

    last = np.repeat(np.arange(singles), np.diff(single["next"].astype(np.int64)))
    pair = np.repeat(np.arange(len(last)), np.diff(begins[: len(last) + 1]))

    print("\\data\\")
    for n, count in enumerate((singles, len(last), len(pair)), 1):
        print(f"ngram {n}={count}")
    print("\n\\1-grams:")
    for i in range(singles):
        p, back = single["p"][i] * LOG, single["back"][i] * LOG
        print(f"{p:.4f}\t{words[i]}\t{back:.4f}")
    print("\n\\2-grams:")
    probability, weight = bins[0][values >> 16], bins[1][values & (BINS - 1)]
    for i in range(len(last)):
        print(f"{probability[i]:.4f}\t{words[first[i]]} {words[last[i]]}\t{weight[i]:.4f}")
    print("\n\\3-grams:")
    for i, p in enumerate(bins[2][value[: len(pair)]]):
        middle = words[first[pair[i]]]
        print(f"{p:.4f}\t{words[before[i]]} {middle} {words[last[pair[i]]]}")
    print("\n\\end\\")


if __name__ == "__main__":
    main()
