"""Gather corpora into one flat file of samples: pack.py OUT FOLDER ... [--skip-voice V ...]

Every FOLDER has a manifest.jsonl. Writes OUT/pcm.i16 (24 kHz mono; every clip is padded with
zeros to whole frames of 1920 samples) and OUT/index.jsonl, a row per clip: id, kind, voice, text,
words [[word, start_s, end_s]], qa, offset_samples, samples (without the padding).
`moshi data features` adds feat.f16. Clips of a folder named *-noisy get kinds noisy-*: good for
recognition, not for learning to sound. Open sentences of a folder named cheap* get kinds cheap-*;
those that belong to the dev or test set are left out, whoever says them (see sentences.py).
--without makes a pack of what came since earlier packs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from sentences import split_of

RATE, FRAME = 24_000, 1_920
OPEN = ("chat", "wordnet", "open")  # kinds of sentences that anyone may say


def read_rows(folder: Path, skip: set[str]) -> Iterator[dict]:
    """The rows of a manifest in one form, less the voices to skip."""
    for line in (folder / "manifest.jsonl").open():
        row = json.loads(line)
        voice = row.get("voice") or {row.get("speaker", "unknown"): 1.0}
        if skip & set(voice):
            continue
        kind, text = row.get("kind", folder.name), row.get("text", "")
        words = row.get("words") or []
        if kind.endswith(OPEN):
            if split_of(text) != "train":
                continue
            kind = f"cheap-{kind}" if folder.name.startswith("cheap") else kind
        if text and " " not in text and not words:  # one word, cut tightly
            text, words = f"{text.capitalize()}.", [[text, 0.0, row["end"] - row["start"]]]
        yield {
            "id": f"{folder.name}/{row['id']}",
            "kind": f"noisy-{kind}" if folder.name.endswith("-noisy") else kind,
            "voice": voice, "text": text, "words": words, "qa": row.get("qa"),
            "path": folder / row["file"], "start": row["start"], "end": row["end"],
        }  # fmt: skip


def read_clips(rows: list[dict]) -> Iterator[tuple[dict, np.ndarray]]:
    """Clips as float32 at 24 kHz; a file that holds many clips is read once."""
    path, audio, rate = None, np.zeros(0, np.float32), RATE
    for row in rows:
        if row["path"] != path:
            path = row["path"]
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
            audio = audio.mean(axis=1)
        clip = audio[round(row["start"] * rate) : round(row["end"] * rate)]
        if rate != RATE:
            clip = resample_poly(clip, RATE // 1000, rate // 1000)
        yield row, clip / max(1.0, float(np.abs(clip).max()) / 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--skip-voice", nargs="+", default=[])
    parser.add_argument("--without", type=Path, nargs="+", default=[], metavar="PACK",
                        help="leave out the clips of earlier packs")  # fmt: skip
    args = parser.parse_args()
    packed = {json.loads(x)["id"] for pack in args.without for x in (pack / "index.jsonl").open()}
    args.out.mkdir(parents=True, exist_ok=True)
    offset, minutes = 0, {}
    with (args.out / "pcm.i16").open("wb") as pcm, (args.out / "index.jsonl").open("w") as index:
        for folder in args.folders:
            rows = [r for r in read_rows(folder, set(args.skip_voice)) if r["id"] not in packed]
            for row, clip in read_clips(sorted(rows, key=lambda row: (row["path"], row["start"]))):
                padded = np.zeros(-(-len(clip) // FRAME) * FRAME, np.int16)
                padded[: len(clip)] = np.round(clip * 32767)
                padded.tofile(pcm)
                row = {k: v for k, v in row.items() if k not in ("path", "start", "end")}
                row |= {"offset_samples": offset, "samples": len(clip)}
                index.write(json.dumps(row) + "\n")
                offset += len(padded)
                minutes[row["kind"]] = minutes.get(row["kind"], 0) + len(clip) / RATE / 60
    total = sum(minutes.values())
    print(f"{total:.1f} min:", ", ".join(f"{k} {v:.1f}" for k, v in sorted(minutes.items())))


if __name__ == "__main__":
    main()
