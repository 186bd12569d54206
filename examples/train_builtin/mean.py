"""The mean of the weights of one model at two times of its training: mean.py A B OUT

A and B are folders of one shape, as `moshi train` leaves them; OUT is B with the mean of both
language models.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    first, second, out = map(Path, sys.argv[1:])
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        sys.exit(f"{first} and {second} are not of one shape")
    part = out.with_name(f".{out.name}.part")  # renamed when it is whole
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(second, part)
    mean = {name: ((a[name].double() + b[name].double()) / 2).to(b[name].dtype) for name in b}
    save_file(mean, part / "model.safetensors")
    part.rename(out)


if __name__ == "__main__":
    main()
