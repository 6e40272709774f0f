from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat_restore.checkpoint.wire import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    WireError,
    bytes_field,
    fields,
    message_of,
    number_of,
    signed,
    text_of,
    varint,
    varint_field,
    write_varint,
)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8001"),
        (150, "9601"),
        (16384, "808001"),
        ((1 << 64) - 1, "ffffffffffffffffff01"),
        (-1, "ffffffffffffffffff01"),
    ],
)
def test_a_varint_is_written_as_the_encoding_guide_writes_it(value, encoded):
    assert write_varint(value).hex() == encoded


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=3), st.binary(max_size=3))
def test_a_varint_is_read_from_amid_other_bytes(value, before, after):
    data = before + write_varint(value) + after
    assert varint(data, len(before)) == (value, len(data) - len(after))


@pytest.mark.parametrize("encoded", ["", "80", "ffff", "80" * 10 + "00", "ff" * 9 + "02"])
def test_a_varint_that_does_not_end_or_exceeds_64_bits_is_an_error(encoded):
    with pytest.raises(WireError, match="no varint at byte 0"):
        varint(bytes.fromhex(encoded), 0)


def test_a_varint_does_not_run_past_the_end_that_it_is_given():
    with pytest.raises(WireError):
        varint(b"\x96\x01", 0, 1)


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_a_negative_number_comes_back_from_its_twos_complement(value):
    assert signed(varint(write_varint(value), 0)[0]) == value


def test_fields_of_all_wire_types_are_told_apart():
    # field 1: varint 150; 2: "testing"; 3: fixed32; 4: fixed64
    data = bytes.fromhex("089601120774657374696e671d7856341221efcdab9078563412")
    assert list(fields(data)) == [
        (1, VARINT, 150),
        (2, BYTES, b"testing"),
        (3, FIXED32, 0x12345678),
        (4, FIXED64, 0x1234567890ABCDEF),
    ]


@pytest.mark.parametrize(
    ("encoded", "what"),
    [
        ("08", "no varint"),  # a tag without its payload
        ("0a05616263", "a field of 5 bytes at byte 2 of 5"),
        ("0affffffffffffffffff01", "a field of 18446744073709551615 bytes"),
        ("0d010203", "a field of 4 bytes"),
        ("09010203", "a field of 8 bytes"),
        ("0001", "field number 0"),
        ("0b", "wire type 3"),  # groups
        ("0e", "wire type 6"),
    ],
)
def test_bytes_that_are_no_message_are_a_wire_error(encoded, what):
    with pytest.raises(WireError, match=what):
        list(fields(bytes.fromhex(encoded)))


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_a_wire_error(data):
    try:
        found = list(fields(data))
    except WireError:
        return
    assert all(number > 0 for number, _, _ in found)


def test_a_payload_of_the_wrong_kind_is_a_wire_error():
    with pytest.raises(WireError, match="a number was expected"):
        number_of(b"abc")
    with pytest.raises(WireError, match="bytes were expected"):
        message_of(3)
    with pytest.raises(WireError, match="bytes were expected"):
        text_of(3)
    with pytest.raises(WireError, match="not UTF-8"):
        text_of(b"\xff")


def test_a_field_of_zero_is_left_out_and_one_of_no_bytes_is_not():
    assert varint_field(3, 0) == b""
    assert bytes_field(2, b"") == b"\x12\x00"


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.binary(max_size=300))))
def test_fields_of_bytes_round_trip(pairs):
    data = b"".join(bytes_field(number, payload) for number, payload in pairs)
    assert list(fields(data)) == [(number, BYTES, payload) for number, payload in pairs]
