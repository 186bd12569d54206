"""Where results go: one file, stdout, or a folder that mirrors where the inputs were."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moshi_cli.core.errors import UsageError
from moshi_cli.inputs import Item


class Destination:
    """Settles -o and --output-dir. Either `folder` is set, or `output` is a path or "-".

    suffixes: of the outputs of every item ([".srt", ".txt"]). many: more than one item may come.
    many_to_stdout: results of several items may share stdout. stdout_taken: it is used otherwise.
    """

    def __init__(
        self,
        output: str | None,
        folder: Path | None,
        suffixes: Sequence[str],
        *,
        many: bool,
        many_to_stdout: bool = False,
        stdout_taken: bool = False,
    ) -> None:
        self.suffixes = list(suffixes)
        if output == "":
            raise UsageError("-o names no file")
        if output is not None and output != "-" and _is_folder(output):
            if folder is not None:
                raise UsageError("-o names a folder and so does --output-dir: give one of them")
            folder, output = Path(output), None
        if output is not None and folder is not None:
            raise UsageError("-o is for one result, --output-dir for many: give one of them")
        if folder is None and output in (None, "-") and stdout_taken:
            raise UsageError("stdout is taken by the status lines", "use --output-dir DIR")
        if folder is None and many and not (output in (None, "-") and many_to_stdout):
            raise UsageError("several results need a folder", "use --output-dir DIR")
        self.folder, self.output = folder, output or "-"

    @property
    def stdout(self) -> bool:
        """Whether the result goes to stdout."""
        return self.folder is None and self.output == "-"

    def path(self, item: Item, suffix: str) -> str:
        """Where the result with this suffix goes: a path, or "-" for stdout."""
        if self.folder is None:
            several = len(self.suffixes) > 1 and self.output != "-"
            return self.output + suffix if several else self.output
        path = self.folder / (item.name + suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path.parent}: cannot make this folder ({error.strerror})") from None
        return str(path)

    def paths(self, item: Item) -> list[str]:
        """All results of an item."""
        return [self.path(item, suffix) for suffix in self.suffixes]


def _is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or os.path.isdir(output)
