"""What a language model would say in a pack's clips: draw.py MODEL PACK [--kind moshi] ...

Writes PACK/drawn.u16, a row of codes per frame: for every clip whose kind starts so, the acoustic
codes that the model draws frame by frame as text to speech, given the words, all true codes before
and the true semantic one. It never says quite what was recorded. A decoder that learns with these
codes in place of the true ones (`drawn` of a codec stage) learns what is worth believing of them.
The semantic codes stay true, so that a sound which the model would say sooner or later than the
recording is no mistake that the decoder had to make up for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moshi_cli.core import load
from moshi_cli.core.sampling import Noise
from moshi_cli.core.weights import Model
from moshi_cli.tasks.cache import FRAME_HZ, encode_whole
from moshi_cli.tasks.data import UNKNOWN, Pack, Row
from moshi_cli.tasks.likelihood import Examiner, Scene, tasks_of
from moshi_cli.tasks.lm_objective import known_lags

LEAD = 2  # frames of silence before a clip: in a dialogue nobody begins at once
CLIPS = 8  # at a time


class Drawer:
    """Clips to what a model would say in them."""

    def __init__(self, model: Model):
        assert model.lm is not None and model.text is not None
        self.model, self.lm = model, model.lm
        (task,) = tasks_of(model.config, ["tts"]).values()
        self.examiner = Examiner(model.lm, model.text, task)
        self.sampling = model.config.sampling_of("tts")

    def scene(self, pack: Pack, row: Row) -> Scene:
        """A clip behind a little silence."""
        wav = pack.wav(row.offset // pack.frame_samples, row.frames)
        codes, _ = encode_whole(self.model.mimi, torch.cat([wav.new_zeros(LEAD * 1920), wav])[None])
        late = LEAD / FRAME_HZ
        return Scene(codes, tuple((w, s + late, e + late) for w, s, e in row.words))

    @torch.inference_mode()
    def draw(self, scenes: Sequence[Scene], seed: int) -> list[Tensor]:
        """Scenes -> codes long[Q, T] of each, less its LEAD frames."""
        lm, config = self.lm, self.lm.config
        batch = self.examiner.batch(scenes)
        lags = known_lags(config)
        conditions = lm.condition([{"lag": lag} if lag in lags else {} for lag in batch.lags])
        h, _ = lm.temporal(batch.shifted.inputs, conditions=conditions)
        columns = batch.shifted.targets[:, : 1 + config.dep_q].transpose(1, 2).clone()  # [B, S, R]
        frames = batch.shifted.mask[:, 1 : 1 + config.dep_q].any(1)
        text, codes = columns[frames].split([1, config.dep_q], 1)  # ZERO where nothing is
        noise = Noise(torch.full((len(codes),), seed), torch.arange(len(codes)))
        known = codes[:, : self.model.config.mimi.quantizer.semantic]
        columns[..., 1:][frames] = lm.depth_sample(
            h[frames], text[:, 0], self.sampling, noise, known=known
        )
        late = self.examiner.pattern.delays[1 : 1 + config.dep_q]
        return [
            torch.stack([
                rows[LEAD + d : scene.codes.shape[2] + d, k] for k, d in enumerate(late, 1)
            ])
            for rows, scene in zip(columns, scenes, strict=True)
        ]  # fmt: skip


def work(model: str, folder: Path, rows: Sequence[Row], seed: int) -> list[tuple[Row, np.ndarray]]:
    """Rows of a pack -> their drawn codes uint16 [T, Q]."""
    drawer, pack = opened(model, folder)
    found = drawer.draw([drawer.scene(pack, row) for row in rows], seed)
    return [(r, c.t().numpy().astype(np.uint16)) for r, c in zip(rows, found, strict=True)]


@cache
def opened(model: str, folder: Path) -> tuple[Drawer, Pack]:
    """Once in a process."""
    torch.set_num_threads(1)
    return Drawer(load(model, dtype="fp32")), Pack(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--kind", default="moshi", help="what the kinds of the clips begin with")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    pack = Pack(args.pack)
    rows = [row for row in pack.rows if row.kind.startswith(args.kind) and row.words]
    if not rows:
        raise SystemExit(f"{args.pack}: no clip is of a kind {args.kind}*")
    rows.sort(key=lambda row: row.samples)
    parts = [rows[i : i + CLIPS] for i in range(0, len(rows), CLIPS)]
    drawn: np.ndarray | None = None
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(work, args.model, args.pack, p, i) for i, p in enumerate(parts)]
        for job in tqdm(jobs):
            for row, codes in job.result():
                if drawn is None:
                    drawn = np.full((pack.frames, codes.shape[1]), UNKNOWN, np.uint16)
                first = row.offset // pack.frame_samples
                drawn[first : first + len(codes)] = codes
    assert drawn is not None
    partial = args.pack / "drawn.u16.partial"
    drawn.tofile(partial)
    partial.rename(args.pack / "drawn.u16")


if __name__ == "__main__":
    main()
