from __future__ import annotations

import subprocess
import sys

import cramjam
import pytest
from formats import MemoryFile, flipped, table_of, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore import open_checkpoint
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.table import (
    FOOTER_SIZE,
    MAGIC,
    BlockHandle,
    TableBuilder,
    TableReader,
)
from compat_restore.checkpoint.wire import WireError, write_varint
from compat_restore.errors import CheckpointFormatError, DamagedCheckpointError

SMALL = {b"": b"header", b"layer_1/bias": b"\x01\x02", b"layer_1/kernel": b"\x03" * 20, b"z": b""}

# LevelDB's format written out by hand: a block of {"ab": "1", "abc": "2"}, the empty metaindex
# block, the index block of one entry, and the footer, each in its own line; the checksums are
# those of google_crc32c.
BY_HAND = bytes.fromhex(
    "00020161623102010163320000000001000000" "00" "bb6f69a8"
    "0000000001000000" "00" "c0f2a1b0"
    "00030261626300130000000001000000" "00" "ff5a8d5d"
    "1808" "2510" "000000000000000000000000000000000000000000000000000000000000000000000000"
    "57fb808b247547db"
)  # fmt: skip


def read(data: bytes) -> dict[bytes, bytes]:
    return dict(TableReader(MemoryFile(data)).items())


def block(contents: bytes, kind: int = 0) -> bytes:
    """Return a block with its trailer."""
    data = contents + bytes([kind])
    return data + mask(crc32c(data)).to_bytes(4, "little")


def contents(*entries: tuple[int, bytes, bytes]) -> bytes:
    """Return a block's contents of (shared, suffix, value) entries, as one run."""
    out = b"".join(
        write_varint(shared) + write_varint(len(suffix)) + write_varint(len(value)) + suffix + value
        for shared, suffix, value in entries
    )
    return out + bytes(4) + (1).to_bytes(4, "little")


def file_of(*blocks: tuple[bytes, bytes]) -> bytes:
    """Return a table of blocks with their trailers, each given with its bound in the index."""
    data, index = b"", []
    for bound, stored in blocks:
        handle = BlockHandle(len(data), len(stored) - 5)
        index.append((0, bound, handle.encode()))
        data += stored
    metaindex = block(contents())
    handles = BlockHandle(len(data), len(metaindex) - 5).encode()
    data += metaindex
    stored = block(contents(*index))
    handles += BlockHandle(len(data), len(stored) - 5).encode()
    return data + stored + handles.ljust(FOOTER_SIZE - 8, b"\0") + MAGIC


def test_entries_come_back_in_order():
    assert list(TableReader(MemoryFile(table_of(SMALL))).items()) == sorted(SMALL.items())


def test_a_table_has_the_bytes_of_the_format_as_written_out_by_hand():
    assert table_of({b"ab": b"1", b"abc": b"2"}) == BY_HAND
    assert read(BY_HAND) == {b"ab": b"1", b"abc": b"2"}


def test_a_small_table_has_the_bytes_that_tensorflow_writes(golden):
    # Re-made from its own entries, an index that TensorFlow wrote is the same but for the bounds
    # of its blocks, which TensorFlow shortens; this one's single bound is the only difference.
    theirs = (golden / "plain" / "model.ckpt.index").read_bytes()
    ours = table_of(read(theirs))
    last = max(read(theirs))
    first_block = TableReader(MemoryFile(theirs))._index[0][1].size + 5
    assert ours[:first_block] == theirs[:first_block]
    assert TableReader(MemoryFile(ours))._index[0][0] == last
    assert TableReader(MemoryFile(theirs))._index[0][0] >= last


@given(st.dictionaries(st.binary(max_size=40), st.binary(max_size=300), max_size=60))
def test_any_entries_round_trip(entries):
    data = table_of(entries)
    reader = TableReader(MemoryFile(data))
    assert dict(reader.items()) == entries
    assert all(reader.get(key) == value for key, value in entries.items())
    for absent in (b"\xff" * 41, b"no such key"):
        assert reader.get(absent) == entries.get(absent)


@settings(max_examples=15)
@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=30), st.integers(30_000, 90_000), min_size=8, max_size=30
    )
)
def test_entries_of_many_blocks_round_trip(sizes):
    entries = {key: key[:1] * size for key, size in sizes.items()}
    reader = TableReader(MemoryFile(table_of(entries)))
    assert len(reader._index) == 1 or sum(sizes.values()) > 256 * 1024
    assert dict(reader.items()) == entries
    assert all(reader.get(key) == value for key, value in entries.items())
    assert reader.get(b"\0" * 31) is None


def test_finish_returns_the_size_of_what_was_written():
    pieces: list[bytes] = []
    table = TableBuilder(pieces.append)
    table.add(b"a", b"1")
    assert table.finish() == len(b"".join(pieces))


def test_keys_that_do_not_ascend_are_refused_by_the_builder():
    table = TableBuilder(lambda _: None)
    table.add(b"b", b"")
    with pytest.raises(ValueError, match=r"b'a' after b'b'"):
        table.add(b"a", b"")
    with pytest.raises(ValueError, match=r"b'b' after b'b'"):
        table.add(b"b", b"")


def test_keys_that_do_not_ascend_are_damage_to_the_reader():
    twice = file_of((b"b", block(contents((0, b"b", b"1"), (0, b"a", b"2")))))
    with pytest.raises(DamagedCheckpointError, match="keys must ascend"):
        read(twice)
    between = file_of(
        (b"m", block(contents((0, b"m", b"1")))), (b"z", block(contents((0, b"a", b"2"))))
    )
    with pytest.raises(DamagedCheckpointError, match="keys must ascend"):
        read(between)


def test_a_key_past_the_bound_of_its_block_is_damage():
    with pytest.raises(DamagedCheckpointError, match="in a block that ends at b'a'"):
        read(file_of((b"a", block(contents((0, b"b", b"1"))))))


@pytest.mark.parametrize("bits", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_of_a_table_is_an_error(bits):
    data = table_of(SMALL)
    for at in range(len(data)):
        with pytest.raises((DamagedCheckpointError, CheckpointFormatError), match="memory"):
            read(flipped(data, at, bits))


def test_every_truncation_of_a_table_is_an_error():
    data = table_of(SMALL)
    for length in range(len(data)):
        with pytest.raises((DamagedCheckpointError, CheckpointFormatError), match="memory"):
            read(data[:length])


def test_bytes_put_before_a_table_are_an_error():
    with pytest.raises(DamagedCheckpointError):
        read(b"\0" + table_of(SMALL))


@settings(max_examples=300)
@given(st.data())
def test_a_table_of_any_damage_is_whole_or_an_error(data):
    whole = table_of(SMALL)
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    damaged = whole[:start] + data.draw(st.binary(max_size=30)) + whole[start + length :]
    try:
        found = read(damaged)
    except (DamagedCheckpointError, CheckpointFormatError):
        return
    assert found == SMALL


@given(st.binary(max_size=200))
def test_any_contents_under_a_right_checksum_are_entries_or_damage(data):
    try:
        found = read(file_of((b"\xff" * 300, block(data))))
    except DamagedCheckpointError:
        return
    assert all(isinstance(key, bytes) for key in found)


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        (block(b"\0\0\0"), "3 bytes"),
        (block(b"\xff\xff\xff\x7f"), "2147483647 restart points"),
        (block(contents((3, b"a", b""))), "reaches past"),  # shares 3 bytes of an empty key
        (block(b"\x00\x05\x05a" + contents()), "reaches past"),
        (block(b"\x80\x80" + contents()), "no varint"),
        (block(b"\x00\x01", kind=7), "unknown compression 7"),
        (block(b"\xff" * 11, kind=1), "claims to hold -1 bytes"),
        (block(b"\xff\xff\xff\xff\x0f", kind=1), "claims to hold 4294967295 bytes"),
        (block(b"\x05\x00", kind=1), "damaged snappy block"),
    ],
)
def test_a_malformed_block_under_a_right_checksum_is_damage(stored, what):
    with pytest.raises(DamagedCheckpointError, match=what):
        read(file_of((b"z", stored)))


def test_blocks_that_snappy_compressed_are_read():
    plain = contents((0, b"a", b"x" * 5000), (1, b"b", b"y" * 5000))
    packed = bytes(cramjam.snappy.compress_raw(plain))
    assert len(packed) < len(plain) // 10
    first, second = (b"ab", block(packed, kind=1)), (b"c", block(contents((0, b"c", b"3"))))
    data = file_of(first, second)
    assert read(data) == {b"a": b"x" * 5000, b"ab": b"y" * 5000, b"c": b"3"}
    assert TableReader(MemoryFile(data)).get(b"ab") == b"y" * 5000


def test_every_flipped_byte_of_a_snappy_block_is_an_error():
    stored = block(bytes(cramjam.snappy.compress_raw(contents((0, b"a", b"x" * 500)))), kind=1)
    data = file_of((b"a", stored))
    for at in range(len(stored)):
        with pytest.raises(DamagedCheckpointError):
            read(flipped(data, at))


@pytest.mark.parametrize("offset", [0, 1, 1 << 40, (1 << 64) - 1])
def test_a_handle_that_points_past_the_file_is_damage_and_not_a_read_past_it(offset):
    handles = BlockHandle(offset, 1 << 50).encode() * 2
    with pytest.raises(DamagedCheckpointError, match="past its end"):
        TableReader(MemoryFile(handles.ljust(40, b"\0") + MAGIC))


def test_a_block_handle_round_trips_and_half_of_one_is_an_error():
    handle = BlockHandle(300, 1 << 40)
    assert BlockHandle.decode(b"x" + handle.encode(), 1) == (handle, 1 + len(handle.encode()))
    with pytest.raises(WireError):
        BlockHandle.decode(handle.encode()[:-1])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Return the prefix of a checkpoint with 20,000 scalars, several index blocks long."""
    import numpy as np

    from compat_restore.checkpoint.writer import Content
    from compat_restore.tensors import DType

    prefix = tmp_path_factory.mktemp("big") / "model.ckpt"
    write_bundle(
        prefix,
        (
            Content.of(f"scope/layer_{number:05d}/kernel", DType.float32, np.float32(number))
            for number in range(20_000)
        ),
    )
    return prefix


def test_trap_22_one_flipped_byte_in_an_index_is_damage_and_never_a_shorter_list(big):
    index = big.with_name("model.ckpt.index")
    whole = index.read_bytes()
    try:
        step = len(whole) // 25
        for at in range(step // 2, len(whole) - FOOTER_SIZE, step):
            index.write_bytes(flipped(whole, at, 0x04))
            with pytest.raises(DamagedCheckpointError, match="checksum"):
                open_checkpoint(big)
    finally:
        index.write_bytes(whole)
    with open_checkpoint(big) as reader:
        assert len(reader.specs()) == 20_000


PEER_LISTS = """
import sys, tensorflow as tf
print(len(tf.train.load_checkpoint(sys.argv[1]).get_variable_to_shape_map()))
"""


@pytest.mark.tensorflow
def test_trap_22_tensorflow_lists_fewer_variables_and_no_error(big):
    index = big.with_name("model.ckpt.index")
    whole = index.read_bytes()
    at = TableReader(MemoryFile(whole))._index[-1][1].offset + 1000
    try:
        index.write_bytes(flipped(whole, at, 0x04))
        command = [sys.executable, "-c", PEER_LISTS, str(big)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        index.write_bytes(whole)
    assert 0 < int(done.stdout.split()[-1]) < 20_000


def test_blocks_that_share_bytes_are_damage():
    empty = block(contents())
    data = file_of((b"a", empty), (b"b", empty))
    assert read(data) == {}
    index = [(0, bound, BlockHandle(0, len(empty) - 5).encode()) for bound in (b"a", b"b")]
    twice = empty + block(contents())
    handles = BlockHandle(len(empty), len(twice) - len(empty) - 5).encode()
    stored = block(contents(*index))
    handles += BlockHandle(len(twice), len(stored) - 5).encode()
    with pytest.raises(DamagedCheckpointError, match="inside the one that ends at"):
        read(twice + stored + handles.ljust(FOOTER_SIZE - 8, b"\0") + MAGIC)


def test_bytes_between_the_index_and_the_footer_are_damage():
    data = table_of(SMALL)
    with pytest.raises(DamagedCheckpointError, match="where the footer begins"):
        read(data[:-FOOTER_SIZE] + b"\0" + data[-FOOTER_SIZE:])


class CountingFile(MemoryFile):
    read_bytes = 0

    def read(self, offset, length):
        self.read_bytes += length
        return super().read(offset, length)


def test_small_values_that_share_a_block_with_a_large_one_do_not_read_it_each_time():
    entries = {b"%05d" % number: b"small" for number in range(500)} | {b"z": bytes(3 << 20)}
    file = CountingFile(table_of(entries))
    reader = TableReader(file)
    assert len(reader._index) == 1
    for key, value in entries.items():
        assert reader.get(key) == value
    assert reader.get(b"absent") is None
    assert file.read_bytes < 3 * file.size


def test_a_bound_past_the_keys_of_the_next_block_is_damage_to_whoever_reads_that():
    data = file_of(
        (b"m", block(contents((0, b"a", b"1")))), (b"z", block(contents((0, b"b", b"2"))))
    )
    with pytest.raises(DamagedCheckpointError, match="keys must ascend"):
        read(data)
    reader = TableReader(MemoryFile(data))
    assert reader.get(b"a") == b"1"
    with pytest.raises(DamagedCheckpointError, match="keys must ascend"):
        reader.get(b"n")


def test_bounds_that_do_not_ascend_are_damage():
    data = file_of(
        (b"m", block(contents((0, b"a", b"1")))),
        (b"b", block(contents())),
        (b"z", block(contents((0, b"n", b"2")))),
    )
    with pytest.raises(DamagedCheckpointError, match="keys must ascend"):
        TableReader(MemoryFile(data))
