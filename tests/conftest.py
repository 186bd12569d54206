"""Shared by all tests: one thread, one seed per test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the models here are tiny; threads would only cost
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent
