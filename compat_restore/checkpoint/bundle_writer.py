"""Writing V2 tensor bundles, so that a checkpoint appears whole or not at all.

A bundle is two files or more, and one rename can only put one in place. So the index decides: data
files are put in place first, under names that no other bundle of that prefix uses, and the rename
of the index is the moment at which the new checkpoint replaces what was there. The names are
free because they carry the number of data files: where `-of-00001` is taken by an older bundle,
the new one is written as one of two, the second of them empty. Until the index is renamed, the
old index and its data stay as they were; only after that are they removed.

Several processes may write to one prefix: each puts its files in place alone (`alone_in`), looks
then what is there, and gives up where it may not replace that. What is removed as old belongs to
no other checkpoint.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint import wire
from compat_restore.checkpoint.bundle import BundleEntry, data_file, decode_values
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.copying import (
    BLOCK,
    WORTH_SHARING,
    Copy,
    copy_tensors,
    shares_blocks,
)
from compat_restore.checkpoint.files import (
    absolute,
    is_directory,
    is_regular_file,
    is_there,
    join,
    listing,
    local_path,
    split,
)
from compat_restore.checkpoint.locate import ends_as_table
from compat_restore.checkpoint.output import (
    alone_in,
    create_output,
    output_error,
    remove,
    sync_directory,
)
from compat_restore.checkpoint.slices import slice_key
from compat_restore.checkpoint.strings import encode_strings
from compat_restore.checkpoint.table import TableBuilder
from compat_restore.checkpoint.writer import (
    CheckpointWriter,
    check_contents,
    check_place,
    values_of,
)
from compat_restore.errors import (
    DamagedCheckpointError,
    DamagedTensorsError,
    InputError,
    OutputError,
    faults_of,
)
from compat_restore.tensors import OPAQUE, DType, array_bytes, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.checkpoint.output import OutputFile
    from compat_restore.checkpoint.reader import StoredTensor
    from compat_restore.checkpoint.writer import Content
    from compat_restore.tensors import Array, Shape

__all__ = ["BundleWriter", "check_destination"]

_PRODUCER = 1  # kTensorBundleVersion
_DATA_NAME = re.compile(r"\.data-(\d{5})-of-(\d{5})$")
_MOST_SHARDS = 99_999
_MOST_LOOKED_AT = 1000  # tensors, for a large one whose blocks could be shared


def check_destination(prefix: str, *, overwrite: bool) -> tuple[str, ...]:
    """Return the files of checkpoints that stand under a prefix, the index first.

    Raises:
        OutputError: there are some and `overwrite` is not set, or no bundle can have this prefix.
    """
    return check_place(prefix, _existing, overwrite=overwrite, example="model.ckpt")


def _existing(prefix: str) -> tuple[str, ...]:
    folder, stem = split(absolute(prefix))
    found = [path for path in (f"{prefix}.index", prefix, f"{prefix}.meta") if _exists(path)]
    if prefix in found and is_regular_file(prefix) and not ends_as_table(prefix):
        raise OutputError(
            f"'{prefix}' is a file, and no checkpoint: one of that name, with its files "
            f"'{prefix}.index' and so on, would replace it; choose another name"
        )
    try:
        names = listing(folder)
    except InputError as error:
        raise OutputError(f"'{prefix}' cannot be written: {error}; nothing was changed") from error
    found += [
        join(folder, name)
        for name in names
        if name.startswith(stem) and _DATA_NAME.fullmatch(name[len(stem) :])
    ]
    return tuple(found)


class _Piece(NamedTuple):
    """What gets an entry with bytes: a whole tensor, or a part of one."""

    key: bytes
    name: str
    dtype: DType
    shape: Shape
    stored: tuple[StoredTensor, ...]
    size: int


class BundleWriter(CheckpointWriter):
    """Writes one V2 bundle."""

    def __init__(
        self, prefix: str, *, overwrite: bool = False, max_shard_size: int | None = None
    ) -> None:
        """Begin a bundle under `prefix`; its directory is made if it is missing.

        Args:
            prefix: where.
            overwrite: replace a checkpoint that is there.
            max_shard_size: bytes after which another data file begins; a tensor is never divided,
                so that one which is larger has a file that is larger.

        Raises:
            OutputError: there is a checkpoint already and `overwrite` is not set, or the place
                cannot be written to.
        """
        prefix = local_path(prefix) or prefix
        self.path = prefix
        self.format = "V2 tensor bundle"
        self._overwrite = overwrite
        self._old = check_destination(prefix, overwrite=overwrite)
        self._folder = split(absolute(prefix))[0]
        self._largest = max_shard_size
        self._entries: dict[bytes, BundleEntry] = {}
        self._shards: list[OutputFile] = []
        self._index = create_output(f"{prefix}.index")

    def write(self, contents: Sequence[Content], *, verify: bool = True) -> None:
        """Write all tensors: what can be copied first, in the order of its files."""
        copied: list[_Piece] = []
        decoded: list[Content] = []
        self._shards.append(create_output(data_file(self.path, 0, 1)))
        check_contents(
            self.path,
            "a V2 checkpoint",
            contents,
            is_name=_is_name,
            why_unfit=lambda _: None,
            parts=True,
        )
        for content in contents:
            key = content.name.encode()
            if content.slices:
                self._entries[key] = BundleEntry(
                    content.dtype, content.shape, slices=content.slices
                )
            if content.stored:
                copied += _pieces(key, content)
            else:
                decoded.append(content)
        copied.sort(key=lambda piece: (piece.stored[0].source.name, piece.stored[0].offset))
        faults = self._copy(copied, verify=verify)
        for content in decoded:
            try:
                self._decode(content)
            except DamagedCheckpointError as error:
                faults += faults_of(error)
        if faults:
            raise DamagedTensorsError(faults)

    def read_back(self, name: str) -> Array | bytes:
        """Return what was written of a tensor; see `CheckpointWriter`."""
        entry = self._entries[name.encode()]
        if not entry.slices:
            return self._stored_value(entry)
        import numpy as np

        full = np.empty(entry.shape, numpy_dtype(entry.dtype))
        for part in entry.slices:
            starts, lengths = part.resolve(entry.shape)
            where = tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))
            full[where] = self._stored_value(self._entries[slice_key(name, part)])
        return full

    def finish(self) -> None:
        """Put the bundle in place; the rename of its index is the moment."""
        for shard in self._shards:
            shard.sync()  # before others have to wait
        with alone_in(self._folder):
            try:
                self._place()
            except OutputError:
                self._take_back()
                raise
            except BaseException:  # an interruption: whatever is there by now is whole
                self._take_back()
                if self._index.is_placed:
                    with suppress(OSError):
                        sync_directory(self._folder)
                        self._remove_old()
                raise

    def _place(self) -> None:
        self._old = check_destination(self.path, overwrite=self._overwrite)
        taken = {int(match[2]) for path in self._old if (match := _DATA_NAME.search(path))}
        count = len(self._shards)
        while count in taken:
            count += 1
        while len(self._shards) < count:
            self._shards.append(create_output(data_file(self.path, len(self._shards), count)))
        self._write_index(count)
        for number, shard in enumerate(self._shards):
            shard.path = data_file(self.path, number, count)
            shard.place(replace=False)
        try:
            sync_directory(self._folder)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._index.place(replace=f"{self.path}.index" in self._old)
        try:
            sync_directory(self._folder)
        except OSError as error:
            raise OutputError(
                f"'{self.path}' is written, but it is not sure that it would survive a power "
                f"cut ({error.strerror or error}); older data files beside it were left"
            ) from error
        self._remove_old()

    def _remove_old(self) -> None:
        # A graph alone is not the graph of what is replaced.
        alone = not {f"{self.path}.index", self.path} & set(self._old)
        for path in self._old:
            if path != f"{self.path}.index" and not (alone and path.endswith(".meta")):
                remove(path)

    def _take_back(self) -> None:
        if not self._index.is_placed:
            for shard in self._shards:
                shard.take_back()

    def close(self) -> None:
        """Remove what was written; after `finish` there is nothing to remove."""
        for shard in reversed(self._shards):
            shard.close()
        self._index.close()

    def _copy(self, pieces: list[_Piece], *, verify: bool) -> list[str]:
        """Copy pieces, in order, into as many data files as it takes; return all faults."""
        faults: list[str] = []
        begin = 0
        while begin < len(pieces):
            shard = self._shards[-1]
            offset = shard.position
            copies: list[Copy] = []
            sharing = _sharing_source(pieces, begin, shard)
            for number in range(begin, len(pieces)):
                piece = pieces[number]
                if self._largest and offset and offset + piece.size > self._largest:
                    break
                if sharing is not None and piece.size >= WORTH_SHARING:
                    first = piece.stored[0]
                    follows = number > begin and _follows(pieces[number - 1].stored[-1], first)
                    if first.source is sharing and not follows:
                        offset += (first.offset - offset) % BLOCK
                copies.append(Copy(piece.name, piece.stored, offset))
                offset += piece.size
            done = pieces[begin : begin + len(copies)]
            if sharing is None:
                shard.reserve(offset)
            try:
                crcs = copy_tensors(copies, shard, verify=verify)
            except DamagedTensorsError as error:
                faults += error.faults
                crcs = [0] * len(copies)  # of a file that nobody will see
            shard.position = offset
            for piece, copy, crc in zip(done, copies, crcs, strict=True):
                self._entries[piece.key] = BundleEntry(
                    piece.dtype,
                    piece.shape,
                    len(self._shards) - 1,
                    copy.offset,
                    piece.size,
                    mask(crc),
                )
            begin += len(copies)
            if begin < len(pieces):
                self._next_shard()
        return faults

    def _decode(self, content: Content) -> None:
        """Write a tensor by its values."""
        key = content.name.encode()
        array = values_of(content)
        if not content.slices:
            self._append(key, content.dtype, array)
        for part in content.slices:
            starts, lengths = part.resolve(content.shape)
            where = tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))
            self._append(slice_key(content.name, part), content.dtype, array[where])

    def _append(self, key: bytes, dtype: DType, array: Array) -> None:
        pieces: list[bytes | memoryview]
        if dtype is DType.string:
            data, crc = encode_strings(array.ravel().tolist())
            pieces = [data]
        else:
            pieces = list(array_bytes(array.astype(numpy_dtype(dtype), copy=False)))
            crc = 0
            for piece in pieces:
                crc = crc32c(bytes(piece), crc)
        size = sum(map(len, pieces))
        position = self._shards[-1].position
        if self._largest and position and position + size > self._largest:
            self._next_shard()
        shard = self._shards[-1]
        self._entries[key] = BundleEntry(
            dtype, array.shape, len(self._shards) - 1, shard.position, size, mask(crc)
        )
        for piece in pieces:
            shard.write(piece)

    def _next_shard(self) -> None:
        if len(self._shards) >= _MOST_SHARDS:
            raise OutputError(
                f"'{self.path}' would take more than {_MOST_SHARDS} data files of "
                f"{self._largest} bytes; allow larger ones"
            )
        self._shards.append(create_output(data_file(self.path, len(self._shards), 1)))

    def _stored_value(self, entry: BundleEntry) -> Array | bytes:
        data = self._shards[entry.shard].read(entry.offset, entry.size)
        if entry.dtype in OPAQUE:
            return data
        try:
            return decode_values(data, entry)
        except wire.WireError as error:  # strings that were copied unverified
            raise DamagedCheckpointError(
                f"a string tensor that was copied into '{self.path}' is damaged: {error}"
            ) from None

    def _write_index(self, count: int) -> None:
        header = wire.varint_field(1, count) + wire.bytes_field(3, wire.varint_field(1, _PRODUCER))
        table = TableBuilder(self._index.write)
        table.add(b"", header)
        for key in sorted(self._entries):
            table.add(key, self._entries[key].encode())
        table.finish()


def _is_name(name: str) -> bool:
    """Whether a tensor can have a name: keys that begin with 0 are those of parts."""
    try:
        key = name.encode()
    except UnicodeEncodeError:
        return False
    return bool(key) and not key.startswith(b"\0")


def _pieces(key: bytes, content: Content) -> list[_Piece]:
    if not content.slices:
        stored = content.stored
        size = stored[0].size if len(stored) == 1 else sum(piece.size for piece in stored)
        return [_Piece(key, content.name, content.dtype, content.shape, stored, size)]
    return [
        _Piece(
            slice_key(content.name, part),
            f"{content.name} (part {number})",
            content.dtype,
            part.resolve(content.shape)[1],
            (stored,),
            stored.size,
        )
        for number, (part, stored) in enumerate(zip(content.slices, content.stored, strict=True))
    ]


def _sharing_source(pieces: list[_Piece], begin: int, shard: OutputFile) -> ByteSource | None:
    """Return the file with which an output can share blocks, if it can and that is of use."""
    if shard.position:
        return None
    for number in range(begin, min(begin + _MOST_LOOKED_AT, len(pieces))):
        if pieces[number].size >= WORTH_SHARING:
            source = pieces[number].stored[0].source
            return source if shares_blocks(source, shard) else None
    return None


def _follows(before: StoredTensor, piece: StoredTensor) -> bool:
    return before.source is piece.source and before.offset + before.size == piece.offset


def _exists(path: str) -> bool:
    return is_there(path) and not is_directory(path)
