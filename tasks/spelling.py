"""Letters, or sounds, as a second label while a model trains; not part of the model.

Words teach a listener slowly: one label for each word, of some thousand pieces most of which are
rare. Letters are 26, and every frame of speech has some. A head on a lower layer of the language
model names the two letters that are spoken in each frame, a few frames after it was heard; the
layers above put words together. In the same way it names those that the voice of the model is about
to speak, which is where in the text it has got to. (Losses at lower layers: Sanabria and Metze
2018, arXiv 1807.06234.) A codec's latent can be asked for them, too: then its codes hold them.

English is not spelled as it sounds, so a lexicon may say how words are: a file of lines `word TAB
symbols`, each symbol a character, written twice where it takes twice as long as others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.errors import InputError
from moshi_cli.core.streams import FRAME_HZ

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
PER_FRAME = 2
ROWS = 2 * PER_FRAME  # of labels: what was heard, what is about to be spoken
AFTER = 4  # frames that are heard beyond the one whose letters are asked
UNKNOWN = -100

Word = tuple[str, float, float]  # with start and end in seconds
Spelled = tuple[tuple[int, ...], float, float]  # the same by its symbols' classes


@dataclass(frozen=True)
class Spelling:
    """Symbols, of which number i is class i + 1, and the words that are not spelled in letters."""

    symbols: str = ALPHABET
    lexicon: Mapping[str, str] | None = None  # None: words are spelled in letters

    @property
    def classes(self) -> int:
        """Symbols, and silence."""
        return len(self.symbols) + 1

    def spelled(self, words: Sequence[Word]) -> list[Spelled]:
        """Words by their classes; none where a word has no symbols, or they are not known."""
        return [(self.classes_of(word), start_s, end_s) for word, start_s, end_s in words]

    def classes_of(self, word: str) -> tuple[int, ...]:
        """The classes of a word's symbols."""
        word = word.lower() if self.lexicon is None else self.lexicon.get(bare(word), "")
        return tuple(self.symbols.index(c) + 1 for c in word if c in self.symbols)


def bare(word: str) -> str:
    """What of a word in small letters stands in a lexicon: "Don't," -> "don't"."""
    return re.sub(r"[^a-z']", "", word.lower()).strip("'")


def read_spelling(path: str | None) -> Spelling:
    """The lexicon in a file; None: letters. Raises InputError."""
    if path is None:
        return Spelling()
    lexicon = {}
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            word, tab, symbols = line.partition("\t")
            if not (tab and word and symbols.strip()):
                raise InputError(f"{path}:{number}: not a word, a tab and its symbols")
            lexicon[bare(word)] = symbols.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a lexicon ({error})") from error
    if not lexicon:
        raise InputError(f"{path}: a lexicon without words")
    return Spelling("".join(sorted(set("".join(lexicon.values())))), lexicon)


def spell(words: Sequence[Spelled] | None, frames: int) -> Tensor:
    """Words with start and end in seconds -> long[2, T], the symbols of each half frame.

    A word's symbols share its time evenly. 0: nothing is said; UNKNOWN: something without symbols
    is, or it is not known what (None).
    """
    if words is None:
        return torch.full((PER_FRAME, frames), UNKNOWN)
    row = torch.zeros(frames * PER_FRAME, dtype=torch.long)
    for symbols, start_s, end_s in words:
        first, last = (round(s * FRAME_HZ * PER_FRAME) for s in (start_s, end_s))
        last = max(last, first + 1)
        spelled = symbols or (UNKNOWN,)
        for i in range(max(first, 0), min(last, len(row))):
            row[i] = spelled[(i - first) * len(spelled) // (last - first)]
    return row.view(frames, PER_FRAME).t().contiguous()


def cut(words: Sequence[Spelled], until_s: float) -> list[Spelled]:
    """What has been said of words at a time in seconds: the symbols of the last one until then.

    A word of unknown symbols has been said, too.
    """
    kept = []
    for word, start_s, end_s in words:
        unknown = not word
        if end_s > until_s:
            share = max(until_s - start_s, 0.0) / max(end_s - start_s, 1e-9)
            word, end_s = word[: round(share * len(word))], until_s
        if word or (unknown and end_s > start_s):
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
    """Hidden states of a layer [B, S, D] -> logits [B, S, 4, classes]."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ROWS * classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).unflatten(-1, (ROWS, -1))

    def loss(self, x: Tensor, letters: Tensor) -> Tensor:
        """letters long[B, 4, S] -> sum of the cross-entropies."""
        logits, wanted = self(x).flatten(0, 2).float(), letters.transpose(1, 2).flatten()
        return F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum")


class LatentSpeller(nn.Linear):
    """Latents of a codec [B, T, D] -> logits [B, T, 2, classes], in a straight line."""

    LATE = 1  # frames that are heard beyond the one whose symbols are asked

    def __init__(self, width: int, classes: int):
        super().__init__(width, PER_FRAME * classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (PER_FRAME, -1))

    def loss(self, x: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
        """letters long[B, 2, T] -> mean of the cross-entropies, share of the symbols that are right
        (both scalars)."""
        logits = self(x[:, self.LATE :]).flatten(0, 2).float()
        wanted = letters[..., : letters.shape[2] - self.LATE].transpose(1, 2).flatten()
        right = (logits.argmax(-1) == wanted) & (wanted > 0)
        loss = F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum")
        known = (wanted != UNKNOWN).sum().clamp_min(1)
        return loss / known, right.sum() / (wanted > 0).sum().clamp_min(1)

    @property
    def directions(self) -> Tensor:
        """What of a latent tells symbols from each other: rows [2 · classes, D]."""
        rows = self.weight.float().unflatten(0, (PER_FRAME, -1))
        return (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
