"""README cannot rot: its commands name options that exist, its Python imports names that exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every `moshi …` of the sh blocks, and of the table of commands, as an argument list."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^\|.*?`((?:[^`]*\|)?\s*moshi [^`]+)`", README, re.MULTILINE)
    found = []
    for line in lines:
        words = shlex.split(line.replace("\\|", "|"), comments=True)
        part: list[str] = []
        for word in [*words, "|"]:
            if word in ("|", "&&", ";", ">", "<", "2>"):
                if part and Path(part[0]).name == "moshi":
                    found.append(part[1:])
                part = []
            else:
                part.append(word)
    return found


def test_commands_are_found() -> None:
    assert ["asr"] in [command[:1] for command in commands()]


@pytest.mark.skipif(find_spec("moshi_cli.app") is None, reason="no command yet")
@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_command_is_valid(args: list[str]) -> None:
    """With --help in its midst a command line is parsed, not run: unknown names are errors."""
    from typer.testing import CliRunner

    from moshi_cli.app import app

    at = next((i for i, arg in enumerate(args) if arg.startswith("-") and arg != "-"), len(args))
    result = CliRunner().invoke(app, [*args[:at], "--help", *args[at:]])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("block", blocks("python"))
def test_python_imports_are_valid(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moshi_cli"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("name", ["first", "test"])
def test_marked_commands_are_one_block_each(name: str) -> None:
    """`.ci/run` reads these two commands from here."""
    assert len(re.findall(rf"^<!-- run: {name} -->\n```sh\n", README, re.MULTILINE)) == 1


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_to_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_suites_are_valid(block: str, tmp_path: Path) -> None:
    from moshi_cli.options import LogOptions
    from moshi_cli.suite_calls import prepared
    from moshi_cli.tasks.suites import load

    (tmp_path / "tests.yaml").write_text(block, encoding="utf-8")
    suite, document = load(tmp_path / "tests.yaml")
    for i, entry in enumerate(suite.entries):
        prepared(entry, document, ("entries", str(i)), tmp_path, LogOptions())
