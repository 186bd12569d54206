"""Train the codec of the built-in model.

    python codec.py RUN --pack PACK[=WEIGHT] [--pack …] --minutes 25 --critics-from 1
    python codec.py RUN2 --pack … --minutes 60 --init RUN/step-N/mimi.safetensors --decoder-only

The first run learns the codes. The second leaves them as they are and improves the decoder, with
critics, while the language model already trains on the codes.

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
from moshi_cli.tasks.train import read_tensors, train

HEARING = ("mimi.encoder*", "mimi.downsample*", "mimi.quantizer*")  # what makes the codes


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
    parser.add_argument("--distillation", type=float, default=10.0, help="weight of the teacher")
    parser.add_argument("--init", type=Path, help="weights to start from (mimi.safetensors)")
    parser.add_argument("--decoder-only", action="store_true", help="leave the codes as they are")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon", type=float, default=0.02, help="rate of Muon; 0: AdamW alone")
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
        losses={
            "mel": 1.0,
            "wave": 0.02,
            "adversarial": 0.7,
            "feature": 4.0,
            "commitment": 1.0,
            "distillation": 0.0 if args.decoder_only else args.distillation,
        },
        freeze=HEARING if args.decoder_only else (),
        lr=args.lr,
        muon=args.muon,
        steps=args.steps,
        minutes=args.minutes,
        quantize_from=args.quantize_from,
        critics_from=args.critics_from,
        bf16=args.bf16,
        seed=args.seed,
    )
    mimi = Mimi(MIMI_NANO)
    mimi.init_weights(torch.Generator().manual_seed(args.seed))
    if args.init:
        mimi.load_state_dict(read_tensors(args.init))
        mimi.quantizer.refresh()
    objective = CodecObjective(stage, mimi, Windows(stage.mix))
    summary = train(
        stage, objective, args.folder, resume=args.resume, stop_after=args.stop_after,
        log_every=args.log_every, report=one_line,
    )  # fmt: skip
    print(f"{summary.checkpoint}: {summary.progress:.1%} of the budget used", file=sys.stderr)


if __name__ == "__main__":
    main()
