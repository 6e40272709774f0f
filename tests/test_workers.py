"""Conversions in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from checkpoints import numbers, write

from compat_restore import workers as module
from compat_restore.jobs import Job, Settings, Status
from compat_restore.workers import in_processes


def jobs_of(tmp_path, count: int) -> list[Job]:
    return [
        Job(write(tmp_path / f"in{n}" / "m", {"w": numbers(3, start=n)}), str(tmp_path / f"out{n}"))
        for n in range(count)
    ]


@pytest.fixture
def processes(monkeypatch) -> list[subprocess.Popen]:
    """The processes that were started."""
    started = []
    popen = subprocess.Popen

    def noting(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", noting)
    return started


def test_all_jobs_are_done_and_all_processes_end(tmp_path, processes):
    jobs, begun = jobs_of(tmp_path, 5), []
    done = dict(in_processes(jobs, Settings(), 2, begin=begun.append))
    assert begun == jobs
    assert set(done) == set(jobs)
    assert {outcome.status for outcome in done.values()} == {Status.CONVERTED}
    assert len(processes) == 2
    # One that had not yet begun to listen has nothing to take back, and is ended by the signal.
    assert all(process.poll() in (0, -signal.SIGTERM) for process in processes)


def test_a_process_that_is_killed_fails_its_job_alone(tmp_path, processes):
    jobs = jobs_of(tmp_path, 6)

    def begin(job):
        if job in (jobs[0], jobs[3]):
            processes[-1].send_signal(signal.SIGSTOP)  # it cannot end before it is killed
            processes[-1].kill()

    done = dict(in_processes(jobs, Settings(), 1, begin=begin))
    failures = [job for job in jobs if done[job].status is Status.FAILED]
    assert failures == [jobs[0], jobs[3]]
    assert "was ended by SIGKILL; out of memory?" in done[jobs[0]].error
    assert done[jobs[0]].kind == "Killed"
    assert all(done[job].status is Status.CONVERTED for job in jobs if job not in failures)
    assert len(processes) == 3


def test_what_cannot_start_is_a_failure_of_its_job(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAM", "raise SystemExit(3)")
    [(_, outcome)] = in_processes(jobs_of(tmp_path, 1), Settings(), 1, begin=lambda _: None)
    assert "ended with status 3" in outcome.error


def large_job(tmp_path) -> Job:
    source = write(tmp_path / "in" / "m", {f"w{n}": numbers(500, 1000, start=n) for n in range(20)})
    return Job(source, str(tmp_path / "out" / "m"))


def test_closing_takes_back_what_was_begun(tmp_path, processes):
    outcomes = in_processes(
        [*jobs_of(tmp_path, 1), large_job(tmp_path)], Settings(), 2, begin=lambda _: None
    )
    with closing(outcomes):
        next(outcomes)
    # One that had not yet begun to listen has nothing to take back, and is ended by the signal.
    assert all(process.poll() in (0, -signal.SIGTERM) for process in processes)
    left = (
        {path.name for path in (tmp_path / "out").iterdir()}
        if os.path.exists(tmp_path / "out")
        else set()
    )
    # It was done, or there is nothing of it.
    assert left in (set(), {"m.index", "m.data-00000-of-00001"})


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path):
    job = large_job(tmp_path)
    program = (
        "import os, subprocess, sys\n"
        "from compat_restore import workers\n"
        "from compat_restore.jobs import Job, Settings\n"
        "popen = subprocess.Popen\n"
        "def telling(*args, **kwargs):\n"
        "    process = popen(*args, **kwargs)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "workers.subprocess.Popen = telling\n"
        f"job = Job({job.source!r}, {job.destination!r})\n"
        "for _ in workers.in_processes([job] * 99, Settings(), 2, begin=lambda job: None): pass\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end, "a process outlives the one that started it"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
