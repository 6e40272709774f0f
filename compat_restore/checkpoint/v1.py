"""V1 checkpoints: `Saver` before TensorFlow 0.12, or with `write_version=V1`.

Source: TensorFlow's `core/util/saved_tensor_slice.proto`, `tensor_slice_writer.h`,
`tensor_slice_reader.cc` and `core/framework/tensor.proto`. Each file is a table (`table.py`) whose
values are messages

    SavedTensorSlices      1 meta, 2 data
    SavedTensorSliceMeta   1 tensor {1 name, 2 shape, 3 type, 4 slice (repeated)}, 2 versions
    SavedSlice             1 name, 2 slice, 3 data (TensorProto)

Key "" has the meta, and slice keys (`slices.py`) have one `SavedSlice` each; a tensor that is not
partitioned is one slice over every axis. A sharded checkpoint is several such files, each with a
meta for the slices that it holds. The values stand in the fields of `TensorProto` that fit their
type, narrow integers and bools as varints; a V1 table's blocks carry the only checksum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compat_restore.checkpoint import wire
from compat_restore.checkpoint.files import open_source
from compat_restore.checkpoint.reader import CheckpointReader
from compat_restore.checkpoint.slices import (
    MOST_SLICES,
    check_tiling,
    decode_shape,
    decode_slice,
    slice_key,
)
from compat_restore.checkpoint.table import TableReader
from compat_restore.errors import CheckpointFormatError, DamagedCheckpointError
from compat_restore.tensors import DType, TensorSpec, element_count, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.tensors import Array, Shape, Slice

__all__ = ["V1Reader"]

_META, _DATA = 1, 2

# TensorProto's fields, by the type of the elements: (number, how a packed field is laid out).
_FIXED, _VARINTS, _STRINGS = "fixed", "varints", "strings"
_VALUE_FIELDS = {
    DType.float32: (5, _FIXED),
    DType.float64: (6, _FIXED),
    DType.string: (8, _STRINGS),
    DType.complex64: (9, _FIXED),
    DType.int64: (10, _VARINTS),
    DType.bool: (11, _VARINTS),
    DType.complex128: (12, _FIXED),
    DType.float16: (13, _VARINTS),
    DType.bfloat16: (13, _VARINTS),
    DType.uint32: (16, _VARINTS),
    DType.uint64: (17, _VARINTS),
}
_INT_VAL = (7, _VARINTS)
_TENSOR_CONTENT = 4


class V1Reader(CheckpointReader):
    """Reads a V1 checkpoint of one or many files."""

    def __init__(self, path: str, files: Iterable[str], notes: Iterable[str] = ()) -> None:
        """Read the index and the meta of each file.

        Args:
            path: what the checkpoint is called.
            files: its files: one, or all shards.
            notes: what a reader should be told about it.

        Raises:
            CheckpointNotFoundError: a file is missing.
            CheckpointFormatError: a file is no V1 checkpoint.
            DamagedCheckpointError: a file is damaged.
        """
        self.path = path
        self.notes = tuple(notes)
        self._sources: list[ByteSource] = []
        self._tables: list[TableReader] = []
        self._shapes: dict[str, tuple[DType, Shape]] = {}
        self._parts: dict[str, dict[Slice, int]] = {}  # and in which file each stands
        try:
            for number, name in enumerate(files):
                source = open_source(name)
                self._sources.append(source)
                self._tables.append(TableReader(source))
                self._load(number)
        except BaseException:
            self.close()
            raise
        self._specs = {name: self._spec(name) for name in sorted(self._shapes)}
        count = len(self._sources)
        self.format = "V1 checkpoint, name-based" + (f", {count} files" if count > 1 else "")

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of every tensor by its name, sorted."""
        return self._specs

    def files(self) -> tuple[str, ...]:
        """Return the paths of the files that make up the checkpoint."""
        return tuple(source.name for source in self._sources)

    def close(self) -> None:
        """Close the files."""
        for source in self._sources:
            source.close()

    def _load(self, number: int) -> None:
        source, table = self._sources[number], self._tables[number]
        value = table.get(b"")
        if value is None:
            raise CheckpointFormatError(
                f"'{source.name}' is a table, but no V1 checkpoint: it has no entry for the meta"
            )
        try:
            for field, _, payload in wire.fields(value):
                if field == _META:
                    self._load_meta(number, wire.message_of(payload))
        except (wire.WireError, CheckpointFormatError) as error:
            raise DamagedCheckpointError(
                f"'{source.name}' has a malformed meta entry: {error}"
            ) from None

    def _load_meta(self, number: int, data: bytes) -> None:
        for field, _, payload in wire.fields(data):
            if field != 1:
                continue
            name, dtype_number = "", 0
            dims: Shape = ()
            slices: list[Slice] = []
            for inner, _, value in wire.fields(wire.message_of(payload)):
                if inner == 1:
                    name = wire.text_of(value)
                elif inner == 2:
                    dims = decode_shape(wire.message_of(value))
                elif inner == 3:
                    dtype_number = wire.number_of(value)
                elif inner == 4:
                    if len(slices) == MOST_SLICES:
                        raise wire.WireError(f"tensor '{name}' has more than {MOST_SLICES} parts")
                    slices.append(decode_slice(wire.message_of(value)))
            found = DType.from_number(dtype_number), dims
            known = self._shapes.setdefault(name, found)
            if known != found:
                raise wire.WireError(
                    f"tensor '{name}' is {found[0]}{list(found[1])} in this file and "
                    f"{known[0]}{list(known[1])} in another"
                )
            parts = self._parts.setdefault(name, {})
            for part in slices:
                if parts.setdefault(part, number) != number:
                    raise wire.WireError(
                        f"a part of tensor '{name}' stands in two files: is one a copy of another?"
                    )

    def _spec(self, name: str) -> TensorSpec:
        dtype, shape = self._shapes[name]
        parts = tuple(self._parts[name])
        whole = len(parts) == 1 and all(length is None for length in parts[0].lengths)
        return TensorSpec(name, dtype, shape, () if whole else parts)

    def _damaged(self, name: str, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"tensor '{name}' in checkpoint '{self.path}' is damaged: {what}; "
            "copy or download it again"
        )

    def _read(self, key: str) -> Array:
        import numpy as np

        dtype, shape = self._shapes[key]
        parts = list(self._parts[key])
        try:
            check_tiling(shape, parts)
        except ValueError as error:
            raise self._damaged(key, str(error)) from None
        if len(parts) == 1:
            return self._part(key, parts[0], dtype, shape)
        # What the parts hold is known before memory is asked for, which damage may overstate.
        pieces = [self._part(key, part, dtype, shape) for part in parts]
        full = np.empty(shape, numpy_dtype(dtype))
        for part, piece in zip(parts, pieces, strict=True):
            starts, lengths = part.resolve(shape)
            full[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))] = piece
        return full

    def _part(self, key: str, part: Slice, dtype: DType, shape: Shape) -> Array:
        return self._values(key, self._payload(key, part), dtype, part.resolve(shape)[1])

    def _payload(self, key: str, part: Slice) -> bytes:
        """Return the TensorProto of a part."""
        file = self._parts[key][part]
        try:
            value = self._tables[file].get(slice_key(key, part))
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"tensor '{key}' cannot be read: {error}") from None
        if value is None:
            raise self._damaged(
                key,
                f"'{self._sources[file].name}' announces a part of it and does not hold it",
            )
        try:
            for field, _, payload in wire.fields(value):
                if field != _DATA:
                    continue
                for inner, _, data in wire.fields(wire.message_of(payload)):
                    if inner == 3:
                        return wire.message_of(data)
        except wire.WireError as error:
            raise self._damaged(key, str(error)) from None
        raise self._damaged(key, "its entry holds no values")

    def _values(self, key: str, payload: bytes, dtype: DType, shape: Shape) -> Array:
        try:
            return _decode_tensor(payload, dtype, shape)
        except wire.WireError as error:
            raise self._damaged(key, str(error)) from None


def _decode_tensor(data: bytes, dtype: DType, shape: Shape) -> Array:
    """Decode the values of a `TensorProto` that are to be `dtype` and fill `shape`.

    Raises:
        WireError: it holds another type, or another number of values.
    """
    import numpy as np

    wanted, layout = _VALUE_FIELDS.get(dtype, _INT_VAL)
    pieces: list[int | bytes] = []
    content: bytes | None = None
    for number, _, payload in wire.fields(data):
        if number == 1 and payload != dtype.number:
            raise wire.WireError(f"values of type {payload!r}, where {dtype} is announced")
        if number == wanted:
            pieces.append(payload)
        elif number == _TENSOR_CONTENT:
            content = wire.message_of(payload)
    count = element_count(shape)
    kind = numpy_dtype(dtype)
    if layout == _STRINGS:
        if len(pieces) != count:
            raise wire.WireError(f"{len(pieces)} strings, where {list(shape)} takes {count}")
        strings = np.empty(count, kind)
        strings[:] = [wire.message_of(piece) for piece in pieces]
        return strings.reshape(shape)
    if content is not None and not pieces:
        pieces, layout = [content], _FIXED
    if layout == _FIXED:
        raw = _fixed_bytes(pieces, kind.itemsize if kind.kind != "c" else kind.itemsize // 2)
        if len(raw) != count * kind.itemsize:
            raise wire.WireError(
                f"{len(raw)} bytes of values, where {dtype}{list(shape)} takes "
                f"{count * kind.itemsize}"
            )
        return np.frombuffer(bytearray(raw), kind).reshape(shape)
    numbers = _varints(pieces)
    if len(numbers) != count:
        raise wire.WireError(f"{len(numbers)} values, where {list(shape)} takes {count}")
    if dtype in (DType.float16, DType.bfloat16):
        return numbers.astype(np.uint16).view(kind).reshape(shape)
    if dtype is DType.bool:
        return np.not_equal(numbers, 0).reshape(shape)
    return numbers.view(np.int64).astype(kind).reshape(shape)


def _fixed_bytes(pieces: Iterable[int | bytes], width: int) -> bytes:
    """Join packed pieces with numbers that were written one a field.

    Raises:
        WireError: such a number is wider than its type.
    """
    try:
        return b"".join(
            piece.to_bytes(width, "little") if isinstance(piece, int) else piece for piece in pieces
        )
    except OverflowError:
        raise wire.WireError(f"a number of more than {width} bytes") from None


def _varints(pieces: Iterable[int | bytes]) -> Array:
    """Return the numbers of a repeated varint field, packed or not, as uint64.

    Raises:
        WireError: the packed bytes do not end with a varint, or one is over 10 bytes.
    """
    import numpy as np

    raw = b"".join(p if isinstance(p, bytes) else wire.write_varint(p) for p in pieces)
    data = np.frombuffer(raw, np.uint8)
    if not data.size:
        return np.empty(0, np.uint64)
    ends = np.flatnonzero(data < 0x80)
    if not ends.size or ends[-1] != data.size - 1:
        raise wire.WireError("packed numbers that are cut short")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    longest = int(np.max(lengths))
    if longest > 10:
        raise wire.WireError("a number of more than 10 bytes")
    values = np.zeros(ends.size, np.uint64)
    for at in range(longest):
        inside = lengths > at
        septet = (data[starts[inside] + at] & 0x7F).astype(np.uint64)
        values[inside] |= septet << np.uint64(7 * at)
    return values
