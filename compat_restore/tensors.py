"""What a tensor is to this library: its name, dtype and shape, and a digest of its bytes.

The dtypes are those of TensorFlow's `types.proto`; the numbers are part of the file formats.
NumPy is imported when values are first touched, so that listing a checkpoint does not pay for it.
For the same reason what a listing is made of are named tuples here and not dataclasses: the module
`dataclasses` alone would be a third of the start-up, and a frozen one takes four times as long to
make, which is felt when they are made by the ten thousand.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, cast

from compat_restore.errors import CheckpointFormatError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]  # which elements: the spec beside it says

__all__ = [
    "OPAQUE",
    "VARIABLE_SIZE",
    "Array",
    "DType",
    "Shape",
    "Slice",
    "TensorSpec",
    "array_bytes",
    "digest",
    "dtype_of",
    "element_count",
    "format_shape",
    "numpy_dtype",
]

if not TYPE_CHECKING:
    Array = "Array"

Shape: TypeAlias = "tuple[int, ...]"


class DType(str, enum.Enum):
    """An element type, named as TensorFlow names it; equal to its name as a string."""

    float32 = "float32"
    float64 = "float64"
    int32 = "int32"
    uint8 = "uint8"
    int16 = "int16"
    int8 = "int8"
    string = "string"
    complex64 = "complex64"
    int64 = "int64"
    bool = "bool"
    qint8 = "qint8"
    quint8 = "quint8"
    qint32 = "qint32"
    bfloat16 = "bfloat16"
    qint16 = "qint16"
    quint16 = "quint16"
    uint16 = "uint16"
    complex128 = "complex128"
    float16 = "float16"
    resource = "resource"
    variant = "variant"
    uint32 = "uint32"
    uint64 = "uint64"
    float8_e5m2 = "float8_e5m2"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e4m3fnuz = "float8_e4m3fnuz"
    float8_e4m3b11fnuz = "float8_e4m3b11fnuz"
    float8_e5m2fnuz = "float8_e5m2fnuz"
    int4 = "int4"
    uint4 = "uint4"

    def __str__(self) -> str:
        return self.value

    @property
    def number(self) -> int:
        """The number of this type in TensorFlow's `types.proto` (`DT_FLOAT` is 1)."""
        return _NUMBERS[self]

    @property
    def itemsize(self) -> int:
        """Bytes per element; 0 where elements have no fixed size (strings, variants)."""
        return _ITEMSIZES[self]

    @classmethod
    def from_number(cls, number: int) -> DType:
        """Return the type that `types.proto` gives this number.

        Raises:
            CheckpointFormatError: no type has this number.
        """
        try:
            return _BY_NUMBER[number]
        except KeyError:
            raise CheckpointFormatError(
                f"element type number {number} is unknown (known are 1 to {max(_BY_NUMBER)}); "
                "was the file written by a newer TensorFlow, or is it damaged?"
            ) from None


# types.proto numbers the types in this order, from DT_FLOAT = 1.
_NUMBERS = {dtype: number for number, dtype in enumerate(DType, start=1)}
_BY_NUMBER = {number: dtype for dtype, number in _NUMBERS.items()}
VARIABLE_SIZE = frozenset({DType.string, DType.resource, DType.variant})
_SIZES = {
    1: ("uint8", "int8", "bool", "qint8", "quint8", "int4", "uint4"),
    2: ("int16", "uint16", "qint16", "quint16", "float16", "bfloat16"),
    4: ("float32", "int32", "uint32", "qint32"),
    8: ("float64", "int64", "uint64", "complex64"),
    16: ("complex128",),
}
_ITEMSIZES = {
    DType(name): size for size, names in _SIZES.items() for name in names
} | dict.fromkeys(VARIABLE_SIZE, 0)
_ITEMSIZES |= {dtype: 1 for dtype in DType if dtype.value.startswith("float8")}

# Values that only TensorFlow understands.
OPAQUE = frozenset({DType.resource, DType.variant})
# NumPy has no quantised types: TensorFlow stores them as these integers.
_AS_NUMPY = {
    DType.qint8: "int8",
    DType.quint8: "uint8",
    DType.qint16: "int16",
    DType.quint16: "uint16",
    DType.qint32: "int32",
    DType.string: "object",
}


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """Return the NumPy type that holds elements of `dtype` in memory.

    Quantised types are held as their integers, strings as `object` arrays of `bytes`, bfloat16
    and the 8- and 4-bit types by the types of `ml_dtypes`.

    Raises:
        UsageError: `dtype` has no values that NumPy could hold (resource, variant).
    """
    import numpy as np

    if dtype in OPAQUE:
        raise UsageError(
            f"elements of dtype {dtype} are opaque to everything but TensorFlow: they can be "
            "listed and copied, but not read as an array"
        )
    name = _AS_NUMPY.get(dtype, dtype.value)
    if dtype is DType.bfloat16 or name.startswith("float8") or name in ("int4", "uint4"):
        import ml_dtypes

        name = getattr(ml_dtypes, name)
    found: np.dtype[Any] = np.dtype(name)
    return found


def dtype_of(dtype: object) -> DType:
    """Return the `DType` of a NumPy dtype, a TensorFlow or Keras dtype, or a name.

    Raises:
        UsageError: the type is none of those that a checkpoint can hold.
    """
    # Both NumPy's and TensorFlow's dtypes have a `name`; TF1's ref types end in "_ref".
    text = str(getattr(dtype, "name", dtype)).removesuffix("_ref")
    if text.startswith(("str", "bytes", "object")):
        return DType.string
    try:
        return DType(text)
    except ValueError:
        raise UsageError(
            f"dtype {text!r} cannot stand in a checkpoint; the dtypes are "
            + ", ".join(d.value for d in DType)
        ) from None


class Slice(NamedTuple):
    """A rectangular part of a partitioned variable.

    Attributes:
        starts: the first index along each axis of the full tensor.
        lengths: the extent along each axis; None means the whole axis.
    """

    starts: Shape
    lengths: tuple[int | None, ...]

    def resolve(self, shape: Shape) -> tuple[Shape, Shape]:
        """Return (starts, lengths) within a full tensor of `shape`, every length spelled out.

        Raises:
            ValueError: the slice has another rank than `shape`, or does not lie inside it.
        """
        if len(self.starts) != len(shape) or len(self.lengths) != len(shape):
            raise ValueError(f"a slice of rank {len(self.starts)} in a tensor of {list(shape)}")
        lengths = tuple(
            full if length is None else length
            for length, full in zip(self.lengths, shape, strict=True)
        )
        for start, length, full in zip(self.starts, lengths, shape, strict=True):
            if start < 0 or length < 0 or start + length > full:
                raise ValueError(
                    f"the part {list(self.starts)}+{list(lengths)} lies outside {list(shape)}"
                )
        return self.starts, lengths


class TensorSpec(NamedTuple):
    """A named tensor or variable, without its values.

    Attributes:
        name: the canonical name: no ":0", partitions under the full variable's name.
        dtype: the element type.
        shape: the full shape; None in a target whose variable declares none, and None for a
            dimension that it leaves open.
        slices: the parts of a partitioned tensor, in the order stored; empty if it is whole.
        aliases: other names that it goes by, where nothing else has them: the names by which rules
            may reach a target's variable, or a tensor's name without that of its model.
        full_name: in an object-based checkpoint, the variable's own name.
        nbytes: bytes as stored, where known (strings take more than their shape says).
    """

    name: str
    dtype: DType
    shape: tuple[int | None, ...] | None
    slices: tuple[Slice, ...] = ()
    aliases: tuple[str, ...] = ()
    full_name: str | None = None
    stored_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; for strings the bytes as stored, 0 if that is unknown."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        if self.shape is None or None in self.shape:
            return 0
        return element_count(self.known_shape) * self.dtype.itemsize

    @property
    def known_shape(self) -> Shape:
        """The shape, where every dimension is known (always so in a checkpoint).

        Raises:
            UsageError: the rank or a dimension is open.
        """
        if self.shape is None or None in self.shape:
            raise UsageError(f"variable '{self.name}' declares no full shape: {self.summary}")
        return cast("Shape", self.shape)

    @property
    def summary(self) -> str:
        """Dtype and shape in one word: `float32[3,4]`."""
        return f"{self.dtype}{format_shape(self.shape)}"


def format_shape(shape: tuple[int | None, ...] | None) -> str:
    """Return a shape as people write it: `[3,4]`, `[]` for a scalar, `[?]` where it is open."""
    if shape is None:
        return "[?]"
    return "[" + ",".join("?" if dim is None else str(dim) for dim in shape) + "]"


def element_count(shape: Iterable[int]) -> int:
    """Return the number of elements of a shape, 1 for a scalar."""
    count = 1
    for dim in shape:
        count *= dim
    return count


def array_bytes(array: Array) -> Iterator[bytes | memoryview]:
    """Yield the bytes of an array: little-endian, C order; strings as their elements in turn."""
    import numpy as np

    if array.dtype == np.dtype(object):
        for element in array.ravel():
            raw = element if isinstance(element, bytes) else str(element).encode()
            yield len(raw).to_bytes(8, "little")
            yield raw
        return
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    yield np.ascontiguousarray(array).ravel().view(np.uint8).data


def opaque_digest(data: bytes, dtype: DType, shape: Shape) -> str:
    """Return a digest as `digest` does, of values that are known by their stored bytes alone."""
    import hashlib

    header = f"{dtype}{format_shape(shape)}\n".encode()
    return f"sha256:{hashlib.sha256(header + data).hexdigest()}"


def digest(array: Array, dtype: DType | None = None) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of an array's dtype, shape and bytes.

    What is hashed: `<dtype>[<d0>,<d1>,...]` in ASCII, a newline, then the elements little-endian
    in C order; each string as its length in 8 little-endian bytes and its bytes.

    Args:
        array: the values; an `object` array holds `bytes`.
        dtype: the type to name; the array's own if None (a quantised tensor is held as integers).
    """
    import hashlib

    header = f"{dtype or dtype_of(array.dtype)}{format_shape(array.shape)}\n"
    state = hashlib.sha256(header.encode())
    for chunk in array_bytes(array):
        state.update(chunk)
    return f"sha256:{state.hexdigest()}"
