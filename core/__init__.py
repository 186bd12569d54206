"""The model: one Mimi codec and one RQ-Transformer that hears, writes and speaks.

A newcomer's map, ten minutes. Everything is a grid of integers: one column per frame of 80 ms, one
row per stream. Row 0 is text, the other rows are codebooks of one or two voices. Mimi turns sound
into the voice rows and back. The RQ-Transformer predicts the next column: a large temporal
transformer reads the columns so far, a small depth transformer writes the new column row by row.
Speech recognition, speech synthesis and dialogue are the same grid with other rows given and other
rows sampled, and with text and voice shifted against each other by one signed lag.

Letters, the same in every file:
    B  slots: conversations that run side by side
    T  frames of 80 ms (12.5 Hz)         S  samples (24 kHz, 1920 to a frame)
    K  streams, text first               Q  codebooks of one voice
    D  width                             V  text vocabulary         C  codebook size
Suffixes carry units: _s, _hz, _frames, _samples.

Read in this order:
    errors, config             what a user may be told; frozen dataclasses
    streams                    Role, Task, DelayPattern: integers and shifts, the design in one file
    state                      what a stream remembers: passed in, mutated in place; None is offline
    layers, attention          RMSNorm, RoPE, gated MLP; causal windowed attention on a ring
    conv, seanet, vq, mimi     the codec, bottom up: sound [B, 1, S] <-> codes [B, Q, T]
    conditioning, depth, lm    codes and text [B, K, T] -> h [B, T, D], logits, the codes of a frame
    sampling, stepper, script  one token; one column of tokens; the words a TTS is made to say
    listed, ngram, wordgrams   what is usually said: maps by hash, pieces and words that follow
    recurrent, search          each other, a network; several hypotheses of what is written
    engine                     one loop over slots: open, step, close; a frame is one graph
    text                       words with times <-> a token row
    pcm, files, decoders       bytes: sample formats, pipes, what a sound file may be
    audio, audio_writer        sound in 80 ms steps from anywhere; sound files whole or absent
    kyutai_mimi, kyutai_lm     the published JSON layouts, read into configs and written back
    names, tensors, hub        tensors: published names <-> ours, checked first; finding files
    weights, presets           whole models loaded and saved; configs known by heart
    losses, discriminators     training only
    lora                       adapters on every linear layer, under upstream's names
    packing, native            weights as a CPU wants them, to run a model and nothing else; the
                               same steps in C, if it can be compiled

Names listed here load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshi_cli.core.config import LmConfig as LmConfig
    from moshi_cli.core.config import MimiConfig as MimiConfig
    from moshi_cli.core.engine import Engine as Engine
    from moshi_cli.core.errors import MoshiError as MoshiError
    from moshi_cli.core.lm import MoshiLm as MoshiLm
    from moshi_cli.core.mimi import Mimi as Mimi
    from moshi_cli.core.sampling import Sampling as Sampling
    from moshi_cli.core.state import State as State
    from moshi_cli.core.streams import DelayPattern as DelayPattern
    from moshi_cli.core.streams import Role as Role
    from moshi_cli.core.streams import Task as Task
    from moshi_cli.core.weights import Model as Model
    from moshi_cli.core.weights import load as load

HOMES = {  # public name -> the module that defines it
    "DelayPattern": "streams",
    "Engine": "engine",
    "LmConfig": "config",
    "Mimi": "mimi",
    "MimiConfig": "config",
    "Model": "weights",
    "MoshiError": "errors",
    "MoshiLm": "lm",
    "Role": "streams",
    "Sampling": "sampling",
    "State": "state",
    "Task": "streams",
    "load": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
