"""Fakes and the truth of the golden checkpoints, for the tests of the file formats."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np

from compat_restore.checkpoint.bundle_writer import BundleWriter
from compat_restore.checkpoint.table import TableBuilder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from compat_restore.checkpoint.reader import CheckpointReader
    from compat_restore.checkpoint.writer import Content

__all__ = ["MemoryFile", "flipped", "rows_of", "snapshot", "table_of", "truth_of", "write_bundle"]


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
