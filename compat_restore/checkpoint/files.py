"""Files as the readers see them: a size, and bytes by range.

The readers of the formats know byte ranges and nothing of disks; this module knows where files
stand, and nothing of formats. A path is one of the local file system, or a URL (`gs://...`) for
the file systems of fsspec, which is imported when the first URL is used (`remote.py`).
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from contextlib import suppress
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

    from compat_restore.checkpoint.remote import RemoteFile

__all__ = [
    "ByteSource",
    "ClosedAtEnd",
    "LocalFile",
    "absolute",
    "can_be_listed",
    "check_range",
    "identity",
    "is_directory",
    "is_regular_file",
    "is_there",
    "is_url",
    "join",
    "listing",
    "local_path",
    "open_source",
    "scheme_of",
    "split",
]

# `gs://...`, or with fsspec's caches before it: `simplecache::gs://...`. One letter is a drive.
_URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*(?P<scheme>[A-Za-z][\w+.-]+)://")
_LOCAL_SCHEMES = ("file://", "local://")


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


def scheme_of(path: str) -> str:
    """Return the protocol of a URL ("gs"), "" for a path that is none."""
    match = _URL.match(path) if "://" in path else None
    return match["scheme"].lower() if match else ""


def is_url(path: str) -> bool:
    """Whether `path` names something outside the local file system."""
    return local_path(path) is None


def local_path(path: str) -> str | None:
    """Return the path in the local file system, None for the URL of another one.

    What stands in the local file system under a name that looks like a URL is local: the file or
    directory itself, and what has its place in a directory that is there.
    """
    if not scheme_of(path):
        return path
    for start in _LOCAL_SCHEMES:
        if path.lower().startswith(start):
            return path[len(start) :]
    here = os.path.lexists(path) or os.path.isdir(os.path.dirname(path))
    return path if here else None


def open_source(path: str) -> LocalFile | RemoteFile:
    """Open a file for reading.

    Raises:
        CheckpointNotFoundError: there is no such file, or it is no regular file.
        InputError: it may not be read, or cannot be reached.
        MissingDependencyError: it is a URL, and what reads it is not installed.
    """
    local = local_path(path)
    if local is not None:
        return LocalFile(local)
    from compat_restore.checkpoint.remote import RemoteFile

    return RemoteFile(path)


def is_regular_file(path: str) -> bool:
    """Whether `path` is (or links to) a regular file; a FIFO or device is not.

    Raises:
        InputError: it is a URL, and whether there is such a file cannot be found out.
    """
    local = local_path(path)
    if local is None:
        from compat_restore.checkpoint.remote import kind_of

        return kind_of(path) == "file"
    try:
        return stat.S_ISREG(os.stat(local).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


def is_directory(path: str) -> bool:
    """Whether `path` is (or links to) a directory.

    Over http a directory is what is named with a "/" at its end: servers have no notion of one.

    Raises:
        InputError: it is a URL, and whether there is such a directory cannot be found out.
    """
    local = local_path(path)
    if local is not None:
        return os.path.isdir(local)
    if not can_be_listed(path):
        return path.endswith("/")
    from compat_restore.checkpoint.remote import kind_of

    return kind_of(path) == "directory"


def is_there(path: str) -> bool:
    """Whether anything has this name, be it a link that leads nowhere.

    Raises:
        InputError: it is a URL, and that cannot be found out.
    """
    local = local_path(path)
    if local is not None:
        return os.path.lexists(local)
    from compat_restore.checkpoint.remote import kind_of

    return kind_of(path) is not None


def can_be_listed(path: str) -> bool:
    """Whether directories there can be listed at all: over http they cannot."""
    return not is_url(path) or scheme_of(path) not in ("http", "https")


def listing(folder: str) -> list[str]:
    """Return the names in a directory, sorted; none if there is no such directory.

    Raises:
        InputError: the directory may not be read, or cannot be reached.
    """
    local = local_path(folder)
    if local is None:
        from compat_restore.checkpoint.remote import names_in

        return names_in(folder) if can_be_listed(folder) else []
    try:
        return sorted(os.listdir(local or "."))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        return []
    except OSError as error:
        raise InputError(
            f"the directory '{folder}' cannot be read: {error.strerror or error}"
        ) from error


def split(path: str) -> tuple[str, str]:
    """Return (directory, name), as `os.path.split` does; `memory://` is a directory."""
    local = local_path(path)
    if local is not None:
        return os.path.split(local)
    start = path.index("://") + 3
    # What a server is asked after a "?" may hold slashes too.
    query = path.find("?", start) if scheme_of(path) in ("http", "https") else -1
    slash = path.rfind("/", start, query if query >= 0 else len(path))
    if slash < 0:
        return path[:start], path[start:]
    folder = path[:slash].rstrip("/") if path[start:slash] else path[: slash + 1]
    return folder, path[slash + 1 :]


def join(folder: str, *names: str) -> str:
    """Return the path of a name in a directory."""
    local = local_path(folder)
    if local is not None:
        return os.path.join(local, *names)
    return "/".join((folder.removesuffix("/"), *names))


def absolute(path: str) -> str:
    """Return a path that does not depend on the current directory."""
    local = local_path(path)
    return path if local is None else os.path.abspath(local)


def identity(path: str) -> object | None:
    """Return what two paths of one file have in common; None where there is no file.

    A URL's is told from its text, whether there is such a file or not.
    """
    local = local_path(path)
    if local is None:
        from compat_restore.checkpoint.remote import file_system

        system, there = file_system(path)
        return hash(system), there
    try:
        found = os.stat(local)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def check_range(name: str, size: int, offset: int, length: int) -> None:
    """Check that bytes to be read are within a file; no bytes are, wherever they are said to be.

    Raises:
        DamagedCheckpointError: they are not.
    """
    if offset < 0 or length < 0 or (length and offset + length > size):
        raise DamagedCheckpointError(
            f"'{name}' has {size} bytes, but bytes {offset} to {offset + length} "
            "are needed: the file is cut short, or what points into it is damaged"
        )


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
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        try:  # a FIFO that took the place of the file would be waited for
            self._descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise self._unreadable(error) from error
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise CheckpointNotFoundError(f"'{path}' is no regular file")
        self.size = found.st_size

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
        check_range(self.name, self.size, offset, length)
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
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):  # nothing was written, and all that was read is read
                os.close(descriptor)
