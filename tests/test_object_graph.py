from __future__ import annotations

import numpy as np
import pytest
from formats import write_bundle
from hypothesis import given
from hypothesis import strategies as st

from compat_restore import open_checkpoint
from compat_restore.checkpoint.object_graph import ObjectGraph
from compat_restore.checkpoint.wire import WireError, bytes_field, varint_field
from compat_restore.checkpoint.writer import Content
from compat_restore.errors import DamagedCheckpointError, TensorNotFoundError
from compat_restore.names import OBJECT_GRAPH_KEY, RoleKind
from compat_restore.tensors import DType

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def text(number, value):
    return bytes_field(number, value.encode())


def child(name, node):
    return bytes_field(1, varint_field(1, node) + text(2, name))


def attribute(key, full_name="", name="VARIABLE_VALUE"):
    return bytes_field(2, text(1, name) + text(2, full_name) + text(3, key))


def slot(variable, name, node):
    return bytes_field(3, varint_field(1, variable) + text(2, name) + varint_field(3, node))


def graph(*nodes):
    return b"".join(bytes_field(1, node) for node in nodes)


def checkpoint(folder, message, *keys):
    """Write an object-based checkpoint of scalars; return its prefix."""
    contents = [
        Content.of(key, DType.float32, np.float32(number)) for number, key in enumerate(keys)
    ]
    contents.append(Content.of(OBJECT_GRAPH_KEY, DType.string, np.array(message, object)))
    write_bundle(folder / "ckpt-1", contents)
    return folder / "ckpt-1"


def test_variables_are_named_by_their_full_names(golden):
    with open_checkpoint(golden / "object_based") as reader:
        names = set(reader.variables())
        assert {"fc1/kernel", "fc1/bias", "bn/gamma", "bn/moving_variance", "fc2/kernel"} <= names
        assert len(names) == len(reader.specs())
        key = "model/layer_with_weights-0/kernel" + SUFFIX
        assert reader.key_of("fc1/kernel") == reader.key_of(key) == key
        assert reader.read("fc1/kernel").tolist() == reader.read(key).tolist()
        assert reader.specs()[key].full_name == "fc1/kernel"


def test_slots_have_the_roles_that_the_graph_gives_them(golden):
    with open_checkpoint(golden / "object_based") as reader:
        roles = {reader.key_of(name): role for name, role in reader.roles().items()}
    slots = {key: role for key, role in roles.items() if role.kind is RoleKind.SLOT}
    assert len(slots) == 12  # m and v of the six trained variables
    role = slots["model/layer_with_weights-2/bias/.OPTIMIZER_SLOT/optimizer/v" + SUFFIX]
    assert (role.owner, role.slot) == ("fc2/bias", "v")
    assert all(("OPTIMIZER_SLOT" in key) == (key in slots) for key in roles)
    for key in (OBJECT_GRAPH_KEY, "save_counter" + SUFFIX):
        assert roles[key].kind is RoleKind.CONTAINER
    for attribute_name in ("kernel", "bias"):
        key = f"model/layer_with_weights-0/{attribute_name}{SUFFIX}"
        assert roles[key].kind is RoleKind.VARIABLE


def test_paths_are_the_shortest_and_children_can_be_walked(golden):
    with open_checkpoint(golden / "object_based") as reader:
        found = reader.graph
        kernel = found.variables["model/layer_with_weights-0/kernel" + SUFFIX]
        assert kernel.full_name == "fc1/kernel"
        assert kernel.path.endswith("/kernel")
        node = 0
        for name in kernel.path.split("/"):
            node = found.children(node)[name]
        assert node == kernel.node
        assert found.key_of_node(node) == kernel.key
        assert found.key_of_node(0) is None


def test_a_full_name_that_two_variables_share_stands_for_neither(tmp_path):
    keys = [name + SUFFIX for name in ("a", "b", "c")]
    message = graph(
        child("a", 1) + child("b", 2) + child("c", 3),
        attribute(keys[0], "dense/kernel"),
        attribute(keys[1], "dense/kernel"),
        attribute(keys[2], "dense/bias"),
    )
    with open_checkpoint(checkpoint(tmp_path, message, *keys)) as reader:
        assert set(reader.variables()) == {keys[0], keys[1], "dense/bias", OBJECT_GRAPH_KEY}
        assert reader.read("dense/bias")[()] == 2
        with pytest.raises(TensorNotFoundError):
            reader.read("dense/kernel")


def test_a_full_name_that_is_another_tensor_s_key_does_not_hide_that_tensor(tmp_path):
    key = "a" + SUFFIX
    message = graph(child("a", 1), attribute(key, "taken"))
    with open_checkpoint(checkpoint(tmp_path, message, key, "taken")) as reader:
        assert reader.read("taken")[()] == 1
        assert reader.read(key)[()] == 0
        assert {key, "taken"} <= set(reader.variables())


def test_a_variable_without_a_full_name_keeps_its_key(tmp_path):
    key = "a" + SUFFIX
    message = graph(child("a", 1), attribute(key))
    with open_checkpoint(checkpoint(tmp_path, message, key)) as reader:
        assert set(reader.variables()) == {key, OBJECT_GRAPH_KEY}


def test_the_shortest_of_several_paths_is_taken_and_cycles_end():
    message = graph(
        child("long", 1) + child("short", 2),
        child("way", 2) + child("back", 0),
        attribute("k", "v") + child("self", 2),
    )
    assert ObjectGraph.decode(message).variables["k"].path == "short"


def test_names_of_children_are_escaped_in_paths_as_tensorflow_escapes_them():
    message = graph(child("a/b.c", 1), attribute("a.Sb..c" + SUFFIX))
    assert ObjectGraph.decode(message).variables["a.Sb..c" + SUFFIX].path == "a.Sb..c"


def test_an_attribute_that_is_no_variable_is_told_apart():
    message = graph(child("o", 1), attribute("o/.ATTRIBUTES/STATE", name="STATE"))
    found = ObjectGraph.decode(message)
    assert found.variables["o/.ATTRIBUTES/STATE"].path == "o/STATE"
    assert found.key_of_node(1) is None


def test_a_slot_names_its_variable_by_key():
    message = graph(
        child("w", 1) + child("optimizer", 2),
        attribute("w" + SUFFIX, "w"),
        slot(1, "m", 3),
        attribute("m" + SUFFIX),
    )
    found = ObjectGraph.decode(message).variables["m" + SUFFIX]
    assert (found.owner, found.slot) == ("w" + SUFFIX, "m")
    assert found.path == "m"  # no child leads to it: its key says where it is


def test_a_graph_of_nothing_has_no_variables():
    found = ObjectGraph.decode(b"")
    assert found.variables == {}
    assert found.children() == {}


@pytest.mark.parametrize(
    "message",
    [
        graph(child("a", 7)),
        graph(child("a", -1)),
        graph(slot(9, "m", 0)),
        graph(slot(0, "m", 9)),
        b"\xff",
        varint_field(1, 3),
        graph(bytes_field(1, bytes_field(2, b"\xff"))),
        graph(bytes_field(2, varint_field(3, 1))),
    ],
)
def test_a_malformed_graph_is_a_wire_error_and_damage_to_its_checkpoint(tmp_path, message):
    with pytest.raises(WireError):
        ObjectGraph.decode(message)
    with pytest.raises(DamagedCheckpointError, match="malformed object graph"):
        open_checkpoint(checkpoint(tmp_path, message))


@given(st.binary(max_size=100), st.integers(0, 3000), st.integers(0, 5))
def test_any_change_to_a_graph_is_read_or_a_wire_error(golden, noise, start, length):
    with open_checkpoint(golden / "object_based") as reader:
        message = bytes(reader.read(OBJECT_GRAPH_KEY)[()])
    start %= len(message)
    try:
        found = ObjectGraph.decode(message[:start] + noise + message[start + length :])
    except WireError:
        return
    assert all(key == variable.key for key, variable in found.variables.items())


def test_a_tensor_of_numbers_under_the_graph_s_key_is_no_graph(tmp_path):
    write_bundle(tmp_path / "m", [Content.of(OBJECT_GRAPH_KEY, DType.float32, np.float32(1))])
    with open_checkpoint(tmp_path / "m") as reader:
        assert reader.graph is None
        assert reader.format == "V2 tensor bundle, name-based"
