"""A fourth task: the model hears a question and answers in writing only.

A task is a value: who is given, who is sampled, and one lag. Delays, streaming, slots and batches
follow from it; nothing else has to be written.

python examples/new_task.py question.wav [MODEL]
"""

from __future__ import annotations

import sys

from moshi_cli.core import Role, Task, load
from moshi_cli.core.audio import frames
from moshi_cli.session import BUILTIN
from moshi_cli.tasks.events import Word
from moshi_cli.tasks.loop import run

ANSWER = Task("answer", text=Role.SAMPLED, voice=Role.ABSENT, partner=Role.GIVEN)


def main(question: str, model: str = str(BUILTIN)) -> None:
    """Print the words of the answer."""
    events = run(load(model), ANSWER, frames(question))
    print(" ".join(event.text for event in events if isinstance(event, Word)))


if __name__ == "__main__":
    main(*sys.argv[1:])
