"""Copying the bytes of tensors from file to file, at the speed of a file copy.

Bytes that are checked have to pass through memory; so they are read and written in chunks that fit
a processor's cache, where their checksum costs next to nothing, by two threads (reading, checking
and writing release the interpreter). Bytes that are not checked are copied by the kernel. Where
the file system shares blocks between files (XFS, Btrfs), nothing is copied at all, and bytes are
only read to be checked: for that the positions in both files must agree within a block.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.checksum import crc32c, mask, unmask
from compat_restore.checkpoint.output import output_error
from compat_restore.checkpoint.parallel import for_each
from compat_restore.checkpoint.strings import decode_strings
from compat_restore.checkpoint.wire import WireError
from compat_restore.errors import DamagedCheckpointError, DamagedTensorsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.checkpoint.output import OutputFile
    from compat_restore.checkpoint.reader import StoredTensor

__all__ = [
    "BLOCK",
    "WORTH_SHARING",
    "Copy",
    "check_tensors",
    "copy_tensors",
    "damage",
    "read_checked",
    "shares_blocks",
    "wrong",
]

WORTH_SHARING = 1 << 20  # bytes: what is smaller is copied
BLOCK = 4096  # of the file systems that share blocks; theirs are this or a divisor of it
_CHUNK = 512 << 10
_GAP = 4 << 10  # bytes between tensors that are read with them
_JOINED = 1 << 20  # tensors that follow each other are read together up to this size
_FICLONERANGE = 0x4020940D  # linux/fs.h: ioctl(to, FICLONERANGE, {from, offset, length, offset})


class Copy(NamedTuple):
    """A tensor to be copied.

    Attributes:
        name: what to call it in a message.
        stored: the pieces that, one after another, are its bytes.
        offset: where in the output the first of them goes.
    """

    name: str
    stored: tuple[StoredTensor, ...]
    offset: int


def copy_tensors(
    copies: Sequence[Copy], output: OutputFile, *, verify: bool = True, checksums: bool = True
) -> list[int]:
    """Copy tensors to their places in a file.

    Args:
        copies: what, and where to; fastest in the order of both files.
        output: the file.
        verify: check the bytes against the checksums that are stored for them.
        checksums: whether those of the new tensors are needed.

    Returns:
        The crc32c (not masked) of each tensor's bytes, by the rule for strings for strings; zeros
        if `checksums` is not set.

    Raises:
        DamagedTensorsError: tensors do not have their checksums; all of them are listed.
        OutputError: the disk does not take the bytes.
    """
    return _Work(copies, output, verify=verify, checksums=checksums).done()


def check_tensors(tensors: Iterable[tuple[str, StoredTensor]]) -> None:
    """Check the bytes of tensors against the checksums that are stored for them.

    Args:
        tensors: what to call each in a message, and where it stands; fastest in the order of the
            file.

    Raises:
        DamagedTensorsError: some do not have them; all of those are listed.
    """
    _Work([Copy(name, (stored,), 0) for name, stored in tensors], None).done()


def shares_blocks(source: ByteSource, output: OutputFile) -> bool:
    """Whether the file system lets a range of `output` share the blocks of `source`.

    Asking empties `output`.
    """
    if source.size < BLOCK or not _share(source, 0, BLOCK, output, 0):
        return False
    try:
        os.ftruncate(output.descriptor, 0)
    except OSError as error:
        raise output_error(output.path, error) from error
    return True


def damage(name: str, stored: StoredTensor, what: str) -> str:
    """Return the message about a damaged tensor."""
    return (
        f"tensor '{name}' in '{stored.source.name}' (bytes {stored.offset} to "
        f"{stored.offset + stored.size}) is damaged: {what}; copy or download it again"
    )


def read_checked(name: str, stored: StoredTensor) -> bytes:
    """Return the bytes of a tensor, or of a part of one, checked.

    Raises:
        DamagedCheckpointError: they do not have the checksum that is stored for them.
    """
    data = stored.source.read(stored.offset, stored.size)
    if stored.opaque:
        return data
    if stored.strings is None:
        crc = crc32c(data)
    else:
        try:
            crc = decode_strings(data, stored.strings)[1]
        except WireError as error:
            raise DamagedCheckpointError(damage(name, stored, str(error))) from None
    if message := wrong(name, stored, crc):
        raise DamagedCheckpointError(message)
    return data


def wrong(name: str, stored: StoredTensor, crc: int) -> str | None:
    """Return what is wrong with a tensor whose bytes have this crc32c, None if nothing is."""
    if stored.checksum is None or mask(crc) == stored.checksum:
        return None
    return damage(
        name,
        stored,
        f"the checksum of its bytes is {crc:08x}, {unmask(stored.checksum):08x} was stored",
    )


class _Work:
    """What is to be copied or checked, shared by the threads that do it."""

    def __init__(
        self,
        copies: Sequence[Copy],
        output: OutputFile | None,
        *,
        verify: bool = True,
        checksums: bool = True,
    ) -> None:
        self._copies = copies
        self._output = output
        self._verify = verify
        self._checksums = checksums
        self._crcs = [0] * len(copies)
        self._faults: dict[int, str] = {}
        self._sharing = True

    def done(self) -> list[int]:
        """Do all of it, and return the checksums."""
        total = sum(piece.size for copy in self._copies for piece in copy.stored)
        for_each(self._grouped(), self._take, size=total)
        if self._faults:
            raise DamagedTensorsError([self._faults[at] for at in sorted(self._faults)])
        return self._crcs

    def _grouped(self) -> Iterator[tuple[int, int]]:
        """Yield (first, behind the last) of the tensors to be taken at once.

        They follow each other in the source, with gaps that cost less to read than to pass over,
        and without any in the output.
        """
        copies, count = self._copies, len(self._copies)
        at = 0
        while at < count:
            first, kept, end = at, 0, copies[at].stored[0].offset if copies[at].stored else 0
            while at < count:
                piece = copies[at].stored[0] if len(copies[at].stored) == 1 else None
                if piece is None or piece.strings is not None or piece.opaque:
                    break
                start = copies[first].stored[0]
                if (
                    piece.source is not start.source
                    or not 0 <= piece.offset - end <= _GAP
                    or piece.offset + piece.size - start.offset > _JOINED
                    or (self._output and copies[at].offset != copies[first].offset + kept)
                ):
                    break
                kept += piece.size
                end = piece.offset + piece.size
                at += 1
            at = max(at, first + 1)
            yield first, at

    def _take(self, group: tuple[int, int], stopped: Callable[[], bool]) -> None:
        first, end = group
        if end == first + 1:
            self._one(first, stopped)
            return
        pieces = [self._copies[at].stored[0] for at in range(first, end)]
        source, start = pieces[0].source, pieces[0].offset
        size = pieces[-1].offset + pieces[-1].size - start
        without_gaps = size == sum(piece.size for piece in pieces)
        offset = self._copies[first].offset
        if self._output is not None and without_gaps and not any(map(self._is_seen, pieces)):
            self._by_kernel(source, start, size, offset, stopped)
            self._crcs[first:end] = [unmask(piece.checksum or 0) for piece in pieces]
            return
        data = source.read(start, size)
        found = []
        for at, piece in enumerate(pieces, first):
            values = data[piece.offset - start : piece.offset - start + piece.size]
            crc = self._crcs[at] = crc32c(values)
            if message := self._wrong(self._copies[at].name, piece, crc):
                self._faults[at] = message
            if not without_gaps:
                found.append(values)
        if self._output is not None:
            self._output.write_at(offset, data if without_gaps else b"".join(found))

    def _one(self, at: int, stopped: Callable[[], bool]) -> None:
        """Copy one tensor, of one piece or several."""
        copy = self._copies[at]
        several = len(copy.stored) > 1
        offset, crc = copy.offset, 0
        for piece in copy.stored:
            try:
                crc = self._piece(copy.name, piece, offset, crc, stopped, several=several)
            except DamagedCheckpointError as error:
                self._faults[at] = str(error)
            offset += piece.size
        self._crcs[at] = crc

    def _is_seen(self, piece: StoredTensor) -> bool:
        """Whether the bytes of a piece have to pass through memory."""
        return (
            (self._verify and piece.checksum is not None)
            or (self._checksums and piece.checksum is None)
            or piece.source.descriptor is None
        )

    def _piece(
        self,
        name: str,
        piece: StoredTensor,
        offset: int,
        crc: int,
        stopped: Callable[[], bool],
        *,
        several: bool,
    ) -> int:
        """Copy a piece; return the crc of all pieces up to it, `crc` being that of those before.

        Raises:
            DamagedCheckpointError: it does not have its checksum.
        """
        if piece.strings is not None or piece.opaque:
            return self._encoded(name, piece, offset)
        seen = self._is_seen(piece) or (several and self._checksums)
        if self._output is not None and not seen:
            self._by_kernel(piece.source, piece.offset, piece.size, offset, stopped)
            return unmask(piece.checksum or 0)
        shared = self._shared(piece, offset)
        own = done = 0
        while done < piece.size and not stopped():
            chunk = piece.source.read(piece.offset + done, min(piece.size - done, _CHUNK))
            own = crc32c(chunk, own)
            if several:
                crc = crc32c(chunk, crc)
            if self._output is not None:
                self._write(shared, offset + done, chunk)
            done += len(chunk)
        if done == piece.size and (message := self._wrong(name, piece, own)):
            raise DamagedCheckpointError(message)
        return crc if several else own

    def _encoded(self, name: str, piece: StoredTensor, offset: int) -> int:
        """Copy strings, whose checksum has a rule of its own, or what TensorFlow alone knows."""
        if self._verify:
            data = read_checked(name, piece)
        else:
            data = piece.source.read(piece.offset, piece.size)
        if self._output is not None:
            self._output.write_at(offset, data)
        return unmask(piece.checksum or 0)

    def _wrong(self, name: str, piece: StoredTensor, crc: int) -> str | None:
        return wrong(name, piece, crc) if self._verify else None

    def _shared(self, piece: StoredTensor, offset: int) -> tuple[int, int]:
        """Let the output share the whole blocks of a piece; return (begin, end) of what it shares.

        Both are positions in the output; an empty range where nothing is shared.
        """
        nothing = 0, 0
        if (
            self._output is None
            or not self._sharing
            or piece.size < WORTH_SHARING
            or (piece.offset - offset) % BLOCK
        ):
            return nothing
        begin, end = -(-offset // BLOCK) * BLOCK, (offset + piece.size) // BLOCK * BLOCK
        if not _share(
            piece.source, begin - offset + piece.offset, end - begin, self._output, begin
        ):
            self._sharing = False
            return nothing
        return begin, end

    def _write(self, shared: tuple[int, int], offset: int, chunk: bytes) -> None:
        """Write what of a chunk is not there by sharing."""
        assert self._output is not None
        begin, end = shared
        if begin == end:
            self._output.write_at(offset, chunk)
            return
        if offset < begin:
            self._output.write_at(offset, chunk[: begin - offset])
        if offset + len(chunk) > end:
            behind = max(end - offset, 0)
            self._output.write_at(offset + behind, chunk[behind:])

    def _by_kernel(
        self, source: ByteSource, start: int, size: int, offset: int, stopped: Callable[[], bool]
    ) -> None:
        """Copy a range without seeing it."""
        assert self._output is not None
        first = min(size, -start % BLOCK) if (start - offset) % BLOCK == 0 else 0
        whole = (size - first) // BLOCK * BLOCK
        # In pieces at the bounds of blocks, so that file systems which can share them do.
        for length in (first, whole, size - first - whole):
            self._kernel_range(source, start, length, offset, stopped)
            start += length
            offset += length

    def _kernel_range(
        self, source: ByteSource, start: int, left: int, offset: int, stopped: Callable[[], bool]
    ) -> None:
        assert self._output is not None
        _check_range(source, start, left)
        copy = _kernel_copy()
        while left and not stopped():
            copied = 0
            descriptor = source.descriptor
            if copy is not None and descriptor is not None:
                try:
                    copied = copy(
                        descriptor, self._output.descriptor, min(left, 1 << 27), start, offset
                    )
                except OSError:  # other file systems, old kernels; a full disk comes again below
                    copied = 0
            if not copied:
                chunk = source.read(start, min(left, _CHUNK))
                self._output.write_at(offset, chunk)
                copied = len(chunk)
            start += copied
            offset += copied
            left -= copied


def _check_range(source: ByteSource, start: int, length: int) -> None:
    if length:  # reading the last byte tells a file that is too short, as every read does
        source.read(start + length - 1, 1)


def _kernel_copy() -> Callable[[int, int, int, int, int], int] | None:
    return getattr(os, "copy_file_range", None)


def _share(source: ByteSource, start: int, length: int, output: OutputFile, offset: int) -> bool:
    descriptor = source.descriptor
    if length <= 0 or descriptor is None:
        return False
    try:
        import fcntl

        request = struct.pack("=qQQQ", descriptor, start, length, offset)
        fcntl.ioctl(output.descriptor, _FICLONERANGE, request)
    except (ImportError, OSError):
        return False
    return True
