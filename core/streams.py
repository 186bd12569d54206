"""Who fills which stream, and by how many frames each stream is late.

Everything is a grid of integers [B, K, T]: a column per frame of 80 ms, a row per stream. Text
comes first, then the codebooks of `voice` (the voice that the text writes down), then those of
`partner` (the other side). A `Task` says which rows are given and which are sampled, and one
signed lag between text and voice. A `DelayPattern` is derived from the task and the checkpoint; it
is the only code that shifts anything: `shift` for training, `DelayRing` for streaming, with equal
columns (paper §3.4.4).

Two times: frame t of stream k is predicted at step t + delays[k] and read as input one step later.
Step 0 reads start tokens only, so it needs no sound: that is how a stream is primed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.errors import ModelError
from moshi_cli.core.state import State, keep

if TYPE_CHECKING:
    from moshi_cli.core.config import LmConfig

FRAME_HZ = 12.5
ZERO = -1  # "nothing here": the embedding is zero, there is no target
UNKNOWN = -2  # not yet known; never fed to the model
FOREVER = 2**40  # a step that never comes


class Role(Enum):
    """What happens to a stream."""

    ABSENT = "absent"  # not part of the task: zero embedding throughout
    GIVEN = "given"  # comes from outside, frame by frame
    SAMPLED = "sampled"  # predicted and fed back
    STEERED = "steered"  # predicted, then replaced by a script (the words of a TTS)


MADE = (Role.SAMPLED, Role.STEERED)


@dataclass(frozen=True)
class Task:
    """Which streams are given, which are sampled, and how far text and voice are apart."""

    name: str
    text: Role  # the words
    voice: Role  # the voice those words write down
    partner: Role = Role.ABSENT  # the other side of the conversation
    lag_s: float = 0.0  # > 0: text trails the voice; < 0: the voice trails the text

    @property
    def lag_frames(self) -> int:
        """Whole frames, truncated towards zero as the published models do."""
        return int(self.lag_s * FRAME_HZ)


@dataclass
class Shifted:
    """Training view of a batch: S steps, each predicting one column of the delayed grid."""

    inputs: Tensor  # long[B, K, S]: what step s reads
    targets: Tensor  # long[B, K, S]: what step s + 1 reads; a target where mask, else only context
    mask: Tensor  # bool[B, K, S]: positions that carry a target
    residual: Tensor | None = None  # [B, 2 · dim, S]: what step s hears beside the given codes
    worth: Tensor | None = None  # [B, K, S]: what a target counts beside the others; None: 1


@dataclass(frozen=True)
class DelayPattern:
    """How late each stream reaches the model. All tuples have one entry per stream, text first.

    delays[k]: frames by which stream k is late. Step s ≤ starts[k] reads the start token, step
    s ≤ mutes[k] reads nothing, later steps read frames. starts ≤ mutes, and mutes = delays but for
    two cases: FOREVER for rows that take no part, and starts for the text of published STT models,
    which hear the tokens they sample during the lag.
    """

    delays: tuple[int, ...]
    starts: tuple[int, ...]
    mutes: tuple[int, ...]
    tokens: tuple[int, ...]  # start token per stream
    roles: tuple[Role, ...]

    @classmethod
    def of(cls, task: Task, lm: LmConfig, codebooks: int | None = None) -> DelayPattern:
        """The pattern of a task on a checkpoint; ModelError if it cannot do the task.

        codebooks: use only so many of the voice's codebooks (the rest stays silent).
        """
        voice_q = lm.voice_q if codebooks is None else codebooks
        if not 1 <= voice_q <= lm.voice_q:
            raise ModelError(f"{voice_q} codebooks asked for, the model has {lm.voice_q}")
        if task.voice in MADE and not lm.dep_q:
            raise ModelError(f"this model writes but does not speak: it cannot do {task.name!r}")
        if task.partner in MADE:
            raise ModelError("the partner's voice cannot be sampled")
        if task.partner is Role.GIVEN and not lm.partner_q:
            raise ModelError(f"this model hears one voice only: it cannot do {task.name!r}")
        if Role.STEERED in (task.voice, task.partner):
            raise ModelError("only text can be steered")
        lag = task.lag_frames
        silent = lm.voice_q - voice_q
        roles = [task.text, *[task.voice] * voice_q, *[Role.ABSENT] * silent]
        roles += [task.partner] * lm.partner_q
        late = [max(lag, 0), *[max(-lag, 0)] * lm.voice_q, *[0] * lm.partner_q]
        there = [task.text, *[task.voice] * lm.voice_q, *[task.partner] * lm.partner_q]
        starts, delays, mutes = [], [], []
        for k, role in enumerate(roles):
            absent = role is Role.ABSENT
            starts.append(lm.delays[k] if there[k] is not Role.ABSENT else ZERO)
            delays.append(0 if absent else lm.delays[k] + late[k])
            mutes.append(FOREVER if absent else delays[k])
        if lm.hears_lag and lag > 0:
            mutes[0] = starts[0]
        return cls(tuple(delays), tuple(starts), tuple(mutes), lm.start_tokens, tuple(roles))

    @property
    def span(self) -> int:
        """Longest delay in frames."""
        return max(self.delays)

    @property
    def made(self) -> tuple[int, ...]:
        """Rows that the model fills."""
        return tuple(k for k, role in enumerate(self.roles) if role in MADE)

    @property
    def given(self) -> tuple[int, ...]:
        """Rows that come from outside."""
        return tuple(k for k, role in enumerate(self.roles) if role is Role.GIVEN)

    @property
    def latency(self) -> int:
        """Steps between the first prediction of a frame and its last: output is that late."""
        return max((self.delays[k] for k in self.made), default=0)

    def grid(self, device: torch.device | str = "cpu") -> Grid:
        """The same numbers as tensors."""

        def row(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return Grid(row(self.delays), row(self.starts), row(self.mutes), row(self.tokens))

    def halves(self) -> tuple[int, int]:
        """How late the two halves of the given voice's residual are: as its first and its last
        codebook."""
        rows = [k for k in self.given if k]
        return (self.delays[rows[0]], self.delays[rows[-1]]) if rows else (0, 0)

    def shift(
        self,
        codes: Tensor,
        steps: int | None = None,
        residual: Tensor | None = None,
        worth: Tensor | None = None,
    ) -> Shifted:
        """codes long[B, K, T], ZERO where unknown -> inputs, targets, mask, each [B, K, S].

        S = T + span, so that every frame is predicted once; `steps` cuts to fewer. residual
        [B, 2 · dim, T]: what the codes of the given voice leave. worth [B, T]: of the frames of the
        voice that is made; text counts as it is.
        """
        B, K, T = codes.shape
        assert len(self.delays) == K, (len(self.delays), codes.shape)
        grid, S = self.grid(codes.device), T + self.span if steps is None else steps
        step = torch.arange(S + 1, device=codes.device)
        frame = step - 1 - grid.delays[:, None]  # [K, S + 1]: what step s reads
        inside = (frame >= 0) & (frame < T)
        delayed = codes.gather(2, frame.clamp(0, T - 1).expand(B, K, S + 1))
        delayed = torch.where(inside, delayed, ZERO)
        is_head, token = grid.head(step)  # [S + 1, K]
        columns = torch.where(is_head.T, token.T, delayed)  # [B, K, S + 1]
        mask = inside & (delayed != ZERO) & ~(grid.mutes >= FOREVER)[:, None]
        if residual is not None:
            late = zip(residual.chunk(2, 1), self.halves(), strict=True)
            residual = torch.cat([F.pad(x, (1 + d, S))[..., :S] for x, d in late], 1)
        if worth is not None:
            worth = worth[:, frame[:, 1:].clamp(0, T - 1)]  # [B, K, S]
            worth[:, 0] = 1
        return Shifted(columns[..., :-1], columns[..., 1:], mask[..., 1:], residual, worth)


@dataclass
class Grid:
    """A DelayPattern on a device. Each long[K]."""

    delays: Tensor
    starts: Tensor
    mutes: Tensor
    tokens: Tensor

    def head(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """step long[B] -> is_head bool[B, K]: no frame to read; token long[B, K]: instead."""
        s = step[:, None]
        return s <= self.mutes, torch.where(s <= self.starts, self.tokens, ZERO)


@dataclass
class ResidualTail(State):
    """The latest residuals of the given voice, until their codes are due."""

    x: Tensor  # [B, n, 2 · dim], newest last
    late: tuple[int, int]  # frames by which the halves are late

    @classmethod
    def of(cls, pattern: DelayPattern, slots: int, like: Tensor, dim: int) -> ResidualTail:
        """Nothing heard yet."""
        late = pattern.halves()
        return cls(like.new_zeros(slots, max(late) + 1, 2 * dim), late)

    def push(self, residual: Tensor | None, active: Tensor) -> Tensor:
        """residual [B, 2 · dim] of the frame that is given (None: not known), active bool[B] ->
        what this step hears [B, 1, 2 · dim]."""
        new = torch.zeros_like(self.x[:, 0]) if residual is None else residual.to(self.x)
        keep(self.x, torch.cat([self.x[:, 1:], new[:, None]], 1), active)
        first, second = self.x.chunk(2, 2)
        return torch.cat([first[:, -1 - self.late[0]], second[:, -1 - self.late[1]]], 1)[:, None]


@dataclass
class DelayRing(State):
    """What each coming step will read, while it is being filled. The LM's clock indexes it."""

    cells: Tensor  # long[B, K, L]; cell s % L belongs to step s
    grid: Grid

    @classmethod
    def of(
        cls, pattern: DelayPattern, slots: int, device: torch.device | str = "cpu", hold: int = 0
    ) -> DelayRing:
        """An empty ring, long enough to read back whole frames, `hold` steps after they are."""
        size = (slots, len(pattern.delays), 2 * pattern.span + 3 + hold)
        return cls(torch.full(size, UNKNOWN, device=device), pattern.grid(device))

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        """Nothing to clear: the head of the grid hides stale cells."""

    def write(self, rows: Tensor, at: Tensor, tokens: Tensor, active: Tensor) -> None:
        """Write tokens long[B, R] of rows long[R] for steps `at` long[B, R]; active bool[B]."""
        slot = torch.arange(len(at), device=at.device)[:, None]
        cell = at % self.cells.shape[2]
        old = self.cells[slot, rows, cell]
        self.cells[slot, rows, cell] = torch.where(active[:, None], tokens, old)

    def read(self, clock: Tensor) -> Tensor:
        """The input column of step clock long[B]. -> long[B, K]"""
        is_head, token = self.grid.head(clock)
        at = (clock % self.cells.shape[2])[:, None, None].expand(-1, self.cells.shape[1], 1)
        return torch.where(is_head, token, self.cells.gather(2, at)[..., 0])

    def out(self, rows: Tensor, clock: Tensor, latency: int) -> tuple[Tensor, Tensor]:
        """The newest whole frame of `rows` once step clock - 1 is done: frame clock - 1 - latency.

        -> tokens long[B, R] (UNKNOWN where not ready), ready bool[B]
        """
        slot = torch.arange(len(clock), device=clock.device)[:, None]
        at = clock[:, None] - latency + self.grid.delays[rows]
        ready = clock > latency
        tokens = self.cells[slot, rows, at % self.cells.shape[2]]
        return torch.where(ready[:, None], tokens, UNKNOWN), ready
