"""A recurrent language model of text tokens: what is usually said after all that was said so far.

One LSTM layer between an embedding and the same embedding again (Sundermeyer et al. 2012; Press and
Wolf 2017). N-grams know the last words by heart, this one remembers a whole sentence; together they
foretell more than either (ngram.py). It is stepped by the search whenever a hypothesis says
something, and takes less than a hundredth of a frame's time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.text import BOS


class Recurrent(nn.Module):
    """log p(token | the tokens since the beginning of a sentence).

    The memory of R rows is one tensor [R, 2H], state and cell side by side, as their difference
    from where a sentence begins: zeros begin one.
    """

    def __init__(self, size: int, dim: int, width: int, dropout: float = 0.0):
        """size: of the vocabulary V. dim: D of its embedding. width: H of the layer."""
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.lstm = nn.LSTM(dim, width, batch_first=True)
        self.project = nn.Linear(width, dim)
        self.bias = nn.Parameter(torch.zeros(size))
        self.dropout = nn.Dropout(dropout)

    @property
    def size(self) -> int:
        """V."""
        return self.embedding.num_embeddings

    @property
    def memory(self) -> int:
        """Numbers that a row remembers: 2H."""
        return 2 * self.lstm.hidden_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Sentences long[B, S], BOS first -> logits [B, S, V] of the token after each; to train."""
        x = self.dropout(self.embedding(tokens))
        return self.logits(self.dropout(self.lstm(x)[0]))

    def logits(self, h: Tensor) -> Tensor:
        """h [..., H] -> [..., V]."""
        return F.linear(self.dropout(self.project(h)), self.embedding.weight, self.bias)

    def step(self, memory: Tensor, token: Tensor) -> Tensor:
        """memory [R, 2H], token long[R] that is said -> memory [R, 2H]."""
        start = self.start()
        return self.cell(memory + start, token) - start

    def after(self, memory: Tensor) -> Tensor:
        """memory [R, 2H] -> log-probabilities of the next token, [R, V]."""
        h, _ = (memory + self.start()).chunk(2, 1)
        return self.logits(h).log_softmax(-1)

    def start(self) -> Tensor:
        """State and cell after BOS, [1, 2H]."""
        nothing = self.bias.new_zeros(1, self.memory)
        return self.cell(nothing, torch.full((1,), BOS, device=nothing.device))

    def cell(self, state: Tensor, token: Tensor) -> Tensor:
        """One step of the LSTM: state [R, 2H], token long[R] -> [R, 2H]."""
        (into_x, into_h, bias_x, bias_h), (h, c) = self.lstm.all_weights[0], state.chunk(2, 1)
        gates = F.linear(self.embedding(token), into_x, bias_x) + F.linear(h, into_h, bias_h)
        into, forget, new, out = gates.chunk(4, 1)
        c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
        return torch.cat([out.sigmoid() * c.tanh(), c], 1)
