"""Small files that announce large things, and names that lead elsewhere: refused at once.

Every test has its own process, in which more than 256 MB are refused.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cramjam
import pytest
from formats import table_of, write_bundle
from hostile import MOST_MEMORY, MOST_SECONDS, put

from compat_restore import open_checkpoint
from compat_restore.checkpoint.bundle import BundleEntry
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.object_graph import ObjectGraph
from compat_restore.checkpoint.slices import encode_slice, slice_key
from compat_restore.checkpoint.strings import encode_strings
from compat_restore.checkpoint.table import MAGIC, BlockHandle
from compat_restore.checkpoint.wire import bytes_field, varint_field, write_varint
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
)
from compat_restore.names import OBJECT_GRAPH_KEY
from compat_restore.tensors import DType, Slice

HEADER = varint_field(1, 1)
FOUR = bytes(16)
REASONS = (DamagedCheckpointError, CheckpointFormatError, CheckpointNotFoundError)


@pytest.fixture(scope="module")
def server():
    """Give a process that reads what it is told, within limits."""
    command = [sys.executable, Path(__file__).with_name("hostile.py"), "SERVE"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def bounded(server):
    """Return a function that reads a checkpoint within the limits; it returns what was told."""

    def read(path):
        server.stdin.write(f"{path}\n")
        server.stdin.flush()
        told, seconds, memory = json.loads(server.stdout.readline())
        assert "Traceback" not in told, told
        assert len(told) < 20_000
        assert seconds < MOST_SECONDS
        assert memory < MOST_MEMORY
        return told

    return read


def entry(data=FOUR, dtype=DType.float32, shape=(4,), **changed):
    fields = {"offset": 0, "size": len(data), "checksum": mask(crc32c(data))} | changed
    return BundleEntry(dtype, shape, **fields).encode()


def bundle(folder, entries, data=FOUR):
    return put(folder, HEADER, {b"w": entry()} | entries, [data])


def raw_entry(dims, parts):
    """Return an entry whose shape and parts are given as messages."""
    return varint_field(1, 1) + bytes_field(2, dims) + parts


def dims(*sizes):
    return b"".join(bytes_field(2, varint_field(1, size)) for size in sizes)


# -- large numbers -------------------------------------------------------------------------------


def test_a_tensor_of_16_gib_in_16_bytes_is_told(bounded, tmp_path):
    path = bundle(tmp_path, {b"big": entry(shape=(1 << 32,), size=16 << 30)})
    assert "ends at byte 17179869184" in bounded(path)


@pytest.mark.parametrize("count", [1 << 32, 1 << 59, 1 << 62, (1 << 63) - 1])
def test_strings_without_number_are_told(bounded, tmp_path, count):
    path = bundle(tmp_path, {b"s": entry(dtype=DType.string, shape=(count,))})
    assert "strings in 16 bytes" in (told := bounded(path)) or "larger than any memory" in told


def test_a_string_of_2_to_the_62_bytes_is_told(bounded, tmp_path):
    data = write_varint(1 << 62) + bytes(20)
    path = bundle(tmp_path, {b"s": entry(data, DType.string, (1,))}, data)
    assert "are announced" in bounded(path)


@pytest.mark.parametrize("sizes", [(1 << 40, 1 << 40), (1 << 62, 0), (1 << 31,) * 32])
def test_shapes_larger_than_any_memory_are_told(bounded, tmp_path, sizes):
    path = bundle(tmp_path, {b"big": entry(shape=sizes, size=0)})
    assert bounded(path)


def test_an_empty_tensor_may_have_an_axis_of_any_length(bounded, tmp_path):
    assert not bounded(bundle(tmp_path, {b"none": entry(b"", shape=(1 << 40, 0))}))


def test_an_empty_tensor_takes_no_bytes_wherever_it_says_that_they_are(bounded, tmp_path):
    assert not bounded(bundle(tmp_path, {b"none": entry(b"", shape=(0,), offset=1 << 62)}))


def test_three_million_dimensions_are_told(bounded, tmp_path):
    path = bundle(tmp_path, {b"w": raw_entry(bytes_field(2, b"") * 3_000_000, b"")})
    assert "more than 32 dimensions" in bounded(path)


@pytest.mark.parametrize("offset", [1 << 62, (1 << 63) - 8, (1 << 64) - 8])
def test_offsets_without_bound_are_told(bounded, tmp_path, offset):
    assert "cut short" in bounded(bundle(tmp_path, {b"w": entry(offset=offset)}))


@pytest.mark.parametrize("shard", [1, 99_999, 1 << 40, (1 << 64) - 1])
def test_shard_numbers_out_of_range_are_told(bounded, tmp_path, shard):
    assert "into data file" in bounded(bundle(tmp_path, {b"w": entry(shard=shard)}))


@pytest.mark.parametrize("shards", [0, 100_000, 1 << 40, (1 << 64) - 1])
def test_numbers_of_shards_that_no_name_can_have_are_told(bounded, tmp_path, shards):
    prefix = put(tmp_path, varint_field(1, shards) + b"\x1a\0", {b"w": entry()}, [FOUR])
    assert "data files" in bounded(prefix)


def test_as_many_shards_as_can_be_are_not_looked_for_one_by_one(bounded, tmp_path):
    prefix = put(tmp_path, varint_field(1, 99_999), {b"w": entry()}, [FOUR])
    assert "data-00000-of-99999' is missing" in bounded(prefix)


@pytest.mark.parametrize("length", [11, 100_000])
def test_overlong_varints_are_told(bounded, tmp_path, length):
    overlong = b"\x08" + b"\x80" * length + b"\0"
    assert "no varint" in bounded(bundle(tmp_path, {b"w": overlong}))


# -- large counts --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_million_parts_are_told(bounded, tmp_path, rank):
    part = bytes_field(7, encode_slice(Slice((0,) * rank, (1,) * rank)))
    path = bundle(tmp_path, {b"w": raw_entry(dims(*[1000] * rank), part * 1_000_000)})
    assert "more than 100000 parts" in bounded(path)


def test_a_million_parts_of_a_v1_tensor_are_told(bounded, tmp_path):
    named = bytes_field(1, b"w") + varint_field(3, 1)
    meta = named + bytes_field(4, b"") * 1_000_000
    (tmp_path / "m").write_bytes(table_of({b"": bytes_field(1, bytes_field(1, meta))}))
    assert "more than 100000 parts" in bounded(tmp_path / "m")


def test_a_v1_tensor_that_is_announced_again_and_again_is_read_in_linear_time(bounded, tmp_path):
    part = Slice((0,), (1,))
    named = bytes_field(1, b"w") + bytes_field(2, dims(4)) + varint_field(3, 1)
    meta = bytes_field(1, named + bytes_field(4, encode_slice(part))) * 30_000
    (tmp_path / "m").write_bytes(table_of({b"": bytes_field(1, meta)}))
    assert "1 parts hold 1 elements" in bounded(tmp_path / "m")


def test_parts_that_share_bytes_do_not_make_a_small_file_a_large_tensor(bounded, tmp_path):
    parts = [Slice((number * 4,), (4,)) for number in range(20_000)]
    entries = {slice_key("w", part): entry() for part in parts}
    whole = BundleEntry(DType.float32, (80_000,), slices=tuple(parts))
    assert "share bytes" in bounded(bundle(tmp_path, entries | {b"w": whole.encode()}))


def test_a_hundred_thousand_entries_of_one_tensor_s_bytes_are_no_more_than_that(tmp_path):
    entries = {b"w%06d" % number: entry() for number in range(100_000)}
    begun = time.process_time()
    with open_checkpoint(bundle(tmp_path, entries)) as reader:
        assert len(reader.specs()) == 100_001
    assert time.process_time() - begun < MOST_SECONDS


def row(shared, suffix, value):
    """Return an entry of a block."""
    return b"".join(map(write_varint, [shared, len(suffix), len(value)])) + suffix + value


def test_keys_that_repeat_a_long_one_are_told(bounded, tmp_path):
    # As `TableBuilder` writes them each 16th key would be whole; here each shares all it can.
    long = 100_000
    out = row(0, b"", HEADER) + row(0, b"k" * long, entry())
    out += b"".join(row(long, b"%05d" % number, entry()) for number in range(20_000))
    contents = out + bytes(4) + (1).to_bytes(4, "little")
    (tmp_path / "m.index").write_bytes(one_block(contents, b"l"))
    (tmp_path / "m.data-00000-of-00001").write_bytes(FOUR)
    assert "keys of over" in bounded(tmp_path / "m")


def test_keys_that_repeat_a_long_one_in_a_compressed_block_are_told(bounded, tmp_path):
    # Both compressions together: bytes that compress well pay for keys that repeat a long one. The
    # emoji has every character of a name take four bytes.
    long = "\N{GRINNING FACE}".encode() + b"k" * 4000
    value = entry() + bytes_field(15, bytes(60))
    out = row(0, b"", HEADER) + row(0, long, value)
    out += b"".join(row(len(long), b"%06d" % number, value) for number in range(40_000))
    contents = out + bytes(4) + (1).to_bytes(4, "little")
    packed = bytes(cramjam.snappy.compress_raw(contents))
    assert len(packed) < 1 << 20
    (tmp_path / "m.index").write_bytes(one_block(packed, b"\xff" * 4, kind=1))
    (tmp_path / "m.data-00000-of-00001").write_bytes(FOUR)
    assert "keys of over" in bounded(tmp_path / "m")


@pytest.mark.parametrize("kind", [0, 1])
def test_keys_of_seven_hundred_characters_that_share_nearly_all_are_read(tmp_path, kind):
    scope = b"/".join(b"block_%02d" % number for number in range(87))[:690]
    before, out, restarts = b"", row(0, b"", HEADER), [0]
    for number in range(20_000):
        key, data = scope + b"%07d" % number, entry(offset=16 * number)
        shared = 0
        if number % 16 == 0:  # as TensorFlow and LevelDB do
            restarts.append(len(out))
        else:
            shared = next(at for at in range(700) if key[at : at + 1] != before[at : at + 1])
        out += row(shared, key[shared:], data)
        before = key
    out += b"".join(at.to_bytes(4, "little") for at in (*restarts, len(restarts)))
    if kind:
        out = bytes(cramjam.snappy.compress_raw(out))
    (tmp_path / "m.index").write_bytes(one_block(out, b"z", kind))
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(16 * 20_000))
    with open_checkpoint(tmp_path / "m") as reader:
        assert len(reader.specs()) == 20_000


def test_a_million_entries_of_no_bytes_in_a_block_are_told(bounded, tmp_path):
    contents = bytes(3_000_000) + bytes(4) + (1).to_bytes(4, "little")
    (tmp_path / "m.index").write_bytes(one_block(contents, b"z"))
    assert "keys must ascend" in bounded(tmp_path / "m")


# -- compression ---------------------------------------------------------------------------------


def one_block(contents, bound, kind=0):
    """Return a table of one block of these contents."""
    out = bytearray()

    def add(data, kind):
        handle = BlockHandle(len(out), len(data)).encode()
        stored = data + bytes([kind])
        out.extend(stored + mask(crc32c(stored)).to_bytes(4, "little"))
        return handle

    first = add(contents, kind)
    empty = bytes(4) + (1).to_bytes(4, "little")
    metaindex = add(empty, 0)
    row = b"\0" + write_varint(len(bound)) + write_varint(len(first)) + bound + first
    index = add(row + empty, 0)
    return bytes(out) + (metaindex + index).ljust(40, b"\0") + MAGIC


@pytest.mark.parametrize("claim", [1 << 20, 1 << 32, 1 << 34, 1 << 62])
@pytest.mark.parametrize("ending", [".index", ""])
def test_a_snappy_block_that_claims_to_be_large_is_told(bounded, tmp_path, claim, ending):
    packed = write_varint(claim) + bytes(cramjam.snappy.compress_raw(bytes(5000)))[2:]
    (tmp_path / f"m{ending}").write_bytes(one_block(packed, b"z", kind=1))
    assert "claims to hold" in bounded(tmp_path / "m")


def test_a_snappy_block_of_nothing_but_zeros_is_told_before_it_is_all_entries(bounded, tmp_path):
    packed = bytes(cramjam.snappy.compress_raw(bytes(32 << 20)))
    assert len(packed) < 2 << 20
    (tmp_path / "m").write_bytes(one_block(packed, b"z", kind=1))
    assert bounded(tmp_path / "m")


# -- deep and round ------------------------------------------------------------------------------


def child(name, node):
    return bytes_field(1, varint_field(1, node) + bytes_field(2, name))


def attribute(key):
    return bytes_field(2, bytes_field(1, b"VARIABLE_VALUE") + bytes_field(3, key))


def graph(folder, *nodes):
    """Write an object-based checkpoint with these nodes; return its prefix."""
    stored, crc = encode_strings([b"".join(bytes_field(1, node) for node in nodes)])
    row = BundleEntry(DType.string, (), 0, 16, len(stored), mask(crc))
    return bundle(folder, {OBJECT_GRAPH_KEY.encode(): row.encode()}, FOUR + stored)


CHAIN = 100_000


def test_a_chain_of_a_hundred_thousand_objects_is_read(bounded, tmp_path):
    nodes = [child(b"a", number + 1) for number in range(CHAIN)]
    assert not bounded(graph(tmp_path, *nodes, attribute(b"w")))


def test_a_chain_whose_paths_would_fill_gigabytes_is_told(bounded, tmp_path):
    nodes = [child(b"a", number + 1) + attribute(b"k%d" % number) for number in range(CHAIN)]
    assert "paths of objects" in bounded(graph(tmp_path, *nodes, b""))


def test_objects_of_long_names_one_in_another_are_told(bounded, tmp_path):
    nodes = [child(b"a" * 1000, n + 1) + attribute(b"k%d" % n) for n in range(3000)]
    assert "paths of objects" in bounded(graph(tmp_path, *nodes, b""))


def test_paths_as_long_as_the_keys_say_are_read():
    path = ["layer"] * 3000
    nodes = [
        child(b"layer", n + 1) + attribute("/".join(path[:n]).encode() + b"/.ATTRIBUTES/V")
        for n in range(1500)
    ]
    found = ObjectGraph.decode(b"".join(bytes_field(1, node) for node in [*nodes, b""]))
    assert found.variables["/".join(path[:1499]) + "/.ATTRIBUTES/V"].path == "/".join(path[:1499])


def test_circles_of_objects_end(bounded, tmp_path):
    count = 2000
    nodes = [
        b"".join(child(b"c%d" % step, (number + step) % count) for step in range(10))
        for number in range(count)
    ]
    assert not bounded(graph(tmp_path, *nodes))


def test_a_million_objects_are_read(bounded, tmp_path):
    assert not bounded(graph(tmp_path, *[b""] * 500_000))


def test_messages_in_messages_are_not_followed_down(bounded, tmp_path):
    deep = b""
    while len(deep) < 500_000:
        deep = bytes_field(1, deep) + b"\x08\0"
    assert "malformed" in bounded(graph(tmp_path, deep))
    assert bounded(bundle(tmp_path, {b"w": bytes_field(2, deep)}))


# -- what is no file, and names that lead elsewhere ----------------------------------------------


def hostile_names():
    return [
        "../x",
        "/etc/passwd",
        "..",
        "a/../../b",
        "C:\\x",
        "x" * 70_000,
        "a\nb",
        "\x1b[2J",
        "%s%n",
    ]


def test_names_that_are_paths_are_names(tmp_path):
    where = tmp_path / "in"
    where.mkdir()
    rows = {name.encode(): entry() for name in hostile_names()}
    path = bundle(where, rows)
    before = sorted(os.listdir(where))
    with open_checkpoint(path) as reader:
        assert set(reader.specs()) == {"w", *hostile_names()}
        assert all(reader.read(name).tolist() == [0] * 4 for name in hostile_names())
    assert sorted(os.listdir(where)) == before
    assert os.listdir(tmp_path) == ["in"]


def special(path, kind):
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "terminal":
            path.symlink_to("/dev/tty")
        case "circle":
            path.symlink_to(path.name)
        case "nowhere":
            path.symlink_to("nothing")


@pytest.fixture
def impatient():
    """End a test that hangs, as one that opens a FIFO would."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


KINDS = ["fifo", "directory", "device", "terminal", "circle", "nowhere"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["", ".index", ".data-00000-of-00001"])
def test_what_is_no_file_is_told_and_never_waited_for(tmp_path, kind, ending):
    path = Path(bundle(tmp_path, {}))
    place = path.with_name(path.name + ending)
    if ending:
        place.unlink()
    else:
        path.with_name("m.index").unlink()
    special(place, kind)
    with pytest.raises(CompatRestoreError) as told:
        open_checkpoint(path)
    assert isinstance(told.value, CheckpointNotFoundError)
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["fifo", "device", "terminal", "circle", "nowhere"])
def test_what_is_no_file_does_not_hide_a_checkpoint_beside_it(tmp_path, kind):
    path = bundle(tmp_path, {})
    for name in ("checkpoint", "other.index", "other", "m.meta", "saved_model.pb"):
        special(tmp_path / name, kind)
    with open_checkpoint(path) as reader:
        assert reader.read("w").tolist() == [0] * 4


@pytest.mark.usefixtures("impatient")
def test_a_file_that_turns_into_a_fifo_after_it_was_looked_at_is_not_waited_for(
    tmp_path, monkeypatch
):
    from compat_restore.checkpoint import files

    os.mkfifo(tmp_path / "m")
    monkeypatch.setattr(files, "is_regular_file", lambda _: True)
    with pytest.raises(CheckpointNotFoundError, match="no regular file"):
        files.LocalFile(str(tmp_path / "m"))


def test_links_to_files_are_followed_and_never_written_through(tmp_path):
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.mkdir()
    path = Path(bundle(real, {}))
    for name in os.listdir(real):
        (linked / name).symlink_to(real / name)
    before = {name: (real / name).read_bytes() for name in os.listdir(real)}
    with open_checkpoint(linked / "m") as reader:
        assert reader.read("w").tolist() == [0] * 4
    write_bundle(linked / "m", [], overwrite=True)
    assert {name: (real / name).read_bytes() for name in os.listdir(real)} == before
    with open_checkpoint(path) as reader:
        assert reader.read("w").tolist() == [0] * 4


@pytest.mark.parametrize(
    "named",
    ["../outside/m", "/etc/passwd", "memory://m", "http://127.0.0.1:9/m", "file:///dev/zero"],
)
@pytest.mark.usefixtures("impatient")
def test_a_state_file_never_makes_a_reader_leave_the_file_system(tmp_path, named):
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
    with pytest.raises(REASONS):
        open_checkpoint(tmp_path)


def test_the_command_line_tells_of_a_bomb_in_a_line_or_two(tmp_path):
    path = bundle(tmp_path, {b"big\x1b[2J": entry(shape=(1 << 32,), size=16 << 30)})
    command = [sys.executable, "-m", "compat_restore", "verify", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) <= 2


def test_the_limit_on_memory_is_one():
    code = "import hostile; hostile.limit_memory(); bytes(2 * hostile.MOST_MEMORY)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=False
    )
    assert b"MemoryError" in done.stderr
    assert MOST_MEMORY == 256 << 20
