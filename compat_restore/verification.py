"""Whether a checkpoint is what was written: every tensor against the checksum stored for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint import opened
from compat_restore.errors import DamagedTensorsError

if TYPE_CHECKING:
    from os import PathLike

    from compat_restore.checkpoint import CheckpointReader

__all__ = ["Verification", "verify_checkpoint"]


class Verification(NamedTuple):
    """What the checksums of a checkpoint say.

    Attributes:
        checkpoint: the checkpoint, as it was found.
        checkpoint_format: what kind of checkpoint it is.
        tensors: how many it holds.
        nbytes: of their values; strings of unknown length are not counted.
        faults: one message a damaged tensor, all of them; empty if all is well.
        checked: whether the format has checksums; where it has none, reading proves nothing.
    """

    checkpoint: str
    checkpoint_format: str
    tensors: int
    nbytes: int
    faults: tuple[str, ...]
    checked: bool


def verify_checkpoint(checkpoint: CheckpointReader | str | PathLike[str]) -> Verification:
    """Check every tensor of a checkpoint against its checksum, and tell all that are damaged.

    The index is checked when the checkpoint is opened. Memory is constant; values are not decoded
    where the format has checksums of bytes.

    Args:
        checkpoint: an open checkpoint, or anything that `open_checkpoint` takes.

    Raises:
        CheckpointNotFoundError: there is none, or one of its files is missing.
        CheckpointFormatError: what is there is no checkpoint.
        DamagedCheckpointError: the index is damaged, or a file is cut short, so that nothing can
            be said of single tensors.
    """
    with opened(checkpoint) as reader:
        faults: tuple[str, ...] = ()
        specs = reader.specs()
        try:
            reader.verify(specs)
        except DamagedTensorsError as error:
            faults = error.faults
        return Verification(
            checkpoint=reader.path,
            checkpoint_format=reader.format,
            tensors=len(specs),
            nbytes=sum(spec.nbytes for spec in specs.values()),
            faults=faults,
            checked=reader.has_checksums,
        )
