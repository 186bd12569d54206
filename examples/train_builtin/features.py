"""Semantic targets for the codec: features.py PACK --model FOLDER [--reuse OTHER_PACK]

Writes PACK/feat.f16, [frames, 384]: the output of the encoder of Whisper tiny.en, four of its
frames averaged into one of ours (50 Hz -> 12.5 Hz); row i belongs to samples 1920 i .. 1920 i +
1919 of pcm.i16. The encoder looks at 30 s whatever it is given, so clips share windows, with
silence between them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import ctranslate2
import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor
from pack import FRAME
from scipy.signal import resample_poly

WIDTH, WINDOW, GAP = 384, 375, 7  # window and gap in frames of 80 ms
FRAME_16K = 1_280
OPEN = 64  # windows being filled at a time

Piece = tuple[int, int]  # first frame, frames


def plan(pieces: list[Piece]) -> list[list[Piece]]:
    """Windows of pieces; each piece goes where it leaves the least room."""
    full: list[list[Piece]] = []
    filling: list[tuple[int, list[Piece]]] = []  # frames used, pieces
    for piece in pieces:
        need = piece[1] + GAP
        fits = [i for i, (used, _) in enumerate(filling) if used + piece[1] <= WINDOW]
        if fits:
            i = max(fits, key=lambda i: filling[i][0])
            filling[i] = (filling[i][0] + need, [*filling[i][1], piece])
            continue
        if len(filling) == OPEN:
            fullest = max(range(OPEN), key=lambda i: filling[i][0])
            full.append(filling.pop(fullest)[1])
        filling.append((need, [piece]))
    return full + [window for _, window in filling]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--model", required=True, help="CTranslate2 folder of Whisper tiny.en")
    parser.add_argument("--reuse", type=Path, help="a pack whose features are copied, by clip id")
    args = parser.parse_args()
    pcm = np.memmap(args.pack / "pcm.i16", np.int16, "r")
    feat = np.memmap(args.pack / "feat.f16", np.float16, "w+", shape=(len(pcm) // FRAME, WIDTH))
    known, old = {}, None
    if args.reuse:
        old = np.memmap(args.reuse / "feat.f16", np.float16, "r").reshape(-1, WIDTH)
        for line in (args.reuse / "index.jsonl").open():
            row = json.loads(line)
            known[row["id"], row["samples"]] = row["offset_samples"] // FRAME
    pieces: list[Piece] = []
    for line in (args.pack / "index.jsonl").open():
        row = json.loads(line)
        first, frames = row["offset_samples"] // FRAME, -(-row["samples"] // FRAME)
        seen = known.get((row["id"], row["samples"]))
        if seen is not None and old is not None:
            feat[first : first + frames] = old[seen : seen + frames]
            continue
        for start in range(0, frames, WINDOW):
            pieces.append((first + start, min(WINDOW, frames - start)))
    model = ctranslate2.models.Whisper(
        args.model, device="cpu", compute_type="float32", intra_threads=1, inter_threads=1
    )
    mel = FeatureExtractor()
    windows, begun = plan(pieces), time.time()
    for number, window in enumerate(windows, 1):
        audio, places, at = np.zeros(WINDOW * FRAME_16K, np.float32), [], 0
        for first, frames in window:
            clip = pcm[first * FRAME : (first + frames) * FRAME].astype(np.float32) / 32768
            clip16 = resample_poly(clip, 2, 3).astype(np.float32)
            audio[at * FRAME_16K : at * FRAME_16K + len(clip16)] = clip16
            places.append((at, first, frames))
            at += frames + GAP
        spectrum = np.ascontiguousarray(mel(audio, padding=0)[None, :, :3000], np.float32)
        out = np.array(model.encode(ctranslate2.StorageView.from_array(spectrum), to_cpu=True))
        out = out[0].reshape(WINDOW, 4, WIDTH).mean(axis=1)  # [375, 384]
        for at, first, frames in places:
            feat[first : first + frames] = out[at : at + frames]
        if number % 50 == 0 or number == len(windows):
            print(f"{number}/{len(windows)} windows, {time.time() - begun:.0f} s", flush=True)
    feat.flush()


if __name__ == "__main__":
    main()
