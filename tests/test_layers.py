"""Imports point one way, moshi_cli -> tasks -> core, and the command starts without torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"core": "moshi_cli.core", "tasks": "moshi_cli.tasks", "moshi_cli": "moshi_cli"}
CORE_MAY_IMPORT = {"numpy", "safetensors", "sentencepiece", "torch"}
CORE_MAY_IMPORT_LATE = {"huggingface_hub", "soundfile", "soxr"}  # inside a function only


def modules() -> dict[str, Path]:
    """Every module of the project by import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def targets(node: ast.AST) -> Iterator[str]:
    """The modules that one import statement loads; a lazy name counts as its home module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import, line {node.lineno}"
        assert node.module is not None
        yield node.module
        for alias in node.names:
            homes = {}
            if node.module in ("moshi_cli.core", "moshi_cli.tasks"):
                homes = importlib.import_module(node.module).HOMES
            yield f"{node.module}.{homes.get(alias.name, alias.name)}"


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """(on import, at any time): what `module` loads; imports for type hints do not count."""
    early: set[str] = set()
    ever: set[str] = set()

    def walk(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            ever.update(found := set(targets(child)))
            if not late:
                early.update(found)
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            walk(child, late or in_function)

    walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), late=False)
    return frozenset(early), frozenset(ever)


def outside(names: frozenset[str]) -> set[str]:
    """Top-level names of third-party packages among `names`."""
    tops = {name.partition(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"moshi_cli"}


def inside(names: frozenset[str], *packages: str) -> bool:
    """Whether every module of ours among `names` lies in `packages`."""
    ours = [name for name in names if name.split(".")[0] == "moshi_cli" and name in MODULES]
    return all(any(n == p or n.startswith(p + ".") for p in packages) for n in ours)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("moshi_cli.core")])
def test_core_imports_only_core(module: str) -> None:
    early, ever = imports(module)
    assert inside(ever, "moshi_cli.core"), sorted(ever)
    assert outside(early) <= CORE_MAY_IMPORT
    assert outside(ever) <= CORE_MAY_IMPORT | CORE_MAY_IMPORT_LATE


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("moshi_cli.tasks")])
def test_tasks_import_core_but_no_command(module: str) -> None:
    _, ever = imports(module)
    assert inside(ever, "moshi_cli.core", "moshi_cli.tasks"), sorted(ever)
    assert not outside(ever) & {"click", "rich", "typer"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.count(".") < 2])
def test_commands_load_torch_late(module: str) -> None:
    """Followed through our own modules: nothing that a command loads on import loads torch."""
    todo, seen = [(module,)], set()
    while todo:
        path = todo.pop()
        for name in imports(path[-1])[0]:
            assert name.partition(".")[0] != "torch", " -> ".join([*path, name])
            if name in MODULES and name not in seen:
                seen.add(name)
                todo.append((*path, name))


@pytest.mark.parametrize("package", ["moshi_cli.core", "moshi_cli.tasks"])
def test_lazy_names_are_there(package: str) -> None:
    loaded = importlib.import_module(package)
    for name in loaded.HOMES:
        assert getattr(loaded, name).__class__ is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loaded.nonsense


def test_lazy_names_are_typed() -> None:
    """What the type checker is told agrees with what `__getattr__` finds."""
    import moshi_cli.core

    tree = ast.parse(MODULES["moshi_cli.core"].read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if is_type_checking(node)]
    told = {
        alias.name: node.module.rpartition(".")[2]
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert told == moshi_cli.core.HOMES


def test_tasks_by_name() -> None:
    from moshi_cli.tasks import TASKS

    assert list(TASKS) == ["chat", "asr", "tts"]


@pytest.mark.skipif(find_spec("moshi_cli.app") is None, reason="no command yet")
@pytest.mark.parametrize("args", [["--help"], ["--version"], ["asr", "--help"], []])
def test_command_starts_without_torch(args: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['moshi', *{args!r}]\n"
        "from moshi_cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'soundfile', 'sentencepiece'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "heavy: []" in done.stderr, done.stderr


def test_the_map_names_every_module() -> None:
    """The docstring of core is where a newcomer starts; it must not leave a file out."""
    import moshi_cli.core

    listed = (moshi_cli.core.__doc__ or "").partition("Read in this order:")[2]
    there = {path.stem for path in (ROOT / "core").glob("*.py")} - {"__init__"}
    named = {w.strip(",") for line in listed.splitlines() for w in line.strip()[:27].split()}
    assert there <= named, there - named
