"""The command line: one module a verb, imported when it is called.

Results go to stdout, everything else to stderr. The exit status says what happened: 0 all well,
1 findings, 2 wrong use, 3 damaged or unsafe input, 4 a file that cannot be read or written,
5 names, shapes or values that do not match.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING

from compat_restore import __version__
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    InputError,
    OutputError,
    PlanError,
    PreservationError,
    nearest,
)
from compat_restore.tables import escaped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["EXIT_STATUS", "main"]

OK, FINDINGS, USAGE, DAMAGED, IO, MISMATCH = range(6)
EXIT_STATUS = {
    OK: "all well",
    FINDINGS: "findings",
    USAGE: "wrong use",
    DAMAGED: "damaged or unsafe input",
    IO: "a file that cannot be read or written",
    MISMATCH: "names, shapes or values that do not match",
}
# Names, specs and rows are made by the ten thousand, and none of them in cycles: to look for those
# after every 700, as Python does, takes a quarter of the time of a listing. Where nothing but a
# listing is made, there is no need to look at all.
_ALLOCATIONS = 200_000
_VERBS = {
    "inspect": "list what a checkpoint holds",
    "convert": "write chosen tensors of a checkpoint to a new one",
    "convert-all": "the same with every checkpoint below a directory, in parallel, resumed",
    "verify": "check the tensors of checkpoints against their checksums",
    "diff": "compare two checkpoints, byte by byte",
    "demo": "make a checkpoint, restore it in TF1 and TF2, convert it (needs TensorFlow)",
}
_STATUS_OF = (
    (DamagedCheckpointError, DAMAGED),
    (CheckpointFormatError, DAMAGED),
    (CheckpointNotFoundError, IO),
    (InputError, IO),
    (OutputError, IO),
    (PlanError, MISMATCH),
    (PreservationError, MISMATCH),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    thresholds = gc.get_threshold()
    lists = given[:1] == ["inspect"]
    gc.set_threshold(0 if lists else _ALLOCATIONS, *thresholds[1:])
    try:
        if arguments is None and not lists:  # which has nothing to take back
            _end_as_by_ctrl_c()
        status = _run(given)
        sys.stdout.flush()  # here, and not at exit, where its errors could not be told
    except BrokenPipeError:  # `| head` closed the pipe: not a fault
        _silence_stdout()
        return OK
    except CompatRestoreError as error:
        status = next((s for kind, s in _STATUS_OF if isinstance(error, kind)), USAGE)
        return _fail(str(error), status)
    except OSError as error:
        if error.filename is None:  # a full disk behind stdout: flushing it at exit would fail too
            _silence_stdout()
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), IO)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except _Terminated as end:
        return _fail("terminated", 128 + end.number)
    finally:
        gc.set_threshold(*thresholds)
        if arguments is None:  # the process ends: Python need not look through what is left
            gc.freeze()
            if not lists:
                _end_at_once()
    return status


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came: what was begun is taken back on the way out, as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end_as_by_ctrl_c() -> None:
    """Let signals that end a process take back what was begun, and not be disturbed at that."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # One that is ignored (nohup) stays so.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ended)


def _end_at_once() -> None:
    """Let signals end the process, where nothing is left to take back, without a traceback."""
    import signal

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _ended(number: int, frame: object) -> None:
    import signal

    del frame
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise _Terminated(number)


def _open_closed_streams() -> None:
    """Give the null device to streams that the caller closed (`>&-`), so that writing works."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, open(null, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _silence_stdout() -> None:
    """Send what stdout still holds to nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in _VERBS:
        verb = importlib.import_module(f"compat_restore.cli.{arguments[0].replace('-', '_')}")
        try:
            status: int = verb.run(arguments[1:])
        except SystemExit as stop:  # argparse: help (0) or wrong use (2)
            return stop.code if isinstance(stop.code, int) else USAGE
        return status
    parser = _top_parser()
    if not arguments:
        parser.print_help()
        return USAGE
    try:
        if not arguments[0].startswith("-"):
            near = nearest(arguments[0], list(_VERBS))
            parser.error(
                f"no command {arguments[0]!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; commands: {', '.join(_VERBS)}")
            )
        parser.parse_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    return USAGE


def _top_parser() -> argparse.ArgumentParser:
    import argparse

    from compat_restore.cli.options import HelpFormatter

    verbs = "\n".join(f"  {verb:<13}{what}" for verb, what in _VERBS.items())
    statuses = "\n".join(f"  {status:<13}{what}" for status, what in EXIT_STATUS.items())
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore",
        usage="compat-restore COMMAND ...",
        description="Bring the weights of TensorFlow 1 checkpoints into today's code, and know "
        "what happened to every variable.",
        epilog=f"commands (each has --help):\n{verbs}\n\nexit status:\n{statuses}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"compat-restore {__version__}")
    return parser


def _fail(message: str, status: int) -> int:
    lines = "\n".join(escaped(line) for line in message.split("\n"))
    sys.stderr.write(f"compat-restore: error: {lines}\n")
    return status
