"""`.keras` archives: a zip with the weights in it, as an HDF5 file.

Source: Keras's `saving/saving_lib.py` and APPNOTE.TXT (PKWARE) 6.3. The archive holds
`metadata.json`, `config.json`, `model.weights.h5` and perhaps `assets/`. Keras stores them as they
are, so that the weights are a range of the archive; packed weights are unpacked into a nameless
temporary file.
"""

from __future__ import annotations

import io
import os
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from compat_restore.checkpoint.files import LocalFile
from compat_restore.errors import (
    CheckpointFormatError,
    CompatRestoreError,
    DamagedCheckpointError,
    OutputError,
)

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Iterator
    from typing import IO

    from typing_extensions import Buffer

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.checkpoint.output import OutputFile

__all__ = ["WEIGHTS", "ArchiveOutput", "KerasArchive", "has_weights"]

WEIGHTS = "model.weights.h5"
_ALL_WEIGHTS = frozenset({WEIGHTS, "model.weights.json", "model.weights.npz"})

_CONFIG = "config.json"
_METADATA = "metadata.json"
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1
_LONGEST_JSON = 64 << 20
_MOST_GROWTH = 1032  # what deflate makes of a byte at best
_CHUNK = 1 << 20


class _SourceStream(io.RawIOBase):
    """A byte source as the standard library wants to read it."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = (0, self._position, self._source.size)[whence]
        if start + offset < 0:
            raise OSError(f"a position of {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        length = max(min(len(view), self._source.size - self._position), 0)
        view[:length] = self._source.read(self._position, length)
        self._position += length
        return length


class _Unpacked(LocalFile):
    """Weights that were unpacked into a nameless file."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size


@contextmanager
def _told_damage(name: str) -> Iterator[None]:
    """Tell what the standard library says of a malformed archive as damage."""
    import zipfile
    import zlib

    try:
        yield
    except CompatRestoreError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        OSError,  # of the stream above: positions before its beginning
        EOFError,
        ValueError,
        OverflowError,
        IndexError,
        NotImplementedError,  # a compression or an encryption that zipfile does not know
        RuntimeError,
    ) as error:
        raise DamagedCheckpointError(
            f"'{name}' is damaged: as a zip archive it cannot be read ({str(error)[:200]}); copy "
            "or download it again"
        ) from None


def has_weights(source: ByteSource) -> bool:
    """Whether a file is a zip archive that holds weights of Keras, in whatever form."""
    import zipfile

    with suppress(DamagedCheckpointError), _told_damage(source.name):
        stream = io.BufferedReader(_SourceStream(source), 64 << 10)
        names = zipfile.ZipFile(stream).namelist()
        return not _ALL_WEIGHTS.isdisjoint(names)
    return False


class KerasArchive:
    """An open `.keras` file.

    Attributes:
        source: what holds the weights: the archive itself, or a temporary file.
        start: where in it they begin.
        size: of the weights in bytes.
        weights: the entry of the weights.
        zip: the archive, for its other members.
    """

    def __init__(self, source: ByteSource) -> None:
        """Find the weights in an archive.

        Raises:
            CheckpointFormatError: it has no weights that are known here.
            DamagedCheckpointError: it is malformed, or holds more than its size allows.
        """
        import zipfile

        self.name = source.name
        self._unpacked: _Unpacked | None = None
        self._found: int | None = None  # the checksum that the weights turned out to have
        with _told_damage(source.name):
            stream = io.BufferedReader(_SourceStream(source), 64 << 10)
            self.zip = zipfile.ZipFile(stream)
            members = self.zip.infolist()
        self.weights = self._only(members, WEIGHTS)
        for member in members:
            self._check(member, source.size)
        self.size = self.weights.file_size
        if self.weights.compress_type == _STORED:
            self.source, self.start = source, self._begin(source)
        else:
            self._unpacked = self._unpack()
            self._found = self.weights.CRC  # or it would not have been unpacked
            self.source, self.start = self._unpacked, 0

    def json(self, member: str) -> object:
        """Return what `config.json` or `metadata.json` holds; None if that is not to be had."""
        import json

        try:
            info = self.zip.getinfo(member)
        except KeyError:
            return None
        if info.file_size > _LONGEST_JSON:
            return None
        with _told_damage(self.name):
            text = self.zip.read(info)
        try:
            found: object = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return found

    def config(self) -> object:
        """Return the model's configuration."""
        return self.json(_CONFIG)

    def keras_version(self) -> str:
        """Return the version of Keras that wrote the archive, "" if it does not say."""
        metadata = self.json(_METADATA)
        version = metadata.get("keras_version") if isinstance(metadata, dict) else None
        return version if isinstance(version, str) else ""

    def chunks(self) -> Iterator[bytes]:
        """Yield the weights."""
        for at in range(0, self.size, _CHUNK):
            yield self.source.read(self.start + at, min(_CHUNK, self.size - at))

    def check(self) -> None:
        """Check the weights against the checksum that the archive has of them.

        They are read for it once; after that, what was found is told again.

        Raises:
            DamagedCheckpointError: they do not have it.
        """
        import zlib

        if self._found is None:
            crc = 0
            for chunk in self.chunks():
                crc = zlib.crc32(chunk, crc)
            self._found = crc
        self.compare(self._found)

    def compare(self, crc: int) -> None:
        """Compare the crc32 of weights that were read with the one that the archive has of them.

        Raises:
            DamagedCheckpointError: they differ.
        """
        if crc != self.weights.CRC:
            raise DamagedCheckpointError(
                f"'{self.name}' is damaged: the checksum of '{WEIGHTS}' in it is {crc:08x}, "
                f"{self.weights.CRC:08x} was stored; copy or download it again"
            )

    def copy(self, member: zipfile.ZipInfo, to: IO[bytes]) -> None:
        """Write what a member holds, its checksum checked.

        Raises:
            DamagedCheckpointError: it is malformed, or holds more than it says.
        """
        left = member.file_size
        with _told_damage(self.name):
            stream = self.zip.open(member)
        while True:
            with _told_damage(self.name):
                chunk = stream.read(_CHUNK)
                left -= len(chunk)
                if left < 0:
                    raise EOFError(f"'{member.filename[:200]}' is longer than it says")
            if not chunk:
                return
            to.write(chunk)

    def close(self) -> None:
        """Give the temporary file back."""
        self.zip.close()
        if self._unpacked is not None:
            self._unpacked.close()

    def _only(self, members: list[zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
        found = [member for member in members if member.filename == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise DamagedCheckpointError(
                f"'{self.name}' is damaged: it holds {len(found)} files '{name}'"
            )
        others = [
            m.filename[:200] for m in members if m.filename.endswith((".h5", ".npz", ".json"))
        ]
        raise CheckpointFormatError(
            f"'{self.name}' is a zip archive without '{name}' "
            f"(it holds {', '.join(map(repr, others[:8])) or 'nothing of the kind'}): it is no "
            ".keras file whose weights are in one HDF5 file"
        )

    def _check(self, member: zipfile.ZipInfo, size: int) -> None:
        """Refuse what is encrypted, or claims to unpack to more than it can."""
        grown = member.file_size > 1 + _MOST_GROWTH * member.compress_size
        stored = member.compress_type == _STORED
        if (
            member.compress_size > size
            or grown
            or (stored and member.file_size != member.compress_size)
        ):
            raise DamagedCheckpointError(
                f"'{self.name}' is damaged: '{member.filename[:200]}' claims {member.file_size} "
                f"bytes in {member.compress_size} of a file of {size}"
            )
        if member.flag_bits & _ENCRYPTED or member.compress_type not in (_STORED, _DEFLATED):
            raise CheckpointFormatError(
                f"'{self.name}' holds '{member.filename[:200]}' encrypted, or packed in a way "
                f"(number {member.compress_type}) that Keras does not use; save it again"
            )

    def _begin(self, source: ByteSource) -> int:
        """Return where the stored weights begin, behind their local header."""
        at = self.weights.header_offset
        with _told_damage(self.name):
            if not 0 <= at <= source.size - 30:
                raise struct.error(f"a header at byte {at}")
            signature, compressed, name, extra = struct.unpack("<4s4xH16xHH", source.read(at, 30))
            if signature != b"PK\x03\x04" or compressed != _STORED:
                raise struct.error(f"no header of stored bytes at byte {at}")
            if source.read(at + 30, name) != WEIGHTS.encode():
                raise struct.error(f"another member's header at byte {at}")
        begin = at + 30 + name + extra
        if begin + self.size > source.size:
            raise DamagedCheckpointError(
                f"'{self.name}' is damaged: the weights end at byte {begin + self.size} of "
                f"{source.size}"
            )
        return int(begin)

    def _unpack(self) -> _Unpacked:
        import tempfile

        try:
            with tempfile.TemporaryFile() as file:
                self.copy(self.weights, file)
                file.flush()
                return _Unpacked(f"{self.name} ({WEIGHTS})", os.dup(file.fileno()))
        except CompatRestoreError:
            raise
        except OSError as error:
            raise OutputError(
                f"the weights in '{self.name}' are packed, and there is no room to unpack "
                f"{self.size} bytes in '{tempfile.gettempdir()}': {error.strerror or error}"
            ) from error


class _OutputStream(io.RawIOBase):
    """An output file as the standard library wants to write it."""

    def __init__(self, output: OutputFile) -> None:
        self._output = output
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        self._output.write_at(self._position, view)
        self._position += len(view)
        return len(view)


class ArchiveOutput:
    """An archive that is being written: another's members, and weights that are still to be set.

    Attributes:
        start: where the weights begin in the output.
    """

    def __init__(self, template: KerasArchive, output: OutputFile) -> None:
        """Copy an archive; what is packed is packed again, the weights are not.

        Raises:
            DamagedCheckpointError: a member of the archive does not have its checksum, be it the
                weights.
            OutputError: the disk does not take it.
        """
        import zipfile

        self._output = output
        self._size = template.size
        self.start = 0
        self._zip = zipfile.ZipFile(_OutputStream(output), "w", allowZip64=True)
        try:
            self._copy(template)
        except BaseException:
            self.close()
            raise

    def _copy(self, template: KerasArchive) -> None:
        import zipfile

        self._zip.comment = template.zip.comment
        for member in template.zip.infolist():
            copy = zipfile.ZipInfo(member.filename, member.date_time)
            for name in ("external_attr", "internal_attr", "create_system", "comment"):
                setattr(copy, name, getattr(member, name))
            copy.file_size = member.file_size  # by which zipfile chooses the kind of header
            is_weights = member.filename == WEIGHTS
            copy.compress_type = _STORED if is_weights else member.compress_type
            with self._zip.open(copy, "w") as to:
                if is_weights:
                    self._weights = copy
                    self.start = self._header_end()
                    for chunk in template.chunks():
                        to.write(chunk)
                else:
                    template.copy(member, to)
            if is_weights:
                template.compare(copy.CRC)  # of what went through, which zipfile has counted

    def _header_end(self) -> int:
        stream = self._zip.fp
        assert stream is not None
        return int(stream.tell())

    def finish(self) -> None:
        """Write the checksum of the weights as they are now, and the archive's directory."""
        import zlib

        crc = 0
        for at in range(0, self._size, _CHUNK):
            chunk = self._output.read(self.start + at, min(_CHUNK, self._size - at))
            crc = zlib.crc32(chunk, crc)
        self._weights.CRC = crc
        self._output.write_at(self._weights.header_offset + 14, crc.to_bytes(4, "little"))
        self._zip.close()

    def close(self) -> None:
        """Let go of an archive that is not wanted any more."""
        self._zip.fp = None  # so that its end is not written to a closed file
