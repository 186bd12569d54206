"""How texts are spoken: the options, and what they become for an engine and its model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moshi_cli.core.conditioning import Value
from moshi_cli.core.config import ModelConfig, Sampling
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.core.streams import ZERO
from moshi_cli.core.weights import Model
from moshi_cli.tasks import voices

GUIDED = 2.0  # guidance of the published models, if nothing else is asked for


@dataclass(frozen=True)
class Manner:
    """How texts are spoken. Defaults are those of the published tools."""

    temperature: float | None = None  # None: that of the model
    cfg_coef: float | None = None  # None: what the model is used to
    codebooks: int | None = None  # fewer: quicker and coarser
    speed: float = 1.0  # > 1: shorter waits between words
    max_padding: int = 8  # frames after which the next word is forced
    initial_padding: int = 2  # frames before the first word
    final_padding: int = 4  # frames after the last word has begun to end
    padding_between: int = 1
    sentence_silence_s: float = 0.0


def speaking_sampling(config: ModelConfig, manner: Manner) -> Sampling:
    """How tokens are drawn. ModelError where guidance is asked for and was never learnt.

    A model of several tasks learnt from speech when a word begins, and times words as it learnt:
    with its text temperature for dialogue they would wait, nearly all as long as they may.
    """
    if not 0.25 <= manner.speed <= 4:
        raise UsageError("the speed must be between 0.25 and 4")
    sampling = replace(config.sampling_of("tts"), pad_bonus=-2 * math.log(manner.speed))
    if config.kind != "tts":
        sampling = replace(sampling, text_temp=1.0)
    if manner.temperature is not None:
        sampling = replace(sampling, temp=manner.temperature, text_temp=manner.temperature)
    if _cfg_values(config):
        return sampling  # told as a condition
    if config.kind == "tts":
        coef = GUIDED if manner.cfg_coef is None else manner.cfg_coef
        return replace(sampling, guidance=coef, guide_text=False)
    if manner.cfg_coef is not None and config.sampling_of("tts").guided:
        return replace(sampling, guidance=manner.cfg_coef)
    if manner.cfg_coef not in (None, 1.0):
        raise ModelError("this model was not trained for --cfg-coef")
    return sampling


def _cfg_values(config: ModelConfig) -> tuple[str, ...]:
    """The guidance strengths that the model can be told."""
    known = config.lm.conditions if config.lm else ()
    return next((condition.values for condition in known if condition.name == "cfg"), ())


def speaking_conditions(
    config: ModelConfig, manner: Manner, embeddings: Sequence[Tensor] = ()
) -> dict[str, Value]:
    """What the model is told: guidance, and the voices [T, D] of its speakers."""
    told: dict[str, Value] = {}
    if values := _cfg_values(config):
        value = f"{GUIDED if manner.cfg_coef is None else manner.cfg_coef:.1f}"
        if value not in values:
            raise UsageError(f"no --cfg-coef {value} here", f"choose one of {', '.join(values)}")
        told["cfg"] = value
    if voices.takes_embeddings(config) and config.lm is not None:
        width = next(c.dim for c in config.lm.conditions if c.name == voices.CONDITION)
        told[voices.CONDITION] = voices.speakers(embeddings, width)
    return told


def voice_prompt(model: Model, sound: Tensor) -> Tensor:
    """A recording [S] whose voice is to be continued -> long[K, T], without words."""
    assert model.lm is not None
    with torch.no_grad():
        codes = model.mimi.encode(sound.reshape(1, 1, -1).to(model.device))[0, :, :-2]  # [Q, T]
    lm = model.lm.config
    prompt = torch.full((lm.streams, codes.shape[1]), ZERO)
    prompt[1 : 1 + lm.voice_q] = codes[: lm.voice_q]
    return prompt
