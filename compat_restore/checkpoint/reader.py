"""What every checkpoint reader offers, whatever its format."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.files import ClosedAtEnd
from compat_restore.errors import (
    DamagedCheckpointError,
    DamagedTensorsError,
    TensorNotFoundError,
    nearest,
)
from compat_restore.names import Role, classify

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.tensors import Array, TensorSpec

__all__ = ["CheckpointReader", "StoredTensor"]


class StoredTensor(NamedTuple):
    """Where the bytes of a tensor, or of a part of one, stand, to be copied without decoding.

    They are its elements in C order and little-endian, or strings as a V2 bundle stores them.

    Attributes:
        source: the file that holds them.
        offset: of the first byte in it.
        size: in bytes.
        checksum: the masked crc32c that is stored for them; None where the format has none.
        strings: how many strings they are; None for elements of a fixed size.
        opaque: the checksum has a rule that TensorFlow alone knows: it is carried along unchecked.
    """

    source: ByteSource
    offset: int
    size: int
    checksum: int | None = None
    strings: int | None = None
    opaque: bool = False


class CheckpointReader(ClosedAtEnd):
    """An open checkpoint. Opening reads its index alone; a tensor is read when asked for.

    Attributes:
        path: the prefix or file that was opened.
        format: what it is, for people: "V2 tensor bundle, name-based".
        notes: what a reader should be told about it (two checkpoints under one prefix ...).
        has_checksums: whether damage to the bytes of a tensor would be found.
    """

    path: str
    format: str
    notes: tuple[str, ...] = ()
    has_checksums: bool = True

    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of every tensor by its name in the checkpoint (its key), sorted."""

    @abstractmethod
    def _read(self, key: str) -> Array:
        """Return the values under a key that `specs` has."""

    @abstractmethod
    def files(self) -> tuple[str, ...]:
        """Return the paths of the files that make up the checkpoint."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def variables(self) -> Mapping[str, TensorSpec]:
        """Return the specs by variable name: as `specs`, but object-based keys by full names."""
        return self.specs()

    def key_of(self, name: str) -> str:
        """Return the key of a tensor that is named by its key or by its variable's name.

        Raises:
            TensorNotFoundError: the checkpoint has none of that name.
        """
        if name in self.specs():
            return name
        raise self._not_found(name)

    def read(self, name: str) -> Array:
        """Return a tensor's values, its checksum checked; partitions are joined.

        Args:
            name: its key in the checkpoint, or its variable's name.

        Returns:
            An array of the spec's shape. Strings are an `object` array of `bytes`; quantised
            types are held as integers, bfloat16 as `ml_dtypes.bfloat16`. The array is the
            caller's own, not a view of a file.

        Raises:
            TensorNotFoundError: there is no tensor of that name.
            DamagedCheckpointError: its bytes are not those that were written.
        """
        return self._read(self.key_of(name))

    def roles(self) -> Mapping[str, Role]:
        """Return what each tensor is for, by its name in `variables`."""
        return classify(self.variables())

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Return where a tensor's bytes stand, if they can be taken as they are.

        Returns:
            One place; as many as the spec has slices, in their order, for a partitioned tensor;
            none where the values have to be decoded.
        """
        self.key_of(name)
        return ()

    def verify(self, names: Iterable[str]) -> None:
        """Check the bytes of tensors against their checksums, holding one at a time.

        Raises:
            DamagedTensorsError: tensors are damaged; all of those are listed.
        """
        faults = []
        for name in names:
            try:
                self.read(name)
            except DamagedCheckpointError as error:
                faults.append(str(error))
        if faults:
            raise DamagedTensorsError(faults)

    def _not_found(self, name: str) -> TensorNotFoundError:
        names = list(self.variables())
        if name.endswith(":0") and name[:-2] in self.variables():
            cure = f'names in a checkpoint carry no ":0"; ask for {name[:-2]!r}'
        elif near := nearest(name, names):
            cure = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        else:
            cure = f"it holds {len(names)} others; `compat-restore inspect` lists them"
        return TensorNotFoundError(f"no tensor {name!r} in checkpoint '{self.path}': {cure}")
