"""What a user may be told: one sentence, at most one hint, and the exit code that goes with it.

Exit codes of the command: 0 all good, 1 run failed, 2 bad usage or bad input, 3 some items failed,
4 model not available, 5 out of memory, 6 audio device, 130 interrupted, 141 pipe closed.
"""

from __future__ import annotations


class MoshiError(Exception):
    """A failure that is explained to the user without a traceback; by itself: the run failed."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(MoshiError):
    """The command line or a function argument asks for something that makes no sense."""

    exit_code = 2


class InputError(MoshiError):
    """An item cannot be processed: unreadable, empty or broken. The rest of a batch goes on."""

    exit_code = 2


class ModelError(MoshiError):
    """A model is missing, damaged, of the wrong shape, or cannot do what is asked."""

    exit_code = 4


class MemoryLimitError(MoshiError):
    """The work does not fit in the memory of the device."""

    exit_code = 5


class DeviceError(MoshiError):
    """A microphone or a loudspeaker is missing or refuses."""

    exit_code = 6
