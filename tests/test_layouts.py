"""Published checkpoints at full size: synthetic files without content, checked but not loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import TINY_LM
from torch import nn

from moshi_cli.core import names
from moshi_cli.core.config import MimiConfig
from moshi_cli.core.errors import ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.presets import PRESETS
from moshi_cli.core.weights import load_lm, load_mimi

WIDTH = {"F32": 4, "BF16": 2}
PUBLISHED = {  # parameters, tensors, bytes of the file where they are known
    "mimi": (96_151_393, 318, 384_644_900),
    "moshi-7b": (7_687_729_152, 355, None),
    "hibiki-2b": (2_787_362_816, 327, 5_574_762_720),
    "hibiki-1b": (1_799_907_840, 262, None),
    "stt-1b": (989_204_480, 131, None),
    "stt-2.6b": (2_617_118_720, 323, 5_234_275_128),
    "tts-1.6b": (1_836_550_272, 418, 3_683_719_712),
    "tts-0.75b": (780_002_304, 312, None),
}
Layout = dict[str, tuple[str, tuple[int, ...]]]


def meta_model(name: str) -> tuple[nn.Module, names.Rules]:
    with torch.device("meta"):
        if name == "mimi":
            return Mimi(MimiConfig()), names.MIMI
        lm = PRESETS[name].lm
        assert lm is not None
        return MoshiLm(lm), names.LM


def layout(name: str) -> Layout:
    """Published name -> type and shape, as the file has them."""
    model, rules = meta_model(name)
    state = model.state_dict()
    return {
        tensor: (
            "F32" if name == "mimi" or (name == "tts-1.6b" and "condition" in tensor) else "BF16",
            place.shape(state),
        )
        for tensor, place in names.expand(rules, model).items()
    }


def sparse(path: Path, tensors: Layout) -> Path:
    """A safetensors file of the full size that takes no room: the data is a hole."""
    header, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: (-WIDTH[t[1][0]], t[0])):
        size = WIDTH[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def open_file(path: Path, name: str) -> nn.Module:
    """Check a file against the model of that name, without memory for it."""
    if name == "mimi":
        return load_mimi(path, MimiConfig(), "meta")
    config = PRESETS[name].lm
    assert config is not None
    return load_lm(path, config, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_layouts(name: str, tmp_path: Path) -> None:
    """Numbers of parameters, tensors and bytes are the published ones; the file is accepted."""
    parameters, count, size = PUBLISHED[name]
    tensors = layout(name)
    path = sparse(tmp_path / "model.safetensors", tensors)
    model = open_file(path, name)
    assert sum(t.numel() for t in model.state_dict().values()) == parameters
    assert len(tensors) == count
    assert size is None or path.stat().st_size == size


@pytest.mark.parametrize("name", ["mimi", "moshi-7b", "stt-1b", "tts-1.6b", "hibiki-2b"])
def test_what_is_off_is_named(name: str, tmp_path: Path) -> None:
    good, path = layout(name), tmp_path / "model.safetensors"
    some = next(t for t in good if "layers.1.norm2" in t or "layers.1.self_attn.out" in t)
    dtype, shape = good[some]

    def refused(tensors: Layout, *words: str) -> None:
        with pytest.raises(ModelError) as caught:
            open_file(sparse(path, tensors), name)
        assert all(word in caught.value.message for word in words), caught.value.message
        assert "\n" not in caught.value.message

    without = {t: v for t, v in good.items() if t != some}
    refused(without, "missing tensor", repr(some))
    refused({**good, "layers.7.extra": ("F32", (3,))}, "unknown tensor", "'layers.7.extra'")
    refused(
        {**good, some: (dtype, (*shape[:-1], 7))}, repr(some), str([*shape[:-1], 7]), str([*shape])
    )
    refused(dict(list(good.items())[:9]), "missing tensors", f"and {len(good) - 14} more")
    sparse(path, good)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ModelError, match="cut short"):
        open_file(path, name)


@pytest.mark.parametrize("name", [*PUBLISHED, "moshi-nano"])
def test_table_covers_each_model_once(name: str) -> None:
    """Both directions: each tensor of ours has published names, and these fill it exactly once."""
    model, rules = meta_model(name)
    state = model.state_dict()
    places = names.expand(rules, model)
    filled = [cell for place in places.values() for cell in place.cells]
    assert len(filled) == len(set(filled))
    assert {tensor for tensor, _ in filled} == set(state)
    total = sum(torch.Size(place.shape(state)).numel() for place in places.values())
    assert total == sum(t.numel() for t in state.values())


def one_tensor(shape: int) -> bytes:
    """A header that promises four bytes, and none of them."""
    text = b'{"x":{"dtype":"F32","shape":[%d],"data_offsets":[0,4]}}' % shape
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"RIFF", "not a safetensors file"),
        (b"this is a text file named .safetensors", "not a safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 4) + b"{{{{", "header is damaged"),
        (struct.pack("<Q", 2) + b"[]", "header is damaged"),
        (struct.pack("<Q", 14) + b'{"x":{"y":[]}}', "header is damaged"),
        (one_tensor(shape=9), "'x'"),
        (one_tensor(shape=1), "cut short"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        load_lm(path, TINY_LM)
