"""What the subcommands of `moshi data` do with each recording, script or take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_cli.console import Console
from moshi_cli.core.errors import InputError
from moshi_cli.inputs import expand, take_shard

if TYPE_CHECKING:
    from moshi_cli.core.mimi import Mimi
    from moshi_cli.core.weights import Model
    from moshi_cli.tasks.cache import Take
    from moshi_cli.tasks.manifest import Problem, Recording
    from moshi_cli.tasks.plans import Plan

SOME_BAD = 3  # exit code


def done_ids(manifest: Path) -> set[str]:
    """The ids in a manifest that is being written; a torn last line is cut off."""
    if not manifest.is_file():
        return set()
    text = manifest.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        manifest.write_bytes(whole)
    return {str(json.loads(line).get("id")) for line in whole.splitlines() if line.strip()}


def told(console: Console, problems: Iterable[Problem]) -> int:
    """Each of them as a warning; how many."""
    lines = [str(problem) for problem in problems]
    for line in lines:
        console.warn(line)
    return len(lines)


def named(
    inputs: Sequence[str] | None, recursive: bool, manifest: str | None
) -> list[Recording | Problem]:
    """The recordings of a command line, with what lies beside them."""
    from moshi_cli.tasks.manifest import Problem, file_recording, read_data

    found = list(read_data(manifest)) if manifest is not None else []
    if inputs or manifest is None:
        for item in expand(inputs, recursive=recursive):
            try:
                found.append(file_recording(Path(str(item.source)), item.name))
            except InputError as error:
                found.append(Problem(item.id, "side", str(error)))
    return found


def prepare(
    found: Sequence[Recording | Problem],
    folder: Path,
    console: Console,
    *,
    convert: bool,
    pack: bool,
    model: Model | None,
    diarise: int | None,
    skip: bool,
) -> int:
    """A manifest or a pack in `folder`."""
    from moshi_cli.tasks.manifest import Problem
    from moshi_cli.tasks.preparation import Preparer

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / ("index.jsonl" if pack else "manifest.jsonl")
    done, failed = done_ids(target), 0
    maker = Preparer(folder, convert=convert, pack=pack, model=model, speakers=diarise)
    progress = console.progress(len(found))
    try:
        with target.open("a", encoding="utf-8") as rows:
            for item in found:
                try:
                    if isinstance(item, Problem):
                        raise InputError(str(item))
                    progress.begin(item.id)
                    if item.id not in done:
                        rows.write(json.dumps(maker.row(item), ensure_ascii=False) + "\n")
                        rows.flush()
                        progress.advance(item.length_s)
                except InputError as error:
                    if not skip:
                        raise
                    failed += 1
                    console.warn(str(error))
                progress.finish_item()
    finally:
        progress.close()
    console.info(f"{target}: {len(found) - failed} recordings")
    return SOME_BAD if failed else 0


def check(
    places: Sequence[str],
    console: Console,
    *,
    layout: str,
    words: bool,
    output: Path | None,
    listen: bool,
    fail_fast: bool,
    as_json: bool,
) -> int:
    """Problems on stdout, a line each; how many on stderr."""
    from moshi_cli.core.files import write_text
    from moshi_cli.tasks.manifest import Recording

    good, bad = 0, set[str]()
    kept: list[str] = []
    for place in places:
        for item, wrong in examined(place, layout, words, listen):
            for problem in wrong:
                bad.add(problem.where)
                console.record(asdict(problem)) if as_json else console.line(str(problem))
            if wrong and fail_fast:
                return SOME_BAD
            if not wrong:
                good += 1
                if isinstance(item, Recording) and output is not None:
                    kept.append(good_line(item))
    if output is not None:
        write_text(output, "".join(kept))
    console.info(f"{good + len(bad)} lines, {len(bad)} with problems")
    return SOME_BAD if bad else 0


def examined(
    place: str, layout: str, words: bool, listen: bool
) -> Iterable[tuple[Recording | Take | None, list[Problem]]]:
    """Every line of a data set or a cache, with what is wrong with it."""
    from moshi_cli.tasks.cache import is_cache
    from moshi_cli.tasks.inspection import inspect, inspect_cache
    from moshi_cli.tasks.manifest import Problem, read_data

    if is_cache(place):
        for found in inspect_cache(Path(place)):
            yield (None, [found]) if isinstance(found, Problem) else (found, [])
        return
    for item in read_data(place):
        if isinstance(item, Problem):
            yield None, [item]
        else:
            yield item, list(inspect(item, layout, words, listen))


def good_line(recording: Recording) -> str:
    """Its line in the manifest, with a path that is good anywhere."""
    file, _, number = recording.where.rpartition(":")
    with open(file, encoding="utf-8") as lines:
        row = json.loads(next(islice(lines, int(number) - 1, None)))
    if not recording.packed:
        row = {"path": str(recording.path.resolve())} | {
            k: v for k, v in row.items() if k not in ("path", "audio_filepath", "audio", "file")
        }
    return json.dumps(row, ensure_ascii=False) + "\n"


def encode(
    places: Sequence[str],
    folder: Path,
    mimi: Mimi,
    console: Console,
    *,
    layout: str,
    words: bool,
    skip: bool,
    piece_s: float,
    variants: int,
    seed: int,
    shard: str | None,
    residual: bool,
    noises: tuple[str, ...] | None,
) -> int:
    """A cache of codes in `folder`, or in a folder of the shard within it."""
    from moshi_cli.tasks.cache import write_cache
    from moshi_cli.tasks.manifest import load_data
    from moshi_cli.tasks.microphone import Microphone
    from moshi_cli.tasks.pieces import pieces

    data = load_data(places, layout, words=words, skip=skip)
    failed = told(console, data.problems)
    slow = sum(not r.whole and not r.seeks for r in data.recordings)
    if slow:
        text = f"{slow} recordings are parts of compressed files, decoded from their start each"
        console.warn(text, "`moshi data prepare --pack` cuts them out in one pass")
    microphone = None if noises is None else replace(Microphone(), noises=noises)
    found = pieces(
        data.recordings, layout, piece_s=piece_s, variants=variants, microphone=microphone
    )
    jobs = take_shard(list(found), shard)
    settings = {
        "layout": layout, "piece_s": piece_s, "variants": variants,
        "microphone": None if microphone is None else list(microphone.noises),
        "jobs": digest(f"{job.row.id} {job.duration_s:.3f}" for job in jobs),
    }  # fmt: skip
    folder = part_of(folder, shard)
    progress = console.progress(len(jobs), sum(job.duration_s for job in jobs))

    def report(done: int) -> None:
        progress.advance(jobs[done - 1].duration_s)
        progress.finish_item()

    try:
        count = write_cache(
            mimi, jobs, folder, seed=seed, residual=residual, settings=settings, report=report
        )
    finally:
        progress.close()
    hours = sum(job.duration_s for job in jobs) / 3600
    console.info(f"{folder}: {count} takes, {hours:.2f} hours, {failed} problems")
    return SOME_BAD if failed else 0


def encode_plan(
    places: Sequence[str],
    folder: Path,
    mimi: Mimi,
    console: Console,
    plan: Plan,
    *,
    seed: int,
    shard: str | None,
    residual: bool = False,
) -> int:
    """A cache of the takes that a plan makes of packs."""
    from moshi_cli.tasks import plans
    from moshi_cli.tasks.cache import write_cache
    from moshi_cli.tasks.data import Pack
    from moshi_cli.tasks.recipes import plain

    jobs = take_shard(plans.jobs(plan, [Pack(place) for place in places]), shard)
    folder, progress = part_of(folder, shard), console.progress(len(jobs))
    part = int(shard.partition("/")[0]) - 1 if shard else 0  # shards draw other windows
    settings = {"plan": plain(plan), "jobs": digest(job.row.id for job in jobs)}
    try:
        count = write_cache(
            mimi, jobs, folder, seed=seed + part, residual=residual, settings=settings,
            report=lambda done: progress.finish_item(),
        )  # fmt: skip
    finally:
        progress.close()
    console.info(f"{folder}: {count} takes")
    return 0


def part_of(folder: Path, shard: str | None) -> Path:
    """The folder of a shard within a folder."""
    return folder if shard is None else folder / ("part-" + shard.replace("/", "-of-"))


def features(folder: Path, name: str, console: Console, *, device: str, force: bool) -> None:
    """feat.f16 of a pack."""
    from moshi_cli.core.weights import pick_device
    from moshi_cli.tasks.data import Pack
    from moshi_cli.tasks.features import DONE, FeatureWriter, Window, discard, length_s
    from moshi_cli.tasks.teachers import named, open_teacher

    kind, place = named(name)
    if (folder / DONE).is_file() and not force and Pack(folder).features is not None:
        console.info(f"{folder / DONE}: is there already; --force makes it anew")
        return
    chosen = pick_device(device)
    teacher = open_teacher(name, chosen)
    console.info(f"{kind} of width {teacher.width} on {chosen}")
    if force:
        discard(folder)
    writer = FeatureWriter(Pack(folder), teacher, f"{kind}:{place}")
    if writer.done:
        console.info(f"{writer.done} of {len(writer.windows)} windows were done before")
    progress = console.progress(len(writer.left), length_s(writer.left))

    def report(window: Window) -> None:
        progress.advance(length_s([window]))
        progress.finish_item()

    try:
        whole = writer.write(report)
    finally:
        progress.close()
    hours = length_s(writer.windows) / 3600
    console.info(f"{whole}: {writer.pack.frames} frames, {hours:.2f} hours")


def digest(lines: Iterable[str]) -> str:
    """A fingerprint of what there is to do."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
