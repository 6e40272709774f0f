"""Faults at the system calls that write: what a full disk, a broken one or a signal does there."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["WRITING", "Counter", "faults_at", "killed_after", "killed_at", "short_writes"]

# Every call by which the library changes a file system.
WRITING = (
    "open", "mkdir", "posix_fallocate", "ftruncate", "pwrite", "copy_file_range", "fsync", "link",
    "replace", "rename", "unlink", "rmdir", "close",
)  # fmt: skip
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Counter:
    """How many writing calls were made; `at` is the one at which `act` is called first."""

    def __init__(self, at: int, act: Callable[[], None], only: tuple[str, ...] = WRITING):
        self.at, self.act, self.only = at, act, only
        self.calls = 0

    @property
    def reached(self) -> bool:
        return self.calls >= self.at

    def called(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.act()


@contextlib.contextmanager
def faults_at(
    number: int, act: Callable[[], None], only: tuple[str, ...] = WRITING
) -> Iterator[Counter]:
    """Call `act` at the writing call of this number, before it is made."""
    counter = Counter(number, act, only)
    real = {name: getattr(os, name) for name in only}

    def watched(name):
        def call(*args, **kwargs):
            if name != "open" or args[1] & _CHANGING:
                counter.called()
            return real[name](*args, **kwargs)

        return call

    for name in only:
        setattr(os, name, watched(name))
    try:
        yield counter
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process that dies at its writing call of this number; return whether it did.

    Raises:
        AssertionError: the process ended in another way.
    """
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), faults_at(number, _die):
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed for another reason"
    return False


def killed_after(seconds: float, work: Callable[[], object]) -> tuple[bool, float]:
    """Do `work` in a process that is killed some time after it began.

    Returns:
        Whether it was killed before it was done, and how many seconds it had.

    Raises:
        AssertionError: the process ended in another way.
    """
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.write(begun, b"!")
            work()
            os._exit(0)
        os._exit(1)
    os.read(ready, 1)
    start = time.perf_counter()
    ended = 0
    while not ended and (left := start + seconds - time.perf_counter()) > 0:
        time.sleep(min(left, 0.0005))
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    took = time.perf_counter() - start
    os.close(ready)
    os.close(begun)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, took
    assert os.WEXITSTATUS(status) == 0, "the work failed for another reason"
    return False, took


@contextlib.contextmanager
def short_writes() -> Iterator[None]:
    """Let every call that writes bytes take a part of them, as a call may."""
    pwrite, copy = os.pwrite, getattr(os, "copy_file_range", None)

    def short_pwrite(descriptor, data, offset):
        return pwrite(descriptor, memoryview(data)[: max(1, len(data) // 3)], offset)

    def short_copy(source, target, count, *offsets):
        return copy(source, target, max(1, count // 3), *offsets)

    os.pwrite = short_pwrite
    if copy is not None:
        os.copy_file_range = short_copy
    try:
        yield
    finally:
        os.pwrite = pwrite
        if copy is not None:
            os.copy_file_range = copy


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
