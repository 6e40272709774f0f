from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from formats import MemoryFile
from hypothesis import given
from hypothesis import strategies as st

from compat_restore.checkpoint import wire
from compat_restore.checkpoint.bundle import BundleReader
from compat_restore.checkpoint.slices import (
    _ordered_signed,
    check_tiling,
    decode_shape,
    decode_slice,
    encode_slice,
    slice_key,
)
from compat_restore.checkpoint.table import TableReader
from compat_restore.checkpoint.v1 import V1Reader
from compat_restore.checkpoint.wire import WireError
from compat_restore.tensors import Slice

EXTENTS = st.tuples(st.integers(0, (1 << 63) - 1), st.none() | st.integers(0, (1 << 63) - 1))
SLICES = st.lists(EXTENTS, max_size=5).map(
    lambda extents: Slice(tuple(e[0] for e in extents), tuple(e[1] for e in extents))
)


def keys_of(path):
    return {key for key, _ in TableReader(MemoryFile(path.read_bytes())).items()}


def test_slice_keys_are_those_of_a_v2_file_that_tensorflow_wrote(golden):
    folder = golden / "partitioned"
    stored = {k for k in keys_of(folder / "model.ckpt.index") if k.startswith(b"\0")}
    with BundleReader(str(folder / "model.ckpt")) as reader:
        computed = {
            slice_key(name, part) for name, spec in reader.specs().items() for part in spec.slices
        }
    assert len(stored) == 15  # (3 parts + 2 parts) of a variable and its two slots
    assert computed == stored


@pytest.mark.parametrize("folder", ["v1", "partitioned_v1", "dtypes_v1"])
def test_slice_keys_are_those_of_a_v1_file_that_tensorflow_wrote(golden, folder):
    path = str(golden / folder / "model.ckpt")
    stored = keys_of(golden / folder / "model.ckpt") - {b""}
    with V1Reader(path, [path]) as reader:
        computed = {
            slice_key(name, part) for name, parts in reader._parts.items() for part in parts
        }
    assert computed == stored


def test_a_slice_key_is_the_ordered_code_of_name_rank_and_extents():
    part = Slice((3, 0), (2, None))
    assert slice_key("row/w", part) == b"\0row/w\0\1\1\2\x83\x82\x80\x7f"
    assert slice_key("a\0b", Slice((), ())) == b"\0a\0\xffb\0\1\0"
    assert slice_key("\u00ff", Slice((), ())) == b"\0\xc3\xbf\0\1\0"


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "80"), (1, "81"), (-1, "7f"), (63, "bf"), (64, "c040"), (-64, "40"), (-65, "3fbf"),
        (8191, "dfff"), (8192, "e02000"), (300, "c12c"), (100_000, "e186a0"),
    ],
)  # fmt: skip
def test_signed_numbers_have_the_ordered_code(value, encoded):
    assert _ordered_signed(value).hex() == encoded


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-(1 << 63), (1 << 63) - 1))
def test_the_ordered_code_of_numbers_sorts_as_they_do(one, other):
    assert (_ordered_signed(one) < _ordered_signed(other)) == (one < other)


@given(SLICES)
def test_a_slice_round_trips(part):
    assert decode_slice(encode_slice(part)) == part


def test_a_length_of_zero_is_not_the_whole_axis():
    assert decode_slice(encode_slice(Slice((0,), (0,)))).lengths == (0,)
    assert decode_slice(bytes.fromhex("0a00")) == Slice((0,), (None,))


def test_a_slice_with_a_negative_extent_is_malformed():
    for number in (1, 2):
        extent = wire.varint_field(number, -3)
        with pytest.raises(WireError, match="a slice from"):
            decode_slice(wire.bytes_field(1, extent))


def shape_message(*dims: int) -> bytes:
    return b"".join(wire.bytes_field(2, wire.varint_field(1, dim)) for dim in dims)


@given(st.lists(st.integers(0, 4000), max_size=4))
def test_a_shape_is_read(dims):
    assert decode_shape(shape_message(*dims)) == tuple(dims)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (shape_message(-1), "a dimension of -1"),
        (wire.varint_field(3, 1), "unknown rank"),
        (shape_message(*[1] * 33), "more than 32 dimensions"),
        (shape_message(1 << 40, 0, 1 << 40), "larger than any memory"),
        (wire.varint_field(2, 5), "bytes were expected"),
    ],
)
def test_a_shape_that_no_array_can_have_is_malformed(message, what):
    with pytest.raises(WireError, match=what):
        decode_shape(message)


@st.composite
def grids(draw):
    """Draw (shape, parts): a tensor cut along some of its axes, in any order."""
    cuts = [
        sorted(draw(st.sets(st.integers(1, 7), max_size=2))) for _ in range(draw(st.integers(1, 3)))
    ]
    shape = tuple(8 for _ in cuts)
    spans = [list(itertools.pairwise([0, *axis, 8])) for axis in cuts]
    parts = [
        Slice(tuple(s for s, _ in cell), tuple(e - s for s, e in cell))
        for cell in itertools.product(*spans)
    ]
    return shape, draw(st.permutations(parts))


@given(grids())
def test_every_grid_tiles_its_tensor(grid):
    shape, parts = grid
    check_tiling(shape, parts)


@given(grids(), st.data())
def test_a_grid_with_a_part_missing_or_twice_does_not_tile(grid, data):
    shape, parts = grid
    at = data.draw(st.integers(0, len(parts) - 1))
    with pytest.raises(ValueError, match="parts hold"):
        check_tiling(shape, parts[:at] + parts[at + 1 :])
    with pytest.raises(ValueError, match="parts hold"):
        check_tiling(shape, [*parts, parts[at]])


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((6,), [Slice((0,), (3,)), Slice((2,), (3,))]),  # a gap at the end, an overlap inside
        ((6,), [Slice((0,), (3,)), Slice((0,), (3,))]),
        ((4, 4), [Slice((0, 0), (2, 4)), Slice((1, 0), (2, 4))]),
        ((2, 2), [Slice((0, 0), (1, 2)), Slice((0, 0), (2, 1))]),  # an L, its corner twice
    ],
)
def test_parts_of_the_right_size_that_overlap_do_not_tile(shape, parts):
    with pytest.raises(ValueError, match="overlap"):
        check_tiling(shape, parts)


@pytest.mark.parametrize(
    "part", [Slice((5,), (2,)), Slice((0, 0), (1, 1)), Slice((), ()), Slice((7,), (0,))]
)
def test_a_part_outside_the_tensor_or_of_another_rank_does_not_tile(part):
    with pytest.raises(ValueError, match=r"outside|of rank"):
        check_tiling((6,), [part])


def test_thousands_of_parts_along_several_axes_are_checked_in_linear_time():
    rows, columns = 300, 200
    parts = [Slice((row, 2 * column), (1, 2)) for row in range(rows) for column in range(columns)]
    begun = time.process_time()
    check_tiling((rows, 2 * columns), parts)
    parts[5] = parts[-7]
    with pytest.raises(ValueError, match="overlap"):
        check_tiling((rows, 2 * columns), parts)
    assert time.process_time() - begun < 10


def test_parts_along_so_many_axes_that_their_corners_are_not_counted_are_compared():
    halves = [Slice((0,) * axis + (1,), (1,) * (axis + 1)) for axis in range(31)]
    parts = [
        Slice(h.starts + (0,) * (31 - len(h.starts)), h.lengths + (2,) * (31 - len(h.lengths)))
        for h in halves
    ]
    shape = (2,) * 31
    last = Slice((0,) * 31, (1,) * 31)
    check_tiling(shape, [*parts, last])
    with pytest.raises(ValueError, match="overlap"):
        check_tiling(shape, [*parts, Slice((0,) * 30 + (1,), (1,) * 31)])


def test_more_parts_along_more_axes_than_can_be_checked_are_told():
    parts = [Slice(starts, (1,) * 12) for starts in itertools.product((0, 1), repeat=12)]
    with pytest.raises(ValueError, match="4096 parts along 12 axes, more than can be checked"):
        check_tiling((2,) * 12, parts)


@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 3)] * 2), min_size=1, max_size=6)
)
def test_the_verdict_on_parts_is_that_of_counting_every_element(boxes):
    parts = [Slice(box[:2], (min(box[2], 4 - box[0]), min(box[3], 4 - box[1]))) for box in boxes]
    held = np.zeros((4, 4), int)
    for part in parts:
        (top, left), (height, width) = part.starts, part.lengths
        held[top : top + height, left : left + width] += 1
    # Single elements fill what is free, so that there are as many as the tensor has.
    free = [Slice((int(row), int(column)), (1, 1)) for row, column in np.argwhere(held == 0)]
    parts += free[: max(0, 16 - held.sum())]
    if held.max() == 1:
        check_tiling((4, 4), parts)
    else:
        with pytest.raises(ValueError, match=r"overlap|parts hold"):
            check_tiling((4, 4), parts)


def test_irregular_parts_tile():
    check_tiling((3, 3), [Slice((0, 0), (2, 3)), Slice((2, 0), (1, 1)), Slice((2, 1), (1, 2))])


def test_empty_tensors_and_scalars_tile():
    check_tiling((0, 4), [Slice((0, 0), (None, None))])
    check_tiling((), [Slice((), ())])
