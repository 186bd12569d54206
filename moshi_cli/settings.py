"""Defaults of the user's own: --settings FILE, else ~/.config/moshi/config.toml.

    device = "cpu"              # for every command that has the option
    [codec]                     # for one group or command
    [codec.encode]
    num-codebooks = 8

A flag wins over the environment, the environment over this file, this file over the built-in
defaults. Keys are option names, with hyphens or underscores.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from moshi_cli.core.errors import UsageError


def default_path() -> Path:
    """Where settings are looked for when no file is named."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "moshi" / "config.toml"


def apply(ctx: typer.Context, path: Path | None) -> Path | None:
    """Eager option callback: the settings become the defaults of the command in `ctx`."""
    if path is None and not default_path().is_file():
        return path
    file = path or default_path()
    merged: dict[str, Any] = {}
    section: Any = read(file)
    known = {name for parameter in ctx.command.params if (name := parameter.name)}
    path_of_command = ctx.command_path.split()[1:]  # without "moshi"
    for depth in range(len(path_of_command) + 1):
        name = ".".join(path_of_command[:depth])
        section = section.get(path_of_command[depth - 1], {}) if depth else section
        if not isinstance(section, dict):
            raise UsageError(f"{file}: {name!r} must be a section")
        own = {key.replace("-", "_"): v for key, v in section.items() if not isinstance(v, dict)}
        if depth == len(path_of_command):
            refuse_unknown(own, known, f"{file}: [{name}]")
        merged |= own
    ctx.default_map = {key: value for key, value in merged.items() if key in known}
    return path


def refuse_unknown(given: dict[str, Any], known: set[str], where: str) -> None:
    """UsageError for a key that is no option of the command, naming the nearest one."""
    for key in given.keys() - known:
        near = get_close_matches(key, known, 1)
        hint = f"did you mean {near[0].replace('_', '-')!r}?" if near else None
        raise UsageError(f"{where}: there is no option {key.replace('_', '-')!r}", hint)


def read(file: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise UsageError(f"{file}: reading settings needs Python 3.11") from None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{file}: cannot read the settings ({reason})") from None
