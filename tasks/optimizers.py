"""Muon: momentum whose step on a matrix has all its singular values near one.

After Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"). A matrix then
learns in all its directions at the same rate, which pays most where steps are few. Embeddings,
heads and vectors stay with AdamW. Here every parameter is a stack of matrices [..., rows, columns].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moshi_cli.tasks.machine import bf16_kernels


def orthogonalized(matrix: Tensor, rounds: int) -> Tensor:
    """[..., M, N] -> the same with singular values near one, by Newton-Schulz in bfloat16
    (float32 where that is quicker)."""
    type_ = torch.bfloat16 if bf16_kernels(matrix.device) else torch.float32
    x = (matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(type_)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(rounds):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def as_matrix(name: str, module: nn.Module, p: Tensor) -> tuple[int, ...] | None:
    """The shape in which a parameter is a stack of matrices; None if it is none.

    The taps of a convolution belong to its columns; a 3-D weight elsewhere is a stack.
    """
    if name.split(".")[-1] != "weight" or p.dim() < 2:
        return None
    convolution = isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    shape = (len(p), p[0].numel()) if convolution else tuple(p.shape)
    return shape if min(shape[-2:]) > 1 else None


class Muon(torch.optim.Optimizer):
    """Parameters are given with the shape `as_matrix` found for each."""

    def __init__(
        self,
        parameters: Iterable[tuple[nn.Parameter, tuple[int, ...]]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rounds: int = 5,
    ):
        pairs = list(parameters)
        self.shapes = dict(pairs)
        self.momentum, self.rounds = momentum, rounds
        super().__init__([p for p, _ in pairs], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; Nesterov momentum."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - self.momentum)
                update = p.grad.lerp(mean, self.momentum).view(self.shapes[p])
                update = orthogonalized(update, self.rounds)
                rows, columns = update.shape[-2:]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
