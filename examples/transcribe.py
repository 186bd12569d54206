"""What is said in a recording, and when.

python examples/transcribe.py talk.wav [MODEL]
"""

from __future__ import annotations

import sys

from moshi_cli.core import load
from moshi_cli.core.audio import read
from moshi_cli.session import BUILTIN
from moshi_cli.tasks.asr import transcribe


def main(recording: str, model: str = str(BUILTIN)) -> None:
    """Print a line per word: start and end in seconds, the word."""
    (sound,) = read(recording)  # float32 [1, S] at 24 kHz
    for word in transcribe(load(model), sound).words:
        print(f"{word.start_s:7.2f} {word.end_s:7.2f}  {word.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
