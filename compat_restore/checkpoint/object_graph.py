"""The object graph of an object-based checkpoint: keys, object paths and full names.

Source: TensorFlow's `core/protobuf/trackable_object_graph.proto`.

    TrackableObjectGraph  1 nodes (repeated)
    TrackableObject       1 children {1 node_id, 2 local_name}
                          2 attributes {1 name, 2 full_name, 3 checkpoint_key}
                          3 slot_variables {1 original_variable_node_id, 2 slot_name,
                                            3 slot_variable_node_id}

Node 0 is the root. A variable's `full_name` is the name that the variable itself had, and so the
bridge between checkpoints whose objects are named differently.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.checkpoint.wire import (
    WireError,
    fields,
    message_of,
    number_of,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CheckpointedVariable", "ObjectGraph"]

VARIABLE_VALUE = "VARIABLE_VALUE"
# Keys begin with the paths of their objects: so many times their length, and so much more, is
# what all paths may have in characters.
_MOST_TIMES = 8
_SHORTEST_LIMIT = 1 << 20
# What an optimizer tracks: that of Keras 3 and tf_keras, and before them OptimizerV2.
_SIGNS_OF_AN_OPTIMIZER = (
    {"_iterations", "_variables"},
    {"_iterations", "_learning_rate"},
    {"iter", "learning_rate", "decay"},
)


class CheckpointedVariable(NamedTuple):
    """A value that the graph names.

    Attributes:
        key: the checkpoint key.
        path: the shortest path of its object from the root: `model/layer_with_weights-0/kernel`.
        full_name: the variable's own name; "" where the writer gave none.
        node: the number of its object in the graph.
        owner: for an optimizer's slot, the key of the variable that it belongs to.
        slot: for an optimizer's slot, its name.
    """

    key: str
    path: str
    full_name: str
    node: int
    owner: str | None = None
    slot: str | None = None


class _Node(NamedTuple):
    children: tuple[tuple[str, int], ...]
    attributes: tuple[tuple[str, str, str], ...]  # name, full name, key
    slots: tuple[tuple[int, str, int], ...]  # variable's node, slot name, slot's node
    highest: int  # of the numbers of nodes that it names; -1 if it names none


class ObjectGraph:
    """A decoded `TrackableObjectGraph`."""

    def __init__(self, nodes: tuple[_Node, ...]) -> None:
        self._nodes = nodes
        self.variables: Mapping[str, CheckpointedVariable] = self._variables()

    @classmethod
    def decode(cls, data: bytes) -> ObjectGraph:
        """Decode the message that stands under `_CHECKPOINTABLE_OBJECT_GRAPH`.

        Raises:
            WireError: it is malformed, or a node names one that is not there.
        """
        messages = [message_of(payload) for number, _, payload in fields(data) if number == 1]
        known: dict[bytes, _Node] = {}  # a million equal ones are two megabytes of file
        for message in messages:
            if message not in known:
                known[message] = _decode_node(message)
        nodes = tuple(map(known.__getitem__, messages))
        highest = max((node.highest for node in nodes), default=-1)
        if highest >= len(nodes):
            raise WireError(f"a node names number {highest} of {len(nodes)} nodes")
        return cls(nodes)

    @cached_property
    def optimizer_keys(self) -> frozenset[str]:
        """The keys of the variables that an optimizer made: slots, counters, rates.

        An optimizer is known by what it tracks. The weights that it trains, which newer ones track
        too (`_trainable_variables`), are not its own.
        """
        found: set[str] = set()
        for node in self._nodes:
            children = dict(node.children)
            if not any(signs <= children.keys() for signs in _SIGNS_OF_AN_OPTIMIZER):
                continue
            own = [n for name, n in children.items() if name != "_trainable_variables"]
            if "_variables" in children:
                own += self.children(children["_variables"]).values()
            found |= {key for number in own if (key := self.key_of_node(number))}
        return frozenset(found)

    def save_counter_key(self) -> str | None:
        """Return the key of the counter that `tf.train.Checkpoint.save` keeps for itself."""
        node = self.children().get("save_counter")
        return None if node is None else self.key_of_node(node)

    def below(self, node: int) -> frozenset[str]:
        """Return the keys of all variables that can be reached from a node."""
        return frozenset(key for number in self._reached(node) if (key := self.key_of_node(number)))

    def slot_keys_below(self, node: int) -> frozenset[str]:
        """Return the keys of the slots that optimizers at or below a node hold."""
        return frozenset(
            key
            for number in self._reached(node)
            for _, _, slot in self._nodes[number].slots
            if (key := self.key_of_node(slot))
        )

    def children(self, node: int = 0) -> Mapping[str, int]:
        """Return the children of a node by their local names."""
        return dict(self._nodes[node].children) if self._nodes else {}

    def key_of_node(self, node: int) -> str | None:
        """Return the key of the variable that a node is, None if it is none."""
        for name, _, key in self._nodes[node].attributes:
            if name == VARIABLE_VALUE:
                return key
        return None

    def _reached(self, root: int) -> dict[int, tuple[int, str]]:
        """Return every node that can be reached from `root`, nearest first.

        Each with the node before it on the shortest way, and its name there.
        """
        if not self._nodes:
            return {}
        reached = {root: (root, "")}
        waiting = deque([root])
        while waiting:
            number = waiting.popleft()
            for name, child in self._nodes[number].children:
                if child not in reached:
                    reached[child] = number, name.replace(".", "..").replace("/", ".S")
                    waiting.append(child)
        return reached

    def _paths(self) -> dict[int, str]:
        """Return the shortest path from the root of every node that has attributes.

        Raises:
            WireError: they are longer, all together, than the graph and its keys call for: a chain
                of objects would take memory in the square of its length.
        """
        reached = self._reached(0)
        lengths: dict[int, int] = {}
        wanted, total = [], 0
        most = _SHORTEST_LIMIT
        for number, (above, name) in reached.items():
            lengths[number] = lengths.get(above, 0) + len(name) + 1
            if attributes := self._nodes[number].attributes:
                wanted.append(number)
                total += lengths[number]
                most += _MOST_TIMES * sum(len(key) for _, _, key in attributes)
        if total > most:
            raise WireError(f"paths of objects of {total} characters in all")
        paths = {}
        for number in wanted:
            names, at = [], number
            while at:
                at, name = reached[at]
                names.append(name)
            paths[number] = "/".join(reversed(names))
        return paths

    def _variables(self) -> dict[str, CheckpointedVariable]:
        paths = self._paths()
        slots = {
            slot: (variable, name) for node in self._nodes for variable, name, slot in node.slots
        }
        keys = {
            number: key
            for number, node in enumerate(self._nodes)
            for name, _, key in node.attributes
            if name == VARIABLE_VALUE
        }
        found = {}
        for number, node in enumerate(self._nodes):
            variable, slot = slots.get(number, (None, None))
            owner = keys.get(variable) if variable is not None else None
            for name, full_name, key in node.attributes:
                path = paths.get(number, key.split("/.ATTRIBUTES/")[0])
                if name != VARIABLE_VALUE:
                    path = f"{path}/{name}" if path else name
                found[key] = CheckpointedVariable(key, path, full_name, number, owner, slot)
        return found


def _decode_node(data: bytes) -> _Node:
    children: list[tuple[str, int]] = []
    attributes: list[tuple[str, str, str]] = []
    slots: list[tuple[int, str, int]] = []
    for number, _, payload in fields(data):
        if number == 1:
            child = _Fields(message_of(payload))
            children.append((child.text(2), child.number(1)))
        elif number == 2:
            attribute = _Fields(message_of(payload))
            attributes.append((attribute.text(1), attribute.text(2), attribute.text(3)))
        elif number == 3:
            slot = _Fields(message_of(payload))
            slots.append((slot.number(1), slot.text(2), slot.number(3)))
    named = [child for _, child in children]
    named += [node for variable, _, slot in slots for node in (variable, slot)]
    return _Node(tuple(children), tuple(attributes), tuple(slots), max(named, default=-1))


class _Fields:
    """The last value of each field of a small message."""

    def __init__(self, data: bytes) -> None:
        self._values = {number: payload for number, _, payload in fields(data)}

    def text(self, number: int) -> str:
        payload = self._values.get(number)
        return "" if payload is None else text_of(payload)

    def number(self, number: int) -> int:
        return number_of(self._values.get(number, 0))
