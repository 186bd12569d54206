"""What is wrong with training data: found before it is used, and told by file and line.

`inspect` looks at one recording: its header, its words and turns, and whether there is sound where
the words are. `inspect_cache` looks at cached codes. Each gives problems, never an exception, so
that one bad line does not hide the next.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from moshi_cli.core.errors import InputError
from moshi_cli.tasks.cache import REST, Take, parse_take, read_facts, shards
from moshi_cli.tasks.manifest import MAIN, Problem, Recording, Spoken, main_speaker

LAYOUTS = ("auto", "mono", "stereo", "turns")
OFF_S = 0.1  # by how much a duration or the end of a word may be off
SILENT_DB = -55.0  # a channel as soft as this says nothing
SPEAKING_DB = -45.0
LISTEN_WORDS = 8  # per recording, that are listened to
SHORT_S = 60.0  # a compressed file that is listened to lasts no longer
SHOWN = 4  # problems of one kind per recording; the others are counted


def layout_of(recording: Recording, asked: str = "auto", channels: int = 1) -> str:
    """How a recording becomes lines: "mono" one, "stereo" two, "turns" one into two.

    asked "auto": by what there is.
    """
    if asked != "auto":
        return asked
    return "turns" if recording.turns else "stereo" if channels > 1 else "mono"


def inspect(
    recording: Recording, layout: str = "auto", words: bool = True, listen: bool = True
) -> Iterator[Problem]:
    """Problems of one recording. words: it must have some; listen: where its words are."""
    r = recording
    try:
        channels, length_s = r.facts()
    except InputError as error:
        yield Problem(r.where, "audio", str(error))
        return
    except OSError as error:
        yield Problem(r.where, "audio", f"{r.path}: {error.strerror}")
        return
    sound = list(_durations(r, length_s))
    layout = layout_of(r, layout, channels)
    if layout == "stereo" and channels < 2:
        text = f"{r.path}: has one channel, a conversation needs two (own voice on the left)"
        sound.append(Problem(r.where, "channel", text))
    yield from sound
    limit_s = r.duration_s if r.duration_s is not None else length_s - r.start_s or math.inf
    told = list(_words(r, layout, limit_s))
    if words and not r.words:
        told.append(Problem(r.where, "words", f"{_place(r)}there are no words"))
    told += _turns(r, layout, limit_s)
    yield from _few(told)
    if listen and not sound and not told and r.words:
        yield from _listen(r, layout)


def _place(r: Recording) -> str:
    """Where the words are, if that is another file."""
    return "" if r.words_from == r.where else f"{r.words_from}: "


def _few(problems: list[Problem]) -> Iterator[Problem]:
    """The first ones of every kind, and how many more there are."""
    for kind in dict.fromkeys(p.kind for p in problems):
        same = [p for p in problems if p.kind == kind]
        yield from same[:SHOWN]
        if len(same) > SHOWN:
            yield Problem(same[0].where, kind, f"and {len(same) - SHOWN} more of this kind")


def _durations(r: Recording, length_s: float) -> Iterator[Problem]:
    """The manifest against the header."""
    if not length_s:
        if r.duration_s is None:
            yield Problem(r.where, "duration", f"{r.path}: its length is not known; say duration")
    elif r.whole and r.duration_s is not None and abs(r.duration_s - length_s) > OFF_S:
        text = f"{r.path}: lasts {length_s:.2f} s, the manifest says {r.duration_s:.2f} s"
        yield Problem(r.where, "duration", text)
    elif not r.whole and r.start_s + (r.duration_s or 0.0) > length_s + OFF_S:
        end = r.start_s + (r.duration_s or 0.0)
        text = f"{r.path}: ends at {length_s:.2f} s, the part ends at {end:.2f} s"
        yield Problem(r.where, "duration", text)


def _words(r: Recording, layout: str, limit_s: float) -> Iterator[Problem]:
    """Words in order, within the sound, and somebody's."""
    for i, w in enumerate(r.words, 1):
        name = f"{_place(r)}word {i} ({w.text!r})"
        if not (math.isfinite(w.start_s) and math.isfinite(w.end_s)) or w.start_s < 0:
            yield Problem(r.where, "time", f"{name} starts at {w.start_s:g} s")
        elif w.end_s <= w.start_s:
            text = f"{name} ends at {w.end_s:g} s, it starts at {w.start_s:g} s"
            yield Problem(r.where, "time", text)
        elif w.end_s > limit_s + OFF_S:
            text = f"{name} ends at {w.end_s:g} s, the sound at {limit_s:.2f} s"
            yield Problem(r.where, "beyond", text)
        if not w.text:
            yield Problem(r.where, "empty", f"{name} has no letters")
    for speaker in dict.fromkeys(w.speaker for w in r.words):
        own = [(i, w) for i, w in enumerate(r.words, 1) if w.speaker == speaker]
        for (_, before), (i, w) in pairwise(own):
            if w.start_s < before.start_s:
                text = f"{_place(r)}word {i} ({w.text!r}, {w.start_s:g} s) is out of order"
                text += f", {before.text!r} before it starts at {before.start_s:g} s"
                yield Problem(r.where, "order", text)
    if layout == "stereo" and r.words and main_speaker(r.words) != MAIN:
        names = ", ".join(sorted({w.speaker for w in r.words}))
        text = f"{_place(r)}no word is the own voice's ({MAIN}), they are of {names}"
        yield Problem(r.where, "speaker", text)


def _turns(r: Recording, layout: str, limit_s: float) -> Iterator[Problem]:
    if layout == "turns" and not r.turns:
        text = f"{r.path}: there are no turns (an .rttm beside it, or `data prepare --diarise`)"
        yield Problem(r.where, "turns", text)
    for turn in r.turns:
        if turn.end_s > limit_s + OFF_S:
            text = f"a turn of {turn.speaker} ends at {turn.end_s:g} s, the sound at {limit_s:.2f}"
            yield Problem(r.where, "turns", f"{text} s")


def _listen(r: Recording, layout: str) -> Iterator[Problem]:
    """Is there sound where the words are? Not asked where the whole file had to be decoded."""
    mine = [w for w in r.words if layout != "stereo" or w.speaker == MAIN]
    some = mine[:: max(len(mine) // LISTEN_WORDS, 1)][:LISTEN_WORDS]
    if not r.seeks and not (r.whole and r.words[-1].end_s < SHORT_S):
        return
    try:
        levels = np.median([_levels_db(r, w, layout) for w in some], axis=0)
    except InputError as error:
        yield Problem(r.where, "audio", str(error))
        return
    if levels[0] >= SILENT_DB:
        return
    if layout == "stereo" and levels[1] > SPEAKING_DB:
        text = f"{r.path}: the left channel is silent at its own words, the right one is not"
        yield Problem(r.where, "channel", f"{text}: are they swapped?")
    else:
        yield Problem(r.where, "silent", f"{r.path}: there is silence where its words are")


def _levels_db(r: Recording, word: Spoken, layout: str) -> list[float]:
    """Level of each channel during a word."""
    channel = "separate" if layout == "stereo" else "mix"
    wav = r.read(word.start_s, max(word.end_s - word.start_s, 0.04), channel)
    return (10 * (wav.square().mean(1) + 1e-10).log10()).tolist()


# Cached codes -------------------------------------------------------------------------------------


def inspect_cache(place: str | Path, codec: str = "") -> Iterator[Problem | Take]:
    """Every take of a cache of codes, or what is wrong with it; codec: whose codes they must be."""
    try:
        folders = shards(Path(place))
    except InputError as error:
        yield Problem(str(place), "cache", str(error))
        return
    for folder in folders:
        yield from _inspect_shard(folder, codec)


def _inspect_shard(folder: Path, codec: str) -> Iterator[Problem | Take]:
    facts_at, index = folder / "cache.json", folder / "index.jsonl"
    try:
        facts = read_facts(folder)
        Q, size = int(facts["codebooks"]), int(facts["codebook_size"])
    except (InputError, KeyError, TypeError, ValueError) as error:
        yield Problem(str(facts_at), "cache", f"does not say how many codes there are ({error!r})")
        return
    if codec and facts.get("codec") != codec:
        yield Problem(str(facts_at), "codec", "the codes are of another codec")
    if not (folder / "codes.i16").is_file():
        yield Problem(str(folder / "codes.i16"), "codes", "no such file")
        return
    total = (folder / "codes.i16").stat().st_size // (2 * Q)
    flat = np.memmap(folder / "codes.i16", np.int16, "r")[: total * Q] if total else None
    wide, rest = int(facts.get("residual") or 0), folder / REST
    if wide and not (rest.is_file() and rest.stat().st_size >= 2 * wide * total):
        yield Problem(str(rest), "residual", f"does not have the {total} frames of codes.i16")
    with index.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{index}:{number}"
            try:
                take = parse_take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                yield Problem(where, "row", f"not a row of a cache ({error!r})")
                continue
            if take.end > total or flat is None:
                text = f"{take.id}: ends at frame {take.end}, codes.i16 has {total}"
                yield Problem(where, "codes", text)
                continue
            block = flat[take.first * Q : take.end * Q]
            if take.crc is not None and zlib.crc32(block.tobytes()) != take.crc:
                yield Problem(where, "codes", f"{take.id}: the codes are not those that were made")
            elif len(block) and not (0 <= block.min() and block.max() < size):
                yield Problem(where, "codes", f"{take.id}: has codes beyond 0 to {size - 1}")
            else:
                yield take
