"""Whisper's encoder: a teacher of the codec, and an ear for what the codec decodes (paper §3.3.2).

Reads a folder in the layout of CTranslate2 (model.bin) or of Transformers (model.safetensors), of
any size, with floats for weights. Nothing in it learns. Sound [B, S] at the rate it was made for
becomes [B, T, D] at 50 Hz; the sound is not resampled, its spectrum is taken as at 16 kHz.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.errors import ModelError
from moshi_cli.core.tensors import TensorFile

WINDOW_S, HOP_S, TOP_HZ = 0.025, 0.01, 8000.0
POSITIONS = 1500  # of 20 ms: it hears 30 s at most
HEAD = 64  # width of a head in every size of Whisper
SPEC, VERSIONS = "WhisperSpec", (4, 5, 6)  # of CTranslate2 files
TYPES = {
    0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16,
    5: torch.bfloat16,
}  # fmt: skip
POSITION_NAME = "position_encodings/encodings"
TRANSFORMERS = {  # CTranslate2's names, which are ours -> theirs, one below the other
    "conv1": ("conv1",), "conv2": ("conv2",), "layer_norm": ("layer_norm",),
    "layer_{l}/self_attention/layer_norm": ("layers.{l}.self_attn_layer_norm",),
    "layer_{l}/self_attention/linear_0": tuple(f"layers.{{l}}.self_attn.{x}_proj" for x in "qkv"),
    "layer_{l}/self_attention/linear_1": ("layers.{l}.self_attn.out_proj",),
    "layer_{l}/ffn/layer_norm": ("layers.{l}.final_layer_norm",),
    "layer_{l}/ffn/linear_0": ("layers.{l}.fc1",), "layer_{l}/ffn/linear_1": ("layers.{l}.fc2",),
}  # fmt: skip


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The encoder's variables in a model.bin, as they lie there. ModelError."""

    def take(size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise ModelError(f"{path}: cut short")
        return data

    def number(form: str) -> int:
        return int(struct.unpack("<" + form, take(struct.calcsize(form)))[0])

    def name() -> str:
        return take(number("H")).rstrip(b"\0").decode()

    def variable() -> tuple[str, Tensor | None]:
        key, rank = name(), number("B")
        shape = [number("I") for _ in range(rank)]
        kind, size = number("B"), number("I")
        if not key.startswith("encoder/"):
            file.seek(size, 1)
            return key, None
        data = torch.frombuffer(bytearray(take(size)), dtype=TYPES[kind])
        return key, data.reshape(shape)

    file: BinaryIO
    try:
        with path.open("rb") as file:
            version = number("I")
            if version not in VERSIONS or (kind := name()) != SPEC:
                what = f"of version {version}" if version not in VERSIONS else f"a {kind}"
                raise ModelError(f"{path}: not Whisper as CTranslate2 writes it, but {what}")
            number("I")  # revision of the kind
            found = dict(variable() for _ in range(number("I")))
            for _ in range(number("I")):  # equal variables are stored once
                alias, target = name(), name()
                found[alias] = found[target]
    except OSError as error:
        raise ModelError(f"{path}: cannot read ({error.strerror or error})") from None
    except (ValueError, KeyError, RuntimeError):
        raise ModelError(f"{path}: damaged, or not a model of CTranslate2") from None
    return {k.removeprefix("encoder/"): x for k, x in found.items() if x is not None}


def read_transformers(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors in a model.safetensors, under CTranslate2's names. ModelError."""
    file = TensorFile(path)
    top = "model.encoder." if "model.encoder.conv1.weight" in file.entries else "encoder."

    def joined(names: tuple[str, ...], which: str) -> Tensor:
        found: list[Tensor] = []
        for name in (f"{top}{name}.{which}" for name in names):
            bare = name.endswith("k_proj.bias") and name not in file.entries  # as keys mostly are
            found.append(torch.zeros_like(found[0]) if bare else file.read(name))
        return torch.cat(found)

    found = {POSITION_NAME: joined(("embed_positions",), "weight")}
    layers = sum(n.startswith(f"{top}layers.") and n.endswith("fc1.bias") for n in file.entries)
    for name, theirs in TRANSFORMERS.items():
        kinds = ("gamma", "beta") if name.endswith("norm") else ("weight", "bias")
        for layer in range(layers if "{l}" in name else 1):
            parts = tuple(part.format(l=layer) for part in theirs)
            for kind, which in zip(kinds, ("weight", "bias"), strict=True):
                found[f"{name.format(l=layer)}/{kind}"] = joined(parts, which)
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The encoder's weights in float32, complete and of shapes that fit each other. ModelError."""
    path = folder / "model.bin"
    if path.is_file():
        values = read_ctranslate2(path)
    elif (folder / "model.safetensors").is_file():
        path = folder / "model.safetensors"
        values = read_transformers(path)
    else:
        hint = "a folder with model.bin (CTranslate2) or model.safetensors (Transformers)"
        raise ModelError(f"{folder}: no Whisper model", hint)
    return {name: fitting(values, name, shape, path) for name, shape in shapes(values).items()}


def fitting(values: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """One weight as float32. ModelError if it is not there, of another shape, or no float."""
    if name not in values:
        raise ModelError(f"{path}: has no {name}")
    value = values[name]
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        hint = "convert the model with --quantization float16"
        raise ModelError(f"{path}: its weights are {kind}, not floats", hint)
    if value.shape != shape:
        raise ModelError(f"{path}: {name} is {list(value.shape)}, not {list(shape)}")
    return value.float()


def shapes(values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What an encoder of that width and depth needs, by name."""
    width, mels = (*getattr(values.get("conv1/weight"), "shape", ()), 0, 0)[:2]
    inner = (*getattr(values.get("layer_0/ffn/linear_0/weight"), "shape", ()), 0)[0]
    width = max(HEAD, width // HEAD * HEAD)

    def linear(name: str, to: int, *of: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}/weight": (to, *of), f"{name}/bias": (to,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}/gamma": (width,), f"{name}/beta": (width,)}

    found = linear("conv1", width, mels, 3) | linear("conv2", width, width, 3)
    for i in range(max(1, depth(values))):
        at = f"layer_{i}/self_attention"
        found |= norm(f"{at}/layer_norm") | linear(f"{at}/linear_0", 3 * width, width)
        found |= linear(f"{at}/linear_1", width, width)
        at = f"layer_{i}/ffn"
        found |= norm(f"{at}/layer_norm") | linear(f"{at}/linear_0", inner, width)
        found |= linear(f"{at}/linear_1", width, inner)
    return found | norm("layer_norm") | {POSITION_NAME: (POSITIONS, width)}


def depth(values: Mapping[str, Tensor]) -> int:
    """Number of layers."""
    return sum(name.endswith("self_attention/linear_0/bias") for name in values)


def slaney_filters(bins_hz: np.ndarray, count: int) -> Tensor:
    """Triangles of equal area up to 8 kHz on the Slaney mel scale. -> [bins, mels]"""
    top = 15 + 27 * math.log(TOP_HZ / 1000) / math.log(6.4)  # linear to 1 kHz, then logarithmic
    mels = np.linspace(0, top, count + 2)
    hz = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    rise = (bins_hz[:, None] - hz[:-2]) / (hz[1:-1] - hz[:-2])
    fall = (hz[2:] - bins_hz[:, None]) / (hz[2:] - hz[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rise, fall)) * 2 / (hz[2:] - hz[:-2])).float()


class WhisperEncoder(nn.Module):
    """wav [B, S] at `sample_rate`, at most 30 s -> [B, T, D] at 50 Hz. ModelError."""

    def __init__(self, folder: Path, sample_rate: int):
        super().__init__()
        values = read_weights(folder)
        self.layers = depth(values)
        self.width, self.mels, _ = values["conv1/weight"].shape
        self.heads = self.width // HEAD
        self.size, self.hop = round(WINDOW_S * sample_rate), round(HOP_S * sample_rate)
        self.scale = (16_000 / sample_rate) ** 2  # Whisper's spectra are taken at 16 kHz
        bins_hz = np.arange(self.size // 2 + 1) * sample_rate / self.size
        values["window"] = torch.hann_window(self.size)
        values["filters"] = slaney_filters(bins_hz, self.mels)
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)

    def spectrum(self, wav: Tensor) -> Tensor:
        """wav [B, S] -> Whisper's log-mel image [B, mels, 100 per second]."""
        window, filters = self.get_buffer("window"), self.get_buffer("filters")
        z = torch.stft(wav, self.size, self.hop, window=window, return_complex=True)
        power = torch.view_as_real(z[..., :-1]).square().sum(-1) * self.scale  # [B, bins, T]
        x = (power.transpose(1, 2) @ filters).transpose(1, 2).clamp(min=1e-10).log10()
        x = torch.maximum(x, x.amax((1, 2), keepdim=True) - 8)
        return (x + 4) / 4

    def norm(self, x: Tensor, at: str) -> Tensor:
        gamma, beta = self.get_buffer(f"{at}/gamma"), self.get_buffer(f"{at}/beta")
        return F.layer_norm(x, (self.width,), gamma, beta)

    def hear(self, wav: Tensor) -> list[Tensor]:
        """wav [B, S] -> what the convolutions and each layer give, [B, T, D] at 50 Hz."""
        v = dict(self.named_buffers())
        x = F.gelu(F.conv1d(self.spectrum(wav), v["conv1/weight"], v["conv1/bias"], padding=1))
        x = F.gelu(F.conv1d(x, v["conv2/weight"], v["conv2/bias"], stride=2, padding=1))
        x = x.transpose(1, 2)  # [B, T, D]
        assert x.shape[1] <= POSITIONS, x.shape
        x = x + v[POSITION_NAME][: x.shape[1]]
        found = [x]
        for i in range(self.layers):
            at = f"layer_{i}/self_attention"
            y = self.norm(x, f"{at}/layer_norm")
            y = F.linear(y, v[f"{at}/linear_0/weight"], v[f"{at}/linear_0/bias"])
            q, k, val = (
                p.unflatten(-1, (self.heads, HEAD)).transpose(1, 2) for p in y.chunk(3, -1)
            )  # [B, H, T, 64]
            y = F.scaled_dot_product_attention(q, k, val).transpose(1, 2).flatten(2)
            x = x + F.linear(y, v[f"{at}/linear_1/weight"], v[f"{at}/linear_1/bias"])
            at = f"layer_{i}/ffn"
            y = self.norm(x, f"{at}/layer_norm")
            y = F.gelu(F.linear(y, v[f"{at}/linear_0/weight"], v[f"{at}/linear_0/bias"]))
            x = x + F.linear(y, v[f"{at}/linear_1/weight"], v[f"{at}/linear_1/bias"])
            found.append(x)
        return found

    def forward(self, wav: Tensor) -> Tensor:
        """What the encoder gives its decoder: the last layer, normalised."""
        return self.norm(self.hear(wav)[-1], "layer_norm")


class WhisperListener(nn.Module):
    """(made, real) wav [B, 1, S] -> how differently Whisper's encoder hears them, a scalar."""

    def __init__(self, folder: Path, sample_rate: int):
        super().__init__()
        self.encoder = WhisperEncoder(folder, sample_rate)

    def hear(self, wav: Tensor) -> list[Tensor]:
        """wav [B, 1, S] -> every layer of the encoder, normalised."""
        width = (self.encoder.width,)
        return [F.layer_norm(layer, width) for layer in self.encoder.hear(wav[:, 0])]

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            true = self.hear(real)
        each = [(a - b).square().mean() for a, b in zip(self.hear(made), true, strict=True)]
        return torch.stack(each).mean()
