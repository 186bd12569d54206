"""Pairs of `moshi eval codec`: recordings beside what another codec, or a network, made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_cli.batch import Result
from moshi_cli.console import Console
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.eval_codec import ORIGINAL, sound_of
from moshi_cli.eval_jobs import SHOWN, Evaluation, Row
from moshi_cli.inputs import SOUND, Item

if TYPE_CHECKING:
    from torch import Tensor

    from moshi_cli.tasks.fidelity import Measure

DEGRADED = "degraded"  # key of manifests, and name of the only pass
MOST_S = 0.25  # that two recordings of a pair may differ in length


def paired(
    items: Sequence[Item], inputs: Sequence[str], folder: Path, recursive: bool, console: Console
) -> list[Item]:
    """Items with the file of `folder` that has the same name, sub-folders included if `recursive`.

    The suffix may differ. Items that have no such file fail later; files that belong to no item are
    named. UsageError if `folder` is none.
    """
    if not folder.is_dir():
        raise UsageError(f"--degraded {folder}: is no folder")
    there: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if path.suffix.lower() in SOUND and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            there.setdefault(name, []).append(path)
    bases = [Path(name).absolute() for name in inputs if Path(name).is_dir()]
    found = []
    for item in items:
        name = item.name if item.source is None else name_in(Path(item.source), bases)
        paths = there.pop(name, [])
        record = dict(item.record)
        if len(paths) == 1:
            record[DEGRADED] = str(paths[0])
        elif len(paths) > 1:
            both = ", ".join(path.name for path in paths)
            record.setdefault("problem", f"{item.id}: {folder} has {both}: which one is it?")
        found.append(replace(item, record=record))
    if there:
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        console.warn(f"{folder}: without a reference: {', '.join([*there][:SHOWN])}{more}")
    return found


def name_in(path: Path, bases: Iterable[Path]) -> str:
    """The name of a file within the first of some folders that it lies in, without its suffix."""
    absolute = path.absolute()
    base = next((base for base in bases if absolute.is_relative_to(base)), absolute.parent)
    return absolute.relative_to(base).with_suffix("").as_posix()


def stamped(items: Iterable[Item]) -> list[Item]:
    """Items whose record says which content the degraded file has, for --resume."""
    from moshi_cli.likelihood_jobs import stamp

    return [
        replace(item, record={**item.record, "stamp": stamp(Path(str(item.record[DEGRADED])))})
        if DEGRADED in item.record else item
        for item in items
    ]  # fmt: skip


class Comparison:
    """All pairs of one command line."""

    def __init__(self, run: Evaluation, measures: dict[str, Measure], channel: str) -> None:
        self.run, self.measures, self.channel = run, measures, channel
        self.settings = {"measures": sorted(measures), "channel": channel, "pairs": True}

    def __call__(self, item: Item) -> Result:
        """What is measured on a pair. InputError."""
        from moshi_cli.core import audio

        wav = sound_of(self.run, item, self.channel)
        degraded = item.record.get(DEGRADED)
        if degraded is None:
            raise InputError(f"{item.id}: there is no degraded recording of it")
        other = audio.read(str(degraded), channel=self.channel)[0]
        return Result(
            item, [], len(wav) / audio.SAMPLE_RATE, fields=self.row(item, wav, other, str(degraded))
        )

    def row(self, item: Item, wav: Tensor, other: Tensor, path: str) -> Row:
        """wav, other: float32 [S] at 24 kHz; what one has more at its end is left out."""
        from moshi_cli.core.audio import SAMPLE_RATE, write
        from moshi_cli.tasks.fidelity import compare

        samples = min(len(wav), len(other))
        longer_s = (len(other) - len(wav)) / SAMPLE_RATE
        if abs(longer_s) > MOST_S or not samples:
            long_s, short_s = (len(x) / SAMPLE_RATE for x in (other, wav))
            lengths = f"has {long_s:.2f} s, its reference {short_s:.2f} s"
            raise InputError(f"{item.id}: {path} {lengths}: they do not belong together")
        original = str(item.source)
        if item.record.keys() & {"packed", "start"} or self.channel != "mix":
            original = self.run.destination.path(item, ORIGINAL)
            write(original, wav)
        row: Row = {"audio": self.run.relative(original), "longer_s": longer_s}
        if "text" in item.record:
            row["reference"] = item.record["text"]
        distances = compare(wav[:samples], other[:samples], self.measures)
        return row | {"passes": {DEGRADED: {"audio": self.run.relative(path), **distances}}}

    def sounds(self, row: Row) -> Mapping[str, str]:
        """What a judge hears, if it is known what is said."""
        if "reference" not in row:
            return {}
        return {"original": row["audio"], DEGRADED: row["passes"][DEGRADED]["audio"]}
