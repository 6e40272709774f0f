r"""npz: arrays in a zip file, as `numpy.savez` writes them and `numpy.load` reads them.

Sources: PKWARE's `APPNOTE.TXT` (zip) and NumPy's `numpy/lib/format.py` (the members). The archive
has a member `NAME.npy` for each array:

    6 bytes 93 "NUMPY", version (2), length of the header (2 bytes little-endian; 4 from version 2)
    header, a Python literal: {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
    the elements

in which `descr` is the byte order, the kind and the bytes of an element. Headers are matched, not
evaluated, and pickles (kind O) are never loaded.

A zip file is its members, each with a header before its data; a directory of them with their sizes,
places and crc32; and an end that has the place of the directory:

    "PK" 3 4, version, flags, method (2 each), time, date (2 each), crc32 (4), compressed and real
    size (4 each), lengths of name and extra field (2 each), name, extra field

    "PK" 1 2, version made by, version, flags, method (2 each), time, date (2 each), crc32 (4),
    compressed and real size (4 each), lengths of name, extra field and comment (2 each), disk,
    internal (2 each) and external attributes, place of the member's header (4 each), name, extra
    field, comment

    "PK" 5 6, disk numbers (2, 2), members on the disk and in all (2 each), size and place of the
    directory (4 each), length of the comment (2), comment

What does not fit stands as FF FF FF FF; its 8 bytes are in the extra field 1 of a header, or in
the zip64 end and its locator, which come before the end. Python's `zipfile` is not used: where a
length in the directory is damaged it passes over members without a word.
"""

from __future__ import annotations

import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compat_restore.checkpoint.files import open_source
from compat_restore.checkpoint.reader import CheckpointReader, StoredTensor
from compat_restore.checkpoint.slices import check_shape
from compat_restore.errors import (
    CheckpointFormatError,
    DamagedCheckpointError,
    DamagedTensorsError,
)
from compat_restore.tensors import (
    DType,
    TensorSpec,
    element_count,
    format_shape,
    numpy_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.tensors import Array, Shape

__all__ = [
    "BYTES_KIND",
    "CENTRAL_HEADER",
    "CENTRAL_MAGIC",
    "END",
    "END64",
    "END64_MAGIC",
    "END_MAGIC",
    "KINDS",
    "LOCAL_HEADER",
    "LOCAL_MAGIC",
    "LOCATOR64",
    "LOCATOR64_MAGIC",
    "LONGEST_NAME",
    "MEMBER_SUFFIX",
    "MOST16",
    "MOST32",
    "NPY_MAGIC",
    "STORED",
    "UTF8_NAME",
    "ZIP64_FIELD",
    "NpzReader",
    "looks_like_npz",
]

MEMBER_SUFFIX = ".npy"
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
CENTRAL_HEADER = struct.Struct("<4sHHHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64 = struct.Struct("<4sIQI")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64_MAGIC, LOCATOR64_MAGIC = b"PK\x06\x06", b"PK\x06\x07"
ZIP64_FIELD = 1
MOST32, MOST16 = 0xFFFFFFFF, 0xFFFF  # these and what is larger need zip64
STORED, _DEFLATED = 0, 8
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED, UTF8_NAME = 1, 1 << 5, 1 << 6, 1 << 11
LONGEST_NAME = 1 << 15
_BEST_RATIO = 1032  # of deflate: 258 bytes for 2 bits
_CHUNK = 1 << 20
_INPUT_CHUNK = 1 << 16
_MOST_LISTED = 50

NPY_MAGIC = b"\x93NUMPY"
_LONGEST_NPY_HEADER = 10_000  # what NumPy reads
_USUAL_NPY_HEADER = 128
_KEY = r"""(?:'(?:descr|fortran_order|shape)'|"(?:descr|fortran_order|shape)")"""
_VALUE = r"""(?:'[^'"]*'|"[^'"]*"|True|False|\((?:\s*\d+L?\s*,)*\s*(?:\d+L?\s*)?\))"""
_ITEM = re.compile(rf"({_KEY})\s*:\s*({_VALUE})")
_HEADER = re.compile(rf"\{{\s*{_KEY}\s*:\s*{_VALUE}\s*(?:,\s*{_KEY}\s*:\s*{_VALUE}\s*)*,?\s*\}}\s*")
_DESCR = re.compile(r"(?P<order>[<>|=]?)(?P<kind>[a-zA-Z])(?P<size>\d{0,9})(?:\[\w*\])?")
_NUMBER = re.compile(r"\d+")
_LONGEST_NUMBER = 20

_DTYPES = {
    ("b", 1): DType.bool,
    ("i", 1): DType.int8,
    ("i", 2): DType.int16,
    ("i", 4): DType.int32,
    ("i", 8): DType.int64,
    ("u", 1): DType.uint8,
    ("u", 2): DType.uint16,
    ("u", 4): DType.uint32,
    ("u", 8): DType.uint64,
    ("f", 2): DType.float16,
    ("f", 4): DType.float32,
    ("f", 8): DType.float64,
    ("c", 8): DType.complex64,
    ("c", 16): DType.complex128,
}
KINDS = {dtype: (kind, size) for (kind, size), dtype in _DTYPES.items()}
BYTES_KIND, _TEXT = "S", "U"
_TEXT_WIDTH = 4  # bytes of a character
_SURROGATES = 0xD800, 0xDFFF
_REFUSED = {
    "O": "Python objects, which are pickled; to load a pickle can run any program",
    "V": "bytes without a type: NumPy does not keep bfloat16 and the small types of ml_dtypes",
    "M": "dates",
    "m": "times",
}


def looks_like_npz(source: ByteSource) -> bool:
    """Whether a file begins as a zip file whose first member is an array."""
    head = source.read(0, min(source.size, LOCAL_HEADER.size + LONGEST_NAME))
    if not head.startswith(LOCAL_MAGIC) or len(head) < LOCAL_HEADER.size:
        return False
    length = LOCAL_HEADER.unpack_from(head)[9]
    return head[LOCAL_HEADER.size : LOCAL_HEADER.size + length].endswith(MEMBER_SUFFIX.encode())


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the header of an array says.

    Attributes:
        dtype: the type of the elements.
        kind: its letter.
        width: bytes of an element.
        big_endian: whether those are in the other order.
        fortran: whether the first index varies fastest.
        shape: of the array.
        begin: where the elements begin in the member.
    """

    dtype: DType
    kind: str
    width: int
    big_endian: bool
    fortran: bool
    shape: Shape
    begin: int

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return element_count(self.shape) * self.width


@dataclass(frozen=True, slots=True)
class _Info:
    """What the directory says of a member, unchecked."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    place: int


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of the archive: what the directory says, checked, and where its data stands."""

    name: str
    deflated: bool
    offset: int
    compressed: int
    size: int
    crc: int


class _UnfitError(ValueError):
    """An array is whole, as far as one can see, but it is nothing that a checkpoint holds."""


class NpzReader(CheckpointReader):
    """Reads an npz file."""

    def __init__(self, path: str, notes: Iterable[str] = ()) -> None:
        """Read the directory of the archive and the header of each array.

        Raises:
            CheckpointNotFoundError: there is no such file.
            CheckpointFormatError: it is no zip file, holds no array, or arrays of which a
                checkpoint holds none (those are listed).
            DamagedCheckpointError: it is cut short, altered, or contradicts itself.
        """
        self.path = path
        self.notes = tuple(notes)
        self.format = "npz file"
        self._source = open_source(path)
        self._arrays: dict[str, tuple[_Member, _Layout]] = {}
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        self._specs = {
            name: TensorSpec(
                name,
                layout.dtype,
                layout.shape,
                stored_bytes=layout.size if layout.dtype is DType.string else None,
            )
            for name, (_, layout) in sorted(self._arrays.items())
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of every tensor by its name, sorted."""
        return self._specs

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Return where a tensor's bytes stand; nothing if they are compressed or in another order.

        Their source checks them against the member's checksum when they are read in their order.
        Without bytes there would be nothing to read, and the header would stay unchecked.
        """
        member, layout = self._arrays[self.key_of(name)]
        if (
            member.deflated
            or not layout.size
            or layout.big_endian
            or layout.dtype is DType.string
            or (layout.fortran and sum(dim > 1 for dim in layout.shape) > 1)
        ):
            return ()
        source = _CheckedBytes(self._source, member, layout)
        return (StoredTensor(source, member.offset + layout.begin, layout.size),)

    def verify(self, names: Iterable[str]) -> None:
        """Check the bytes of tensors against their crc32, in chunks."""
        faults = []
        for name in names:
            member, _ = self._arrays[self.key_of(name)]
            try:
                for _ in self._chunks(member):
                    pass
            except DamagedCheckpointError as error:
                faults.append(str(error))
        if faults:
            raise DamagedTensorsError(faults)

    def files(self) -> tuple[str, ...]:
        """Return the path of the file."""
        return (self.path,)

    def close(self) -> None:
        """Close the file; nothing can be read after it."""
        self._source.close()

    def _read(self, key: str) -> Array:
        member, layout = self._arrays[key]
        data = bytearray()
        for chunk in self._chunks(member):
            data += chunk
        try:
            return _decoded(data, layout)
        except ValueError as error:
            raise self._damaged(f"array '{key}' holds {error}") from None

    # -- opening ---------------------------------------------------------------------------------

    def _load(self) -> None:
        members, others = self._members()
        unfit = []
        for member in members:
            name = member.name.removesuffix(MEMBER_SUFFIX)
            try:
                layout = self._layout(member)
            except _UnfitError as error:
                unfit.append(f"'{name}' ({error})")
                continue  # told below, with the others
            if layout.begin + layout.size != member.size:
                raise self._damaged(
                    f"array '{name}' has {member.size - layout.begin} bytes, where {layout.dtype}"
                    f"{format_shape(layout.shape)} takes {layout.size}"
                )
            self._arrays[name] = member, layout
        if unfit:
            raise CheckpointFormatError(
                f"'{self.path}' holds {len(unfit)} arrays that no checkpoint holds: "
                f"{_listed(unfit)}; save it without them"
            )
        if others and not members:
            raise CheckpointFormatError(
                f"'{self.path}' is a zip archive without arrays (members that end in "
                f"'{MEMBER_SUFFIX}'); it holds {_listed([repr(name) for name in others], 3)}: open "
                "it with the program that wrote it"
            )
        if others:
            self.notes += (f"no arrays, passed over: {_listed([repr(n) for n in others], 8)}",)

    def _members(self) -> tuple[list[_Member], list[str]]:
        """Return the archive's arrays, and the names of its other members.

        Raises:
            CheckpointFormatError: it is no zip file.
            DamagedCheckpointError: its directory is damaged.
        """
        if not self._source.size:
            raise DamagedCheckpointError(f"'{self.path}' is empty: is there another copy?")
        infos, end = self._directory()
        names = Counter(info.name for info in infos)
        if twice := [name for name, count in names.items() if count > 1]:
            raise self._damaged(f"it has several members of the name {twice[0]!r}")
        members, others = [], []
        position, before = 0, ""
        for info in sorted(infos, key=lambda info: info.place):
            if info.place < position:
                raise self._damaged(f"{before!r} and {info.name!r} share bytes")
            offset = self._data_of(info, end)
            position, before = offset + info.compressed, info.name
            if before.endswith(MEMBER_SUFFIX):
                members.append(self._member(info, offset))
            else:
                others.append(before)
        return members, others

    def _directory(self) -> tuple[list[_Info], int]:
        """Return what the directory says of each member, and where it begins.

        Raises:
            CheckpointFormatError: it is no zip file.
            DamagedCheckpointError: its directory is damaged.
        """
        count, size, begin, end = self._end()
        if begin + size != end:
            raise self._damaged(
                f"its directory is said to have {size} bytes from byte {begin} on, and its end "
                f"stands at byte {end}"
            )
        data = self._source.read(begin, size)
        infos = []
        position = 0
        while len(data) - position >= CENTRAL_HEADER.size:
            info, position = self._info(data, position)
            infos.append(info)
        if position != size or len(infos) != count:
            raise self._damaged(f"its directory has {len(infos)} members, {count} were announced")
        return infos, begin

    def _end(self) -> tuple[int, int, int, int]:
        """Return (members, bytes of the directory, where it begins, where its end stands)."""
        most = min(self._source.size, END.size + MOST16)
        tail = self._source.read(self._source.size - most, most)
        at = tail.rfind(END_MAGIC, 0, len(tail) - END.size + len(END_MAGIC))
        if at < 0:
            if self._source.read(0, min(self._source.size, 4)) == LOCAL_MAGIC:
                raise self._damaged("the directory at its end is missing: it is cut short")
            raise CheckpointFormatError(f"'{self.path}' is no zip file, as npz is")
        _, disk, first_disk, here, count, size, begin, comment = END.unpack_from(tail, at)
        position = self._source.size - most + at
        if comment != self._source.size - position - END.size:
            raise self._damaged("its end is not where the file ends")
        locator = position - LOCATOR64.size
        if MOST16 in (here, count) or MOST32 in (size, begin):
            found = self._source.read(locator, LOCATOR64.size) if locator >= 0 else b""
            if found.startswith(LOCATOR64_MAGIC):
                position = LOCATOR64.unpack(found)[2]
                if position != locator - END64.size:
                    raise self._damaged(f"its zip64 end is said to stand at byte {position}")
                record = END64.unpack(self._source.read(position, END64.size))
                magic, *_, disk, first_disk, here, count, size, begin = record
                if magic != END64_MAGIC:
                    raise self._damaged("its zip64 end is malformed")
        if disk or first_disk or here != count:
            raise self._damaged("it is said to be one of several files")
        return count, size, begin, position

    def _info(self, data: bytes, at: int) -> tuple[_Info, int]:
        """Return what the directory says of a member at a position in it, and the next position."""
        (
            magic, _, _, flags, method, _, _, crc, compressed, size, *lengths, _, _, _, place,
        ) = CENTRAL_HEADER.unpack_from(data, at)  # fmt: skip
        begin = at + CENTRAL_HEADER.size
        raw = data[begin : begin + lengths[0]]
        extra = data[begin + lengths[0] : begin + lengths[0] + lengths[1]]
        end = begin + sum(lengths)
        if magic != CENTRAL_MAGIC or end > len(data):
            raise self._damaged(f"its directory is malformed at byte {at}")
        try:
            name = raw.decode("utf-8" if flags & UTF8_NAME else "cp437")
            size, compressed, place = _large(extra, (size, compressed, place))
        except (ValueError, struct.error) as error:
            raise self._damaged(f"its directory is malformed at byte {at}: {error}") from None
        return _Info(name, raw, flags, method, crc, compressed, size, place), end

    def _data_of(self, info: _Info, end: int) -> int:
        """Return where a member's data begins, by its local header; the directory begins at `end`.

        Raises:
            DamagedCheckpointError: the member is not where the directory says.
        """
        name, raw = info.name, info.raw_name
        name_length: int
        extra_length: int
        if info.place > end - LOCAL_HEADER.size - len(raw):
            raise self._damaged(f"{name!r} is said to be outside of the archive")
        head = self._source.read(info.place, LOCAL_HEADER.size + len(raw))
        magic, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(head)
        if magic != LOCAL_MAGIC or name_length != len(raw) or head[LOCAL_HEADER.size :] != raw:
            raise self._damaged(f"{name!r} is not where the directory says")
        offset = info.place + len(head) + extra_length
        if offset + info.compressed > end:
            raise self._damaged(
                f"{name!r} is said to take {info.compressed} bytes from byte {offset} on, and "
                f"the directory begins at byte {end}"
            )
        return offset

    def _member(self, info: _Info, offset: int) -> _Member:
        """Return an array whose data begins at `offset`.

        Raises:
            CheckpointFormatError: it is encrypted, or compressed in a way that NumPy never does.
            DamagedCheckpointError: it claims to be larger than it can be.
        """
        name = info.name
        if info.flags & (_ENCRYPTED | _PATCHED | _STRONGLY_ENCRYPTED):
            raise CheckpointFormatError(
                f"array {name!r} in '{self.path}' is encrypted; unpack it with its password, and "
                "save it anew"
            )
        if info.method not in (STORED, _DEFLATED):
            raise CheckpointFormatError(
                f"array {name!r} in '{self.path}' is compressed by method {info.method}, "
                "which NumPy never uses; unpack it, and save it anew"
            )
        deflated = info.method == _DEFLATED
        most = info.compressed * _BEST_RATIO if deflated else info.compressed
        if info.size > most or (not deflated and info.size != info.compressed):
            raise self._damaged(
                f"array {name!r} is said to have {info.size} bytes, and it stands in "
                f"{info.compressed}, which cannot hold more than {most}"
            )
        return _Member(name, deflated, offset, info.compressed, info.size, info.crc)

    def _layout(self, member: _Member) -> _Layout:
        """Return what the header of an array says.

        Raises:
            DamagedCheckpointError: it is malformed.
            _UnfitError: no checkpoint holds such an array.
        """
        try:
            return _parsed_header(self._head(member))
        except _UnfitError:
            raise
        except ValueError as error:
            raise self._damaged(f"array {member.name!r} has {error}") from None

    def _head(self, member: _Member) -> bytes:
        """Return the first bytes of a member, with the whole header of the array.

        Raises:
            ValueError: they are no array's, or cannot be unpacked.
        """
        wanted = min(member.size, _LONGEST_NPY_HEADER + 12)
        if member.deflated:
            import zlib

            packed = self._source.read(member.offset, min(member.compressed, _INPUT_CHUNK))
            try:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, max(wanted, 1))
            except zlib.error as error:
                raise ValueError(f"bytes that cannot be unpacked: {error}") from None
        head = self._source.read(member.offset, min(wanted, _USUAL_NPY_HEADER))
        if _npy_header_end(head) > len(head):
            return self._source.read(member.offset, wanted)
        return head

    # -- values ----------------------------------------------------------------------------------

    def _chunks(self, member: _Member) -> Iterator[bytes]:
        """Yield the bytes of a member; after the last, they are found to be those that were meant.

        Raises:
            DamagedCheckpointError: they are not.
        """
        import zlib

        crc = size = 0
        try:
            for chunk in self._unpacked(member) if member.deflated else self._plain(member):
                crc = zlib.crc32(chunk, crc)
                size += len(chunk)
                if size > member.size:
                    break
                yield chunk
        except zlib.error as error:
            raise self._damaged(f"array {member.name!r} cannot be unpacked: {error}") from None
        if size != member.size:
            raise self._damaged(
                f"array {member.name!r} has {'more' if size > member.size else size} bytes, and "
                f"{member.size} were announced"
            )
        _check_crc(self.path, member, crc)

    def _plain(self, member: _Member) -> Iterator[bytes]:
        end = member.offset + member.compressed
        for offset in range(member.offset, end, _CHUNK):
            yield self._source.read(offset, min(_CHUNK, end - offset))

    def _unpacked(self, member: _Member) -> Iterator[bytes]:
        import zlib

        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        end = member.offset + member.compressed
        for offset in range(member.offset, end, _INPUT_CHUNK):
            packed = self._source.read(offset, min(_INPUT_CHUNK, end - offset))
            while packed and not stream.eof:
                chunk = stream.decompress(packed, _CHUNK)
                packed = stream.unconsumed_tail
                if not chunk:
                    break
                yield chunk
        while not stream.eof:
            chunk = stream.decompress(b"", _CHUNK)
            if not chunk:
                raise zlib.error("it is cut short")
            yield chunk

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"'{self.path}' is damaged: {what}; copy or download it again"
        )


class _CheckedBytes:
    """The elements of a member, as a source that checks them against the member's crc32.

    It does so where they are read from the first to the last, as all that copies them does.
    """

    descriptor = None  # a kernel that copies a file would check nothing

    def __init__(self, source: ByteSource, member: _Member, layout: _Layout) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._member = member
        self._begin = self._next = member.offset + layout.begin
        self._crc = 0

    def read(self, offset: int, length: int) -> bytes:
        import zlib

        data = self._source.read(offset, length)
        if offset == self._begin:
            header = self._source.read(self._member.offset, self._begin - self._member.offset)
            self._next, self._crc = offset, zlib.crc32(header)
        if offset == self._next:
            self._next += length
            self._crc = zlib.crc32(data, self._crc)
            if self._next == self._member.offset + self._member.size:
                _check_crc(self.name, self._member, self._crc)
        return data

    def close(self) -> None:
        pass


def _check_crc(path: str, member: _Member, crc: int) -> None:
    """Check the checksum of a member's bytes.

    Raises:
        DamagedCheckpointError: it is not that which is stored.
    """
    if crc != member.crc:
        raise DamagedCheckpointError(
            f"array {member.name!r} in '{path}' is damaged: its checksum is {crc:08x}, "
            f"{member.crc:08x} was stored; copy or download it again"
        )


def _large(extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return numbers of which some may stand in the extra field, in 8 bytes each.

    Raises:
        ValueError, struct.error: they do not.
    """
    wanted = numbers.count(MOST32)
    position = 0
    while wanted and position < len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == ZIP64_FIELD:
            found = list(struct.unpack_from(f"<{wanted}Q", extra[position : position + length]))
            return tuple(found.pop(0) if number == MOST32 else number for number in numbers)
        position += length
    return numbers


def _npy_header_end(head: bytes) -> int:
    """Return where an array's elements begin, by its first 10 bytes or more.

    Raises:
        ValueError: it is no array, or its header is too long.
    """
    if not head.startswith(NPY_MAGIC) or len(head) < 12:
        raise ValueError(f"no header of an array: it begins with {head[:8]!r}")
    version = head[6]
    if version not in (1, 2, 3):
        raise ValueError(f"a header of version {version}, and 1 to 3 are known")
    begin = 10 if version == 1 else 12
    length = int.from_bytes(head[8:begin], "little")
    if length > _LONGEST_NPY_HEADER:
        raise ValueError(f"a header of {length} bytes")
    return begin + length


def _parsed_header(head: bytes) -> _Layout:
    """Return what the first bytes of an array say.

    Raises:
        ValueError: they are malformed.
        _UnfitError: no checkpoint holds such an array.
    """
    begin = _npy_header_end(head)
    if begin > len(head):
        raise ValueError("a header that is cut short")
    text = head[10 if head[6] == 1 else 12 : begin].decode("utf-8" if head[6] == 3 else "latin-1")
    if not _HEADER.fullmatch(text):
        if "'descr': [" in text:
            raise _UnfitError("records of several fields")
        raise ValueError(f"a malformed header: {text[:200]!r}")
    items = [(key[1:-1], value) for key, value in _ITEM.findall(text)]
    found = dict(items)
    if len(items) != 3 or len(found) != 3:
        raise ValueError(f"a header without descr, fortran_order and shape: {text[:200]!r}")
    if found["fortran_order"] not in ("True", "False") or not found["shape"].startswith("("):
        raise ValueError(f"a malformed header: {text[:200]!r}")
    digits = _NUMBER.findall(found["shape"])
    if any(len(number) > _LONGEST_NUMBER for number in digits):
        raise ValueError(f"a malformed shape: {text[:200]!r}")
    shape = tuple(map(int, digits))
    check_shape(shape)
    kind, width, order = _parsed_descr(found["descr"][1:-1])
    dtype = DType.string if kind in (BYTES_KIND, _TEXT) else _DTYPES[kind, width]
    if kind == _TEXT:
        width *= _TEXT_WIDTH
    return _Layout(dtype, kind, width, order == ">", found["fortran_order"] == "True", shape, begin)


def _parsed_descr(descr: str) -> tuple[str, int, str]:
    """Return (kind, size, byte order) of elements.

    Raises:
        ValueError: there are none such.
        _UnfitError: no checkpoint holds such elements.
    """
    match = _DESCR.fullmatch(descr)
    if match is None:
        raise ValueError(f"elements of type {descr!r}")
    kind, size = match["kind"], int(match["size"] or 0)
    if kind in _REFUSED:
        raise _UnfitError(_REFUSED[kind])
    if kind not in (BYTES_KIND, _TEXT) and (kind, size) not in _DTYPES:
        raise _UnfitError(f"elements of type {descr!r}")
    if not size:
        raise _UnfitError("strings of no length")
    return kind, size, match["order"]


def _decoded(data: bytearray, layout: _Layout) -> Array:
    """Return the values of an array; `data` is the whole member.

    Raises:
        ValueError: strings that are no text.
    """
    import numpy as np

    order = ">" if layout.big_endian else "<"
    size = layout.width // _TEXT_WIDTH if layout.kind == _TEXT else layout.width
    raw = np.dtype(f"{order}{layout.kind}{size}")
    flat = np.frombuffer(data, raw, offset=layout.begin)
    if layout.kind == _TEXT:
        points = np.frombuffer(data, f"{order}u4", offset=layout.begin)
        if np.any(
            (points > sys.maxunicode) | ((points >= _SURROGATES[0]) & (points <= _SURROGATES[1]))
        ):
            raise ValueError("characters that do not exist")
    if layout.dtype is DType.string:
        strings = np.empty(len(flat), np.dtype(object))
        strings[:] = [e.encode() if isinstance(e, str) else e for e in flat.tolist()]
        flat = strings
    else:
        flat = flat.astype(numpy_dtype(layout.dtype), copy=not flat.flags.aligned)
    if layout.fortran:
        return np.ascontiguousarray(flat.reshape(layout.shape[::-1]).T).reshape(layout.shape)
    return flat.reshape(layout.shape)


def _listed(names: Sequence[str], most: int = _MOST_LISTED) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
