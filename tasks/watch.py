"""What may go wrong while listening, noticed from the outside: silence of the model, and loops.

Both detectors look at one frame at a time and keep a few numbers; see users' reports of recognisers
that stop writing on long recordings, or write one word for ever.
"""

from __future__ import annotations

import math
from collections import deque

from torch import Tensor

FRAME_S = 0.08
QUIET_DB = -50.0  # below this nothing is speech
ABOVE_FLOOR_DB = 12.0  # speech stands out from the noise by so much
FLOOR_RISE_DB = 0.25  # per frame: the noise floor follows a louder room within seconds


class Ear:
    """Whether a frame is loud enough to be speech, against a noise floor that is learnt."""

    def __init__(self) -> None:
        self.floor_db = math.inf

    def __call__(self, frame: Tensor) -> bool:
        """frame float32 [..., S]"""
        power = float(frame.detach().square().mean())
        level_db = 10 * math.log10(power) if power > 1e-10 else -100.0
        self.floor_db = min(level_db, self.floor_db + FLOOR_RISE_DB)
        return level_db > max(QUIET_DB, min(self.floor_db, -20.0 - ABOVE_FLOOR_DB) + ABOVE_FLOOR_DB)


class Voice:
    """Loud and quiet frames -> someone speaks, someone has stopped."""

    def __init__(self, begin_frames: int = 2, stop_frames: int = 8) -> None:
        self.begin_frames, self.stop_frames = begin_frames, stop_frames
        self.speaking = False
        self.run = 0  # frames that contradict `speaking`, without a break

    def push(self, loud: bool) -> bool:
        """One more frame; whether `speaking` has just changed (it did so `run` frames ago)."""
        self.run = self.run + 1 if loud != self.speaking else 0
        changed = self.run == (self.stop_frames if self.speaking else self.begin_frames)
        if changed:
            self.speaking, self.run = loud, 0
        return changed


class Stall:
    """Speech goes in for `limit_s` and no text comes out."""

    def __init__(self, limit_s: float = 8.0) -> None:
        self.limit_frames = limit_s / FRAME_S
        self.reset()

    def reset(self) -> None:
        """Text came, or a warning was given."""
        self.loud_frames = 0

    def push(self, loud: bool, text: bool) -> bool:
        """One more frame: was the sound loud, was there a text token? -> whether it stalls now."""
        self.loud_frames = 0 if text else self.loud_frames + loud
        if self.loud_frames < self.limit_frames:
            return False
        self.reset()
        return True


class Repetition:
    """The same few tokens come again and again: `count` times, and `tokens` of them at least."""

    def __init__(self, count: int = 8, tokens: int = 24, longest: int = 16) -> None:
        self.count, self.tokens, self.longest = count, tokens, longest
        self.seen: deque[int] = deque(maxlen=max(tokens, count) + longest * count)

    def reset(self) -> None:
        """Forget what was seen."""
        self.seen.clear()

    def push(self, token: int) -> bool:
        """One more text token (no padding) -> whether this is a loop."""
        self.seen.append(token)
        seen = list(self.seen)
        for length in range(1, self.longest + 1):
            needed = max(self.count, -(-self.tokens // length)) * length
            if len(seen) < needed:
                continue
            tail = seen[-needed:]
            if tail == tail[:length] * (needed // length):
                self.reset()
                return True
        return False
