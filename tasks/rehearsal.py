"""Whole tasks under a stopwatch: frames from sound to sound, and what a frame is made of.

The engine that `moshi asr`, `tts` and `chat` run, without files and devices around it. Sound is
noise unless a recording is given; a made-up script of tokens is spoken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core import audio
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import UsageError
from moshi_cli.core.packing import pack
from moshi_cli.core.script import Entry
from moshi_cli.core.streams import MADE
from moshi_cli.core.text import PAD
from moshi_cli.tasks import TASKS
from moshi_cli.tasks.candidates import Candidate, Lane, count, opened
from moshi_cli.tasks.contest import Job
from moshi_cli.tasks.machine import wait
from moshi_cli.tasks.shapes import Reads, codec_reads, lm_reads, sound
from moshi_cli.tasks.stopwatch import Clock
from moshi_cli.tasks.tts import speaking_engine

WAIT_FRAMES = 125  # for the first word or sound: 10 s
SCRIPT = [Entry((5, 6), 1), Entry((7,))] * 200  # more words than are waited for


def conversation(job: Job) -> Candidate:
    """Frames of a task, from sound to sound; `latency` also times what a frame is made of."""
    model = opened(job)
    config, wanted = model.config, job.what
    if model.lm is None:
        raise UsageError(f"{job.config or job.model} is a codec alone", "moshi bench codec")
    if wanted == "latency":
        wanted = "chat" if "chat" in config.lags else "asr"
    if wanted == "tts":
        engine = speaking_engine(model, job.batch)
    else:
        engine = Engine(model, model.fit(TASKS[wanted]), job.batch)
    B, frame = job.batch, engine.frame_samples
    lane, parameters = reads(engine, B), count(model.mimi, model.lm)
    pack(model.lm)
    pack(model.mimi)
    heard = frames(job, frame, engine.device)
    script = SCRIPT if wanted == "tts" else None
    marks: dict[str, float] = {}

    def begin() -> None:
        for slot in range(B):
            engine.open(slot, seed=job.seed + slot, script=script, prime=False)
        engine.prime(torch.ones(B, dtype=torch.bool, device=engine.device))

    def step() -> Mapping[str, float]:
        marks.clear()
        engine.step(next(heard) if engine.hears else None)
        wait(engine.device)
        return dict(marks)

    if job.what == "latency":
        listen(engine, marks)
    begin()
    facts = {
        "task": wanted, "delay_frames": max(engine.pattern.latency, 0),
        "speaks": engine.task.voice in MADE,
    }  # fmt: skip
    return Candidate(
        {"frame": Lane(step, reads=lane)}, parameters,
        first=lambda pace_s: first(engine, begin, heard, pace_s), facts=facts,
    )  # fmt: skip


def reads(engine: Engine, batch: int) -> Reads:
    """Of one frame: the language model and the halves of the codec that it uses."""
    model = engine.model
    assert model.lm is not None
    parts = [lm_reads(model.lm, batch * (2 if engine.sampling.guided else 1))]
    encode, decode = codec_reads(model.mimi, batch)
    parts += [encode] * engine.hears + [decode] * bool(engine.stepper.codebooks)
    return Reads(sum(p.weights for p in parts), sum(p.cache for p in parts))


def frames(job: Job, samples: int, device: torch.device) -> Iterator[Tensor]:
    """Sound without end, float32 [B, 1, 1920]: the file of the job, or noise, again and again."""
    if job.audio:
        pcm = audio.read(job.audio)[0]
        pcm = F.pad(pcm, (0, -pcm.shape[-1] % samples)).expand(job.batch, 1, -1)
    else:
        pcm = torch.from_numpy(sound(job.batch, 25 * samples, job.seed))
    while True:
        yield from pcm.to(device).split(samples, -1)


def listen(engine: Engine, marks: dict[str, float]) -> None:
    """Let encode, step and decode of an engine write down their milliseconds."""

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            result = work(*args)
            wait(engine.device)
            marks[name] = 1000 * (time.perf_counter() - began)
            return result

        return run

    mimi: Any = engine.model.mimi
    stepper: Any = engine.stepper
    mimi.encode, mimi.decode = timed("encode", mimi.encode), timed("decode", mimi.decode)
    stepper.step = timed("step", stepper.step)


def first(
    engine: Engine,
    begin: Callable[[], None],
    heard: Iterator[Tensor],
    pace_s: float | None,
    clock: Clock | None = None,
) -> Mapping[str, float | None]:
    """Seconds from the opening of a session to its first frame of text, word and sound.

    Paced, the sound that has to arrive first is part of it. None: nothing came within 10 s of
    sound.
    """
    clock = clock or Clock()
    began = clock.wall()
    found: dict[str, float | None] = dict.fromkeys(
        ("first_text_s", "first_word_s", "first_audio_s")
    )
    begin()
    speaks = engine.task.voice in MADE

    def step() -> None:
        frame = engine.step(next(heard) if engine.hears else None)
        ready, text = frame.ready.tolist(), frame.text.tolist()
        now = clock.wall() - began
        came = {
            "first_text_s": any(ready),
            "first_word_s": any(r and t > PAD for r, t in zip(ready, text, strict=True)),
            "first_audio_s": speaks and any(ready),
        }
        for name, there in came.items():
            if there and found[name] is None:
                found[name] = round(now, 4)

    for k in range(WAIT_FRAMES):
        if pace_s is not None and engine.hears:  # the frame is there when it has been spoken
            clock.sleep(max(0.0, began + (k + 1) * pace_s - clock.wall()))
        step()
        if found["first_word_s"] is not None and (found["first_audio_s"] is not None or not speaks):
            break
    return found
