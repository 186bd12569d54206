"""The process behind `contest.Worker`: JSON lines in, JSON lines out.

The first line is the job; the answer comes when the model is ready. Then {"do": "outputs"}, "laps",
"first" or "end". Two jobs have no more than the answer: the files of random weights, and the
bandwidth of the memory. Whatever else prints, prints on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from moshi_cli.core.errors import MemoryLimitError, MoshiError
from moshi_cli.tasks.contest import Job
from moshi_cli.tasks.machine import bandwidth_gb_s, memory_mb, peak_mb
from moshi_cli.tasks.stopwatch import laps

if TYPE_CHECKING:
    from moshi_cli.tasks.candidates import Candidate

PACKAGES = ("torch", "moshi", "transformers")  # whose versions are noted; moshi is Kyutai's


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def has_native() -> bool:
    """Whether steps in float32 on a CPU are done by compiled functions."""
    from moshi_cli.core import native

    return native.library() is not None


def place(job: Job) -> dict[str, str]:
    """The device and the type that a job's words stand for; a codec is float32 always."""
    import torch

    from moshi_cli.core.weights import DTYPES, pick_device, pick_dtype

    device = pick_device(job.device)
    dtype = torch.float32 if job.what == "codec" else pick_dtype(job.dtype, device)
    names = {value: name for name, value in DTYPES.items()}
    return {"device": str(device), "dtype": names[dtype]}


def prepare(job: Job) -> tuple[Candidate | None, dict[str, Any]]:
    """The candidate of a job, and what its beginning cost."""
    began = time.perf_counter()
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.what.endswith("weights"):
        from moshi_cli.tasks.peer_weights import write

        write(job)
        return None, {}
    if job.what == "bandwidth":  # by itself: its buffers are nobody's memory
        from moshi_cli.core.weights import pick_device

        return None, {"bandwidth_gb_s": round(bandwidth_gb_s(pick_device(job.device)), 3)}
    if job.who == "kyutai":
        from moshi_cli.tasks.kyutai_peer import build
    elif job.who == "transformers":
        from moshi_cli.tasks.transformers_peer import build
    else:
        from moshi_cli.tasks.candidates import build
    imported = time.perf_counter()
    candidate = build(job)
    loaded = time.perf_counter()
    found = {
        "import_s": round(imported - began, 3),
        "load_s": round(loaded - imported, 3),
        "loaded_mb": round(memory_mb(), 1),
        "parameters": candidate.parameters,
        "threads": torch.get_num_threads(),
        **place(job),
        "versions": versions(),
        "native": job.who == "moshi" and has_native(),
        "facts": dict(candidate.facts),
    }
    lanes: dict[str, Any] = {}
    for name, lane in candidate.lanes.items():
        once = laps(lane.step, 1)[0]
        lanes[name] = {"audio_s": lane.audio_s, "first_ms": round(once.wall_ms, 3)}
        lanes[name] |= lane.reads.record() if lane.reads is not None else {}
    return candidate, {**found, "lanes": lanes}


def answer(candidate: Candidate, job: Job, message: dict[str, Any]) -> dict[str, Any]:
    """What one message is answered with."""
    import torch

    from moshi_cli.core.weights import pick_device

    device = pick_device(job.device)
    wanted = message["do"]
    if wanted == "outputs":
        import numpy as np

        with tempfile.NamedTemporaryFile(suffix=".npz", delete=False) as file:
            np.savez(file, **candidate.outputs())
        return {"path": file.name}
    if wanted == "laps":
        lane = candidate.lanes[message["lane"]]
        lane.step()  # some have to get ready again after another lane
        done = laps(lane.step, message["steps"], pace_s=message.get("pace_s"))
        return {"laps": [asdict(lap) for lap in done]}
    if wanted == "first":
        return dict(candidate.first(message.get("pace_s"))) if candidate.first else {}
    assert wanted == "end", wanted
    found = {"peak_mb": round(peak_mb(), 1)}
    if device.type == "cuda":
        found["device_peak_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return found


def explained(error: BaseException) -> dict[str, Any]:
    """An error as a message."""
    if not isinstance(error, MoshiError):
        text = " ".join(str(error).split())[:300]
        lacking = isinstance(error, MemoryError) or "allocate" in text or "out of memory" in text
        kind = MemoryLimitError if lacking else MoshiError
        error = kind(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    return {"error": error.message, "hint": error.hint, "code": error.exit_code}


def main() -> None:
    """Serve until the pipe is closed."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print is not an answer
    try:
        job = Job(**json.loads(sys.stdin.readline()))
        candidate, found = prepare(job)
        reply.write(json.dumps(found) + "\n")
        reply.flush()
        for line in sys.stdin:
            if candidate is None:
                break
            reply.write(json.dumps(answer(candidate, job, json.loads(line))) + "\n")
            reply.flush()
    except KeyboardInterrupt:
        pass
    except Exception as error:  # told to the other side, which raises it
        reply.write(json.dumps(explained(error)) + "\n")
        reply.flush()


if __name__ == "__main__":
    main()
