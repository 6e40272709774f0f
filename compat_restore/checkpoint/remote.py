"""Files of other machines, at URLs that fsspec knows: read by ranges, written whole.

Credentials and options are fsspec's business: its configuration, its environment variables, and
those of the packages behind it (s3fs, gcsfs ...).

Reading costs a round trip a request, so that small reads are served from windows: a file that is
read in the order of its bytes is fetched in ever larger pieces, up to `_LARGEST_WINDOW`. Writing
goes into a temporary file of this machine first, and from there to its place in one upload.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, cast

from compat_restore.checkpoint.files import (
    ClosedAtEnd,
    check_range,
    scheme_of,
    split,
)
from compat_restore.checkpoint.output import OutputFile
from compat_restore.errors import (
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    InputError,
    MissingDependencyError,
    OutputError,
    UsageError,
    nearest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

__all__ = [
    "RemoteFile",
    "RemoteOutput",
    "check_writable_remote",
    "file_system",
    "kind_of",
    "names_in",
    "remove_remote",
]

_WHOLE = 1 << 20  # files up to this size are fetched in one request
_SMALLEST_WINDOW = 256 << 10
_LARGEST_WINDOW = 8 << 20
_MOST_WINDOWS = 4  # of a file: two for each of two threads, what it reads and what it read before
_MOST_KEPT = _MOST_WINDOWS * _LARGEST_WINDOW  # bytes in the windows of all files together
_LARGEST_GAP = 1 << 20  # between two reads that still count as one after the other
_ATTEMPTS = 3
_PAUSE = 0.5  # seconds before the second attempt; twice as many before the third
_CHECK_EVERY = 5.0  # seconds after which it is asked again whether a file is still the same

# What has to be installed for a protocol; the extra `remote` brings that of http.
_PACKAGES = {
    "http": "'compat_restore[remote]'",
    "https": "'compat_restore[remote]'",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "hf": "huggingface_hub",
    "oci": "ocifs",
    "oss": "ossfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "webdav": "webdav4",
}
_CREDENTIALS = {
    "s3": "`aws configure`, AWS_PROFILE or AWS_ACCESS_KEY_ID set them",
    "s3a": "`aws configure`, AWS_PROFILE or AWS_ACCESS_KEY_ID set them",
    "gs": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS set them",
    "gcs": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS set them",
}
# Where an object appears in one moment, when all of it is there.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf"}
_READ_ONLY = {"http", "https", "data", "git", "github", "libarchive", "reference", "tar"}
# What changes when a file is replaced, under the names that file systems give to it.
_FINGERPRINT = (
    *("size", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated"),
    *("generation", "md5Hash", "content_md5", "mtime", "created", "modified"),
)


class _FileSystem(Protocol):
    """What is used of fsspec's `AbstractFileSystem`."""

    def info(self, path: str) -> dict[str, object]: ...
    def ls(self, path: str, detail: bool) -> list[str]: ...  # noqa: FBT001 - as there
    def open(self, path: str, mode: str, **options: object) -> BinaryIO: ...
    def put_file(self, lpath: str, rpath: str) -> object: ...
    def cp_file(self, path1: str, path2: str) -> object: ...
    def mv(self, path1: str, path2: str) -> object: ...
    def rm_file(self, path: str) -> object: ...
    def makedirs(self, path: str, exist_ok: bool) -> object: ...  # noqa: FBT001 - as there
    def invalidate_cache(self) -> object: ...


def file_system(url: str) -> tuple[_FileSystem, str]:
    """Return fsspec's file system for a URL, and the file's path in it.

    Raises:
        MissingDependencyError: fsspec, or the package for this protocol, is not installed.
        UsageError: fsspec knows no such protocol.
        InputError: the file system cannot be used (credentials ...).
    """
    scheme = scheme_of(url)
    try:
        from fsspec import available_protocols
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError(
            f"'{url}' is read with fsspec, which is not installed: pip install "
            "'compat_restore[remote]'" + _and_package(scheme)
        ) from error
    known = available_protocols()
    if scheme not in known:
        near = nearest(scheme, known)
        raise UsageError(
            f"'{url}' is no file here, and fsspec knows no protocol '{scheme}'"
            + (f"; did you mean {' or '.join(f'{n}://' for n in near)}?" if near else "")
        )
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        raise MissingDependencyError(
            f"'{url}' needs a package that is not installed ({error}): "
            + (f"pip install {package}" if package else "install what it names")
        ) from error
    except Exception as error:
        raise _Diagnosis.of(error).input_error(url) from error
    return cast("_FileSystem", system), path


def _and_package(scheme: str) -> str:
    package = _PACKAGES.get(scheme, "")
    return f" {package}" if package and "[" not in package else ""


# -- what went wrong ------------------------------------------------------------------------------


class _Fault(Enum):
    MISSING = "missing"
    REFUSED = "refused"
    CHANGED = "changed"
    UNREACHABLE = "unreachable"
    OTHER = "other"


# Classes of aiohttp, botocore, requests, fsspec and Python, any of which may not be installed.
_NO_CONNECTION = {
    *("ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ConnectionError"),
    *("TimeoutError", "FSTimeoutError", "Timeout", "gaierror", "TransportError"),
}
_NO_CREDENTIALS = {
    *(
        "PermissionError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "DefaultCredentialsError",
    ),
    *("RefreshError", "ClientAuthenticationError", "AuthenticationException"),
}


@dataclass(frozen=True, slots=True)
class _Diagnosis:
    """What an exception of fsspec, or of what is behind it, means.

    Attributes:
        fault: the kind of fault.
        text: what happened, in words.
    """

    fault: _Fault
    text: str

    @classmethod
    def of(cls, error: BaseException) -> _Diagnosis:
        """Return what an exception means; its causes say more than it, which may hide them.

        For fsspec's HTTP, every fault is a file that is not found.
        """
        chain = list(_chain(error))
        for link in chain:
            if _is(link, _NO_CONNECTION):
                return cls(_Fault.UNREACHABLE, _told(link))
            status = _status(link)
            if status is not None:
                return cls(_fault_of(status), f"the server answers {_phrase(status)}")
            if _is(link, _NO_CREDENTIALS):
                return cls(_Fault.REFUSED, _told(link))
            if _is(link, {"FileExpired"}):
                return cls(_Fault.CHANGED, _told(link))
        missing = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
        return cls(_Fault.MISSING if missing else _Fault.OTHER, _told(error))

    def input_error(self, url: str) -> CompatRestoreError:
        """Return the error that tells why a file cannot be read."""
        match self.fault:
            case _Fault.MISSING:
                return CheckpointNotFoundError(f"'{url}' is missing")
            case _Fault.CHANGED:
                return _changed(url)
            case _Fault.REFUSED:
                return InputError(f"'{url}' may not be read: {self.text}; {_cure(url)}")
            case _Fault.UNREACHABLE:
                return InputError(
                    f"'{url}' cannot be reached: {self.text}; is the name right, and is the "
                    "network up? Otherwise try again later"
                )
        return InputError(f"'{url}' cannot be read: {self.text}")

    def output_error(self, url: str) -> OutputError:
        """Return the error that tells why a file cannot be written."""
        what = f"'{url}' cannot be written: {self.text}"
        if self.fault in (_Fault.REFUSED, _Fault.MISSING):
            what += f"; {_cure(url)}"
        return OutputError(f"{what}; nothing was changed")


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _is(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _phrase(status: int) -> str:
    with suppress(ValueError):
        return f"{status} {HTTPStatus(status).phrase}"
    return str(status)


def _fault_of(status: int) -> _Fault:
    if status in (404, 410):
        return _Fault.MISSING
    if status in (401, 403, 407):
        return _Fault.REFUSED
    if status == 412:  # the ETag that was asked for is no longer the file's
        return _Fault.CHANGED
    return _Fault.UNREACHABLE if status in (408, 429) or status >= 500 else _Fault.OTHER


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ").split("\n")[0]


def _cure(url: str) -> str:
    scheme = scheme_of(url)
    where = _CREDENTIALS.get(scheme, "fsspec's configuration (~/.config/fsspec) may hold them")
    return f"does it exist, and do your credentials for {scheme}:// allow it? ({where})"


def _changed(url: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"'{url}' was replaced while it was read: is it being written? Read it again"
    )


# -- what is there --------------------------------------------------------------------------------


def kind_of(url: str) -> str | None:
    """Return what stands at a URL: "file", "directory"; None for nothing that may be seen.

    Who may not list a bucket is refused what is not there, so that being refused says nothing.

    Raises:
        InputError: the server cannot be reached.
    """
    system, path = file_system(url)
    try:
        system.invalidate_cache()
        return str(system.info(path)["type"])
    except Exception as error:
        diagnosis = _Diagnosis.of(error)
        if diagnosis.fault in (_Fault.MISSING, _Fault.REFUSED):
            return None
        raise diagnosis.input_error(url) from error


def names_in(url: str) -> list[str]:
    """Return the names in a directory, sorted; none if there is no such directory.

    Raises:
        InputError: it may not be listed, or cannot be reached.
    """
    system, path = file_system(url)
    try:
        system.invalidate_cache()
        found = system.ls(path, detail=False)
    except Exception as error:
        diagnosis = _Diagnosis.of(error)
        if diagnosis.fault is _Fault.MISSING:
            return []
        raise diagnosis.input_error(url) from error
    names = {
        name.rstrip("/").rpartition("/")[2] for name in found if name.strip("/") != path.strip("/")
    }
    return sorted(names - {""})


def remove_remote(url: str) -> None:
    """Remove a file; one that cannot be removed stays."""
    with suppress(Exception):
        system, path = file_system(url)
        system.rm_file(path)


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """Bytes of a file: those from `start` up to, but not including, `end`.

    Attributes:
        data: the bytes, once they have arrived.
    """

    start: int
    end: int
    data: Future[bytes]


class _Kept:
    """The windows of all open files, in the order of their use: together they are bounded.

    A checkpoint may have a hundred data files, all of which stay open while one after another is
    read.

    Attributes:
        lock: is held by whoever looks at windows, or changes what is kept.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._owners: dict[_Window, list[_Window]] = {}  # the last used one is the last
        self._size = 0

    def use(self, window: _Window, owner: list[_Window]) -> None:
        """Keep a window, as the one that is used last; others make room for it.

        Args:
            window: that was used, or is about to be fetched.
            owner: the windows of its file, the last used one last.
        """
        self.drop(window)
        while owner and len(owner) >= _MOST_WINDOWS:
            self.drop(owner[0])
        size = window.end - window.start
        while self._owners and self._size + size > _MOST_KEPT:
            self.drop(next(iter(self._owners)))
        self._owners[window] = owner
        self._size += size
        owner.append(window)

    def drop(self, window: _Window) -> None:
        """Forget a window; one that is not kept may be dropped, too."""
        owner = self._owners.pop(window, None)
        if owner is not None:
            owner.remove(window)
            self._size -= window.end - window.start


_KEPT = _Kept()


class RemoteFile(ClosedAtEnd):
    """A file at a URL, read by ranges; several threads may.

    Small reads are served from at most `_MOST_WINDOWS` windows of at most `_LARGEST_WINDOW` bytes;
    those of all files together hold at most `_MOST_KEPT` bytes.
    """

    descriptor = None

    def __init__(self, url: str) -> None:
        """Ask for the size of the file; nothing of it is fetched.

        Raises:
            CheckpointNotFoundError: there is no such file.
            InputError: it may not be read, or cannot be reached.
            MissingDependencyError: what reads it is not installed.
        """
        self.name = url
        self._closed = False
        self._system, self._path = file_system(url)
        self._over_http = url.lower().startswith(("http://", "https://"))
        self._downloading = threading.Lock()
        self._windows: list[_Window] = []  # the last used one is the last
        self._unused: list[BinaryIO] = []
        self._copy: BinaryIO | None = None
        self._info = self._ask()
        self._checked = time.monotonic()
        if self._info.get("type") != "file":
            raise CheckpointNotFoundError(f"'{url}' is a {self._info.get('type')}, no file")
        size = self._info.get("size")
        if isinstance(size, int):
            self.size = size
        else:  # the server does not say
            self.size = self._download()

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            DamagedCheckpointError: the file ends before, or was replaced since it was opened.
            InputError: it cannot be reached any more.
            UsageError: the file is closed.
        """
        if self._closed:
            raise UsageError(f"'{self.name}' is closed: read before the `with` statement ends")
        check_range(self.name, self.size, offset, length)
        if length >= _LARGEST_WINDOW:
            ends = [*range(offset, offset + length, _LARGEST_WINDOW), offset + length]
            return b"".join(self._fetch(start, end) for start, end in pairwise(ends))
        pieces = []
        while length:
            window = self._window_at(offset, length)
            data = window.data.result()
            piece = data[offset - window.start : offset - window.start + length]
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Close the connections; closing twice does nothing."""
        self._closed = True
        with _KEPT.lock:
            for window in tuple(self._windows):
                _KEPT.drop(window)
            while self._unused:
                with suppress(Exception):  # what fails to close is not wanted any more
                    self._unused.pop().close()
            if self._copy:
                self._copy.close()
                self._copy = None

    def _window_at(self, offset: int, length: int) -> _Window:
        """Return a window that holds the byte at `offset`; another thread may be fetching it."""
        with _KEPT.lock:
            for window in self._windows:
                if window.start <= offset < window.end:
                    _KEPT.use(window, self._windows)
                    return window
            window = _Window(*self._next_range(offset, length), Future())
            _KEPT.use(window, self._windows)
        try:
            window.data.set_result(self._fetch(window.start, window.end))
        except BaseException as error:
            with _KEPT.lock:
                _KEPT.drop(window)
            window.data.set_exception(error)
            raise
        return window

    def _next_range(self, offset: int, length: int) -> tuple[int, int]:
        """Return (start, end) of a window to be fetched for `length` bytes at `offset`."""
        if self.size <= _WHOLE:
            return 0, self.size
        ahead = _SMALLEST_WINDOW
        end = self.size
        for window in self._windows:
            if 0 <= offset - window.end <= _LARGEST_GAP:
                ahead = max(ahead, min(2 * (window.end - window.start), _LARGEST_WINDOW))
            if window.start > offset:  # what it holds is not fetched twice
                end = min(end, window.start)
        end = min(offset + max(length, ahead), end)
        if end == self.size:  # the end of a table is read backwards
            offset = max(0, min(offset, self.size - _SMALLEST_WINDOW))
        return offset, end

    def _fetch(self, start: int, end: int) -> bytes:
        """Fetch bytes, in another attempt if the connection breaks off."""
        attempt = 1
        while True:
            try:
                data = self._request(start, end)
                break
            except CompatRestoreError:
                raise
            except Exception as error:
                diagnosis = _Diagnosis.of(error)
                if diagnosis.fault is not _Fault.UNREACHABLE or attempt == _ATTEMPTS:
                    raise diagnosis.input_error(self.name) from error
            time.sleep(_PAUSE * attempt)
            attempt += 1
        if len(data) != end - start or time.monotonic() - self._checked > _CHECK_EVERY:
            self._check_same()
        if len(data) != end - start:
            raise InputError(
                f"'{self.name}' cannot be read: of bytes {start} to {end} the server sent "
                f"{len(data)}; try again, or download the file first"
            )
        return data

    def _request(self, start: int, end: int) -> bytes:
        if self._copy is not None:
            return os.pread(self._copy.fileno(), end - start, start)
        try:
            file = self._unused.pop()
        except IndexError:  # other threads have them
            file = self._open()
        try:
            # Every reader of a file in memory gets the same object, with one position.
            with _SHARED if isinstance(file, io.BytesIO) else nullcontext():
                file.seek(start)
                data = file.read(end - start)
        except BaseException as error:
            with suppress(Exception):  # the first fault is the one to tell
                file.close()
            if not (self._over_http and isinstance(error, ValueError)):
                raise
        else:
            self._unused.append(file)
            return data
        # This server sends whole files alone: once, then, and not once a request.
        with self._downloading:
            if self._copy is None and self._download() != self.size:
                raise _changed(self.name)
        return self._request(start, end)

    def _open(self) -> BinaryIO:
        if not self._over_http:
            return self._system.open(self._path, "rb", cache_type="none")
        headers = self._headers()
        etag = self._info.get("ETag")
        if isinstance(etag, str) and not etag.startswith("W/"):  # a weak one never matches
            headers["If-Match"] = etag
        return self._system.open(
            self._path, "rb", cache_type="none", size=self.size, headers=headers
        )

    def _headers(self) -> dict[str, str]:
        configured = getattr(self._system, "kwargs", {}).get("headers", {})
        return {**configured, "Accept-Encoding": "identity"}  # ranges are those of the file itself

    def _download(self) -> int:
        """Fetch the whole file into a temporary one, which has no name; return its size."""
        if not self._over_http:
            raise InputError(f"'{self.name}' cannot be read: nothing says how long it is")
        from aiohttp import ClientTimeout

        copy = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - closed by `close`
        try:
            # No blocks: a stream. It would ask for the size of the file if it were given none.
            with self._system.open(
                self._path,
                "rb",
                block_size=0,
                size=1,
                headers=self._headers(),
                timeout=ClientTimeout(total=None, sock_connect=30, sock_read=60),
            ) as stream:
                while chunk := stream.read(_WHOLE):
                    copy.write(chunk)
            copy.flush()
        except BaseException as error:
            copy.close()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"'{self.name}' is on a server that sends whole files alone, and the "
                    f"temporary directory '{tempfile.gettempdir()}' has no room for it; TMPDIR "
                    "names another"
                ) from error
            if not isinstance(error, Exception):
                raise
            raise _Diagnosis.of(error).input_error(self.name) from error
        self._copy = copy
        return os.fstat(copy.fileno()).st_size

    def _ask(self) -> dict[str, object]:
        try:
            self._system.invalidate_cache()
            return self._system.info(self._path)
        except Exception as error:
            raise _Diagnosis.of(error).input_error(self.name) from error

    def _check_same(self) -> None:
        """Check that the file is the one that was opened, as far as its server tells.

        Raises:
            DamagedCheckpointError: it was replaced.
        """
        found = self._ask()
        self._checked = time.monotonic()
        if _differ(found, self._info):
            raise _changed(self.name)


_SHARED = threading.Lock()


def _differ(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two answers about a path are about different files."""
    return any(one[key] != other[key] for key in _FINGERPRINT if key in one and key in other)


# -- writing --------------------------------------------------------------------------------------


def check_writable_remote(url: str) -> None:
    """Check that a file system is not one that can only be read.

    Raises:
        OutputError: it is.
    """
    scheme = scheme_of(url)
    if scheme in _READ_ONLY:
        raise OutputError(
            f"'{url}' cannot be written: {scheme}:// is for reading alone; write to a local "
            "path or to an object store (gs://, s3:// ...)"
        )


class RemoteOutput(OutputFile):
    """A file that is being written, for a URL: it is uploaded when it is put in place.

    Until then it is a temporary file of this machine, in the directory that TMPDIR names. An
    object store shows an object when all of it is there; other file systems get it under a hidden
    name, and then its own.
    """

    def __init__(self, url: str) -> None:
        """Begin a file; nothing is sent before `place`.

        Raises:
            OutputError: nothing can be written there, or not into the temporary directory.
            MissingDependencyError: what writes there is not installed.
        """
        check_writable_remote(url)
        self._system, _ = file_system(url)
        self._atomic = scheme_of(url) in _ATOMIC
        super().__init__(os.path.join(tempfile.gettempdir(), split(url)[1]))
        self.path = url

    def sync(self) -> None:
        """Do nothing: a temporary file need not outlive a power cut."""

    @property
    def is_placed(self) -> bool:
        """Whether the file has appeared; True as well where that could not be found out."""
        return self._placed

    def place(self, *, replace: bool) -> None:
        """Upload the file; it appears under its name when all of it is there.

        Args:
            replace: take the place of a file of that name; otherwise such a file is an error. It
                is looked for right before the upload: few file systems can do better.

        Raises:
            OutputError: that failed; what was there before is untouched.
        """
        _, final = file_system(self.path)
        before = self._find(final)
        self._check_free(before, replace=replace)
        folder, _, name = final.rpartition("/")
        there = final if self._atomic else f"{folder}/.{name[:100]}.{os.urandom(8).hex()}"
        try:
            if folder.strip("/") and not self._atomic:
                self._system.makedirs(folder, exist_ok=True)
            self._system.put_file(self.working_path, there)
            self._check_size(there)
            if not self._atomic:
                self._check_free(self._find(final), replace=replace)
                self._rename(there, final)
        except BaseException as error:
            arrived = self._has_arrived(final, before)
            self._placed = arrived is not False
            if not self._atomic or (before is None and not self._placed):
                with suppress(Exception):  # the first fault is the one to tell
                    self._system.rm_file(there)
            # An answer that was lost on its way does not make the upload fail.
            if not arrived or not isinstance(error, Exception):
                if isinstance(error, CompatRestoreError) or not isinstance(error, Exception):
                    raise
                raise _Diagnosis.of(error).output_error(self.path) from error
        self._placed = True
        self.close()

    def _find(self, path: str) -> dict[str, object] | None:
        """Return what is known of a file; None if there is none that may be seen.

        Raises:
            OutputError: that cannot be found out.
        """
        try:
            self._system.invalidate_cache()
            return self._system.info(path)
        except Exception as error:
            diagnosis = _Diagnosis.of(error)
            if diagnosis.fault in (_Fault.MISSING, _Fault.REFUSED):
                return None
            raise diagnosis.output_error(self.path) from error

    def _check_free(self, found: dict[str, object] | None, *, replace: bool) -> None:
        if found is not None and not replace:
            raise OutputError(
                f"'{self.path}' exists already, or appeared while it was being written: is another "
                "program writing the same checkpoint? Nothing was changed"
            )

    def _has_arrived(self, final: str, before: dict[str, object] | None) -> bool | None:
        """Whether the file stands in its place after a fault; None if that cannot be found out."""
        try:
            found = self._find(final)
        except OutputError:
            return None
        return (
            found is not None
            and found.get("size") == os.fstat(self.descriptor).st_size
            and (before is None or _differ(found, before))
        )

    def _check_size(self, there: str) -> None:
        self._system.invalidate_cache()
        found, written = self._system.info(there).get("size"), os.fstat(self.descriptor).st_size
        if found != written:
            raise OutputError(
                f"'{self.path}' cannot be written: of its {written} bytes {found} arrived"
            )

    def _rename(self, source: str, destination: str) -> None:
        from fsspec.asyn import AsyncFileSystem
        from fsspec.spec import AbstractFileSystem

        # Theirs looks for patterns in the names, and copies.
        inherited = (AbstractFileSystem.mv, AsyncFileSystem.mv)
        if type(self._system).mv in inherited:
            self._system.cp_file(source, destination)
            self._system.rm_file(source)
        else:
            self._system.mv(source, destination)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"'{self.path}' cannot be written: the temporary file for it, in "
            f"'{tempfile.gettempdir()}', takes no more ({error.strerror or error}); TMPDIR names "
            "another directory; nothing was changed"
        )
