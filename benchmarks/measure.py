"""Whole processes side by side: their time and memory, as ratios of paired runs.

Machines drift and are shared: what is run in turn drifts together, so the ratio of a pair says more
than either figure. Medians of pairs are reported, with the figures themselves beside them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Command:
    """A command line, and what has to be removed or done before each run of it."""

    name: str
    words: Sequence[str]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Run:
    """One run: wall-clock and processor seconds, and the peak of resident memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run(command: Command) -> Run:
    """Run a command once.

    A small process of its own starts it: what a process had in memory before it became another
    program counts towards that one's peak.

    Raises:
        SystemExit: it failed, so that its figures mean nothing.
    """
    command.prepare()
    words = [sys.executable, "-I", "-S", __file__, *command.words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command.name} failed: {done.stderr[-2000:]}")
    return Run(*map(float, done.stdout.split()))


def start() -> None:
    """Run the command line that follows; print wall and processor seconds, and the peak in MiB."""
    begin = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        child = subprocess.Popen(sys.argv[1:], stdout=nowhere)
        _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes.
    peak = used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    sys.stdout.write(f"{wall} {used.ru_utime + used.ru_stime} {peak}\n")
    sys.exit(child.returncode)


def compare(ours: Command, peers: Sequence[Command], runs: int) -> str:
    """Run commands in turn, and return a table of them.

    Args:
        ours: the command that the ratios are of.
        peers: the others.
        runs: how often; one more of each comes first and is not counted.
    """
    commands = [ours, *peers]
    found: dict[str, list[Run]] = {command.name: [] for command in commands}
    for number in range(runs + 1):
        for command in commands:
            result = run(command)
            if number:
                found[command.name].append(result)
    titles = ("wall s", "cpu s", "peak MiB", "peer / ours", "ours / peer")
    lines = ["{:30} {:>8} {:>8} {:>9} {:>12} {:>12}".format("", *titles)]
    for command in commands:
        results = found[command.name]
        row = (
            f"{command.name:30} {_median(r.wall for r in results):8.3f} "
            f"{_median(r.cpu for r in results):8.3f} {max(r.peak for r in results):9.0f}"
        )
        if command is not ours:
            ratio = _median(b.wall / a.wall for a, b in zip(found[ours.name], results, strict=True))
            row += f" {ratio:12.2f} {1 / ratio:12.2f}"
        lines.append(row)
    return "\n".join(lines)


def _median(values) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    start()
