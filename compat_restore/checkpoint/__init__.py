"""Checkpoint files, read without TensorFlow."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compat_restore.checkpoint.locate import Location, locate
from compat_restore.checkpoint.reader import CheckpointReader, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

__all__ = ["CheckpointReader", "Location", "StoredTensor", "locate", "open_checkpoint", "opened"]


def open_checkpoint(path: str | PathLike[str]) -> CheckpointReader:
    """Open a checkpoint, whatever its format and however it is named.

    Args:
        path: a prefix; one of the checkpoint's files (`.index`, `.data-...`, `.meta`, a V1 file or
            one of its shards, or the pattern `PREFIX-?????-of-NNNNN` of those); a directory with a
            `checkpoint` state file or a single checkpoint in it; a SavedModel's directory; a
            safetensors file, or the index of a set of them; an npz file; a
            file of Keras (`.h5`, `.weights.h5`, `.keras`).

    Returns:
        A reader, to be closed or used in a `with` statement.

    Raises:
        CheckpointNotFoundError: there is nothing, or a part is missing.
        CheckpointFormatError: what is there is no checkpoint.
        DamagedCheckpointError: it is one, and damaged.
    """
    location = locate(os.fspath(path))
    if location.version == "V2":
        from compat_restore.checkpoint.bundle import BundleReader

        return BundleReader(location.path, location.notes)
    if location.version == "safetensors":
        from compat_restore.checkpoint.safetensors import SafetensorsReader

        return SafetensorsReader(location.path, location.notes)
    if location.version == "npz":
        from compat_restore.checkpoint.npz import NpzReader

        return NpzReader(location.path, location.notes)
    if location.version == "keras":
        from compat_restore.checkpoint.keras_h5 import KerasH5Reader

        return KerasH5Reader(location.path, location.notes)
    from compat_restore.checkpoint.v1 import V1Reader

    return V1Reader(location.path, location.files, location.notes)


@contextmanager
def opened(checkpoint: CheckpointReader | str | PathLike[str]) -> Iterator[CheckpointReader]:
    """Open a checkpoint for the time of a `with` statement; an open one stays open after it."""
    if isinstance(checkpoint, CheckpointReader):
        yield checkpoint
        return
    with open_checkpoint(checkpoint) as reader:
        yield reader
