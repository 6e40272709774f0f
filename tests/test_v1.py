from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from formats import MemoryFile, flipped, rows_of, table_of, truth_of, v1_entries
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore import open_checkpoint
from compat_restore.checkpoint import wire
from compat_restore.checkpoint.slices import encode_slice, slice_key
from compat_restore.checkpoint.table import TableReader
from compat_restore.checkpoint.v1 import V1Reader
from compat_restore.checkpoint.wire import bytes_field, varint_field, write_varint
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    DamagedTensorsError,
)
from compat_restore.tensors import DType, Slice

GOLDEN = ("v1", "partitioned_v1", "sharded_v1", "dtypes_v1")
WHOLE = Slice((0,), (None,))


def shape_message(shape):
    return b"".join(bytes_field(2, varint_field(1, dim)) for dim in shape)


def tensor(dtype, shape, values):
    """Return a TensorProto with these fields as its values."""
    return varint_field(1, DType(dtype).number) + bytes_field(2, shape_message(shape)) + values


def v1_file(path, *, name="w", dtype="float32", shape=(4,), parts=((WHOLE, b""),), more=()):
    """Write a V1 file of one tensor, given as (slice, TensorProto) pairs; return its path."""
    slices = b"".join(bytes_field(4, encode_slice(part)) for part, _ in parts)
    meta = (
        bytes_field(1, name.encode())
        + bytes_field(2, shape_message(shape))
        + varint_field(3, DType(dtype).number)
        + slices
    )
    entries = {b"": bytes_field(1, bytes_field(1, meta))}
    for part, proto in parts:
        saved = bytes_field(1, name.encode()) + bytes_field(2, encode_slice(part))
        entries[slice_key(name, part)] = bytes_field(2, saved + bytes_field(3, proto))
    path.write_bytes(table_of(entries | dict(more)))
    return str(path)


def value(tmp_path, dtype, shape, fields):
    """Return the one tensor of a V1 file that has these fields as its values."""
    part = Slice((0,) * len(shape), (None,) * len(shape))
    proto = tensor(dtype, shape, fields)
    path = v1_file(tmp_path / "m", dtype=dtype, shape=shape, parts=[(part, proto)])
    with open_checkpoint(path) as reader:
        return reader.read("w")


@pytest.mark.parametrize("folder", GOLDEN)
def test_every_tensor_is_what_tensorflow_held_when_it_wrote_it(golden, folder):
    with open_checkpoint(golden / folder) as reader:
        assert rows_of(reader) == truth_of(golden / folder)


def test_a_v1_file_holds_the_same_values_as_its_v2_twin(golden):
    for one, other in (("v1", "plain"), ("partitioned_v1", "partitioned")):
        with open_checkpoint(golden / one) as old, open_checkpoint(golden / other) as new:
            assert rows_of(old) == rows_of(new)
            assert {n: r.kind for n, r in old.roles().items()} == {
                n: r.kind for n, r in new.roles().items()
            }


def test_the_format_says_what_a_v1_checkpoint_is(golden):
    with open_checkpoint(golden / "v1") as one, open_checkpoint(golden / "sharded_v1") as many:
        assert one.format == "V1 checkpoint, name-based"
        assert many.format == "V1 checkpoint, name-based, 3 files"


def test_a_whole_tensor_has_no_slices_in_its_spec_and_a_partitioned_one_has_its_parts(golden):
    with open_checkpoint(golden / "partitioned_v1") as reader:
        assert reader.specs()["whole"].slices == ()
        assert [part.starts for part in reader.specs()["col/w"].slices] == [(0, 0), (0, 3)]


def test_nothing_of_a_v1_file_can_be_taken_as_stored(golden):
    with open_checkpoint(golden / "v1") as reader:
        assert reader.stored("global_step") == ()


# -- the fields of TensorProto -------------------------------------------------------------------

FLOATS = np.array([1.5, -2.0, np.inf], "<f4")


def packed(*numbers):
    return b"".join(write_varint(number) for number in numbers)


@pytest.mark.parametrize(
    "fields",
    [
        bytes_field(5, FLOATS.tobytes()),
        bytes_field(5, FLOATS[:1].tobytes()) + bytes_field(5, FLOATS[1:].tobytes()),
        b"".join(b"\x2d" + number.tobytes() for number in FLOATS),  # one fixed32 each
        b"\x2d" + FLOATS[0].tobytes() + bytes_field(5, FLOATS[1:].tobytes()),
        bytes_field(4, FLOATS.tobytes()),  # tensor_content
    ],
    ids=["packed", "packed in two", "unpacked", "mixed", "content"],
)
def test_floats_are_read_however_they_are_laid_out(tmp_path, fields):
    assert value(tmp_path, "float32", (3,), fields).tolist() == [1.5, -2.0, np.inf]


@pytest.mark.parametrize(
    ("dtype", "number", "values"),
    [
        ("int64", 10, [-(1 << 63), -1, (1 << 63) - 1]),
        ("int32", 7, [-(1 << 31), -1, 7]),
        ("int8", 7, [-128, -1, 127]),
        ("uint16", 7, [0, 1, 65535]),
        ("qint8", 7, [-128, 0, 127]),
        ("quint8", 7, [0, 1, 255]),
        ("bool", 11, [1, 0, 1]),
        ("uint64", 17, [0, 1, (1 << 64) - 1]),
        ("uint32", 16, [0, 1, (1 << 32) - 1]),
    ],
)
def test_integers_are_read_packed_and_one_a_field(tmp_path, dtype, number, values):
    one_each = b"".join(write_varint(number << 3) + write_varint(v) for v in values)
    for fields in (bytes_field(number, packed(*values)), one_each):
        assert value(tmp_path, dtype, (3,), fields).tolist() == values


def test_halves_are_read_as_their_bits(tmp_path):
    fields = bytes_field(13, packed(0x3C00, 0xFC00, 0x0001))
    assert value(tmp_path, "float16", (3,), fields).tolist() == [1.0, -np.inf, 2.0**-24]
    fields = bytes_field(13, packed(0x3F80, 0xC000))
    array = value(tmp_path, "bfloat16", (2,), fields)
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype(float).tolist() == [1.0, -2.0]


def test_complex_numbers_are_pairs(tmp_path):
    fields = bytes_field(9, np.array([1, 2, 3, 4], "<f4").tobytes())
    assert value(tmp_path, "complex64", (2,), fields).tolist() == [1 + 2j, 3 + 4j]


def test_strings_are_elements(tmp_path):
    fields = bytes_field(8, b"a\0") + bytes_field(8, b"") + bytes_field(8, b"\xff")
    assert value(tmp_path, "string", (3,), fields).tolist() == [b"a\0", b"", b"\xff"]


@pytest.mark.parametrize(
    ("dtype", "shape", "fields", "what"),
    [
        ("float32", (3,), bytes_field(5, FLOATS.tobytes()[:8]), "8 bytes of values"),
        ("float32", (3,), bytes_field(5, FLOATS.tobytes()[:11]), "11 bytes of values"),
        ("float32", (3,), b"", "0 bytes of values"),
        ("float32", (1,), b"\x28" + write_varint(1 << 40), "a number of more than 4 bytes"),
        ("float32", (3,), bytes_field(4, b"abc"), "3 bytes of values"),
        ("float32", (1,), varint_field(4, 9), "bytes were expected"),
        ("int32", (2,), bytes_field(7, packed(1)), "1 values, where"),
        ("int32", (2,), bytes_field(7, packed(1, 2, 3)), "3 values, where"),
        ("int32", (2,), bytes_field(7, b"\x01\x80"), "cut short"),
        ("int32", (1,), bytes_field(7, b"\x80" * 11 + b"\x01"), "more than 10 bytes"),
        ("string", (2,), bytes_field(8, b"a"), "1 strings, where"),
        ("string", (1,), varint_field(8, 3), "bytes were expected"),
        ("float32", (1,), varint_field(1, 3) + bytes_field(5, bytes(4)), "values of type 3"),
        ("float32", (1,), b"\x2d\x00", "a field of 4 bytes"),
    ],
)
def test_values_that_do_not_fit_what_is_announced_are_damage(tmp_path, dtype, shape, fields, what):
    with pytest.raises(DamagedCheckpointError, match=what):
        value(tmp_path, dtype, shape, fields)


# -- what the meta says --------------------------------------------------------------------------


def floats(shape, *numbers):
    return tensor("float32", shape, bytes_field(5, np.array(numbers, "<f4").tobytes()))


def read_w(path):
    with open_checkpoint(path) as reader:
        return reader.read("w")


def test_parts_are_put_where_their_slices_say(tmp_path):
    parts = [(Slice((3,), (1,)), floats((1,), 9)), (Slice((0,), (3,)), floats((3,), 1, 2, 3))]
    assert read_w(v1_file(tmp_path / "m", parts=parts)).tolist() == [1, 2, 3, 9]


@pytest.mark.parametrize(
    ("slices", "what"),
    [
        ([Slice((0,), (3,))], "parts hold 3 elements"),
        ([Slice((0,), (2,)), Slice((1,), (2,))], "overlap"),
        ([Slice((0,), (5,))], "lies outside"),
        ([Slice((0, 0), (4, 1))], "rank 2"),
        ([], "0 parts hold 0 elements"),
    ],
)
def test_parts_that_do_not_tile_are_damage(tmp_path, slices, what):
    parts = [(part, floats((2,), 1, 2)) for part in slices]
    with pytest.raises(DamagedCheckpointError, match=what):
        read_w(v1_file(tmp_path / "m", parts=parts))


def test_parts_that_announce_more_than_any_memory_are_damage_before_memory_is_asked_for(tmp_path):
    half = 1 << 50
    parts = [(Slice((at,), (half,)), floats((2,), 1, 2)) for at in (0, half)]
    with pytest.raises(DamagedCheckpointError, match="8 bytes of values"):
        read_w(v1_file(tmp_path / "m", shape=(2 * half,), parts=parts))


def test_a_part_that_is_announced_and_not_there_is_damage(golden, tmp_path):
    entries = dict(TableReader(MemoryFile((golden / "v1" / "model.ckpt").read_bytes())).items())
    del entries[slice_key("net/fc/bias", WHOLE)]
    (tmp_path / "m").write_bytes(table_of(entries))
    with open_checkpoint(tmp_path / "m") as reader:
        assert reader.read("net/fc/bias/Adam").shape == (5,)
        with pytest.raises(DamagedCheckpointError, match="announces a part of it"):
            reader.read("net/fc/bias")


@pytest.mark.parametrize("saved", [b"", bytes_field(2, b""), b"\xff", varint_field(2, 1)])
def test_an_entry_without_values_is_damage(tmp_path, saved):
    key = slice_key("w", WHOLE)
    path = v1_file(tmp_path / "m", parts=[(WHOLE, floats((4,), 1, 2, 3, 4))], more=[(key, saved)])
    with pytest.raises(DamagedCheckpointError, match="tensor 'w'"):
        read_w(path)


@pytest.mark.parametrize(
    "meta",
    [
        b"\xff",
        varint_field(1, 1),
        bytes_field(1, bytes_field(1, b"\xff\xff")),
        bytes_field(1, bytes_field(1, bytes_field(1, b"\xff"))),  # a name that is no text
        bytes_field(1, bytes_field(1, bytes_field(1, b"w") + varint_field(3, 77))),
        bytes_field(1, bytes_field(1, bytes_field(1, b"w"))),
    ],
)
def test_a_malformed_meta_is_damage(tmp_path, meta):
    (tmp_path / "m").write_bytes(table_of({b"": meta}))
    with pytest.raises(DamagedCheckpointError, match="malformed meta"):
        open_checkpoint(tmp_path / "m")


def test_a_table_without_a_meta_is_no_v1_checkpoint(tmp_path):
    (tmp_path / "m").write_bytes(table_of({b"a": b"1"}))
    with pytest.raises(CheckpointFormatError, match="no entry for the meta"):
        open_checkpoint(tmp_path / "m")


def test_shards_that_contradict_each_other_are_damage(tmp_path):
    for number, shape in ((0, (4,)), (1, (5,))):
        v1_file(tmp_path / f"m-0000{number}-of-00002", shape=shape, parts=[])
    with pytest.raises(DamagedCheckpointError, match=r"float32\[5\] in this file"):
        open_checkpoint(tmp_path / "m")


def test_a_file_that_is_gone_is_told(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="missing"):
        V1Reader("m", [str(tmp_path / "m")])


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["v1", "partitioned_v1", "dtypes_v1"])
def test_every_flipped_byte_of_a_v1_file_is_an_error(golden, tmp_path, folder):
    whole = (golden / folder / "model.ckpt").read_bytes()
    path = tmp_path / "m"
    for at in range(0, len(whole), 1 + len(whole) // 150):
        path.write_bytes(flipped(whole, at, 0x20))
        with (
            pytest.raises((DamagedCheckpointError, CheckpointFormatError)),
            open_checkpoint(path) as reader,
        ):
            rows_of(reader)


def test_every_truncation_of_a_v1_file_is_an_error(golden, tmp_path):
    whole = (golden / "v1" / "model.ckpt").read_bytes()
    for length in range(0, len(whole), 17):
        (tmp_path / "m").write_bytes(whole[:length])
        with pytest.raises((DamagedCheckpointError, CheckpointFormatError)):
            open_checkpoint(tmp_path / "m")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_to_an_entry_under_right_checksums_is_read_or_one_of_our_errors(
    golden, tmp_path_factory, data
):
    folder = data.draw(st.sampled_from(["v1", "partitioned_v1", "dtypes_v1"]))
    stored = (golden / folder / "model.ckpt").read_bytes()
    entries = dict(TableReader(MemoryFile(stored)).items())
    key = data.draw(st.sampled_from(sorted(entries)))
    changed = bytearray(entries[key])
    start = data.draw(st.integers(0, min(len(changed), 200)))
    changed[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    where = tmp_path_factory.mktemp("fuzz")
    (where / "m").write_bytes(table_of(entries | {key: bytes(changed)}))
    try:
        with open_checkpoint(where / "m") as reader:
            rows_of(reader)
    except CompatRestoreError as error:
        assert str(error)  # noqa: PT017
    finally:
        shutil.rmtree(where)


# -- trap 20 -------------------------------------------------------------------------------------

PEER = """
import json, sys, tensorflow as tf
reader = tf.train.load_checkpoint(sys.argv[1])
failed = []
for name in sorted(reader.get_variable_to_shape_map()):
    try:
        reader.get_tensor(name)
    except Exception:
        failed.append(name)
print(json.dumps(failed))
"""


def peer_fails_on(prefix):
    command = [sys.executable, "-c", PEER, str(prefix)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.tensorflow
def test_trap_20_partitioned_v1_checkpoints_are_read_where_tensorflow_s_reader_cannot(golden):
    failed = peer_fails_on(golden / "partitioned_v1" / "model.ckpt")
    assert {"row/w", "col/w", "row/w/Adam"} <= set(failed)
    truth = truth_of(golden / "partitioned_v1")
    with open_checkpoint(golden / "partitioned_v1") as reader:
        rows = rows_of(reader)
    assert {name: rows[name] for name in failed} == {name: truth[name] for name in failed}


@pytest.mark.tensorflow
def test_trap_20_v1_dtypes_are_read_where_tensorflow_s_reader_cannot(golden):
    failed = peer_fails_on(golden / "dtypes_v1" / "model.ckpt")
    dtypes = {name.split("/")[0] for name in failed}
    assert {"float16", "complex64", "uint16", "qint8"} <= dtypes
    truth = truth_of(golden / "dtypes_v1")
    with open_checkpoint(golden / "dtypes_v1") as reader:
        rows = rows_of(reader)
    assert {name: rows[name] for name in failed} == {name: truth[name] for name in failed}


def test_unknown_fields_are_passed_over(tmp_path):
    more = varint_field(99, 1) + bytes_field(98, b"new")
    proto = floats((4,), 1, 2, 3, 4) + more
    assert list(wire.fields(more)) == [(99, wire.VARINT, 1), (98, wire.BYTES, b"new")]
    assert read_w(v1_file(tmp_path / "m", parts=[(WHOLE, proto)])).tolist() == [1, 2, 3, 4]


def test_many_small_tensors_of_one_block_are_read_in_linear_time(tmp_path):
    names = [f"v{number:05d}" for number in range(3000)]
    whole = Slice((), ())
    proto = wire.bytes_field(5, np.float32(1).tobytes())
    rows = {b"": b""}
    meta = b""
    for name in names:
        entry = wire.bytes_field(1, name.encode()) + wire.bytes_field(2, b"")
        meta += wire.bytes_field(1, entry + wire.varint_field(3, 1) + wire.bytes_field(4, b""))
        saved = wire.bytes_field(1, name.encode()) + wire.bytes_field(2, b"")
        saved += wire.bytes_field(3, wire.varint_field(1, 1) + proto)
        rows[slice_key(name, whole)] = wire.bytes_field(2, saved)
    rows[b""] = wire.bytes_field(1, meta)
    path = tmp_path / "m"
    path.write_bytes(table_of(sorted(rows.items())))
    with open_checkpoint(path) as reader:
        begun = time.process_time()
        assert all(reader.read(name) == 1 for name in names)
        assert time.process_time() - begun < 2


def test_a_tensor_whose_block_is_damaged_is_named(tmp_path):
    tensors = {f"w{number}": np.zeros(40_000, np.float32) for number in range(9)}
    data = table_of(v1_entries(tensors))
    path = tmp_path / "m"
    path.write_bytes(flipped(data, len(data) // 2))
    with open_checkpoint(path) as reader, pytest.raises(DamagedTensorsError) as told:
        reader.verify(reader.specs())
    assert 1 <= len(told.value.faults) <= 2
    assert all(f"tensor 'w{number}'" in fault for number, fault in enumerate(told.value.faults, 4))
