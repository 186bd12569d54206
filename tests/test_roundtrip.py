"""Recordings through a codec and back: alone or in company, it is what the codec gives offline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_cli.core.mimi import Mimi
from moshi_cli.tasks.roundtrip import Later, Roundtrip

LENGTHS = (5000, 1920, 60_000)


def test_a_batch_is_what_the_codec_gives_offline(tiny_mimi: Mimi) -> None:
    wavs = [torch.randn(n) * 0.2 for n in LENGTHS]
    passages = Roundtrip(tiny_mimi, [2, 4], slots=2)(wavs)
    for wav, passage in zip(wavs, passages, strict=True):
        codes = tiny_mimi.encode(wav[None, None])[0]
        assert torch.equal(passage.codes, codes) and list(passage.decoded) == [2, 4]
        for n, found in passage.decoded.items():
            sound = tiny_mimi.decode(codes[None, :n])
            assert torch.allclose(found.wav, sound[0, 0, : len(wav)], atol=1e-5)
            again = tiny_mimi.encode(sound)[0, :n]
            assert found.same == (again == codes[:n]).sum(1).tolist()
            assert found.frames == codes.shape[1] == -(-len(wav) // 1920)


def test_only_as_many_codebooks_as_asked_for(tiny_mimi: Mimi) -> None:
    (passage,) = Roundtrip(tiny_mimi, [1])([torch.randn(4000) * 0.2])
    assert passage.codes.shape == (1, 3) and len(passage.decoded[1].same) == 1


def test_what_begins_later_is_encoded_anew(tiny_mimi: Mimi) -> None:
    wavs = [torch.randn(n) * 0.2 for n in LENGTHS] + [torch.randn(200)]
    for wav, passage in zip(wavs, Roundtrip(tiny_mimi, [4], slots=2, shift=240)(wavs), strict=True):
        if len(wav) <= 240:
            assert passage.later is None
            continue
        codes, later = (tiny_mimi.encode(x[None, None])[0] for x in (wav, wav[240:]))
        frames = -(-(len(wav) - 240) // 1920)
        same = (codes[:, :frames] == later).sum(1).tolist()
        assert passage.later == Later(same, frames)


class ByHand:
    """A codec whose codes are plain: ten times the mean level of a frame; whether its last sample
    is another than its first one. It decodes to the level, as a constant."""

    sample_rate, frame_samples, num_codebooks = 24_000, 1920, 2

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def set_num_codebooks(self, count: int) -> None:
        self.num_codebooks = count

    def init_state(self, slots: int, device: Any) -> Any:
        state = SimpleNamespace(reset=lambda mask: None)
        return SimpleNamespace(encoder=state, decoder=state)

    def encode(self, wav: Tensor, state: Any, active: Tensor | None) -> Tensor:
        frames = wav[:, 0].unflatten(1, (-1, 1920))
        level = (10 * frames.mean(2)).round().long()
        edge = (frames[..., 0] != frames[..., -1]).long()
        return torch.stack([level, edge], 1)[:, : self.num_codebooks]

    def decode(self, codes: Tensor, state: Any, active: Tensor | None) -> Tensor:
        return (codes[:, :1] / 10).repeat_interleave(1920, 2)


LEVELS = torch.tensor([0.1, 0.1, 0.3, 0.3]).repeat_interleave(1920)
LEVELS[1919] = 0.5  # the last sample of the first frame: codes 1 1 3 3 and 1 0 0 0


@pytest.mark.parametrize(
    ("shift", "later"),
    [
        # frames now reach 240 samples further: edges 0 1 0 1 (into the other level, into the end)
        (240, Later([4, 1], 4)),
        # half a frame: means 0.1 0.2 0.3 0.15 are 1 2 3 2, or 1 where the half is rounded down
        (960, Later([2, 1], 4)),
        # a frame and a sample: 1 3 3 and 1 0 1 (one sample of the next level, one of the end)
        (1921, Later([2, 2], 3)),
        (0, None),
        (4 * 1920, None),
    ],
)
def test_by_hand(shift: int, later: Later | None) -> None:
    codec: Any = ByHand()
    (passage,) = Roundtrip(codec, [1, 2], shift=shift)([LEVELS])
    assert passage.codes.tolist() == [[1, 1, 3, 3], [1, 0, 0, 0]]
    assert passage.decoded[1].same == [4] and passage.decoded[2].same == [4, 3]  # the edge is gone
    assert passage.decoded[2].frames == 4 and passage.later == later
