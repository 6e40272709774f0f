from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import damage, numbers, write, write_from_graph

import compat_restore as cr
from compat_restore.cli import main

ONE = {"a/w": numbers(2, 3), "a/b": numbers(3), "step": np.array(7, np.int64)}


def test_a_copy_is_equal(tmp_path, capsys):
    one, two = write(tmp_path / "one", ONE), write(tmp_path / "two", ONE)
    found = cr.diff(one, two)
    assert found.equal
    assert sorted(found.identical) == sorted(ONE)
    assert main(["diff", one, two]) == 0
    assert "3 compared (44 B): 3 identical, 0 different" in capsys.readouterr().out


def test_what_differs_is_told_by_name_element_and_size(tmp_path, capsys):
    changed = ONE["a/w"].copy()
    changed[1, 2] += 0.5
    one, two = write(tmp_path / "one", ONE), write(tmp_path / "two", ONE | {"a/w": changed})
    [found] = cr.diff(one, two).different
    assert (found.item.target, found.elements, found.first, found.largest) == (
        "a/w",
        1,
        (1, 2),
        0.5,
    )
    assert main(["diff", one, two]) == 1
    assert "1 elements differ, first at [1, 2]: 6.0 and 6.5; by 0.5" in capsys.readouterr().out


def test_what_only_one_of_them_has_is_told(tmp_path):
    one = write(tmp_path / "one", ONE | {"old": numbers(1)})
    two = write(tmp_path / "two", ONE | {"new": numbers(1)})
    found = cr.diff(one, two)
    assert not found.equal
    assert [skip.name for skip in found.only_in_first] == ["old"]
    assert found.only_in_second == ("new",)


def test_other_shapes_and_dtypes_are_told(tmp_path):
    one = write(tmp_path / "one", {"w": numbers(2, 3), "b": numbers(2)})
    two = write(tmp_path / "two", {"w": numbers(3, 2), "b": numbers(2).astype(np.float64)})
    found = cr.diff(one, two)
    assert [pair.name for pair in found.mismatched] == ["b", "w"]
    assert not found.equal


def test_rules_choose_and_rename_what_is_compared(tmp_path):
    one = write(tmp_path / "one", ONE | {"a/w/Adam": numbers(2, 3), "a/w/Adam_1": numbers(2, 3)})
    two = write(tmp_path / "two", {"z/w": ONE["a/w"], "z/b": ONE["a/b"]})
    rules = cr.Rules(include=["a/.*"], drop_slots=True, rename=[(r"a/(.*)", r"z/\1")])
    assert cr.diff(one, two, rules).equal
    assert not cr.diff(one, two).equal
    with pytest.raises(cr.PlanError, match="matches no name"):
        cr.diff(one, two, cr.Rules(include=["typo/.*"]))


def test_transformed_tensors_are_compared_as_they_would_be_restored(tmp_path):
    one = write(tmp_path / "one", {"w": numbers(2, 3)})
    two = write(tmp_path / "two", {"w": numbers(2, 3).T})
    assert cr.diff(one, two, cr.Rules(transform=[("w", cr.Transpose((1, 0)))])).equal


@pytest.mark.parametrize(
    ("mine", "theirs", "equal"),
    [(0.0, -0.0, False), (np.nan, np.nan, True), (np.nan, 1.0, False), (np.inf, np.inf, True)],
)
def test_bytes_decide_and_not_values(tmp_path, mine, theirs, equal):
    one = write(tmp_path / "one", {"w": np.array([1.0, mine])})
    two = write(tmp_path / "two", {"w": np.array([1.0, theirs])})
    found = cr.diff(one, two)
    assert found.equal is equal
    if not equal:
        assert found.different[0].first == (1,)


def test_damage_is_told_as_damage_and_not_as_a_difference(tmp_path):
    one, two = write(tmp_path / "one", ONE), write(tmp_path / "two", ONE)
    damage(two, "a/w")
    with pytest.raises(cr.DamagedTensorsError, match=r"'a/w' in '.*two"):
        cr.diff(one, two)
    damage(one, "a/b")
    with pytest.raises(cr.DamagedTensorsError, match="2 tensors"):
        cr.diff(one, two)
    assert main(["diff", one, two]) == 3


def test_strings_are_compared(tmp_path):
    one = write(tmp_path / "one", {"s": np.array([b"a", b"bb"], object)})
    two = write(tmp_path / "two", {"s": np.array([b"a", b"cc"], object)})
    assert cr.diff(one, one).equal
    [found] = cr.diff(one, two).different
    assert (found.elements, found.first, found.largest) == (1, (1,), None)


def test_large_tensors_are_compared_to_their_last_byte(tmp_path):
    values = numbers(3 << 20)
    changed = values.copy()
    changed[-1] += 1
    one, two = write(tmp_path / "one", {"w": values}), write(tmp_path / "two", {"w": changed})
    assert cr.diff(one, one).equal
    assert cr.diff(one, two).different[0].first == ((3 << 20) - 1,)


@pytest.mark.tensorflow
def test_partitions_and_the_format_make_no_difference(tmp_path):
    pytest.importorskip("tensorflow")
    values = {"emb": numbers(6, 2), "b": numbers(4)}
    parts = write_from_graph(tmp_path / "parts", values, parts=2)
    v1 = write_from_graph(tmp_path / "v1", values, v1=True)
    assert cr.diff(parts, v1).equal
    assert cr.diff(v1, parts).equal
    assert cr.diff(parts, parts).equal


def test_json_holds_everything(tmp_path, capsys):
    one = write(tmp_path / "one", ONE)
    two = write(tmp_path / "two", {"a/w": ONE["a/w"] + 1, "other": numbers(1)})
    assert main(["diff", one, two, "--json", "--exclude", "step"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["equal"] is False
    assert [entry["name"] for entry in data["different"]] == ["a/w"]
    assert data["only_in_first"] == ["a/b"]
    assert data["only_in_second"] == ["other"]
    assert [entry["name"] for entry in data["left_out"]] == ["step"]


@pytest.mark.tensorflow
@pytest.mark.parametrize(("mine", "theirs"), [((2, 1), (1, 2)), ((2, 1), (1, 1)), ((1, 2), (1, 2))])
def test_what_parts_tensors_have_does_not_decide(tmp_path, mine, theirs):
    tf = pytest.importorskip("tensorflow")
    value = numbers(2, 2)

    def saved(name, array, shards):
        prefix = str(tmp_path / name)
        specs, tensors = [], []
        rows, columns = 2 // shards[0], 2 // shards[1]
        for row in range(0, 2, rows):
            for column in range(0, 2, columns):
                specs.append(f"2 2 {row},{rows}:{column},{columns}")
                tensors.append(tf.constant(array[row : row + rows, column : column + columns]))
        if len(specs) == 1:
            specs = [""]
        tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=["w"] * len(specs), shape_and_slices=specs, tensors=tensors
        )
        return prefix

    one = saved("one", value, mine)
    assert cr.diff(one, saved("same", value, theirs)).equal
    found = cr.diff(one, saved("other", value.T, theirs))
    assert not found.equal
    assert [(d.elements, d.first) for d in found.different] == [(2, (0, 1))]


@pytest.mark.tensorflow
def test_what_only_tensorflow_understands_differs_or_not(tmp_path):
    tf = pytest.importorskip("tensorflow")
    for name, count in (("one", 4), ("two", 900)):
        made = iter(tf.data.Dataset.range(count).shuffle(count))
        next(made)
        tf.train.Checkpoint(it=made).write(str(tmp_path / name))
    assert cr.diff(tmp_path / "one", tmp_path / "one").equal
    found = cr.diff(tmp_path / "one", tmp_path / "two")
    assert not found.equal
    assert all(d.elements is None for d in found.different if d.item.dtype == "variant")


def test_a_scalar_that_differs_is_told(tmp_path):
    one = write(tmp_path / "one", {"step": np.array(7, np.int64)})
    two = write(tmp_path / "two", {"step": np.array(9, np.int64)})
    [found] = cr.diff(one, two).different
    assert (found.first, found.values, found.largest) == ((), ("7", "9"), 2.0)
