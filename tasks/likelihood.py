"""How likely a language model finds what was said: negative log-likelihoods, token by token.

A `Scene` is a stretch of one voice or two, as codes with timed words. Under a task (asr, tts, chat,
or speech: one voice with its words, nothing given) it becomes the same grid as in training, at the
task's lag, and every token that the task has to predict gets its nats. Sums are kept per kind of
token, because a text stream is mostly PAD: `words` says something, `text` hardly anything.
Perplexities under different delay patterns are not comparable (paper, Tables 5 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.config import LmConfig, ModelConfig
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import asked, heard, join_shifted, learnable
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.streams import FRAME_HZ, ZERO, DelayPattern, Role, Task
from moshi_cli.core.text import Text
from moshi_cli.tasks.cache import Cache, Take, Words, encode_whole
from moshi_cli.tasks.evaluation import Figure, kept, ratio
from moshi_cli.tasks.excerpts import SPEECH, TASKS, text_row
from moshi_cli.tasks.lm_objective import known_lags
from moshi_cli.tasks.manifest import Recording
from moshi_cli.tasks.pieces import Piece, pieces
from moshi_cli.tasks.randomness import generator_of
from moshi_cli.tasks.samples import LmBatch

DEPTH_FRAMES = 512  # frames whose codes are predicted at once: [Q, 512, C] logits

KINDS = ("words", "epad", "pad", "text", "audio")  # of tokens; and codebook1, codebook2, …

Sums = dict[str, tuple[float, int]]  # kind of token -> nats, tokens


# Tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nlls:
    """What a batch cost. Row 0 is text, then the codebooks of the voice."""

    nats: Tensor  # float32 [B, 1 + Q, S]; 0 where there is no target
    mask: Tensor  # bool [B, 1 + Q, S]
    text: Tensor  # long [B, S]: the text class that was asked for


@torch.inference_mode()
def nlls(lm: MoshiLm, batch: LmBatch) -> Nlls:
    """Negative log-likelihood in nats of every target of a batch; on the CPU."""
    lags = known_lags(lm.config)
    conditions = lm.condition([{"lag": lag} if lag in lags else {} for lag in batch.lags])
    device, Q = lm.like.device, lm.config.dep_q
    shifted = batch.shifted
    inputs = shifted.inputs.to(device)
    targets = shifted.targets[:, : 1 + Q].to(device)
    mask = shifted.mask[:, : 1 + Q].to(device)
    residual = heard(shifted)
    if residual is not None:
        residual = residual.to(device)
    h, logits = lm.temporal(inputs, conditions=conditions, residual=residual)
    nats = torch.zeros(targets.shape, device=device)
    text = asked(targets[:, 0], lm.config)
    words = mask[:, 0]
    nats[:, 0][words] = F.cross_entropy(logits[words].float(), text[words], reduction="none")
    frames = mask[:, 1:].any(1)  # [B, S]
    if Q and frames.any():
        columns, valid = targets.transpose(1, 2)[frames], mask.transpose(1, 2)[frames][:, 1:]
        parts = (x.split(DEPTH_FRAMES) for x in (h[frames], columns, valid))
        each = [_depth(lm, *part) for part in zip(*parts, strict=True)]
        nats[:, 1:].transpose(1, 2)[frames] = torch.cat(each)
    return Nlls(nats.cpu(), mask.cpu(), text.cpu())


def _depth(lm: MoshiLm, h: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
    """h [N, D], columns long[N, 1 + Q], valid bool[N, Q] -> nats [N, Q], 0 where not valid."""
    logits = lm.depth_logits(h[None], columns.t()[None])[0].float()  # [Q, N, C]
    wanted = torch.where(valid, columns[:, 1:], 0).t()  # [Q, N]
    nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return nats.view_as(wanted).t() * valid


def sums(found: Nlls, lm: LmConfig) -> list[Sums]:
    """Per row of the batch: nats and tokens by kind.

    text is words (all that is not PAD or EPAD), epad (a word begins) and pad together; audio is
    codebook1, codebook2, … together. Kinds without tokens are left out.
    """
    rows = []
    for nats, mask, text in zip(found.nats.double(), found.mask, found.text, strict=True):
        pad, epad = text == lm.text_pad, text == lm.text_epad
        kinds = {
            "words": mask[0] & ~pad & ~epad, "epad": mask[0] & epad, "pad": mask[0] & pad,
            "text": mask[0],
        }  # fmt: skip
        row = {
            name: (float(nats[0][where].sum()), int(where.sum())) for name, where in kinds.items()
        }
        for k in range(1, len(mask)):
            row[f"codebook{k}"] = (float(nats[k].sum()), int(mask[k].sum()))
        row["audio"] = (float(nats[1:].sum()), int(mask[1:].sum()))
        rows.append({name: pair for name, pair in row.items() if pair[1]})
    return rows


# Scenes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A stretch of sound as codes, the own voice first."""

    codes: Tensor  # long[L, Q, T]
    words: Words | None  # of the own voice, in seconds from the start; None: not known
    residual: Tensor | None = None  # [L, R, T]: what the codes leave; None: not known


@dataclass(frozen=True)
class Place:
    """Where a scene is to be had; reading it may fail, listing it does not."""

    id: str
    seconds: float
    lines: int
    scene: Callable[[], Scene]  # raises InputError
    source: Path | None = None  # the recording; None: a cache
    facts: Mapping[str, Any] = field(default_factory=dict)  # by which it is told from another


def cached(cache: Cache, takes: Iterable[Take], window_s: float) -> Iterator[Place]:
    """The takes of a cache in stretches of at most `window_s`."""
    most = max(int(window_s * FRAME_HZ), 1)
    for take in takes:
        for first in range(0, take.frames, most):
            frames = min(most, take.frames - first)
            at = f"@{first / FRAME_HZ:g}" if first else ""
            read = partial(_read, cache, take, first, frames)
            facts = {"crc": take.crc, "first": first, "frames": frames}
            yield Place(f"{take.id}{at}", frames / FRAME_HZ, take.lines, read, None, facts)


def _read(cache: Cache, take: Take, first: int, frames: int) -> Scene:
    voices = torch.stack([cache.read(take, first, frames, line) for line in range(take.lines)])
    codes, residual = voices.split([cache.codebooks, cache.residual], 1)
    shift_s = first / FRAME_HZ
    words = tuple((w, s - shift_s, e - shift_s) for w, s, e in take.words)
    return Scene(codes.long(), words, residual if cache.residual else None)


def recorded(
    recordings: Iterable[Recording], mimi: Mimi, layout: str, window_s: float, *, words: bool
) -> Iterator[Place]:
    """Recordings in stretches of at most `window_s`, encoded when they are read."""
    for piece in pieces(recordings, layout, piece_s=window_s):
        lines = 1 if piece.layout == "mono" else 2
        read = partial(_encode, mimi, piece, words)
        facts = {"start_s": piece.start_s, "layout": piece.layout}
        yield Place(piece.row.id, piece.duration_s, lines, read, piece.recording.path, facts)


def _encode(mimi: Mimi, piece: Piece, words: bool) -> Scene:
    sound, own, *_ = piece.sound(generator_of(0), mimi.sample_rate)
    codes, residual = encode_whole(mimi, sound if sound.dim() == 2 else sound[None])
    return Scene(codes, own if words else None, residual)


# Tasks --------------------------------------------------------------------------------------------


def tasks_of(config: ModelConfig, wanted: Sequence[str]) -> dict[str, Task]:
    """Name -> task, from NAME or NAME=LAG_S; nothing wanted: all that the model was trained for.

    Without a lag it is the model's own. UsageError for what is no task or no number, ModelError for
    what the model cannot do.
    """
    found: dict[str, Task] = {}
    for name in wanted or config.lags:
        base, equals, lag = name.partition("=")
        if base not in TASKS:
            raise UsageError(f"there is no task {base!r}", "tasks are " + ", ".join(TASKS))
        task = TASKS[base]
        if equals:
            try:
                task = replace(task, lag_s=float(lag))
            except ValueError:
                raise UsageError(f"{name}: {lag!r} is not a lag in seconds") from None
        elif task is not SPEECH:
            task = config.fit(task)
        same = task.lag_s == config.lags.get(base, 0.0)
        found[base if same else f"{base}@{task.lag_s:g}"] = task
    return found


class Examiner:
    """Scenes to nats under one task."""

    def __init__(self, lm: MoshiLm, text: Text, task: Task, *, ahead: int = 0):
        """ahead: words of look-ahead of a second text stream (ModelConfig.ahead)."""
        self.lm, self.text, self.task, self.ahead = lm, text, task, ahead
        self.pattern = DelayPattern.of(task, lm.config)

    @property
    def two(self) -> bool:
        """Whether scenes need a partner."""
        return self.task.partner is not Role.ABSENT

    @property
    def writes(self) -> bool:
        """Whether nothing but words is predicted."""
        return self.pattern.made == (0,)

    def grid(self, scene: Scene) -> Tensor:
        """The scene undelayed, long[K, T]. InputError without the line that the task needs."""
        lm, (lines, _, frames) = self.lm.config, scene.codes.shape
        grid = torch.full((lm.streams, frames), ZERO)
        if scene.words is not None:
            grid[0] = text_row(scene.words, frames, self.text, lm, self.task, self.ahead)
        grid[1 : 1 + lm.voice_q] = scene.codes[0][: lm.voice_q]
        if self.two:
            if lines < 2:
                raise InputError(f"{self.task.name} needs the voices of two people")
            grid[1 + lm.voice_q :] = scene.codes[1][: lm.partner_q]
        return grid

    def residual(self, scene: Scene) -> Tensor | None:
        """What the given voice's codes leave of it, [1, R, T], if the model hears it."""
        if not self.lm.config.residual or scene.residual is None or not any(self.pattern.given):
            return None
        return scene.residual[int(self.two)][None]

    def batch(self, scenes: Sequence[Scene]) -> LmBatch:
        """Scenes as one batch, every frame predicted once."""
        parts = [
            learnable(
                self.pattern.shift(self.grid(scene)[None], residual=self.residual(scene)),
                self.pattern,
            )
            for scene in scenes
        ]
        lag = str(self.task.lag_frames)
        return LmBatch(join_shifted(parts), [lag] * len(parts), [self.task.name] * len(parts))

    def examine(self, scenes: Sequence[Scene]) -> list[Sums]:
        """Nats and tokens by kind, per scene; company in the batch changes nothing."""
        return sums(nlls(self.lm, self.batch(scenes)), self.lm.config)


# Figures ------------------------------------------------------------------------------------------


def figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Of rows with nats: {task: {kind: [nats, tokens]}}.

    TASK_KIND_nll is nats per token over all items, TASK_KIND_ppl its exponential.
    """
    counts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for task, kinds in row["nats"].items():
            for kind, (nats, tokens) in kinds.items():
                counts.setdefault(task, {}).setdefault(kind, []).append((nats, tokens))
    found: dict[str, Figure | None] = {}
    for task, kinds in counts.items():
        ordered = [kind for kind in KINDS if kind in kinds]
        for kind in [*ordered, *(kind for kind in kinds if kind not in KINDS)]:
            found[f"{task}_{kind}_nll"] = nll = ratio(kinds[kind], "nat")
            found[f"{task}_{kind}_ppl"] = None if nll is None else perplexity(nll)
    return kept(found)


def perplexity(nll: Figure) -> Figure:
    """The exponential of nats per token."""
    low, high = (None if x is None else math.exp(x) for x in (nll.low, nll.high))
    return Figure(math.exp(nll.value), low, high, "", nll.count)
