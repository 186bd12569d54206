"""The machine under a measurement: memory of this process, bandwidth of its memory, what it is."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COPIED_MB = 128  # of the buffer that is copied to measure bandwidth: more than any cache
COPIES = 7


def memory_mb() -> float:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * 4096 / 1e6


def peak_mb() -> float:
    """The most memory this process has had resident.

    Linux counts it per program (VmHWM), so what started this process does not show.
    """
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def bf16_kernels(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are as quick as in float32. A CPU without instructions for them
    takes sixty times as long."""
    import torch

    from moshi_cli.core.packing import packable

    on_cpu = torch.device(device).type == "cpu"
    return not on_cpu or packable(torch.empty(1, 1, dtype=torch.bfloat16))


def bandwidth_gb_s(device: torch.device | str, copied_mb: int = COPIED_MB) -> float:
    """Bytes read plus bytes written per second by the fastest of a few large copies.

    With the threads that torch has now. On the CPU the time is process CPU time per thread, as for
    the steps that it is compared with: other programs do not count. The source is written first:
    fresh memory is one page of zeros that stays in the cache.
    """
    import torch

    source = torch.ones(copied_mb * 1_000_000 // 4, device=device)
    target = torch.zeros_like(source)
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    best = float("inf")
    for _ in range(COPIES):
        wait(device)
        began = clock()
        target.copy_(source)
        wait(device)
        best = min(best, clock() - began)
    if on_cpu:
        best /= torch.get_num_threads()
    return 2 * source.numel() * 4 / best / 1e9


def wait(device: torch.device | str) -> None:
    """Until the device has done what it was given."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def processor() -> str:
    """Its name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def facts() -> dict[str, Any]:
    """What a figure must be read with: processor, cores, load, system, Python."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": None if load is None else round(load, 2),  # of the last minute, before the run
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
