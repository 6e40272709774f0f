"""Work on the parts of files by two threads: reading, checking and writing release the interpreter.

More threads gain nothing: two keep a disk, or the memory, busy.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["for_each"]

_THREADS = 2
_WORTH_A_THREAD = 4 << 20

Part = TypeVar("Part")


def for_each(
    parts: Iterable[Part], work: Callable[[Part, Callable[[], bool]], None], *, size: int
) -> None:
    """Do `work` on each part, two at a time where there is much to do.

    Args:
        parts: taken in their order.
        work: gets a part, and a function that says whether to stop: another part failed, or the
            program was interrupted.
        size: bytes that will be read in all; few are not worth a thread.

    Raises:
        Exception: the first that `work` raised; the work on other parts has ended by then.
    """
    waiting = iter(parts)
    lock = threading.Lock()
    failed: list[BaseException] = []

    def stopped() -> bool:
        return bool(failed)

    def run() -> None:
        try:
            while not failed:
                with lock:
                    try:
                        part = next(waiting)
                    except StopIteration:
                        return
                work(part, stopped)
        except BaseException as error:  # noqa: BLE001  # raised below, by the thread that called
            failed.append(error)

    others: list[threading.Thread] = []
    if size >= _WORTH_A_THREAD and (os.cpu_count() or 1) > 1:
        others = [threading.Thread(target=run) for _ in range(_THREADS - 1)]
    try:
        for thread in others:
            thread.start()
        run()
        for thread in others:
            thread.join()
    except BaseException as error:  # an interruption between two statements of this function
        failed.append(error)
        raise
    finally:
        for thread in others:
            if thread.ident is not None:
                thread.join()
    if failed:
        raise failed[0]
