"""A recurrent language model of text tokens: what is usually said after all that was said so far.

One LSTM layer between an embedding and the same embedding again (Sundermeyer et al. 2012; Press and
Wolf 2017). N-grams know the last words by heart, this one remembers a whole sentence; together they
foretell more than either (ngram.py). It is stepped by the search whenever a hypothesis says
something: 512 wide, some 0.015 of a frame's time on one CPU core.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core.text import BOS


class Recurrent(nn.Module):
    """log p(token | the tokens since the beginning of a sentence).

    The memory of R rows is one tensor [R, M]: state and cell of the layer, what the next token's
    embedding is compared with, and the logarithm that makes a probability of it, side by side. It
    is kept as the difference from where a sentence begins: zeros begin one.
    """

    begin: Tensor  # [1, M], derived: where a sentence begins
    enter: Tensor  # [4H, D], derived: the layer's weights, which torch.compile cannot read there
    stay: Tensor  # [4H, H]
    rest: Tensor  # [4H]

    def __init__(self, size: int, dim: int, width: int, dropout: float = 0.0):
        """size: of the vocabulary V. dim: D of its embedding. width: H of the layer."""
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.lstm = nn.LSTM(dim, width, batch_first=True)
        self.project = nn.Linear(width, dim)
        self.bias = nn.Parameter(torch.zeros(size))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("begin", torch.zeros(1, 2 * width + dim + 1), persistent=False)
        for name, shape in (("enter", (dim,)), ("stay", (width,)), ("rest", ())):
            self.register_buffer(name, torch.zeros(4 * width, *shape), persistent=False)

    @property
    def memory(self) -> int:
        """M = 2H + D + 1."""
        return self.begin.shape[1]

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive what is derived; call after the weights changed (loading, training)."""
        self.enter, self.stay, *biases = (weight.detach() for weight in self.lstm.all_weights[0])
        self.rest = biases[0] + biases[1]
        nothing = torch.zeros_like(self.begin)
        self.begin = nothing  # of which `step` makes the memory after BOS
        self.begin = self.step(nothing, torch.full((1,), BOS, device=nothing.device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Sentences long[B, S], BOS first -> logits [B, S, V] of the token after each; to train."""
        h = self.dropout(self.lstm(self.dropout(self.embedding(tokens)))[0])
        return self.logits(self.dropout(self.project(h)))

    def logits(self, y: Tensor) -> Tensor:
        """y [..., D] -> [..., V]."""
        return F.linear(y, self.embedding.weight, self.bias)

    def step(self, memory: Tensor, token: Tensor) -> Tensor:
        """memory [R, M], token long[R] that is said -> memory [R, M]."""
        width, state = self.stay.shape[1], memory + self.begin
        h, c = state[:, :width], state[:, width : 2 * width]
        gates = F.linear(self.embedding(token), self.enter, self.rest) + F.linear(h, self.stay)
        take, keep, new, give = gates.chunk(4, 1)
        c = keep.sigmoid() * c + take.sigmoid() * new.tanh()
        h = give.sigmoid() * c.tanh()
        y = self.project(h)
        total = self.logits(y).logsumexp(1, keepdim=True)
        return torch.cat([h, c, y, total], 1) - self.begin

    def after(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """memory [R, M], tokens long[R, k] -> how likely each of them is next, [R, k] in nats."""
        state, dim = memory + self.begin, self.embedding.embedding_dim
        y, total = state[:, -dim - 1 : -1], state[:, -1:]
        return (self.embedding(tokens) @ y[:, :, None])[..., 0] + self.bias[tokens] - total
