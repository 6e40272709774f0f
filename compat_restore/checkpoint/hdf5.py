"""HDF5 files as Keras writes them: groups, some attributes, and datasets, each checked.

Source: "HDF5 File Format Specification Version 3.0" (The HDF Group). What the releases of Keras
write is the oldest of its dialects, that of superblock version 0, which is decoded here:

    superblock       at byte 0 (512, 1024, ... after a user block): versions, the end of the file,
                     the root group's object header; all addresses count from the superblock
    object header    version 1: messages {type, size, flags, bytes}, continued in further blocks
    group            message 0x11: a B-tree (TREE) of leaves (SNOD) of entries {name, header}; the
                     names stand in a local heap (HEAP)
    dataset          messages: 0x01 dataspace, 0x03 datatype, 0x05 fill value, 0x08 layout (in the
                     header, in one range of the file, or in chunks indexed by a B-tree), 0x0b
                     filters, 0x07 values in other files (refused)
    attribute        message 0x0c: name, datatype, dataspace, bytes; strings of variable length
                     stand in a global heap (GCOL)

The HDF5 library itself is not used: one damaged byte of a file can crash it, and with it the
process, or keep it busy without end. Here every size and address is checked against the file
before it is used, no object is visited twice, and no other file is ever opened.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compat_restore.errors import CheckpointFormatError, DamagedCheckpointError
from compat_restore.tensors import DType, element_count, format_shape, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Literal

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.tensors import Array, Shape

__all__ = ["MAGIC", "Hdf5Dataset", "Hdf5File", "hdf5_start"]

MAGIC = b"\x89HDF\r\n\x1a\n"

_NOWHERE = (1 << 64) - 1  # the address of what has none
_MOST_USER_BLOCK = 1 << 20
_PAGE = 64 << 10
_MOST_PAGES = 64
_MOST_DEPTH = 100
_LONGEST_PATH = 4096
_LONGEST_NAME = 1024
_MOST_DIMENSIONS = 32
_ENTRY = 40  # bytes of a group's entry
# Deflate makes at best 1 byte of 1032; what claims to have grown more is no file of weights.
_MOST_GROWTH = 1032
_ALWAYS_ALLOWED = 1 << 20

_DATASPACE, _LINK_INFO, _DATATYPE, _OLD_FILL, _FILL, _LINK = 1, 2, 3, 4, 5, 6
_EXTERNAL, _LAYOUT, _FILTERS, _ATTRIBUTE = 7, 8, 11, 12
_CONTINUATION, _SYMBOL_TABLE, _ATTRIBUTE_INFO = 16, 17, 21
_SHARED = 2  # flag of a message: its bytes stand elsewhere

_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_FILTER_NAMES = {4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}

_CLASSES = (
    "integers",
    "floats",
    "times",
    "strings",
    "bit fields",
    "opaque elements",
    "compounds",
    "references to other objects",
    "enumerations",
    "sequences of variable length",
    "arrays",
    "complex numbers",
)
# (bytes, exponent's place and size, mantissa's place and size, exponent's bias)
_FLOATS = {
    (2, 10, 5, 0, 10, 15): DType.float16,
    (2, 7, 8, 0, 7, 127): DType.bfloat16,
    (4, 23, 8, 0, 23, 127): DType.float32,
    (8, 52, 11, 0, 52, 1023): DType.float64,
}


class _UnknownError(Exception):
    """Something that the format has, and that no file of weights needs."""


@dataclass(frozen=True, slots=True)
class _Element:
    """What the elements of a dataset or attribute are.

    Attributes:
        size: bytes of one, in the file.
        text: how strings are stored: each in `size` bytes, or in a global heap.
        opaque: bytes that another program's types made; `dtype` is a guess by their size.
    """

    dtype: DType
    size: int
    big_endian: bool = False
    text: Literal["", "padded", "heap"] = ""
    opaque: bool = False


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Where the pieces of a chunked dataset are indexed, and what was done to each."""

    tree: int
    shape: Shape
    filters: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Hdf5Dataset:
    """A dataset.

    Attributes:
        path: its name in the file, without the slash at the beginning.
        dtype: of its elements.
        shape: of the whole.
        place: (first byte in the source, bytes) where they stand in one range; None for chunks
            and for values that were never written.
        big_endian: whether the bytes of each element stand the other way round.
        attributes: the texts of those that were asked for.
    """

    path: str
    dtype: DType
    shape: Shape
    place: tuple[int, int] | None
    big_endian: bool
    attributes: Mapping[str, tuple[str, ...]]
    element: _Element
    chunks: _Chunks | None = None
    fill: bytes = b""

    @property
    def is_raw(self) -> bool:
        """Whether its bytes are those of the array, as they stand."""
        return self.place is not None and not self.big_endian and not self.element.text

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, as the file has them."""
        return element_count(self.shape) * self.element.size


def hdf5_start(source: ByteSource, start: int = 0, size: int | None = None) -> int | None:
    """Return where in a source an HDF5 file begins, after its user block; None if it is none."""
    size = source.size - start if size is None else size
    offset = 0
    while offset + len(MAGIC) <= size and offset <= _MOST_USER_BLOCK:
        if source.read(start + offset, len(MAGIC)) == MAGIC:
            return start + offset
        offset = max(512, offset * 2)
    return None


@dataclass(slots=True)
class _Messages:
    """The messages of one object header that matter here: (bytes, where they stand), by type."""

    first: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    attributes: list[bytes] = field(default_factory=list)


class Hdf5File:
    """The tree of an HDF5 file, read when it is made; values are read when asked for.

    Attributes:
        groups: the attributes of each group that were asked for, by its path; the root is "".
        datasets: by path.
    """

    def __init__(
        self,
        source: ByteSource,
        start: int,
        size: int,
        *,
        name: str,
        wanted: tuple[str, ...] = (),
    ) -> None:
        """Read the tree.

        Args:
            source: what holds the file.
            start: where in it the file begins (its superblock).
            size: of the file, in bytes from there.
            name: what to call the file in a message.
            wanted: the attributes to be read: names, with which others may begin before a number.

        Raises:
            CheckpointFormatError: it is of a dialect that Keras does not write, or holds what no
                tensor can be.
            DamagedCheckpointError: it contradicts itself, or leads out of the file.
        """
        self.name = name
        self.groups: dict[str, dict[str, tuple[str, ...]]] = {}
        self.datasets: dict[str, Hdf5Dataset] = {}
        self._source, self._start, self._size = source, start, size
        self._wanted = wanted
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._seen: set[int] = set()
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}
        self._entries_left = size // _ENTRY
        self._text_left = size
        self._blocks_left = size
        self._unknown: list[str] = []
        self._walk(self._root())
        if self._unknown:
            raise CheckpointFormatError(
                f"'{name}' holds what is no tensor: " + "; ".join(self._unknown[:20])
            )
        self._pages.clear()
        self._check_apart()

    def values(self, path: str) -> Array:
        """Return the values of a dataset, as an array of its own.

        Raises:
            CheckpointFormatError: they are packed in a way that is not known here.
            DamagedCheckpointError: what is stored are not such values.
        """
        import numpy as np

        dataset = self.datasets[path]
        try:
            if dataset.place is not None:
                data = bytearray(self._source.read(*dataset.place))
            elif dataset.chunks is not None:
                data = self._chunked(dataset, dataset.chunks)
            else:
                data = self._filled(dataset)
            if dataset.element.text:
                return self._texts(dataset, bytes(data))
        except (struct.error, _UnknownError, UnicodeError) as error:
            raise self._damaged(f"dataset '{path}' is damaged: {error}") from None
        finally:
            self._pages.clear()
        array = np.frombuffer(data, numpy_dtype(dataset.dtype))
        if dataset.big_endian:
            array = array.byteswap()
        return array.reshape(dataset.shape)

    # -- bytes -----------------------------------------------------------------------------------

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"'{self.name}' is damaged: {what}; copy or download it again"
        )

    def _read(self, address: int, length: int) -> bytes:
        """Return bytes of the file's structure, by address, through a small cache of pages."""
        if length < 0 or address < 0 or address + length > self._size:
            raise self._damaged(
                f"it has {self._size} bytes, and bytes {address} to {address + length} are needed"
            )
        first, last = address // _PAGE, (address + length - 1) // _PAGE
        if last - first > 1:
            return self._source.read(self._start + address, length)
        data = b"".join(self._page(number) for number in range(first, last + 1))
        return data[address - first * _PAGE :][:length]

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            begin = number * _PAGE
            page = self._source.read(self._start + begin, min(_PAGE, self._size - begin))
            self._pages[number] = page
            if len(self._pages) > _MOST_PAGES:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(number)
        return page

    def _once(self, address: int, what: str) -> int:
        if address in self._seen:
            raise self._damaged(f"{what} at byte {address} is reached in two ways")
        self._seen.add(address)
        return address

    # -- the tree --------------------------------------------------------------------------------

    def _root(self) -> int:
        """Return the address of the root group's object header, from the superblock."""
        if self._size < 96:
            raise self._damaged(f"it ends after {self._size} bytes")
        head = self._read(0, 96)
        version, offsets, lengths = head[8], head[13], head[14]
        if version in (2, 3):
            raise CheckpointFormatError(
                f"'{self.name}' is in a newer dialect of HDF5 (superblock version {version}), "
                "which Keras does not write; save it again with Keras, or rewrite it with "
                "`h5repack --low=0 --high=0`"
            )
        if version > 1 or (offsets, lengths) != (8, 8):
            raise self._damaged(
                f"its superblock has version {version} and addresses of {offsets} and {lengths} "
                "bytes, where versions up to 3 and 8 bytes are known"
            )
        at = 24 if version == 0 else 28
        base, _, end, _, _, root = struct.unpack_from("<6Q", head, at)
        # The base is written as 0, or as the length of the user block.
        if base and hdf5_start(self._source, self._start - base) != self._start:
            raise self._damaged(f"its superblock says that it stands at byte {base}")
        if end - base > self._size:
            raise self._damaged(
                f"it has {self._size} bytes of {end - base}: it is cut short, or its writer did "
                "not finish"
            )
        return int(root)

    def _walk(self, root: int) -> None:
        pending = [("", root, 0)]
        while pending:
            path, address, depth = pending.pop()
            if depth > _MOST_DEPTH or len(path) > _LONGEST_PATH:
                raise self._damaged(f"groups are nested too deeply: '{path[:200]}'...")
            self._once(address, f"'{path}'")
            try:
                messages = self._messages(address)
                if _SYMBOL_TABLE in messages.first:
                    self._check_known(messages)
                    self.groups[path] = self._attributes(messages)
                    found = list(self._members(messages.first[_SYMBOL_TABLE][0]))
                    for name, member in reversed(found):
                        below = f"{path}/{name}" if path else name
                        pending.append((below, member, depth + 1))
                else:
                    self._enter(path, messages)
            except _UnknownError as error:
                self._unknown.append(f"'{path}' is {error}")
            except (struct.error, IndexError, UnicodeError) as error:
                raise self._damaged(f"the header of '{path}' is malformed ({error})") from None

    def _enter(self, path: str, messages: _Messages) -> None:
        """Note what is no group of the dialect that is read here."""
        if _LAYOUT in messages.first or _EXTERNAL in messages.first:
            if path in self.datasets:
                raise self._damaged(f"two datasets are called '{path}'")
            self.datasets[path] = self._dataset(path, messages)
        elif _LINK_INFO in messages.first or _LINK in messages.first:
            raise _UnknownError("a group of a newer dialect, which Keras does not write")
        elif _DATATYPE not in messages.first:  # a named datatype holds nothing
            raise self._damaged(f"'{path}' is neither a group nor a dataset")

    def _messages(self, address: int) -> _Messages:
        """Return the messages of an object header."""
        head = self._read(address, 16)
        if head[:4] == b"OHDR":
            raise _UnknownError("an object of a newer dialect, which Keras does not write")
        version, _, _, _, size = struct.unpack_from("<BBHII", head)
        if version != 1:
            raise self._damaged(f"an object header of version {version} at byte {address}")
        found = _Messages()
        blocks = [(address + 16, size)]
        for begin, length in blocks:
            # Blocks that overlap would be kept, and gone through, many times over.
            self._blocks_left -= length
            if self._blocks_left < 0:
                raise self._damaged("the blocks of its headers overlap, and are longer than it")
            block = self._read(begin, length)
            at = 0
            while at + 8 <= length:
                kind, taken, flags = struct.unpack_from("<HHB", block, at)
                body = block[at + 8 : at + 8 + taken]
                if len(body) != taken:
                    raise self._damaged(f"a message at byte {begin + at} is longer than its block")
                if kind == _CONTINUATION:
                    block_at, block_size = struct.unpack_from("<QQ", body)
                    blocks.append((self._once(block_at, "a header's block"), block_size))
                elif kind == _ATTRIBUTE:
                    found.attributes.append(body)
                elif kind:
                    if flags & _SHARED and kind in (_DATATYPE, _DATASPACE, _FILTERS):
                        raise _UnknownError("described by a part of another object")
                    found.first.setdefault(kind, (body, begin + at + 8))
                at += 8 + taken
        return found

    def _members(self, table: bytes) -> Iterator[tuple[str, int]]:
        """Yield (name, address of the header) of what a group holds."""
        tree, heap = struct.unpack_from("<QQ", table)
        signature, version, size, _, segment = struct.unpack("<4sB3xQQQ", self._read(heap, 32))
        if signature != b"HEAP" or version != 0:
            raise self._damaged(f"no heap of names at byte {heap}")
        names = (segment, size)
        for leaf in self._leaves(tree, 0, 0):
            head = self._read(self._once(leaf, "a group's leaf"), 8)
            signature, version, count = struct.unpack("<4sBxH", head)
            if signature != b"SNOD" or version != 1:
                raise self._damaged(f"no leaf of a group at byte {leaf}")
            self._entries_left -= count
            if self._entries_left < 0:
                raise self._damaged("its groups claim more members than its bytes can name")
            entries = self._read(leaf + 8, count * _ENTRY)
            for at in range(0, len(entries), _ENTRY):
                name_at, address, cached = struct.unpack_from("<QQI", entries, at)
                name = self._member_name(names, name_at)
                if cached == 2 or address == _NOWHERE:
                    raise self._damaged(
                        f"'{name}' is a link to another place, which no file of Keras has"
                    )
                yield name, address

    def _member_name(self, heap: tuple[int, int], at: int) -> str:
        segment, size = heap
        raw = b""
        if at < size:
            raw = self._read(segment + at, min(_LONGEST_NAME + 1, size - at, self._size))
        raw, end, _ = raw.partition(b"\0")
        name = raw.decode()
        if not end or not name or "/" in name or name in (".", ".."):
            raise self._damaged(f"the name at byte {segment + at} is none: {name[:100]!r}")
        return name

    def _leaves(self, tree: int, kind: int, rank: int) -> Iterator[int]:
        """Yield the addresses of a group's leaves (kind 0), or of a chunked dataset's nodes."""
        pending = [(tree, -1)]
        while pending:
            address, expected = pending.pop()
            if address == _NOWHERE:
                continue  # no chunk was ever written
            head = self._read(self._once(address, "a node"), 24)
            signature, found_kind, level, count = struct.unpack_from("<4sBBH", head)
            if signature != b"TREE" or found_kind != kind or expected not in (-1, level):
                raise self._damaged(f"no node of a tree at byte {address}")
            if level == 0 and kind == 1:
                yield address
                continue
            key = 8 if kind == 0 else 8 + 8 * rank
            body = self._read(address + 24, count * (key + 8))
            children = [
                struct.unpack_from("<Q", body, at + key)[0] for at in range(0, len(body), key + 8)
            ]
            if level == 0:
                yield from children
            else:
                pending += [(child, level - 1) for child in reversed(children)]

    # -- attributes ------------------------------------------------------------------------------

    def _check_known(self, messages: _Messages) -> None:
        info = messages.first.get(_ATTRIBUTE_INFO)
        if info:
            flags = info[0][1]
            heap = struct.unpack_from("<Q", info[0], 4 if flags & 1 else 2)[0]
            if heap != _NOWHERE:
                raise _UnknownError("a group with attributes of a newer dialect")

    def _attributes(self, messages: _Messages) -> dict[str, tuple[str, ...]]:
        """Return the texts of the wanted attributes, by name."""
        found = {}
        for body in messages.attributes:
            version, flags, name_size, type_size, space_size = struct.unpack_from("<BBHHH", body)
            if version not in (1, 2, 3):
                raise self._damaged(f"an attribute of version {version}")
            at = 9 if version == 3 else 8
            name = body[at : at + name_size].partition(b"\0")[0].decode()
            if name.rstrip("0123456789") not in self._wanted:
                continue  # what Keras says about the model as a whole, and others' notes
            if version > 1 and flags:
                raise _UnknownError(f"described by an attribute '{name}' of another object's type")

            def padded(size: int, version: int = version) -> int:
                return -(-size // 8) * 8 if version == 1 else size

            at += padded(name_size)
            try:
                element = _element(body[at : at + type_size])
            except _UnknownError:
                continue  # no text
            at += padded(type_size)
            shape = _shape(body[at : at + space_size])
            at += padded(space_size)
            data = body[at : at + element_count(shape) * element.size]
            if len(data) != element_count(shape) * element.size:
                raise self._damaged(f"attribute '{name}' is longer than its place")
            if element.text:
                found[name] = tuple(raw.decode() for raw in self._strings(element, data))
        return found

    def _strings(self, element: _Element, data: bytes) -> Iterator[bytes]:
        """Yield the strings of an attribute or dataset."""
        if element.text == "padded":
            self._spend(len(data))
            for at in range(0, len(data), element.size):
                yield data[at : at + element.size].rstrip(b"\0")
            return
        for at in range(0, len(data), element.size):
            length, heap, index = struct.unpack_from("<IQI", data, at)
            if length == 0 or heap in (0, _NOWHERE):
                yield b""
                continue
            begin, size = self._heap(heap).get(index, (0, 0))
            if size < length:
                raise self._damaged(f"string {index} of the heap at byte {heap} is missing")
            self._spend(length)
            yield self._read(begin, length)

    def _spend(self, length: int) -> None:
        """Count what was made of strings: many that share bytes would fill the memory."""
        self._text_left -= length
        if self._text_left < 0:
            raise self._damaged("its strings share bytes, and are longer than the file")

    def _heap(self, address: int) -> dict[int, tuple[int, int]]:
        """Return (first byte, bytes) of the objects of a global heap, by their number."""
        if address in self._heaps:
            return self._heaps[address]
        signature, version, size = struct.unpack("<4sB3xQ", self._read(address, 16))
        if signature != b"GCOL" or version != 1:
            raise self._damaged(f"no heap at byte {address}")
        body = self._read(address, size)
        found: dict[int, tuple[int, int]] = {}
        at = 16
        while at + 16 <= size:
            index, length = struct.unpack_from("<H6xQ", body, at)
            if index == 0:
                break
            if length > size - at - 16:
                raise self._damaged(f"the heap at byte {address} is malformed")
            found[index] = address + at + 16, length
            at += 16 + -(-length // 8) * 8
        self._heaps[address] = found
        return found

    # -- datasets --------------------------------------------------------------------------------

    def _dataset(self, path: str, messages: _Messages) -> Hdf5Dataset:
        if _EXTERNAL in messages.first:
            raise self._damaged(f"dataset '{path}' keeps its values in other files")
        if not {_DATASPACE, _DATATYPE, _LAYOUT} <= messages.first.keys():
            raise self._damaged(f"dataset '{path}' is not described in full")
        self._check_known(messages)
        element = _element(messages.first[_DATATYPE][0])
        shape = _shape(messages.first[_DATASPACE][0])
        attributes = self._attributes(messages)
        if element.opaque:
            element = _told(element, attributes.get("dtype", ()))
        dataset = Hdf5Dataset(
            path=path,
            dtype=element.dtype,
            shape=shape,
            place=None,
            big_endian=element.big_endian,
            attributes=attributes,
            element=element,
            fill=_fill(messages),
        )
        self._check_growth(path, dataset.nbytes, shape)
        body, at = messages.first[_LAYOUT]
        version, kind = body[0], body[1]
        if version not in (3, 4) or (version == 4 and kind > 1):
            what = "is put together from other datasets" if kind == 3 else "is laid out"
            raise self._damaged(
                f"dataset '{path}' {what} in a way (version {version}, class {kind}) that no file "
                "of Keras has"
            )
        if kind == 0:
            (size,) = struct.unpack_from("<H", body, 2)
            address = at + 4
            if size > len(body) - 4:
                raise self._damaged(f"dataset '{path}' is longer than its header")
        elif kind == 1:
            address, size = struct.unpack_from("<QQ", body, 2)
        else:
            return replace(dataset, chunks=self._chunks(path, body, dataset, messages))
        if _FILTERS in messages.first:
            raise self._damaged(f"dataset '{path}' is packed, and not in chunks")
        if address == _NOWHERE:
            return dataset
        if size != dataset.nbytes:
            raise self._damaged(
                f"dataset '{path}' has {size} bytes, where {element.dtype}{format_shape(shape)} "
                f"takes {dataset.nbytes}"
            )
        if address + size > self._size:
            raise self._damaged(f"dataset '{path}' ends at byte {address + size} of {self._size}")
        return replace(dataset, place=(self._start + address, size))

    def _check_growth(self, path: str, claimed: int, shape: Shape) -> None:
        if claimed > _ALWAYS_ALLOWED + _MOST_GROWTH * self._size:
            raise self._damaged(
                f"dataset '{path}' of shape {format_shape(shape)} claims {claimed} bytes in a "
                f"file of {self._size}"
            )

    def _check_apart(self) -> None:
        """Check that no two datasets share bytes: setting one would set both."""
        last = ("", 0)
        for begin, size, path in sorted(
            (*dataset.place, path) for path, dataset in self.datasets.items() if dataset.place
        ):
            if size and begin < last[1]:
                raise self._damaged(f"datasets '{last[0]}' and '{path}' share bytes")
            if size:
                last = path, begin + size

    def _chunks(self, path: str, body: bytes, dataset: Hdf5Dataset, messages: _Messages) -> _Chunks:
        rank, tree = struct.unpack_from("<BQ", body, 2)
        dims = struct.unpack_from(f"<{rank}I", body, 11)
        shape = dims[:-1]
        if rank != len(dataset.shape) + 1 or dims[-1] != dataset.element.size or 0 in dims:
            raise self._damaged(f"the chunks of dataset '{path}' are not of its shape")
        self._check_growth(path, element_count(dims), shape)
        filters = messages.first.get(_FILTERS)
        return _Chunks(tree, shape, _filters(filters[0]) if filters else ())

    # -- values ----------------------------------------------------------------------------------

    def _filled(self, dataset: Hdf5Dataset) -> bytearray:
        """Return the bytes of a dataset whose values were never written."""
        fill = dataset.fill
        if len(fill) == dataset.element.size and fill.strip(b"\0"):
            return bytearray(fill * element_count(dataset.shape))
        return bytearray(dataset.nbytes)

    def _chunked(self, dataset: Hdf5Dataset, chunks: _Chunks) -> bytearray:
        """Return the bytes of a dataset that is stored in chunks, joined."""
        import numpy as np

        for number, _ in chunks.filters:
            if number not in (_DEFLATE, _SHUFFLE, _FLETCHER32):
                raise CheckpointFormatError(
                    f"dataset '{dataset.path}' in '{self.name}' is packed with the filter "
                    f"{_FILTER_NAMES.get(number, number)}, which Keras does not use; unpack it "
                    "with `h5repack -f NONE`"
                )
        element = np.dtype((np.void, dataset.element.size))
        pieces = list(self._pieces(dataset, chunks))
        expected = element_count(chunks.shape) * dataset.element.size
        if len(pieces) * expected > _ALWAYS_ALLOWED + _MOST_GROWTH * self._size:
            raise self._damaged(f"dataset '{dataset.path}' has more chunks than the file has bytes")
        data = self._filled(dataset)
        whole = np.frombuffer(data, element).reshape(dataset.shape)
        for starts, begin, size, skipped in pieces:
            raw = _unpacked(self._read(begin, size), chunks, skipped, expected, element.itemsize)
            if len(raw) != expected:
                raise self._damaged(
                    f"a chunk of dataset '{dataset.path}' at byte {begin} has {len(raw)} bytes of "
                    f"{expected}"
                )
            piece = np.frombuffer(raw, element).reshape(chunks.shape)
            there = tuple(slice(s, s + n) for s, n in zip(starts, chunks.shape, strict=True))
            kept = tuple(
                slice(0, max(full - s, 0)) for s, full in zip(starts, dataset.shape, strict=True)
            )
            whole[there] = piece[kept]
        return data

    def _pieces(
        self, dataset: Hdf5Dataset, chunks: _Chunks
    ) -> Iterator[tuple[Shape, int, int, int]]:
        """Yield (first indices, first byte, bytes, filters left out) of each chunk."""
        rank = len(dataset.shape) + 1
        seen = self._seen
        self._seen = set()  # of this walk alone: values may be read again
        try:
            taken = set()
            for node in self._leaves(chunks.tree, 1, rank):
                (count,) = struct.unpack("<H", self._read(node + 6, 2))
                key = struct.Struct(f"<II{rank}QQ")
                body = self._read(node + 24, count * key.size)
                for size, skipped, *starts, address in key.iter_unpack(body):
                    first = tuple(starts[:-1])
                    if first in taken or any(
                        s % n or s >= full
                        for s, n, full in zip(first, chunks.shape, dataset.shape, strict=True)
                    ):
                        raise self._damaged(
                            f"the chunks of dataset '{dataset.path}' do not fit its shape"
                        )
                    taken.add(first)
                    yield first, address, size, skipped
        finally:
            self._seen = seen

    def _texts(self, dataset: Hdf5Dataset, data: bytes) -> Array:
        import numpy as np

        self._text_left = self._size
        array = np.empty(element_count(dataset.shape), object)
        array[:] = list(self._strings(dataset.element, data))
        return array.reshape(dataset.shape)


def _shape(body: bytes) -> Shape:
    """Decode a dataspace message."""
    version, rank, flags = body[0], body[1], body[2]
    if version not in (1, 2) or rank > _MOST_DIMENSIONS:
        raise struct.error(f"a dataspace of version {version} and rank {rank}")
    if version == 2 and body[3] == 2:
        raise _UnknownError("without any elements, not even a scalar")
    if version == 1 and flags & 2:
        raise _UnknownError("of permuted dimensions")
    return struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)


def _element(body: bytes) -> _Element:
    """Decode a datatype message.

    Raises:
        _UnknownError: no tensor has such elements.
    """
    head, low, high, _, size = struct.unpack_from("<BBBBI", body)
    kind, version = head & 15, head >> 4
    big_endian = bool(low & 1)
    found = None
    if kind == 0:
        offset, precision = struct.unpack_from("<HH", body, 8)
        if (offset, precision) == (0, size * 8) and size in (1, 2, 4, 8):
            name = f"{'int' if low & 8 else 'uint'}{size * 8}"
            found = _Element(DType(name), size, big_endian and size > 1)
    elif kind == 1:
        offset, precision, *parts = struct.unpack_from("<HHBBBBI", body, 8)
        dtype = _FLOATS.get((size, *parts))
        implied = low >> 4 & 3 == 2 and high == size * 8 - 1 and not low & 64
        if dtype and implied and (offset, precision) == (0, size * 8):
            found = _Element(dtype, size, big_endian)
    elif kind == 3 and size:
        found = _Element(DType.string, size, text="padded")
    elif kind == 5 and size in (1, 2):
        found = _Element(DType.bfloat16 if size == 2 else DType.uint8, size, opaque=True)
    elif kind == 6:
        found = _complex(body, version, low | high << 8, size)
    elif kind == 8:
        found = _boolean(body, version, low | high << 8, size)
    elif kind == 9 and low & 15 == 1 and size == 16:
        found = _Element(DType.string, size, text="heap")
    if found is None:
        name = _CLASSES[kind] if kind < len(_CLASSES) else f"elements of class {kind}"
        raise _UnknownError(f"a dataset of {name} ({size} bytes each), which no tensor has")
    return found


def _complex(body: bytes, version: int, members: int, size: int) -> _Element | None:
    """Return the complex type that a compound of `r` and `i` is."""
    if members != 2 or size not in (8, 16):
        return None
    at = 8
    parts = []
    for name, place in ((b"r", 0), (b"i", size // 2)):
        end = body.index(b"\0", at) if b"\0" in body[at:] else len(body)
        if body[at:end] != name:
            return None
        at += 8 if version < 3 else 2
        width = 4 if version < 3 else 1
        if int.from_bytes(body[at : at + width], "little") != place:
            return None
        at += 32 if version == 1 else width
        parts.append(_element(body[at:]))
        at += 20  # a float's description
    if parts[0] != parts[1] or parts[0].size * 2 != size:
        return None
    if parts[0].dtype not in (DType.float32, DType.float64) or parts[0].big_endian:
        return None
    return _Element(DType.complex64 if size == 8 else DType.complex128, size)


def _boolean(body: bytes, version: int, members: int, size: int) -> _Element | None:
    """Return the boolean that an enumeration of FALSE and TRUE in one byte is."""
    names = (b"FALSE\0\0\0TRUE\0\0\0\0", b"FALSE\0TRUE\0")[version > 2]
    if members != 2 or size != 1 or body[20:].rstrip(b"\0") != (names + b"\0\1").rstrip(b"\0"):
        return None
    return _Element(DType.bool, 1)


def _told(element: _Element, dtype: tuple[str, ...]) -> _Element:
    """Return what opaque elements are: Keras says so in an attribute, except for bfloat16 in h5.

    Raises:
        _UnknownError: nothing tells which of the 8-bit types it is.
    """
    name = dtype[0] if len(dtype) == 1 else ""
    if name in DType.__members__ and DType(name).itemsize == element.size:
        return replace(element, dtype=DType(name))
    if element.size == 2 and not dtype:
        return element  # two opaque bytes are made of bfloat16 alone
    raise _UnknownError("a dataset of opaque elements, and nothing tells what they are")


def _fill(messages: _Messages) -> bytes:
    """Return the bytes of the value that stands for what was never written; b"" for zero."""
    if _FILL in messages.first:
        body = messages.first[_FILL][0]
        if body[0] < 3:
            if body[0] == 2 and not body[3]:
                return b""
            (size,) = struct.unpack_from("<I", body, 4)
            return body[8 : 8 + size]
        if not body[1] & 32:
            return b""
        (size,) = struct.unpack_from("<I", body, 2)
        return body[6 : 6 + size]
    if _OLD_FILL in messages.first:
        body = messages.first[_OLD_FILL][0]
        (size,) = struct.unpack_from("<I", body)
        return body[4 : 4 + size]
    return b""


def _filters(body: bytes) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Decode a filter pipeline message: (number of the filter, its parameters) of each."""
    version, count = body[0], body[1]
    if version not in (1, 2):
        raise struct.error(f"filters of version {version}")
    at = 8 if version == 1 else 2
    found = []
    for _ in range(count):
        (number,) = struct.unpack_from("<H", body, at)
        at += 2
        name_size = 0
        if version == 1 or number >= 256:
            (name_size,) = struct.unpack_from("<H", body, at)
            at += 2
        _, parameters = struct.unpack_from("<HH", body, at)
        at += 4 + (-(-name_size // 8) * 8 if version == 1 else name_size)
        found.append((number, struct.unpack_from(f"<{parameters}I", body, at)))
        at += 4 * parameters + (4 if version == 1 and parameters % 2 else 0)
    return tuple(found)


def _unpacked(data: bytes, chunks: _Chunks, skipped: int, expected: int, itemsize: int) -> bytes:
    """Undo the filters of a chunk, last first, never making more than `expected` bytes.

    Raises:
        struct.error: that is not what the filters made.
    """
    import zlib

    import numpy as np

    for at, (number, _) in reversed(list(enumerate(chunks.filters))):
        if skipped >> at & 1:
            continue  # the writer found that this filter does not help here
        if number == _DEFLATE:
            try:
                # Checksums of fletcher32 may follow the values.
                data = zlib.decompressobj().decompress(data, expected + 4 * len(chunks.filters) + 1)
            except zlib.error as error:
                raise struct.error(str(error)) from None
        elif number == _FLETCHER32:
            data, stored = data[:-4], data[-4:]
            if _fletcher32(data) != int.from_bytes(stored, "little"):
                raise struct.error("the checksum of a chunk is wrong")
        elif itemsize > 1:
            whole = len(data) // itemsize * itemsize
            bytes_apart = np.frombuffer(data[:whole], np.uint8).reshape(itemsize, -1)
            data = bytes_apart.T.tobytes() + data[whole:]
    return data


def _fletcher32(data: bytes) -> int:
    """Return the checksum that HDF5 calls fletcher32: of 16-bit words, the first byte high."""
    import numpy as np

    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    low = high = 0
    for at in range(0, len(words), 360):
        block = words[at : at + 360]
        sums = np.cumsum(block)
        high = (high + low * len(block) + int(sums.sum())) % 65535
        low = (low + int(block.sum())) % 65535
    return (high or 65535 * bool(words.any())) << 16 | (low or 65535 * bool(words.any()))
