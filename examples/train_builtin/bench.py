"""What the measurements of evaluate.py share: programs, recordings, scores, one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from programs import Judge, Moshi, Ran
from recordings import Clip, load_test, long_recording, spread

from moshi_cli.tasks.metrics import Rate, WordErrors, corpus_rate, word_errors


@dataclass
class Bench:
    """What all measurements share, and the table they fill."""

    moshi: Moshi
    judge: Judge
    work: Path
    test: Path
    digits: Path | None
    limit: int | None
    batch: list[str]
    table: list[tuple[str, str, str]] = field(default_factory=list)

    def clips(self, kind: str | None = None) -> list[Clip]:
        found = [clip for clip in load_test(self.test) if kind in (None, clip.kind)]
        return spread(found, self.limit)

    def run(self, words: str, clips: Iterable[Clip], out: str, *options: str) -> Ran:
        """The command over recordings, a batch at a time."""
        items = [{"id": clip.id, "path": str(clip.path.resolve())} for clip in clips]
        return self.moshi(words, items, self.work / out, *self.batch, *options)

    def write(self, clips: Iterable[Clip], out: str) -> tuple[Ran, dict[str, str]]:
        """What `moshi asr` writes, by id; nothing where it failed."""
        ran = self.run("asr", clips, out, "-f", "txt")
        return ran, {clip.id: text_of(ran.output(clip.id, ".txt")) for clip in clips}

    def alone(self, words: str, name: str, *options: str) -> dict[str, float]:
        """Speed with one minute of sound, one recording at a time."""
        path = self.work / "long.wav"
        if not path.exists():
            long_recording(load_test(self.test), path)
        items = [{"id": "long", "path": str(path)}]
        return self.moshi(words, items, self.work / f"speed-{name}", *options).speed()

    def told(self, what: str, value: str, goal: str = "") -> None:
        self.table.append((what, value, goal))
        print(f"  {what}: {value}" + (f"  (goal {goal})" if goal else ""), flush=True)

    def score(
        self, name: str, clips: Sequence[Clip], transcripts: Mapping[str, str]
    ) -> list[WordErrors]:
        """Errors of every transcript, by the clip's id; all are kept to be looked at."""
        parts = [word_errors(clip.text, transcripts[clip.id]) for clip in clips]
        self.keep(name, [
            {"id": c.id, "text": c.text, "transcript": transcripts[c.id], "errors": part.errors}
            for c, part in zip(clips, parts, strict=True)
        ])  # fmt: skip
        return parts

    def keep(self, name: str, details: Sequence[Mapping[str, Any]]) -> None:
        """Every single item, to see what went wrong."""
        with (self.work / f"{name}.details.jsonl").open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in details)


def text_of(path: Path | None) -> str:
    """A transcript of any form as one line."""
    if path is None or not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    return " ".join((json.loads(text)["text"] if path.suffix == ".json" else text).split())


def figures(rate: Rate) -> dict[str, Any]:
    shown = {"wer": rate.rate, "low": rate.low, "high": rate.high, "mean": rate.mean}
    shown |= {"exact": rate.exact}
    counts = {**asdict(rate.total), "utterances": rate.utterances}
    return {name: round(value, 4) for name, value in shown.items()} | counts


def percent(rate: Rate) -> str:
    e = rate.total
    return (
        f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}] "
        f"(S {e.substitutions} D {e.deletions} I {e.insertions} of {e.words} words)"
    )


def groups(clips: Sequence[Clip], parts: Sequence[WordErrors]) -> dict[str, Rate]:
    """Rates of all, and of each kind and voice."""
    by: dict[str, list[WordErrors]] = {"all": list(parts)}
    for clip, part in zip(clips, parts, strict=True):
        by.setdefault(clip.kind, []).append(part)
        by.setdefault(clip.voice, []).append(part)
    return {name: corpus_rate(some) for name, some in by.items()}


def loudness_db(path: Path | None) -> float | None:
    """Of the loudest 80 ms, below full scale."""
    if path is None:
        return None
    sound = soundfile.read(path, dtype="float32")[0]
    frames = sound[: len(sound) // 1920 * 1920].reshape(-1, 1920)
    return round(10 * float(np.log10(np.square(frames).mean(1).max(initial=0) + 1e-12)), 1)
