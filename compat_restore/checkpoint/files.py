"""Files as the readers see them: a size, and bytes by range.

The readers of the formats know byte ranges and nothing of disks; this module knows disks and
nothing of formats.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from compat_restore.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    InputError,
    UsageError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["ByteSource", "ClosedAtEnd", "LocalFile", "is_regular_file"]


class ByteSource(Protocol):
    """Something that has a name and a size in bytes, and gives ranges of its bytes."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    @property
    def descriptor(self) -> int | None:
        """The open file of the local file system; None where there is none."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`."""
        ...

    def close(self) -> None:
        """Give back what reading needed."""
        ...


def is_regular_file(path: str) -> bool:
    """Whether `path` is (or links to) a regular file; a FIFO or device is not."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


class ClosedAtEnd(ABC):
    """Something that a `with` statement closes."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was taken; closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class LocalFile(ClosedAtEnd):
    """A regular file of the local file system, read by position."""

    def __init__(self, path: str) -> None:
        """Open `path` for reading.

        Raises:
            CheckpointNotFoundError: there is no such file, or it is no regular file.
            InputError: it may not be read.
        """
        self.name = path
        if not is_regular_file(path):
            raise CheckpointNotFoundError(
                f"'{path}' is {'no regular file' if os.path.exists(path) else 'missing'}"
            )
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise self._unreadable(error) from error
        self.size = os.fstat(self._descriptor).st_size

    @property
    def descriptor(self) -> int:
        """The open file.

        Raises:
            UsageError: the file is closed.
        """
        if self._descriptor < 0:
            raise UsageError(f"'{self.name}' is closed: read before the `with` statement ends")
        return self._descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            DamagedCheckpointError: the file ends before.
            InputError: the system cannot read it.
            UsageError: the file is closed.
        """
        descriptor = self.descriptor
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DamagedCheckpointError(
                f"'{self.name}' has {self.size} bytes, but bytes {offset} to {offset + length} "
                "are needed: the file is cut short, or what points into it is damaged"
            )
        chunks = []
        while length:
            try:
                chunk = os.pread(descriptor, length, offset)
            except OSError as error:
                raise self._unreadable(error) from error
            if not chunk:
                raise DamagedCheckpointError(
                    f"'{self.name}' ended at byte {offset} while it was read: is it being written?"
                )
            chunks.append(chunk)
            offset += len(chunk)
            length -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"'{self.name}' cannot be read: {error.strerror or error}")

    def close(self) -> None:
        """Close the file; closing it twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
