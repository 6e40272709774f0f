"""Fakes and the truth of the golden checkpoints, for the tests of the file formats."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np

from compat_restore.checkpoint.bundle_writer import BundleWriter
from compat_restore.checkpoint.slices import encode_slice, slice_key
from compat_restore.checkpoint.table import TableBuilder
from compat_restore.checkpoint.wire import bytes_field, varint_field
from compat_restore.tensors import DType, Slice

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from compat_restore.checkpoint.reader import CheckpointReader
    from compat_restore.checkpoint.writer import Content

__all__ = [
    "MemoryFile",
    "flipped",
    "rows_of",
    "snapshot",
    "table_of",
    "truth_of",
    "v1_entries",
    "write_bundle",
]


class MemoryFile:
    """A `ByteSource` of bytes in memory."""

    name = "memory"
    descriptor = None

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0, "a reader asked for bytes before the file"
        assert 0 <= length <= self.size - offset, "a reader asked for bytes after the file"
        return self._data[offset : offset + length]

    def close(self) -> None:
        pass


def write_bundle(prefix: object, contents: Iterable[Content], **options) -> str:
    """Write a V2 checkpoint; return its prefix."""
    with BundleWriter(str(prefix), **options) as writer:
        writer.write(list(contents))
        writer.finish()
    return str(prefix)


def table_of(entries: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes of a table with these entries."""
    pieces: list[bytes] = []
    table = TableBuilder(pieces.append)
    for key, value in sorted(dict(entries).items()):
        table.add(key, value)
    table.finish()
    return b"".join(pieces)


def v1_entries(tensors: Mapping[str, np.ndarray]) -> dict[bytes, bytes]:
    """Return the entries of a V1 file that holds float32 tensors, each whole."""
    number = DType.float32.number
    meta, entries = b"", {}
    for name, array in tensors.items():
        whole = Slice((0,) * array.ndim, (None,) * array.ndim)
        shape = b"".join(bytes_field(2, varint_field(1, dim)) for dim in array.shape)
        named = bytes_field(1, name.encode())
        part = encode_slice(whole)
        meta += bytes_field(
            1, named + bytes_field(2, shape) + varint_field(3, number) + bytes_field(4, part)
        )
        values = varint_field(1, number) + bytes_field(2, shape) + bytes_field(5, array.tobytes())
        saved = named + bytes_field(2, part) + bytes_field(3, values)
        entries[slice_key(name, whole)] = bytes_field(2, saved)
    return {b"": bytes_field(1, meta)} | entries


def flipped(data: bytes, at: int, bits: int = 0xFF) -> bytes:
    """Return `data` with bits of one byte the other way round."""
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def truth_of(folder: Path) -> dict[str, dict[str, object]]:
    """Return what the writer of a golden checkpoint held: name -> dtype, shape, sha1."""
    return json.loads((folder / "truth.json").read_text())


def rows_of(reader: CheckpointReader) -> dict[str, dict[str, object]]:
    """Return every tensor as a row of `truth.json`."""
    rows = {}
    for name, spec in reader.specs().items():
        array = reader.read(name)
        strings = array.dtype == np.dtype(object)
        data = b"\0".join(array.ravel().tolist()) if strings else array.tobytes()
        sha1 = hashlib.sha1(data).hexdigest()
        rows[name] = {"dtype": spec.dtype.value, "shape": list(array.shape), "sha1": sha1}
    return rows


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, by its name."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}
