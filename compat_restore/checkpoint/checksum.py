"""crc32c, and the mask under which the checkpoint formats store it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["crc32c", "mask", "unmask"]

_MASK_DELTA = 0xA282EAD8
_UINT32 = 0xFFFFFFFF


@cache
def _extend() -> Callable[[int, bytes], int]:
    import google_crc32c

    extend: Callable[[int, bytes], int] = google_crc32c.extend
    return extend


def crc32c(data: bytes, crc: int = 0) -> int:
    """Return the crc32c (Castagnoli) of `data`, going on from `crc`, that of what precedes."""
    return _extend()(crc, data)


def mask(crc: int) -> int:
    """Return the form in which a crc is stored: rotated right by 15 bits, plus a constant.

    Source: LevelDB's and TensorFlow's `lib/hash/crc32c.h`; a crc of bytes that hold crcs would be
    weak without it.
    """
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & _UINT32


def unmask(stored: int) -> int:
    """Return the crc of which `stored` is the masked form."""
    rotated = (stored - _MASK_DELTA) & _UINT32
    return (rotated >> 17 | rotated << 15) & _UINT32
