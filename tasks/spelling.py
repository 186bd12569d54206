"""Letters as a second label while the language model trains; not part of the model.

Words teach a listener slowly: one label for each word, of some thousand pieces most of which are
rare. Letters are 26, and every frame of speech has some. A head on a lower layer names the two
letters that are spoken in each frame, a few frames after it was heard; the layers above put words
together. In the same way it names those that the voice of the model is about to speak, which is
where in the text it has got to. (Losses at lower layers: Sanabria and Metze 2018, arXiv
1807.06234.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.streams import FRAME_HZ

LETTERS = 27  # classes: silence, a … z
PER_FRAME = 2
ROWS = 2 * PER_FRAME  # of labels: what was heard, what is about to be spoken
AFTER = 4  # frames that are heard beyond the one whose letters are asked
UNKNOWN = -100

Word = tuple[str, float, float]  # with start and end in seconds


def spell(words: Sequence[Word] | None, frames: int) -> Tensor:
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


def cut(words: Sequence[Word], until_s: float) -> list[Word]:
    """What has been said of words at a time in seconds: the letters of the last one until then."""
    kept = []
    for word, start_s, end_s in words:
        if end_s > until_s:
            share = max(until_s - start_s, 0.0) / max(end_s - start_s, 1e-9)
            word, end_s = word[: round(share * len(word))], until_s
        if word:
            kept.append((word, start_s, end_s))
    return kept


def labels(heard: Tensor, spoken: Tensor, delay: int) -> Tensor:
    """Two times long[2, T] by frame -> long[1, 4, T] by step.

    Step s has read frame s - 1 of what is heard, and tells of the one AFTER frames before it. Of a
    voice that is `delay` frames late it predicts frame s - delay.
    """
    rows = [
        F.pad(letters, (late, 0), value=UNKNOWN)[:, : letters.shape[1]]
        for letters, late in ((heard, 1 + AFTER), (spoken, delay))
    ]
    return torch.cat(rows)[None]


class Speller(nn.Module):
    """Hidden states of a layer [B, S, D] -> logits [B, S, 4, 27]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ROWS * LETTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).unflatten(-1, (ROWS, LETTERS))

    def loss(self, x: Tensor, letters: Tensor) -> Tensor:
        """letters long[B, 4, S] -> sum of the cross-entropies."""
        logits, wanted = self(x).flatten(0, 2).float(), letters.transpose(1, 2).flatten()
        return F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum")
