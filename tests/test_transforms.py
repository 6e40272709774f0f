"""Transforms: what they make of a spec is what they make of the values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore.errors import RuleError
from compat_restore.tensors import DType, dtype_of, numpy_dtype
from compat_restore.transforms import (
    Cast,
    Reshape,
    Transform,
    Transpose,
    transform_from_dict,
    transform_to_dict,
    transformed,
    transformed_spec,
)


def counting(*shape: int) -> np.ndarray:
    """Return an array of a shape in which every element is another one."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@st.composite
def fitting(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Transform]]:
    """Draw a shape and transforms that fit it, one after the other."""
    shape = start = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    chosen: list[Transform] = []
    for kind in draw(st.lists(st.sampled_from(["transpose", "reshape", "cast"]), max_size=4)):
        if kind == "transpose":
            axes = tuple(draw(st.permutations(range(len(shape)))))
            chosen.append(Transpose(axes))
            shape = tuple(shape[axis] for axis in axes)
        elif kind == "reshape":
            open_at = 0 not in shape and draw(st.booleans())
            shape = (*shape[::-1], 1) if draw(st.booleans()) else (int(np.prod(shape, dtype=int)),)
            chosen.append(Reshape((*shape[:-1], -1) if open_at else shape))
        else:
            chosen.append(Cast(draw(st.sampled_from([DType.float16, DType.int64, DType.bool]))))
    return start, chosen


@settings(deadline=None)
@given(case=fitting())
def test_the_spec_promises_what_the_values_keep(case: tuple[tuple[int, ...], list[Transform]]):
    shape, chosen = case
    before = counting(*shape)
    after = transformed(chosen, before)
    promised = transformed_spec(chosen, DType.float32, shape)
    assert promised == (dtype_of(after.dtype), after.shape)
    assert np.array_equal(before, counting(*shape))  # the values that went in are untouched


def test_transpose_puts_source_axis_axes_i_at_i():
    array = counting(2, 3, 4)
    turned = Transpose((2, 0, 1)).apply(array)
    assert turned.shape == (4, 2, 3)
    assert turned[3, 1, 2] == array[1, 2, 3]
    assert turned.flags.c_contiguous


@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 2), (-1, 0), (0, 1, 2)])
def test_axes_that_do_not_permute_are_refused(axes: tuple[int, ...]):
    with pytest.raises(RuleError, match=r"does not permute the axes of \[2, 3\]"):
        Transpose(axes).spec(DType.float32, (2, 3))


def test_reshape_keeps_the_order_of_the_elements():
    assert Reshape((3, 2)).apply(counting(2, 3)).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("wanted", "given", "made"),
    [
        ((6,), (2, 3), (6,)),
        ((-1,), (2, 3), (6,)),
        ((3, -1), (2, 3), (3, 2)),
        ((), (1, 1), ()),
        ((-1,), (), (1,)),
        ((0, 5), (0,), (0, 5)),
        ((5, -1), (0,), (5, 0)),
    ],
)
def test_reshape_fills_in_the_open_dimension(wanted: tuple, given: tuple, made: tuple):
    assert Reshape(wanted).spec(DType.int8, given) == (DType.int8, made)
    assert Reshape(wanted).apply(counting(*given)).shape == made


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((5,), "has 5 elements"),
        ((4, -1), "does not divide"),
        ((0, -1), "does not divide"),
        ((-1, -1), "more than one dimension open"),
        ((-2, 3), "open"),
    ],
)
def test_a_reshape_that_does_not_fit_is_refused(wanted: tuple[int, ...], message: str):
    with pytest.raises(RuleError, match=message):
        Reshape(wanted).spec(DType.float32, (2, 3))


@pytest.mark.parametrize("given", ["float16", DType.float16, np.float16, np.dtype("float16")])
def test_a_type_is_named_in_whatever_way_people_do(given: object):
    if given is np.float16:
        given = np.dtype(given)
    assert Cast(given) == Cast(DType.float16)  # type: ignore[arg-type]


def test_cast_rounds_as_numpy_does():
    values = np.array([0.1, 1.5, -2.7], np.float32)
    assert Cast(DType.int32).apply(values).tolist() == [0, 1, -2]
    halved = Cast(DType.bfloat16).apply(values)
    assert halved.dtype == ml_dtypes.bfloat16
    assert numpy_dtype(DType.bfloat16) == halved.dtype


@pytest.mark.parametrize("opaque", [DType.string, DType.resource, DType.variant])
def test_what_has_no_numbers_cannot_be_cast(opaque: DType):
    with pytest.raises(RuleError, match=f"cast from {opaque} to float32"):
        Cast(DType.float32).spec(opaque, (2,))
    with pytest.raises(RuleError, match=f"cast from float32 to {opaque}"):
        Cast(opaque).spec(DType.float32, (2,))


def test_transforms_are_applied_in_order():
    chosen = [Transpose((1, 0)), Reshape((6,)), Cast("int32")]
    assert transformed_spec(chosen, DType.float32, (2, 3)) == (DType.int32, (6,))
    assert transformed(chosen, counting(2, 3)).tolist() == [0, 3, 1, 4, 2, 5]


def test_no_transform_changes_nothing():
    array = counting(2)
    assert transformed((), array) is array
    assert transformed_spec((), DType.uint8, (2,)) == (DType.uint8, (2,))


@pytest.mark.parametrize(
    ("transform", "data", "text"),
    [
        (Transpose((1, 0)), {"transpose": [1, 0]}, "transpose [1, 0]"),
        (Reshape((2, -1)), {"reshape": [2, -1]}, "reshape [2, -1]"),
        (Cast("bfloat16"), {"cast": "bfloat16"}, "cast bfloat16"),
    ],
)
def test_transforms_go_to_plain_data_and_back(transform: Transform, data: dict, text: str):
    assert transform_to_dict(transform) == data
    assert transform_from_dict(data) == transform
    assert str(transform) == text


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"rotate": [1]},
        {"transpose": [1, 0], "cast": "int8"},
        {"transpose": [True, False]},
        {"transpose": [1.0]},
        {"transpose": 1},
        {"reshape": "2,3"},
        {"cast": 3},
    ],
)
def test_data_that_describes_no_transform_is_refused(data: dict[str, object]):
    with pytest.raises(RuleError, match="is no transform; one of transpose"):
        transform_from_dict(data)


def test_a_cast_to_an_unknown_type_lists_the_known_ones():
    with pytest.raises(RuleError, match=r"'float31'.*bfloat16"):
        transform_from_dict({"cast": "float31"})
