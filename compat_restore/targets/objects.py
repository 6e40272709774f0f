"""The TF2 target: variables of objects (tf_keras, Keras 3, `tf.Module`, mappings of variables).

Nothing is imported here: an object's framework is in `sys.modules` if the object exists. So Keras 3
models work on any of its backends, with or without TensorFlow.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

from compat_restore.errors import TargetError, UsageError
from compat_restore.names import canonical_name
from compat_restore.targets.graph import is_session
from compat_restore.tensors import TensorSpec, dtype_of, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compat_restore.checkpoint import CheckpointReader
    from compat_restore.checkpoint.object_graph import ObjectGraph
    from compat_restore.tensors import Array

__all__ = [
    "MATCH_BY",
    "ObjectTarget",
    "Structure",
    "only_renumbered",
    "same_but_for_numbers",
    "without_numbers",
]

# The number that Keras gives a layer which nobody named: none for the first.
_NUMBERS = re.compile(r"(?<=[A-Za-z0-9])_(\d+)(?=/|$)")
MATCH_BY = ("auto", "name", "object_path")


class _Variable(Protocol):
    """A `tf.Variable` or a Keras 3 variable, as far as it is used here."""

    name: str
    shape: object
    dtype: object

    def assign(self, value: object) -> object: ...

    def numpy(self) -> object: ...


@dataclass(frozen=True, slots=True)
class _Named:
    """A variable, the name that rules use, and other names for it."""

    variable: _Variable
    name: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Structure:
    """How the objects of a target and those of an object-based checkpoint correspond.

    Attributes:
        pairs: target variable by the name of the checkpoint's variable (or its key).
        root: the object that the target is in the checkpoint: "" for its root, or the name of a
            child of that.
        agreeing: how many pairs have the very same names, and how many have names that say the
            same as their places.
        conflicts: pairs whose names say something else than their places: (name in the
            checkpoint, variable in the same place, variable that goes by that name).
        complete: every variable on either side has its pair; but for optimizers' own, and those
            that TensorFlow's checkpoints do not track (the seeds of Keras 3's random layers).
        exact: `tf.train.Checkpoint` would restore the pairs and nothing else, now or later.
        rivals: other places in the checkpoint that fit the target just as well.
        chosen: the variables are to be matched by it, and not by their names.
    """

    pairs: Mapping[str, str]
    root: str
    agreeing: tuple[int, int]
    conflicts: tuple[tuple[str, str, str], ...]
    complete: bool
    exact: bool
    rivals: tuple[str, ...] = ()
    chosen: bool = False


class ObjectTarget:
    """The variables of TF2 objects, by the names of their own world."""

    kind = "objects"
    collects = False

    def __init__(self, target: object) -> None:
        """Describe the variables of `target`.

        Raises:
            TargetError: it has no variables (is it built?), or is nothing that has variables.
        """
        self._target = target
        self.notes: tuple[str, ...] = _unbuilt_note(target)
        self._variables: dict[str, _Variable] = {}
        self._specs: dict[str, TensorSpec] = {}
        holders: dict[int, str] = {}
        for entry in _told_apart(_collect(target), target):
            _check_eager(entry)
            other = holders.setdefault(id(_resource(entry.variable)), entry.name)
            if other != entry.name:
                raise TargetError(
                    f"'{other}' and '{entry.name}' are one variable: give it one name, since it "
                    "can hold one tensor"
                )
            self._variables[entry.name] = entry.variable
            self._specs[entry.name] = TensorSpec(
                entry.name,
                dtype_of(entry.variable.dtype),
                _shape(entry.variable),
                aliases=entry.aliases,
            )
        if not self._variables:
            raise TargetError(_empty_message(target))

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of each variable by its name."""
        return self._specs

    def assign(self, values: Iterable[tuple[str, Array]]) -> None:
        """Set variables one after another."""
        for name, value in values:
            self._variables[name].assign(value)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Array]]:
        """Yield (name, value) of variables, in the order given."""
        import numpy as np

        for name in names:
            value = self._variables[name].numpy()
            if isinstance(value, bytes):
                value = np.asarray(value, dtype=object)
            array = np.asarray(value)
            kind = numpy_dtype(self._specs[name].dtype)
            yield name, array if array.dtype == kind else array.view(kind)

    # -- object-based checkpoints ----------------------------------------------------------------

    def structure(self, reader: CheckpointReader, root: str | None = None) -> Structure | None:
        """Return how the target's objects correspond to those of an object-based checkpoint.

        The target is looked for at the checkpoint's root and as each child of the root; the place
        where most variables correspond, and most of their names agree, is taken. The two graphs
        are walked side by side by the names of their edges, as `tf.train.Checkpoint.restore` does.

        Args:
            reader: the checkpoint.
            root: the place to look at, "" for the root itself; all places if None.

        Returns:
            None if the checkpoint is name-based, the target is no trackable object, or nothing
            corresponds.
        """
        from compat_restore.checkpoint.bundle import BundleReader

        graph = reader.graph if isinstance(reader, BundleReader) else None
        if graph is None or not _is_trackable(self._target):
            return None
        places = {0: ""} if root in (None, "") else {}
        for name, node in graph.children().items():
            if root in (None, name):
                places.setdefault(node, name)  # one object may have several names
        source_names = {reader.key_of(name): name for name in reader.variables()}
        found = [
            structure
            for node, name in places.items()
            if (
                structure := self._structure_at(name, node, graph, reader.variables(), source_names)
            )
        ]
        if not found:
            return None
        best = max(found, key=_fitness)
        rivals = [s.root for s in found if s is not best and _fitness(s) == _fitness(best)]
        return replace(best, rivals=tuple(rivals))

    @cached_property
    def _names(self) -> Mapping[int, str]:
        """The variables' names by what checkpoints track of them."""
        return {id(_resource(v)): name for name, v in self._variables.items()}

    @cached_property
    def _tracked(self) -> frozenset[str]:
        """The names of the variables that TensorFlow's checkpoints track."""
        found = {self._names.get(id(_resource(node))) for _, node in _paths(self._target)}
        return frozenset(name for name in found if name is not None)

    @cached_property
    def _holders(self) -> Mapping[str, str]:
        """The variables by every name that they go by."""
        holders: dict[str, str] = {}
        for name, spec in self._specs.items():
            for known in _called(spec):
                holders.setdefault(known, name)
        return holders

    def _structure_at(
        self,
        root: str,
        node: int,
        graph: ObjectGraph,
        specs: Mapping[str, TensorSpec],
        source_names: Mapping[str, str],
    ) -> Structure | None:
        """Return how the target corresponds to one object of the checkpoint, None if not at all."""
        pairs: dict[str, str] = {}
        paired_keys, others_paired = set(), False
        for number, found in _walk(self._target, graph.children, node):
            key, name = graph.key_of_node(number), self._names.get(id(_resource(found)))
            if key is None or key not in source_names:
                continue
            if name is not None:
                pairs[source_names[key]] = name
                paired_keys.add(key)
            elif _is_variable(found):
                others_paired = True
        if not pairs:
            return None
        called = {source: _called(specs[source]) for source in pairs}
        agreeing = {
            source for source, name in pairs.items() if called[source] & _called(self._specs[name])
        }
        conflicts = tuple(
            (specs[source].full_name or source, name, namesake)
            for source, name in pairs.items()
            if source not in agreeing
            and (
                namesake := next(
                    (self._holders[n] for n in called[source] if n in self._holders), None
                )
            )
        )
        slots = graph.slot_keys_below(node)
        unpaired = (graph.below(node) | slots) - paired_keys - {graph.save_counter_key()}
        all_paired = self._tracked <= set(pairs.values())
        complete = all_paired and unpaired <= graph.optimizer_keys | slots
        same = sum(specs[source].full_name == name for source, name in pairs.items())
        return Structure(
            pairs=pairs,
            root=root,
            agreeing=(same, len(agreeing)),
            conflicts=conflicts,
            complete=complete,
            exact=not unpaired and not others_paired,
        )

    def restore_structure(self, prefix: str, structure: Structure) -> None:
        """Restore through `tf.train.Checkpoint(...).restore(...).expect_partial()`."""
        import tensorflow as tf

        if structure.root:
            checkpoint = tf.train.Checkpoint(**{structure.root: self._target})
        else:
            checkpoint = tf.train.Checkpoint(self._target)
        checkpoint.restore(prefix).expect_partial()


def without_numbers(name: str) -> str:
    """Return a name without the numbers that Keras gives to layers which nobody named."""
    return _NUMBERS.sub("", name)


def only_renumbered(structure: Structure) -> bool:
    """Whether places and names contradict each other in the numbers alone that Keras gives layers.

    `dense_1` stands where `dense_4` stood, `dense_2` where `dense_5`: the same order per word.
    """
    numbers: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for name, place, _ in structure.conflicts:
        if without_numbers(name) != without_numbers(place):
            return False
        pair = tuple(map(int, _NUMBERS.findall(name))), tuple(map(int, _NUMBERS.findall(place)))
        numbers.setdefault(without_numbers(name), []).append(pair)
    return all(
        sorted(pairs) == sorted(pairs, key=lambda pair: pair[1]) for pairs in numbers.values()
    )


def same_but_for_numbers(structure: Structure) -> bool:
    """Whether the names that contradict their places are alike but for the numbers in them."""
    return any(
        without_numbers(name) == without_numbers(place) for name, place, _ in structure.conflicts
    )


def _fitness(structure: Structure) -> tuple[int, int, int]:
    return len(structure.pairs), *structure.agreeing


def _called(spec: TensorSpec) -> set[str]:
    """Return the names that a variable or a checkpoint's tensor goes by."""
    return {spec.full_name or spec.name, *spec.aliases}


def _collect(target: object) -> list[_Named]:
    """Return the variables of a target with their names.

    Raises:
        TargetError: it is nothing that has variables.
    """
    if isinstance(target, Mapping):
        for name, variable in target.items():
            if not isinstance(name, str) or not _is_variable(variable):
                raise TargetError(
                    f"a mapping of names to variables is expected, not of {name!r} to "
                    f"{type(variable).__name__}"
                )
        return [_Named(variable, name) for name, variable in target.items()]
    _check_kind(target)
    if isinstance(target, list | tuple):
        if not all(_is_variable(variable) for variable in target):
            raise TargetError("a sequence of variables is expected")
        return [_Named(variable, _own_name(variable)) for variable in _unique(target)]
    if not _is_keras(target) and _is_trackable(target):
        return _collect_trackable(target)
    try:
        variables = getattr(target, "variables", None)
    except ValueError as error:  # tf_keras, where there is nothing to list yet
        raise TargetError(_empty_message(target)) from error
    if callable(variables):  # older optimizers
        variables = variables()
    if not isinstance(variables, list | tuple):
        raise TargetError(
            f"{type(target).__name__} has no variables that could be restored; a tf.Module, a "
            "tf_keras or Keras 3 model, or a mapping of names to variables is expected"
        )
    prefix = f"{getattr(target, 'name', '')}/"
    named = []
    for variable in _unique(variables):
        name = _own_name(variable)
        short = name.removeprefix(prefix)  # rules need not know the model's name
        named.append(_Named(variable, name, () if short == name else (short,)))
    return named


def _check_kind(target: object) -> None:
    """Raise for what people pass in place of a target."""
    if isinstance(target, type):
        raise TargetError(f"{target.__name__} is a class; make an object of it, and pass that")
    if is_session(target):
        raise TargetError("a TF1 session: restore it with restore_session(sess, ...)")
    if _is_variable(target):
        raise TargetError("a single variable: pass a mapping of names to variables")


def _collect_trackable(target: object) -> list[_Named]:
    """Return the variables of a `tf.Module` or another trackable object, by attribute paths."""
    found: dict[int, _Named] = {}
    for path, node in _paths(target):
        if _is_variable(node) and id(node) not in found:
            aliases = (".".join(path), _own_name(node))
            name = "/".join(path)
            found[id(node)] = _Named(
                cast("_Variable", node), name, tuple(a for a in aliases if a != name)
            )
    # What hides in containers that are not tracked still belongs to the module.
    for variable in _unique(getattr(target, "variables", ())):
        if id(variable) not in found:
            found[id(variable)] = _Named(variable, _own_name(variable))
    return list(found.values())


def _told_apart(entries: list[_Named], target: object) -> list[_Named]:
    """Return the entries with names of their own: variables of one name go by object paths.

    The shared name stays as an alias of each, so that a tensor of that name is told as ambiguous
    rather than restored into one of them, or into all.
    """
    times: dict[str, int] = {}
    for entry in entries:
        times[entry.name] = times.get(entry.name, 0) + 1
    if len(times) == len(entries):
        return entries
    paths: dict[int, str] = {}
    if _is_trackable(target):
        for path, node in _paths(target):
            paths.setdefault(id(_resource(node)), "/".join(path))
    used = {entry.name for entry in entries if times[entry.name] == 1}
    told = []
    for number, entry in enumerate(entries):
        if times[entry.name] == 1:
            told.append(entry)
            continue
        name = paths.get(id(_resource(entry.variable)), "")
        if not name or name in used:
            name = f"{entry.name}#{number}"
        used.add(name)
        told.append(replace(entry, name=name, aliases=(entry.name, *entry.aliases)))
    return told


def _paths(root: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield (path of attribute names, object) for every tracked object, nearest first."""
    children = _children_function()
    seen = {id(root)}
    waiting: list[tuple[tuple[str, ...], object]] = [((), root)]
    for path, node in waiting:
        if path:
            yield path, node
        if _is_variable(node):
            continue
        for name, child in children(node).items():
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(((*path, name), child))


def _walk(
    root: object, saved_children: _ChildrenOfNode, start: int
) -> Iterator[tuple[int, object]]:
    """Yield (saved node, object) for all that can be reached by the same names on both sides."""
    children = _children_function()
    seen = {start}
    waiting = [(start, root)]
    for node, found in waiting:
        yield node, found
        if _is_variable(found) and not _is_keras(found):
            continue
        there = children(found)
        for name, child in saved_children(node).items():
            if name in there and child not in seen:
                seen.add(child)
                waiting.append((child, there[name]))


class _ChildrenOfNode(Protocol):
    def __call__(self, node: int = 0) -> Mapping[str, int]: ...


class _ChildrenOfObject(Protocol):
    def __call__(self, node: object) -> Mapping[str, object]: ...


def _children_function() -> _ChildrenOfObject:
    """Return TensorFlow's own view of the objects that an object tracks."""
    view = sys.modules["tensorflow"].train.TrackableView

    def children(node: object) -> Mapping[str, object]:
        found: Mapping[str, object] = view.children(node)
        return found

    return children


def _resource(variable: object) -> object:
    """Return the `tf.Variable` below a Keras 3 variable, which is what checkpoints track."""
    below = getattr(variable, "_value", None) if _is_keras3_variable(variable) else None
    return variable if below is None else below


def _is_keras3_variable(value: object) -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Variable") and isinstance(value, keras.Variable)


def _is_variable(value: object) -> bool:
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and isinstance(value, tensorflow.Variable):
        return True
    return _is_keras3_variable(value)


def _is_keras(target: object) -> bool:
    """Whether an object belongs to Keras, whichever; its variables have names of their own."""
    return any(
        cls.__module__.split(".")[0] in ("keras", "tf_keras") for cls in type(target).__mro__
    )


def _is_trackable(target: object) -> bool:
    """Whether an object is one that TensorFlow's checkpoints track."""
    return "tensorflow" in sys.modules and hasattr(target, "_trackable_children")


def _own_name(variable: object) -> str:
    """Return a variable's name in its own world: a Keras 3 variable's path, or its name."""
    path = getattr(variable, "path", None)
    return canonical_name(str(path or getattr(variable, "name", "")))


def _unique(variables: Iterable[object]) -> list[_Variable]:
    return list({id(v): cast("_Variable", v) for v in variables}.values())


def _shape(variable: _Variable) -> tuple[int | None, ...] | None:
    shape = variable.shape
    if getattr(shape, "rank", 0) is None:
        return None
    return tuple(None if dim is None else int(dim) for dim in shape)  # type: ignore[attr-defined]


def _check_eager(entry: _Named) -> None:
    if hasattr(entry.variable, "graph"):
        raise TargetError(
            f"variable '{entry.name}' belongs to a TF1 graph; restore it in its session, with "
            "restore_session"
        )


def _unbuilt_layers(target: object) -> list[str]:
    """Return the names of the layers of a Keras object that are not built yet."""
    flatten = getattr(target, "_flatten_layers", None)
    if not _is_keras(target) or flatten is None:
        return []
    return [str(layer.name) for layer in flatten() if not getattr(layer, "built", True)]


def _unbuilt_note(target: object) -> tuple[str, ...]:
    layers = [n for n in _unbuilt_layers(target) if n != getattr(target, "name", None)]
    if not layers:
        return ()
    shown = ", ".join(f"'{name}'" for name in layers[:5]) + (" ..." if len(layers) > 5 else "")
    return (f"not built, and so without variables as yet: {shown}",)


def _empty_message(target: object) -> str:
    kind = type(target).__name__
    if _is_keras(target) and _unbuilt_layers(target):
        return (
            f"{kind} '{getattr(target, 'name', '')}' has no variables yet, because it is not "
            "built; call it on data once, or build it with .build(input_shape), then restore"
        )
    return f"{kind} has no variables; is it built, and are its variables attributes of it?"


def check_match_by(match_by: str) -> None:
    """Raise unless `match_by` is one of `MATCH_BY`.

    Raises:
        UsageError: it is not.
    """
    if match_by not in MATCH_BY:
        raise UsageError(f"match_by={match_by!r}; one of {', '.join(MATCH_BY)} is expected")
