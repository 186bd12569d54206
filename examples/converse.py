"""A spoken question in, a spoken answer out, frame by frame as in a live conversation.

python examples/converse.py question.wav answer.wav [MODEL]
"""

from __future__ import annotations

import sys

from moshi_cli.core import load
from moshi_cli.core.audio import Writer, frames
from moshi_cli.session import BUILTIN
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.events import Piece, Speech
from moshi_cli.tasks.loop import run


def main(question: str, answer: str, model: str = str(BUILTIN)) -> None:
    """Write the answer's sound to a file, print its words as they come."""
    with Writer(answer) as out:
        for event in run(load(model), CHAT, frames(question)):
            if isinstance(event, Speech):
                out.write(event.pcm)
            elif isinstance(event, Piece):
                print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
