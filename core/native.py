"""The quick way through a step on a CPU: native.c, compiled where it first runs.

One call walks a whole stack of layers for a few rows, where PyTorch needs hundreds and reads the
weights more slowly. It is for float32; `pack` (packing.py) hands it the weights.
Without a C compiler, or with MOSHI_NATIVE=0 in the environment, everything is done by PyTorch, with
the same results but for rounding. What is compiled is kept in the user's cache folder, by source,
compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
SWITCH = "MOSHI_NATIVE"  # 0: not used
FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
WIDTH = 16  # all widths are multiples of it: of the numbers of any register
PATHS, BOOKS = 32, 64  # that a search can keep, and go through
ROWS = 8  # that a product is for, at most
MANY = 64  # that a stack is for, unless PyTorch has but one thread, too
SECONDS = 60  # that a compiler may take
MATRIX, STACK = 1 << 24, 1 << 26  # numbers up to which one thread does not lose against several

Address = ctypes.c_void_p
Int = ctypes.c_int64


class Shape(ctypes.Structure):
    """As in native.c."""

    _fields_ = [
        *((name, Int) for name in (
            "layers", "dim", "heads", "kv_heads", "hidden", "gated", "part", "ring", "context",
            "apart",
        )),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


SIGNATURES = {
    "product": (Address, Address, Address, Address, Int, Int, Int, Int),
    "columns": (Address, Address, Address, Address, Int, Int, Int, Int, Address),
    "stack": (
        Address,
        Address,
        Address,
        Address,
        Address,
        Address,
        Address,
        Int,
        Int,
        Address,
        Address,
    ),
    "follow": (Address, Int, Int, Int, Int, Address, Address, Address, Int, Int, Address),
    "nearest": (Address, Int, Int, Int, Address, Address),
    "search": (Address, Int, Int, Int, Int, Address, Address, Address),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None if there are none here."""
    if os.environ.get(SWITCH) == "0" or not hasattr(os, "fork"):
        return None
    try:
        return opened(compiled())
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        log.debug("no native functions: %s", error)
        return None


def opened(path: Path) -> ctypes.CDLL:
    """A shared library of native.c. OSError if it is none."""
    found = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    found.lanes.restype = Int
    return found


def compiler_command() -> str:
    """CC, or one of the usual names. OSError if there is none."""
    found = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    if not found.strip():
        raise OSError("no C compiler")
    return found


def compiled() -> Path:
    """The shared library, made if it is not there yet.

    Raises OSError or SubprocessError if it cannot be made, RuntimeError if the user has no home,
    ValueError for a CC that no shell reads.
    """
    compiler = compiler_command()
    if sys.platform == "darwin":  # where cc may be a stand-in that asks to be installed
        subprocess.run(["xcode-select", "-p"], capture_output=True, check=True, timeout=SECONDS)
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (compiler, platform.platform(), processor()):
        key.update(part.encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moshi-cli"
    path = folder / f"native-{key.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        part_path, said = Path(work) / path.name, ""
        for flags in FLAGS:
            command = [*shlex.split(compiler), "-O3", "-shared", "-fPIC", *flags]
            command += ["-o", str(part_path), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode == 0:
                part_path.replace(path)
                return path
            said = done.stderr.strip()
    raise OSError(f"{compiler}: {said[:200]}")


def processor() -> str:
    """What the code is compiled for: a home folder may be that of several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[Address]:
    """Where tensors lie, as C reads it. They must outlive it."""
    return (Address * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def alone(numbers: int, most: int) -> bool:
    """Whether so many numbers are read by one thread as soon as by those that PyTorch has."""
    return numbers <= most or torch.get_num_threads() == 1


def few(rows: int) -> bool:
    """Whether a stack walks so many rows here as soon as PyTorch does."""
    return rows <= MANY or torch.get_num_threads() == 1


def usable(*tensors: Tensor | None) -> bool:
    """Whether tensors lie as native.c reads them."""
    there = [x for x in tensors if x is not None]
    return all(
        x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in there
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
    """x [N, in] times weight [out, in] -> [N, out]; or weight [in / part, out, part].

    `library` must be there.
    """
    lib, rows, into = library(), *x.shape
    out = weight.numel() // into
    assert lib is not None and weight.numel() == out * into and usable(x, weight, bias)
    y = x.new_empty(rows, out)
    lib.product(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr(), y.data_ptr(),
        rows, into, out, part or into,
    )  # fmt: skip
    return y


def follow(rings: Sequence[Tensor], to: Tensor, source: Tensor, cells: Tensor) -> None:
    """Cells long[n, count] of slots to[n] become those of slots source[n], in all rings [slots,
    heads, ring, width] of one shape. `library` must be there."""
    lib, (_slots, heads, ring, width) = library(), rings[0].shape
    n, count = cells.shape
    assert lib is not None and usable(*rings) and all(x.shape == rings[0].shape for x in rings)
    told = (to, source, cells)
    assert all(x.dtype == torch.long and x.is_contiguous() for x in told) and len(to) == n
    room = rings[0].new_empty(n * count * heads * width)
    lib.follow(
        addresses(rings), len(rings), heads, ring, width, to.data_ptr(), source.data_ptr(),
        cells.data_ptr(), n, count, room.data_ptr(),
    )  # fmt: skip


@dataclass
class Weights:
    """What one layer multiplies by. Norms [D]; matrices [out, in]."""

    gain1: Tensor
    shift1: Tensor | None
    qkv: Tensor
    out: Tensor
    gain2: Tensor
    shift2: Tensor | None
    up: Tensor
    down: Tensor  # or [in / part, out, part]

    def tensors(self) -> list[Tensor | None]:
        """In the order of native.c."""
        return [self.gain1, self.shift1, self.qkv, self.out,
                self.gain2, self.shift2, self.up, self.down]  # fmt: skip


class Caches:
    """Keys and values of each layer: [slots, kv heads, ring, width], or views of more."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        first = layers[0][0]
        self.there = addresses([x for pair in layers for x in pair])
        self.ring, self.apart = first.shape[2], first.stride(0)


class Stack:
    """A stack of layers as native.c walks it. The weights are those of the model, not copies."""

    def __init__(
        self, layers: Sequence[Weights], heads: int, kv_heads: int, eps: float, gated: bool
    ) -> None:
        first = layers[0]
        self.dim, self.hidden = first.out.shape[0], first.down.numel() // first.out.shape[0]
        self.kept = [x for layer in layers for x in layer.tensors()]
        self.weights = addresses(self.kept)
        part = first.down.shape[-1]
        self.shape = Shape(
            len(layers), self.dim, heads, kv_heads, self.hidden, gated, part, 0, 0, 0, eps
        )
        self.floats = first.qkv.shape[0] + first.up.shape[0] + 2 * self.dim + self.hidden
        self.side = 2 * WIDTH * max(self.dim, part)

    @staticmethod
    def fits(layers: Sequence[Weights], heads: int) -> bool:
        """Whether native.c can walk them."""
        if library() is None or not layers:
            return False
        first = layers[0]
        widths = (
            first.out.shape[0], first.out.shape[0] // heads, first.up.shape[0] // 2,
            first.down.shape[-1],
        )  # fmt: skip
        there = [x for layer in layers for x in layer.tensors() if x is not None]
        if any(n % WIDTH for n in widths) or not usable(*there):
            return False
        return alone(sum(x.numel() for x in there), STACK)

    def step(
        self,
        x: Tensor,
        caches: Caches,
        context: int,
        clocks: Tensor,
        slots: Tensor,
        turns: Tensor | None,
        alike: Tensor | None = None,
        own: int = 0,
    ) -> Tensor:
        """x [N, D], step clocks[n] of slot slots[n] each (long[N]) -> [N, D]; new keys go into the
        caches. turns [N, width]: cosine and sine of each pair. alike long[N]: slots whose keys
        before the latest `own` (1 at least) are those of the row's slot, too."""
        lib, rows = library(), len(x)
        assert lib is not None and 0 < rows == len(clocks) == len(slots)
        told = [t for t in (clocks, slots, alike) if t is not None]
        assert all(t.dtype == torch.long and t.is_contiguous() for t in told)
        assert alike is None or (own > 0 and len(alike) == rows)
        y = x.clone(memory_format=torch.contiguous_format)
        room = x.new_empty(rows * self.floats + caches.ring + 2 * WIDTH + self.side)
        shape = Shape.from_buffer_copy(self.shape)  # several threads may step one model
        shape.ring, shape.context, shape.apart = caches.ring, context, caches.apart
        lib.stack(
            self.weights, caches.there, ctypes.byref(shape),
            None if turns is None else turns.data_ptr(), clocks.data_ptr(), slots.data_ptr(),
            None if alike is None else alike.data_ptr(), own, rows, y.data_ptr(), room.data_ptr(),
        )  # fmt: skip
        return y


def striped(x: Tensor) -> Tensor:
    """x [size, dim] -> [size / L, dim, L]: as many rows at a time as a register has numbers,
    turned."""
    lib = library()
    assert lib is not None
    return x.view(-1, lib.lanes(), x.shape[1]).transpose(1, 2).contiguous()


class Books:
    """Codebooks of a residual quantiser, one after the other; `beam` paths are kept in a search."""

    def __init__(
        self, centroids: Sequence[Tensor], half_norms: Sequence[Tensor], beam: int = 1
    ) -> None:
        each = zip(centroids, half_norms, strict=True)
        self.kept = [x for c, h in each for x in ((c, striped(c), h) if beam > 1 else (c, h))]
        self.table, self.beam = addresses(self.kept), beam
        self.count, (self.size, self.dim) = len(centroids), centroids[0].shape

    @staticmethod
    def fits(centroids: Sequence[Tensor], half_norms: Sequence[Tensor], beam: int = 1) -> bool:
        """Whether native.c can search them."""
        size, dim = centroids[0].shape
        if library() is None or dim % WIDTH or not usable(*centroids, *half_norms):
            return False
        return beam == 1 or (size % WIDTH == 0 and beam <= PATHS and len(centroids) <= BOOKS)

    def nearest(self, x: Tensor, count: int) -> Tensor:
        """x [D] -> codes long[count] of the first codebooks."""
        lib, codes = library(), torch.empty(count, dtype=torch.long)
        assert lib is not None and count <= self.count
        if self.beam == 1:
            rest = x.clone(memory_format=torch.contiguous_format)
            lib.nearest(self.table, count, self.size, self.dim, rest.data_ptr(), codes.data_ptr())
        else:
            x, room = x.contiguous(), x.new_empty(2 * self.beam * self.dim)
            lib.search(
                self.table, count, self.size, self.dim, self.beam, x.data_ptr(), room.data_ptr(),
                codes.data_ptr(),
            )  # fmt: skip
        return codes
