"""safetensors: one file, or several with an index, as Hugging Face's libraries share weights.

Source: https://github.com/huggingface/safetensors, `README.md` and `safetensors/src/tensor.rs`
(version 0.8). A file is

    length of the header, uint64 little-endian
    header, JSON: {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ...
                   "__metadata__": {"KEY": "TEXT", ...}}, filled up with spaces
    the tensors' bytes, little-endian and in C order, without gaps; the offsets count from here

and the index of a set of files, `NAME.safetensors.index.json`, as `transformers` writes it, is

    {"metadata": {"total_size": BYTES}, "weight_map": {"NAME": "FILE in the same directory", ...}}

The format has no checksums.

The package `safetensors` is not used: its writer takes all tensors in memory at once, and its
reader maps the whole file, where this library copies ranges in constant memory. The tests hold the
two against each other.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.files import is_regular_file, join, open_source, split
from compat_restore.checkpoint.reader import CheckpointReader, StoredTensor
from compat_restore.checkpoint.slices import check_shape
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
)
from compat_restore.tensors import (
    DType,
    TensorSpec,
    element_count,
    format_shape,
    numpy_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypeGuard

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.tensors import Array, Shape

__all__ = [
    "DTYPES",
    "INDEX_SUFFIX",
    "LENGTH_SIZE",
    "LONGEST_HEADER",
    "METADATA",
    "SHARD",
    "SUFFIX",
    "Entry",
    "SafetensorsReader",
    "index_of",
    "is_text",
    "looks_like_safetensors",
    "read_index",
    "shard_path",
    "values",
]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
LENGTH_SIZE = 8  # bytes of the number before the header
LONGEST_HEADER = 100_000_000  # bytes: what the reference implementation reads
_LONGEST_NUMBER = 20  # digits of 2^64
_LONG_NUMBER = re.compile(rb"\d{21}")
METADATA = "__metadata__"
_CHUNK = 1 << 20
_LFS_POINTER = b"version https://git-lfs"
_NO_CHECKSUMS = (
    "safetensors has no checksums: a file that was cut short is noticed, changed values are not"
)

DTYPES = {
    "BOOL": DType.bool,
    "U8": DType.uint8,
    "I8": DType.int8,
    "F8_E5M2": DType.float8_e5m2,
    "F8_E4M3": DType.float8_e4m3fn,
    "F8_E5M2FNUZ": DType.float8_e5m2fnuz,
    "F8_E4M3FNUZ": DType.float8_e4m3fnuz,
    "I16": DType.int16,
    "U16": DType.uint16,
    "F16": DType.float16,
    "BF16": DType.bfloat16,
    "I32": DType.int32,
    "U32": DType.uint32,
    "F32": DType.float32,
    "C64": DType.complex64,
    "F64": DType.float64,
    "I64": DType.int64,
    "U64": DType.uint64,
}
# Types of the format that neither TensorFlow's checkpoints nor NumPy have.
_WITHOUT_COUNTERPART = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?:-r\d+)?\.safetensors")


class Entry(NamedTuple):
    """A tensor, and where its bytes stand in a file.

    Attributes:
        dtype: the type of its elements.
        shape: of the tensor.
        offset: of its first byte.
        size: in bytes.
    """

    dtype: DType
    shape: Shape
    offset: int
    size: int


def looks_like_safetensors(source: ByteSource) -> bool:
    """Whether a file begins as a safetensors file or as the index of a set of them."""
    head = source.read(0, min(source.size, 1 << 16))
    return _has_header(source.size, head) or (_is_json(head) and b'"weight_map"' in head)


def index_of(path: str) -> str | None:
    """Return the index of the set that a file is, by its name, a part of; None if there is none."""
    match = SHARD.fullmatch(path)
    index = f"{match['stem']}{INDEX_SUFFIX}" if match else ""
    return index if index and is_regular_file(index) else None


def _has_header(size: int, head: bytes) -> bool:
    length = int.from_bytes(head[:LENGTH_SIZE], "little")
    return head[LENGTH_SIZE : LENGTH_SIZE + 1] == b"{" and length <= min(
        size - LENGTH_SIZE, LONGEST_HEADER
    )


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] == b"{"


class SafetensorsReader(CheckpointReader):
    """Reads a safetensors file, or a set of them by its index."""

    has_checksums = False

    def __init__(self, path: str, notes: Iterable[str] = ()) -> None:
        """Read the header of the file, or the index and the headers of all files that it names.

        Raises:
            CheckpointNotFoundError: a file is missing.
            CheckpointFormatError: a file is no safetensors file, or has elements of a type that
                this library does not know.
            DamagedCheckpointError: a file is cut short, contradicts itself, or is outside of the
                index's directory.
        """
        self.path = path
        self.notes = (*notes, _NO_CHECKSUMS)
        self._sources: list[ByteSource] = []
        self._files: tuple[str, ...] = (path,)
        self._entries: dict[str, tuple[ByteSource, Entry]] = {}
        self.format = "safetensors file"
        try:
            source = self._open(path)
            head = source.read(0, min(source.size, 1 << 10))
            if not _has_header(source.size, head) and _is_json(head):
                self._load_set(source)
            else:
                entries = _read_header(source)
                self._entries = {name: (source, entry) for name, entry in entries.items()}
        except BaseException:
            self.close()
            raise
        self._specs = {
            name: TensorSpec(name, entry.dtype, entry.shape)
            for name, (_, entry) in sorted(self._entries.items())
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of every tensor by its name, sorted."""
        return self._specs

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Return where a tensor's bytes stand."""
        source, entry = self._entries[self.key_of(name)]
        return (StoredTensor(source, entry.offset, entry.size),)

    def verify(self, names: Iterable[str]) -> None:
        """Read the bytes of tensors, which is all that can be done without checksums."""
        for name in names:
            source, entry = self._entries[self.key_of(name)]
            for offset in range(entry.offset, entry.offset + entry.size, _CHUNK):
                source.read(offset, min(_CHUNK, entry.offset + entry.size - offset))

    def files(self) -> tuple[str, ...]:
        """Return the paths of the files that make up the checkpoint."""
        return self._files

    def close(self) -> None:
        """Close the files; nothing can be read after it."""
        for source in self._sources:
            source.close()

    def _read(self, key: str) -> Array:
        source, entry = self._entries[key]
        return values(source.read(entry.offset, entry.size), entry)

    def _open(self, path: str) -> ByteSource:
        source = open_source(path)
        self._sources.append(source)
        return source

    def _load_set(self, index: ByteSource) -> None:
        """Read the files that an index names."""
        named = read_index(index)
        paths = {file: shard_path(index.name, file) for file in sorted(set(named.values()))}
        if missing := [path for path in paths.values() if not is_regular_file(path)]:
            raise CheckpointNotFoundError(
                f"'{index.name}' is there, but not the weights: {_listed(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing; copy all files of the checkpoint"
            )
        names_of: dict[str, list[str]] = {file: [] for file in paths}
        for name, file in named.items():
            names_of[file].append(name)
        for file, path in paths.items():
            source = self._open(path)
            entries = _read_header(source)
            wanted = names_of[file]
            if lost := [name for name in wanted if name not in entries]:
                raise DamagedCheckpointError(
                    f"'{index.name}' says that '{path}' holds {_listed(lost)}, which it does not: "
                    "are they files of two checkpoints? Copy or download all of one again"
                )
            self._entries.update((name, (source, entries[name])) for name in wanted)
            if others := sorted(entries.keys() - set(wanted)):
                note = (
                    f"'{path}' also holds {_listed(others)}, which '{index.name}' does not put "
                    "there; passed over"
                )
                self.notes = (*self.notes, note)
        self._files = (index.name, *paths.values())
        self.format = f"safetensors files, {len(paths)} by an index"


def values(data: bytes, entry: Entry) -> Array:
    """Return a tensor by its bytes."""
    import numpy as np

    return np.frombuffer(bytearray(data), numpy_dtype(entry.dtype)).reshape(entry.shape)


def _read_header(source: ByteSource) -> dict[str, Entry]:
    """Return the tensors of a file.

    Raises:
        CheckpointFormatError: it is no safetensors file, or has elements of an unknown type.
        DamagedCheckpointError: it is cut short, or contradicts itself.
    """
    head = source.read(0, min(source.size, LENGTH_SIZE + len(_LFS_POINTER)))
    if head.startswith(_LFS_POINTER):
        raise DamagedCheckpointError(
            f"'{source.name}' is a Git LFS pointer, not the file; run `git lfs pull` there"
        )
    length = int.from_bytes(head[:LENGTH_SIZE], "little")
    if head[LENGTH_SIZE : LENGTH_SIZE + 1] != b"{" or length > LONGEST_HEADER:
        raise CheckpointFormatError(
            f"'{source.name}' is no safetensors file: such a file begins with the length of its "
            f"header, at most {LONGEST_HEADER}, and a header that begins with '{{'; found "
            f"{head[:12]!r}"
        )
    begin = LENGTH_SIZE + length
    if begin > source.size:
        raise DamagedCheckpointError(
            f"'{source.name}' has {source.size} bytes, and its header alone ends at byte {begin}: "
            "the file is cut short; copy or download it again"
        )
    header = _parsed(source.name, source.read(LENGTH_SIZE, length))
    metadata = header.pop(METADATA, None)
    if metadata is not None and not _is_text_map(metadata):
        raise _damaged(source.name, f"'{METADATA}' does not map texts to texts")
    entries = {name: _entry(source.name, name, item, begin) for name, item in header.items()}
    _check_layout(source, entries, begin)
    return entries


def _parsed(path: str, data: bytes) -> dict[str, object]:
    """Return a JSON object in which no key stands twice.

    Raises:
        DamagedCheckpointError: there is something else.
    """
    import json

    try:
        found = json.loads(
            data.decode(),
            object_pairs_hook=_without_repetition,
            # A function for each number takes long where there are a million.
            parse_int=_whole if _LONG_NUMBER.search(data) else None,
        )
    except RecursionError:
        raise _damaged(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, f"its header is malformed: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(path, "its header is no JSON object")
    return found


def _without_repetition(pairs: list[tuple[str, object]]) -> object:
    """Return a JSON object: what it says of a tensor as a tuple, anything else as a dict."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands there twice")
    code, dims, place = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if isinstance(dims, list) and isinstance(place, list) and len(place) == 2:
        # A million dicts and lists would keep the garbage collector busy; tuples do not.
        return code, tuple(dims), place[0], place[1]
    for key in found:
        if not is_text(key):
            raise ValueError(f"{key!r} is no text")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _entry(path: str, name: str, item: object, begin: int) -> Entry:
    """Return what a header says of one tensor; `begin` is where the tensors' bytes begin.

    Raises:
        CheckpointFormatError: its elements are of an unknown type.
        DamagedCheckpointError: what it says is malformed, or contradicts itself.
    """
    if not isinstance(item, tuple) or not isinstance(item[0], str):
        raise _damaged(path, f"tensor {name!r} has no dtype, shape and pair of data_offsets")
    code, shape, first, end = item
    for number in (*shape, first, end):
        if type(number) is not int or number < 0:  # True, too, would be an int
            raise _damaged(
                path, f"tensor {name!r} has shape {list(shape)} and data_offsets {[first, end]}"
            )
    if code in _WITHOUT_COUNTERPART:
        raise CheckpointFormatError(
            f"tensor {name!r} in '{path}' has elements of type {code}, which no checkpoint of "
            "TensorFlow can hold; the types are " + ", ".join(DTYPES)
        )
    if code not in DTYPES:
        raise _damaged(
            path, f"tensor {name!r} has elements of type {code!r}, which is none of the format's"
        )
    dtype = DTYPES[code]
    try:
        check_shape(shape)
    except ValueError as error:
        raise _damaged(path, f"tensor {name!r} has {error}") from None
    expected = element_count(shape) * dtype.itemsize
    if end - first != expected:
        raise _damaged(
            path,
            f"tensor {name!r} has {end - first} bytes ({first} to {end}), where {dtype}"
            f"{format_shape(shape)} takes {expected}",
        )
    return Entry(dtype, shape, begin + first, expected)


def _check_layout(source: ByteSource, entries: Mapping[str, Entry], begin: int) -> None:
    """Check that the tensors fill the file from `begin`, without gaps and without overlaps.

    Raises:
        DamagedCheckpointError: they do not.
    """
    position = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != position:
            raise _damaged(
                source.name,
                f"tensor {name!r} begins at byte {entry.offset}, and the one before it ends at "
                f"{position}: there must be neither a gap nor an overlap",
            )
        position += entry.size
    if source.size < position:
        raise DamagedCheckpointError(
            f"'{source.name}' has {source.size} bytes, and its tensors end at byte {position}: "
            "the file is cut short; copy or download it again"
        )
    if source.size > position:
        raise _damaged(
            source.name,
            f"{source.size - position} bytes follow the last tensor, which nothing names",
        )


def read_index(source: ByteSource) -> dict[str, str]:
    """Return which file each tensor of a set is in.

    Raises:
        DamagedCheckpointError: the index does not say it.
    """
    if source.size > LONGEST_HEADER:
        raise _damaged(source.name, f"an index has at most {LONGEST_HEADER} bytes")
    found = _parsed(source.name, source.read(0, source.size)).get("weight_map")
    if not _is_text_map(found):
        raise _damaged(source.name, "its 'weight_map' does not map names to files")
    return found


def shard_path(index: str, file: str) -> str:
    """Return the path of a file that an index names.

    The file is one of the index's own directory. A link may lead to the directory of the file that
    the index is itself a link to, as in the cache of `huggingface_hub`.

    Raises:
        DamagedCheckpointError: it is anywhere else.
    """
    folder, _ = split(index)
    path = join(folder, file)
    if file in ("", ".", "..") or any(c in file for c in "/\\\0") or not is_text(file):
        raise DamagedCheckpointError(
            f"'{index}' is unsafe: it names the file {file!r}, which is no name of a file in its "
            "own directory; nothing was read"
        )
    if os.path.islink(path):
        allowed = {os.path.realpath(folder or "."), os.path.dirname(os.path.realpath(index))}
        real = os.path.realpath(path)
        if os.path.dirname(real) not in allowed:
            raise DamagedCheckpointError(
                f"'{path}' is unsafe: it is a link to '{real}', outside of the directory of "
                f"'{index}'; nothing was read; put the file itself there"
            )
    return path


def _is_text_map(found: object) -> TypeGuard[dict[str, str]]:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def is_text(name: str) -> bool:
    """Whether a name can be encoded: half of a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _damaged(path: str, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"'{path}' is damaged: {what}; copy or download it again")


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
