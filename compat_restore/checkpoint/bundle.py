"""V2 checkpoints: tensor bundles.

Source: TensorFlow's `core/util/tensor_bundle/tensor_bundle.{h,cc}`, `naming.cc` and
`core/protobuf/tensor_bundle.proto`. A bundle under the prefix P is

    P.index                 a table (`table.py`): key "" -> BundleHeaderProto,
                            tensor name -> BundleEntryProto, slice key -> BundleEntryProto
    P.data-SSSSS-of-NNNNN   NNNNN files: the tensors' bytes, one after another

    BundleHeaderProto  1 num_shards, 2 endianness (0 little, 1 big), 3 version {1 producer}
    BundleEntryProto   1 dtype, 2 shape {2 dim {1 size}}, 3 shard_id, 4 offset, 5 size,
                       6 crc32c (fixed32, masked), 7 slices (TensorSliceProto, repeated)

A tensor of fixed-size elements is stored as its bytes in C order, and its crc32c is that of those
bytes; string tensors have an encoding and a rule of their own (`strings.py`). A partitioned
variable has an entry with the full shape and `slices`, and no bytes; each slice's bytes stand under
its own key (`slices.py`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache, partial
from itertools import chain, pairwise, repeat
from operator import add
from struct import iter_unpack
from typing import TYPE_CHECKING, NamedTuple, cast

from compat_restore.checkpoint import wire
from compat_restore.checkpoint.files import (
    absolute,
    is_regular_file,
    join,
    listing,
    open_source,
    split,
)
from compat_restore.checkpoint.reader import CheckpointReader, StoredTensor
from compat_restore.checkpoint.slices import (
    MOST_SLICES,
    check_tiling,
    decode_shape,
    decode_slice,
    encode_slice,
    slice_key,
)
from compat_restore.checkpoint.strings import decode_strings
from compat_restore.checkpoint.table import TableReader
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DamagedTensorsError,
    UsageError,
)
from compat_restore.names import (
    OBJECT_GRAPH_KEY,
    Role,
    RoleKind,
    classify,
    without_model_name,
)
from compat_restore.tensors import (
    VARIABLE_SIZE,
    DType,
    TensorSpec,
    element_count,
    numpy_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.checkpoint.object_graph import ObjectGraph
    from compat_restore.tensors import Array, Shape, Slice

__all__ = [
    "BundleEntry",
    "BundleReader",
    "data_file",
    "decode_values",
]

_MOST_SHARDS = 99_999
_AFTER_SLICE_KEYS = b"\1"  # they begin with 0, and no name does
_FEW = 3  # entries of one form, decoded one by one
_MOST_LOW = 8  # bytes of an offset but the last: more are for `wire.varint` to judge
_LFS_POINTER = b"version https://git-lfs"


def data_file(prefix: str, shard: int, shards: int) -> str:
    """Return the name of a bundle's data file."""
    return f"{prefix}.data-{shard:05d}-of-{shards:05d}"


class BundleEntry(NamedTuple):
    """A `BundleEntryProto`: what a tensor is, and where its bytes stand.

    Attributes:
        checksum: the masked crc32c of the bytes as stored.
        slices: the parts of a partitioned variable; then there are no bytes here.
    """

    dtype: DType
    shape: Shape
    shard: int = 0
    offset: int = 0
    size: int = 0
    checksum: int = 0
    slices: tuple[Slice, ...] = ()

    @classmethod
    def decode(cls, data: bytes) -> BundleEntry:
        """Decode an entry.

        Raises:
            WireError: it is malformed, or its size is not what its dtype and shape take.
            CheckpointFormatError: its dtype is unknown.
        """
        dtype_number = shard = offset = size = checksum = 0
        shape: Shape = ()
        slices: list[Slice] = []
        for number, _, payload in wire.fields(data):
            if number == 1:
                dtype_number = wire.number_of(payload)
            elif number == 2:
                shape = decode_shape(wire.message_of(payload))
            elif number == 3:
                shard = wire.number_of(payload)
            elif number == 4:
                offset = wire.number_of(payload)
            elif number == 5:
                size = wire.number_of(payload)
            elif number == 6:
                checksum = wire.number_of(payload)
            elif number == 7:
                if len(slices) == MOST_SLICES:
                    raise wire.WireError(f"more than {MOST_SLICES} parts")
                slices.append(decode_slice(wire.message_of(payload)))
        dtype = DType.from_number(dtype_number)
        expected = element_count(shape) * dtype.itemsize
        if not slices and dtype.itemsize and size != expected:
            raise wire.WireError(f"{size} bytes, where {dtype}{list(shape)} takes {expected}")
        if dtype is DType.string and not slices and size < element_count(shape):
            raise wire.WireError(f"{element_count(shape)} strings in {size} bytes")
        return cls(dtype, shape, shard, offset, size, checksum, tuple(slices))

    def encode(self) -> bytes:
        """Encode the entry."""
        pieces = [_encoded_start(self.dtype, self.shape)]
        if self.shard:
            pieces.append(wire.varint_field(3, self.shard))
        if self.offset:
            pieces += b"\x20", wire.write_varint(self.offset)
        if self.size:
            pieces += b"\x28", wire.write_varint(self.size)
        if self.checksum:
            pieces += b"\x35", self.checksum.to_bytes(4, "little")
        pieces += [wire.bytes_field(7, encode_slice(part)) for part in self.slices]
        return b"".join(pieces)


@lru_cache(maxsize=4096)
def _encoded_start(dtype: DType, shape: Shape) -> bytes:
    """Return the fields `dtype` and `shape` of an entry, which many share."""
    dims = b"".join(wire.bytes_field(2, wire.varint_field(1, dim)) for dim in shape)
    return wire.varint_field(1, dtype.number) + wire.bytes_field(2, dims)


def _usual_entries(values: Sequence[bytes]) -> list[BundleEntry | None]:
    """Decode those entries that are as every writer writes those of whole tensors of numbers.

    A large index is nothing but such entries. Those of one dtype and shape differ in few bytes,
    and always in the same: they are decoded together, a column of bytes at a time, which takes a
    fifth of the time of one field after the other.

    Returns:
        An entry for each value, the same as `BundleEntry.decode` returns; None for those that have
        another form, or a fault, and for the only few of their form.
    """
    # An entry begins with `dtype` and `shape`; which field comes next belongs to its form.
    starts = [value[: 5 + value[3]] if len(value) > 3 else b"" for value in values]
    forms: dict[tuple[bytes, int], list[int]] = {}
    for number, form in enumerate(zip(starts, map(len, values), strict=True)):
        forms.setdefault(form, []).append(number)
    found: list[BundleEntry | None] = [None] * len(values)
    for (start, _), numbers in forms.items():
        if len(numbers) < _FEW:
            continue
        entries = _entries_of_one_form(start, [values[number] for number in numbers])
        for number, entry in zip(numbers, entries, strict=False):
            found[number] = entry
    return found


def _entries_of_one_form(  # noqa: PLR0911  # each return is a form that others decode
    start: bytes, values: list[bytes]
) -> list[BundleEntry]:
    """Decode entries of one length that begin with the same bytes; none if it cannot be done.

    They have to be made up of these bytes, in this order:

        start            dtype, shape, and the first byte of what follows
        18 varint        shard_id, of one byte; unless it is 0
        20 varint        offset; unless it is 0
        28 varint        the size that dtype and shape call for; unless it is 0
        35 fixed32       crc32c
    """
    if len(start) < 5 or (start[0], start[2]) != (0x08, 0x12) or start[1] | start[3] > 0x7F:
        return []
    try:
        dtype, shape = DType.from_number(start[1]), decode_shape(start[4:-1])
    except (wire.WireError, CheckpointFormatError):
        return []  # whoever decodes it next tells
    size = element_count(shape) * dtype.itemsize
    width = len(values[0])
    end = b"\x28" + wire.write_varint(size) + b"\x35" if size else b"\x35"
    first, stop = 4 + start[3], width - 4 - len(end)
    if not dtype.itemsize or first > stop:
        return []
    together = b"".join(values)
    columns = [together[at::width] for at in range(width)]
    fixed = dict(enumerate(end, start=stop))
    shards: Iterable[int] = repeat(0)
    if stop - first >= 2 and start[first] == 0x18:
        shards = columns[first + 1]
        if max(shards) > 0x7F:
            return []
        first += 2
    offsets: Iterable[int] = repeat(0)
    if first < stop:
        fixed[first] = 0x20
        *low, high = columns[first + 1 : stop] or (b"\xff",)
        if len(low) > _MOST_LOW or max(high) > 0x7F or min(map(min, low), default=0x80) < 0x80:
            return []
        offsets = high
        for column in reversed(low):
            offsets = [high << 7 | low & 0x7F for high, low in zip(offsets, column, strict=True)]
    if any(columns[at].count(byte) != len(values) for at, byte in fixed.items()):
        return []
    checksums = (checksum for (checksum,) in iter_unpack(f"<{width - 4}xI", together))
    rows = zip(repeat(dtype), repeat(shape), shards, offsets, repeat(size), checksums, repeat(()))
    return list(map(partial(tuple.__new__, BundleEntry), rows))


class BundleReader(CheckpointReader):
    """Reads a V2 tensor bundle, name-based or object-based, of one or many data files."""

    def __init__(self, prefix: str, notes: Iterable[str] = ()) -> None:
        """Read the index of the bundle under `prefix`; look whether its data files are whole.

        Raises:
            CheckpointNotFoundError: the index or a data file is missing.
            CheckpointFormatError: the index is no table.
            DamagedCheckpointError: the index is damaged, or a data file is too short for it.
        """
        self.path = prefix
        self.notes = tuple(notes)
        self._files: dict[int, ByteSource] = {}
        self._closed = False
        self._entries: dict[str, BundleEntry] = {}
        self._slices: dict[bytes, BundleEntry] = {}
        self._tiled: set[str] = set()  # keys whose parts are known to make up the tensor
        self._shards = 0
        self._big_endian = False
        with open_source(f"{prefix}.index") as index:
            self._load(index)
        try:
            self._check_data_files()
            self._specs = _specs(self._entries)
            self._graph = self._object_graph()
            self._variables, self._keys = self._by_variable_name()
        except BaseException:
            self.close()
            raise
        kind = "object-based" if self._graph else "name-based"
        files = f", {self._shards} data files" if self._shards > 1 else ""
        self.format = f"V2 tensor bundle, {kind}{files}"

    @property
    def graph(self) -> ObjectGraph | None:
        """The object graph of an object-based checkpoint."""
        return self._graph

    @property
    def entries(self) -> Mapping[str, BundleEntry]:
        """The bundle's entries as stored, by key; the parts of partitioned tensors apart."""
        return self._entries

    @property
    def shards(self) -> int:
        """How many data files the bundle has."""
        return self._shards

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of every tensor by its key, sorted."""
        return self._specs

    def variables(self) -> Mapping[str, TensorSpec]:
        """Return the specs by variable name: full names where the checkpoint is object-based.

        A full name that two variables share stands for neither: those keep their keys.
        """
        return self._variables

    def roles(self) -> Mapping[str, Role]:
        """Return what each tensor is for, by its name in `variables`."""
        roles = classify(self._variables)
        if self._graph:
            names = {key: name for name, key in self._keys.items()}
            optimizers = self._graph.optimizer_keys
            for name, key in self._keys.items():
                if key in self._copies:
                    roles[name] = Role(RoleKind.COPY, names[self._copies[key]])
                    continue
                found = self._graph.variables.get(key)
                if found and found.slot:
                    owner = names.get(found.owner or "", found.owner)
                    roles[name] = Role(RoleKind.SLOT, owner, found.slot)
                elif key in optimizers:
                    scalar = self._specs[key].shape == ()
                    roles[name] = Role(RoleKind.BOOKKEEPING if scalar else RoleKind.SLOT)
                elif key == self._graph.save_counter_key():
                    roles[name] = Role(RoleKind.CONTAINER)
        return roles

    def key_of(self, name: str) -> str:
        """Return the key of a tensor that is named by its key or by its full name."""
        if name in self._specs:
            return name
        try:
            return self._keys[name]
        except KeyError:
            raise self._not_found(name) from None

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Return where a tensor's bytes stand; nothing if they are big-endian."""
        key = self.key_of(name)
        if self._big_endian:
            return ()
        return tuple(self._place(part) for _, part in self._parts(key, self._entries[key]))

    def verify(self, names: Iterable[str]) -> None:
        """Check the bytes of tensors against their checksums, in chunks, decoding nothing."""
        from compat_restore.checkpoint.copying import check_tensors

        faults: list[str] = []
        pieces: list[tuple[str, BundleEntry]] = []
        for name in names:
            key = self.key_of(name)
            try:
                pieces += self._parts(key, self._entries[key])
            except DamagedCheckpointError as error:
                faults.append(str(error))
        pieces.sort(key=lambda piece: (piece[1].shard, piece[1].offset))
        try:
            check_tensors((label, self._place(entry)) for label, entry in pieces)
        except DamagedTensorsError as error:
            faults += error.faults
        if faults:
            raise DamagedTensorsError(faults)

    def files(self) -> tuple[str, ...]:
        """Return the paths of the files that make up the checkpoint."""
        shards = range(self._shards)
        data = [data_file(self.path, shard, self._shards) for shard in shards]
        return (f"{self.path}.index", *(path for path in data if is_regular_file(path)))

    def close(self) -> None:
        """Close the data files; nothing can be read after it."""
        self._closed = True
        for file in self._files.values():
            file.close()
        self._files.clear()

    # -- opening ---------------------------------------------------------------------------------

    def _load(self, index: ByteSource) -> None:
        if index.size == 0:
            raise DamagedCheckpointError(
                f"'{index.name}' is empty: the index was never written; is there another copy?"
            )
        blocks = TableReader(index).blocks()
        keys, values = next(blocks, ([b""], [b""]))
        if keys[0] != b"" or not values[0]:
            raise CheckpointFormatError(
                f"'{index.name}' is a table, but no tensor bundle: its first key is {keys[0]!r}, a "
                'bundle\'s is "" and holds the header'
            )
        self._decode_header(index, values[0])
        self._decode_entries(index, keys[1:], values[1:])
        for more_keys, more_values in blocks:
            self._decode_entries(index, more_keys, more_values)

    def _decode_entries(self, index: ByteSource, keys: list[bytes], values: list[bytes]) -> None:
        entries = _usual_entries(values)
        for number, entry in enumerate(entries):
            if entry is None:
                try:
                    entries[number] = BundleEntry.decode(values[number])
                except (wire.WireError, CheckpointFormatError) as error:
                    raise _malformed(index, keys[number], error) from None
        decoded = cast("list[BundleEntry]", entries)
        names = bisect_left(keys, _AFTER_SLICE_KEYS)  # they ascend
        self._slices.update(zip(keys[:names], decoded, strict=False))
        try:
            texts = [key.decode() for key in keys[names:]]
        except UnicodeDecodeError as error:
            raise _malformed(index, error.object, error) from None
        self._entries.update(zip(texts, decoded[names:], strict=True))

    def _decode_header(self, index: ByteSource, data: bytes) -> None:
        try:
            for number, _, payload in wire.fields(data):
                if number == 1:
                    self._shards = wire.number_of(payload)
                elif number == 2:
                    self._big_endian = wire.number_of(payload) == 1
        except wire.WireError as error:
            raise DamagedCheckpointError(
                f"'{index.name}' has a malformed header: {error}"
            ) from None
        if not 0 < self._shards <= _MOST_SHARDS:
            raise DamagedCheckpointError(
                f"'{index.name}' says that it has {self._shards} data files, 1 to {_MOST_SHARDS} "
                "are possible"
            )

    def _check_data_files(self) -> None:
        """Check that each data file that an entry needs is there and long enough."""
        ends: dict[int, int] = {}
        for entries in (self._entries, self._slices):
            for shard, end in _ends(entries.values()).items():
                ends[shard] = max(end, ends.get(shard, 0))
        if max(ends, default=0) >= self._shards:
            key, entry = next(pair for pair in self._keyed() if pair[1].shard >= self._shards)
            raise DamagedCheckpointError(
                f"'{self.path}.index' puts {key!r} into data file {entry.shard} of {self._shards}"
            )
        ends = {shard: end for shard, end in ends.items() if end}
        missing = [
            name
            for shard in ends
            if not is_regular_file(name := data_file(self.path, shard, self._shards))
        ]
        if missing:
            raise CheckpointNotFoundError(self._missing_message(missing))
        for shard, end in ends.items():
            file = self._file(shard)
            if file.size < end:
                last = next(
                    key
                    for key, entry in self._keyed()
                    if entry.size and (entry.shard, entry.offset + entry.size) == (shard, end)
                )
                what = f"has {file.size} bytes, and tensor '{_shown(last)}' ends at byte {end}"
                if file.read(0, min(file.size, len(_LFS_POINTER))) == _LFS_POINTER:
                    raise DamagedCheckpointError(
                        f"'{file.name}' {what}: it is a Git LFS pointer, not the data; run "
                        "`git lfs pull` where it comes from"
                    )
                raise DamagedCheckpointError(
                    f"'{file.name}' {what}: the file is cut short, or belongs to another "
                    "checkpoint; copy or download it again"
                )

    def _keyed(self) -> Iterator[tuple[str | bytes, BundleEntry]]:
        """Return every entry, those of parts too, and what stands for it in a message."""
        named: Iterable[tuple[str | bytes, BundleEntry]] = self._entries.items()
        return chain(named, self._slices.items())

    def _missing_message(self, missing: list[str]) -> str:
        folder, stem = split(self.path)
        pattern = re.compile(re.escape(stem) + r"\.data-\d{5}-of-\d{5}")
        others = sorted(n for n in listing(folder) if pattern.fullmatch(n))
        message = (
            f"'{self.path}.index' is there, but not the weights: "
            + ", ".join(f"'{name}'" for name in missing)
            + (" is" if len(missing) == 1 else " are")
            + " missing"
        )
        if others:
            return f"{message} (there are {', '.join(others)}); copy all files of one checkpoint"
        return f"{message}; a checkpoint is all files that start with '{stem}'"

    def _object_graph(self) -> ObjectGraph | None:
        spec = self._specs.get(OBJECT_GRAPH_KEY)
        if spec is None or spec.dtype is not DType.string or spec.shape != () or spec.slices:
            return None
        from compat_restore.checkpoint.object_graph import ObjectGraph

        try:
            graph = ObjectGraph.decode(self._string(OBJECT_GRAPH_KEY))
        except wire.WireError as error:
            raise DamagedCheckpointError(
                f"checkpoint '{self.path}' has a malformed object graph: {error}"
            ) from None
        for key, spec in self._specs.items():
            found = graph.variables.get(key)
            if found and found.full_name:
                self._specs[key] = spec._replace(full_name=found.full_name)
        return graph

    def _by_variable_name(self) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        """Return specs by full name, where that names one tensor alone, and the keys by name.

        SavedModels hold some variables under several keys: one carries the name, and the others
        are known as its copies.
        """
        self._copies: dict[str, str] = {}
        if not self._graph:
            return self._specs, {}
        self._copies = self._find_copies()
        times: dict[str, int] = {}
        for key, spec in self._specs.items():
            if spec.full_name and key not in self._copies:
                times[spec.full_name] = times.get(spec.full_name, 0) + 1
        variables, keys_by_name = {}, {}
        for key, spec in self._specs.items():
            name = spec.full_name
            if not name or key in self._copies or times[name] > 1 or name in self._specs:
                name = key
            variables[name] = spec._replace(name=name)
            keys_by_name[name] = key
        optimizers = self._graph.optimizer_keys
        weights: dict[str, list[str]] = {}  # by the child of the root below which they stand
        for name, key in keys_by_name.items():
            if name != key and key not in optimizers and not self._graph.variables[key].slot:
                weights.setdefault(key.partition("/")[0], []).append(name)
        for members in weights.values():
            for name, short in without_model_name(members).items():
                variables[name] = variables[name]._replace(aliases=(short,))
        return dict(sorted(variables.items())), keys_by_name

    def _find_copies(self) -> dict[str, str]:
        """Return the key of the original by the key of each copy.

        SavedModels alone hold copies, and whole branches of the root are: where every variable of
        one has its namesake, of the same bytes, in another. (Elsewhere two equal variables of one
        name are two variables: zero biases, a network and its target network.)
        """
        folder, stem = split(absolute(self.path))
        saved_model = join(split(folder)[0], "saved_model.pb")
        if stem != "variables" or not is_regular_file(saved_model):
            return {}
        branches: dict[str, dict[str, str]] = {}
        for key, spec in self._specs.items():
            if spec.full_name:
                branches.setdefault(key.partition("/")[0], {})[spec.full_name] = key
        copies: dict[str, str] = {}
        originals: list[dict[str, str]] = []
        for _, branch in sorted(branches.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            for other in originals:
                if all(
                    name in other and self._content(key) == self._content(other[name])
                    for name, key in branch.items()
                ):
                    copies |= {key: other[name] for name, key in branch.items()}
                    break
            else:
                originals.append(branch)
        return copies

    def _content(self, key: str) -> tuple[object, ...]:
        """Return what two keys have in common if they hold the same tensor."""
        entry = self._entries[key]
        return entry.dtype, entry.shape, entry.size, entry.checksum, bool(entry.slices)

    # -- reading ---------------------------------------------------------------------------------

    def _file(self, shard: int) -> ByteSource:
        if self._closed:
            raise UsageError(
                f"checkpoint '{self.path}' is closed: read before the `with` statement ends"
            )
        if shard not in self._files:
            self._files[shard] = open_source(data_file(self.path, shard, self._shards))
        return self._files[shard]

    def _place(self, entry: BundleEntry) -> StoredTensor:
        return StoredTensor(
            self._file(entry.shard),
            entry.offset,
            entry.size,
            entry.checksum,
            strings=element_count(entry.shape) if entry.dtype is DType.string else None,
            opaque=entry.dtype is DType.variant,
        )

    def _parts(self, key: str, entry: BundleEntry) -> list[tuple[str, BundleEntry]]:
        """Return (what to call it, entry) of each piece of bytes that a tensor is stored in.

        Raises:
            DamagedCheckpointError: the parts of a partitioned tensor do not make it up.
        """
        if not entry.slices:
            return [(key, entry)]
        try:
            if key not in self._tiled:  # asked for several times a conversion
                check_tiling(entry.shape, entry.slices)
                self._tiled.add(key)
        except ValueError as error:
            raise DamagedCheckpointError(
                f"the parts of tensor '{key}' in checkpoint '{self.path}' do not fit: {error}"
            ) from None
        parts = []
        for number, part in enumerate(entry.slices):
            label = f"{key} (part {number})"
            found = self._slices.get(slice_key(key, part))
            if found is None:
                raise DamagedCheckpointError(
                    f"tensor '{key}' in checkpoint '{self.path}' has {len(entry.slices)} parts, "
                    f"of which number {number} is missing"
                )
            lengths = part.resolve(entry.shape)[1]
            if found.shape != lengths or found.dtype is not entry.dtype or found.slices:
                raise DamagedCheckpointError(
                    f"'{label}' in checkpoint '{self.path}' is stored as "
                    f"{found.dtype}{list(found.shape)}, not as {entry.dtype}{list(lengths)}"
                )
            parts.append((label, found))
        # Parts that shared bytes would make a small file into a tensor of any size.
        spans = sorted((e.shard, e.offset, e.offset + e.size) for _, e in parts if e.size)
        if any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(spans)):
            raise DamagedCheckpointError(
                f"the parts of tensor '{key}' in checkpoint '{self.path}' share bytes of a file"
            )
        return parts

    def _read(self, key: str) -> Array:
        import numpy as np

        entry = self._entries[key]
        parts = self._parts(key, entry)
        if not entry.slices:
            return self._whole(key, entry)
        full = np.empty(entry.shape, numpy_dtype(entry.dtype))
        for part, (label, stored) in zip(entry.slices, parts, strict=True):
            starts, lengths = part.resolve(entry.shape)
            where = tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))
            full[where] = self._whole(label, stored)
        return full

    def _string(self, key: str) -> bytes:
        """Return the only element of a string tensor, without NumPy."""
        from compat_restore.checkpoint.copying import read_checked
        from compat_restore.checkpoint.strings import decode_strings

        ((label, entry),) = self._parts(key, self._entries[key])
        return decode_strings(read_checked(label, self._place(entry)), 1)[0][0]

    def _whole(self, label: str, entry: BundleEntry) -> Array:
        from compat_restore.checkpoint.copying import read_checked

        numpy_dtype(entry.dtype)  # opaque values are told before they are read
        data = read_checked(label, self._place(entry))
        return decode_values(data, entry, big_endian=self._big_endian)


def decode_values(data: bytes, entry: BundleEntry, *, big_endian: bool = False) -> Array:
    """Return the values of a tensor's bytes as stored, as an array of its own.

    Raises:
        UsageError: its dtype has no values that NumPy could hold.
        WireError: strings that are malformed.
    """
    import numpy as np

    dtype = numpy_dtype(entry.dtype)
    if entry.dtype is DType.string:
        array = np.empty(element_count(entry.shape), dtype)
        array[:] = decode_strings(data, len(array))[0]
    elif big_endian:
        array = np.frombuffer(data, dtype).byteswap()
    else:
        array = np.frombuffer(bytearray(data), dtype)
    return array.reshape(entry.shape)


def _malformed(index: ByteSource, key: bytes, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"'{index.name}' has a malformed entry for {key!r}: {error}")


def _specs(entries: Mapping[str, BundleEntry]) -> dict[str, TensorSpec]:
    """Return what entries say of their tensors, by name."""
    if not entries:
        return {}
    dtypes, shapes, _, _, sizes, _, slices = zip(*entries.values(), strict=True)
    stored = [
        size if dtype in VARIABLE_SIZE else None for dtype, size in zip(dtypes, sizes, strict=True)
    ]
    rows = zip(entries, dtypes, shapes, slices, repeat(()), repeat(None), stored)
    # As `TensorSpec(...)`, without a call of Python for each.
    return dict(zip(entries, map(partial(tuple.__new__, TensorSpec), rows), strict=True))


def _ends(entries: Collection[BundleEntry]) -> dict[int, int]:
    """Return where the last bytes of entries end, by the number of their data file."""
    if not entries:
        return {}
    _, _, shards, offsets, sizes, _, _ = zip(*entries, strict=True)
    if 0 not in sizes and len(found := set(shards)) == 1:  # as in most: a loop of Python's own
        return {found.pop(): max(map(add, offsets, sizes))}
    ends = dict.fromkeys(shards, 0)
    for shard, offset, size in zip(shards, offsets, sizes, strict=True):
        if size and offset + size > ends[shard]:
            ends[shard] = offset + size
    return ends


def _shown(key: str | bytes) -> str:
    if isinstance(key, str):
        return key
    return key[1:].split(b"\0", 1)[0].decode(errors="replace") + " (a part)"
