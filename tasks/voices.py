"""Whose voice a TTS speaks with: published voice embeddings, or a short recording.

Published models of 1.6 B listen to `speaker_wavs`, vectors [125, 512] per speaker, made by an
encoder that is not published: only the listed voices can be used. Models without that condition
continue a recording instead. The built-in model has one voice of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.core.hub import Source
from moshi_cli.core.tensors import TensorFile

VOICES = "hf://kyutai/tts-voices"  # where published voices are
SPEAKERS = 5  # places for speakers in the published models
LENGTH = 125  # vectors per speaker: 10 s
CONDITION = "speaker_wavs"


def takes_embeddings(config: ModelConfig) -> bool:
    """Whether the model knows voices by embeddings."""
    return config.lm is not None and any(c.name == CONDITION for c in config.lm.conditions)


def find_voice(name: str, config: ModelConfig) -> Path:
    """The file of a voice: a path, a hf:// address, or a name in the published collection.

    ModelError if it cannot be found, or if the model cannot take a voice of that kind.
    """
    if config.kind != "tts":
        raise ModelError("this model speaks with one voice, its own", "leave out --voice")
    path = Path(name).expanduser()
    if path.is_file():
        found = path
    elif name.startswith("hf://"):
        source = Source.of(name)
        found = source.file(source.only)
    else:
        suffix = f".{config.voice_id}.safetensors"
        plain = name if not takes_embeddings(config) or name.endswith(suffix) else name + suffix
        found = Source.of(VOICES).file(plain)
    embedding = found.name.endswith(".safetensors")
    if embedding != takes_embeddings(config):
        kind = "voice files (.safetensors)" if takes_embeddings(config) else "a recording"
        hint = "its voice encoder is not published: choose one of the voices in kyutai/tts-voices"
        raise ModelError(
            f"{name}: this model takes {kind}", hint if takes_embeddings(config) else None
        )
    return found


def read_embedding(path: Path) -> Tensor:
    """`speaker_wavs` of a voice file, float32 [T, D]."""
    file = TensorFile(path)
    if CONDITION not in file.entries:
        raise ModelError(f"{path}: not a voice file, it has no tensor {CONDITION!r}")
    vectors = file.read(CONDITION).float()
    if vectors.dim() != 3 or len(vectors) != 1:
        raise ModelError(f"{path}: {CONDITION} has shape {list(vectors.shape)}, not [1, D, T]")
    return vectors[0].T.contiguous()  # [T, D]


def speakers(voices: Sequence[Tensor], width: int) -> Tensor:
    """Embeddings [T, D] of up to five speakers -> float32 [5 · T, D], NaN where nobody is."""
    if len(voices) > SPEAKERS:
        raise UsageError(f"{len(voices)} voices, this model takes {SPEAKERS} at most")
    length = max((len(voice) for voice in voices), default=LENGTH)
    places = torch.full((SPEAKERS, length, width), math.nan)
    for i, voice in enumerate(voices):
        if voice.shape[1] != width:
            raise ModelError(f"a voice of width {voice.shape[1]}, the model wants {width}")
        places[i, : len(voice)] = voice
    return places.flatten(0, 1)
