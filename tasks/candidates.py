"""Our side of a measurement: the codec and the language model as lanes of steps.

A candidate has lanes; a lane is a step that can be repeated for ever. Steps wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import UsageError
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.packing import pack
from moshi_cli.core.sampling import GREEDY
from moshi_cli.core.stepper import Step, Stepper
from moshi_cli.core.streams import FRAME_HZ, DelayPattern, Role, Task
from moshi_cli.core.weights import Model, load, load_lm, load_mimi, pick_device, pick_dtype
from moshi_cli.tasks.contest import Job
from moshi_cli.tasks.machine import wait
from moshi_cli.tasks.shapes import (
    Reads,
    codec_reads,
    codes,
    lm_reads,
    random_lm,
    random_mimi,
    shape,
    sound,
)
from moshi_cli.tasks.stopwatch import Step as Work

MIMI, LM = "mimi.safetensors", "lm.safetensors"  # names of random weights in files
SHOWN_FRAMES = 6  # that are compared with a peer
FRAME_S = 1 / FRAME_HZ


@dataclass
class Lane:
    """A step that can be repeated."""

    step: Work
    audio_s: float = FRAME_S  # of one stream
    reads: Reads | None = None


@dataclass
class Candidate:
    """What a process measures."""

    lanes: dict[str, Lane]
    parameters: int
    outputs: Callable[[], Mapping[str, Any]] = field(default=lambda: {})
    first: Callable[[float | None], Mapping[str, float | None]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def build(job: Job) -> Candidate:
    """Our candidate for a job."""
    from moshi_cli.tasks.rehearsal import conversation

    make = {"codec": codec, "lm": language_model}.get(job.what, conversation)
    return make(job)


def config_of(job: Job) -> ModelConfig:
    """The size that a job names."""
    return shape(job.config, layers=job.layers, context=job.context)


def opened(job: Job, *, lm: bool = True) -> Model:
    """The model of a job: one that is there, random weights from files, or fresh ones."""
    device = pick_device(job.device)
    if job.model:
        model = load(job.model, device=job.device, dtype=job.dtype)
        if lm and model.lm is not None and (job.context or job.layers):
            raise UsageError("another context or other layers: only with --config")
        return model if lm else Model(model.mimi, None, None, model.config, job.model)
    config, folder = config_of(job), Path(job.weights)
    if job.weights and (folder / MIMI).is_file():
        mimi = load_mimi(folder / MIMI, config.mimi, device)
    else:
        mimi = random_mimi(config.mimi, device, job.seed)
    mimi.requires_grad_(False)
    mimi.set_num_codebooks(books_of(job, config))
    if not lm:
        return Model(mimi, None, None, config, job.config)
    return Model(mimi, lm_of(job, config, device), None, config, job.config)


def lm_of(job: Job, config: ModelConfig, device: torch.device) -> Any:
    """The language model of a size. UsageError if it has none."""
    if config.lm is None:
        raise UsageError(f"{job.config} is a codec alone", "moshi bench codec measures it")
    dtype = pick_dtype(job.dtype, device)
    path = Path(job.weights) / LM
    if job.weights and path.is_file():
        lm = load_lm(path, config.lm, device=device, dtype=dtype)
        return lm.requires_grad_(False)
    return random_lm(config.lm, dtype, device, job.seed)


def books_of(job: Job, config: ModelConfig) -> int:
    """Codebooks of the codec: as asked for, as the language model wants, or 8 as Moshi has."""
    total = config.mimi.quantizer.codebooks
    if job.codebooks is not None:
        if job.codebooks > total:
            raise UsageError(f"--codebooks {job.codebooks}: this codec has {total}")
        return job.codebooks
    return min(8 if config.lm is None else config.codebooks, total)


def count(*modules: torch.nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for m in modules for p in m.parameters())


# The codec ----------------------------------------------------------------------------------------


def step(work: Callable[[], Any], device: torch.device) -> Work:
    """A step of a lane: done when the device is."""

    def run() -> None:
        with torch.inference_mode():
            work()
        wait(device)

    return run


def codec(job: Job) -> Candidate:
    """Streamed frames and whole files, both ways."""
    model = opened(job, lm=False)
    mimi, device = model.mimi, model.device
    state = mimi.init_state(job.batch, device=device)
    frame = mimi.frame_samples
    pcm = torch.from_numpy(sound(job.batch, frame, job.seed)).to(device)
    books, entries = mimi.num_codebooks, mimi.config.quantizer.size
    column = torch.from_numpy(codes((job.batch, books, 1), entries, job.seed)).to(device)
    encode, decode = codec_reads(mimi, job.batch)
    parameters = count(mimi)
    pack(mimi)

    lanes = {
        "encode": Lane(step(lambda: mimi.encode(pcm, state.encoder), device), reads=encode),
        "decode": Lane(step(lambda: mimi.decode(column, state.decoder), device), reads=decode),
    }
    if job.file_s:
        frames = max(1, round(job.file_s * FRAME_HZ))
        wav = torch.from_numpy(sound(job.batch, frames * frame, job.seed)).to(device)
        grid = torch.from_numpy(codes((job.batch, books, frames), entries, job.seed)).to(device)
        lanes |= {
            "encode file": Lane(step(lambda: mimi.encode(wav), device), frames * FRAME_S),
            "decode file": Lane(step(lambda: mimi.decode(grid), device), frames * FRAME_S),
        }
    return Candidate(lanes, parameters, lambda: codec_outputs(job, mimi))


@torch.inference_mode()
def codec_outputs(job: Job, mimi: Mimi) -> Mapping[str, Any]:
    """Codes of made-up sound, and the sound of made-up codes, frame by frame."""
    device = next(mimi.parameters()).device
    state, N = mimi.init_state(job.batch, device=device), SHOWN_FRAMES
    wav = torch.from_numpy(sound(job.batch, N * mimi.frame_samples, job.seed)).to(device)
    entries = mimi.config.quantizer.size
    grid = torch.from_numpy(codes((job.batch, mimi.num_codebooks, N), entries, job.seed)).to(device)
    heard = [mimi.encode(w, state.encoder) for w in wav.split(mimi.frame_samples, -1)]
    said = [mimi.decode(c, state.decoder) for c in grid.split(1, -1)]
    return {"codes": torch.cat(heard, -1).cpu().numpy(), "wave": torch.cat(said, -1).cpu().numpy()}


# The language model -------------------------------------------------------------------------------


def raw_task(config: ModelConfig) -> Task:
    """What a language model does with its streams and no lag: write, speak, hear the rest."""
    assert config.lm is not None
    voice = Role.SAMPLED if config.lm.dep_q else Role.GIVEN
    partner = Role.GIVEN if config.lm.partner_q else Role.ABSENT
    return Task("raw", Role.SAMPLED, voice, partner)


def language_model(job: Job) -> Candidate:
    """One step over all streams, greedy: temporal transformer, text, depth transformer."""
    if job.model:
        model = opened(job)
        config, lm = model.config, model.lm
    else:
        config = config_of(job)
        lm = lm_of(job, config, pick_device(job.device))
    if lm is None or config.lm is None:
        raise UsageError(f"{job.model} is a codec alone", "moshi bench codec measures it")
    pattern = DelayPattern.of(raw_task(config), lm.config)
    stepper = Stepper(lm, pattern, GREEDY)
    device, B = lm.like.device, job.batch
    active = torch.ones(B, dtype=torch.bool, device=device)
    given = codes((B, len(pattern.given)), lm.config.codebook_size, job.seed)
    column = torch.from_numpy(given).to(device)

    def fresh() -> Any:
        state = stepper.init_state(B)
        if lm.config.conditions:
            state.conditions = lm.condition([{} for _ in range(B)])
        return state

    reads, parameters = lm_reads(lm, B), count(lm)
    pack(lm)
    kept: list[Any] = []  # the state of the conversation, one at a time

    def step() -> None:
        if not kept:
            kept.append(fresh())
            kept[0].ring.cells.zero_()
            kept[0].lm.clock.fill_(job.past_frames)
        with torch.inference_mode():
            stepper.step(kept[0], column, active)
        wait(device)

    @torch.inference_mode()
    def outputs() -> Mapping[str, Any]:
        kept.clear()
        own, steps = fresh(), []
        grid = codes((SHOWN_FRAMES, B, len(pattern.given)), lm.config.codebook_size, job.seed)
        for frame in torch.from_numpy(grid).to(device):
            steps.append(stepper.step(own, frame, active))
        return shown(steps)

    return Candidate({"step": Lane(step, reads=reads)}, parameters, outputs)


def shown(steps: list[Step]) -> Mapping[str, Any]:
    """logits [steps, B, V] of the text, tokens [steps, B, 1 + Q]: text, then codes."""
    logits = torch.stack([s.text_logits for s in steps]).float().cpu()
    tokens = torch.stack([torch.cat([s.sampled[:, None], s.codes], 1) for s in steps]).cpu()
    return {"logits": logits.numpy(), "tokens": tokens.numpy()}
