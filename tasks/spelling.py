"""Letters as a second label while the language model trains; not part of the model.

Words teach a listener slowly: one label for each word, of some thousand pieces most of which are
rare. Letters are 26, and every frame of speech has some. A head on a lower layer names the two
letters that are spoken in each frame, a few frames after it was heard; the layers above put words
together. (Losses at lower layers: Sanabria and Metze 2018, arXiv 1807.06234.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.streams import FRAME_HZ

LETTERS = 27  # classes: silence, a … z
PER_FRAME = 2
AFTER = 4  # frames that are heard beyond the one whose letters are asked
UNKNOWN = -100


def spell(words: Sequence[tuple[str, float, float]] | None, frames: int) -> Tensor:
    """Words with start and end in seconds -> long[2, T], the letters spoken in each half frame.

    A word's letters share its time evenly. 0: nothing is said; UNKNOWN: something without letters
    is, or it is not known what (None).
    """
    if words is None:
        return torch.full((PER_FRAME, frames), UNKNOWN)
    row = torch.zeros(frames * PER_FRAME, dtype=torch.long)
    for word, start_s, end_s in words:
        first, last = (round(s * FRAME_HZ * PER_FRAME) for s in (start_s, end_s))
        last = max(last, first + 1)
        spelled = [ord(c) - 96 for c in word.lower() if "a" <= c <= "z"] or [UNKNOWN]
        for i in range(max(first, 0), min(last, len(row))):
            row[i] = spelled[(i - first) * len(spelled) // (last - first)]
    return row.view(frames, PER_FRAME).t().contiguous()


def heard_late(letters: Tensor) -> Tensor:
    """long[2, T] by frame -> long[1, 2, T] by step: step s has read frame s - 1 and tells of the
    frame that came AFTER frames before it."""
    return F.pad(letters, (1 + AFTER, 0), value=UNKNOWN)[None, :, : letters.shape[1]]


class Speller(nn.Module):
    """Hidden states of a layer [B, S, D] -> logits [B, S, 2, 27]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PER_FRAME * LETTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).unflatten(-1, (PER_FRAME, LETTERS))

    def loss(self, x: Tensor, letters: Tensor) -> Tensor:
        """letters long[B, 2, S] -> sum of the cross-entropies."""
        logits, wanted = self(x).flatten(0, 2).float(), letters.transpose(1, 2).flatten()
        return F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum")
