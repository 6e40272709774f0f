"""Writing npz: a zip file (`npz.py`) that appears whole or not at all.

Members are stored as they are, and their elements are aligned to 64 bytes, by a padding in the
extra field of the member's header. A member's checksum is put into its header after its data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compat_restore.checkpoint.checksum import crc32c
from compat_restore.checkpoint.copying import wrong
from compat_restore.checkpoint.files import (
    absolute,
    split,
)
from compat_restore.checkpoint.npz import (
    BYTES_KIND,
    CENTRAL_HEADER,
    CENTRAL_MAGIC,
    END,
    END64,
    END64_MAGIC,
    END_MAGIC,
    KINDS,
    LOCAL_HEADER,
    LOCAL_MAGIC,
    LOCATOR64,
    LOCATOR64_MAGIC,
    LONGEST_NAME,
    MEMBER_SUFFIX,
    MOST16,
    MOST32,
    NPY_MAGIC,
    STORED,
    UTF8_NAME,
    ZIP64_FIELD,
)
from compat_restore.checkpoint.output import create_output, sync_directory
from compat_restore.checkpoint.writer import (
    CheckpointWriter,
    check_contents,
    check_place,
    in_source_order,
    other_values,
    the_file_itself,
    values_of,
)
from compat_restore.errors import DamagedCheckpointError, DamagedTensorsError, OutputError
from compat_restore.tensors import DType, array_bytes, element_count, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compat_restore.checkpoint.writer import Content
    from compat_restore.tensors import Array, Shape

__all__ = ["NpzWriter", "check_destination"]

_CRC_OFFSET = 14  # of the crc32 in a member's header
_PADDING_FIELD = 0xD935  # as Android's zipalign
_VERSION, _VERSION64 = 20, 45
_NEW_YEAR_1980 = 1 << 5 | 1  # the earliest date of zip: the same values give the same file
_ZIP64_FROM = MOST32  # what is as large has its place in the zip64 fields
_CHUNK = 1 << 20
_ALIGNMENT = 64


def check_destination(path: str, *, overwrite: bool) -> tuple[str, ...]:
    """Return the file that stands under a name, if there is one.

    Raises:
        OutputError: there is one and `overwrite` is not set, or no file can have this name.
    """
    return check_place(path, the_file_itself, overwrite=overwrite, example="model.npz")


@dataclass(frozen=True, slots=True)
class _Written:
    """A member that was written.

    Attributes:
        content: what it was.
        place: of its local header.
        size: of its data.
        crc: the crc32 of that.
        elements: where the elements begin in the file.
        width: bytes of an element.
    """

    content: Content
    place: int
    size: int
    crc: int
    elements: int
    width: int


class NpzWriter(CheckpointWriter):
    """Writes an npz file that `numpy.load` reads."""

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        """Begin a file; its directory is made if it is missing.

        Raises:
            OutputError: there is a file already and `overwrite` is not set, or the place cannot be
                written to.
        """
        self.path = path
        self.format = "npz file"
        self._old = check_destination(path, overwrite=overwrite)
        self._written: dict[str, _Written] = {}
        self._faults: list[str] = []
        self._output = create_output(path)

    def write(self, contents: Sequence[Content], *, verify: bool = True) -> None:
        """Write all tensors, in the order of their sources."""
        check_contents(self.path, "npz", contents, is_name=_is_name, why_unfit=_why_unfit)
        for content in in_source_order(contents):
            try:
                self._add(content, verify=verify)
            except DamagedCheckpointError as error:
                self._faults.append(str(error))
        if self._faults:
            raise DamagedTensorsError(self._faults)
        self._write_directory()

    def read_back(self, name: str) -> Array:
        """Return what was written of a tensor; see `CheckpointWriter`."""
        import numpy as np

        written = self._written[name]
        dtype, shape = written.content.dtype, written.content.shape
        data = self._output.read(written.elements, element_count(shape) * written.width)
        if dtype is DType.string:
            kind = np.dtype(f"{BYTES_KIND}{written.width}")
            return np.frombuffer(data, kind).astype(object).reshape(shape)
        return np.frombuffer(bytearray(data), numpy_dtype(dtype)).reshape(shape)

    def finish(self) -> None:
        """Put the file in place; its rename is the moment."""
        self._output.place(replace=bool(self._old))
        try:
            sync_directory(split(absolute(self.path))[0])
        except OSError as error:
            raise OutputError(
                f"'{self.path}' is written, but it is not sure that it would survive a power cut "
                f"({error.strerror or error})"
            ) from error

    def close(self) -> None:
        """Remove what was written; after `finish` there is nothing to remove."""
        self._output.close()

    def _add(self, content: Content, *, verify: bool) -> None:
        """Write a member: its headers, then its elements, then the checksum into the header."""
        import zlib

        strings = _strings(content) if content.dtype is DType.string else []
        kind, width = KINDS.get(content.dtype, (BYTES_KIND, max(map(len, strings), default=1) or 1))
        header = _npy_header(kind, width, content.shape)
        size = len(header) + element_count(content.shape) * width
        place = self._output.position
        self._output.write(_local_header(content.name, size, place))
        begin = self._output.position
        self._output.write(header)
        crc = zlib.crc32(header)
        pieces: Iterator[bytes | memoryview]
        if content.dtype is DType.string:
            pieces = _padded(strings, width)
        elif content.stored:
            pieces = self._stored_bytes(content, verify=verify)
        else:
            pieces = array_bytes(values_of(content))
        for piece in pieces:
            self._output.write(piece)
            crc = zlib.crc32(piece, crc)
        if self._output.position != begin + size:
            raise other_values(content, f"{self._output.position - begin} bytes came for it")
        self._output.write_at(place + _CRC_OFFSET, crc.to_bytes(4, "little"))
        self._written[content.name] = _Written(
            content, place, size, crc, begin + len(header), width
        )

    def _stored_bytes(self, content: Content, *, verify: bool) -> Iterator[bytes | memoryview]:
        """Yield the bytes that are stored for a tensor; note it if they are damaged."""
        for stored in content.stored:
            crc = 0
            for offset in range(0, stored.size, _CHUNK):
                chunk = stored.source.read(
                    stored.offset + offset, min(_CHUNK, stored.size - offset)
                )
                if verify:
                    crc = crc32c(chunk, crc)
                yield chunk
            if verify and (message := wrong(content.name, stored, crc)):
                self._faults.append(message)

    def _write_directory(self) -> None:
        place = self._output.position
        for name, written in self._written.items():
            self._output.write(_central_header(name, written))
        self._output.write(_end(len(self._written), place, self._output.position - place))


def _why_unfit(content: Content) -> str | None:
    """Return why npz cannot hold a tensor; None if it can."""
    if content.dtype in KINDS:
        return None
    if content.dtype is not DType.string:
        return str(content.dtype)
    if any(element.endswith(b"\0") for element in _strings(content)):
        return "strings that end in NUL bytes, which NumPy cuts off"
    return None


def _strings(content: Content) -> list[bytes]:
    found: list[bytes] = values_of(content).ravel().tolist()
    return [e if isinstance(e, bytes) else str(e).encode() for e in found]


def _is_name(name: str) -> bool:
    try:
        return "\0" not in name and len(name.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _padded(strings: Sequence[bytes], width: int) -> Iterator[bytes | memoryview]:
    """Yield strings filled up to `width`, some at a time."""
    batch = max(_CHUNK // width, 1)
    for begin in range(0, len(strings), batch):
        yield b"".join(element.ljust(width, b"\0") for element in strings[begin : begin + batch])


def _npy_header(kind: str, width: int, shape: Shape) -> bytes:
    order = "|" if kind == BYTES_KIND or width == 1 else "<"
    text = f"{{'descr': '{order}{kind}{width}', 'fortran_order': False, 'shape': {shape}, }}"
    filled = -(10 + len(text) + 1) % _ALIGNMENT
    length = len(text) + filled + 1
    return (
        NPY_MAGIC
        + b"\x01\x00"
        + length.to_bytes(2, "little")
        + text.encode()
        + b" " * filled
        + b"\n"
    )


def _local_header(name: str, size: int, place: int) -> bytes:
    """Return a local header without a checksum, after which the data is aligned."""
    raw = f"{name}{MEMBER_SUFFIX}".encode()
    extra = b""
    if size >= _ZIP64_FROM:
        extra = struct.pack("<HHQQ", ZIP64_FIELD, 16, size, size)
    position = place + LOCAL_HEADER.size + len(raw) + len(extra)
    if filled := -position % _ALIGNMENT:
        filled += _ALIGNMENT if filled < 6 else 0
        extra += struct.pack("<HHH", _PADDING_FIELD, filled - 4, _ALIGNMENT) + bytes(filled - 6)
    shown = _shown(size)
    return (
        LOCAL_HEADER.pack(
            LOCAL_MAGIC,
            _VERSION64 if size >= _ZIP64_FROM else _VERSION,
            0 if raw.isascii() else UTF8_NAME,
            STORED,
            0,
            _NEW_YEAR_1980,
            0,
            shown,
            shown,
            len(raw),
            len(extra),
        )
        + raw
        + extra
    )


def _central_header(name: str, written: _Written) -> bytes:
    raw = f"{name}{MEMBER_SUFFIX}".encode()
    large = [written.size] * 2 if written.size >= _ZIP64_FROM else []
    if written.place >= _ZIP64_FROM:
        large.append(written.place)
    extra = b""
    if large:
        extra = struct.pack(f"<HH{len(large)}Q", ZIP64_FIELD, 8 * len(large), *large)
    shown = _shown(written.size)
    version = _VERSION64 if large else _VERSION
    return (
        CENTRAL_HEADER.pack(
            CENTRAL_MAGIC,
            version,
            version,
            0 if raw.isascii() else UTF8_NAME,
            STORED,
            0,
            _NEW_YEAR_1980,
            written.crc,
            shown,
            shown,
            len(raw),
            len(extra),
            0,
            0,
            0,
            0o600 << 16,  # what numpy.savez gives a file that is unpacked
            _shown(written.place),
        )
        + raw
        + extra
    )


def _end(count: int, place: int, size: int) -> bytes:
    """Return the end of the archive, whose directory of `size` bytes stands at `place`."""
    records = b""
    if count >= MOST16 or place >= _ZIP64_FROM or size >= _ZIP64_FROM:
        records = END64.pack(
            END64_MAGIC, END64.size - 12, _VERSION64, _VERSION64, 0, 0, count, count, size, place
        ) + LOCATOR64.pack(LOCATOR64_MAGIC, 0, place + size, 1)
    shown = min(count, MOST16)
    return records + END.pack(
        END_MAGIC,
        0,
        0,
        shown,
        shown,
        _shown(size),
        _shown(place),
        0,
    )


def _shown(number: int) -> int:
    """Return what stands in 4 bytes for a number that may need zip64."""
    return number if number < _ZIP64_FROM else MOST32
