"""The sorted table in which both checkpoint formats keep their entries.

It is LevelDB's table without filters. Sources: LevelDB's `doc/table_format.md`, TensorFlow's
`core/lib/io/format.h`, `block_builder.cc` and `table_builder.cc`.

    file    := block* metaindex-block index-block footer
    block   := contents, type (1 byte: 0 plain, 1 snappy), masked crc32c of contents and type (4)
    footer  := metaindex BlockHandle, index BlockHandle, zero padding to 40 bytes, magic (8)
    BlockHandle := offset varint64, size varint64 (of the contents, without the 5-byte trailer)

    contents := entry* restart* count
    entry    := shared varint32, unshared varint32, value-size varint32, key suffix, value
    restart  := offset of an entry whose `shared` is 0 (fixed32); count := their number (fixed32)

A key is the first `shared` bytes of the key before it, then the suffix. Keys ascend bytewise. In
the index block each entry's key is not less than every key of its block and less than every key
of the next, and its value is that block's BlockHandle.
"""

from __future__ import annotations

from itertools import pairwise
from operator import lt
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.wire import WireError, varint, write_varint
from compat_restore.errors import CheckpointFormatError, DamagedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compat_restore.checkpoint.files import ByteSource

__all__ = [
    "BLOCK_TRAILER_SIZE",
    "FOOTER_SIZE",
    "MAGIC",
    "BlockHandle",
    "TableBuilder",
    "TableReader",
]

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER_SIZE = 48
BLOCK_TRAILER_SIZE = 5
PLAIN, SNAPPY = 0, 1
BLOCK_SIZE = 256 * 1024
RESTART_INTERVAL = 16
_CHECKED_TOGETHER = 1 << 16  # entries: so soon is it found out that a block is no block
# What the keys of a block share, all together, in times of its size: as it stands in the file, and
# uncompressed. Names of 700 characters come to 40 or 70, and to 20.
_MOST_SHARED_STORED = 128
_MOST_SHARED = 64
# A snappy stream cannot expand further than this: a copy element takes at least 3 bytes for 64.
_SNAPPY_LARGEST_RATIO = 32


class BlockHandle(NamedTuple):
    """Where a block's contents stand: `offset` and `size` in bytes, the trailer not counted."""

    offset: int
    size: int

    @classmethod
    def decode(cls, data: bytes, position: int = 0) -> tuple[BlockHandle, int]:
        """Return (handle, position after it).

        Raises:
            WireError: there are no two varints.
        """
        offset, position = varint(data, position)
        size, position = varint(data, position)
        return cls(offset, size), position

    def encode(self) -> bytes:
        """Return the two varints."""
        return write_varint(self.offset) + write_varint(self.size)


class TableReader:
    """Reads a table: its entries in order, or one by its key; checksums are always checked."""

    def __init__(self, source: ByteSource) -> None:
        """Read the footer and the index block.

        Raises:
            CheckpointFormatError: the file does not end in a table's magic number.
            DamagedCheckpointError: it does, and is damaged.
        """
        self._source = source
        if source.size < FOOTER_SIZE:
            raise self._damaged(f"has {source.size} bytes, fewer than a footer's {FOOTER_SIZE}")
        footer = source.read(source.size - FOOTER_SIZE, FOOTER_SIZE)
        if footer[-8:] != MAGIC:
            raise CheckpointFormatError(
                f"'{source.name}' is no checkpoint table: its last 8 bytes are {footer[-8:].hex()} "
                f"(a table's are {MAGIC.hex()}); it is cut short, or it is another kind of file"
            )
        try:
            metaindex, position = BlockHandle.decode(footer)
            index, _ = BlockHandle.decode(footer, position)
        except WireError as error:
            raise self._damaged(f"has a damaged footer ({error})") from None
        if _footer(metaindex, index) != footer:
            raise self._damaged("has a damaged footer (it is not as its own handles are written)")
        self._block(metaindex)
        keys, values = self._entries(index)
        if index.offset + index.size + BLOCK_TRAILER_SIZE != source.size - FOOTER_SIZE:
            raise self._damaged(
                f"has an index block of {index.size} bytes at {index.offset}, which does not end "
                f"where the footer begins, at byte {source.size - FOOTER_SIZE}"
            )
        self._index: list[tuple[bytes, BlockHandle]] = []
        # The block that `get` read last: its entries, and the key of one that was not kept.
        self._last: tuple[BlockHandle, dict[bytes, bytes], bytes | None] | None = None
        end = 0
        for key, value in zip(keys, values, strict=True):
            try:
                handle, _ = BlockHandle.decode(value)
            except WireError as error:
                raise self._damaged(f"has a damaged index entry {key!r} ({error})") from None
            # Blocks that shared bytes would make a small file into a table of any size.
            if handle.offset < end:
                raise self._damaged(
                    f"has a block at {handle.offset}, inside the one that ends at {end}"
                )
            end = handle.offset + handle.size + BLOCK_TRAILER_SIZE
            if self._index and key <= self._index[-1][0]:
                raise self._disordered(self._index[-1][0], key)
            self._index.append((key, handle))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of every entry, keys ascending.

        Raises:
            DamagedCheckpointError: a block is damaged or keys do not ascend; never a short list.
        """
        for keys, values in self.blocks():
            yield from zip(keys, values, strict=True)

    def blocks(self) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Yield (keys, values) of each block in turn: the same as `items`, for many at once.

        Raises:
            DamagedCheckpointError: a block is damaged or keys do not ascend; never a short list.
        """
        for at in range(len(self._index)):
            keys, values = self._entries_in_order(at)
            if keys:
                yield keys, values

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, or None if the table does not have it.

        Raises:
            DamagedCheckpointError: the block that would hold it is damaged.
        """
        from bisect import bisect_left

        at = bisect_left(self._index, key, key=lambda entry: entry[0])
        if at == len(self._index):
            return None
        handle = self._index[at][1]
        if self._last is not None and self._last[0] == handle and self._last[2] != key:
            return self._last[1].get(key)
        keys, values = self._entries_in_order(at)
        entries = dict(zip(keys, values, strict=True))
        found = entries.get(key)
        # Small values share a block, and are asked for in turn. One that is large is the last of
        # its block, and is not kept: asking for it again reads the block again.
        left = keys[-1] if keys and handle.size > 2 * BLOCK_SIZE else None
        if left is not None:
            del entries[left]
        self._last = handle, entries, left
        return found

    def _entries_in_order(self, at: int) -> tuple[list[bytes], list[bytes]]:
        """Return (keys, values) of a block, its keys ascending between the bounds of the index."""
        bound, handle = self._index[at]
        keys, values = self._entries(handle)
        if not keys:
            return keys, values
        before = self._index[at - 1][0] if at else None
        if before is not None and keys[0] <= before:
            raise self._disordered(before, keys[0])
        if keys[-1] > bound:
            raise self._damaged(f"has the key {keys[-1]!r} in a block that ends at {bound!r}")
        return keys, values

    def _disordered(self, key: bytes, after: bytes) -> DamagedCheckpointError:
        return self._damaged(f"has the key {after!r} after {key!r}: keys must ascend")

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"'{self._source.name}' {what}: the file is damaged; copy or download it again"
        )

    def _block(self, handle: BlockHandle) -> bytes:
        """Return the contents of a block, its checksum checked, uncompressed."""
        if handle.offset + handle.size + BLOCK_TRAILER_SIZE > self._source.size - FOOTER_SIZE:
            raise self._damaged(
                f"points to a block of {handle.size} bytes at {handle.offset}, past its end"
            )
        data = self._source.read(handle.offset, handle.size + BLOCK_TRAILER_SIZE)
        stored = int.from_bytes(data[-4:], "little")
        found = mask(crc32c(data[:-4]))
        if stored != found:
            raise self._damaged(
                f"has a block at {handle.offset} (+{handle.size}) whose checksum is {found:08x} "
                f"where {stored:08x} is stored"
            )
        kind, contents = data[-5], data[:-BLOCK_TRAILER_SIZE]
        if kind == PLAIN:
            return contents
        if kind == SNAPPY:
            return self._uncompressed(contents, handle)
        raise self._damaged(f"has a block at {handle.offset} of the unknown compression {kind}")

    def _uncompressed(self, contents: bytes, handle: BlockHandle) -> bytes:
        import cramjam

        try:
            size, _ = varint(contents, 0)
        except WireError:
            size = -1
        if not 0 <= size <= max(len(contents) * _SNAPPY_LARGEST_RATIO, 64):
            raise self._damaged(
                f"has a compressed block at {handle.offset} that claims to hold {size} bytes"
            )
        try:
            plain = bytes(cramjam.snappy.decompress_raw(contents))
        except cramjam.DecompressionError as error:
            raise self._damaged(f"has a damaged snappy block at {handle.offset}: {error}") from None
        if len(plain) != size:
            raise self._damaged(f"has a snappy block at {handle.offset} of a false size")
        return plain

    def _entries(self, handle: BlockHandle) -> tuple[list[bytes], list[bytes]]:
        data = self._block(handle)
        try:
            return _parse_block(data, handle.size)
        except WireError as error:
            raise self._damaged(f"has a malformed block at {handle.offset}: {error}") from None


def _footer(metaindex: BlockHandle, index: BlockHandle) -> bytes:
    handles = metaindex.encode() + index.encode()
    return handles.ljust(FOOTER_SIZE - len(MAGIC), b"\0") + MAGIC


def _parse_block(data: bytes, stored: int) -> tuple[list[bytes], list[bytes]]:
    """Return the keys and the values of a block's contents.

    Args:
        data: the contents, uncompressed.
        stored: how many bytes they take in the file. What keys repeat is measured by it: a
            compressed block of long keys that repeat would make a small file a thousand times
            larger.

    Raises:
        WireError: it is malformed.
    """
    size = len(data)
    if size < 4:
        raise WireError(f"{size} bytes")
    restarts = int.from_bytes(data[-4:], "little")
    end = size - 4 - 4 * restarts
    if end < 0:
        raise WireError(f"{restarts} restart points in {size} bytes")
    keys: list[bytes] = []
    values: list[bytes] = []
    most = min(_MOST_SHARED * size, _MOST_SHARED_STORED * stored)
    position, key, taken = 0, b"", 0
    while position < end:
        first = len(keys)
        for _ in range(_CHECKED_TOGETHER):
            # Nearly every header is three one-byte varints: take those without a call. One that
            # goes on past `end` is still inside `data`, and makes an entry that reaches past it.
            shared, unshared, length = data[position], data[position + 1], data[position + 2]
            if shared | unshared | length < 0x80:
                start = position + 3
            else:
                shared, start = varint(data, position, end)
                unshared, start = varint(data, start, end)
                length, start = varint(data, start, end)
                # Each entry may repeat the key before it, and a long one takes few bytes to repeat.
                taken += shared
                if taken > most:
                    raise WireError(f"keys of over {taken} bytes in {stored}")
            middle = start + unshared
            position = middle + length
            if position > end or shared > len(key):
                raise WireError(f"an entry at byte {start} that reaches past the block's {end}")
            key = key[:shared] + data[start:middle]
            keys.append(key)
            values.append(data[middle:position])
            if position == end:
                break
        some = keys[max(first - 1, 0) :]
        if not all(map(lt, some, some[1:])):
            before, after = next((a, b) for a, b in pairwise(some) if b <= a)
            raise WireError(f"the key {after!r} after {before!r}: keys must ascend")
    return keys, values


class TableBuilder:
    """Writes a table: add entries with ascending keys, then `finish`.

    Blocks are written uncompressed, as TensorFlow writes them.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        """Send the bytes of the table, piece after piece, to `write`."""
        self._write = write
        self._offset = 0
        self._block = _BlockBuilder(RESTART_INTERVAL)
        self._index = _BlockBuilder(1)
        self._last: bytes | None = None

    def add(self, key: bytes, value: bytes) -> None:
        """Add an entry.

        Raises:
            ValueError: `key` is not greater than the key before it.
        """
        if self._last is not None and key <= self._last:
            raise ValueError(f"table keys must ascend: {key!r} after {self._last!r}")
        self._last = key
        self._block.add(key, value)
        if self._block.size >= BLOCK_SIZE:
            self._flush()

    def finish(self) -> int:
        """Write what is left and the footer; return the size of the table in bytes."""
        self._flush()
        metaindex = self._write_block(_BlockBuilder(1))
        index = self._write_block(self._index)
        self._write(_footer(metaindex, index))
        return self._offset + FOOTER_SIZE

    def _flush(self) -> None:
        if self._block.size and self._last is not None:
            handle = self._write_block(self._block)
            self._index.add(self._last, handle.encode())
            self._block = _BlockBuilder(RESTART_INTERVAL)

    def _write_block(self, block: _BlockBuilder) -> BlockHandle:
        data = block.finish() + bytes([PLAIN])
        handle = BlockHandle(self._offset, len(data) - 1)
        self._write(data + mask(crc32c(data)).to_bytes(4, "little"))
        self._offset += len(data) + 4
        return handle


class _BlockBuilder:
    """One block's contents; every `interval`-th entry is a restart point with its whole key."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._pieces: list[bytes] = []
        self._restarts: list[int] = []
        self._count = 0
        self._last = b""
        self.size = 0

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self._count % self._interval == 0:
            self._restarts.append(self.size)
        else:
            shared = _shared(key, self._last)
        unshared, length = len(key) - shared, len(value)
        header = (
            bytes((shared, unshared, length))
            if shared | unshared | length < 0x80  # nearly always
            else write_varint(shared) + write_varint(unshared) + write_varint(length)
        )
        piece = header + key[shared:] + value
        self._pieces.append(piece)
        self.size += len(piece)
        self._count += 1
        self._last = key

    def finish(self) -> bytes:
        restarts = self._restarts or [0]
        numbers = (*restarts, len(restarts))
        return b"".join(self._pieces) + b"".join(n.to_bytes(4, "little") for n in numbers)


def _shared(key: bytes, other: bytes) -> int:
    """Return how many bytes two keys begin with in common."""
    size = min(len(key), len(other))
    # The first bit in which the two differ as numbers stands in the first byte that differs.
    differing = int.from_bytes(key[:size], "big") ^ int.from_bytes(other[:size], "big")
    return size - (differing.bit_length() + 7) // 8
