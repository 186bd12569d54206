"""Plans of `moshi data encode`: which takes a cache holds of the clips of packs, as plain data.

    silence_s: 20                      # codes of silence, for pauses
    hisses: 40                         # of faint noise, for lines that are silent but not quite
    takes:                             # kind (prefix, first match) -> takes of each clip
      moshi: [{count: 5, tail_s: [0.3, 0.6]}]
      "": [{lead_s: [0.2, 1.5], speed: [0.85, 1.18], noise: 0.4}]
    windows: [{count: 5000, seconds: 8, flow: {rest: 0.4}}]    # many clips of many speakers

Which takes come in which order depends on the plan and the packs alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks.augment import Augment
from moshi_cli.tasks.cache import HISS, SILENCE, Clip, Hiss, Job, Variant
from moshi_cli.tasks.data import Pack, Row
from moshi_cli.tasks.documents import nearest, overlay, read
from moshi_cli.tasks.stages import Flow, Source
from moshi_cli.tasks.utterances import SceneJob, Utterances


@dataclass(frozen=True)
class Takes(Variant):
    """Takes of a clip, each drawn anew."""

    count: int = 1


@dataclass(frozen=True)
class Scenes:
    """Windows put together of clips. Their takes are of the kind `window`."""

    count: int = 1000
    seconds: float = 8.0
    flow: Flow = field(default_factory=Flow)
    augment: Augment = field(default_factory=Augment)


@dataclass(frozen=True)
class Plan:
    """What a cache is to hold."""

    silence_s: float = 20.0
    hisses: int = 40
    takes: dict[str, tuple[Takes, ...]] = field(default_factory=dict)
    windows: tuple[Scenes, ...] = ()


def load(path: Path) -> Plan:
    """A plan from YAML. UsageError naming file and line."""
    document = read(path, "a plan has `takes:` or `windows:`")
    known = [f.name for f in fields(Plan)]
    for key in document.data:
        if key not in known:
            where = document.place((str(key),))
            raise UsageError(f"{where}: unknown key {key!r}", nearest(str(key), known))
    return overlay(Plan(), document)


def jobs(plan: Plan, packs: Sequence[Pack]) -> list[Job]:
    """Everything to encode, always in the same order."""
    first: list[Job] = []
    if plan.silence_s:
        quiet = Variant(lead_s=(plan.silence_s, plan.silence_s), tail_s=(0.0, 0.0))
        first.append(Clip(packs[0], Row(SILENCE, SILENCE, "", (), 0, 0), quiet))
    first += [Hiss(Row(f"{HISS}-{i}", HISS, "", (), 0, 0)) for i in range(plan.hisses)]
    mixed: list[Job] = []
    for pack in packs:
        for row in pack.rows if plan.takes else ():
            found = next((v for k, v in plan.takes.items() if row.kind.startswith(k)), ())
            for takes in found if row.words else ():
                mixed += [Clip(pack, row, takes)] * takes.count
    mix = [Source(str(pack.folder), skip=()) for pack in packs]
    number = 0
    for scenes in plan.windows:
        drawn = Utterances(mix, None, scenes.flow, scenes.augment)
        for _ in range(scenes.count):
            row = Row(f"window-{number}", "window", "", (), 0, 0)
            mixed.append(SceneJob(drawn, scenes.seconds, row))
            number += 1
    random.Random(0).shuffle(mixed)
    return first + mixed
