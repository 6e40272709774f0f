"""What is to be written where: the format of a new checkpoint, by the name it is to have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compat_restore.errors import UsageError

if TYPE_CHECKING:
    from typing import Literal

    from compat_restore.checkpoint.reader import CheckpointReader
    from compat_restore.checkpoint.writer import CheckpointWriter

    Kind = Literal["bundle", "safetensors", "npz", "h5"]

__all__ = ["check_destination", "create_writer", "kind_of"]

_KINDS: tuple[tuple[str, Kind], ...] = (
    (".safetensors", "safetensors"),
    (".npz", "npz"),
    (".h5", "h5"),
    (".hdf5", "h5"),
    (".keras", "h5"),
)
_PARTS = re.compile(r"(?:\.index|\.meta|\.data-\d{5}-of-\d{5}|\.safetensors\.index\.json)$")
# A V2 checkpoint could have such a name, and nobody would look for one behind it.
_OTHERS = (".npy", ".pt", ".pth", ".bin", ".pkl", ".pb", ".onnx", ".tflite", ".msgpack", ".json")


def kind_of(path: str) -> Kind:
    """Return the format that a new checkpoint of this name has: by its ending, else a V2 bundle.

    Raises:
        UsageError: the ending says a format that is not written, or a part of a checkpoint.
    """
    for ending, kind in _KINDS:
        if path.endswith(ending):
            return kind
        if path.lower().endswith(ending):
            raise UsageError(f"'{path}': write the ending in small letters, {ending!r}")
    if match := _PARTS.search(path):
        raise UsageError(
            f"'{path}' is the name of a part of a checkpoint; name the whole: "
            f"'{path[: match.start()]}{'.safetensors' if 'safe' in match[0] else ''}'"
        )
    if path.lower().endswith(_OTHERS):
        raise UsageError(
            f"'{path}': {path[path.rindex('.') :]} files are not written; the formats are "
            + ", ".join(ending for ending, _ in _KINDS)
            + ", and V2 checkpoints under any other name"
        )
    return "bundle"


def check_destination(path: str, *, overwrite: bool) -> tuple[str, ...]:
    """Return the files of checkpoints that would be replaced.

    Raises:
        OutputError: there are some and `overwrite` is not set, or none can have this name.
    """
    match kind_of(path):
        case "bundle":
            from compat_restore.checkpoint import bundle_writer

            return bundle_writer.check_destination(path, overwrite=overwrite)
        case "safetensors":
            from compat_restore.checkpoint import safetensors_writer

            return safetensors_writer.check_destination(path, overwrite=overwrite)
        case "npz":
            from compat_restore.checkpoint import npz_writer

            return npz_writer.check_destination(path, overwrite=overwrite)
        case "h5":
            from compat_restore.checkpoint import keras_h5

            return keras_h5.check_destination(path, overwrite=overwrite)


def create_writer(
    path: str,
    template: CheckpointReader | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> CheckpointWriter:
    """Begin a checkpoint in the format that its name says.

    Args:
        path: what it will be called.
        template: a checkpoint of the same structure. Keras files are made from one; other formats
            need none.
        overwrite: replace a checkpoint of that name.
        max_shard_size: bytes after which another file begins, where the format can have several.

    Raises:
        OutputError: the place cannot be written to.
        UsageError: the format cannot be written so.
    """
    kind = kind_of(path)
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"max_shard_size is {max_shard_size}; a number of bytes is expected")
    if max_shard_size is not None and kind not in ("bundle", "safetensors"):
        raise UsageError(
            f"'{path}': a {kind} file is one file; max_shard_size is for V2 bundles and safetensors"
        )
    match kind:
        case "bundle":
            from compat_restore.checkpoint.bundle_writer import BundleWriter

            return BundleWriter(path, overwrite=overwrite, max_shard_size=max_shard_size)
        case "safetensors":
            from compat_restore.checkpoint.safetensors_writer import SafetensorsWriter

            return SafetensorsWriter(path, overwrite=overwrite, max_shard_size=max_shard_size)
        case "npz":
            from compat_restore.checkpoint.npz_writer import NpzWriter

            return NpzWriter(path, overwrite=overwrite)
        case "h5":
            from compat_restore.checkpoint.keras_h5 import KerasH5Reader, KerasH5Writer

            if not isinstance(template, KerasH5Reader):
                raise UsageError(
                    f"'{path}': a Keras file is made from one of the same model, freshly made and "
                    "saved: into='fresh.weights.h5' (--into fresh.weights.h5)"
                )
            return KerasH5Writer(path, template, overwrite=overwrite)
