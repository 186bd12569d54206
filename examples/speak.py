"""A text, spoken, and when each of its words comes.

python examples/speak.py "good morning" out.wav [MODEL]
"""

from __future__ import annotations

import sys

from moshi_cli.core import load
from moshi_cli.core.audio import write
from moshi_cli.session import BUILTIN
from moshi_cli.tasks.tts import speak


def main(text: str, target: str, model: str = str(BUILTIN)) -> None:
    """Write the sound to a file, print a line per word."""
    recording = speak(load(model), text)
    write(target, recording.pcm)  # float32 [S] at 24 kHz
    for word in recording.words:
        print(f"{word.start_s:7.2f}  {word.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
