"""The wheel holds all of the tree: three packages, their markers and the built-in model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moshi_cli

ROOT = Path(__file__).parent.parent
LINKS = {"core", "tasks"}  # beside moshi_cli/ in the tree, inside it once installed
SHIPPED = ["LICENSE", "README.md", "core", "moshi_cli", "pyproject.toml", "tasks"]


def setuptools_table() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read TOML")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["setuptools"]


def import_name(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(("moshi_cli", *parts) if parts[0] in LINKS else parts)


def expected(tree: Path) -> set[str]:
    """Where each file of the tree belongs in the wheel."""
    files = set()
    for top, prefix in (("moshi_cli", ""), ("core", "moshi_cli/"), ("tasks", "moshi_cli/")):
        for path in (tree / top).rglob("*"):
            relative = path.relative_to(tree)
            if path.is_file() and not (top == "moshi_cli" and relative.parts[1] in LINKS):
                files.add(prefix + relative.as_posix())
    return files


def test_packages_are_the_folders_with_an_init() -> None:
    found = {
        import_name(path.parent)
        for top in ("moshi_cli", *LINKS)
        for path in (ROOT / top).rglob("__init__.py")
        if not (top == "moshi_cli" and path.relative_to(ROOT / top).parts[0] in LINKS)
    }
    table = setuptools_table()
    assert set(table["packages"]) == found == set(table["package-dir"])
    for name, folder in table["package-dir"].items():
        assert import_name(ROOT / folder) == name


@pytest.mark.parametrize("name", sorted(LINKS))
def test_links_lead_home(name: str) -> None:
    assert (ROOT / "moshi_cli" / name).resolve() == (ROOT / name).resolve()


def test_wheel_built_from_the_sdist_is_whole(tmp_path: Path) -> None:
    """As an index would do it: sdist first, then the wheel from its contents alone."""
    pytest.importorskip("setuptools", minversion="77")
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    for name in ("a.safetensors", "deeper/b.model"):  # stand-ins: the real weights are large
        stand_in = tree / "moshi_cli" / "builtin" / name
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_bytes(b"weights")

    def build(kind: str, cwd: Path) -> Path:
        code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (made,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return made

    shutil.unpack_archive(build("sdist", tree), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked)
    assert wheel.name.startswith(f"moshi_cli-{moshi_cli.__version__}-py3-none-any")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected(tree)
