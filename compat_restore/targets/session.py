"""The TF1 target: the variables of a graph, in a session.

Nothing here adds an op to the graph, so that finalised graphs work and a large graph stays as
large as it was. Three things that TensorFlow's own functions build ops for are done without:

- A variable is set by running its own initialiser with the initial-value tensor fed.
- Whether a *resource* variable is set is told by the `VarIsInitializedOp` that it was made with.
- Whether a *ref* variable is set is told by the trace of a run of its op: a variable op that holds
  no buffer leaves no `allocation_description` there. That is the very test (`IsInitialized`) that
  `IsVariableInitialized` makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from compat_restore.errors import InitializationError, TargetError
from compat_restore.names import canonical_name
from compat_restore.tensors import Slice, TensorSpec, dtype_of, element_count, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from compat_restore.tensors import Array

__all__ = [
    "Initialization",
    "Session",
    "SessionTarget",
    "all_variables",
    "initialize_uninitialized",
    "uninitialized_variables",
    "variable_name",
    "variable_spec",
]

_VARIABLE_OPS = ("Variable", "VariableV2", "VarHandleOp", "AutoReloadVariable")
_ASSIGN_OPS = ("Assign", "AssignVariableOp")
# Values read back at a time: what `read` holds beside the variables themselves.
_READ_BATCH_BYTES = 256 << 20


class _Tensor(Protocol):
    """A `tf.Tensor` of a graph, as far as it is used here."""

    name: str
    op: _Operation

    def consumers(self) -> Sequence[_Operation]: ...


class _Operation(Protocol):
    """A `tf.Operation`, as far as it is used here."""

    name: str
    type: str
    inputs: Sequence[_Tensor]
    outputs: Sequence[_Tensor]
    control_inputs: Sequence[_Operation]


class _Graph(Protocol):
    """A `tf.Graph`, as far as it is used here."""

    def get_collection(self, name: str) -> list[_Variable]: ...

    def is_feedable(self, tensor: _Tensor) -> bool: ...

    def as_graph_element(self, obj: object) -> _Tensor: ...


class _Variable(Protocol):
    """A `tf.Variable` of a graph, as far as it is used here."""

    op: _Operation
    initializer: _Operation | None
    shape: object
    dtype: object


class Session(Protocol):
    """A `tf.compat.v1.Session`, or whatever has its `graph` and `run`."""

    @property
    def graph(self) -> _Graph:
        """The graph that the session runs."""
        ...

    @property
    def run(self) -> Callable[..., Any]:
        """Run fetches with feeds."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """One graph variable: a whole variable, or a part of a partitioned one."""

    variable: _Variable
    slice: Slice | None = None


@dataclass(slots=True)
class _Run:
    """Initialisers to run together, and the values to feed, by the name of the fed tensor."""

    initializers: list[_Operation] = field(default_factory=list)
    feeds: dict[str, tuple[_Tensor, Array]] = field(default_factory=dict)


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
        if not hasattr(session, "graph") or not hasattr(session, "run"):
            raise TargetError(
                f"a tf.compat.v1.Session is expected, not {type(session).__name__}; models and "
                "other objects are restored with restore_objects(target, checkpoint, ...)"
            )
        self._session = session
        self._graph = session.graph
        chosen = self._graph.get_collection("variables") if variables is None else variables
        self._parts: dict[str, list[_Part]] = {}
        self._specs: dict[str, TensorSpec] = {}
        for variable in _flattened(chosen):
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

    def graph_variables(self) -> tuple[_Variable, ...]:
        """Return the graph's variables, the parts of partitioned ones among them."""
        return tuple(part.variable for parts in self._parts.values() for part in parts)

    def variables_of(self, name: str) -> tuple[_Variable, ...]:
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

    def _add(self, variable: _Variable) -> None:
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

    def _feedable(self, name: str, variable: _Variable) -> tuple[_Operation, _Tensor]:
        """Return a variable's initialiser, and its initial-value tensor."""
        initializer = variable.initializer
        if initializer is None:
            raise TargetError(
                f"variable '{name}' has no initialiser, which is what sets it; was the graph "
                "imported without its variables' definitions?"
            )
        if initializer.type not in _ASSIGN_OPS:
            raise TargetError(
                f"variable '{name}': its initialiser '{initializer.name}' is a {initializer.type} "
                f"op, where one of {', '.join(_ASSIGN_OPS)} is expected"
            )
        tensor = initializer.inputs[1]
        if not self._graph.is_feedable(tensor):
            raise TargetError(f"variable '{name}': its initial value '{tensor.name}' cannot be fed")
        return initializer, tensor


def uninitialized_variables(
    session: Session, variables: Iterable[object] | None = None
) -> tuple[str, ...]:
    """Return the names of the variables that nothing has set yet, in one run.

    Args:
        session: the session; no op is added to its graph.
        variables: which variables; the graph's global and local ones if None.

    Returns:
        Names as the graph has them, without ":0"; the parts of a partitioned variable one by one.
    """
    return tuple(variable_name(variable) for variable in _unset(session, variables))


def initialize_uninitialized(
    session: Session, variables: Iterable[object] | None = None
) -> tuple[str, ...]:
    """Initialise the variables that nothing has set yet, and no other.

    An initialiser that reads other variables runs after those have been set.

    Args:
        session: the session; no op is added to its graph.
        variables: which variables; the graph's global and local ones if None.

    Returns:
        The names of the variables that were initialised, as `uninitialized_variables` gives them.

    Raises:
        InitializationError: a variable has no initialiser, initialisers read each other in a
            circle, one would set a variable that is set already, or one fails; then some of the
            variables may have been initialised.
    """
    return Initialization(session, variables).run()


class Initialization:
    """What is not set in a session, found in one run, and the order in which to initialise it."""

    def __init__(
        self,
        session: Session,
        variables: Iterable[object] | None = None,
        *,
        restored: Iterable[object] = (),
    ) -> None:
        """Find what is not set, and check that it can be initialised.

        Args:
            session: the session.
            variables: which variables; the graph's global and local ones if None.
            restored: variables that will be set otherwise before `run`.

        Raises:
            InitializationError: as `initialize_uninitialized`, for what shows in the graph.
        """
        self._session = session
        others = {id(variable) for variable in restored}
        self.unset = [v for v in _unset(session, variables) if id(v) not in others]
        for variable in self.unset:
            if variable.initializer is None:
                raise InitializationError(
                    f"variable '{variable_name(variable)}' is not set, and has no initialiser"
                )
        _check_initializers(self.unset)
        self._levels = _levels(self.unset)

    def run(self) -> tuple[str, ...]:
        """Initialise; return the names of the variables.

        Raises:
            InitializationError: an initialiser fails.
        """
        for level in self._levels:
            try:
                self._session.run([variable.initializer for variable in level])
            except Exception as error:
                if not _is_tensorflow_error(error):
                    raise
                names = ", ".join(f"'{variable_name(variable)}'" for variable in level[:5])
                raise InitializationError(
                    f"initialising {names}{' ...' if len(level) > 5 else ''} failed: "
                    f"{_reason(error)}{_gist(error)}"
                ) from error
        return tuple(variable_name(variable) for variable in self.unset)


def _is_tensorflow_error(error: Exception) -> bool:
    """Whether an error is TensorFlow's own, which cannot be named without importing it."""
    return any(cls.__name__ == "OpError" for cls in type(error).__mro__)


def _reason(error: Exception) -> str:
    if type(error).__name__ != "FailedPreconditionError":
        return ""
    return (
        "an initialiser reads something that is not initialised (a variable outside of those "
        "chosen, or a table): "
    )


def all_variables(session: Session) -> list[_Variable]:
    """Return the global and the local variables of a session's graph."""
    graph = session.graph
    return [*graph.get_collection("variables"), *graph.get_collection("local_variables")]


def variable_name(variable: _Variable) -> str:
    """Return the name that a graph's variable has in checkpoints: that of its op."""
    return canonical_name(str(variable.op.name))


def variable_spec(variable: _Variable) -> TensorSpec:
    """Return the spec of one of a graph's variables, a part for itself."""
    return TensorSpec(variable_name(variable), dtype_of(variable.dtype), _declared_shape(variable))


def _unset(session: Session, variables: Iterable[object] | None) -> list[_Variable]:
    """Return the variables that nothing has set."""
    candidates = _flattened(all_variables(session) if variables is None else variables)
    resource = [v for v in candidates if v.op.type == "VarHandleOp"]
    queries = {id(v): query for v in resource if (query := _is_set_query(v)) is not None}
    asked = [v for v in resource if id(v) in queries]
    refs = [v for v in candidates if v.op.type in _VARIABLE_OPS and v.op.type != "VarHandleOp"]
    is_set = _ask(session, asked, [queries[id(v)] for v in asked], refs)
    for variable in candidates:
        if id(variable) not in is_set:
            is_set[id(variable)] = _can_be_read(session, variable)
    return [variable for variable in candidates if not is_set[id(variable)]]


def _is_set_query(variable: _Variable) -> _Tensor | None:
    """Return the tensor that tells whether a resource variable is set, made along with it."""
    for consumer in variable.op.outputs[0].consumers():
        if consumer.type == "VarIsInitializedOp":
            return consumer.outputs[0]
    return None


def _ask(
    session: Session,
    resource: Sequence[_Variable],
    queries: Sequence[_Tensor],
    refs: Sequence[_Variable],
) -> dict[int, bool]:
    """Return by `id` whether variables are set, in one run."""
    if not resource and not refs:
        return {}
    if not refs:
        answers = session.run(list(queries))
        return {id(v): bool(answer) for v, answer in zip(resource, answers, strict=True)}
    import tensorflow as tf

    v1 = tf.compat.v1
    metadata = v1.RunMetadata()
    options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE)
    fetches = [list(queries), [v.op for v in refs]]
    answers, _ = session.run(fetches, options=options, run_metadata=metadata)
    is_set = {id(v): bool(answer) for v, answer in zip(resource, answers, strict=True)}
    traced = _buffers(metadata.step_stats)
    if traced is not None:
        is_set |= {id(v): traced.get(v.op.name, False) for v in refs}
    return is_set


def _buffers(step_stats: object) -> dict[str, bool] | None:
    """Return by op name whether its output holds a buffer; None where nothing was traced.

    An op whose output was never set leaves no output in the trace, or one without an allocation;
    an output of no elements never has one, and counts as set (as it does for TensorFlow).
    """
    devices = getattr(step_stats, "dev_stats", ())
    found: dict[str, bool] = {}
    for device in devices:
        for node in device.node_stats:
            for output in node.output:
                tensor = output.tensor_description
                empty = any(dim.size == 0 for dim in tensor.shape.dim)
                found[node.node_name] = empty or tensor.HasField("allocation_description")
    return found if len(devices) else None


def _can_be_read(session: Session, variable: _Variable) -> bool:
    """Whether a variable can be read, for one that nothing else tells of: one run."""
    try:
        session.run(session.graph.as_graph_element(variable).op)
    except Exception as error:  # TensorFlow's class cannot be named without importing it
        if type(error).__name__ in ("FailedPreconditionError", "NotFoundError"):
            return False
        raise
    return True


def _levels(variables: Sequence[_Variable]) -> list[list[_Variable]]:
    """Return the variables in groups: the initialisers of one read only variables of earlier ones.

    Raises:
        InitializationError: initialisers read each other in a circle.
    """
    by_op = {variable.op.name: variable for variable in variables}
    reads = {name: _reads(variable) & by_op.keys() - {name} for name, variable in by_op.items()}
    levels = []
    waiting = dict(reads)
    while waiting:
        ready = [name for name, needed in waiting.items() if not needed & waiting.keys()]
        if not ready:
            circle = _circle(waiting)
            raise InitializationError(
                "initialisers read each other in a circle: "
                + " reads ".join(f"'{n}'" for n in circle)
            )
        levels.append([by_op[name] for name in ready])
        for name in ready:
            del waiting[name]
    return levels


def _reads(variable: _Variable) -> set[str]:
    """Return the names of the variable ops from which a variable's initial value is computed."""
    return {op.name for op in _run_first(variable) if op.type in _VARIABLE_OPS}


def _run_first(variable: _Variable) -> list[_Operation]:
    """Return the ops that run before a variable's initialiser does, its own variable op aside."""
    initializer = variable.initializer
    if initializer is None or len(initializer.inputs) < 2:
        return []
    found: dict[str, _Operation] = {}
    waiting = [initializer.inputs[1].op, *initializer.control_inputs]
    while waiting:
        op = waiting.pop()
        if op.name in found:
            continue
        found[op.name] = op
        if op.type not in _VARIABLE_OPS:
            waiting += [tensor.op for tensor in op.inputs]
            waiting += op.control_inputs
    return list(found.values())


def _check_initializers(unset: Sequence[_Variable]) -> None:
    """Raise for an initialiser that needs a feed, or would set a variable that is set already.

    Raises:
        InitializationError: it could not run, or would undo what was restored.
    """
    free = {variable.op.name for variable in unset}
    for variable in unset:
        for op in _run_first(variable):
            if op.type == "Placeholder":
                raise InitializationError(
                    f"the initialiser of '{variable_name(variable)}' needs the placeholder "
                    f"'{op.name}' to be fed; run it yourself first, with its feed"
                )
            if op.type not in _ASSIGN_OPS or not op.inputs:
                continue
            assigned = op.inputs[0].op
            if assigned.type in _VARIABLE_OPS and assigned.name not in free:
                raise InitializationError(
                    f"the initialiser of '{variable_name(variable)}' runs '{op.name}' first, which "
                    f"would set '{canonical_name(assigned.name)}' anew, and that is set already; "
                    f"set '{variable_name(variable)}' yourself, or restore it too"
                )


def _circle(reads: Mapping[str, set[str]]) -> list[str]:
    """Return names of which each reads the next, the first again at the end."""
    name = next(iter(reads))
    path = [name]
    while True:
        name = min(reads[name] & reads.keys())
        if name in path:
            return [*path[path.index(name) :], name]
        path.append(name)


def _flattened(variables: Iterable[object]) -> list[_Variable]:
    """Return variables without repetition, partitioned ones as their parts.

    Raises:
        TargetError: something is no variable of a graph.
    """
    if hasattr(variables, "initializer"):
        raise TargetError("a single variable: pass a list, variables=[...]")
    found: dict[int, _Variable] = {}
    for variable in variables:
        members = [variable]
        if type(variable).__name__ == "PartitionedVariable":
            members = list(variable)  # type: ignore[call-overload]
        for member in members:
            if not hasattr(member, "op") or not hasattr(member, "initializer"):
                raise TargetError(
                    f"{member!r} is no variable of a graph; pass tf.compat.v1 variables, or none "
                    "for all global variables of the graph"
                )
            found.setdefault(id(member), cast("_Variable", member))
    return list(found.values())


def _declared_shape(variable: _Variable) -> tuple[int | None, ...] | None:
    shape = variable.shape
    if getattr(shape, "rank", 0) is None:
        return None
    return tuple(shape.as_list())  # type: ignore[attr-defined]  # tf.TensorShape


def _where(part: Slice) -> tuple[slice, ...]:
    return tuple(
        slice(start, start + (length or 0))
        for start, length in zip(part.starts, part.lengths, strict=True)
    )


def _cut(value: Array, part: Slice) -> Array:
    return value[_where(part)]


def _as_tensorflow(value: Array, variable: _Variable) -> Array:
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


def _gist(error: Exception) -> str:
    """Return the line of a TensorFlow error that says what is wrong, not where."""
    lines = [line.strip() for line in str(getattr(error, "message", error)).splitlines()]
    told = [line for line in lines if "nitialized" in line]
    # "Graph execution error:" and the stack come first, what is wrong just before the node.
    said = [line for line in lines if line and not line.startswith(("[[", "Original stack"))]
    if not told and said[:1] == ["Graph execution error:"]:
        before = [n for n, line in enumerate(lines) if line.startswith("[[")]
        told = [line for line in lines[: before[0]] if line][-1:] if before else said[-1:]
    return (told or said or [type(error).__name__])[0]
