"""What every checkpoint writer offers, whatever its format."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.files import (
    ClosedAtEnd,
    is_directory,
    is_regular_file,
    is_there,
    is_url,
    join,
    split,
)
from compat_restore.checkpoint.output import check_writable
from compat_restore.errors import OutputError, PreservationError, UsageError
from compat_restore.tensors import format_shape, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from compat_restore.checkpoint.reader import StoredTensor
    from compat_restore.tensors import Array, DType, Shape, Slice

__all__ = [
    "CheckpointWriter",
    "Content",
    "check_contents",
    "check_place",
    "in_source_order",
    "other_values",
    "the_file_itself",
    "values_of",
]

_MOST_LISTED = 50


class Content(NamedTuple):
    """A tensor to be written: what it is, and where its values come from.

    Attributes:
        name: its key in the new checkpoint.
        dtype: the type to declare.
        shape: of the whole tensor.
        read: returns the values. Quantised types come as integers, strings as `bytes`.
        stored: where the bytes stand, if they can be copied as they are: the pieces that, one
            after another, are the tensor's bytes; one a slice for a tensor that stays partitioned;
            empty where the values have to be read.
        slices: the parts of a tensor that is to be stored partitioned; empty for a whole one.
    """

    name: str
    dtype: DType
    shape: Shape
    read: Callable[[], Array]
    stored: tuple[StoredTensor, ...] = ()
    slices: tuple[Slice, ...] = ()

    @classmethod
    def of(cls, name: str, dtype: DType, array: Array) -> Content:
        """Return the content whose values are at hand."""
        return cls(name=name, dtype=dtype, shape=array.shape, read=lambda: array)


class CheckpointWriter(ClosedAtEnd):
    """A checkpoint that is being written: `write` everything, look at it, `finish`.

    In a `with` statement, leaving without `finish` removes what was written.

    Attributes:
        path: what the new checkpoint will be called.
        format: what it is, for people.
        fills_template: whether the writer starts from the template's file, so that it needs to be
            given nothing but what changes.
    """

    path: str
    format: str
    fills_template: bool = False

    @abstractmethod
    def write(self, contents: Sequence[Content], *, verify: bool = True) -> None:
        """Write all tensors; called once.

        Args:
            contents: in any order; the writer chooses the order in which they are stored.
            verify: check copied bytes against the checksums that are stored for them.

        Raises:
            DamagedCheckpointError: bytes to be copied do not have their checksum; all such tensors
                are listed.
            OutputError: the disk does not take it.
            UsageError: the format cannot hold a tensor; all such are listed.
        """

    @abstractmethod
    def read_back(self, name: str) -> Array | bytes:
        """Return what was written of a tensor, read from the file before it is put in place.

        Returns:
            The values; the bytes as stored, where NumPy cannot hold the values (variants).
        """

    @abstractmethod
    def finish(self) -> None:
        """Put the checkpoint in place, in one moment.

        Raises:
            OutputError: that failed; what was there before is untouched.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove what was written; after `finish` there is nothing to remove."""


def check_place(
    path: str,
    existing: Callable[[str], tuple[str, ...]],
    *,
    overwrite: bool,
    example: str,
) -> tuple[str, ...]:
    """Return the files that a new checkpoint would replace.

    Args:
        path: what it will be called.
        existing: returns the files that stand under a name.
        overwrite: whether they may be replaced.
        example: a name that would do in a directory.

    Raises:
        OutputError: there are some and `overwrite` is not set, one of them is no regular file, or
            no checkpoint can have this name.
    """
    check_writable(path)
    if not split(path)[1] or is_directory(path):
        raise OutputError(
            f"'{path}' is {'a directory' if path else 'no name'}; a name for the new checkpoint is "
            f"expected, such as '{join(path, example)}'"
        )
    old = existing(path)
    if old and not overwrite:
        names = ", ".join(split(file)[1] for file in old)
        raise OutputError(
            f"'{path}' exists already ({names}); choose another name, or overwrite it with "
            "overwrite=True (--overwrite)"
        )
    for file in old:
        if not is_url(file) and not os.path.islink(file) and not is_regular_file(file):
            raise OutputError(
                f"'{file}' is no regular file, and stands where one of the checkpoint's would; "
                "choose another name"
            )
    return old


def the_file_itself(path: str) -> tuple[str, ...]:
    """Return the file of a name, if it is there."""
    return (path,) if is_there(path) else ()


def in_source_order(contents: Iterable[Content]) -> list[Content]:
    """Return tensors in the order in which their bytes stand; those that have to be read last."""

    def place(content: Content) -> tuple[bool, str, int]:
        if not content.stored:
            return True, "", 0
        return False, content.stored[0].source.name, content.stored[0].offset

    return sorted(contents, key=place)


def check_contents(
    path: str,
    format_name: str,
    contents: Sequence[Content],
    *,
    is_name: Callable[[str], bool],
    why_unfit: Callable[[Content], str | None],
    parts: bool = False,
) -> None:
    """Check that a format can hold what is to be written.

    Args:
        path: the new checkpoint.
        format_name: the format.
        contents: what is to be written.
        is_name: whether a tensor can have a name.
        why_unfit: why a tensor cannot be held; None if it can.
        parts: whether the format has partitioned tensors.

    Raises:
        UsageError: it cannot; all tensors that it cannot hold are listed.
    """
    names = [content.name for content in contents]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"'{path}': {_listed(map(repr, twice))} cannot be written twice")
    if bad := [name for name in names if not is_name(name)]:
        raise UsageError(
            f"'{path}': {format_name} has no tensors of the names {_listed(map(repr, bad))}; "
            "rename them"
        )
    divided = [content.name for content in contents if content.slices]
    if divided and not parts:
        raise UsageError(
            f"'{path}': {format_name} has no partitioned tensors; {_listed(map(repr, divided))} "
            "have to be whole"
        )
    if unfit := [(content.name, why) for content in contents if (why := why_unfit(content))]:
        raise UsageError(
            f"'{path}': {format_name} cannot hold {len(unfit)} of the tensors: "
            + _listed(f"'{name}' ({why})" for name, why in unfit)
            + "; leave them out with exclude=... (--exclude), or cast numbers with a rule"
        )


def values_of(content: Content) -> Array:
    """Return the values of a tensor, in the type that was announced.

    Raises:
        PreservationError: they are not of the shape that was announced.
    """
    array = content.read()
    if array.shape != content.shape:
        raise other_values(content, f"its values are {array.dtype}{format_shape(array.shape)}")
    return array.astype(numpy_dtype(content.dtype), copy=False)


def other_values(content: Content, what: str) -> PreservationError:
    """Return the error that a tensor is not what was announced."""
    return PreservationError(
        f"tensor '{content.name}' was to be {content.dtype}{format_shape(content.shape)}, and "
        f"{what}; nothing was put in place"
    )


def _listed(items: Iterable[str]) -> str:
    found = list(items)
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return ", ".join(found[:_MOST_LISTED]) + more
