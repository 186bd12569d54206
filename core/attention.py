"""Causal, windowed self-attention and the transformer stack: one `forward`, files and streams.

Used by Mimi (encoder and decoder side, paper §3.3.1) and by the temporal transformer (§3.4). State
None: the whole sequence at once. With a state: T new steps per slot, keys kept in a ring. The stack
owns the only clock; mask, rotary angles and ring cells are computed once per call (`Window`) and
handed to every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core import native
from moshi_cli.core.config import TransformerConfig
from moshi_cli.core.layers import FEW, Angles, LayerScale, Linear, Rope, make_mlp, make_norm
from moshi_cli.core.state import KVCache, State, room

SHORT = 512  # keys up to which the scores of a window are kept for the backward pass
BLOCK = 64  # cells of a ring are looked at in such steps: kernels are made for each new length


@dataclass
class Window:
    """What every layer of a stack needs to know about the present call."""

    mask: Tensor  # bool[B|1, 1, T, keys]; keys: those of the ring that may be in use
    angles: Angles | None  # rotary
    cells: Tensor | None  # long[B, T]: ring cells to write; None offline
    slots: Tensor | None  # long[B, 1]: their slots
    at: int | None = None  # the first cell, if it is known and the others follow it in every slot


@dataclass
class CrossCache(State):
    """Keys and values of a cross-attention source, computed once per stream."""

    k: Tensor  # [B, N, H, Dh]
    v: Tensor  # [B, N, H, Dh]


@dataclass
class TransformerState(State):
    """Ring caches of a stack under one clock."""

    clock: Tensor  # long[B]: steps already consumed
    layers: list[KVCache]
    chunk: int  # longest call that keeps the window exact (0: never split, as upstream)
    group: int = 1  # so many slots each have the same keys, but for …
    own: int = 1  # … the latest of each, at least the one of the present step


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, T, Dh], k and v [B, H, keys, Dh], mask bool[B|1, 1, T, keys] -> [B, H, T, Dh].

    PyTorch's kernel converts half precision on a CPU to float32 number by number; for the few
    queries of a stream two products are several times as fast. The softmax is float32 in both. To
    learn from short windows two products take 0.34 to 0.55 of the time, forward and backward; they
    err by as much.
    """
    if q.device.type == "cpu" and q.dtype != torch.float32:
        if q.shape[2] <= FEW:
            scores = torch.matmul(q, k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            return torch.matmul(weights.to(v.dtype), v)
        if q.requires_grad and k.shape[2] <= SHORT:
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
            scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + bias
            return torch.matmul(scores.softmax(-1, dtype=q.dtype), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Self-attention, packed projections; grouped keys if kv_repeat > 1. [B, T, D] -> same."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.dim // config.heads
        self.kv_heads = config.heads // config.kv_repeat
        rows = config.dim + 2 * self.kv_heads * self.head_dim
        self.qkv = Linear(config.dim, rows)
        self.out = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, window: Window, rope: Rope | None, kv: KVCache | None) -> Tensor:
        (B, rows, D), T = x.shape, window.mask.shape[2]
        qkv = self.qkv(x).view(B, rows, -1, self.head_dim)
        if rows > T:
            qkv = qkv.narrow(1, 0, T)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        if rope is not None and window.angles is not None:
            qk = rope.rotate(qk, window.angles)
        q, k = qk.split([self.heads, self.kv_heads], 2)  # [B, T, H|Hkv, Dh]
        if kv is not None:
            assert window.cells is not None and window.slots is not None
            if window.at is None:
                kv.k[window.slots, :, window.cells] = k.to(kv.k.dtype)
                kv.v[window.slots, :, window.cells] = v.to(kv.v.dtype)
            else:  # one stretch is half the work
                kv.k.narrow(2, window.at, T).copy_(k.transpose(1, 2))
                kv.v.narrow(2, window.at, T).copy_(v.transpose(1, 2))
            keys = window.mask.shape[-1]
            k, v = kv.k.narrow(2, 0, keys).to(q.dtype), kv.v.narrow(2, 0, keys).to(q.dtype)
        else:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, keys, Dh]
        if self.kv_heads != self.heads:
            times = self.heads // self.kv_heads
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        y = attend(q.transpose(1, 2), k, v, window.mask).transpose(1, 2).reshape(B, T, D)
        return self.out(y if rows == T else y.repeat(1, rows // T, 1))


class CrossAttention(nn.Module):
    """Unmasked attention over a fixed source (speaker conditions of the TTS). [B, T, D] -> same."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.out = Linear(config.dim, config.dim)

    def prepare(self, source: Tensor) -> CrossCache:
        """source [B, N, D] -> keys and values for `forward`."""
        B, N, _ = source.shape
        k, v = self.kv(source).view(B, N, 2, self.heads, -1).unbind(2)
        return CrossCache(k, v)

    def forward(self, x: Tensor, source: CrossCache) -> Tensor:
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.heads, -1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), source.k.transpose(1, 2), source.v.transpose(1, 2)
        )
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    """Pre-norm block: self-attention, cross-attention if any, feed-forward."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = make_norm(config.norm, config.dim)
        self.attn = Attention(config)
        self.scale1 = LayerScale(config.dim, config.layer_scale)
        self.norm_cross = nn.LayerNorm(config.dim, eps=1e-5) if config.cross_attention else None
        self.cross = CrossAttention(config) if config.cross_attention else None
        self.norm2 = make_norm(config.norm, config.dim)
        self.mlp = make_mlp(config)
        self.scale2 = LayerScale(config.dim, config.layer_scale)

    def forward(
        self,
        x: Tensor,
        window: Window,
        rope: Rope | None,
        kv: KVCache | None,
        source: CrossCache | None,
    ) -> Tensor:
        x = x + self.scale1(self.attn(self.norm1(x), window, rope, kv))
        if self.cross is not None:
            assert self.norm_cross is not None and source is not None, "cross-attention source"
            x = x + self.cross(self.norm_cross(x), source)
        return x + self.scale2(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """A causal stack with a sliding window of `config.context` keys, self included."""

    rows = 1  # that are computed at least, more than needed if packed (see packing.py)
    native: native.Stack | None = None  # if packed: for steps of one stream

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.rope = None
        if config.rope != "none":
            head_dim = config.dim // config.heads
            self.rope = Rope(head_dim, config.max_period, config.rope == "interleaved")
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def init_state(
        self,
        slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        chunk: int = 1,
        exact_window: bool = True,
    ) -> TransformerState:
        """Fresh state for `slots` streams.

        chunk: steps per call that are computed at once; longer calls are split, the result is the
        same. exact_window=False copies upstream's ring of `context` cells, in which the first of
        several steps in one call loses its oldest keys.
        """
        c = self.config
        assert c.context is not None, "a streaming stack needs a window"
        ring = c.context + chunk - 1 if exact_window else c.context
        shape = (slots, c.heads // c.kv_repeat, ring, c.dim // c.heads)

        def cache() -> KVCache:
            return KVCache(room(shape, dtype, device), room(shape, dtype, device))

        clock = torch.zeros(slots, dtype=torch.long, device=device)
        return TransformerState(clock, [cache() for _ in self.layers], chunk if exact_window else 0)

    def window(self, x: Tensor, state: TransformerState | None) -> Window:
        """Mask, angles and ring cells for x [B, T, D]."""
        T = x.shape[1]
        steps = torch.arange(T, device=x.device)
        if state is None:
            query, cells, slots, at = steps[None], None, None, None  # [1, T]
            key = query
        else:
            query = state.clock[:, None] + steps  # [B, T] absolute positions
            R = state.layers[0].k.shape[2]
            cells = query % R
            slots = torch.arange(len(x), device=x.device)[:, None]
            last, keys, at = query[:, -1:], R, None
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                clock = int(state.clock.max())
                keys = min(R, -(-(clock + T) // BLOCK) * BLOCK)  # a young stream has used few
                at = clock % R if len(x) == 1 and clock % R + T <= R else None
            # [B, keys] position per cell
            key = last - (last - torch.arange(keys, device=x.device)) % R
        age = query[:, :, None] - key[:, None]  # [B, T, keys]
        mask = (key[:, None] >= 0) & (age >= 0)
        if self.config.context is not None:
            mask &= age < self.config.context
        angles = None if self.rope is None else self.rope.angles(query)
        return Window(mask[:, None], angles, cells, slots, at)

    def brief(self, x: Tensor, state: TransformerState) -> bool:
        """Whether x [B, T, D] is what `step` is for."""
        B, T, _ = x.shape
        if self.native is None or not 0 < T <= state.chunk or not native.few(B * T):
            return False
        there = x.dtype == torch.float32 and native.usable(state.layers[0].k)
        return there and not torch.compiler.is_compiling()

    def step(self, x: Tensor, state: TransformerState, active: Tensor | None) -> Tensor:
        """`forward` of all slots' next steps in one call (see native.py)."""
        assert self.native is not None and self.config.context is not None
        B, T, D = x.shape
        clocks = (state.clock[:, None] + torch.arange(T)).flatten()
        slots = torch.arange(B).repeat_interleave(T)
        turns = None
        if self.rope is not None:
            cos, sin = self.rope.turns(clocks)  # [B · T, 1, Dh/2]
            turns = torch.stack([cos, sin], -1).view(B * T, -1)
        caches = native.Caches([(kv.k, kv.v) for kv in state.layers])
        alike = None if state.group == 1 or T > 1 else slots // state.group * state.group
        y = self.native.step(
            x.reshape(B * T, D), caches, self.config.context, clocks, slots, turns, alike, state.own
        )
        state.clock += T if active is None else T * active
        return y.view(B, T, D)

    def forward(
        self,
        x: Tensor,
        state: TransformerState | None = None,
        active: Tensor | None = None,
        sources: list[CrossCache] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]. active bool[B]: paused slots compute but do not advance."""
        if state is not None and 0 < state.chunk < x.shape[1]:
            parts = x.split(state.chunk, 1)
            return torch.cat([self.forward(p, state, active, sources) for p in parts], 1)
        if state is not None and sources is None and self.brief(x, state):
            return self.step(x, state, active)
        window, T = self.window(x, state), x.shape[1]
        if len(x) == 1 and T < self.rows:
            x = x.repeat(1, self.rows // T, 1)  # at once, rather than in every product
        for i, layer in enumerate(self.layers):
            kv = None if state is None else state.layers[i]
            x = layer(x, window, self.rope, kv, None if sources is None else sources[i])
        if state is not None:
            state.clock += T if active is None else T * active
        return x[:, :T]
