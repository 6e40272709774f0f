"""Writing V2 tensor bundles, so that a checkpoint appears whole or not at all.

A bundle is two files or more, and one rename can only put one in place. So the index decides: data
files are put in place first, under names that no other bundle of that prefix uses, and the rename
of the index is the moment at which the new checkpoint replaces what was there. The names are
free because they carry the number of data files: where `-of-00001` is taken by an older bundle,
the new one is written as one of two, the second of them empty. Until the index is renamed, the
old index and its data stay as they were; only after that are they removed.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from compat_restore.checkpoint import wire
from compat_restore.checkpoint.bundle import (
    BundleEntry,
    data_file,
    decode_strings,
    decode_values,
    encode_strings,
)
from compat_restore.checkpoint.checksum import crc32c, mask, unmask
from compat_restore.checkpoint.files import ClosedAtEnd, LocalFile
from compat_restore.checkpoint.table import TableBuilder
from compat_restore.errors import DamagedCheckpointError, OutputError
from compat_restore.tensors import OPAQUE, DType, array_bytes, element_count, numpy_dtype

if TYPE_CHECKING:
    from typing import BinaryIO

    from compat_restore.checkpoint.reader import StoredTensor
    from compat_restore.tensors import Array, Shape

__all__ = ["BundleWriter", "check_destination"]

_COPY_CHUNK = 1 << 20
_PRODUCER = 1  # kTensorBundleVersion
_DATA_NAME = re.compile(r"\.data-(\d{5})-of-(\d{5})$")


def check_destination(prefix: str, *, overwrite: bool) -> tuple[str, ...]:
    """Return the files of checkpoints that stand under a prefix, the index first.

    Raises:
        OutputError: there are some and `overwrite` is not set, or no bundle can have this prefix.
    """
    if not os.path.basename(prefix) or os.path.isdir(prefix):
        raise OutputError(
            f"'{prefix}' is {'a directory' if prefix else 'no name'}; a prefix for the files is "
            f"expected, such as '{os.path.join(prefix, 'model.ckpt')}'"
        )
    old = _existing(prefix)
    if old and not overwrite:
        raise OutputError(
            f"'{prefix}' exists already ({', '.join(map(os.path.basename, old))}); "
            "choose another name, or overwrite it with overwrite=True (--overwrite)"
        )
    return old


def _existing(prefix: str) -> tuple[str, ...]:
    folder, stem = os.path.split(os.path.abspath(prefix))
    found = [path for path in (f"{prefix}.index", prefix, f"{prefix}.meta") if _exists(path)]
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise _output_error(prefix, error) from error
    found += [
        os.path.join(folder, name)
        for name in names
        if name.startswith(stem) and _DATA_NAME.fullmatch(name[len(stem) :])
    ]
    return tuple(found)


class BundleWriter(ClosedAtEnd):
    """Writes one V2 bundle: add tensors in any order, then `finish`.

    In a `with` statement, leaving without `finish` removes what was written.
    """

    def __init__(self, prefix: str, *, overwrite: bool = False) -> None:
        """Begin a bundle under `prefix`; its directory is made if it is missing.

        Raises:
            OutputError: there is a checkpoint already and `overwrite` is not set, or the place
                cannot be written to.
        """
        self._old = check_destination(prefix, overwrite=overwrite)
        self._prefix = prefix
        self._folder, stem = os.path.split(os.path.abspath(prefix))
        self._entries: dict[bytes, BundleEntry] = {}
        self._offset = 0
        temporary = os.path.join(self._folder, f".{stem}.{secrets.token_hex(8)}")
        self._temporary_data = f"{temporary}.data"
        self._temporary_index = f"{temporary}.index"
        self._placed: list[str] = []
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._data: BinaryIO = open(self._temporary_data, "xb")  # noqa: SIM115
        except OSError as error:
            raise _output_error(prefix, error) from error

    def add(self, name: str, dtype: DType, array: Array) -> None:
        """Add a tensor by its values.

        Args:
            name: its key.
            dtype: the type to declare; quantised values come as integers, strings as `bytes`.
            array: the values.

        Raises:
            OutputError: the data cannot be written.
        """
        if dtype is DType.string:
            data, crc = encode_strings(array.ravel().tolist())
            self._add(name, dtype, array.shape, [data], crc)
            return
        pieces = list(array_bytes(array.astype(numpy_dtype(dtype), copy=False)))
        crc = 0
        for piece in pieces:
            crc = crc32c(bytes(piece), crc)
        self._add(name, dtype, array.shape, pieces, crc)

    def add_stored(self, name: str, dtype: DType, shape: Shape, stored: StoredTensor) -> None:
        """Add a tensor by copying its bytes from another bundle; its checksum goes with it.

        The bytes are checked against the checksum on the way.

        Raises:
            DamagedCheckpointError: they do not have it.
            OutputError: the data cannot be written.
        """
        if dtype in (DType.string, DType.variant):
            data = stored.source.read(stored.offset, stored.size)
            if dtype is DType.string:
                try:
                    crc = decode_strings(data, element_count(shape))[1]
                except wire.WireError as error:
                    raise _damaged(name, stored, str(error)) from None
            else:
                crc = unmask(stored.checksum)
            self._check(name, stored, crc)
            self._add(name, dtype, shape, [data], crc)
            return
        start, left, crc = stored.offset, stored.size, 0
        offset = self._offset
        while left:
            chunk = stored.source.read(start, min(left, _COPY_CHUNK))
            crc = crc32c(chunk, crc)
            self._write(chunk)
            start += len(chunk)
            left -= len(chunk)
        self._check(name, stored, crc)
        self._enter(name, BundleEntry(dtype, shape, 0, offset, stored.size, stored.checksum))

    def read_back(self, name: str) -> Array | bytes:
        """Return what was written of a tensor, read from the file before it is put in place.

        Returns:
            The values; the bytes as stored, where NumPy cannot hold the values (variants).
        """
        entry = self._entries[name.encode()]
        try:
            self._data.flush()
        except OSError as error:
            raise _output_error(self._prefix, error) from error
        with LocalFile(self._temporary_data) as written:
            data = written.read(entry.offset, entry.size)
        return data if entry.dtype in OPAQUE else decode_values(data, entry)

    def finish(self) -> None:
        """Put the bundle in place.

        Raises:
            OutputError: that failed; what was there before is untouched.
        """
        shards = self._free_count()
        try:
            self._data.flush()
            os.fsync(self._data.fileno())
            self._data.close()
            self._write_index(shards)
            self._place(self._temporary_data, data_file(self._prefix, 0, shards))
            for shard in range(1, shards):
                self._place(self._empty_file(), data_file(self._prefix, shard, shards))
            _sync_directory(self._folder)
            os.replace(self._temporary_index, f"{self._prefix}.index")
        except OSError as error:
            raise _output_error(self._prefix, error) from error
        self._placed.clear()
        try:
            _sync_directory(self._folder)
        except OSError as error:
            raise OutputError(
                f"'{self._prefix}' is written, but it is not sure that it would survive a power "
                f"cut ({error.strerror or error}); older data files beside it were left"
            ) from error
        for path in self._old:
            if path != f"{self._prefix}.index":
                _remove(path)

    def close(self) -> None:
        """Remove what was written; after `finish` there is nothing to remove."""
        with suppress(OSError):  # what could not be written any more is not wanted any more
            self._data.close()
        # The index is the last to be put in place: where it is no longer waiting, all is done.
        placed = self._placed if os.path.lexists(self._temporary_index) else []
        for path in (self._temporary_data, self._temporary_index, *placed):
            _remove(path)

    def _free_count(self) -> int:
        """Return the smallest number of data files that no file of the prefix carries."""
        taken = {int(match[2]) for path in self._old if (match := _DATA_NAME.search(path))}
        return next(count for count in range(1, len(taken) + 2) if count not in taken)

    def _write_index(self, shards: int) -> None:
        header = wire.varint_field(1, shards) + wire.bytes_field(3, wire.varint_field(1, _PRODUCER))
        with open(self._temporary_index, "xb") as file:
            table = TableBuilder(file.write)
            table.add(b"", header)
            for key in sorted(self._entries):
                table.add(key, self._entries[key].encode())
            table.finish()
            file.flush()
            os.fsync(file.fileno())

    def _empty_file(self) -> str:
        path = f"{self._temporary_data}.empty"
        self._placed.append(path)
        with open(path, "xb"):
            pass
        return path

    def _place(self, temporary: str, final: str) -> None:
        if os.path.lexists(final):
            raise OutputError(
                f"'{final}' appeared while '{self._prefix}' was written: is another program "
                "writing the same checkpoint? Nothing was changed"
            )
        self._placed.append(final)
        os.replace(temporary, final)

    def _add(
        self, name: str, dtype: DType, shape: Shape, pieces: list[bytes | memoryview], crc: int
    ) -> None:
        offset = self._offset
        for piece in pieces:
            self._write(piece)
        size = self._offset - offset
        self._enter(name, BundleEntry(dtype, shape, 0, offset, size, mask(crc)))

    def _enter(self, name: str, entry: BundleEntry) -> None:
        try:
            key = name.encode()
        except UnicodeEncodeError:
            key = b""
        if not key or key.startswith(b"\0") or key in self._entries:
            raise OutputError(
                f"tensor '{name}' cannot be written: "
                + (
                    "it is there already"
                    if key in self._entries
                    else "this is no name for a tensor"
                )
            )
        self._entries[key] = entry

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._data.write(data)
        except OSError as error:
            raise _output_error(self._prefix, error) from error
        self._offset += len(data)

    def _check(self, name: str, stored: StoredTensor, crc: int) -> None:
        if mask(crc) != stored.checksum:
            raise _damaged(
                name,
                stored,
                f"the checksum of its bytes is {crc:08x}, {unmask(stored.checksum):08x} was stored",
            )


def _damaged(name: str, stored: StoredTensor, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"tensor '{name}' in '{stored.source.name}' (bytes {stored.offset} to "
        f"{stored.offset + stored.size}) is damaged: {what}; copy or download it again"
    )


def _output_error(prefix: str, error: OSError) -> OutputError:
    return OutputError(
        f"'{prefix}' cannot be written: {error.strerror or error}; nothing was changed"
    )


def _exists(path: str) -> bool:
    return os.path.lexists(path) and not os.path.isdir(path)


def _remove(path: str) -> None:
    # A file that cannot be removed is in nobody's way: no index names it.
    with suppress(OSError):
        os.unlink(path)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
