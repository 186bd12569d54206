"""Words for recordings of people that have only a recogniser's guess: agree.py FOLDER WHISPER OUT

FOLDER/manifest.jsonl has rows with `file`, `start`, `end` and `pseudo_text`. A clip is kept where
WHISPER (a folder for faster-whisper), a second recogniser, writes the same words, none of them in
figures, and pocketsphinx finds a time for each. OUT/manifest.jsonl, of the form that pack.py reads,
names FLAC files at 24 kHz that are cut to what is said, with MARGIN_S round it; kind `person`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import soundfile
from engines import RATE, Pico, letters, resample
from faster_whisper import WhisperModel
from make_corpus import level
from scipy.signal import resample_poly

MARGIN_S, ALIGNED_HZ = 0.3, 16_000


def plain(text: str) -> str:
    """Words only, small letters."""
    return " ".join(re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("whisper", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ear = WhisperModel(str(args.whisper), device="cpu", compute_type="int8", cpu_threads=1)
    align = Pico().align
    rows = [json.loads(line) for line in (args.folder / "manifest.jsonl").open()]
    rows.sort(key=lambda row: (row["file"], row["start"]))
    name, sound, rate, kept, kept_s = None, np.zeros(0, np.float32), RATE, 0, 0.0
    with (args.out / "manifest.jsonl").open("w") as out:
        for row in rows:
            if row["file"] != name:
                name = row["file"]
                sound, rate = soundfile.read(args.folder / name, dtype="float32")
            clip = sound[round(row["start"] * rate) : round(row["end"] * rate)]
            guess = row["pseudo_text"]
            if not letters(guess) or re.search(r"\d", guess):
                continue
            heard = resample_poly(clip, ALIGNED_HZ // 1000, rate // 1000).astype(np.float32)
            segments = ear.transcribe(heard, beam_size=1, language="en", without_timestamps=True)[0]
            if plain(" ".join(segment.text for segment in segments)) != plain(guess):
                continue
            words = align(heard, guess.replace("-", " "))
            if not words:
                continue
            first = max(words[0][1] - MARGIN_S, 0.0)
            last = min(words[-1][2] + MARGIN_S, len(clip) / rate)
            cut = resample(clip[round(first * rate) : round(last * rate)], rate)
            file = f"{row['id']}.flac"
            soundfile.write(args.out / file, level(cut), RATE, subtype="PCM_16")
            timed = [(w, round(s - first, 3), round(e - first, 3)) for w, s, e in words]
            fields = {"id": row["id"], "kind": "person", "text": guess.replace("-", " ")}
            fields |= {"voice": {row.get("speaker", "person"): 1.0}, "file": file, "start": 0.0}
            print(json.dumps(fields | {"end": len(cut) / RATE, "words": timed}), file=out)
            kept, kept_s = kept + 1, kept_s + len(cut) / RATE
    print(f"{kept} of {len(rows)} clips, {kept_s / 60:.1f} min")


if __name__ == "__main__":
    main()
