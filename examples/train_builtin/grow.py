"""A deeper temporal transformer that says the same: grow.py MODEL OUT --after 4 5 6

Behind each of those layers (counted from 1) comes a copy of it that adds nothing yet: the last
matrices of its attention and of its feed-forward are zero. Both learn from the first step on, the
rest of the copy from the second. MODEL and OUT are folders as `moshi train` leaves them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

LAYER = re.compile(r"(transformer\.layers\.)(\d+)(\..*)")
ADDS = (".self_attn.out_proj.weight", ".gating.linear_out.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--after", nargs="+", type=int, required=True, metavar="LAYER")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    layers, after = config["num_layers"], sorted(set(args.after))
    if not 1 <= after[0] <= after[-1] <= layers:
        sys.exit(f"{args.model} has {layers} layers")
    tensors = {}
    for name, tensor in load_file(args.model / "model.safetensors").items():
        if not (match := LAYER.fullmatch(name)):
            tensors[name] = tensor
            continue
        head, place, tail = match[1], int(match[2]), match[3]
        new = place + sum(layer <= place for layer in after)
        tensors[f"{head}{new}{tail}"] = tensor
        if place + 1 in after:
            copy = tensor.new_zeros(tensor.shape) if tail in ADDS else tensor.clone()
            tensors[f"{head}{new + 1}{tail}"] = copy
    part = args.out.with_name(f".{args.out.name}.part")  # renamed when it is whole
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(args.model, part)
    save_file(tensors, part / "model.safetensors")
    config["num_layers"] = layers + len(after)
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    part.rename(args.out)


if __name__ == "__main__":
    main()
