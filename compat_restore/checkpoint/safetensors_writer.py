"""Writing safetensors: a file, or a set of files and their index, that appears whole or not at all.

The files of a set are put in place first, under names that no older set uses; the index says which
files count, and its rename is the moment at which the new set replaces an older one. Where a
single file has the name that a set is to have, that file counts until it is removed, which is then
the moment: readers take it rather than an index.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from compat_restore.checkpoint.copying import Copy, copy_tensors
from compat_restore.checkpoint.files import (
    absolute,
    is_there,
    join,
    listing,
    split,
)
from compat_restore.checkpoint.output import (
    alone_in,
    create_output,
    output_error,
    remove,
    sync_directory,
)
from compat_restore.checkpoint.safetensors import (
    DTYPES,
    INDEX_SUFFIX,
    LENGTH_SIZE,
    LONGEST_HEADER,
    METADATA,
    SHARD,
    SUFFIX,
    Entry,
    is_text,
    values,
)
from compat_restore.checkpoint.writer import (
    CheckpointWriter,
    check_contents,
    check_place,
    in_source_order,
    other_values,
    values_of,
)
from compat_restore.errors import (
    DamagedCheckpointError,
    DamagedTensorsError,
    InputError,
    OutputError,
    UsageError,
)
from compat_restore.tensors import array_bytes, element_count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compat_restore.checkpoint.output import OutputFile
    from compat_restore.checkpoint.writer import Content
    from compat_restore.tensors import Array

__all__ = ["SafetensorsWriter", "check_destination"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the tensors' bytes in the file
_MOST_SHARDS = 99_999


def check_destination(path: str, *, overwrite: bool) -> tuple[str, ...]:
    """Return the files of safetensors checkpoints that stand under a name.

    Those are the file itself, the index of a set, and the files of a set.

    Raises:
        OutputError: there are some and `overwrite` is not set, or no file can have this name.
    """
    return check_place(path, _existing, overwrite=overwrite, example="model.safetensors")


def _existing(path: str) -> tuple[str, ...]:
    """Return the files that stand under a name: the file itself, then an index, then its set.

    The files of a set are told by their names alone. An index may name any file of its directory,
    be it another checkpoint, or may have been edited; what it names is not removed for that.
    """
    folder, own = split(path)
    found = [file for file in (path, _index_path(path)) if is_there(file)]
    try:
        names = listing(folder)
    except InputError as error:
        raise OutputError(f"'{path}' cannot be written: {error}; nothing was changed") from error
    stem = own.removesuffix(SUFFIX)
    shards = {
        join(folder, name)
        for name in names
        if (match := SHARD.fullmatch(name)) and match["stem"] == stem
    }
    return (*found, *sorted(shards - set(found)))


def _index_path(path: str) -> str:
    return path.removesuffix(SUFFIX) + INDEX_SUFFIX


class SafetensorsWriter(CheckpointWriter):
    """Writes a safetensors file, or a set of them with an index."""

    def __init__(
        self, path: str, *, overwrite: bool = False, max_shard_size: int | None = None
    ) -> None:
        """Begin a checkpoint called `path`; its directory is made if it is missing.

        Args:
            path: where.
            overwrite: replace a checkpoint that is there.
            max_shard_size: bytes of tensors after which another file begins; a tensor is never
                divided, so that one which is larger has a file of its own. If all fit into one
                file, there is just that.

        Raises:
            OutputError: there is a checkpoint already and `overwrite` is not set, or the place
                cannot be written to.
            UsageError: no tensor fits into files of that size.
        """
        if max_shard_size is not None and max_shard_size <= 0:
            raise UsageError(f"max_shard_size={max_shard_size}: a number of bytes is expected")
        self.path = path
        self.format = "safetensors file"
        self._overwrite = overwrite
        self._old = check_destination(path, overwrite=overwrite)
        self._largest = max_shard_size
        self._entries: dict[str, tuple[OutputFile, Entry]] = {}
        self._faults: list[str] = []
        self._main = create_output(path)  # a single file, or the index
        self._shards: list[OutputFile] = []

    def write(self, contents: Sequence[Content], *, verify: bool = True) -> None:
        """Write all tensors: those of the largest elements first, in the order of their sources."""
        check_contents(
            self.path,
            "safetensors",
            contents,
            is_name=lambda name: name != METADATA and is_text(name),
            why_unfit=lambda content: None if content.dtype in _CODES else str(content.dtype),
        )
        groups = self._divided(contents)
        if len(groups) > 1:
            self._main.path = _index_path(self.path)
            self._shards.extend(map(create_output, self._free_names(len(groups))))
        for output, group in zip(self._shards or [self._main], groups, strict=True):
            self._fill(output, group, verify=verify)
        if self._faults:
            raise DamagedTensorsError(self._faults)
        if self._shards:
            self._write_index()

    def read_back(self, name: str) -> Array:
        """Return what was written of a tensor; see `CheckpointWriter`."""
        output, entry = self._entries[name]
        return values(output.read(entry.offset, entry.size), entry)

    def finish(self) -> None:
        """Put the checkpoint in place; the rename of the file, or of the index, is the moment."""
        folder, _ = split(absolute(self.path))
        for output in (*self._shards, self._main):
            output.sync()  # before others have to wait
        with alone_in(folder):
            try:
                self._place(folder)
            except OutputError:
                self._take_back()
                raise
            except BaseException:  # an interruption: whatever is there by now is whole
                self._take_back()
                if self._main.is_placed:
                    with suppress(OSError):
                        sync_directory(folder)
                        self._remove_old(folder)
                raise

    def _place(self, folder: str) -> None:
        self._old = check_destination(self.path, overwrite=self._overwrite)
        for shard in self._shards:
            shard.place(replace=False)
        if self._shards:
            try:
                sync_directory(folder)
            except OSError as error:
                raise output_error(self.path, error) from error
        self._main.place(replace=self._main.path in self._old)
        try:
            sync_directory(folder)
            self._remove_old(folder)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"'{self._main.path}' is written, but it is not sure that it would survive a "
                f"power cut ({error.strerror or error}); older files beside it were left"
            ) from error

    def _remove_old(self, folder: str) -> None:
        """Remove what is no part of the new checkpoint: first what would count in its place."""
        if self._shards and self.path in self._old:
            self._remove_single()
            sync_directory(folder)
        for path in self._old:
            if path != self._main.path:
                remove(path)

    def _take_back(self) -> None:
        if not self._main.is_placed:
            for shard in self._shards:
                shard.take_back()

    def _remove_single(self) -> None:
        """Remove the single file that is called as the new set is.

        Raises:
            OutputError: it is still there, and would be read in place of the set.
        """
        remove(self.path)
        if is_there(self.path):
            raise OutputError(
                f"'{self._main.path}' is written, but the older file '{self.path}' counts as long "
                "as it is there, and it cannot be removed; remove it"
            )

    def close(self) -> None:
        """Remove what was written; after `finish` there is nothing to remove."""
        for shard in self._shards:
            shard.close()
        self._main.close()

    def _divided(self, contents: Sequence[Content]) -> list[list[Content]]:
        """Divide tensors into what goes into one file each, in the order of their sources."""
        groups: list[list[Content]] = [[]]
        size = 0
        for content in in_source_order(contents):
            if self._largest and groups[-1] and size + _size(content) > self._largest:
                groups.append([])
                size = 0
            groups[-1].append(content)
            size += _size(content)
        if len(groups) > _MOST_SHARDS:
            raise OutputError(
                f"'{self.path}' would take {len(groups)} files of {self._largest} bytes, and "
                f"{_MOST_SHARDS} are possible; allow larger ones"
            )
        return groups

    def _free_names(self, count: int) -> list[str]:
        """Return names for the files of a set, as `transformers` gives them where they are free."""
        stem = self.path.removesuffix(SUFFIX)
        mark, number = "", 1
        while True:
            names = [f"{stem}-{at:05d}-of-{count:05d}{mark}{SUFFIX}" for at in range(1, count + 1)]
            if not any(map(is_there, names)):
                return names
            number += 1
            mark = f"-r{number}"

    def _fill(self, output: OutputFile, contents: Sequence[Content], *, verify: bool) -> None:
        """Write one file: its header, what can be copied, and what has to be read."""
        ordered = sorted(contents, key=lambda content: -content.dtype.itemsize)
        entries: dict[str, Entry] = {}
        position = 0
        for content in ordered:
            size = _size(content)
            entries[content.name] = Entry(content.dtype, content.shape, position, size)
            position += size
        header = _encoded_header(self.path, entries)
        output.write(header)
        output.reserve(len(header) + position)
        for name, entry in entries.items():
            placed = Entry(entry.dtype, entry.shape, len(header) + entry.offset, entry.size)
            self._entries[name] = output, placed
        for content in ordered:
            stored = sum(piece.size for piece in content.stored)
            if content.stored and stored != entries[content.name].size:
                raise other_values(content, f"{stored} bytes are stored for it")
        copies = [
            Copy(content.name, content.stored, len(header) + entries[content.name].offset)
            for content in ordered
            if content.stored
        ]
        try:
            copy_tensors(copies, output, verify=verify, checksums=False)
        except DamagedTensorsError as error:
            self._faults += error.faults
        for content in ordered:
            if content.stored:
                continue  # copied
            try:
                _write_values(output, len(header) + entries[content.name].offset, content)
            except DamagedCheckpointError as error:
                self._faults.append(str(error))

    def _write_index(self) -> None:
        import json

        total = sum(entry.size for _, entry in self._entries.values())
        where = {name: split(out.path)[1] for name, (out, _) in self._entries.items()}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        self._main.write(f"{json.dumps(index, indent=2)}\n".encode())


def _size(content: Content) -> int:
    return element_count(content.shape) * content.dtype.itemsize


def _encoded_header(path: str, entries: Mapping[str, Entry]) -> bytes:
    """Return the beginning of a file: the header's length, and the header.

    Raises:
        UsageError: the reference implementation would not read so long a header.
    """
    import json

    header = {
        name: {
            "dtype": _CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (entry.offset, entry.offset + entry.size),
        }
        for name, entry in entries.items()
    }
    data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    data += b" " * (-len(data) % _ALIGNMENT)
    if len(data) > LONGEST_HEADER:
        raise UsageError(
            f"'{path}': the names and shapes of {len(entries)} tensors take {len(data)} bytes, and "
            f"a safetensors file has room for {LONGEST_HEADER}; write several files "
            "(--max-shard-size)"
        )
    return len(data).to_bytes(LENGTH_SIZE, "little") + data


def _write_values(output: OutputFile, offset: int, content: Content) -> None:
    """Write a tensor by its values.

    Raises:
        PreservationError: they are not of the shape that was announced.
    """
    for piece in array_bytes(values_of(content)):
        output.write_at(offset, piece)
        offset += len(piece)
