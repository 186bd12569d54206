"""`moshi doctor`: what this machine has, and what is missing for what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from moshi_cli import __version__
from moshi_cli.options import Json, LogOptions, flag, spread

NEEDED = {
    "torch": "everything", "numpy": "everything", "safetensors": "models",
    "sentencepiece": "text", "soundfile": "FLAC, OGG and MP3", "soxr": "rates other than 24 kHz",
    "typer": "the command line", "tqdm": "progress",
}  # fmt: skip
EXTRA = {
    "huggingface_hub": "downloading models (pip install 'moshi-cli[hub]')",
    "sounddevice": "microphone and speakers (pip install 'moshi-cli[mic]')",
}


@dataclass
class Finding:
    """One line of the report."""

    name: str
    status: str  # ok, missing (something optional), broken (something needed)
    value: Any
    note: str = ""


@spread
def command(
    *,
    compile: Annotated[bool, flag("--compile", "Also try torch.compile (half a minute).")] = False,
    json: Json = False,
    log: LogOptions,
) -> int:
    """Check what this machine has; exit 1 if something needed is missing."""
    console = log.console("doctor")
    bad = 0
    for finding in findings(compile):
        bad += finding.status == "broken"
        if json:
            console.record(vars(finding))
        else:
            mark = {"ok": "ok", "missing": "--", "broken": "NO"}[finding.status]
            note = f"  ({finding.note})" if finding.note else ""
            console.line(f"{mark:3}{finding.name:17}{finding.value}{note}")
    return 1 if bad else 0


def findings(compile: bool) -> Iterator[Finding]:
    """Everything that is checked, as it is found."""
    yield Finding("moshi", "ok", __version__)
    yield Finding("python", "ok", platform.python_version(), sys.executable)
    yield Finding("system", "ok", platform.platform())
    yield from _packages()
    yield from _torch(compile)
    yield from _native()
    yield from _memory()
    ffmpeg = shutil.which("ffmpeg")
    yield Finding(
        "ffmpeg", "ok" if ffmpeg else "missing", ffmpeg or "none", "" if ffmpeg else "M4A and WebM"
    )
    yield from _sound()
    yield from _models()


def _native() -> Iterator[Finding]:
    """What makes steps of a stream quick on a CPU."""
    try:
        from moshi_cli.core import native
    except ImportError:
        return
    there = native.library() is not None
    yield Finding(
        "native steps", "ok" if there else "missing", "compiled" if there else "none",
        "" if there else f"a C compiler makes streams quicker; {native.SWITCH}=0 forbids it",
    )  # fmt: skip


def _packages() -> Iterator[Finding]:
    for names, status in ((NEEDED, "broken"), (EXTRA, "missing")):
        for name, use in names.items():
            try:
                yield Finding(name, "ok", importlib.metadata.version(name))
            except importlib.metadata.PackageNotFoundError:
                yield Finding(name, status, "none", f"needed for {use}")


def _torch(compile: bool) -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        yield Finding("device", "broken", "none", f"torch: {error}")
        return
    from moshi_cli.core.weights import pick_device, pick_dtype

    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    yield Finding("device", "ok", str(device), f"{name or platform.machine()}, {dtype}")
    yield Finding("threads", "ok", torch.get_num_threads(), f"{os.cpu_count()} CPUs")
    if compile:
        try:
            twice = torch.compile(lambda x: x * 2, fullgraph=True)
            works = bool((twice(torch.ones(2, device=device)) == 2).all())
            yield Finding("compile", "ok" if works else "missing", works)
        except Exception as error:
            reason = str(error).strip().splitlines()[:1]
            yield Finding("compile", "missing", "none", "; ".join(reason))


def _memory() -> Iterator[Finding]:
    try:
        import torch

        from moshi_cli.core.weights import free_bytes, pick_device
    except Exception:
        return
    for device in {torch.device("cpu"), pick_device("auto")}:
        free = free_bytes(device)
        if free is not None:
            yield Finding(f"memory {device}", "ok", f"{free / 1e9:.1f} GB free")


def _sound() -> Iterator[Finding]:
    try:
        import sounddevice

        inputs, outputs = (
            sum(d[f"max_{kind}_channels"] > 0 for d in sounddevice.query_devices())
            for kind in ("input", "output")
        )
    except ImportError:
        return  # said among the packages
    except Exception as error:  # PortAudio is missing, or finds no sound system
        yield Finding("sound devices", "missing", "none", str(error).strip().splitlines()[0])
        return
    status = "ok" if inputs and outputs else "missing"
    yield Finding("sound devices", status, f"{inputs} microphones, {outputs} speakers")


def _models() -> Iterator[Finding]:
    from moshi_cli.core.hub import cache_folder
    from moshi_cli.session import BUILTIN

    there = BUILTIN.is_dir()
    yield Finding("built-in model", "ok" if there else "broken", str(BUILTIN) if there else "none")
    cache = cache_folder()
    count = len(list(cache.glob("models--*")))
    offline = ", HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
    yield Finding("model cache", "ok", str(cache), f"{count} repositories{offline}")
