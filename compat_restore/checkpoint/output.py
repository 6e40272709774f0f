"""Files that are being written: each appears under its name whole, or not at all.

Where the system can (Linux, most file systems), a file has no name until it is whole: whatever
ends the process, nothing is left of it. Elsewhere it has a hidden name beside its place.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from compat_restore.checkpoint.files import ClosedAtEnd, is_url, local_path
from compat_restore.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "OutputFile",
    "alone_in",
    "check_writable",
    "create_output",
    "output_error",
    "remove",
    "sync_directory",
]

_LONGEST_WAIT = 60.0  # seconds, for others to put their files in place
_FLUSH_EVERY = 8 << 20
# What file systems say that have no second names for a file (exFAT, some network drives).
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class OutputFile(ClosedAtEnd):
    """A file that is being written; `place` makes it appear, and `close` without it removes it.

    Attributes:
        path: where it will appear.
        position: where `write` goes on: how many bytes it has written.
    """

    def __init__(self, path: str) -> None:
        """Begin a file; its directory is made if it is missing.

        Raises:
            OutputError: the place cannot be written to.
        """
        self.path = path
        self.position = 0
        self._folder, stem = os.path.split(os.path.abspath(path))
        self._hidden = os.path.join(self._folder, f".{stem[:100]}.{os.urandom(8).hex()}")
        self._named = False  # whether the hidden name exists
        self._placed = False
        self._synced = False
        self._waiting = 0  # bytes written, whose way to the disk has not begun
        self._made: list[str] = []
        self._descriptor = -1
        try:
            self._make_folders()
            self._descriptor = self._open()
        except OSError as error:
            self.close()
            raise self._failed(error) from error
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        """Remove a file that nobody got hold of: the program was interrupted while it began."""
        with suppress(AttributeError):  # of one that was refused before it began
            self.close()

    @property
    def descriptor(self) -> int:
        """The open file, for reading and writing by position."""
        return self._descriptor

    @property
    def working_path(self) -> str:
        """A path under which the file can be opened by this process while it is being written."""
        return self._hidden if self._named else f"/proc/self/fd/{self._descriptor}"

    @property
    def is_placed(self) -> bool:
        """Whether the file has appeared; right also where `place` was interrupted."""
        if self._placed or self._descriptor < 0:
            return self._placed
        own = os.fstat(self._descriptor)
        try:
            there = os.lstat(self.path)
        except OSError:
            return False
        return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)

    def reserve(self, size: int) -> None:
        """Take the room on the disk that `size` bytes need, so that a lack of it is told early.

        Raises:
            OutputError: there is not so much.
        """
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno in _FULL:
                    raise self._failed(error) from error
                # Another error: this file system has no such service, and can do without.

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OutputError: the disk does not take them.
        """
        self.write_at(self.position, data)
        self.position += len(data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at a position; several threads may, each its own.

        Raises:
            OutputError: the disk does not take them.
        """
        self._synced = False
        try:
            done = os.pwrite(self._descriptor, data, offset)
            while done < len(data):
                done += os.pwrite(self._descriptor, memoryview(data)[done:], offset + done)
        except OSError as error:
            raise self._failed(error) from error
        # Two threads may lose a count to each other: then a flush begins a little later.
        self._waiting += done
        if self._waiting >= _FLUSH_EVERY:
            self._waiting = 0
            self._begin_flush(max(offset + done - 2 * _FLUSH_EVERY, 0), 2 * _FLUSH_EVERY)

    def _begin_flush(self, offset: int, length: int) -> None:
        """Let the system begin to bring a range to the disk, so that `sync` has less to wait for.

        The advice that a range will not be needed starts its writing, on Linux; pages that are
        being written stay in memory.
        """
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes that were written.

        Raises:
            OutputError: they cannot be read back.
        """
        pieces = []
        while length:
            try:
                piece = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise self._failed(error) from error
            if not piece:
                raise OutputError(f"'{self.path}' ends at byte {offset} when it is read back")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def sync(self) -> None:
        """Wait until everything is on the disk; nothing may be written after it.

        Raises:
            OutputError: it does not get there.
        """
        if self._synced:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error
        self._synced = True

    def place(self, *, replace: bool) -> None:
        """Make the file appear under its name, in one moment; its bytes are on the disk before.

        Args:
            replace: take the place of a file of that name; otherwise such a file is an error,
                even if it appeared this very moment.

        Raises:
            OutputError: that failed; what was there before is untouched.
        """
        self.sync()
        try:
            for folder in self._made:
                sync_directory(os.path.dirname(folder))
            if replace:
                self._name_hidden()
                os.replace(self._hidden, self.path)
                self._named = False
            elif self._named:
                self._rename_to(self.path)
                self._named = False
            else:
                self._link_to(self.path)
        except FileExistsError as error:
            raise OutputError(
                f"'{self.path}' appeared while it was being written: is another program writing "
                "the same checkpoint? Nothing was changed"
            ) from error
        except OSError as error:
            raise self._failed(error) from error
        self._placed = True
        self._made.clear()
        self._close_descriptor()

    def take_back(self) -> None:
        """Remove the file from its place, if it was placed; it is the only one that knows of it."""
        if self.is_placed:
            remove(self.path)
            self._placed = False

    def close(self) -> None:
        """Remove the file and the directories made for it, unless it was placed."""
        if self.is_placed:
            self._made.clear()
        self._close_descriptor()
        if self._named:
            remove(self._hidden)
            self._named = False
        while self._made:
            with suppress(OSError):  # somebody else's file is in it by now
                os.rmdir(self._made.pop())

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            # All is written and on the disk, or is not wanted any more.
            with suppress(OSError):
                os.close(descriptor)

    def _failed(self, error: OSError) -> OutputError:
        return output_error(self.path, error)

    def _make_folders(self) -> None:
        missing = []
        folder = self._folder
        while not os.path.isdir(folder):
            missing.append(folder)
            above = os.path.dirname(folder)
            if above == folder:
                break
            folder = above
        for folder in reversed(missing):
            self._made.append(folder)  # before it is: a signal may come right after that
            try:
                os.mkdir(folder)
            except FileExistsError:
                self._made.remove(folder)
                if not os.path.isdir(folder):
                    raise
                # Another process made it.

    def _open(self) -> int:
        nameless = getattr(os, "O_TMPFILE", 0)
        if nameless and os.path.exists("/proc/self/fd"):
            # Kernels and file systems without it say so in many ways; those of a full or a
            # read-only disk come again, from the attempt with a name.
            with suppress(OSError):
                return os.open(self._folder, nameless | os.O_RDWR | os.O_CLOEXEC, 0o666)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._named = True
        return os.open(self._hidden, flags, 0o666)

    def _name_hidden(self) -> None:
        if not self._named:
            self._named = True  # before it is: a fault in between leaves something to remove
            self._link_to(self._hidden)

    def _rename_to(self, path: str) -> None:
        """Give the file its name, where no other has it."""
        try:
            os.link(self._hidden, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
            os.rename(self._hidden, path)
        else:
            remove(self._hidden)

    def _link_to(self, path: str) -> None:
        # Python follows the link in /proc only when it is given a directory to start from.
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.link(
                f"/proc/self/fd/{self._descriptor}",
                os.path.join(self._folder, os.path.basename(path)),
                src_dir_fd=folder,
                dst_dir_fd=folder,
                follow_symlinks=True,
            )
        finally:
            with suppress(OSError):  # the link is made, or not, by now
                os.close(folder)


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Wait until no other process puts a checkpoint of several files in place in a directory.

    Which of the files that are there belong to no checkpoint can only be told while nobody else is
    half done; what is removed as such might otherwise be what another is about to name. The lock
    is one on the directory itself: it leaves nothing behind, and ends with the process. Where
    there are no such locks (object stores, some network drives), nothing is waited for.

    Raises:
        OutputError: others do not come to an end.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            _unlock(descriptor)


def _lock(folder: str) -> int | None:
    if is_url(folder):
        return None
    import time

    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except (ImportError, OSError):
        return None
    end = time.monotonic() + _LONGEST_WAIT
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OutputError(
                        f"'{folder}' is locked by another program, for {_LONGEST_WAIT:.0f} s: does "
                        "one hang that writes there? Nothing was changed"
                    ) from None
                time.sleep(0.005)
            else:
                return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, OutputError):
            raise
        return None  # the file system has no locks
    except BaseException:
        os.close(descriptor)
        raise


def _unlock(descriptor: int) -> None:
    import fcntl

    with suppress(OSError):  # before it is closed: a forked process may hold it too
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    with suppress(OSError):
        os.close(descriptor)


def create_output(path: str) -> OutputFile:
    """Begin a file, at a local path or at a URL.

    Raises:
        OutputError: the place cannot be written to.
        MissingDependencyError: it is a URL, and what writes there is not installed.
    """
    local = local_path(path)
    if local is not None:
        return OutputFile(local)
    from compat_restore.checkpoint.remote import RemoteOutput

    return RemoteOutput(path)


def check_writable(path: str) -> None:
    """Check that files can be made where `path` stands, as far as its protocol tells.

    Raises:
        OutputError: nothing is ever written there (`https://` ...).
    """
    if is_url(path):
        from compat_restore.checkpoint.remote import check_writable_remote

        check_writable_remote(path)


def output_error(path: str, error: OSError) -> OutputError:
    """Return the error that tells somebody why a file cannot be written."""
    return OutputError(
        f"'{path}' cannot be written: {error.strerror or error}; nothing was changed"
    )


def remove(path: str) -> None:
    """Remove a file that nothing names any more; one that cannot be removed is in nobody's way."""
    if is_url(path):
        from compat_restore.checkpoint.remote import remove_remote

        remove_remote(path)
        return
    with suppress(OSError):
        os.unlink(path)


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk; elsewhere nothing is waited for.

    Raises:
        OSError: they do not get there.
    """
    if is_url(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
