"""What may be done to a tensor on its way into a variable, when a rule says so.

Nothing here is ever applied unasked. A transform knows what it makes of a spec, so that a plan can
be checked before a value is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from compat_restore.errors import RuleError
from compat_restore.tensors import DType, dtype_of, element_count, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compat_restore.tensors import Array, Shape

__all__ = [
    "Cast",
    "Reshape",
    "Transform",
    "Transpose",
    "transform_from_dict",
    "transform_to_dict",
    "transformed",
    "transformed_spec",
]


@dataclass(frozen=True, slots=True)
class Transpose:
    """Permute the axes: axis i of the result is axis `axes[i]` of the source."""

    axes: tuple[int, ...]

    def spec(self, dtype: DType, shape: Shape) -> tuple[DType, Shape]:
        """Return the (dtype, shape) that comes out of the one that goes in."""
        if sorted(self.axes) != list(range(len(shape))):
            raise RuleError(
                f"transpose {list(self.axes)} does not permute the axes of {list(shape)}"
            )
        return dtype, tuple(shape[axis] for axis in self.axes)

    def apply(self, array: Array) -> Array:
        """Return the transposed array."""
        turned: Array = array.transpose(self.axes).copy(order="C")
        return turned

    def __str__(self) -> str:
        return f"transpose {list(self.axes)}"


@dataclass(frozen=True, slots=True)
class Reshape:
    """Give the elements, in C order, another shape; one dimension may be -1: what is left."""

    shape: tuple[int, ...]

    def spec(self, dtype: DType, shape: Shape) -> tuple[DType, Shape]:
        """Return the (dtype, shape) that comes out of the one that goes in."""
        count = element_count(shape)
        known = element_count(dim for dim in self.shape if dim != -1)
        open_dims = self.shape.count(-1)
        if open_dims > 1 or any(dim < -1 for dim in self.shape):
            raise RuleError(f"reshape {list(self.shape)} leaves more than one dimension open")
        if open_dims:
            if not known or count % known:
                raise RuleError(f"reshape {list(self.shape)} does not divide {list(shape)}")
            return dtype, tuple(count // known if dim == -1 else dim for dim in self.shape)
        if known != count:
            raise RuleError(
                f"reshape {list(self.shape)} has {known} elements, {list(shape)} has {count}"
            )
        return dtype, self.shape

    def apply(self, array: Array) -> Array:
        """Return the reshaped array."""
        return array.reshape(self.shape)

    def __str__(self) -> str:
        return f"reshape {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Cast:
    """Convert the elements to another type, as NumPy's `astype` does; values may be rounded."""

    dtype: DType

    def __post_init__(self) -> None:
        """Accept the type's name, or NumPy's or TensorFlow's type."""
        object.__setattr__(self, "dtype", dtype_of(self.dtype))

    def spec(self, dtype: DType, shape: Shape) -> tuple[DType, Shape]:
        """Return the (dtype, shape) that comes out of the one that goes in."""
        for end in (dtype, self.dtype):
            if not end.itemsize:
                raise RuleError(f"cast from {dtype} to {self.dtype}: {end} holds no numbers")
        return self.dtype, shape

    def apply(self, array: Array) -> Array:
        """Return the converted array."""
        return array.astype(numpy_dtype(self.dtype))

    def __str__(self) -> str:
        return f"cast {self.dtype}"


Transform: TypeAlias = Transpose | Reshape | Cast


def transformed_spec(
    transforms: Sequence[Transform], dtype: DType, shape: Shape
) -> tuple[DType, Shape]:
    """Return the (dtype, shape) that comes out after all transforms, in order.

    Raises:
        RuleError: a transform does not fit what goes into it.
    """
    for transform in transforms:
        dtype, shape = transform.spec(dtype, shape)
    return dtype, shape


def transformed(transforms: Sequence[Transform], array: Array) -> Array:
    """Return the array after all transforms, in order."""
    for transform in transforms:
        array = transform.apply(array)
    return array


def transform_to_dict(transform: Transform) -> dict[str, object]:
    """Return a transform as it stands in JSON and in a rules file: `{"transpose": [1, 0]}`."""
    match transform:
        case Transpose(axes):
            return {"transpose": list(axes)}
        case Reshape(shape):
            return {"reshape": list(shape)}
        case Cast(dtype):
            return {"cast": dtype.value}


def _all_integers(values: list[object]) -> TypeGuard[list[int]]:
    return all(type(value) is int for value in values)


def transform_from_dict(data: Mapping[str, object]) -> Transform:
    """Return the transform that `{"transpose": [1, 0]}` and the like describe.

    Raises:
        RuleError: it describes none.
    """
    match dict(data):
        case {"transpose": [*axes], **rest} if not rest and _all_integers(axes):
            return Transpose(tuple(axes))
        case {"reshape": [*shape], **rest} if not rest and _all_integers(shape):
            return Reshape(tuple(shape))
        case {"cast": str(name), **rest} if not rest:
            try:
                return Cast(dtype_of(name))
            except ValueError as error:
                raise RuleError(f"cast: {error}") from None
    raise RuleError(
        f"{dict(data)!r} is no transform; one of transpose = [axes], reshape = [dimensions], "
        'cast = "dtype" is expected'
    )
