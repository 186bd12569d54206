"""The language model on streams of tokens, all tasks in one batch (paper §3.4.4).

The rows of a step are drawn one by one, each from (seed, step, number), and losses are divided by
the sums of weights of all rows of the step: how rows are spread over accumulated batches and over
processes changes nothing but the order of additions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_cli.core.attention import Layer
from moshi_cli.core.conditioning import Value
from moshi_cli.core.config import LmConfig
from moshi_cli.core.depth import DepthLayer
from moshi_cli.core.errors import MoshiError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import LmWeights, join_shifted, lm_loss, lm_mass
from moshi_cli.core.streams import FRAME_HZ, ZERO, Shifted
from moshi_cli.core.text import PAD
from moshi_cli.tasks import parallel
from moshi_cli.tasks.dropout import Dropout
from moshi_cli.tasks.mixture import Mixture, Takes
from moshi_cli.tasks.randomness import generator_of, pick
from moshi_cli.tasks.samples import LmBatch, Samples
from moshi_cli.tasks.spelling import PER_FRAME, ROWS, UNKNOWN, Speller, read_spelling
from moshi_cli.tasks.stages import LmStage, Source
from moshi_cli.tasks.workers import Ahead

log = logging.getLogger(__name__)

RUN = 6  # frames of the longest gap in what is heard


@dataclass
class Drawn:
    """What one process learns from in one step."""

    family: str
    batches: list[LmBatch]  # as many as are accumulated
    mass: Tensor  # float64[3]: sums of weights, of this process
    tokens: int  # targets
    audio_s: float
    first: int = 0  # number of its first row in the step


class LmStep(nn.Module):
    """A batch -> total, text and audio loss, the plain means per stream [1 + Q], and the loss of
    its letters, which is not in the total."""

    def __init__(
        self, lm: MoshiLm, weights: LmWeights, speller: Speller | None = None, layers: int = 0
    ):
        super().__init__()
        self.lm, self.weights, self.speller = lm, weights, speller
        self.lower: list[Tensor] = []  # hidden states that the speller reads
        if speller is not None:
            lm.transformer.layers[layers - 1].register_forward_hook(
                lambda module, given, out: self.lower.append(out)
            )

    def forward(
        self,
        shifted: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        values: Sequence[Mapping[str, Value]],
        mass: Tensor | None = None,
        letters: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        conditions = self.lm.condition(values)
        losses = lm_loss(self.lm, Shifted(*shifted), self.weights, conditions, mass)
        spelled = losses.total.new_zeros(())
        if self.speller is not None and letters is not None:
            assert mass is not None
            spelled = self.speller.loss(self.lower.pop(), letters) / mass[2].clamp_min(1)
        self.lower.clear()
        return losses.total, losses.text, losses.audio, losses.streams, spelled


class LmObjective:
    """Cross-entropy of text and codes, weighted as the stage says."""

    def __init__(
        self, stage: LmStage, lm: MoshiLm, mixture: Mixture | Samples, *, workers: int = 0
    ):
        if isinstance(mixture, Samples):
            mixture = Mixture([Source("")], [Takes(mixture, stage.tasks)])
        self.stage, self.lm, self.mixture = stage, lm, mixture
        self.modules: dict[str, nn.Module] = {"lm": lm}
        w = stage.losses
        self.weights = LmWeights(
            w.get("text", 1.0), w.get("pad", 0.5), w.get("semantic", 100.0),
            w.get("acoustic", 1.0), w.get("audio", 1.0),
        )  # fmt: skip
        speller = None
        if w.get("letters"):
            layers = len(lm.transformer.layers)
            if not 1 <= stage.spelled_by <= layers:
                where = f"stage {stage.name}: spelled_by is {stage.spelled_by}"
                raise MoshiError(f"{where}, the model has {layers} layers")
            classes = read_spelling(stage.lexicon).classes
            self.modules["speller"] = speller = Speller(lm.config.temporal.dim, classes)
        self.engine: nn.Module = LmStep(lm, self.weights, speller, stage.spelled_by)
        self.family = ""
        self.drawn = Ahead(self.draw, workers)
        if stage.recompute:
            for module in lm.modules():
                if isinstance(module, Layer | DepthLayer):
                    again = partial(checkpoint, module.forward, use_reentrant=False)
                    setattr(module, "forward", again)  # noqa: B010
        if stage.compile:
            compile_layers(lm)
        self.dropout = Dropout(lm.transformer.layers, stage.dropout) if stage.dropout else None

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restored(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beyond the weights."""

    def close(self) -> None:
        """Ends the workers."""
        self.drawn.close()

    def draw(self, step: int) -> Drawn:
        """The rows of a step that belong to this process."""
        stage, seed = self.stage, self.stage.seed
        g = generator_of(seed, step)  # the same in every process
        family = self.mixture.family(g)
        shape = stage.shapes[pick([s.share for s in stage.shapes], g)]
        frames = round(shape.window_s * FRAME_HZ)
        count = shape.batch * stage.accumulate
        first = parallel.rank() * count
        rows = [
            self.blinded(self.mixture.row(family, frames, h), h)
            for h in (generator_of(seed, step, row) for row in range(first, first + count))
        ]
        batches = [join_batches(rows[i : i + shape.batch]) for i in range(0, count, shape.batch)]
        mass = torch.stack([self.mass(b) for b in batches])
        streams = slice(0, 1 + self.lm.config.dep_q)
        tokens = sum(int(b.shifted.mask[:, streams].sum()) for b in batches)
        heard = sum(int((b.shifted.inputs[:, 1:] >= 0).any(1).sum()) for b in batches)
        return Drawn(family, batches, mass.sum(0), tokens, heard / FRAME_HZ, first)

    def mass(self, batch: LmBatch) -> Tensor:
        """Sums of weights of text, codes and letters. -> float64[3]"""
        spelled = 0 if batch.letters is None else int((batch.letters >= 0).sum())
        known = lm_mass(batch.shifted, self.lm.config, self.weights)
        return torch.cat([known, known.new_tensor([spelled])])

    def blinded(self, batch: LmBatch, generator: torch.Generator) -> LmBatch:
        """With inputs hidden and frames left out as the stage says."""
        stage, Q, s = self.stage, self.lm.config.dep_q, batch.shifted
        B, K, S = s.inputs.shape
        hide = torch.rand(B, K, S, generator=generator) < stage.hide
        blind = torch.rand(B, S, generator=generator) < stage.hide_text
        hide[:, 0] = blind & (s.inputs[:, 1:] >= 0).flatten(1).any(1)[:, None]  # not text alone
        narrowed = self.narrowed(batch, generator)
        hide |= narrowed
        keep = torch.rand(B, 1, S, generator=generator) < stage.depth_share
        mask = torch.cat([s.mask[:, :1], s.mask[:, 1 : 1 + Q] & keep, s.mask[:, 1 + Q :]], 1)
        letters = batch.letters
        untold = s.mask[:, 1 : 1 + Q].flatten(1).any(1) & ~hide[:, 1 : 1 + Q].flatten(1).all(1)
        untold &= torch.rand(B, generator=generator) < stage.untold
        if untold.any():
            hide[untold, 0, 1:], mask[untold, 0] = True, False
            if letters is not None:  # what is about to be spoken only the text could tell
                letters = letters.clone()
                letters[untold, PER_FRAME:] = UNKNOWN
        inputs = s.inputs
        if stage.doubt:
            inputs = self.doubted(s, hide, generator)
        gaps = hide.new_zeros(B, S)
        if stage.gaps:
            gaps = runs(B, S, stage.gaps, generator)
            given = ~s.mask[:, 1:].any(2)  # [B, K - 1]
            hide[:, 1:] |= given[..., None] & gaps[:, None]
        seen = replace(s, inputs=torch.where(hide, ZERO, inputs), mask=mask)
        if s.residual is not None:
            seen = replace(seen, residual=self.dulled(s, narrowed, gaps, generator))
        return replace(batch, shifted=seen, letters=letters)

    def doubted(self, shifted: Shifted, hide: Tensor, generator: torch.Generator) -> Tensor:
        """The inputs, some words of items that only hear a voice replaced by others; as many more
        are marked in `hide` bool[B, K, S]. Text alone is left as it is."""
        text, hears = shifted.inputs[:, 0], self.hears(shifted)
        draw = torch.rand(text.shape, generator=generator)
        words = (text > PAD) & (text < self.lm.config.text_vocab)  # the start is none
        doubt = words & (draw < self.stage.doubt) & hears[:, None]
        other = torch.randint(PAD + 1, self.lm.config.text_vocab, text.shape, generator=generator)
        taken = doubt & (draw < self.stage.doubt / 2)
        hide[:, 0] |= doubt & ~taken
        return torch.cat([torch.where(taken, other, text)[:, None], shifted.inputs[:, 1:]], 1)

    def hears(self, shifted: Shifted) -> Tensor:
        """Which items hear a voice and make none, bool[B]."""
        made = shifted.mask[:, 1 : 1 + self.lm.config.dep_q].flatten(1).any(1)
        return (shifted.inputs[:, 1:] >= 0).flatten(1).any(1) & ~made

    def dropped(self, shifted: Shifted, step: int, first: int) -> AbstractContextManager[None]:
        """Within this, layers drop out where no voice is made. first: number of the first row."""
        if self.dropout is None:
            return nullcontext()
        rows = range(first, first + len(shifted.inputs))
        return self.dropout.on(
            self.hears(shifted), [generator_of(self.stage.seed, step, row, 1) for row in rows]
        )

    def dulled(
        self, shifted: Shifted, narrowed: Tensor, gaps: Tensor, generator: torch.Generator
    ) -> Tensor:
        """What codes leave of the given voice, hidden in some frames as they are (in all of gaps
        bool[B, S]), and everywhere if a part of the codes is hidden throughout (narrowed
        bool[B, K, 1]): zeros are what a model hears that is given codes alone."""
        assert shifted.residual is not None
        B, R, S = shifted.residual.shape
        hide = torch.rand(B, 2, S, generator=generator) < self.stage.hide
        given = ~shifted.mask.any(2)  # [B, K]
        hide |= (narrowed[..., 0] & given).any(1)[:, None, None] | gaps[:, None]
        return shifted.residual.masked_fill(hide.repeat_interleave(R // 2, 1), 0)

    def narrowed(self, batch: LmBatch, generator: torch.Generator) -> Tensor:
        """bool[B, K, 1]: streams that an item does not see, so that no item leans on its rarest
        codes. Half of the narrowed voices keep the semantic codebook alone."""
        lm, B = self.lm.config, len(batch.names)
        hide = torch.zeros(B, lm.streams, 1, dtype=torch.bool)
        first = 1
        for width in (lm.voice_q, lm.partner_q):
            if not width:
                continue
            made = batch.shifted.mask[:, first : first + width].flatten(1).any(1)  # [B]
            odds = torch.where(made, self.stage.narrow, self.stage.narrow_given)
            few = torch.randint(1, width + 1, (B,), generator=generator)
            few = torch.where(torch.rand(B, generator=generator) < 0.5, 1, few)
            kept = torch.where(torch.rand(B, generator=generator) < odds, few, width)
            unheard = made & (torch.rand(B, generator=generator) < self.stage.deaf)
            kept = torch.where(unheard, 0, kept)
            hide[:, first : first + width, 0] = torch.arange(width) >= kept[:, None]
            first += width
        return hide

    def backward(self, step: int, progress: float) -> dict[str, float]:
        drawn, world = self.drawn(step), parallel.world()
        self.family = drawn.family
        device = self.lm.like.device
        words = known_lags(self.lm.config)  # a lag drawn at random (pre-training) may not be one
        mass = parallel.summed(drawn.mass.float().to(device))
        metrics = dict.fromkeys(("loss", "text", "audio"), 0.0)
        if weight := self.stage.losses.get("letters", 0.0):
            metrics["letters"] = 0.0
        means: list[Tensor] = []
        for i, batch in enumerate(drawn.batches):
            s = batch.shifted
            values = [{"lag": lag} if lag in words else {} for lag in batch.lags]
            with (
                parallel.quiet(self.engine, i + 1 < len(drawn.batches)),
                self.dropped(s, step, drawn.first + sum(len(b.names) for b in drawn.batches[:i])),
                torch.autocast(device.type, torch.bfloat16, enabled=self.stage.bf16),
            ):
                moved = tuple(x if x is None else x.to(device) for x in vars(s).values())
                letters = batch.letters.to(device) if weight and batch.letters is not None else None
                total, text, audio, streams, spelled = self.engine(moved, values, mass, letters)
                total = total + weight * spelled
                (total * world).backward()  # gradients are averaged over the processes
            for name, loss in zip(metrics, (total, text, audio, spelled), strict=False):
                metrics[name] += loss.item() * world
            means.append(streams)
        each = torch.stack(means).mean(0).tolist()
        metrics["semantic"] = each[1] if len(each) > 1 else 0.0
        metrics["acoustic"] = sum(each[2:]) / max(len(each) - 2, 1)
        if drawn.family:
            metrics = {f"{drawn.family}/{k}": v for k, v in metrics.items()}
        return metrics | {"tokens": float(drawn.tokens), "audio_s": drawn.audio_s}


def runs(batch: int, frames: int, share: float, generator: torch.Generator) -> Tensor:
    """bool[B, S]: frames within runs of 2 to 6, which cover about `share` (< 1) of all."""
    lengths = torch.randint(2, RUN + 1, (batch, frames), generator=generator)
    odds = -math.log1p(-share) * 2 / (2 + RUN)  # runs may overlap
    lengths *= torch.rand(batch, frames, generator=generator) < odds
    inside = lengths > 0
    for late in range(1, RUN):
        inside[:, late:] |= lengths[:, :-late] > late
    return inside


def compile_layers(lm: MoshiLm) -> None:
    """The temporal layers by torch.compile: a graph for each shape, which all layers share.

    Without a C++ compiler, or whatever else it needs, they stay as they are, and a warning says so.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        log.warning("compile does not work here, going on without (%s)", reason)
        return
    from torch._dynamo import config

    config.optimize_ddp = False  # which cuts graphs of what lies within it
    config.cache_size_limit = 64
    for layer in lm.transformer.layers:
        setattr(layer, "forward", torch.compile(layer.forward, dynamic=False))  # noqa: B010


def known_lags(lm: LmConfig) -> tuple[str, ...]:
    """The lags in frames that a model can be told; none if it is told no lag."""
    return next((c.values for c in lm.conditions if c.name == "lag"), ())


def join_batches(rows: Sequence[LmBatch]) -> LmBatch:
    """One batch out of several."""
    return replace(
        rows[0],
        shifted=join_shifted([row.shifted for row in rows]),
        letters=join_letters(rows),
        lags=[lag for row in rows for lag in row.lags],
        names=[name for row in rows for name in row.names],
    )


def join_letters(rows: Sequence[LmBatch]) -> Tensor | None:
    """The letters of all rows, unknown where a row has none; None if all have none."""
    if all(row.letters is None for row in rows):
        return None
    longest = max(row.shifted.mask.shape[2] for row in rows)
    none = [torch.full((len(row.names), ROWS, 0), UNKNOWN) for row in rows]
    each = [n if row.letters is None else row.letters for row, n in zip(rows, none, strict=True)]
    return torch.cat([F.pad(x, (0, longest - x.shape[2]), value=UNKNOWN) for x in each])
