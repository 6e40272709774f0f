"""Hostile files by the thousand; how they are made and judged stands in `hostile.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import FACES

HERE = Path(__file__).parent
# 100,000 in all, in parts that several processes can take.
MANY = {
    "table": (12_000, 1),
    "bundle": (36_000, 3),
    "object graph": (12_000, 1),
    "V1": (12_000, 1),
    "safetensors": (10_000, 1),
    "npz": (8_000, 1),
    "HDF5": (7_000, 1),
    "Keras archive": (3_000, 1),
}


def run(face, first, cases, folder):
    """Run cases in a process with a limit on its memory."""
    command = [sys.executable, HERE / "hostile.py", face, str(first), str(cases), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["faults"], "\n".join(found["faults"][:5])
    assert sum(found["outcomes"].values()) == cases
    return found


@pytest.mark.parametrize("face", FACES)
def test_hostile_files_are_read_or_told_in_bounded_time_and_memory(face, tmp_path):
    found = run(face, 0, 300, tmp_path)
    assert found["outcomes"]["right"] > 10
    assert found["outcomes"]["DamagedCheckpointError"] > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("face", "part"), [(face, part) for face, (_, parts) in MANY.items() for part in range(parts)]
)
def test_a_hundred_thousand_hostile_files_are_read_or_told(face, part, tmp_path, counts):
    cases, parts = MANY[face]
    found = run(face, 1_000_000 * (part + 1), cases // parts, tmp_path)
    counts(
        cases=found["cases"],
        **found["outcomes"],
        **{
            "slowest case": f"{found['slowest'] * 1000:.0f} ms",
            "memory taken": f"{found['memory'] >> 20} MB",
            "peak": f"{found['peak'] >> 20} MB",
        },
    )


def test_the_faces_make_a_hundred_thousand_cases():
    assert sum(cases for cases, _ in MANY.values()) == 100_000
    assert MANY.keys() == FACES.keys()
