"""Codes and tokenizer for the language model: codes.py CACHE --mimi MIMI.safetensors --pack PACK …

Every clip with words becomes one or two takes; see VARIANTS. A second call goes on where the first
stopped. Writes CACHE/codes.i16, CACHE/index.jsonl and CACHE/text.model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from moshi_cli.core.config import MIMI_NANO
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import train_tokenizer
from moshi_cli.tasks.cache import SILENCE, Variant, write_cache
from moshi_cli.tasks.data import Pack, Row
from moshi_cli.tasks.train import read_tensors

QUIET = Variant(lead_s=(20.0, 20.0), tail_s=(0.0, 0.0))
LOUDNESS = (-14.0, 4.0)  # dB
SPEED = (0.85, 1.18)
VARIANTS = {  # kind (prefix, first match) -> takes of each clip
    "moshi": [Variant((0.0, 0.2), (0.3, 0.6))],
    "question": [
        Variant((0.2, 1.5), (1.5, 2.5), LOUDNESS),
        Variant((0.2, 1.5), (1.5, 2.5), LOUDNESS, SPEED, 1.0, (15.0, 40.0)),
    ],
    "": [
        Variant((0.0, 0.5), (0.6, 1.0), LOUDNESS),
        Variant((0.0, 0.5), (0.6, 1.0), LOUDNESS, SPEED, 0.7, (10.0, 40.0)),
    ],
}


def jobs(packs: list[Pack]) -> Iterator[tuple[Pack, Row, Variant]]:
    """Silence, then every clip whose words are known."""
    yield packs[0], Row("silence", SILENCE, "", (), 0, 0), QUIET
    for pack in packs:
        for row in pack.rows:
            takes = next(v for k, v in VARIANTS.items() if row.kind.startswith(k))
            for variant in takes if row.words else ():
                yield pack, row, variant


def main() -> None:
    """Parse, encode, train the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--mimi", type=Path, required=True, help="of a checkpoint of codec.py")
    parser.add_argument("--pack", type=Path, action="append", required=True)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mimi = Mimi(MIMI_NANO)
    mimi.load_state_dict(read_tensors(args.mimi))
    mimi.quantizer.refresh()
    packs = [Pack(folder) for folder in args.pack]

    def told(done: int) -> None:
        if done % 200 == 0:
            print(f"{done} takes", file=sys.stderr, flush=True)

    count = write_cache(mimi, jobs(packs), args.cache, report=told)
    rows = [row for pack in packs for row in pack.rows if row.words]
    texts = [" ".join(w for w, _, _ in row.words) for row in rows]
    text = train_tokenizer(texts, args.vocabulary, args.cache / "text.model", fold_case=True)
    print(f"{count} takes, {text.size} pieces", file=sys.stderr)


if __name__ == "__main__":
    main()
