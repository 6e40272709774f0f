"""What a path means: which checkpoint is it that somebody named?

People pass prefixes, single files of a checkpoint, directories and SavedModels; state files point
to machines that are gone. Nothing is guessed silently: what is ambiguous is an error that lists
the candidates, and what was passed over is a note on the checkpoint.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.files import (
    can_be_listed,
    is_directory,
    is_regular_file,
    is_url,
    join,
    listing,
    local_path,
    open_source,
    scheme_of,
    split,
)
from compat_restore.checkpoint.table import MAGIC
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    InputError,
    nearest,
)
from compat_restore.names import sort_key

if TYPE_CHECKING:
    from typing import Literal

__all__ = ["Location", "all_in", "ends_as_table", "locate", "read_state_file"]

_STATE_FILE = "checkpoint"
# Files that say which checkpoint their directory holds, and hold none themselves.
_NAMING_FILES = (_STATE_FILE, "saved_model.pb", "saved_model.pbtxt")
_STATE_LINE = re.compile(r'\s*model_checkpoint_path\s*:\s*("(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')')
_LONGEST_STATE_FILE = 16 << 20
_DATA_FILE = re.compile(r"(?P<prefix>.+)\.data-\d{5}-of-\d{5}")
_SHARD_FILE = re.compile(r"(?P<stem>.+)-(?:\d{5}|\?{5})-of-(?P<count>\d{5})")
# What stands beside checkpoints; on a server each file that is looked into costs two round trips.
_NO_TABLE = re.compile(r".+\.(?:meta|pb|pbtxt|json|txt)|events\.out\.tfevents\..+")
_OUR_SUFFIXES = (".index", ".meta")
_SAFETENSORS, _SAFETENSORS_INDEX, _NPZ = ".safetensors", ".safetensors.index.json", ".npz"
_HDF5 = (".h5", ".hdf5")

# What people take for a checkpoint: (first bytes, what it is, what to do).
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "run `git lfs pull` there"),
    (b"PK\x03\x04", "a zip archive (PyTorch?)", "open it with the program that wrote it"),
    (b"\x80\x02", "a pickle (an old PyTorch file?)", "open it with the program that wrote it"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"<!DOCTYPE", "a web page", "the download was refused or redirected; download it again"),
    (b"<html", "a web page", "the download was refused or redirected; download it again"),
)


class Location(NamedTuple):
    """A checkpoint that was found.

    Attributes:
        version: of the file format: TensorFlow's "V1" or "V2", or another format's name.
        path: the prefix (V2), what the checkpoint is called (V1), or the file; of several
            safetensors files, their index.
        files: the files of a V1 checkpoint; empty for V2, whose index names them.
        notes: what should be said about how it was found.
    """

    version: Literal["V1", "V2", "safetensors", "npz", "keras"]
    path: str
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def locate(path: str) -> Location:
    """Return the checkpoint that `path` means.

    Raises:
        CheckpointNotFoundError: there is none, or only a part of one.
        CheckpointFormatError: what is there is no checkpoint.
        DamagedCheckpointError: an empty file.
        InputError: what is there may not be read, or cannot be reached.
        UsageError, MissingDependencyError: a URL of a protocol that is unknown, or not installed.
    """
    path = local_path(path) or path
    if is_directory(path) and not is_regular_file(f"{path.rstrip('/')}.index"):
        return _in_directory(path)
    if is_regular_file(f"{path}.index"):
        return _bundle(path)
    if found := _from_part(path):
        return found
    folder, name = split(path)
    if name in _NAMING_FILES and is_regular_file(path) and not ends_as_table(path):
        return _in_directory(folder or ".")
    if is_regular_file(path):
        return _file(path)
    if shards := _v1_shards(path) or _safetensors_set(path):
        return shards
    _check_allowed(path)
    raise CheckpointNotFoundError(_not_found_message(path))


def read_state_file(path: str) -> str | None:
    """Return `model_checkpoint_path` of a `checkpoint` state file, None if it has none.

    The file is a text protocol buffer, `CheckpointState`.
    """
    with open_source(path) as file:
        text = file.read(0, min(file.size, _LONGEST_STATE_FILE)).decode(errors="replace")
    match = _STATE_LINE.search(text)
    return _unescape(match[1][1:-1]) if match else None


def _unescape(text: str) -> str:
    r"""Undo the text format's escapes; UTF-8 stands as octal bytes: `\346\250\251`."""

    def one(match: re.Match[str]) -> str:
        code = match[1]
        named = {"n": "\n", "t": "\t", "r": "\r"}
        return chr(int(code, 8)) if code[0].isdigit() else named.get(code, code)

    if "\\" not in text:
        return text
    plain = re.sub(r"\\([0-7]{1,3}|.)", one, text)
    try:
        return plain.encode("latin-1").decode()
    except UnicodeError:
        return plain


def _bundle(prefix: str, notes: tuple[str, ...] = ()) -> Location:
    if ends_as_table(prefix):
        note = (
            f"'{prefix}' is a V1 checkpoint beside the V2 checkpoint of the same name, and may "
            "hold other weights: the V2 one is taken, as TensorFlow does; move the V1 file to "
            "another name to read it"
        )
        notes += (note,)
    return Location("V2", prefix, notes=notes)


def _from_part(path: str) -> Location | None:
    """Return the checkpoint of which `path` is one file."""
    prefix = None
    for suffix in _OUR_SUFFIXES:
        if path.endswith(suffix):
            prefix = path.removesuffix(suffix)
    if match := _DATA_FILE.fullmatch(path):
        prefix = match["prefix"]
    if prefix is None:
        return None
    if is_regular_file(f"{prefix}.index"):
        return _bundle(prefix)
    if path.endswith(".meta"):
        if is_regular_file(prefix):
            return _file(prefix)
        return _v1_shards(prefix)
    if match and is_regular_file(path):
        raise CheckpointNotFoundError(_indexless(prefix, [os.path.basename(path)]))
    return None


def _file(path: str) -> Location:
    """Return the V1 checkpoint that a file is, or is a shard of."""
    if match := _SHARD_FILE.fullmatch(path):
        shards = _shard_set(match["stem"], int(match["count"]))
        if shards:
            return shards
    head = _head(path)
    if not head:
        raise DamagedCheckpointError(f"'{path}' is empty: is there another copy?")
    if not ends_as_table(path):
        if _is_of_keras(path, head):
            return Location("keras", path, (path,))
        if found := _of_another_format(path, head):
            return found
        for magic, what, cure in _FOREIGN:
            if head.startswith(magic):
                raise CheckpointFormatError(
                    f"'{path}' is no TensorFlow checkpoint: it is {what}; {cure}"
                )
    return Location("V1", path, (path,))


def _of_another_format(path: str, head: bytes) -> Location | None:
    """Return the checkpoint that a file is if it is none of TensorFlow's, by what is in it.

    Where its name alone says the format, its reader tells what is wrong with it.
    """
    if head.startswith(b"PK"):
        from compat_restore.checkpoint.npz import looks_like_npz

        with open_source(path) as file:
            known = looks_like_npz(file)
        return Location("npz", path) if known or path.endswith(_NPZ) else None
    from compat_restore.checkpoint.safetensors import index_of, looks_like_safetensors

    # Its first bytes are a number, which may look like anything: so this comes first.
    with open_source(path) as file:
        known = looks_like_safetensors(file)
    if not known and any(head.startswith(magic) for magic, _, _ in _FOREIGN):
        return None
    if not known and path.endswith(_NPZ):
        return Location("npz", path)
    if not known and not path.endswith((_SAFETENSORS, _SAFETENSORS_INDEX)):
        return None
    notes: tuple[str, ...] = ()
    if index := index_of(path):
        notes = (f"this is one file of a set; name its index for all of them: '{index}'",)
    elif is_regular_file(index := path.removesuffix(_SAFETENSORS) + _SAFETENSORS_INDEX):
        notes = (f"'{index}' beside it was passed over: it may be of another checkpoint",)
    return Location("safetensors", path, notes=notes)


def _v1_shards(path: str) -> Location | None:
    """Return the sharded V1 checkpoint that a glob or a bare prefix means."""
    if match := _SHARD_FILE.fullmatch(path):
        return _shard_set(match["stem"], int(match["count"]))
    folder, stem = split(path)
    counts = {
        int(match["count"])
        for name in _listing(folder)
        if (match := _SHARD_FILE.fullmatch(name)) and match["stem"] == stem
    }
    if len(counts) > 1:
        raise CheckpointFormatError(
            f"'{path}' has shards of several checkpoints, of {sorted(counts)} files; name one: "
            f"'{path}-?????-of-{min(counts):05d}'"
        )
    return _shard_set(path, counts.pop()) if counts else None


def _safetensors_set(path: str) -> Location | None:
    """Return the set of files that is called as a single file would be."""
    index = path.removesuffix(_SAFETENSORS) + _SAFETENSORS_INDEX
    if path.endswith(_SAFETENSORS) and is_regular_file(index):
        return Location("safetensors", index)
    return None


def _shard_set(stem: str, count: int) -> Location | None:
    files = tuple(f"{stem}-{number:05d}-of-{count:05d}" for number in range(count))
    there = [name for name in files if is_regular_file(name)]
    if not there:
        return None
    if missing := [os.path.basename(name) for name in files if name not in there]:
        raise CheckpointNotFoundError(
            f"checkpoint '{stem}' has {count} shards, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy all files of one checkpoint"
        )
    return Location("V1", f"{stem}-?????-of-{count:05d}", files)


def _in_directory(folder: str) -> Location:
    if is_regular_file(join(folder, "saved_model.pb")) or is_regular_file(
        join(folder, "saved_model.pbtxt")
    ):
        prefix = join(folder, "variables", "variables")
        if is_regular_file(f"{prefix}.index"):
            return _bundle(prefix, (f"the variables of the SavedModel '{folder}'",))
        raise CheckpointNotFoundError(
            f"'{folder}' is a SavedModel without variables: '{prefix}.index' is missing"
        )
    state = join(folder, _STATE_FILE)
    candidates = _checkpoints_in(folder)
    if is_regular_file(state) and (named := read_state_file(state)):
        return _from_state(folder, named, candidates)
    if len(candidates) == 1:
        return locate(join(folder, candidates[0]))
    if candidates:
        raise CheckpointNotFoundError(
            f"directory '{folder}' has no `checkpoint` file, and {len(candidates)} checkpoints: "
            f"name one of {_listed(candidates)}"
        )
    if not can_be_listed(folder):
        raise CheckpointNotFoundError(
            f"'{folder}' has no `checkpoint` file, and directories cannot be listed over "
            f"{scheme_of(folder)}://: name the checkpoint's prefix or one of its files, such as "
            f"'{join(folder, 'model.ckpt')}'"
        )
    lost = sorted({m["prefix"] for name in _listing(folder) if (m := _DATA_FILE.fullmatch(name))})
    if lost:
        raise CheckpointNotFoundError(
            f"directory '{folder}' holds the data of {_listed(lost)}, but no '.index' file, "
            "without which it cannot be read; copy all files of the checkpoint"
        )
    others = _others_in(folder)
    if len(others) == 1:
        return locate(join(folder, others[0]))
    if others:
        raise CheckpointNotFoundError(
            f"directory '{folder}' holds {len(others)} checkpoints: name one of {_listed(others)}"
        )
    raise CheckpointNotFoundError(f"directory '{folder}' holds no checkpoint")


def _from_state(folder: str, named: str, candidates: list[str]) -> Location:
    """Return the checkpoint that a state file names: where it says, or else beside the file."""
    beside = join(folder, os.path.basename(named))
    meant = _meant(folder, named)
    for path in dict.fromkeys(path for path in (meant, beside) if path is not None):
        if os.path.basename(path) not in _NAMING_FILES and _is_there(path):
            found = locate(path)
            if path == meant:
                return found
            state = join(folder, _STATE_FILE)
            lost = "is on another machine" if meant is None else "is not there"
            note = f"the state file '{state}' names '{named}', which {lost}; '{beside}' was taken"
            return Location(found.version, found.path, found.files, (*found.notes, note))
    data = [
        name for name in _listing(folder) if name.startswith(f"{os.path.basename(named)}.data-")
    ]
    if data:
        raise CheckpointNotFoundError(_indexless(beside, data))
    there = (
        f"the directory holds {_listed(candidates)}; name one"
        if candidates
        else ("the directory holds no other")
    )
    raise CheckpointNotFoundError(
        f"the state file '{join(folder, _STATE_FILE)}' names the checkpoint '{named}', "
        f"which is neither there nor beside it; {there}"
    )


def _meant(folder: str, named: str) -> str | None:
    """Return the path that a state file in `folder` names; None if it is not to be followed.

    A file that was downloaded leads to no server, and one of a server to no file here and to no
    other server.
    """
    if not is_url(folder):
        return None if is_url(named) else join(folder, named)
    server = folder[: folder.index("://") + 3] + folder.split("://", 1)[1].split("/", 1)[0] + "/"
    if named.startswith(server):
        return named
    return None if scheme_of(named) or named.startswith("/") else join(folder, named)


def _indexless(prefix: str, data: list[str]) -> str:
    return (
        f"checkpoint '{prefix}' has data ({', '.join(data)}), but its index '{prefix}.index' is "
        "missing, without which the data cannot be read; copy all files of the checkpoint"
    )


def _is_there(path: str) -> bool:
    return is_regular_file(path) or is_regular_file(f"{path}.index") or _v1_shards(path) is not None


def all_in(folder: str) -> list[str]:
    """Return what every checkpoint in a directory is called, also those that lack a file.

    Raises:
        InputError: the directory cannot be listed.
    """
    names = listing(folder)
    others = [*_others_in(folder), *(name for name in names if name.endswith((*_HDF5, ".keras")))]
    found = {name for name in others if not is_directory(join(folder, name))}
    found |= {*_checkpoints_in(folder)}
    found |= {m["prefix"] for name in names if (m := _DATA_FILE.fullmatch(name))}
    return sorted((name for name in found if not name.startswith(".")), key=sort_key)


def _checkpoints_in(folder: str) -> list[str]:
    """Return the names of the checkpoints in a directory, naturally sorted.

    Hidden files are none: a writer that was killed leaves such.
    """
    found = set()
    for name in _listing(folder):
        if name.startswith("."):
            continue
        if name.endswith(".index"):
            found.add(name.removesuffix(".index"))
        elif match := _SHARD_FILE.fullmatch(name):
            if not _DATA_FILE.fullmatch(name):
                found.add(f"{match['stem']}-?????-of-{match['count']}")
        elif not _NO_TABLE.fullmatch(name) and ends_as_table(join(folder, name)):
            found.add(name)
    return sorted(found, key=sort_key)


def _others_in(folder: str) -> list[str]:
    """Return the names of checkpoints that are none of TensorFlow's, by their endings."""
    from compat_restore.checkpoint.safetensors import SHARD

    names = [name for name in _listing(folder) if not name.startswith(".")]
    found = {name for name in names if name.endswith((_SAFETENSORS, _NPZ))}
    # A set is called as a single file would be, which is the one that counts if there are both.
    found |= {
        name.removesuffix(_SAFETENSORS_INDEX) + _SAFETENSORS
        for name in names
        if name.endswith(_SAFETENSORS_INDEX)
    }
    parts = {
        name
        for name in found
        if (match := SHARD.fullmatch(name)) and match["stem"] + _SAFETENSORS in found
    }
    return sorted(found - parts, key=sort_key)


def _listing(folder: str) -> list[str]:
    try:
        return listing(folder)
    except InputError:  # what may not be listed may hold what can be read
        return []


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _head(path: str) -> bytes:
    with open_source(path) as file:
        return file.read(0, min(file.size, 64))


def _is_of_keras(path: str, head: bytes) -> bool:
    """Whether a file is HDF5, or a zip archive with Keras's weights in it.

    Where its name alone says so, its reader tells what is wrong with it.
    """
    from compat_restore.checkpoint import hdf5, keras_archive

    if head.startswith(b"PK"):
        with open_source(path) as file:
            return path.endswith(".keras") or keras_archive.has_weights(file)
    if head.startswith(hdf5.MAGIC):
        return True
    return path.endswith(_HDF5) and not any(head.startswith(magic) for magic, _, _ in _FOREIGN)


def ends_as_table(path: str) -> bool:
    """Whether a file ends as the tables do that V1 checkpoints and the indices of V2 are."""
    size = len(MAGIC)
    try:
        if not is_regular_file(path):
            return False
        with open_source(path) as file:
            return file.size >= size and file.read(file.size - size, size) == MAGIC
    except InputError:  # a neighbour that may not be read is no candidate
        return False


def _check_allowed(path: str) -> None:
    """Check that what is not found is not there, rather than withheld.

    Raises:
        InputError: a server refuses it.
    """
    for name in (path, f"{path}.index") if is_url(path) else ():
        with suppress(CheckpointNotFoundError):
            open_source(name).close()


def _not_found_message(path: str) -> str:
    if not can_be_listed(path):
        return (
            f"no checkpoint '{path}': the server has neither '{path}' nor '{path}.index', and "
            f"directories cannot be listed over {scheme_of(path)}://; name the whole prefix or "
            "one of the files (a directory with a state file ends in '/')"
        )
    folder, stem = split(path)
    if folder and not is_directory(folder):
        return f"no checkpoint '{path}': the directory '{folder}' is missing"
    data = [name for name in _listing(folder) if name.startswith(f"{stem}.data-")]
    if match := _DATA_FILE.fullmatch(path):
        data, stem = [os.path.basename(path)], os.path.basename(match["prefix"])
    if data:
        return _indexless(join(folder, stem), data)
    candidates = [*_checkpoints_in(folder or "."), *_others_in(folder or ".")]
    near = nearest(stem, candidates) or tuple(candidates[:3])
    if near:
        return f"no checkpoint '{path}'; the directory holds " + _listed(list(near))
    return f"no checkpoint '{path}': the directory '{folder or '.'}' holds none"
