"""The clearest takes of what is said word for word: choose.py MODEL WHISPER CODES OUT

Of all takes in the cache CODES of the kinds asked for, and for each text, the codec of MODEL
decodes every one, WHISPER (a folder for faster-whisper) tells how likely the words are in it (see
`rehearse.Ear`), and the likeliest are kept. OUT becomes a cache of these, their kinds with
`-clear` at the end. Who learns to answer from one take of each answer, always in the same codes,
need not choose between many ways to say it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rehearse import MARGIN_S, WINDOWS_S, Ear, Said, gathered, judged
from tqdm import tqdm

from moshi_cli.core import load
from moshi_cli.tasks.cache import FRAME_HZ, REST, Cache, Take, flattened, keep_facts, read_facts
from moshi_cli.tasks.cache import shards as parts_of

Scored = tuple[float, Take]


def candidates(cache: Cache, kinds: tuple[str, ...]) -> Iterator[Said]:
    """The takes of these kinds that Whisper hears in one piece."""
    for take in cache.takes:
        words = take.text.split()
        fits = take.frames / FRAME_HZ + 2 * MARGIN_S <= WINDOWS_S[-1]
        if take.kind.startswith(kinds) and words and fits:
            yield Said(take, cache.read(take)[: cache.codebooks].long(), words)


def clearest(scored: Iterable[Scored], keep: int) -> list[Scored]:
    """The best `keep` of each text, in the order in which the texts came."""
    same = defaultdict[str, list[Scored]](list)
    for one in scored:
        same[one[1].text].append(one)
    return [one for takes in same.values() for one in sorted(takes, key=first, reverse=True)[:keep]]


def first(one: Scored) -> float:
    return one[0]


def write(folder: Path, cache: Cache, chosen: list[Scored], facts: dict) -> None:
    """A cache of these takes, with what their codes leave."""
    keep_facts(folder, facts)
    at = 0
    with (
        (folder / "codes.i16").open("wb") as flat,
        (folder / REST).open("wb") as rest,
        (folder / "index.jsonl").open("w") as index,
    ):
        for sure, take in chosen:
            codes, left = cache.read(take).split([cache.codebooks, cache.residual])
            flat.write(flattened(codes[None], torch.int16))
            rest.write(flattened(left[None], torch.float16))
            row = asdict(replace(take, kind=f"{take.kind}-clear", first=at, part=0))
            print(json.dumps({**row, "sure": round(sure, 3)}), file=index)
            at += take.frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("whisper", type=Path)
    parser.add_argument("codes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["moshi-answer"])
    parser.add_argument("--keep", type=int, default=1, help="takes of each text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True)
    model, ear = load(args.model, dtype="fp32"), Ear(args.whisper)
    facts = read_facts(parts_of(args.codes)[0])
    facts = {k: facts[k] for k in ("codebooks", "codebook_size", "codec", "residual")}
    cache = Cache(args.codes, facts["codebooks"], facts["residual"])
    takes, scored = list(candidates(cache, tuple(args.kinds))), list[Scored]()
    with tqdm(total=len(takes), disable=None) as bar:
        for window_s, batch in gathered(takes):
            for one, sure in zip(batch, judged(model, ear, batch, window_s), strict=True):
                scored.append((sum(sure) / len(sure), one.take))
            bar.update(len(batch))
    chosen = clearest(scored, args.keep)
    write(args.out, cache, chosen, facts)
    mean = [sum(map(first, found)) / len(found) for found in (scored, chosen)]
    print(f"{len(scored)} takes, {mean[0]:.3f} nats a word; {len(chosen)} kept, {mean[1]:.3f}")


if __name__ == "__main__":
    main()
