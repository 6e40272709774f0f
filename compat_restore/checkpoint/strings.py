"""String tensors as V2 bundles store them, and the rule for their checksum.

Source: `ReadStringTensor` and `WriteStringTensor` of TensorFlow's
`core/util/tensor_bundle/tensor_bundle.cc`.

    length varint64 * elements, masked crc32c of the lengths (4), the strings' bytes

The crc of the lengths takes each as 4 bytes (8 from 2^32 on), and the tensor's crc32c goes on from
there over the stored 4 bytes and the strings.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from compat_restore.checkpoint import wire
from compat_restore.checkpoint.checksum import crc32c, mask

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["decode_strings", "encode_strings"]

_AT_ONCE = 4096


def decode_strings(data: bytes, count: int) -> tuple[list[bytes], int]:
    """Return (the strings, the crc32c by the rule for strings) of a stored string tensor.

    Raises:
        WireError: the bytes do not hold `count` strings and nothing else.
    """
    lengths, position = [], 0
    for _ in range(count):
        length, position = wire.varint(data, position)
        lengths.append(length)
    crc = _crc_of_lengths(lengths)
    stored = data[position : position + 4]
    position += 4
    if position + sum(lengths) != len(data):
        raise wire.WireError(
            f"{len(data)} bytes, where {count} strings of {sum(lengths)} bytes in all are announced"
        )
    if int.from_bytes(stored, "little") != mask(crc):
        raise wire.WireError("the checksum of the strings' lengths is wrong")
    crc = crc32c(data[position - 4 :], crc)
    strings = []
    for length in lengths:
        strings.append(data[position : position + length])
        position += length
    return strings, crc


def encode_strings(strings: Iterable[bytes]) -> tuple[bytes, int]:
    """Return (bytes as stored, crc32c by the rule for strings) of a string tensor's elements."""
    elements = list(strings)
    crc = _crc_of_lengths(list(map(len, elements)))
    tail = mask(crc).to_bytes(4, "little") + b"".join(elements)
    return b"".join(wire.write_varint(len(e)) for e in elements) + tail, crc32c(tail, crc)


def _crc_of_lengths(lengths: Sequence[int]) -> int:
    crc = 0
    for begin in range(0, len(lengths), _AT_ONCE):
        some = lengths[begin : begin + _AT_ONCE]
        widths = "".join("I" if length < 1 << 32 else "Q" for length in some)
        crc = crc32c(pack(f"<{widths}", *some), crc)
    return crc
