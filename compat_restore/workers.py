"""Conversions in processes of their own, each of which does one at a time.

They are started anew, not forked, since threads may be running, and they do not import the
program's main module, so that scripts need no guard around it. A process that ends, be it killed
for want of memory, fails the one conversion that it was at. When this process ends, however it
does, they take back what they had begun, and end too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING

from compat_restore.jobs import Job, Outcome, Settings, Status, carry_out

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import FrameType

__all__ = ["in_processes", "serve"]

_PATIENCE = 30.0  # seconds to take back a conversion
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from compat_restore.workers import serve; serve(int(sys.argv[2]))"
)


class _Worker:
    """A process, and the connection to it."""

    def __init__(self, settings: Settings, keep_open: Sequence[int]) -> None:
        self.job: Job | None = None
        self.connection, theirs = Pipe()
        with theirs:
            # In a session of its own: Ctrl-C in a terminal reaches this process alone, which then
            # stops the others in order.
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *keep_open),
                start_new_session=True,
            )
        with suppress(OSError):  # it ended; that is found out when its answer is awaited
            self.connection.send(settings)

    def give(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):
            self.connection.send(job)

    def answer(self) -> Outcome:
        """Return the outcome of its job, a failure if the process ended."""
        assert self.job is not None
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            return Outcome(
                status=Status.FAILED,
                error=f"'{self.job.source}': {self._death()}",
                kind="Killed",
            )
        assert isinstance(outcome, Outcome)
        self.job = None
        return outcome

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()

    def wait(self) -> None:
        try:
            self._process.wait(_PATIENCE)
        except BaseException as error:
            self._process.kill()
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def _death(self) -> str:
        self.connection.close()
        self.wait()
        status = self._process.returncode
        if status < 0:
            name = signal.Signals(-status).name
            cause = "; out of memory? fewer at once need less (jobs=1, --jobs 1)"
            return (
                f"the process that converted it was ended by {name}"
                + (cause if -status == signal.SIGKILL else "")
                + "; nothing of it was put in place that is not whole"
            )
        return f"the process that converted it ended with status {status}, and said nothing"


def in_processes(
    jobs: Sequence[Job],
    settings: Settings,
    count: int,
    *,
    begin: Callable[[Job], None],
    keep_open: Sequence[int] = (),
) -> Generator[tuple[Job, Outcome]]:
    """Carry out jobs; yield each with its outcome when it is done.

    Closing the iterator stops what is running.

    Args:
        jobs: begun in their order.
        settings: the same for all.
        count: how many at once, at most.
        begin: called before a job is begun.
        keep_open: open files that the processes are to have as well.
    """
    waiting = deque(jobs)
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or any(worker.job for worker in workers.values()):
            for worker in list(workers.values()):
                if waiting and worker.job is None:
                    _give_next(worker, waiting, begin)
            while waiting and len(workers) < count:
                worker = _Worker(settings, keep_open)
                workers[worker.connection] = worker
                _give_next(worker, waiting, begin)
            for connection in wait([c for c, worker in workers.items() if worker.job]):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                job = worker.job
                assert job is not None
                outcome = worker.answer()
                if worker.job is not None:
                    del workers[connection]
                yield job, outcome
    finally:
        for worker in workers.values():
            worker.stop()
        for worker in workers.values():
            worker.wait()


def _give_next(worker: _Worker, waiting: deque[Job], begin: Callable[[Job], None]) -> None:
    begin(waiting[0])
    worker.give(waiting.popleft())


class _Stopped(BaseException):
    """The process that gave the jobs wants no more, or is gone."""


def serve(descriptor: int) -> None:
    """Carry out the jobs that come through a connection, until it is closed.

    Args:
        descriptor: of the connection.
    """
    signal.signal(signal.SIGTERM, _stop)
    jobs: SimpleQueue[Job] = SimpleQueue()
    try:
        connection = Connection(descriptor)
        settings = connection.recv()
        threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
        while True:
            connection.send(carry_out(jobs.get(), settings))
    except (_Stopped, EOFError, OSError):
        # What was begun is taken back. Nothing is left that an orderly end would do, and the
        # thread that receives may hold a lock.
        os._exit(0)


def _receive(connection: Connection, jobs: SimpleQueue[Job]) -> None:
    """Receive jobs while another is being carried out, so that the end is noticed at once."""
    with suppress(EOFError, OSError):
        while True:
            jobs.put(connection.recv())
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_IGN)  # once is enough: the way out is not to be interrupted
    raise _Stopped
