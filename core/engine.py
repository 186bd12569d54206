"""The engine: B slots, each a conversation, one loop for recognition, synthesis and dialogue.

A frame: encode what is heard -> one step of the language model -> decode what is said. It is one
graph, all masked, without host sync. Tasks differ only in the `Task` value and in the steering of
text. `open` rewinds a slot and primes it: step 0 needs no sound, so the first frame given is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moshi_cli.core.conditioning import Conditions, Value
from moshi_cli.core.config import Sampling
from moshi_cli.core.errors import UsageError
from moshi_cli.core.mimi import MimiState
from moshi_cli.core.search import Search
from moshi_cli.core.state import State, keep
from moshi_cli.core.stepper import Steer, Stepper, StepState
from moshi_cli.core.streams import DelayPattern, Role, Task

if TYPE_CHECKING:
    from moshi_cli.core.weights import Model

# What upstream's tools tell a model that can be told, and what its null half of guidance is told.
USUAL = {"description": "very_good", "control": "ok", "cfg": "2.0"}
USUAL_NULL = {"description": "very_bad"}


@dataclass
class EngineState(State):
    """All that an engine remembers; `take` and `put` move a session in and out."""

    step: StepState  # of shifts · beam rows per slot, if there is a search
    mimi: MimiState  # of `shifts` rows per slot
    late: Tensor | None  # [B, 1, 1920], the frame heard before, if shifted sound is heard
    beam: int = 1
    shifts: int = 1

    def reset(self, slots: Tensor) -> None:
        """Rewind the slots marked in bool[B]."""
        self.step.reset(slots.repeat_interleave(self.shifts * self.beam))
        self.mimi.reset(slots.repeat_interleave(self.shifts))
        if self.late is not None:
            self.rewind(self.late, slots)

    def take(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot, its null half included; not of a search."""
        assert self.shifts * self.beam == 1
        saved = super().take(slot)
        slots = len(self.step.seed)
        for path, tensor in self.tensors().items():
            if len(tensor) == 2 * slots:
                saved[path + "/null"] = tensor[slot + slots].clone()
        return saved

    def put(self, slot: int, saved: dict[str, Tensor]) -> None:
        """Restore what `take` gave, in an engine of the same model, task and sampling."""
        super().put(slot, {k: v for k, v in saved.items() if not k.endswith("/null")})
        mine, slots = self.tensors(), len(self.step.seed)
        for path, tensor in saved.items():
            if path.endswith("/null"):
                mine[path.removesuffix("/null")][slot + slots].copy_(tensor)


@dataclass
class Frame:
    """What a step gave. Rows that are not ready are padding."""

    text: Tensor  # long[B]: the text token of this frame
    codes: Tensor  # long[B, Q]: the codes of the voice made, if any
    pcm: Tensor | None  # float32 [B, 1, 1920]: its sound, if a voice is made and decoded
    ready: Tensor  # bool[B]: whether the slot has a frame
    extra: Tensor | None  # [B, heads, classes]: probabilities of extra heads, of the newest step


class Engine:
    """One model doing one task in `slots` independent slots."""

    def __init__(
        self,
        model: Model,
        task: Task,
        slots: int = 1,
        *,
        sampling: Sampling | None = None,
        steer: Steer | None = None,
        codebooks: int | None = None,
        prompt_frames: int = 0,
        hide_prompt: bool = False,
        exact_window: bool = True,
        decode: bool = True,
        compile: bool = False,
    ):
        """sampling: if None, the model's for this task. steer: needed where the task steers text.

        codebooks: make only so many (quicker, coarser). prompt_frames: room for audio prompts;
        hide_prompt: the null half of guidance does not see them. exact_window: see Mimi.init_state.
        decode: codes become sound; without, they do not.
        """
        assert model.lm is not None
        self.model, self.task = model, task
        self.pattern = DelayPattern.of(task, model.lm.config, codebooks)
        self.sampling = sampling or model.config.sampling_of(task.name)
        self.beam, self.shifts, search = self.sampling.beam, self.sampling.shifts, None
        if self.beam > 1:
            if self.pattern.made != (0,) or steer is not None or self.sampling.guided:
                raise UsageError(f"a search is for tasks that write only, not for {task.name!r}")
            search = Search(model.lm.config, self.sampling, model.ngram)
        self.stepper = Stepper(
            model.lm, self.pattern, self.sampling,
            steer=steer, search=search, hide_prompt=hide_prompt,
        )  # fmt: skip
        self.stepper.latency = max(1, self.stepper.latency)  # priming never has output
        heard = {task.voice, task.partner} - {Role.ABSENT}
        if Role.GIVEN in heard and task.voice is task.partner:
            raise UsageError("an engine hears one voice")
        self.hears, self.decodes = Role.GIVEN in heard, decode
        self.slots, self.each = slots, self.shifts * self.beam  # rows of a slot
        step = self.stepper.init_state(slots * self.each, prompt_frames=prompt_frames)
        mimi = model.mimi.init_state(
            slots * self.shifts, device=model.device, exact_window=exact_window
        )
        late = None
        if self.shifts > 1:
            late = torch.zeros(slots, 1, self.frame_samples, device=model.device)
        self.state = EngineState(step, mimi, late, self.beam, self.shifts)
        self._frame: Callable[..., Frame] = self.frame
        if compile:
            self._frame = torch.compile(self.frame, fullgraph=True, dynamic=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def frame_samples(self) -> int:
        """Samples per step."""
        return self.model.mimi.frame_samples

    @torch.no_grad()
    def open(
        self,
        slot: int,
        *,
        conditions: Mapping[str, Value] | None = None,
        null: Mapping[str, Value] | None = None,
        prompt: Tensor | None = None,
        script: Any = None,
        seed: int = 0,
        prime: bool = True,
    ) -> None:
        """Start a new session in a slot.

        conditions: what the model is told (missing: the usual); null: what the null half of
        guidance is told. prompt: long[K, T], frames the model is made to say (-1: nothing). script:
        for the steer's `load`. seed: of this session's sampling. prime=False: call `prime` later,
        once for many slots.
        """
        self.state.reset(self.only(slot))
        step = self.state.step
        step.seed[self.rows(slot)] = seed
        self.tell(slot, conditions or {}, null or {})
        if prompt is not None:
            assert step.prompt is not None and prompt.shape[1] <= step.prompt.tokens.shape[2]
            step.prompt.load(slot, prompt, self.pattern, self.task.lag_frames)
        if script is not None:
            assert self.stepper.steer is not None and step.steer is not None
            self.stepper.steer.load(step.steer, slot, script)
        if prime:
            self.prime(self.only(slot))

    def only(self, slot: int) -> Tensor:
        """bool[B] with one slot set."""
        if not 0 <= slot < self.slots:
            raise UsageError(f"slot {slot} of an engine with {self.slots}")
        return torch.arange(self.slots, device=self.device) == slot

    def rows(self, slot: int) -> list[int]:
        """Its rows of the language model: hypotheses, of a search."""
        return list(range(slot * self.each, (slot + 1) * self.each))

    def prime(self, slots: Tensor) -> None:
        """Do step 0 of the slots marked in bool[B] that have not done it."""
        self.step(None, slots & (self.state.step.clock[:: self.each] == 0))

    def close(self, slot: int) -> None:
        """End the session of a slot: forget it all."""
        self.state.reset(self.only(slot))

    def tell(self, slot: int, conditions: Mapping[str, Value], null: Mapping[str, Value]) -> None:
        """Write the conditions of one slot, and of its null half if there is one."""
        lm, step = self.stepper.lm, self.state.step
        if not lm.config.conditions:
            lm.conditioning.encode([conditions])  # names what is not known
            return
        lag = {"lag": str(self.task.lag_frames)}
        known = {c.name: c.values for c in lm.config.conditions}

        def usual(words: Mapping[str, str]) -> dict[str, Value]:
            return {name: w for name, w in words.items() if w in known.get(name, ())}

        values: list[Mapping[str, Value]] = [{**usual({**USUAL, **lag}), **conditions}]
        at = self.rows(slot)
        if self.sampling.guided:
            values.append({**usual(USUAL_NULL), **null})
            at.append(slot + self.slots)
        fused = lm.condition(values)
        if step.conditions is None:
            step.conditions = room(fused, self.slots * len(at))
        for (path, mine), new in zip(
            step.conditions.tensors().items(), fused.tensors().values(), strict=True
        ):
            if mine.shape[1:] != new.shape[1:]:
                raise UsageError(f"conditions of all slots must be of one length ({path})")
            mine[at] = new  # the same for all rows of a search

    def frame(
        self,
        state: EngineState,
        pcm: Tensor | None,
        codes: Tensor | None,
        active: Tensor,
        end: Tensor | None,
    ) -> Frame:
        """One frame as a pure function of tensors: see `step`."""
        mimi, stepper = self.model.mimi, self.stepper
        given, residual = codes, None
        if self.hears and given is None:
            assert pcm is not None
            listening = active & (state.step.clock[:: self.each] > 0)
            if end is not None:
                listening = listening & ~end
            pcm = self.shifted(pcm, state.late, listening)
            listening = listening.repeat_interleave(self.shifts)
            count = len(self.pattern.given)
            if state.step.residual is None:
                heard = mimi.encode(pcm, state.mimi.encoder, listening)
            else:
                heard, residual = mimi.encode_whole(pcm, state.mimi.encoder, listening)
                residual = residual[..., 0]
            given = heard[:, :count, 0]
        given, residual, rows, end = (self.spread(x) for x in (given, residual, active, end))
        assert rows is not None
        if given is not None and end is not None:
            given = torch.where(end[:, None], stepper.lm.config.codebook_size, given)
            residual = None if residual is None else residual.masked_fill(end[:, None], 0)
        done = stepper.step(state.step, given, rows, residual)
        made, ready = done.frame[:: self.each], done.ready[:: self.each]
        text = (
            made[:, 0] if 0 in self.pattern.made else torch.full_like(active, -1, dtype=made.dtype)
        )
        said = made[:, 1:] if 0 in self.pattern.made else made
        sound, extra = None, None
        if stepper.codebooks and self.decodes:
            tokens = said.clamp(0, stepper.lm.config.codebook_size - 1)
            sound = mimi.decode(tokens[..., None], state.mimi.decoder, ready)
            sound = torch.where(ready[:, None, None], sound, 0.0)
        if stepper.lm.extra:
            extra = stepper.lm.extra_probabilities(done.h[: len(rows) : self.each, None])[:, 0]
        return Frame(text, said, sound, ready, extra)

    def spread(self, x: Tensor | None) -> Tensor | None:
        """What belongs to slots, or to what each hears, for all rows of the language model."""
        rows = self.slots * self.each
        return x if x is None or len(x) == rows else x.repeat_interleave(rows // len(x), 0)

    def shifted(self, pcm: Tensor, late: Tensor | None, listening: Tensor) -> Tensor:
        """pcm [B, 1, S] of the slots that listen, bool[B], and the frame before, which it becomes
        -> [B · shifts, 1, S]: the sound as it comes, a part of a frame later, and so on."""
        if late is None:
            return pcm
        size, sound = pcm.shape[2], torch.cat([late, pcm], 2)
        starts = [size - size * i // self.shifts for i in range(self.shifts)]
        keep(late, pcm, listening)
        return torch.stack([sound[..., at : at + size] for at in starts], 1).flatten(0, 1)

    @torch.no_grad()
    def step(
        self,
        pcm: Tensor | None = None,
        active: Tensor | None = None,
        *,
        codes: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Frame:
        """One frame of the active slots.

        pcm float32 [B, 1, 1920], what the given voice says, or codes long[B, Q] instead. active
        bool[B], all if None: the others neither hear nor move. end bool[B]: slots whose voice is
        over, they are told so by start tokens instead of sound (Hibiki).
        """
        B, device = self.slots, self.device
        active = torch.ones(B, dtype=torch.bool, device=device) if active is None else active
        if self.hears and pcm is None and codes is None:
            pcm = torch.zeros(B, 1, self.frame_samples, device=device)
        if pcm is not None:
            assert pcm.shape == (B, 1, self.frame_samples), pcm.shape
            pcm = pcm.to(device)
        if codes is not None:
            assert codes.shape == (B, len(self.pattern.given)), codes.shape
        return self._frame(self.state, pcm if self.hears else None, codes, active.to(device), end)


def room(conditions: Conditions, rows: int) -> Conditions:
    """Zeros for `rows` slots in the shape of given conditions."""

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(rows, *x.shape[1:])

    return Conditions(
        None if conditions.sum is None else zeros(conditions.sum),
        [replace(c, k=zeros(c.k), v=zeros(c.v)) for c in conditions.cross],
    )
