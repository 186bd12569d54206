"""A recogniser that we did not train writes down recordings: judge.py WHISPER FILES.json OUT.json

WHISPER is a folder for faster-whisper (teachers.sh makes one), FILES.json a list of paths. In
OUT.json: {"judge": what judged and how, "transcripts": {path: text}}. Each recording has a window
of its own, half a second of silence round it, and one greedy pass in English; where that repeats
itself (Whisper's own test, text that compresses too well), five beams instead. The cache goes by
what the files hold: a run that was stopped goes on, unchanged sound is not heard twice.

Runs in the environment that teachers.sh makes; evaluate.py calls it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel, decode_audio

RATE_HZ, MARGIN_S, LONGEST_S = 16_000, 0.5, 29.0
BEAMS = (1, 5)  # the second where the first pass repeats itself
MOST_COMPRESSION = 2.4  # of the text of a pass that does not
OPTIONS = {
    "language": "en", "temperature": 0.0, "without_timestamps": True,
    "condition_on_previous_text": False,
}  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def transcribe(model: WhisperModel, audio: np.ndarray) -> str:
    """What is said in float32 [S] at 16 kHz."""
    text = ""
    for beams in BEAMS:
        segments = list(model.transcribe(audio, beam_size=beams, **OPTIONS)[0])
        text = " ".join(segment.text.strip() for segment in segments)
        if all(segment.compression_ratio <= MOST_COMPRESSION for segment in segments):
            break
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("whisper", type=Path)
    parser.add_argument("files", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, help="default: OUT with the suffix .cache.jsonl")
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    judge = {
        "model": args.whisper.name, "sha256": digest(args.whisper / "model.bin"),
        "faster-whisper": version("faster-whisper"), "compute_type": args.compute_type,
        "margin_s": MARGIN_S, "beams": BEAMS, "most_compression": MOST_COMPRESSION, **OPTIONS,
    }  # fmt: skip
    setting = hashlib.sha256(json.dumps(judge, sort_keys=True).encode()).hexdigest()[:16]
    cache = args.cache or args.out.with_suffix(".cache.jsonl")
    known = {}
    if cache.exists():
        for line in cache.read_text().splitlines():
            if line.endswith("}"):  # else it was cut off
                row = json.loads(line)
                known[row["setting"], row["sound"]] = row["text"]
    model, transcripts = None, {}
    files = json.loads(args.files.read_text())
    with cache.open("a") as log:
        log.write("\n" if cache.stat().st_size else "")
        for number, file in enumerate(files):
            key = (setting, digest(Path(file)))
            if key not in known:
                model = model or WhisperModel(
                    str(args.whisper), device="cpu", compute_type=args.compute_type,
                    cpu_threads=args.threads,
                )  # fmt: skip
                audio = np.pad(decode_audio(file, RATE_HZ), round(MARGIN_S * RATE_HZ))
                assert len(audio) < LONGEST_S * RATE_HZ, f"{file}: too long for one window"
                known[key] = transcribe(model, audio)
                row = {"setting": setting, "sound": key[1], "text": known[key]}
                log.write(json.dumps(row) + "\n")
                log.flush()
            transcripts[file] = known[key]
            if sys.stderr.isatty() or number % 50 == 49:
                print(f"judge: {number + 1}/{len(files)}", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps({"judge": judge, "transcripts": transcripts}))


if __name__ == "__main__":
    main()
