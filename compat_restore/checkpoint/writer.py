"""What every checkpoint writer offers, whatever its format."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compat_restore.checkpoint.files import ClosedAtEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compat_restore.checkpoint.reader import StoredTensor
    from compat_restore.tensors import Array, DType, Shape, Slice

__all__ = ["CheckpointWriter", "Content"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
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
