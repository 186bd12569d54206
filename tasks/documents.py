"""YAML over dataclasses: nested mappings that know where each entry was written.

Lists are replaced, mappings are merged (null takes an entry out). Whatever is wrong is a UsageError
that names the file, the line and the nearest key that exists.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from moshi_cli.core.errors import UsageError

Value = TypeVar("Value")
Keys = tuple[str, ...]  # a path of keys, list items as their numbers


@dataclass
class Document:
    """Nested mappings, and where each entry was written: "a.yaml:12" or "--set lr"."""

    data: dict[str, Any]
    places: dict[Keys, str]
    name: str = "recipe"

    def place(self, path: Keys) -> str:
        """Where an entry, or the nearest one around it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint for a name that does not exist."""
    near = get_close_matches(key, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else "it can be: " + ", ".join(known)


def read(path: Path, begins: str) -> Document:
    """A YAML file. UsageError if it is none, or no mapping; `begins` is the hint for the latter."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot read ({reason})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{where}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a mapping", begins)
    places: dict[Keys, str] = {}

    def walk(node: yaml.Node, at: Keys) -> None:
        pairs: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            pairs = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pairs = [(str(i), value, value) for i, value in enumerate(node.value)]
        for key, marked, value in pairs:
            places[(*at, key)] = f"{path}:{marked.start_mark.line + 1}"
            walk(value, (*at, key))

    walk(node, ())
    return Document(data, places, str(path))


def assign(document: Document, settings: Sequence[str]) -> None:
    """Put `key.key=value` (YAML on the right) into a document."""
    for text in settings:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise UsageError(f"--set {text}: not of the form key=value")
        try:
            new: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            new = value
        at: Any = document.data
        for part, after in pairwise(path):
            at = _entry(at, part, [] if after.isdecimal() else {}, text)
        _entry(at, path[-1], None, text, new)
        for end in range(1, len(path) + 1):
            document.places.setdefault(path[:end], f"--set {key}")
        document.places[path] = f"--set {key}"


def _entry(at: Any, key: str, empty: Any, text: str, new: Any = ...) -> Any:
    """The entry `key` of a mapping or list, made or replaced as needed."""
    if isinstance(at, list):
        if not key.isdecimal() or int(key) > len(at):
            raise UsageError(f"--set {text}: the list has {len(at)} entries, there is no {key!r}")
        if int(key) == len(at):
            at.append(empty)
        index: Any = int(key)
    elif isinstance(at, dict):
        index = key
        if at.get(key) is None:
            at[key] = empty
    else:
        raise UsageError(f"--set {text}: there is nothing below {key!r}")
    if new is not ...:
        at[index] = new
    return at[index]


def overlay(value: Value, document: Document, path: Keys = ()) -> Value:
    """A dataclass with the entries at `path` of a document put over it."""
    data: Any = document.data
    for key in path:
        data = data[int(key)] if isinstance(data, list) else data[key]
    return _convert(type(value), data, value, document, path)


def _convert(kind: Any, data: Any, old: Any, document: Document, path: Keys) -> Any:
    """`data` as a value of type `kind`; `old` is what it is put over, or MISSING."""
    origin, parts = get_origin(kind), get_args(kind)

    def refuse(wanted: str) -> UsageError:
        return UsageError(f"{document.place(path)}: {'.'.join(path)} must be {wanted}")

    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(data, Mapping):
            raise refuse(f"a mapping with keys of {kind.__name__}")
        hints, names = get_type_hints(kind), [f.name for f in fields(kind)]
        new: dict[str, Any] = {}
        for key, item in data.items():
            at = (*path, str(key))
            if key not in names:
                where = document.place(at)
                raise UsageError(f"{where}: unknown key {'.'.join(at)!r}", nearest(str(key), names))
            before = MISSING if old is MISSING else getattr(old, key)
            new[key] = _convert(hints[key], item, before, document, at)
        if old is not MISSING:
            return replace(old, **new)
        for f in fields(kind):
            if f.name not in new and f.default is MISSING and f.default_factory is MISSING:
                raise UsageError(f"{document.place(path)}: {'.'.join(path)} lacks {f.name!r}")
        return kind(**new)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in parts:
            return None
        (inner,) = (p for p in parts if p is not type(None))
        return _convert(inner, data, MISSING if old is None else old, document, path)
    if origin is Literal:
        if data not in parts:
            raise UsageError(
                f"{document.place(path)}: {'.'.join(path)} cannot be {data!r}",
                nearest(str(data), map(str, parts)),
            )
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise refuse("a list")
        if parts[-1] is not ... and len(data) != len(parts):
            raise refuse(f"a list of {len(parts)}")
        kinds = [parts[0]] * len(data) if parts[-1] is ... else parts
        return tuple(
            _convert(k, item, MISSING, document, (*path, str(i)))
            for i, (k, item) in enumerate(zip(kinds, data, strict=True))
        )
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(data, Mapping):
            raise refuse("a mapping")
        merged = {} if old is MISSING else dict(old)
        for key, item in data.items():
            if item is None:
                merged.pop(str(key), None)
                continue
            before = merged.get(str(key), MISSING)
            merged[str(key)] = _convert(parts[1], item, before, document, (*path, str(key)))
        return merged
    if kind in (float, int):
        try:  # YAML takes 2e-6 for a string
            number = data if type(data) is kind else float(str(data))
        except ValueError:
            raise refuse("a number") from None
        if kind is int and not float(number).is_integer():
            raise refuse("a whole number")
        return kind(number)
    if kind is str:
        if isinstance(data, Mapping | list) or data is None:
            raise refuse("a string")
        return str(data)
    if kind is bool and type(data) is not bool:
        raise refuse("true or false")
    return data
