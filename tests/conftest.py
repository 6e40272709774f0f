"""Fixtures, and the two environment variables from which tests take what lies outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs something that this machine was not told of."""
    for item in items:
        for marker, variable in (
            ("corpus", "COMPAT_RESTORE_CORPUS"),
            ("tf1", "COMPAT_RESTORE_TF1_PYTHON"),
        ):
            if item.get_closest_marker(marker) and not os.environ.get(variable):
                item.add_marker(pytest.mark.skip(reason=f"{variable} is not set"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The directory of small checkpoints that TensorFlow 1.15.5 wrote."""
    return GOLDEN


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The directory of reference checkpoints."""
    return Path(os.environ["COMPAT_RESTORE_CORPUS"])


@pytest.fixture(scope="session")
def tf1_python() -> str:
    """The interpreter in which TensorFlow 1.15.5 is installed."""
    return os.environ["COMPAT_RESTORE_TF1_PYTHON"]
