from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat_restore.errors import CheckpointFormatError, UsageError
from compat_restore.tensors import (
    DType,
    Slice,
    TensorSpec,
    array_bytes,
    digest,
    dtype_of,
    element_count,
    format_shape,
    numpy_dtype,
)

# tensorflow/core/framework/types.proto: DT_FLOAT = 1 and so on, with bytes an element.
TYPES_PROTO = {
    "float32": (1, 4), "float64": (2, 8), "int32": (3, 4), "uint8": (4, 1), "int16": (5, 2),
    "int8": (6, 1), "string": (7, 0), "complex64": (8, 8), "int64": (9, 8), "bool": (10, 1),
    "qint8": (11, 1), "quint8": (12, 1), "qint32": (13, 4), "bfloat16": (14, 2),
    "qint16": (15, 2), "quint16": (16, 2), "uint16": (17, 2), "complex128": (18, 16),
    "float16": (19, 2), "resource": (20, 0), "variant": (21, 0), "uint32": (22, 4),
    "uint64": (23, 8), "float8_e5m2": (24, 1), "float8_e4m3fn": (25, 1),
    "float8_e4m3fnuz": (26, 1), "float8_e4m3b11fnuz": (27, 1), "float8_e5m2fnuz": (28, 1),
    "int4": (29, 1), "uint4": (30, 1),
}  # fmt: skip


def test_dtypes_have_the_numbers_and_sizes_of_types_proto():
    assert {d.value: (d.number, d.itemsize) for d in DType} == TYPES_PROTO
    assert all(DType.from_number(number).value == name for name, (number, _) in TYPES_PROTO.items())


@pytest.mark.tensorflow
def test_tensorflow_gives_its_dtypes_the_same_numbers():
    import tensorflow as tf

    for dtype in DType:
        if hasattr(tf.dtypes, dtype.value):
            assert getattr(tf.dtypes, dtype.value).as_datatype_enum == dtype.number
            assert dtype_of(getattr(tf.dtypes, dtype.value)) is dtype


@pytest.mark.parametrize("number", [0, -1, 100, 101, 1 << 60])
def test_a_number_of_no_type_is_an_error(number):
    with pytest.raises(CheckpointFormatError, match=f"element type number {number} is unknown"):
        DType.from_number(number)


def test_numpy_holds_every_dtype_but_the_opaque_ones_in_as_many_bytes():
    for dtype in DType:
        if dtype in (DType.resource, DType.variant):
            with pytest.raises(UsageError, match="opaque"):
                numpy_dtype(dtype)
        elif dtype is DType.string:
            assert numpy_dtype(dtype) == np.dtype(object)
        else:
            assert numpy_dtype(dtype).itemsize == dtype.itemsize


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (np.float32, None), (np.dtype(">f4"), DType.float32), (np.dtype("<f8"), DType.float64),
        ("float32_ref", DType.float32), (np.dtype(bool), DType.bool),
        (np.dtype(object), DType.string), (np.dtype("S3"), DType.string),
        (np.dtype("U3"), DType.string), (np.dtype(ml_dtypes.bfloat16), DType.bfloat16),
        (np.dtype(ml_dtypes.float8_e4m3fn), DType.float8_e4m3fn), ("qint8", DType.qint8),
    ],
)  # fmt: skip
def test_a_dtype_is_known_by_numpy_s_tensorflow_s_and_its_own_name(given_dtype, dtype):
    if dtype is None:
        given_dtype, dtype = np.dtype(given_dtype), DType.float32
    assert dtype_of(given_dtype) is dtype


@pytest.mark.parametrize("name", ["float128", "datetime64[s]", "", "Float32"])
def test_a_dtype_that_no_checkpoint_can_hold_is_an_error_that_lists_those_it_can(name):
    with pytest.raises(UsageError, match="float32, float64, int32"):
        dtype_of(name)


# -- digests -------------------------------------------------------------------------------------


def sha256(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def test_a_digest_does_not_change_between_releases():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = bytes.fromhex("000000000000803f0000004000004040000080400000a040")
    assert digest(array) == sha256(b"float32[2,3]\n" + stored)
    assert (
        digest(array) == "sha256:24ba386fab299c8ad557e4fc42083201bd63f6aaa7fd19efb25ee720fe7f03c7"
    )
    strings = np.array([b"a", b""], object)
    lengths = (b"\x01" + bytes(7), bytes(8))
    assert digest(strings) == sha256(b"string[2]\n" + lengths[0] + b"a" + lengths[1])
    assert (
        digest(strings) == "sha256:79e6a5eeda472eca3fa9b0e6a84bedbf59d9627c921b2f714a13114029e78a9e"
    )


def test_a_digest_is_of_dtype_and_shape_and_bytes():
    array = np.zeros((2, 3), np.float32)
    others = [
        np.zeros((3, 2), np.float32), np.zeros(6, np.float32), np.zeros((2, 3), np.int32),
        -array, np.zeros((2, 3, 1), np.float32),
    ]  # fmt: skip
    found = {digest(array), *map(digest, others), digest(array, DType.qint32)}
    assert len(found) == len(others) + 2  # -0.0 has other bytes than 0.0


def test_a_digest_does_not_depend_on_how_the_array_lies_in_memory():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for same in (
        np.asfortranarray(array),
        array.astype(">f4"),
        np.arange(48, dtype=np.float32)[::2].reshape(2, 3, 4) / 2,
        np.broadcast_to(array, array.shape),
    ):
        assert digest(same) == digest(array)


def test_strings_that_join_to_the_same_bytes_have_other_digests():
    found = {digest(np.array(s, object)) for s in ([b"ab", b""], [b"a", b"b"], [b"", b"ab"])}
    assert len(found) == 3


@pytest.mark.parametrize("shape", [(), (0, 4), (2, 0, 3)])
def test_scalars_and_empty_arrays_have_digests(shape):
    array = np.zeros(shape, np.float32)
    assert digest(array) == sha256(f"float32{format_shape(shape)}\n".encode() + array.tobytes())


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "int4"])
def test_types_that_numpy_borrows_have_digests(kind):
    array = np.array([1, 2, 3]).astype(getattr(ml_dtypes, kind))
    assert digest(array) == sha256(f"{kind}[3]\n".encode() + array.tobytes())


@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=9))
def test_bytes_of_an_array_are_little_endian_in_c_order(numbers):
    wanted = b"".join(n.to_bytes(4, "little", signed=True) for n in numbers)
    for order in "<>":
        array = np.array(numbers, f"{order}i4")
        assert b"".join(bytes(piece) for piece in array_bytes(array)) == wanted


# -- specs and slices ----------------------------------------------------------------------------


def test_a_spec_knows_its_bytes_where_its_shape_is_known():
    assert TensorSpec("w", DType.float32, (2, 3)).nbytes == 24
    assert TensorSpec("w", DType.float32, (2, None)).nbytes == 0
    assert TensorSpec("w", DType.float32, None).nbytes == 0
    assert TensorSpec("w", DType.string, (2,), stored_bytes=17).nbytes == 17
    assert TensorSpec("w", DType.string, (2,)).nbytes == 0


def test_a_spec_shows_its_dtype_and_shape():
    assert TensorSpec("w", DType.float32, (2, 3)).summary == "float32[2,3]"
    assert TensorSpec("w", DType.int64, ()).summary == "int64[]"
    assert TensorSpec("w", DType.bool, (None, 3)).summary == "bool[?,3]"
    assert TensorSpec("w", DType.bool, None).summary == "bool[?]"


def test_an_open_shape_is_not_a_known_one():
    assert TensorSpec("w", DType.float32, (2, 0)).known_shape == (2, 0)
    for shape in (None, (2, None)):
        with pytest.raises(UsageError, match="'w' declares no full shape"):
            _ = TensorSpec("w", DType.float32, shape).known_shape


def test_elements_are_counted():
    assert [element_count(shape) for shape in [(), (5,), (2, 3), (2, 0, 3)]] == [1, 5, 6, 0]


def test_a_slice_resolves_whole_axes():
    assert Slice((1, 0), (2, None)).resolve((4, 5)) == ((1, 0), (2, 5))
    assert Slice((), ()).resolve(()) == ((), ())


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (Slice((1,), (1,)), "rank 1"),
        (Slice((3, 0), (2, 5)), "outside"),
        (Slice((1, 0), (None, 5)), "outside"),  # the whole axis, from its second row
        (Slice((-1, 0), (2, 5)), "outside"),
        (Slice((0, 0), (-1, 5)), "outside"),
    ],
)
def test_a_slice_that_does_not_lie_in_its_tensor_is_an_error(part, what):
    with pytest.raises(ValueError, match=what):
        part.resolve((4, 5))
