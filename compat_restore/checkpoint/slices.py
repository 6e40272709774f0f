"""Shapes and slices as the formats write them: messages, keys of parts, and how parts fit.

Sources: TensorFlow's `core/util/saved_tensor_slice_util.cc` (the keys),
`core/lib/strings/ordered_code.cc` (their encoding), `core/framework/tensor_slice.proto`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain, combinations, repeat
from typing import TYPE_CHECKING

from compat_restore.checkpoint.wire import (
    WireError,
    bytes_field,
    fields,
    message_of,
    number_of,
    signed,
    varint_field,
    write_varint,
)
from compat_restore.tensors import Slice, element_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compat_restore.tensors import Shape

    _Box = tuple[tuple[int, ...], tuple[int, ...]]  # starts, lengths

__all__ = [
    "check_shape",
    "check_tiling",
    "consecutive",
    "decode_shape",
    "decode_slice",
    "encode_slice",
    "slice_key",
]

MOST_SLICES = 100_000  # of one variable; each costs memory, and two bytes in a file announce one
_FULL_EXTENT = -1
_MOST_DIMENSIONS = 32  # what NumPy 1 can hold; TensorFlow's operations stop well before
_MOST_ELEMENTS = 1 << 59  # of 16 bytes: NumPy counts bytes in int64, passing over empty axes
_MOST_CORNERS = 1 << 19  # of all parts of one variable
_MOST_PAIRED_SLICES = (
    300  # of one variable that is cut along more axes than corners are counted for
)


@lru_cache(maxsize=1024)
def decode_shape(data: bytes) -> Shape:
    """Decode a `TensorShapeProto` whose dimensions are all known."""
    dims: list[int] = []
    for number, _, payload in fields(data):
        if number == 2:
            if len(dims) == _MOST_DIMENSIONS:
                raise WireError(f"a shape of more than {_MOST_DIMENSIONS} dimensions")
            dims.append(_decode_dim(message_of(payload)))
        elif number == 3 and payload:
            raise WireError("a shape of unknown rank")
    try:
        check_shape(dims)
    except ValueError as error:
        raise WireError(str(error)) from None
    return tuple(dims)


def check_shape(dims: Sequence[int]) -> None:
    """Check that a shape is one that NumPy could hold.

    Raises:
        ValueError: it has too many dimensions or elements.
    """
    if len(dims) > _MOST_DIMENSIONS:
        raise ValueError(f"a shape of {len(dims)} dimensions")
    if element_count(dim for dim in dims if dim) > _MOST_ELEMENTS:
        raise ValueError(f"the shape {list(dims)}, larger than any memory")


def _decode_dim(data: bytes) -> int:
    size = 0
    for number, _, payload in fields(data):
        if number == 1:
            size = signed(number_of(payload))
    if size < 0:
        raise WireError(f"a dimension of {size}")
    return size


def decode_slice(data: bytes) -> Slice:
    """Decode a `TensorSliceProto`: `extent` (1) repeated, each `start` (1) and `length` (2).

    An extent without a length is the whole axis.

    Raises:
        WireError: it is malformed.
    """
    starts: list[int] = []
    lengths: list[int | None] = []
    for number, _, payload in fields(data):
        if number != 1:
            continue
        start, length = 0, None
        for inner, _, value in fields(message_of(payload)):
            if inner == 1:
                start = signed(number_of(value))
            elif inner == 2:
                length = signed(number_of(value))
        if start < 0 or (length is not None and length < 0):
            raise WireError(f"a slice from {start} of length {length}")
        if len(starts) == _MOST_DIMENSIONS:
            raise WireError(f"a slice of more than {_MOST_DIMENSIONS} dimensions")
        starts.append(start)
        lengths.append(length)
    return Slice(tuple(starts), tuple(lengths))


def slice_key(name: str, part: Slice) -> bytes:
    """Return the table key under which a part of `name` is stored.

    The key is 0, the name, the rank, then start and length of each axis, in the ordered code; a
    whole axis is start 0 and length -1.
    """
    pieces = [_ordered_number(0), _ordered_text(name), _ordered_number(len(part.starts))]
    for start, length in zip(part.starts, part.lengths, strict=True):
        pieces.append(_ordered_signed(start))
        pieces.append(_ordered_signed(_FULL_EXTENT if length is None else length))
    return b"".join(pieces)


def _ordered_number(value: int) -> bytes:
    """Encode an unsigned number: how many bytes, then those, big-endian."""
    size = (value.bit_length() + 7) // 8
    return bytes([size]) + value.to_bytes(size, "big")


def _ordered_text(text: str) -> bytes:
    r"""Encode a string: 00 as 00 FF, FF as FF 00, and 00 01 at the end."""
    escaped = text.encode().replace(b"\xff", b"\xff\x00").replace(b"\x00", b"\x00\xff")
    return escaped + b"\x00\x01"


def _ordered_signed(value: int) -> bytes:
    """Encode a signed number: as many leading ones (for a negative one, zeros) as bytes.

    With n bytes, 7n - 1 bits and the sign are left for the value; the first bit is the inverted
    sign.
    """
    size = 1
    while not -(1 << (7 * size - 1)) <= value < 1 << (7 * size - 1):
        size += 1
    bits = 8 * size
    raw = value & ((1 << bits) - 1)
    # The header is `size` equal bits and their opposite: laid over the sign's copies by xor.
    header = ((1 << size) - 1) << (bits - size)
    return (raw ^ header).to_bytes(size, "big")


def encode_slice(part: Slice) -> bytes:
    """Encode a `TensorSliceProto`."""
    out = []
    for start, length in zip(part.starts, part.lengths, strict=True):
        extent = varint_field(1, start)
        if length is not None:  # `length` is in a oneof: a 0 is written, and is not "whole axis"
            extent += b"\x10" + write_varint(length)
        out.append(bytes_field(1, extent))
    return b"".join(out)


def check_tiling(shape: Shape, parts: Sequence[Slice]) -> None:
    """Check that parts cover a tensor of `shape` exactly: no gap, no overlap.

    Raises:
        ValueError: they do not.
    """
    boxes = [part.resolve(shape) for part in parts]
    covered = sum(element_count(lengths) for _, lengths in boxes)
    if covered != element_count(shape):
        raise ValueError(
            f"{len(parts)} parts hold {covered} elements, the tensor {list(shape)} has "
            f"{element_count(shape)}"
        )
    if not covered:
        return
    varying = [
        axis
        for axis, full in enumerate(shape)
        if any(lengths[axis] != full for _, lengths in boxes)
    ]
    if len(boxes) << len(varying) <= _MOST_CORNERS:
        overlap = not _corners_cancel(shape, boxes, varying)
    elif len(boxes) <= _MOST_PAIRED_SLICES:
        overlap = any(_meet(one, other) for one, other in combinations(boxes, 2))
    else:
        raise ValueError(f"{len(boxes)} parts along {len(varying)} axes, more than can be checked")
    if overlap:
        raise ValueError("parts overlap")


def _corners_cancel(shape: Shape, boxes: Iterable[_Box], axes: Sequence[int]) -> bool:
    """Whether boxes make up a tensor, in time linear in their number.

    The function that counts by how many boxes an element is held is known by its differences along
    all axes, and those of one box are +1 or -1 at its corners, and 0 elsewhere. So the boxes hold
    every element once if their corners cancel each other but for those of the tensor.
    """
    signs = [1]
    for _ in axes:
        signs += [-sign for sign in signs]
    left: dict[int, int] = {}
    whole = ((0,) * len(shape), shape)
    for (starts, lengths), weight in chain(zip(boxes, repeat(1)), ((whole, -1),)):
        corners = [0]  # each as one number, of which the axes are digits
        step = 1
        for axis in axes:
            first, end = starts[axis] * step, (starts[axis] + lengths[axis]) * step
            corners = [c + first for c in corners] + [c + end for c in corners]
            step *= shape[axis] + 1
        for corner, sign in zip(corners, signs, strict=True):
            left[corner] = left.get(corner, 0) + sign * weight
    return not any(left.values())


def _meet(one: _Box, other: _Box) -> bool:
    """Whether two boxes have elements in common."""
    return all(
        max(start, other_start) < min(start + length, other_start + other_length)
        for start, length, other_start, other_length in zip(*one, *other, strict=True)
    )


def consecutive(shape: Shape, parts: Sequence[Slice]) -> tuple[int, ...] | None:
    """Return the order in which the bytes of parts, one after another, are those of the tensor.

    Args:
        shape: of the tensor.
        parts: which make it up, as `check_tiling` demands.

    Returns:
        Indices into `parts`; None if rows of different parts alternate.
    """
    boxes = [part.resolve(shape) for part in parts]
    axis = next(
        (a for a, full in enumerate(shape) if any(lengths[a] != full for _, lengths in boxes)), 0
    )
    if any(dim != 1 for dim in shape[:axis]) or any(
        lengths[axis + 1 :] != shape[axis + 1 :] for _, lengths in boxes
    ):
        return None
    return tuple(sorted(range(len(parts)), key=lambda number: boxes[number][0][axis:]))
