from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat_restore.checkpoint.checksum import crc32c, mask, unmask


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, B.4
        (b"", 0),
        (b"\0" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_crc32c_has_the_values_of_its_specification(data, crc):
    assert crc32c(data) == crc


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_crc_goes_on_from_that_of_what_precedes(first, second):
    assert crc32c(second, crc32c(first)) == crc32c(first + second)


def test_the_mask_is_the_one_that_leveldb_uses():
    # A block of TensorFlow's own: the empty metaindex block of every table it writes.
    empty_block = bytes.fromhex("000000000100000000")
    assert mask(crc32c(empty_block)) == int.from_bytes(bytes.fromhex("c0f2a1b0"), "little")


@given(st.integers(0, 0xFFFFFFFF))
def test_a_mask_is_undone(crc):
    assert 0 <= mask(crc) <= 0xFFFFFFFF
    assert unmask(mask(crc)) == crc
    assert mask(unmask(crc)) == crc
