"""What is not set in a TF1 session, and initialising only that.

Nothing here adds an op to the graph, as TensorFlow's own functions do:

- Whether a *resource* variable is set is told by the `VarIsInitializedOp` that it was made with.
- Whether a *ref* variable is set is told by the trace of a run of its op: a variable op that holds
  no buffer leaves no `allocation_description` there. That is the very test (`IsInitialized`) that
  `IsVariableInitialized` makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compat_restore.errors import InitializationError
from compat_restore.names import canonical_name
from compat_restore.targets.graph import (
    ASSIGN_OPS,
    VARIABLE_OPS,
    Operation,
    Session,
    Tensor,
    Variable,
    all_variables,
    flattened,
    variable_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Initialization", "initialize_uninitialized", "uninitialized_variables"]


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


def _unset(session: Session, variables: Iterable[object] | None) -> list[Variable]:
    """Return the variables that nothing has set."""
    candidates = flattened(all_variables(session) if variables is None else variables)
    resource = [v for v in candidates if v.op.type == "VarHandleOp"]
    queries = {id(v): query for v in resource if (query := _is_set_query(v)) is not None}
    asked = [v for v in resource if id(v) in queries]
    refs = [v for v in candidates if v.op.type in VARIABLE_OPS and v.op.type != "VarHandleOp"]
    is_set = _ask(session, asked, [queries[id(v)] for v in asked], refs)
    for variable in candidates:
        if id(variable) not in is_set:
            is_set[id(variable)] = _can_be_read(session, variable)
    return [variable for variable in candidates if not is_set[id(variable)]]


def _is_set_query(variable: Variable) -> Tensor | None:
    """Return the tensor that tells whether a resource variable is set, made along with it."""
    for consumer in variable.op.outputs[0].consumers():
        if consumer.type == "VarIsInitializedOp":
            return consumer.outputs[0]
    return None


def _ask(
    session: Session,
    resource: Sequence[Variable],
    queries: Sequence[Tensor],
    refs: Sequence[Variable],
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


def _can_be_read(session: Session, variable: Variable) -> bool:
    """Whether a variable can be read, for one that nothing else tells of: one run."""
    try:
        session.run(session.graph.as_graph_element(variable).op)
    except Exception as error:  # TensorFlow's class cannot be named without importing it
        if type(error).__name__ in ("FailedPreconditionError", "NotFoundError"):
            return False
        raise
    return True


def _levels(variables: Sequence[Variable]) -> list[list[Variable]]:
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


def _reads(variable: Variable) -> set[str]:
    """Return the names of the variable ops from which a variable's initial value is computed."""
    return {op.name for op in _run_first(variable) if op.type in VARIABLE_OPS}


def _run_first(variable: Variable) -> list[Operation]:
    """Return the ops that run before a variable's initialiser does, its own variable op aside."""
    initializer = variable.initializer
    if initializer is None or len(initializer.inputs) < 2:
        return []
    found: dict[str, Operation] = {}
    waiting = [initializer.inputs[1].op, *initializer.control_inputs]
    while waiting:
        op = waiting.pop()
        if op.name in found:
            continue
        found[op.name] = op
        if op.type not in VARIABLE_OPS:
            waiting += [tensor.op for tensor in op.inputs]
            waiting += op.control_inputs
    return list(found.values())


def _check_initializers(unset: Sequence[Variable]) -> None:
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
            if op.type not in ASSIGN_OPS or not op.inputs:
                continue
            assigned = op.inputs[0].op
            if assigned.type in VARIABLE_OPS and assigned.name not in free:
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
