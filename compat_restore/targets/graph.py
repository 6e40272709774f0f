"""A TF1 graph and its variables, as far as they are used here.

TensorFlow is not imported: who has a session has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

from compat_restore.errors import TargetError
from compat_restore.names import canonical_name
from compat_restore.tensors import TensorSpec, dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "ASSIGN_OPS",
    "VARIABLE_OPS",
    "Graph",
    "Operation",
    "Session",
    "Tensor",
    "Variable",
    "all_variables",
    "flattened",
    "is_session",
    "variable_name",
    "variable_spec",
]

VARIABLE_OPS = ("Variable", "VariableV2", "VarHandleOp", "AutoReloadVariable")
ASSIGN_OPS = ("Assign", "AssignVariableOp")


class Tensor(Protocol):
    """A `tf.Tensor` of a graph, as far as it is used here."""

    name: str
    op: Operation

    def consumers(self) -> Sequence[Operation]:
        """Return the ops that take this tensor."""
        ...


class Operation(Protocol):
    """A `tf.Operation`, as far as it is used here."""

    name: str
    type: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    control_inputs: Sequence[Operation]


class Graph(Protocol):
    """A `tf.Graph`, as far as it is used here."""

    def get_collection(self, name: str) -> list[Variable]:
        """Return what is collected under a name."""
        ...

    def is_feedable(self, tensor: Tensor) -> bool:
        """Return whether a value may be fed in place of a tensor."""
        ...

    def as_graph_element(self, obj: object) -> Tensor:
        """Return the tensor that stands for a variable when it is fetched."""
        ...


class Variable(Protocol):
    """A `tf.Variable` of a graph, as far as it is used here."""

    op: Operation
    initializer: Operation | None
    shape: object
    dtype: object


class Session(Protocol):
    """A `tf.compat.v1.Session`, or whatever has its `graph` and `run`."""

    @property
    def graph(self) -> Graph:
        """The graph that the session runs."""
        ...

    @property
    def run(self) -> Callable[..., Any]:
        """Run fetches with feeds."""
        ...


def is_session(value: object) -> TypeGuard[Session]:
    """Whether something is a session, or offers what one does."""
    return hasattr(value, "graph") and hasattr(value, "run")


def all_variables(session: Session) -> list[Variable]:
    """Return the global and the local variables of a session's graph."""
    graph = session.graph
    return [*graph.get_collection("variables"), *graph.get_collection("local_variables")]


def variable_name(variable: Variable) -> str:
    """Return the name that a graph's variable has in checkpoints: that of its op."""
    return canonical_name(str(variable.op.name))


def variable_spec(variable: Variable) -> TensorSpec:
    """Return the spec of one of a graph's variables, a part for itself."""
    return TensorSpec(variable_name(variable), dtype_of(variable.dtype), _declared_shape(variable))


def flattened(variables: Iterable[object]) -> list[Variable]:
    """Return variables without repetition, partitioned ones as their parts.

    Raises:
        TargetError: something is no variable of a graph.
    """
    if hasattr(variables, "initializer"):
        raise TargetError("a single variable: pass a list, variables=[...]")
    found: dict[int, Variable] = {}
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
            found.setdefault(id(member), cast("Variable", member))
    return list(found.values())


def _declared_shape(variable: Variable) -> tuple[int | None, ...] | None:
    shape = variable.shape
    if getattr(shape, "rank", 0) is None:
        return None
    return tuple(shape.as_list())  # type: ignore[attr-defined]  # tf.TensorShape
