"""Keras's files: legacy `.h5`, `.weights.h5` and `.keras`, read and filled without Keras.

Source: Keras's `saving/saving_lib.py` and `legacy/saving/legacy_h5_format.py`, tf_keras's
`saving/legacy/hdf5_format.py`. Each tensor is a dataset, and its key is the dataset's path:

    legacy weights (h5, Keras 1 to 3)       conv1/conv1/kernel:0        {layer}/{weight's name}
    legacy whole model                      model_weights/conv1/conv1/kernel:0
                                            optimizer_weights/Adam/m/conv1/kernel:0
    .weights.h5 (Keras 3, tf_keras 2.13)    layers/conv2d/vars/0        {place in model}/vars/{n}
                                            optimizer/vars/2
    .keras                                  the same, in a zip beside the model's configuration

Variables go by the names that a writer of rules knows. In a legacy file that is the weight's own
name without ":0" (`conv1/kernel`); in the newer files the name that `keras_names.py` finds, or else
the key. A name that two have stands for neither. Rules also reach a variable by its key, and by
its name with or without that of the model as a whole.

Files of HDF5 that Keras did not write are read too: each dataset goes by its path.

HDF5 as Keras writes it has no checksums. A `.keras` archive has one of all weights together, which
is checked before the first value is given out: by it, all tensors are whole or none is.

bfloat16 has no type of its own in HDF5: Keras stores two opaque bytes an element, and says so in
the dataset's attribute `dtype` (not in legacy files).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compat_restore.checkpoint.copying import Copy, copy_tensors
from compat_restore.checkpoint.files import (
    absolute,
    identity,
    open_source,
    split,
)
from compat_restore.checkpoint.hdf5 import Hdf5File, hdf5_start
from compat_restore.checkpoint.keras_archive import ArchiveOutput, KerasArchive
from compat_restore.checkpoint.keras_names import layers_of_config, variable_names
from compat_restore.checkpoint.output import create_output, sync_directory
from compat_restore.checkpoint.reader import CheckpointReader, StoredTensor
from compat_restore.checkpoint.writer import CheckpointWriter, check_place, the_file_itself
from compat_restore.errors import (
    CheckpointFormatError,
    DamagedCheckpointError,
    DamagedTensorsError,
    OutputError,
    UsageError,
    faults_of,
)
from compat_restore.names import Role, RoleKind, canonical_name, classify, without_model_name
from compat_restore.tensors import DType, TensorSpec, array_bytes, format_shape, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from compat_restore.checkpoint.files import ByteSource
    from compat_restore.checkpoint.hdf5 import Hdf5Dataset
    from compat_restore.checkpoint.writer import Content
    from compat_restore.tensors import Array

__all__ = ["KerasH5Reader", "KerasH5Writer", "check_destination"]

_ZIP = b"PK"
_NO_CHECKSUMS = (
    "HDF5 as Keras writes it has no checksums: a file that was cut short is noticed, changed "
    "values are not"
)
_ATTRIBUTES = ("layer_names", "weight_names", "name", "dtype", "keras_version")
_MODEL_WEIGHTS = "model_weights"
_OPTIMIZER_WEIGHTS = "optimizer_weights"
_TOP_LEVEL = "top_level_model_weights"
_OPTIMIZERS = ("optimizer", "_optimizer", _OPTIMIZER_WEIGHTS)
_METRICS = ("metrics", "_metrics", "_compile_metrics", "compile_metrics")
_SEED = re.compile(r"(?:.*/)?(?:seed_generator(?:_\d+)?/.*|seed_generator_state(?:_\d+)?)")


class KerasH5Reader(CheckpointReader):
    """Reads the weights in a file of Keras."""

    def __init__(self, path: str, notes: Iterable[str] = ()) -> None:
        """Read the tree of a file; values are read when asked for.

        Raises:
            CheckpointNotFoundError: there is no such file.
            CheckpointFormatError: it is no file of Keras that is known here.
            DamagedCheckpointError: it contradicts itself, or leads out of the file.
        """
        self.path = path
        self.notes = tuple(notes)
        self._closed = False
        self._archive: KerasArchive | None = None
        self._source: ByteSource = open_source(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def archive(self) -> KerasArchive | None:
        """The `.keras` archive that holds the weights."""
        return self._archive

    @property
    def source(self) -> ByteSource:
        """The file that was opened."""
        return self._source

    @property
    def hdf5(self) -> Hdf5File:
        """The tree of the HDF5 file."""
        return self._hdf5

    @property
    def image(self) -> tuple[ByteSource, int, int]:
        """(source, first byte, bytes) of the HDF5 file, with its user block."""
        if self._archive is None:
            return self._source, 0, self._source.size
        return self._archive.source, self._archive.start, self._archive.size

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of every tensor by the path of its dataset, sorted."""
        return self._specs

    def variables(self) -> Mapping[str, TensorSpec]:
        """Return the specs by variable name, where the file tells one that is unique."""
        return self._variables

    def key_of(self, name: str) -> str:
        """Return the key of a tensor that is named by its key or by its variable's name."""
        if name in self._specs:
            return name
        try:
            return self._keys[name]
        except KeyError:
            raise self._not_found(name) from None

    def roles(self) -> Mapping[str, Role]:
        """Return what each tensor is for, by its name in `variables`.

        What stands below the optimizer is a slot, a scalar there is bookkeeping; so are metrics and
        the states of seed generators.
        """
        roles = classify(self._variables)
        weights = {name for name, key in self._keys.items() if not _is_below(key, _OPTIMIZERS)}
        flat = {name.replace("/", "_"): name for name in sorted(weights)}
        for name, key in self._keys.items():
            if _is_below(key, _METRICS) or _SEED.fullmatch(name) or _SEED.fullmatch(key):
                roles[name] = Role(RoleKind.BOOKKEEPING)
            elif name not in weights:
                if self._specs[key].shape == ():
                    roles[name] = Role(RoleKind.BOOKKEEPING)
                else:
                    roles[name] = self._slot(name, weights, flat)
        return roles

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Return where a tensor's bytes stand; nothing if they are packed, or not little-endian.

        Raises:
            DamagedCheckpointError: the archive around them does not have its checksum.
        """
        dataset = self._dataset(self.key_of(name))
        self._check_archive()
        if not dataset.is_raw or dataset.place is None:
            return ()
        return (StoredTensor(self.image[0], *dataset.place),)

    def verify(self, names: Iterable[str]) -> None:
        """Check what can be checked: the archive's checksum, and that the values can be read.

        HDF5 as Keras writes it has no checksums of its own.

        Raises:
            DamagedCheckpointError: the archive's checksum is wrong, which no tensor can be told
                from.
            DamagedTensorsError: tensors cannot be read; all of those are listed.
        """
        self._check_archive()
        super().verify(name for name in names if not self.stored(name))

    def files(self) -> tuple[str, ...]:
        """Return the path of the file."""
        return (self.path,)

    def close(self) -> None:
        """Close the file; nothing can be read after it."""
        self._closed = True
        if self._archive is not None:
            self._archive.close()
        self._source.close()

    # -- opening ---------------------------------------------------------------------------------

    def _open(self) -> None:
        source = self._source
        if source.size == 0:
            raise DamagedCheckpointError(f"'{self.path}' is empty: is there another copy?")
        if source.read(0, min(2, source.size)) == _ZIP:
            self._archive = KerasArchive(source)
        else:
            self.has_checksums = False
            self.notes = (*self.notes, _NO_CHECKSUMS)
        source, start, size = self.image
        begin = hdf5_start(source, start, size)
        if begin is None:
            raise CheckpointFormatError(f"'{self.path}' holds no HDF5 file, as Keras writes them")
        self._hdf5 = Hdf5File(
            source, begin, size - (begin - start), name=self.path, wanted=_ATTRIBUTES
        )
        names = self._names()
        self._specs = {
            key: TensorSpec(key, dataset.dtype, dataset.shape, stored_bytes=dataset.nbytes)
            for key, dataset in sorted(self._hdf5.datasets.items())
        }
        self._keys: dict[str, str] = {}
        self._variables = self._by_name(names)

    def _names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of weights by key, best first, where told; note what the file is."""
        groups = self._hdf5.groups
        prefix = next(
            (p for p in (_MODEL_WEIGHTS, "") if "layer_names" in _listed(groups, p)), None
        )
        if prefix is not None:
            self.format = "Keras HDF5, legacy, " + ("whole model" if prefix else "weights")
            return self._legacy_names(prefix)
        told = {
            path.removesuffix("vars").rstrip("/"): attributes["name"][0]
            for path, attributes in groups.items()
            if (path == "vars" or path.endswith("/vars")) and len(attributes.get("name", ())) == 1
        }
        self._model = told.get("", "")
        if self._archive is None and not any(
            path == "vars" or path.endswith("/vars") for path in groups
        ):
            if not self._hdf5.datasets:
                raise CheckpointFormatError(f"'{self.path}' is an HDF5 file without any dataset")
            self.format = "HDF5, not by Keras"
            return {}
        model, keras3 = None, bool(told)
        self.format = "Keras HDF5 weights"
        if self._archive is not None:
            self.format = "Keras archive"
            model = layers_of_config(self._archive.config())
            self._model = self._model or model.name
            keras3 = keras3 or self._archive.keras_version().startswith("3")
        places = {
            path: (dataset.dtype, dataset.shape)
            for path, dataset in self._hdf5.datasets.items()
            if not _is_below(path, (*_OPTIMIZERS, *_METRICS))
        }
        return variable_names(places, told, model, keras3=keras3)

    def _legacy_names(self, prefix: str) -> dict[str, tuple[str, ...]]:
        groups, datasets = self._hdf5.groups, self._hdf5.datasets
        names: dict[str, tuple[str, ...]] = {}
        self._model = ""
        layers = [*_listed(groups, prefix)["layer_names"], _TOP_LEVEL]
        places = [f"{prefix}/{layer}" if prefix else layer for layer in dict.fromkeys(layers)]
        missing = []
        for place in (*places, _OPTIMIZER_WEIGHTS):
            if place not in groups:
                if not place.endswith((_TOP_LEVEL, _OPTIMIZER_WEIGHTS)):
                    missing.append(place)
                continue
            for weight in _listed(groups, place).get("weight_names", ()):
                key = f"{place}/{weight}"
                if key in datasets:
                    names[key] = (canonical_name(weight),)
                else:
                    missing.append(key)
        if missing:
            raise DamagedCheckpointError(
                f"'{self.path}' lists weights that are not in it: "
                + ", ".join(f"'{key}'" for key in missing[:20])
                + ("" if len(missing) <= 20 else f" and {len(missing) - 20} more")
                + "; its writer did not finish, or it was altered"
            )
        return names

    def _by_name(self, names: Mapping[str, tuple[str, ...]]) -> dict[str, TensorSpec]:
        """Return the specs by the best name of each that nothing else has, or else by its key."""
        times: dict[str, int] = {}
        for candidates in names.values():
            for name in candidates:
                times[name] = times.get(name, 0) + 1
        others: dict[str, tuple[str, ...]] = {}
        for key, spec in self._specs.items():
            free = [
                name
                for name in names.get(key, ())
                if name and times[name] == 1 and (name == key or name not in self._specs)
            ]
            name = free[0] if free else key
            self._keys[name] = key
            others[name] = tuple(free[1:])
            if name != key:
                self._specs[key] = spec._replace(full_name=name)
        weights = [name for name, key in self._keys.items() if self._is_named_weight(name, key)]
        if self._model:
            others |= {n: (*others[n], f"{self._model}/{n}") for n in weights}
        elif "legacy" in self.format:
            others |= {n: (short,) for n, short in without_model_name(weights).items()}
        return {
            name: self._specs[key]._replace(name=name, aliases=others[name])
            for name, key in sorted(self._keys.items())
        }

    def _is_named_weight(self, name: str, key: str) -> bool:
        return name != key and not _is_below(key, _OPTIMIZERS)

    # -- reading ---------------------------------------------------------------------------------

    def _dataset(self, key: str) -> Hdf5Dataset:
        if self._closed:
            raise UsageError(
                f"checkpoint '{self.path}' is closed: read before the `with` statement ends"
            )
        return self._hdf5.datasets[key]

    def _read(self, key: str) -> Array:
        dataset = self._dataset(key)
        self._check_archive()
        return self._hdf5.values(dataset.path)

    def _check_archive(self) -> None:
        """Check the weights as a whole, once, before any of them is given out."""
        if self._archive is not None:
            self._archive.check()

    def _slot(self, name: str, weights: set[str], flat: Mapping[str, str]) -> Role:
        """Return the role of an optimizer's variable, with its owner where the name tells it.

        The names met: `Adam/m/conv1/kernel` (tf_keras), `Adam/conv1/kernel/m` and, in scopes,
        `training/Adam/conv1/kernel/m` (before), `adam/seq_conv1_kernel_momentum` (Keras 3).
        """
        shape = self._variables[name].shape
        parts = name.split("/")
        found: list[tuple[str, str]] = []
        for begin in range(1, min(len(parts), 4)):
            found.append(("/".join(parts[begin:]), parts[begin - 1]))
            found.append(("/".join(parts[begin:-1]), parts[-1]))
        last = parts[-1]
        found += [
            (flat.get(last[:at], ""), last[at + 1 :])
            for at, letter in enumerate(last)
            if letter == "_"
        ]
        for owner, slot in found:
            if owner in weights and self._variables[owner].shape == shape:
                return Role(RoleKind.SLOT, owner, slot)
        return Role(RoleKind.SLOT)


def _is_below(key: str, tops: tuple[str, ...]) -> bool:
    return key.partition("/")[0] in tops


def _listed(
    groups: Mapping[str, Mapping[str, tuple[str, ...]]], path: str
) -> dict[str, tuple[str, ...]]:
    """Return the lists of names at a group; long ones stand in pieces, `weight_names0` and on."""
    attributes = groups.get(path, {})
    found = {}
    for name in ("layer_names", "weight_names"):
        if name in attributes:
            found[name] = attributes[name]
        elif f"{name}0" in attributes:
            pieces: list[str] = []
            number = 0
            while f"{name}{number}" in attributes:
                pieces += attributes[f"{name}{number}"]
                number += 1
            found[name] = tuple(pieces)
    return found


def check_destination(path: str, *, overwrite: bool) -> tuple[str, ...]:
    """Return the file that stands under the name of a new one, if there is one.

    Raises:
        OutputError: there is one and `overwrite` is not set, or no file can have this name.
    """
    return check_place(path, the_file_itself, overwrite=overwrite, example="model.weights.h5")


class KerasH5Writer(CheckpointWriter):
    """Fills a template: a copy of a file of Keras, in which datasets are set.

    Everything else in the file stays as it is, so that Keras reads the one as it reads the other.
    """

    fills_template = True

    def __init__(self, path: str, template: KerasH5Reader, *, overwrite: bool = False) -> None:
        """Begin a file; its directory is made if it is missing.

        Args:
            path: what it will be called: `.keras` if the template is such an archive.
            template: a file of the freshly made model. It is read again while writing.
            overwrite: replace a file that is there.

        Raises:
            OutputError: there is a file already and `overwrite` is not set, or the place cannot be
                written to.
            UsageError: the name is not that of such a file, or it is the template itself.
        """
        self.path = path
        self.format = template.format
        self._template = template
        self._written: KerasH5Reader | None = None
        self._replace = bool(check_destination(path, overwrite=overwrite))
        if path.endswith(".keras") != (template.archive is not None):
            kind = "a .keras archive" if template.archive else "an HDF5 file"
            raise UsageError(
                f"'{path}': the template '{template.path}' is {kind}, and so is what is made of "
                "it; choose a name with the same ending"
            )
        if self._replace and identity(path) == identity(template.path):
            raise UsageError(
                f"'{path}' is read from: an input is never written to; choose another name"
            )
        self._folder = split(absolute(path))[0]
        self._output = create_output(path)
        self._archive: ArchiveOutput | None = None

    def write(self, contents: Sequence[Content], *, verify: bool = True) -> None:
        """Copy the template, and set tensors in it, each of the template's dtype and shape.

        Args:
            contents: what changes.
            verify: check copied bytes against the checksums that are stored for them. The
                checksum of an archive that is the template is compared in any case.

        Raises:
            DamagedCheckpointError: the template does not have its checksum, or contradicts itself.
            DamagedTensorsError: tensors are not what was written; all of them are listed.
            OutputError: the disk does not take it.
            UsageError: the template has no place for a tensor; all such are listed.
        """
        self._check(contents)
        source, begin, size = self._template.image
        copied: list[tuple[Hdf5Dataset, Content]] = []
        decoded: list[tuple[Hdf5Dataset, Content]] = []
        for content in contents:
            dataset = self._template.hdf5.datasets[content.name]
            (copied if content.stored and dataset.is_raw else decoded).append((dataset, content))
        shift = -begin
        if self._template.archive is not None:
            self._archive = ArchiveOutput(self._template.archive, self._output)
            shift += self._archive.start
            pieces = []
        else:
            self._output.reserve(size)
            pieces = self._around(source, begin, size, [dataset for dataset, _ in copied])
        pieces += [
            Copy(content.name, content.stored, dataset.place[0] + shift)
            for dataset, content in copied
            if dataset.place
        ]
        pieces.sort(key=lambda piece: piece.offset)
        faults: list[str] = []
        try:
            copy_tensors(pieces, self._output, verify=verify, checksums=False)
        except DamagedTensorsError as error:
            faults += error.faults
        for dataset, content in decoded:
            assert dataset.place is not None
            try:
                self._set(dataset, dataset.place[0] + shift, content)
            except DamagedCheckpointError as error:
                faults += faults_of(error)
        if faults:
            raise DamagedTensorsError(faults)
        if self._archive is not None:
            self._archive.finish()
        self._written = KerasH5Reader(self._output.working_path)
        if {k: (s.dtype, s.shape) for k, s in self._written.specs().items()} != {
            k: (s.dtype, s.shape) for k, s in self._template.specs().items()
        }:
            raise DamagedCheckpointError(
                f"'{self._template.path}' is damaged: its datasets share bytes with their "
                "descriptions; make a fresh template"
            )

    def read_back(self, name: str) -> Array:
        """Return what was written of a tensor, read from the file before it is put in place."""
        assert self._written is not None
        return self._written.read(name)

    def finish(self) -> None:
        """Put the file in place; its rename is the moment."""
        if self._written is None:
            self.write(())
        self._output.place(replace=self._replace)
        try:
            sync_directory(self._folder)
        except OSError as error:
            raise OutputError(
                f"'{self.path}' is written, but it is not sure that it would survive a power cut "
                f"({error.strerror or error})"
            ) from error

    def close(self) -> None:
        """Remove what was written; after `finish` there is nothing to remove."""
        if self._written is not None:
            self._written.close()
        if self._archive is not None:
            self._archive.close()
        self._output.close()

    def _set(self, dataset: Hdf5Dataset, at: int, content: Content) -> None:
        """Write the values of a tensor to their place in the output."""
        array = content.read().astype(numpy_dtype(content.dtype), copy=False)
        if array.shape != content.shape:
            raise UsageError(
                f"tensor '{content.name}' has shape {format_shape(array.shape)}, not "
                f"{format_shape(content.shape)}"
            )
        if dataset.big_endian:
            array = array.byteswap()
        for data in array_bytes(array):
            self._output.write_at(at, data)
            at += len(data)

    def _check(self, contents: Sequence[Content]) -> None:
        """Check that the template has a place for everything.

        Raises:
            UsageError: it has not; all that is amiss is listed.
        """
        faults = []
        names: set[str] = set()
        for content in contents:
            name = content.name
            dataset = self._template.hdf5.datasets.get(name)
            given = f"{content.dtype}{format_shape(content.shape)}"
            if name in names:
                faults.append(f"tensor '{name}' is given twice")
            elif dataset is None:
                faults.append(f"tensor '{name}' has no place in the template")
            elif (dataset.dtype, dataset.shape) != (content.dtype, content.shape):
                faults.append(
                    f"tensor '{name}' is {given}, the template has "
                    f"{dataset.dtype}{format_shape(dataset.shape)}"
                )
            elif dataset.place is None or dataset.dtype is DType.string:
                faults.append(
                    f"tensor '{name}' stands in the template as strings, in chunks or without "
                    "values, which cannot be set; make the template with Keras"
                )
            elif content.slices:
                faults.append(f"tensor '{name}' is partitioned; a Keras file has whole tensors")
            elif content.stored and sum(s.size for s in content.stored) != dataset.nbytes:
                faults.append(f"tensor '{name}' takes {dataset.nbytes} bytes, and others are given")
            names.add(name)
        if faults:
            raise UsageError(
                f"'{self.path}' cannot be made of the template '{self._template.path}':"
                + "".join(f"\n  - {fault}" for fault in faults[:50])
                + (f"\n  ... and {len(faults) - 50} more" if len(faults) > 50 else "")
            )

    @staticmethod
    def _around(
        source: ByteSource, begin: int, size: int, left_out: Sequence[Hdf5Dataset]
    ) -> list[Copy]:
        """Return the copies of a file without the places of some of its datasets."""
        places = sorted(dataset.place for dataset in left_out if dataset.place)
        copies = []
        for place in (*places, (begin + size, 0)):
            if place[0] > begin:
                piece = StoredTensor(source, begin, place[0] - begin)
                copies.append(Copy("the template", (piece,), begin))
            begin = max(begin, sum(place))
        return copies
