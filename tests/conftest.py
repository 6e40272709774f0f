"""Fixtures, and the two environment variables from which tests take what lies outside."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without TensorFlow, the file work must pass all the same; these modules are about TensorFlow.
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
if not HAS_TENSORFLOW:
    collect_ignore = [
        "test_both_paths.py",
        "test_convert.py",
        "test_objects.py",
        "test_restore.py",
        "test_session.py",
        "test_traps.py",
    ]

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs something that this machine was not told of."""
    for item in items:
        if item.get_closest_marker("tensorflow") and not HAS_TENSORFLOW:
            item.add_marker(pytest.mark.skip(reason="TensorFlow is not installed"))
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


@pytest.fixture
def counts(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that notes what a test counted, to be shown when all tests are done."""

    def note(**figures: object) -> None:
        record_property("counts", ", ".join(f"{what}: {n}" for what, n in figures.items()))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests counted."""
    rows = [
        f"{report.nodeid.partition('::')[2]} ({report.duration:.1f} s)\n    {value}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "counts" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("counts")
        for row in sorted(rows):
            terminalreporter.write_line(row)
