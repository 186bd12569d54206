"""The mix of a language model's stage: sources of samples, by the form of what lies on disk.

Every form is a function that opens a `Source`; `FORMS` is the one table of them. A source gives
samples row by row; each row has a generator of its own, so what a row holds depends on the seed,
the step and its number, not on how rows are spread over batches, workers and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from moshi_cli.core.errors import UsageError
from moshi_cli.core.weights import Model
from moshi_cli.tasks.cache import FRAME_HZ, Cache
from moshi_cli.tasks.documents import nearest
from moshi_cli.tasks.excerpts import TASKS as EXCERPTS
from moshi_cli.tasks.excerpts import open_excerpts
from moshi_cli.tasks.randomness import pick
from moshi_cli.tasks.samples import LmBatch, Samples
from moshi_cli.tasks.spelling import read_spelling
from moshi_cli.tasks.stages import LmStage, Source
from moshi_cli.tasks.texts import open_texts


class LmSource(Protocol):
    """Where samples of one form come from."""

    @property
    def seconds(self) -> float:
        """Sound that can be drawn from (text: frames of one token)."""

    def batch(self, frames: int, batch: int, generator: torch.Generator) -> LmBatch:
        """`batch` samples of at most `frames` frames. What is drawn depends on the generator."""


Opener = Callable[[Source, LmStage, Model], LmSource]


class Takes:
    """A cache of codes, from which all tasks are put together (see samples.py)."""

    def __init__(self, samples: Samples, shares: Mapping[str, float]):
        self.samples, self.shares = samples, shares

    @property
    def seconds(self) -> float:
        return sum(take.frames for take in self.samples.cache.takes) / FRAME_HZ

    def batch(self, frames: int, batch: int, generator: torch.Generator) -> LmBatch:
        return self.samples.batch(self.shares, frames, batch, generator)


def open_takes(source: Source, stage: LmStage, model: Model) -> LmSource:
    """Caches that `moshi data encode` made."""
    assert model.lm is not None and model.text is not None
    cache = Cache(source.folder, model.mimi.num_codebooks, 2 * model.lm.config.residual)
    lags = stage.lag_s, stage.casting, stage.other_lags_s
    samples = Samples(cache, model.text, model.lm.config, *lags, read_spelling(stage.lexicon))
    return Takes(samples, stage.tasks)


FORMS: dict[str, Opener] = {
    **dict.fromkeys(EXCERPTS, open_excerpts),
    "takes": open_takes,
    "text": open_texts,
}


class Mixture:
    """Sources and their places in a mix, drawn by weight. A batch is of one family."""

    def __init__(self, mix: Sequence[Source], sources: Sequence[LmSource]):
        self.mix, self.sources = list(mix), list(sources)

    @classmethod
    def open(cls, stage: LmStage, model: Model) -> Mixture:
        """The mix of a stage. UsageError for unknown forms, InputError for broken data."""
        if not stage.mix:
            hint = "name data: mix: [{folder: DIR, form: takes}], or --set mix.0.folder=DIR"
            raise UsageError(f"stage {stage.name}: the mix is empty", hint)
        for source in stage.mix:
            if source.form not in FORMS:
                where = f"stage {stage.name}: {source.folder}"
                hint = nearest(source.form, FORMS)
                raise UsageError(f"{where}: there is no form {source.form!r}", hint)
        return cls(stage.mix, [FORMS[s.form](s, stage, model) for s in stage.mix])

    def family(self, generator: torch.Generator) -> str:
        """The family of a step's batches, by the weights of its sources."""
        return self.mix[pick([source.weight for source in self.mix], generator)].family

    def row(self, family: str, frames: int, generator: torch.Generator) -> LmBatch:
        """One sample of a family."""
        at = [i for i, source in enumerate(self.mix) if source.family == family]
        picked = at[pick([self.mix[i].weight for i in at], generator)] if len(at) > 1 else at[0]
        return self.sources[picked].batch(frames, 1, generator)
