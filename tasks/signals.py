"""Ctrl-C and SIGTERM as a wish to stop, so that a run can save first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SAME_WISH_S = 3.0  # torchrun passes on what a terminal has sent to its workers already


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """While open, Ctrl-C and SIGTERM set the event. Once more, SAME_WISH_S later or after that,
    they act as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    wished_s = 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal wished_s
        if not event.is_set():
            event.set()
            wished_s = time.monotonic()
        elif time.monotonic() - wished_s >= SAME_WISH_S:
            signal.signal(number, before[signal.Signals(number)])
            os.kill(os.getpid(), number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
