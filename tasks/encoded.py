"""Manifests in a mix: encoded once, beside themselves, before training begins.

`talks.jsonl` becomes the cache `talks.codes/`, as `moshi data encode` would make it; a stopped run
goes on where it was. Bad lines are fatal here: `moshi data check` lists them all.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from moshi_cli.core.errors import InputError
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.streams import Role, Task
from moshi_cli.tasks import parallel
from moshi_cli.tasks.cache import write_cache
from moshi_cli.tasks.manifest import load_data
from moshi_cli.tasks.pieces import pieces

log = logging.getLogger(__name__)
PIECE_S = 300.0


def cache_of(folder: str | Path, *, there: bool = True) -> Path:
    """The cache that a source means: itself, or the one beside a manifest.

    InputError if it is to be there and is not.
    """
    path = Path(folder)
    if not path.is_file():
        return path
    codes = path.with_suffix(".codes")
    if there and not (codes / "index.jsonl").is_file():
        hint = f"moshi data encode {path} -o {codes}; `moshi train` does it when it begins"
        raise InputError(f"{path}: a manifest, not encoded yet", hint)
    return codes


def encode_manifest(path: Path, mimi: Mimi, task: Task, *, residual: bool = False) -> Path:
    """The cache of a manifest, made by the first process if it is not there; residual: with what
    codes leave of the sound."""
    folder = cache_of(path, there=False)
    layout = "mono" if task.partner is Role.ABSENT else "stereo"
    if parallel.rank() == 0:
        jobs = list(pieces(load_data([path], layout).recordings, layout, piece_s=PIECE_S))
        names = "\n".join(f"{job.row.id} {job.duration_s:.3f}" for job in jobs)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        hours = sum(job.duration_s for job in jobs) / 3600
        log.warning("%s: %.2f hours of sound become codes in %s", path, hours, folder)
        settings = {"layout": layout, "jobs": digest}
        write_cache(mimi, jobs, folder, residual=residual, settings=settings)
    parallel.wait()
    return folder
