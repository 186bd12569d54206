"""Speak the small world: make_corpus.py OUT --seed 1 --minutes world=20 question=10 ...

Writes OUT/*.flac and OUT/manifest.jsonl, a row per clip. Kinds are interleaved, so that it can be
stopped at any time; the same command goes on where it stopped. One process uses one core: start
one per core with another OUT and another seed. With --seldom [CORPORA], open sentences are of words
that those and this one have spoken seldom.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
from engines import ENGINES, RATE, Spoken
from sentences import Seldom
from world import sentence

LEVEL = 10 ** (-23 / 20)


def level(audio: np.ndarray) -> np.ndarray:
    """To -23 dB of full scale (RMS), peaks kept below 0.97."""
    audio = audio * (LEVEL / max(1e-4, float(np.sqrt(np.mean(audio**2)))))
    return audio * min(1.0, 0.97 / max(1e-4, float(np.abs(audio).max())))


def write_clip(out: Path, row: dict, spoken: Spoken) -> dict:
    """Write one clip; returns its row of the manifest."""
    audio, words, voice, settings = spoken
    file = f"{row['id']}.flac"
    soundfile.write(out / file, level(audio), RATE, subtype="PCM_16")
    row = {**row, "voice": voice, **settings, "file": file, "start": 0.0}
    return row | {"end": round(len(audio) / RATE, 4), "words": words}


def shares(items: list[str]) -> dict[str, float]:
    return {name: float(value) for name, value in (item.split("=") for item in items)}


def furthest_behind(done: Counter, targets: dict[str, float]) -> str:
    return min(targets, key=lambda name: done[name] / targets[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", nargs="+", required=True, metavar="KIND=MINUTES")
    parser.add_argument("--engines", nargs="+", default=["kokoro=1"], metavar="NAME=SHARE")
    parser.add_argument("--seldom", type=Path, nargs="*", metavar="CORPUS")
    args = parser.parse_args()
    minutes, mix = shares(args.minutes), shares(args.engines)
    args.out.mkdir(parents=True, exist_ok=True)
    manifest = args.out / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.open()] if manifest.exists() else []
    clip = 1 + max((int(row["id"].split("-")[1]) for row in rows), default=-1)
    seconds: Counter = Counter()  # per kind
    spent: Counter = Counter()  # per kind and engine
    turns = Counter(row["kind"] for row in rows)
    for row in rows:
        seconds[row["kind"]] += row["end"]
        spent[row["kind"], row["engine"]] += row["end"]
    seldom = None
    if args.seldom is not None:
        earlier = [json.loads(x) for path in args.seldom for x in (path / "manifest.jsonl").open()]
        seldom = Seldom(row.get("text", "") for row in earlier + rows)
    engines: dict = {}
    begun, rejected, made_s = time.time(), 0, 0.0
    with manifest.open("a") as out:
        while any(seconds[kind] < 60 * minutes[kind] for kind in minutes):
            kind = furthest_behind(seconds, minutes)
            name = min(mix, key=lambda engine: spent[kind, engine] / mix[engine])
            if name not in engines:
                engines[name] = ENGINES[name]()
            rng = random.Random(f"{args.seed}-{clip}")
            if seldom and kind.endswith("open"):
                text, pair = seldom.sentence(rng), None
            else:
                text, pair = sentence(rng, kind, turns[kind], str(args.seed))
            if kind.startswith("moshi-"):
                spoken: Spoken | None = engines[name].own(text, rng, slow=kind.endswith("answer"))
            else:
                spoken = engines[name].random(text, rng)
            clip += 1
            if not spoken:
                rejected += 1
                spent[kind, name] += 0.01
                print("rejected", name, text, flush=True)
                continue
            row = {"id": f"{args.seed}-{clip - 1:05d}", "kind": kind, "text": text, "engine": name}
            if pair is not None:
                row["qa"] = pair
            row = write_clip(args.out, row, spoken)
            out.write(json.dumps(row) + "\n")
            out.flush()
            turns[kind] += 1
            seconds[kind] += row["end"]
            spent[kind, name] += row["end"]
            made_s += row["end"]
    print(
        f"{sum(turns.values())} clips, {sum(seconds.values()) / 60:.1f} min, {rejected} rejected, "
        f"{(time.time() - begun) / max(1e-3, made_s):.2f} s of work per s of audio"
    )


if __name__ == "__main__":
    main()
