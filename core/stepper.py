"""One frame of a language model at the level of tokens: read a column, predict the next, write it.

What `Engine` runs between the codec's two halves. Everything is masked and nothing changes shape,
so a step is one graph. Slots are independent: a paused slot computes but does not move, and step 0
of a slot reads start tokens only, whatever is given (priming).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moshi_cli.core.attention import TransformerState
from moshi_cli.core.conditioning import Conditions
from moshi_cli.core.config import Sampling
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.sampling import Noise, choose, guide
from moshi_cli.core.search import HOLD, OWN, Search, SearchState
from moshi_cli.core.state import State
from moshi_cli.core.streams import UNKNOWN, ZERO, DelayPattern, DelayRing, ResidualTail, Role


class Steer(Protocol):
    """Stands between the sampled text and what is fed: a tensor function, no host sync."""

    def init_state(self, slots: int, device: torch.device | str) -> State:
        """Fresh state."""
        ...

    def load(self, state: State, slot: int, script: Any) -> None:
        """Give a slot what it is to say."""
        ...

    def __call__(self, text: Tensor, state: State, step: Tensor, active: Tensor) -> Tensor:
        """text long[B] (sampled), step long[B], active bool[B] -> text to feed long[B]."""
        ...


@dataclass
class Prompt(State):
    """Tokens that a slot is made to say, in delayed time."""

    tokens: Tensor  # long[B, K, P]: cell s replaces what step s predicts; UNKNOWN: free
    until: Tensor  # long[B]: the null half of guidance sees nothing before (plus a row's delay)

    def rewind(self, tensor: Tensor, slots: Tensor) -> None:
        empty = UNKNOWN if tensor is self.tokens else -(2**40)
        tensor.masked_fill_(slots.view(-1, *[1] * (tensor.dim() - 1)), empty)

    def load(self, slot: int, codes: Tensor, pattern: DelayPattern, lag_frames: int) -> None:
        """codes long[K, T]: made rows of frames 0 to T - 1; ZERO forces silence."""
        for k in pattern.made:
            at = pattern.delays[k]
            self.tokens[slot, k, at : at + codes.shape[1]] = codes[k].to(self.tokens.device)
        self.until[slot] = codes.shape[1] + max(-lag_frames, 0)


@dataclass
class StepState(State):
    """All that the token level of B slots remembers."""

    lm: TransformerState  # of 2B slots if guided: the null half last
    ring: DelayRing
    seed: Tensor  # long[B]
    conditions: Conditions | None
    prompt: Prompt | None
    steer: State | None
    residual: ResidualTail | None  # of models that hear it, if a voice is given
    search: SearchState | None

    @property
    def clock(self) -> Tensor:
        """Steps done, long[B]."""
        return self.lm.clock[: len(self.seed)]

    def reset(self, slots: Tensor) -> None:
        """Rewind the slots marked in bool[B]; seeds and conditions stay."""
        times = len(self.lm.clock) // len(self.seed)
        self.lm.reset(slots.repeat(times))
        for part in (self.prompt, self.steer, self.residual, self.search):
            if part is not None:
                part.reset(slots)


@dataclass
class Step:
    """What one step did. Logits are float32, those that were chosen from."""

    inputs: Tensor  # long[B, K]
    h: Tensor  # [B, D] ([2B, D] if guided)
    text_logits: Tensor  # [B, V]
    sampled: Tensor  # long[B]: text before steering
    text: Tensor  # long[B]: text fed
    audio_logits: Tensor | None  # [B, Q, C]
    codes: Tensor  # long[B, Q], delayed time
    frame: Tensor  # long[B, made rows]: the newest whole frame, re-aligned; UNKNOWN if none
    ready: Tensor  # bool[B]: there is one


class Stepper:
    """A language model doing one task, with one way of sampling."""

    def __init__(
        self,
        lm: MoshiLm,
        pattern: DelayPattern,
        sampling: Sampling,
        *,
        steer: Steer | None = None,
        search: Search | None = None,
        hide_prompt: bool = False,
    ):
        """hide_prompt: the null half of guidance does not see the prompt. search: chooses the text
        of slots in groups."""
        assert pattern.roles[0] is not Role.GIVEN or not lm.config.dep_q, (
            "text given while speaking"
        )
        assert (steer is not None) == (pattern.roles[0] is Role.STEERED), pattern.roles[0]
        self.lm, self.pattern, self.sampling = lm, pattern, sampling
        self.steer, self.search, self.hide_prompt = steer, search, hide_prompt
        device = lm.like.device
        self.given = torch.tensor(pattern.given, dtype=torch.long, device=device)
        self.made = torch.tensor(pattern.made, dtype=torch.long, device=device)
        self.delays = torch.tensor(lm.config.delays, device=device)  # without the task's lag
        self.codebooks = sum(k > 0 for k in pattern.made)
        self.latency = pattern.latency + (0 if search is None else HOLD)

    def init_state(self, slots: int, *, prompt_frames: int = 0) -> StepState:
        """Fresh state; prompt_frames: room for prompts (0: none)."""
        like, twice = self.lm.like, 2 if self.sampling.guided else 1
        device = like.device
        prompt = None
        if prompt_frames:
            size = (slots, self.lm.config.streams, prompt_frames + self.pattern.span)
            tokens = torch.full(size, UNKNOWN, device=device)
            prompt = Prompt(tokens, torch.full((slots,), -(2**40), device=device))
        lm = self.lm.init_state(slots * twice, dtype=like.dtype, device=device)
        if self.search is not None:
            lm.group, lm.own = self.search.beam, OWN
        return StepState(
            lm=lm,
            ring=DelayRing.of(self.pattern, slots, device, 0 if self.search is None else HOLD),
            seed=torch.arange(slots, device=device),
            conditions=None,
            prompt=prompt,
            steer=None if self.steer is None else self.steer.init_state(slots, device),
            residual=(
                ResidualTail.of(self.pattern, slots, like, self.lm.config.residual)
                if self.lm.config.residual and any(self.pattern.given)
                else None
            ),
            search=None if self.search is None else self.search.init_state(slots, device),
        )

    def forced(self, state: StepState, clock: Tensor) -> Tensor | None:
        """What the prompt wants step `clock` to say. -> long[B, K] or None"""
        if state.prompt is None:
            return None
        tokens = state.prompt.tokens
        at = clock.clamp(max=tokens.shape[2] - 1)[:, None, None].expand(-1, tokens.shape[1], 1)
        inside = (clock < tokens.shape[2])[:, None]
        return torch.where(inside, tokens.gather(2, at)[..., 0], UNKNOWN)

    def null_inputs(self, inputs: Tensor, state: StepState, clock: Tensor) -> Tensor:
        """What the null half of guidance reads. long[B, K] -> long[B, K]"""
        hidden = torch.zeros_like(inputs, dtype=torch.bool)
        if self.hide_prompt and state.prompt is not None:
            hidden |= clock[:, None] <= self.delays + state.prompt.until[:, None]
        if not self.sampling.guide_text:
            hidden[:, 0] = True
        return torch.where(hidden & (clock[:, None] > self.delays), ZERO, inputs)

    def step(
        self,
        state: StepState,
        given: Tensor | None,
        active: Tensor,
        residual: Tensor | None = None,
    ) -> Step:
        """One step of the active slots.

        given long[B, G]: the rows of `pattern.given`, frame clock - 1; not looked at in step 0.
        residual [B, 2 · dim]: what these codes leave, for models that hear it.
        """
        s, ring = self.sampling, state.ring
        clock = state.clock.clone()
        if len(self.pattern.given):
            assert given is not None and given.shape[1] == len(self.pattern.given)
            ring.write(self.given, clock[:, None] + ring.grid.delays[self.given], given,
                       active & (clock > 0))  # fmt: skip
        inputs = ring.read(clock)
        column, on, heard = inputs, active, None
        if state.residual is not None:
            heard = state.residual.push(residual, active & (clock > 0))
        if s.guided:
            column = torch.cat([inputs, self.null_inputs(inputs, state, clock)])
            on = torch.cat([active, active])
            heard = None if heard is None else torch.cat([heard, heard])
        h, logits = self.lm.temporal(column[..., None], state.lm, on, state.conditions, heard)
        h, logits = h[:, 0], logits[:, 0]
        if s.guided:
            logits = guide(logits, s.guidance) if s.guide_text else logits[: len(active)]
        logits = logits.float()
        if s.pad_bonus:
            pad = torch.arange(logits.shape[1], device=logits.device) == self.lm.config.text_pad
            logits = logits + s.pad_bonus * pad
        noise = Noise(state.seed, clock)
        if self.search is not None:
            sampled = self.search(logits, state, clock, active, self.latency)
        else:
            sampled = choose(logits, s.text_temp, s.text_top_k, s.top_p, noise, 0)
        text, forced = sampled, self.forced(state, clock)
        free = active if forced is None else active & (forced[:, 0] == UNKNOWN)
        if self.steer is not None and state.steer is not None:
            text = self.steer(sampled, state.steer, clock, free)
        if self.pattern.roles[0] is Role.ABSENT:
            text = torch.full_like(sampled, ZERO)
        if forced is not None:
            text = torch.where(forced[:, 0] == UNKNOWN, text, forced[:, 0])
        codes, audio_logits = text[:, None][:, :0], None
        if self.codebooks:
            assert self.lm.depth is not None
            codes, audio_logits = self.lm.depth.sample(h, text, s, noise, self.codebooks)
            if forced is not None:
                wanted = forced[:, 1 : 1 + self.codebooks]
                codes = torch.where(wanted == UNKNOWN, codes, wanted)
        column = torch.cat([text[:, None], codes], 1) if 0 in self.pattern.made else codes
        after = clock + 1
        ring.write(self.made, after[:, None].expand(-1, column.shape[1]), column, active)
        frame, ready = ring.out(self.made, after, self.latency)
        return Step(inputs, h, logits, sampled, text, audio_logits, codes, frame, ready & active)
