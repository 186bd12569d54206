"""What the model hears in make_suite.py: clips, spoken digits, long recordings and silence."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from numpy.typing import NDArray

T = TypeVar("T")
Sound = NDArray[np.float32]
HELD_OUT = "nicolas"  # the speaker of digits that nothing is trained on
HISS_DB = -60.0  # of full scale, rms


@dataclass(frozen=True)
class Clip:
    """One recording and what is said in it."""

    id: str
    path: Path
    text: str
    voice: str
    kind: str
    qa: int | None = None  # row in dialogues.json
    words: Sequence[Sequence] = ()  # [word, start, end], seconds


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly from the whole sequence."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def load_test(folder: Path) -> list[Clip]:
    """The clips of make_tests.py, a file each."""
    clips = []
    for row in rows(folder / "manifest.jsonl"):
        path = folder / row["file"]
        assert row["start"] == 0 and path.exists(), row
        (voice,) = row["voice"]
        more = row.get("qa"), row.get("words") or ()
        clips.append(Clip(row["id"], path, row["text"], voice, row["kind"], *more))
    return clips


def cut(folder: Path, out: Path, kind: str, speaker: str | None = None) -> list[Clip]:
    """One file per row of a manifest of long recordings, of one speaker if one is named."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[Sound, int]] = {}
    clips = []
    for row in rows(folder / "manifest.jsonl"):
        if speaker not in (None, row["speaker"]):
            continue
        if row["file"] not in files:
            files[row["file"]] = soundfile.read(folder / row["file"], dtype="float32")
        sound, rate = files[row["file"]]
        path = out / f"{row['id']}.wav"
        soundfile.write(path, sound[round(row["start"] * rate) : round(row["end"] * rate)], rate)
        clips.append(Clip(row["id"], path, row["text"], row["speaker"], kind))
    return clips


def digit_clips(folder: Path, out: Path) -> list[Clip]:
    """The digits of the held-out speaker, cut as closely as the data set has them."""
    return cut(folder, out, "digit", HELD_OUT)


def prompt_clips(folder: Path, out: Path, words: int = 3) -> list[Clip]:
    """A person's prompts of at least so many words."""
    return [clip for clip in cut(folder, out, "prompt") if len(clip.text.split()) >= words]


def digit_strings(clips: Sequence[Clip], out: Path, seed: int = 0) -> list[Clip]:
    """All digits once, in random strings of four to six with 0.2 to 0.4 s of silence round each."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"digits-{seed}")
    left, strings = rng.sample(clips, len(clips)), []
    while left:
        count = rng.randint(4, 6)
        some, left = left[:count], left[count:]
        gaps = [rng.uniform(0.2, 0.4) for _ in range(len(some) + 1)]
        path = out / f"string-{len(strings):03d}.wav"
        join(some, path, gaps)
        text = " ".join(clip.text for clip in some)
        strings.append(Clip(path.stem, path, text, HELD_OUT, "string"))
    return strings


def join(clips: Sequence[Clip], path: Path, gaps_s: Sequence[float]) -> None:
    """Clips one after the other in one file, silence before, between and after them."""
    parts: list[Sound] = []
    rate = 0
    for clip, gap_s in zip(clips, gaps_s, strict=False):
        sound, rate = soundfile.read(clip.path, dtype="float32")
        parts += [np.zeros(round(gap_s * rate), np.float32), sound]
    parts.append(np.zeros(round(gaps_s[-1] * rate), np.float32))
    soundfile.write(path, np.concatenate(parts), rate)


def long_recording(clips: Sequence[Clip], path: Path, seconds: float = 60.0) -> float:
    """Clips from everywhere, half a second apart, until `seconds` are full; returns the length."""
    chosen, length = [], 0.5
    for clip in random.Random("long").sample(clips, len(clips)):
        if length < seconds:
            chosen.append(clip)
            length += soundfile.info(clip.path).duration + 0.5
    join(chosen, path, [0.5] * (len(chosen) + 1))
    return length


def silences(out: Path, seconds: float = 20.0, rate: int = 24_000) -> list[Clip]:
    """Recordings in which nobody speaks: no sound at all, and a faint hiss."""
    out.mkdir(parents=True, exist_ok=True)
    hiss = np.random.default_rng(0).standard_normal(round(seconds * rate)) * 10 ** (HISS_DB / 20)
    clips = []
    for name, sound in (("silence", hiss * 0), ("hiss", hiss)):
        soundfile.write(out / f"{name}.wav", sound, rate)
        clips.append(Clip(name, out / f"{name}.wav", "", "nobody", "silence"))
    return clips
