"""The mean of the weights of one model at two times of its training: mean.py A B OUT

A and B are folders of one shape, as `moshi train` leaves them; OUT is B with the mean of both
language models. --share: how much of it is B's. --keep: tensors, by the beginnings of their names,
that stay as B has them, such as the depth transformer (depformer linears) of a model whose codes
were others before.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("first", "second", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--keep", nargs="+", default=[], metavar="PREFIX")
    args = parser.parse_args()
    a, b = (load_file(folder / "model.safetensors") for folder in (args.first, args.second))
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        sys.exit(f"{args.first} and {args.second} are not of one shape")
    part = args.out.with_name(f".{args.out.name}.part")  # renamed when it is whole
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(args.second, part)
    share, keep = args.share, tuple(args.keep)
    mean = {
        name: (a[name].double().lerp(b[name].double(), share).to(b[name].dtype))
        for name in b
        if not name.startswith(keep)
    }
    save_file(b | mean, part / "model.safetensors")
    part.rename(args.out)


if __name__ == "__main__":
    main()
