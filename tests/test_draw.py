"""Codes that a language model draws: what they are drawn from, and how a decoder gets them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from test_train import codec_objective, codec_stage, pack

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import InputError, MoshiError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks.data import UNKNOWN, Pack, Windows
from moshi_cli.tasks.likelihood import Scene
from moshi_cli.tasks.objectives import CodecObjective
from moshi_cli.tasks.stages import CodecStage, Source

__all__ = ["pack"]

FROZEN = ("mimi.encoder*", "mimi.downsample*", "mimi.quantizer*")
LOSSES = {"mel": 1.0, "distillation": 0.0, "commitment": 0.0, "adversarial": 0.0}


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags={"tts": -0.32})
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


@pytest.fixture
def draw(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(root / "examples" / "train_builtin"))
    import draw

    yield draw
    del sys.modules["draw"]


def put(pack: Path, clip: int) -> np.ndarray:
    """drawn.u16 with codes for one clip, whose place they tell: uint16 [frames, 4]."""
    whole = Pack(pack)
    row = whole.rows[clip]
    drawn = np.full((whole.frames, 4), UNKNOWN, np.uint16)
    first = row.offset // 1920
    drawn[first : first + row.frames] = np.arange(row.frames)[:, None] % 16
    drawn.tofile(pack / "drawn.u16")
    return drawn


def test_codes_are_drawn_from_what_came_before(model: Model, draw: ModuleType) -> None:
    drawer = draw.Drawer(model)
    words = (("hello", 0.2, 0.5), ("sky", 1.0, 1.3))
    codes = torch.randint(16, (1, 4, 30))
    changed = codes.clone()
    changed[..., 20:] = (changed[..., 20:] + 5) % 16
    one, other = drawer.draw([Scene(codes, words), Scene(codes, words)], 3)
    assert one.shape == (4, 30 - draw.LEAD)
    assert ((one >= 0) & (one < 16)).all()
    assert torch.equal(one[0], codes[0, 0, draw.LEAD :])  # the semantic ones are true
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one, other)
    drawer.sampling = replace(drawer.sampling, temp=0.0)
    one, other, untold = drawer.draw(
        [Scene(codes, words), Scene(changed, words), Scene(codes, words[:1])], 3
    )
    known = 20 - draw.LEAD  # the first true codes that differ; the acoustic ones of the frame
    assert torch.equal(one[1:, : known - 1], other[1:, : known - 1])  # before come along with them
    assert not torch.equal(one[1:], other[1:])
    assert not torch.equal(one[1:], untold[1:])


def test_a_pack_gets_codes_for_the_clips_that_are_asked_for(
    pack: Path, model: Model, draw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "model")
    wanted = f"draw {tmp_path / 'model'} {pack} --kind moshi --processes 1"
    monkeypatch.setattr(sys, "argv", wanted.split())
    draw.main()
    found = Pack(pack)
    assert found.drawn is not None and found.drawn.shape == (found.frames, 4)
    for row in found.rows:
        first = row.offset // 1920
        codes = found.drawn[first : first + row.frames]
        if row.kind.startswith("moshi"):
            assert (codes < 16).all()
        else:
            assert (codes == UNKNOWN).all()
    assert not list(pack.glob("*.partial"))
    monkeypatch.setattr(sys, "argv", [*wanted.split(), "--kind", "nobody"])
    with pytest.raises(SystemExit, match="no clip is of a kind nobody"):
        draw.main()


def test_windows_bring_drawn_codes_as_loud_as_they_were(pack: Path) -> None:
    drawn = put(pack, 6)
    windows = Windows([Source(str(pack), kinds=("moshi-world",))], drawn=True)
    generator = torch.Generator().manual_seed(0)
    batch = windows.draw(8, 3, generator, gain_db=(-20.0, -10.0))
    whole, (row,) = Pack(pack), [r for r in Pack(pack).rows if r.kind == "moshi-world"]
    assert batch.drawn is not None and batch.drawn.shape == (3, 4, 8)
    for wav, codes in zip(batch.wav, batch.drawn, strict=True):
        first = row.offset // 1920 + int(codes[0, 0])
        torch.testing.assert_close(wav[0], whole.wav(first, 8))
        assert np.array_equal(codes.t().numpy(), drawn[first : first + 8])
    others = Windows([Source(str(pack), kinds=("question",))], drawn=True).draw(
        8, 2, generator, gain_db=(-20.0, -20.0)
    )
    unasked = Windows(windows.sources).draw(8, 2, generator, gain_db=(-20.0, -20.0))
    assert unasked.drawn is None
    assert unasked.wav.abs().max() < 0.06
    assert others.drawn is not None and (others.drawn == UNKNOWN).all()
    assert others.wav.abs().max() < 0.06  # 0.5 at most, 20 dB softer


def test_a_file_of_another_length_is_refused(pack: Path) -> None:
    put(pack, 6)
    with (pack / "drawn.u16").open("ab") as file:
        file.write(b"12")
    with pytest.raises(InputError, match=r"drawn\.u16: its size does not fit"):
        Pack(pack)


def stage_of(pack: Path, **more: object) -> CodecStage:
    return codec_stage(
        pack, freeze=FROZEN, losses=LOSSES, quantize_from=0.0, critics_from=1.0, **more
    )


def objective_of(stage: CodecStage, model: Model) -> CodecObjective:
    """With codebooks that have values."""
    mimi = model.mimi.requires_grad_(True)
    for name, value in mimi.named_parameters():
        value.requires_grad_(name.startswith(("decoder", "upsample")))
    return CodecObjective(stage, mimi, Windows(stage.mix, drawn=stage.drawn > 0))


def test_the_decoder_learns_from_what_was_drawn(pack: Path, model: Model) -> None:
    put(pack, 6)
    objective = objective_of(stage_of(pack, drawn=1.0), model)
    generator = torch.Generator().manual_seed(0)
    wav = torch.randn(2, 1, 3 * 1920) * 0.1
    drawn = torch.tensor([[[1, 2, UNKNOWN]] * 4, [[UNKNOWN] * 3] * 4])
    all_of, counts = torch.ones(2, dtype=torch.bool), torch.full((2,), 4)
    true = model.mimi.encode(wav)
    out = objective.reduce(wav, all_of, counts, generator, drawn)
    assert torch.equal(out.codes[1], true[1])
    assert out.codes[0, :, :2].tolist() == [[1, 2]] * 4
    assert torch.equal(out.codes[0, :, 2], true[0, :, 2])
    assert torch.equal(out.latent, model.mimi.quantizer.decode(out.codes))
    fewer = objective.reduce(wav, all_of, counts, generator, drawn[:, :1])
    assert torch.equal(fewer.codes[:, 1:], true[:, 1:])


@pytest.mark.parametrize(("share", "others"), [(1.0, True), (0.0, False)])
def test_as_often_as_the_stage_says(pack: Path, model: Model, share: float, others: bool) -> None:
    put(pack, 6)
    stage = stage_of(pack, drawn=share)
    stage = replace(stage, mix=(replace(stage.mix[0], kinds=("moshi-world",)),))
    objective = objective_of(stage, model)
    seen = []
    reduce = objective.reduce

    def spy(*args: object) -> object:
        out = reduce(*args)  # type: ignore[arg-type]
        seen.append(torch.equal(out.codes, model.mimi.encode(args[0])))  # type: ignore[arg-type]
        return out

    objective.reduce = spy  # type: ignore[method-assign,assignment]
    objective.backward(0, 0.0)
    assert seen == [not others]


def test_what_cannot_be_decoded_is_refused(pack: Path, model: Model) -> None:
    stage = stage_of(pack, drawn=0.5)
    with pytest.raises(MoshiError, match="there are no drawn codes in the mix"):
        objective_of(stage, model)
    put(pack, 6)
    objective_of(stage, model)
    with pytest.raises(MoshiError, match="drawn codes teach the decoder; freeze the encoder"):
        codec_objective(replace(stage, freeze=()))
    np.zeros((Pack(pack).frames, 5), np.uint16).tofile(pack / "drawn.u16")
    with pytest.raises(MoshiError, match="5 codebooks of 1 entries or more were drawn, the codec"):
        objective_of(stage, model)
    drawn = put(pack, 6)
    drawn[0, 0] = 16
    drawn.tofile(pack / "drawn.u16")
    with pytest.raises(MoshiError, match="4 codebooks of 17 entries or more were drawn, the codec"):
        objective_of(stage, model)
