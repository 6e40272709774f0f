from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat_restore.names import (
    OBJECT_GRAPH_KEY,
    Role,
    RoleKind,
    canonical_name,
    classify,
    sort_key,
    without_model_name,
)
from compat_restore.tensors import DType, TensorSpec

VARIABLE = Role(RoleKind.VARIABLE)
BOOKKEEPING = Role(RoleKind.BOOKKEEPING)


def roles(**shapes):
    """Return the roles of tensors given as name=shape."""
    return classify({n: TensorSpec(n, DType.float32, shape) for n, shape in shapes.items()})


def role(name, owner, shape=(2, 3), owner_shape=(2, 3)):
    """Return the role of a tensor in a checkpoint that also holds `owner`."""
    return roles(**{owner: owner_shape, name: shape})[name]


@pytest.mark.parametrize(
    "slot",
    [
        "Adam", "Adam_1", "Adam_17", "Momentum", "RMSProp", "RMSProp_1", "RMSProp_2", "Adagrad",
        "Ftrl", "Ftrl_1", "adam_m", "adam_v", "LARSOptimizer", "Optimizer_1", "Optimizer",
        "MyOwnOptimizer_2",
    ],
)  # fmt: skip
def test_a_slot_stands_under_its_variable_in_the_same_shape(slot):
    assert role(f"net/w/{slot}", "net/w") == Role(RoleKind.SLOT, "net/w", slot)
    assert role(f"W0/{slot}", "W0") == Role(RoleKind.SLOT, "W0", slot)


@pytest.mark.parametrize("slot", ["Adam", "Momentum", "adam_m", "RMSProp_1", "Optimizer_1"])
def test_what_looks_like_a_slot_is_none_without_its_variable_or_in_another_shape(slot):
    assert roles(**{f"net/w/{slot}": (2, 3)})[f"net/w/{slot}"] == VARIABLE
    assert role(f"net/w/{slot}", "net/w", shape=(3, 2)) == VARIABLE
    assert role(f"net/w/{slot}", "net/wider") == VARIABLE


def test_the_variable_of_a_slot_stays_a_variable():
    assert roles(**{"w": (2,), "w/Adam": (2,)})["w"] == VARIABLE


def test_a_layer_numbered_by_keras_is_no_slot():
    found = roles(**{
        "dense_1/kernel": (4, 4),
        "dense_1/kernel_1": (4, 4),
        "dense_1": (4, 4),
        "dense/kernel_1": (4, 4),
    })  # fmt: skip
    assert set(found.values()) == {VARIABLE}


def test_a_variable_called_like_a_slot_at_the_top_is_none():
    assert roles(Adam=(2, 3), Momentum=(2, 3)) == {"Adam": VARIABLE, "Momentum": VARIABLE}


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("train/eval_net/conv/weights/RMSProp_1", "eval_net/conv/weights"),
        ("DQNetwork/DQNetwork/fc1/kernel/Adam", "DQNetwork/fc1/kernel"),
        ("optimize/a/b/c/Momentum", "a/b/c"),
        ("a/b/c/Momentum", "c"),
    ],
)
def test_a_slot_in_further_outer_scopes_belongs_to_the_inner_variable(name, owner):
    assert role(name, owner) == Role(RoleKind.SLOT, owner, name.rsplit("/", 1)[1])


def test_the_longest_name_that_fits_owns_the_slot():
    found = roles(**{"kernel": (2,), "fc/kernel": (2,), "train/fc/kernel/Adam": (2,)})
    assert found["train/fc/kernel/Adam"].owner == "fc/kernel"


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("dnn/hiddenlayer_0/biases/ayer_0/biases/part_0/RMSProp", "dnn/hiddenlayer_0/biases"),
        (
            "dnn/hiddenlayer_0/biases/dnn/hiddenlayer_0/biases/part_0/Adagrad",
            "dnn/hiddenlayer_0/biases",
        ),
        ("linear/w/part_0/Ftrl_1", "linear/w"),
    ],
)
def test_a_slot_whose_name_was_cut_short_belongs_to_the_variable_it_repeats(name, owner):
    assert role(name, owner) == Role(RoleKind.SLOT, owner, name.rsplit("/", 1)[1])


def test_a_slot_under_a_name_that_repeats_nothing_is_none():
    assert role("net/w/other/x/RMSProp", "net/w") == VARIABLE


def test_a_slot_of_one_part_saved_as_a_plain_variable_belongs_to_that_part():
    found = roles(**{"w/part_0": (2,), "w/part_1": (3,), "w/part_1/Adam": (3,)})
    assert found["w/part_1/Adam"] == Role(RoleKind.SLOT, "w/part_1", "Adam")


def test_a_moving_average_belongs_to_its_variable():
    name = "net/w/ExponentialMovingAverage"
    assert role(name, "net/w") == Role(RoleKind.AVERAGE, "net/w", "ExponentialMovingAverage")
    assert role(f"{name}_1", "net/w").kind is RoleKind.AVERAGE
    assert role(name, "net/b") == VARIABLE


def test_zero_debias_tensors_belong_to_the_average_that_they_correct():
    found = roles(**{
        "X/moving_variance": (4,),
        "X/X/moving_variance/biased": (4,),
        "X/X/moving_variance/local_step": (),
        "other/biased": (4,),
    })  # fmt: skip
    assert found["X/X/moving_variance/biased"] == Role(
        RoleKind.AVERAGE, "X/moving_variance", "biased"
    )
    assert found["X/X/moving_variance/local_step"] == Role(
        RoleKind.AVERAGE, "X/moving_variance", "local_step"
    )
    assert found["X/moving_variance"] == found["other/biased"] == VARIABLE


@pytest.mark.parametrize(
    "name",
    [
        "beta1_power", "beta2_power", "cond_1/beta1_power", "train/beta2_power_1", "global_step",
        "worker/global_step", "current_loss_scale", "good_steps", "save_counter",
    ],
)  # fmt: skip
def test_scalar_counters_and_powers_are_bookkeeping(name):
    assert roles(**{name: ()})[name] == BOOKKEEPING
    assert roles(**{name: (3,)})[name] == VARIABLE
    assert roles(**{f"{name}_of_mine": ()})[f"{name}_of_mine"] == VARIABLE


@pytest.mark.parametrize(
    "name",
    [
        "RNN/MultiRNNCell/Cell0/BasicLSTMCell/Linear/Matrix",
        "bn/moving_mean",
        "bn/moving_variance",
        "bn/beta",
        "bn/gamma",
        "linear/weights",
        "embeddings/weights_15",
        "Adam/kernel",
        "w:0",
        "a//b/",
        "/",
        "",
    ],
)
def test_everything_else_is_a_variable(name):
    assert role(name, "bn") == VARIABLE


def test_the_object_graph_is_a_part_of_the_container():
    assert roles(**{OBJECT_GRAPH_KEY: ()})[OBJECT_GRAPH_KEY].kind is RoleKind.CONTAINER


@given(st.dictionaries(st.text("ab/_1", max_size=8), st.sampled_from([(), (2,)]), max_size=8))
def test_every_tensor_has_one_role_and_an_owner_that_is_there_and_is_another(shapes):
    specs = {n: TensorSpec(n, DType.float32, shape) for n, shape in shapes.items()}
    specs |= {f"{n}/Adam": TensorSpec(f"{n}/Adam", DType.float32, (2,)) for n in shapes}
    found = classify(specs)
    assert list(found) == list(specs)
    for name, given_role in found.items():
        assert (given_role.owner is None) == (given_role.kind is RoleKind.VARIABLE)
        if given_role.owner is not None:
            assert given_role.owner in specs
            assert given_role.owner != name
            assert specs[given_role.owner].shape == specs[name].shape


def test_a_canonical_name_has_no_output_number():
    assert canonical_name("a/w:0") == "a/w"
    assert canonical_name("a/w") == "a/w"
    assert canonical_name("a/w:1") == "a/w:1"


def test_names_sort_by_their_numbers():
    names = ["layer_10/w", "layer_2/w", "layer_2/b", "layer", "layer_02/w", "10", "9"]
    assert sorted(names, key=sort_key) == [
        "9", "10", "layer", "layer_2/b", "layer_2/w", "layer_02/w", "layer_10/w",
    ]  # fmt: skip


@given(st.lists(st.text("a1/_\u00b2\u0663", max_size=6)))
def test_any_names_can_be_sorted(names):
    assert sorted(sorted(names, key=sort_key)) == sorted(names)


def test_a_hostile_name_takes_no_time():
    name = "a/" * 100_000 + "Adam"
    begun = time.process_time()
    assert classify({name: TensorSpec(name, DType.float32, ())})[name].kind is RoleKind.VARIABLE
    assert time.process_time() - begun < 1


def test_a_name_of_thousands_of_digits_sorts():
    assert sort_key("a" + "1" * 9000) > sort_key("a" + "9" * 8999)
    assert sort_key("a010") < sort_key("a11")


def test_a_model_s_name_is_left_out_where_what_remains_is_clear():
    assert without_model_name(["net/fc/w", "net/fc/b"]) == {"net/fc/w": "fc/w", "net/fc/b": "fc/b"}
    assert without_model_name(["fc/w", "fc/b"]) == {}
    assert without_model_name(["a/fc/w", "b/fc/w"]) == {}
    assert without_model_name(["encoder/lstm_cell/w", "head/w"]) == {}
    assert without_model_name(["a/fc/w", "fc/w"]) == {}


def pieces_of(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return what a name is sorted by, spelled out: numbers by their size, before any text."""
    return tuple(
        (0, int(piece), "") if piece[0] in "0123456789" else (1, 0, piece)
        for piece in re.split("([0-9]+)", name)
        if piece
    )


some_names = st.text("ab01239/_-é", max_size=12)


@given(some_names, some_names)
def test_two_names_sort_as_their_numbers_and_words_do(one, other):
    assert (sort_key(one) < sort_key(other)) == (pieces_of(one) < pieces_of(other))
    assert (sort_key(one) == sort_key(other)) == (pieces_of(one) == pieces_of(other))
