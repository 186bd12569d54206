"""What one does with the model. Functions here return values and events; they never print.

`TASKS` maps a name to its Task value, loaded on first use:
    chat    hears the partner, samples its own words and voice
    asr     hears the voice, samples the words, which trail it
    tts     is given the words, samples the voice, which trails them
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshi_cli.core.streams import Task

    TASKS: dict[str, Task]

HOMES = {"ASR": "asr", "CHAT": "chat", "TTS": "tts"}  # Task value -> the module that defines it


def __getattr__(name: str) -> Any:
    if name == "TASKS":
        return {task.name: task for task in map(__getattr__, ("CHAT", "ASR", "TTS"))}
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES, "TASKS"])
