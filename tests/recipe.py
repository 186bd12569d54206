"""The scripts of the built-in model's recipe as modules; they are no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "examples" / "train_builtin"


def script(name: str) -> ModuleType:
    """examples/train_builtin/NAME.py, loaded anew."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
