"""Train the codec of the built-in model.

    python codec.py RUN_FOLDER --pack PACK[=WEIGHT] [--pack …] --minutes 180 [--resume]

Packs are made by pack.py. Ctrl-C or SIGTERM saves and stops; --resume goes on with the same budget.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from moshi_cli.core.config import MIMI_NANO
from moshi_cli.core.mimi import Mimi
from moshi_cli.tasks.data import Windows
from moshi_cli.tasks.objectives import CodecObjective
from moshi_cli.tasks.stages import CodecStage, Shape, Source
from moshi_cli.tasks.train import train


def source(text: str) -> Source:
    """PACK or PACK=WEIGHT."""
    folder, _, weight = text.partition("=")
    return Source(folder, float(weight or 1))


def one_line(metrics: dict[str, float]) -> None:
    """Metrics on stderr."""
    print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), file=sys.stderr, flush=True)


def main() -> None:
    """Parse, build, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pack", action="append", type=source, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--stop-after", type=int, help="stop early after so many steps")
    parser.add_argument("--quantize-from", type=float, default=0.15, help="part of the budget")
    parser.add_argument("--critics-from", type=float, default=0.6, help="part of the budget")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stage = CodecStage(
        name="codec",
        mix=tuple(args.pack),
        # short windows for variety, long ones for the attention
        shapes=(Shape(0.64, 8, 0.6), Shape(1.28, 4, 0.2), Shape(5.12, 1, 0.2)),
        lr=args.lr,
        steps=args.steps,
        minutes=args.minutes,
        quantize_from=args.quantize_from,
        critics_from=args.critics_from,
        bf16=args.bf16,
        seed=args.seed,
    )
    mimi = Mimi(MIMI_NANO)
    mimi.init_weights(torch.Generator().manual_seed(args.seed))
    objective = CodecObjective(stage, mimi, Windows(stage.mix))
    summary = train(
        stage, objective, args.folder, resume=args.resume, stop_after=args.stop_after,
        log_every=args.log_every, report=one_line,
    )  # fmt: skip
    print(f"{summary.checkpoint}: {summary.progress:.1%} of the budget used", file=sys.stderr)


if __name__ == "__main__":
    main()
