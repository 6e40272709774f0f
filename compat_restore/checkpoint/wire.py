"""The protocol buffer wire format, as much as the checkpoint formats need of it.

Six small messages stand in checkpoints. Decoding them here rather than by generated classes keeps
start-up short (the protobuf runtime costs more than a whole listing), and cannot clash with the
copies of the same messages that TensorFlow registers in the process.

Source: https://protobuf.dev/programming-guides/encoding/. A message is a sequence of fields; a
field is a varint tag `number << 3 | type` and a payload by type: 0 a varint, 1 eight bytes,
2 a varint length and that many bytes, 5 four bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BYTES",
    "FIXED32",
    "FIXED64",
    "VARINT",
    "WireError",
    "bytes_field",
    "fields",
    "message_of",
    "number_of",
    "signed",
    "text_of",
    "varint",
    "varint_field",
    "write_varint",
]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_UINT64 = (1 << 64) - 1
_ONE_BYTE = [bytes((value,)) for value in range(0x80)]


class WireError(ValueError):
    """Bytes that are no protocol buffer message; the readers add the file and the subject."""


def varint(data: bytes, position: int, end: int | None = None) -> tuple[int, int]:
    """Return (value, position after it) of the unsigned varint at `position`.

    Raises:
        WireError: it runs past `end` (the length of `data` if None) or past 10 bytes or 64 bits.
    """
    if end is None:
        end = len(data)
    if position < end and data[position] < 0x80:  # by far the most: no loop
        return data[position], position + 1
    value = shift = 0
    for byte in data[position : min(position + _LONGEST_VARINT, end)]:
        if byte < 0x80:
            value |= byte << shift
            if value > _UINT64:
                break
            return value, position + shift // 7 + 1
        value |= (byte & 0x7F) << shift
        shift += 7
    raise WireError(f"no varint at byte {position}")


def signed(value: int) -> int:
    """Return the int64 whose two's complement is the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >> 63 else value


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield (field number, wire type, payload) for each field of a message.

    Raises:
        WireError: the bytes are no message.
    """
    position, end = 0, len(data)
    while position < end:
        tag = data[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {position}")
        if kind == VARINT:
            value, position = varint(data, position, end)
            yield number, kind, value
            continue
        if kind == BYTES:
            length, position = varint(data, position, end)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise WireError(f"wire type {kind} at byte {position}")
        if length > end - position:
            raise WireError(f"a field of {length} bytes at byte {position} of {end}")
        payload = data[position : position + length]
        position += length
        yield number, kind, payload if kind == BYTES else int.from_bytes(payload, "little")


def number_of(payload: int | bytes) -> int:
    """Return a payload that has to be a number.

    Raises:
        WireError: it is not.
    """
    if isinstance(payload, int):
        return payload
    raise WireError("a number was expected where bytes stand")


def message_of(payload: int | bytes) -> bytes:
    """Return a payload that has to be bytes: a nested message, a string, packed numbers.

    Raises:
        WireError: it is not.
    """
    if isinstance(payload, bytes):
        return payload
    raise WireError("bytes were expected where a number stands")


def text_of(payload: int | bytes) -> str:
    """Return a payload that has to be UTF-8 text.

    Raises:
        WireError: it is not.
    """
    try:
        return message_of(payload).decode()
    except UnicodeDecodeError as error:
        raise WireError(f"text that is not UTF-8: {error}") from None


def write_varint(value: int) -> bytes:
    """Return the varint of `value`; a negative one as its 64-bit two's complement."""
    if 0 <= value < 0x80:  # by far the most: no loop
        return _ONE_BYTE[value]
    value &= _UINT64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varint_field(number: int, value: int) -> bytes:
    """Return a varint field; nothing for 0, which is what an absent field means in proto3."""
    return write_varint(number << 3 | VARINT) + write_varint(value) if value else b""


def bytes_field(number: int, payload: bytes) -> bytes:
    """Return a field of bytes, a string or a nested message; an empty one is written too."""
    return write_varint(number << 3 | BYTES) + write_varint(len(payload)) + payload
