"""A million entries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

WRITES = """
import json, resource, sys, time
import numpy as np
from compat_restore.checkpoint.bundle_writer import BundleWriter
from compat_restore.checkpoint.writer import Content
from compat_restore.tensors import DType

value = np.float32(1)
contents = [
    Content.of(f"scope_{n % 1000}/layer_{n:07d}/kernel", DType.float32, value)
    for n in range(int(sys.argv[2]))
]
begun = time.perf_counter(), time.process_time()
with BundleWriter(sys.argv[1]) as writer:
    writer.write(contents)
    writer.finish()
print(json.dumps([
    time.perf_counter() - begun[0],
    time.process_time() - begun[1],
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
]))
"""
LISTS = """
import json, resource, sys, time
begun = time.perf_counter(), time.process_time()
from compat_restore import open_checkpoint
with open_checkpoint(sys.argv[1]) as reader:
    count = len(reader.specs())
    assert len(reader.roles()) == count == int(sys.argv[2])
print(json.dumps([
    time.perf_counter() - begun[0],
    time.process_time() - begun[1],
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
]))
"""
INSPECTS = """
import json, os, resource, sys, time
begun = time.perf_counter(), time.process_time()
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from compat_restore.cli import main
    os._exit(main(["inspect", sys.argv[1]]))
_, status, used = os.wait4(child, 0)
assert status == 0
print(json.dumps([
    time.perf_counter() - begun[0], used.ru_utime + used.ru_stime, used.ru_maxrss >> 10
]))
"""


def measured(code, *arguments):
    """Return (seconds, seconds of work, peak MB) of a process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_million_entries_are_written_and_listed_in_10_s_and_1_gb_each(tmp_path, counts):
    count = 1_000_000
    found = {
        what: measured(code, tmp_path / "m", count)
        for what, code in (("written", WRITES), ("listed", LISTS), ("inspect", INSPECTS))
    }
    counts(
        **{
            what: f"{wall:.1f} s ({cpu:.1f} s of work), {peak} MB"
            for what, (wall, cpu, peak) in found.items()
        }
    )
    assert found["listed"][1] < 10  # of work: others may use the machine
    assert found["inspect"][1] < 20
    assert all(peak < 1000 for _, _, peak in found.values())
