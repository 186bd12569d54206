"""Each kind of failure has its exit code, one sentence and perhaps a hint."""

from __future__ import annotations

import pytest

from moshi_cli.core import errors

CODES = {
    "MoshiError": 1, "UsageError": 2, "InputError": 2, "ModelError": 4, "MemoryLimitError": 5,
    "DeviceError": 6,
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes(name: str, code: int) -> None:
    error = getattr(errors, name)("it broke", "mend it")
    assert isinstance(error, errors.MoshiError)
    assert (str(error), error.hint, error.exit_code) == ("it broke", "mend it", code)


def test_every_kind_is_listed() -> None:
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.MoshiError)
    }
    assert kinds == set(CODES)


def test_a_code_of_its_own() -> None:
    assert errors.MoshiError("x", exit_code=3).exit_code == 3
    assert errors.MoshiError("x").hint is None
