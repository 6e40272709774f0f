"""The TF1 target: the variables of a graph, in a session.

A variable is set by running its own initialiser with the initial-value tensor fed, so that no op is
added to the graph: finalised graphs work, and no restore makes the next one slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compat_restore.errors import TargetError
from compat_restore.targets.graph import (
    ASSIGN_OPS,
    Operation,
    Session,
    Tensor,
    Variable,
    flattened,
    is_session,
    variable_spec,
)
from compat_restore.tensors import Slice, TensorSpec, dtype_of, element_count, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from compat_restore.tensors import Array

__all__ = ["SessionTarget"]

# Values read back at a time: what `read` holds beside the variables themselves.
_READ_BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """One graph variable: a whole variable, or a part of a partitioned one."""

    variable: Variable
    slice: Slice | None = None


@dataclass(slots=True)
class _Run:
    """Initialisers to run together, and the values to feed, by the name of the fed tensor."""

    initializers: list[Operation] = field(default_factory=list)
    feeds: dict[str, tuple[Tensor, Array]] = field(default_factory=dict)


class SessionTarget:
    """The variables of a session's graph, by their names in checkpoints.

    The parts of a partitioned variable are one variable under its full name.
    """

    kind = "session"
    collects = True

    def __init__(self, session: Session, variables: Iterable[object] | None = None) -> None:
        """Describe the variables.

        Args:
            session: the session; its graph may be finalised.
            variables: which variables; the graph's global variables if None.

        Raises:
            TargetError: something is no variable, or two share a name.
        """
        if not is_session(session):
            raise TargetError(
                f"a tf.compat.v1.Session is expected, not {type(session).__name__}; models and "
                "other objects are restored with restore_objects(target, checkpoint, ...)"
            )
        self._session = session
        self._graph = session.graph
        chosen = self._graph.get_collection("variables") if variables is None else variables
        self._parts: dict[str, list[_Part]] = {}
        self._specs: dict[str, TensorSpec] = {}
        for variable in flattened(chosen):
            self._add(variable)
        for name, parts in self._parts.items():
            if len(parts) > 1 and any(part.slice is None for part in parts):
                raise TargetError(
                    f"variable '{name}': {len(parts)} variables of the graph share this name, and "
                    "they are no parts of one; choose one with variables=[...]"
                )
            self._check_whole(name)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of each variable by its name in checkpoints."""
        return self._specs

    def assign(self, values: Iterable[tuple[str, Array]]) -> None:
        """Set variables by running their initialisers, fed with the values: one run for all.

        Variables that share one initial-value tensor are set in further runs, since a tensor can
        be fed with one value alone.

        Raises:
            TargetError: a variable has no initialiser that could be fed.
        """
        runs: list[_Run] = []
        for name, value in values:
            for part in self._parts[name]:
                initializer, tensor = self._feedable(name, part.variable)
                fed = value if part.slice is None else _cut(value, part.slice)
                fed = _as_tensorflow(fed, part.variable)
                run = next((run for run in runs if tensor.name not in run.feeds), None)
                if run is None:
                    run = _Run()
                    runs.append(run)
                run.initializers.append(initializer)
                run.feeds[tensor.name] = tensor, fed
        for run in runs:
            self._session.run(run.initializers, feed_dict=dict(run.feeds.values()))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Array]]:
        """Yield (name, value); the parts of partitioned variables are joined."""
        batch: list[str] = []
        size = 0
        for name in names:
            batch.append(name)
            size += self._specs[name].nbytes
            if size >= _READ_BATCH_BYTES:
                yield from self._read_batch(batch)
                batch, size = [], 0
        if batch:
            yield from self._read_batch(batch)

    def graph_variables(self) -> tuple[Variable, ...]:
        """Return the graph's variables, the parts of partitioned ones among them."""
        return tuple(part.variable for parts in self._parts.values() for part in parts)

    def variables_of(self, name: str) -> tuple[Variable, ...]:
        """Return the graph's variables that make up a variable: one, or its parts."""
        return tuple(part.variable for part in self._parts[name])

    def _read_batch(self, names: Sequence[str]) -> Iterator[tuple[str, Array]]:
        import numpy as np

        parts = [part for name in names for part in self._parts[name]]
        fetched = iter(self._session.run([part.variable for part in parts]))
        for name in names:
            spec = self._specs[name]
            kind = numpy_dtype(spec.dtype)
            pieces = [(part, _from_tensorflow(next(fetched), kind)) for part in self._parts[name]]
            if len(pieces) == 1 and pieces[0][0].slice is None:
                yield name, pieces[0][1]
                continue
            full = np.empty(spec.known_shape, kind)
            for part, piece in pieces:
                assert part.slice is not None  # __init__ has checked it
                full[_where(part.slice)] = piece
            yield name, full

    def _add(self, variable: Variable) -> None:
        info = getattr(variable, "_save_slice_info", None)
        dtype = dtype_of(variable.dtype)
        if info is None:
            spec = variable_spec(variable)
            self._parts.setdefault(spec.name, []).append(_Part(variable))
            self._specs[spec.name] = spec
            return
        name = str(info.full_name)
        part = Slice(
            tuple(int(start) for start in info.var_offset),
            tuple(int(length) for length in info.var_shape),
        )
        shape = tuple(int(dim) for dim in info.full_shape)
        self._parts.setdefault(name, []).append(_Part(variable, part))
        known = self._specs.get(name)
        slices = (*known.slices, part) if known else (part,)
        self._specs[name] = TensorSpec(name, dtype, shape, slices)

    def _check_whole(self, name: str) -> None:
        """Raise if parts of a partitioned variable are left out: its values could not be told."""
        spec = self._specs[name]
        if not spec.slices:
            return
        covered = sum(element_count(piece.resolve(spec.known_shape)[1]) for piece in spec.slices)
        if covered != element_count(spec.known_shape):
            raise TargetError(
                f"variable '{name}' is partitioned, and only {len(spec.slices)} of its parts are "
                f"among the variables, {covered} of {element_count(spec.known_shape)} elements; "
                "pass all of its parts, or the partitioned variable itself"
            )

    def _feedable(self, name: str, variable: Variable) -> tuple[Operation, Tensor]:
        """Return a variable's initialiser, and its initial-value tensor."""
        initializer = variable.initializer
        if initializer is None:
            raise TargetError(
                f"variable '{name}' has no initialiser, which is what sets it; was the graph "
                "imported without its variables' definitions?"
            )
        if initializer.type not in ASSIGN_OPS:
            raise TargetError(
                f"variable '{name}': its initialiser '{initializer.name}' is a {initializer.type} "
                f"op, where one of {', '.join(ASSIGN_OPS)} is expected"
            )
        tensor = initializer.inputs[1]
        if not self._graph.is_feedable(tensor):
            raise TargetError(f"variable '{name}': its initial value '{tensor.name}' cannot be fed")
        return initializer, tensor


def _where(part: Slice) -> tuple[slice, ...]:
    return tuple(
        slice(start, start + (length or 0))
        for start, length in zip(part.starts, part.lengths, strict=True)
    )


def _cut(value: Array, part: Slice) -> Array:
    return value[_where(part)]


def _as_tensorflow(value: Array, variable: Variable) -> Array:
    """Return values in the NumPy type by which TensorFlow knows the variable's dtype.

    The array is private memory that nobody writes to afterwards: a fed array may become a
    resource variable's own buffer.
    """
    import numpy as np

    wanted = getattr(variable.dtype, "as_numpy_dtype", None)
    if wanted is not None and np.dtype(wanted).fields:  # a quantised type is a structured one
        return np.ascontiguousarray(value).view(wanted)
    return value


def _from_tensorflow(value: object, kind: object) -> Array:
    import numpy as np

    array = np.asarray(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)
    if array.dtype.fields:
        array = array.view(np.dtype(kind))  # type: ignore[call-overload]
    return array
