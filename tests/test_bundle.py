from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from formats import flipped, rows_of, table_of, truth_of
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore import open_checkpoint
from compat_restore.checkpoint import bundle as bundle_module
from compat_restore.checkpoint import wire
from compat_restore.checkpoint.bundle import (
    BundleEntry,
    BundleReader,
    _usual_entries,
    data_file,
)
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.slices import slice_key
from compat_restore.checkpoint.strings import decode_strings, encode_strings
from compat_restore.checkpoint.table import TableReader
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    TensorNotFoundError,
    UsageError,
)
from compat_restore.names import RoleKind
from compat_restore.tensors import DType, Slice, element_count

GOLDEN = ("plain", "partitioned", "sharded", "dtypes", "object_based")


def header(shards=1, endianness=0):
    return wire.varint_field(1, shards) + wire.varint_field(2, endianness)


def bundle(folder, entries, data=b"", head=None):
    """Write a bundle of one data file with right table checksums; return its prefix."""
    table = {b"": header() if head is None else head}
    for name, entry in entries.items():
        key = name if isinstance(name, bytes) else name.encode()
        table[key] = entry.encode() if isinstance(entry, BundleEntry) else entry
    prefix = folder / "model.ckpt"
    folder.joinpath("model.ckpt.index").write_bytes(table_of(table))
    folder.joinpath("model.ckpt.data-00000-of-00001").write_bytes(data)
    return str(prefix)


def entry_of(data, dtype, shape, offset=0, **changed):
    fields = {"offset": offset, "size": len(data), "checksum": mask(crc32c(data)), **changed}
    return BundleEntry(dtype, shape, **fields)


def read_all(prefix):
    """Return every tensor of a checkpoint, read and verified."""
    with open_checkpoint(prefix) as reader:
        found = {name: reader.read(name) for name in reader.specs()}
        reader.verify(reader.specs())
        return found


@pytest.mark.parametrize("folder", GOLDEN)
def test_every_tensor_is_what_tensorflow_held_when_it_wrote_it(golden, folder):
    with open_checkpoint(golden / folder) as reader:
        assert rows_of(reader) == truth_of(golden / folder)
        reader.verify(reader.specs())


def test_the_format_says_what_a_bundle_is(golden):
    formats = {}
    for folder in GOLDEN:
        with open_checkpoint(golden / folder) as reader:
            formats[folder] = reader.format
    assert formats == {
        "plain": "V2 tensor bundle, name-based",
        "partitioned": "V2 tensor bundle, name-based",
        "sharded": "V2 tensor bundle, name-based, 3 data files",
        "dtypes": "V2 tensor bundle, name-based",
        "object_based": "V2 tensor bundle, object-based",
    }


def test_a_partitioned_variable_is_one_tensor_with_its_parts_in_the_spec(golden):
    with open_checkpoint(golden / "partitioned") as reader:
        spec = reader.specs()["row/w"]
        assert spec.shape == (7, 3)
        assert spec.slices == (
            Slice((0, 0), (3, 3)),
            Slice((3, 0), (2, 3)),
            Slice((5, 0), (2, 3)),
        )
        assert not [name for name in reader.specs() if "\0" in name or "part_" in name]


def test_arrays_belong_to_the_caller(golden):
    with open_checkpoint(golden / "plain") as reader:
        first = reader.read("net/fc/kernel")
        first[:] = 0
        assert reader.read("net/fc/kernel").any()


def test_stored_bytes_are_those_that_are_read(golden):
    with open_checkpoint(golden / "sharded") as reader:
        for name in reader.specs():
            [stored] = reader.stored(name)
            raw = stored.source.read(stored.offset, stored.size)
            assert raw == reader.read(name).tobytes()
            assert stored.checksum == mask(crc32c(raw))


def test_a_partitioned_tensor_is_stored_in_as_many_places_as_it_has_parts(golden):
    with open_checkpoint(golden / "partitioned") as reader:
        spec, places = reader.specs()["row/w"], reader.stored("row/w")
        assert len(places) == len(spec.slices) > 1
        rows = b"".join(place.source.read(place.offset, place.size) for place in places)
        assert rows == reader.read("row/w").tobytes()
        assert len(reader.stored("whole")) == 1


def test_a_name_that_is_not_there_is_told_with_its_neighbours(golden):
    with open_checkpoint(golden / "plain") as reader:
        with pytest.raises(TensorNotFoundError, match=r"did you mean 'net/fc/kernel'"):
            reader.read("net/fc/kernl")
        with pytest.raises(TensorNotFoundError, match=r'no ":0"; ask for \'net/fc/bias\''):
            reader.read("net/fc/bias:0")


def test_names_in_hostile_letters_are_read(tmp_path):
    data = np.arange(2, dtype="<f4").tobytes()
    names = ["\U0001f600/w", "a b\tc", "w:0", "a//b/", "x" * 700, "\x01"]
    prefix = bundle(tmp_path, {n: entry_of(data, DType.float32, (2,)) for n in names}, data)
    assert sorted(read_all(prefix)) == sorted(names)


@pytest.mark.parametrize("dtype", ["float32", "int64", "complex64", "bfloat16", "float16", "bool"])
def test_a_big_endian_bundle_is_read_to_the_same_values(tmp_path, golden, dtype):
    with open_checkpoint(golden / "dtypes") as reader:
        array = reader.read(f"{dtype}/matrix")
    data = array.byteswap().tobytes()
    entry = entry_of(data, DType(dtype), (2, 3))
    prefix = bundle(tmp_path, {"w": entry}, data, head=header(1, endianness=1))
    assert read_all(prefix)["w"].tobytes() == array.tobytes()
    with open_checkpoint(prefix) as reader:
        assert reader.stored("w") == ()


# -- strings -------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_strings_round_trip(strings):
    data, crc = encode_strings(strings)
    assert decode_strings(data, len(strings)) == (strings, crc)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.data())
def test_a_flipped_byte_of_strings_is_never_the_same_strings_with_the_same_crc(strings, data):
    stored, crc = encode_strings(strings)
    at = data.draw(st.integers(0, len(stored) - 1))
    try:
        found = decode_strings(flipped(stored, at, data.draw(st.integers(1, 255))), len(strings))
    except wire.WireError:
        return
    assert found[1] != crc


def test_strings_are_stored_as_tensorflow_stores_them(golden):
    with open_checkpoint(golden / "dtypes") as reader:
        strings = [n for n, spec in reader.specs().items() if spec.dtype is DType.string]
        assert len(strings) == 4
        for name in strings:
            [stored] = reader.stored(name)
            data, crc = encode_strings(reader.read(name).ravel().tolist())
            assert data == stored.source.read(stored.offset, stored.size)
            assert mask(crc) == stored.checksum


def test_a_string_of_no_bytes_and_one_of_a_nul_are_told_apart(golden):
    with open_checkpoint(golden / "dtypes") as reader:
        assert reader.read("string/empty_scalar")[()] == b""
        assert reader.read("string/awkward")[0].tolist() == [b"", b"\0", b"a\0b"]


# -- damage --------------------------------------------------------------------------------------


@pytest.fixture
def copied(golden, tmp_path):
    """Return a function that copies a golden checkpoint to where it may be damaged."""

    def copy(folder):
        return shutil.copytree(golden / folder, tmp_path / folder)

    return copy


@pytest.mark.parametrize("folder", GOLDEN)
def test_every_flipped_byte_of_a_data_file_is_damage(copied, folder):
    where = copied(folder)
    for path in sorted(where.glob("*.data-*")):
        whole = path.read_bytes()
        for at in range(0, len(whole), 1 + len(whole) // 60):
            path.write_bytes(flipped(whole, at, 0x10))
            with pytest.raises(DamagedCheckpointError), open_checkpoint(where) as reader:
                rows_of(reader)
            with pytest.raises(DamagedCheckpointError), open_checkpoint(where) as reader:
                reader.verify(reader.specs())
        path.write_bytes(whole)


@pytest.mark.parametrize("folder", GOLDEN)
def test_a_data_file_cut_short_anywhere_is_damage_when_it_is_opened(copied, folder):
    where = copied(folder)
    for path in sorted(where.glob("*.data-*")):
        whole = path.read_bytes()
        for length in range(0, len(whole), 1 + len(whole) // 60):
            path.write_bytes(whole[:length])
            with pytest.raises(DamagedCheckpointError, match="cut short"):
                open_checkpoint(where)
        path.write_bytes(whole)


@pytest.mark.parametrize("folder", GOLDEN)
def test_a_missing_data_file_is_told_by_its_name(copied, folder):
    where = copied(folder)
    for path in sorted(where.glob("*.data-*")):
        moved = path.rename(path.with_name("elsewhere"))
        with pytest.raises(CheckpointNotFoundError, match=path.name):
            open_checkpoint(where)
        moved.rename(path)


def test_an_empty_index_is_damage(copied):
    where = copied("plain")
    (where / "model.ckpt.index").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="never written"):
        open_checkpoint(where)


def test_a_git_lfs_pointer_for_the_data_is_told_with_its_cure(copied):
    where = copied("plain")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (where / "model.ckpt.data-00000-of-00001").write_bytes(pointer)
    with pytest.raises(DamagedCheckpointError, match="git lfs pull"):
        open_checkpoint(where)


def test_data_of_another_checkpoint_of_the_same_size_is_damage(copied):
    where = copied("plain")
    path = where / "model.ckpt.data-00000-of-00001"
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with open_checkpoint(where) as reader, pytest.raises(DamagedCheckpointError, match="checksum"):
        reader.verify(reader.specs())


def test_bytes_after_the_last_tensor_are_nobody_s_business(copied, golden):
    where = copied("plain")
    with (where / "model.ckpt.data-00000-of-00001").open("ab") as file:
        file.write(b"more")
    with open_checkpoint(where) as reader:
        assert rows_of(reader) == truth_of(golden / "plain")


FOUR = np.arange(4, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (b"\x08\x01\x12\x00\x28\x08", r"8 bytes, where float32\[\] takes 4"),
        (entry_of(FOUR, DType.float32, (5,)), r"16 bytes, where float32\[5\] takes 20"),
        (entry_of(FOUR, DType.string, (1 << 40,)), "1099511627776 strings in 16 bytes"),
        (entry_of(FOUR, DType.float32, (1 << 40, 1 << 40, 0)), "larger than any memory"),
        (b"\x08\xff\x01\x12\x00", "element type number 255 is unknown"),
        (b"\x08\x65\x12\x00", "element type number 101 is unknown"),  # a ref type
        (b"\x12\x00", "element type number 0"),
        (b"\xff", "no varint"),
        (b"\x0a\x01a", "a number was expected"),
        (entry_of(FOUR, DType.float32, (4,), shard=1), "into data file 1 of 1"),
        (entry_of(FOUR, DType.float32, (4,), shard=1 << 60), "into data file"),
        (entry_of(FOUR, DType.float32, (4,), offset=8), "ends at byte 24"),
        (entry_of(FOUR, DType.float32, (4,), offset=1 << 62), "cut short"),
    ],
)
def test_an_entry_that_contradicts_itself_is_damage_when_the_checkpoint_is_opened(
    tmp_path, entry, what
):
    with pytest.raises(DamagedCheckpointError, match=what):
        open_checkpoint(bundle(tmp_path, {"w": entry}, FOUR))


def test_a_key_that_is_no_text_is_damage(tmp_path):
    entry = entry_of(FOUR, DType.float32, (4,))
    with pytest.raises(DamagedCheckpointError, match="malformed entry"):
        open_checkpoint(bundle(tmp_path, {b"w\xff": entry}, FOUR))


@pytest.mark.parametrize(
    ("head", "error", "what"),
    [
        (b"", CheckpointFormatError, "no tensor bundle"),
        (b"\x08", DamagedCheckpointError, "malformed header"),
        (header(0), CheckpointFormatError, "no tensor bundle"),
        (b"\x1a\x00", DamagedCheckpointError, "0 data files"),
        (header(100_000), DamagedCheckpointError, "100000 data files"),
    ],
)
def test_a_header_that_cannot_be_is_an_error(tmp_path, head, error, what):
    with pytest.raises(error, match=what):
        open_checkpoint(bundle(tmp_path, {}, head=head))


def test_a_table_without_a_header_is_no_bundle(tmp_path):
    (tmp_path / "m.index").write_bytes(table_of({b"a": b"1"}))
    with pytest.raises(CheckpointFormatError, match="its first key is b'a'"):
        open_checkpoint(tmp_path / "m")


def parted(tmp_path, *parts, shape=(4,), **stored):
    """Write a bundle with a partitioned "w" of these slices, whose values are all FOUR's."""
    entries = {"w": BundleEntry(DType.float32, shape, slices=tuple(parts))}
    for part in parts[: stored.pop("there", None)]:
        lengths = part.resolve(shape)[1] if len(part.starts) == len(shape) else (1,)
        data = FOUR[: 4 * int(np.prod(lengths))]
        fields = {"dtype": DType.float32, "shape": lengths, **stored}
        entries[slice_key("w", part)] = entry_of(data, **fields)
    return bundle(tmp_path, entries, FOUR)


def test_parts_are_put_where_their_slices_say(tmp_path):
    last, first = Slice((3,), (1,)), Slice((0,), (3,))
    entries = {
        "w": BundleEntry(DType.float32, (4,), slices=(last, first)),
        slice_key("w", last): entry_of(FOUR[:4], DType.float32, (1,)),
        slice_key("w", first): entry_of(FOUR[4:], DType.float32, (3,), offset=4),
    }
    assert read_all(bundle(tmp_path, entries, FOUR))["w"].tolist() == [1, 2, 3, 0]


def test_parts_that_share_bytes_are_damage_before_memory_is_asked_for(tmp_path):
    prefix = parted(tmp_path, *HALVES)
    with open_checkpoint(prefix) as reader:
        with pytest.raises(DamagedCheckpointError, match="share bytes"):
            reader.verify(["w"])
        with pytest.raises(DamagedCheckpointError, match="share bytes"):
            reader.read("w")


@pytest.mark.parametrize("parts", [(0, 1), (1, 2)])
def test_verifying_finds_what_reading_would_find(tmp_path, parts):
    slices = [Slice((start,), (2,)) for start in parts]
    with (
        open_checkpoint(parted(tmp_path, *slices)) as reader,
        pytest.raises(DamagedCheckpointError, match="do not fit"),
    ):
        reader.verify(["w"])


HALVES = (Slice((0,), (2,)), Slice((2,), (2,)))


def test_parts_are_checked_once_however_often_they_are_asked_for(golden, monkeypatch):
    asked = []
    real = bundle_module.check_tiling
    monkeypatch.setattr(
        bundle_module, "check_tiling", lambda *given: (asked.append(given), real(*given))
    )
    with BundleReader(str(golden / "partitioned" / "model.ckpt")) as reader:
        name = next(name for name, spec in reader.specs().items() if spec.slices)
        for _ in range(3):
            reader.stored(name)
            reader.read(name)
            reader.verify([name])
    assert len(asked) == 1


@pytest.mark.parametrize("step", ["_check_data_files", "_object_graph", "_by_variable_name"])
def test_an_error_at_any_step_of_opening_leaves_no_file_open(copied, monkeypatch, step):
    from compat_restore.checkpoint import files

    opened = []
    real = files.open_source

    def opening(path):
        opened.append(real(path))
        return opened[-1]

    def fail(reader):
        reader._file(0)
        raise DamagedCheckpointError("told")

    monkeypatch.setattr(bundle_module, "open_source", opening)
    monkeypatch.setattr(BundleReader, step, fail)
    with pytest.raises(DamagedCheckpointError, match="told"):
        BundleReader(str(copied("plain") / "model.ckpt"))
    assert len(opened) == 2
    for source in opened:
        with pytest.raises(UsageError, match="is closed"):
            source.read(0, 1)


def test_a_missing_part_is_damage(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="number 1 is missing"):
        read_all(parted(tmp_path, *HALVES, there=1))


def test_parts_of_another_dtype_or_shape_than_announced_are_damage(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"stored as int32\[2\], not as float32\[2\]"):
        read_all(parted(tmp_path, *HALVES, dtype=DType.int32))
    entries = {"w": BundleEntry(DType.float32, (4,), slices=HALVES)}
    for part in HALVES:
        entries[slice_key("w", part)] = entry_of(FOUR[:8], DType.float32, (1, 2))
    prefix = bundle(tmp_path, entries, FOUR)
    with pytest.raises(DamagedCheckpointError, match=r"stored as float32\[1, 2\], not as"):
        read_all(prefix)


@pytest.mark.parametrize(
    "parts",
    [(HALVES[0],), (HALVES[0], Slice((1,), (2,))), (*HALVES, HALVES[0])],
    ids=["a gap", "an overlap", "one too many"],
)
def test_parts_that_do_not_tile_are_damage_and_never_uninitialised_memory(tmp_path, parts):
    with pytest.raises(DamagedCheckpointError, match="do not fit"):
        read_all(parted(tmp_path, *parts))


def test_parts_that_announce_more_than_any_memory_are_damage_before_memory_is_asked_for(tmp_path):
    half = 1 << 50
    parts = (Slice((0,), (half,)), Slice((half,), (half,)))
    entries = {"w": BundleEntry(DType.float32, (2 * half,), slices=parts)}
    for part in parts:
        entries[slice_key("w", part)] = entry_of(FOUR, DType.float32, (4,))
    with pytest.raises(DamagedCheckpointError, match="stored as"):
        read_all(bundle(tmp_path, entries, FOUR))


def test_a_resource_or_variant_is_listed_and_says_why_it_cannot_be_read(tmp_path):
    prefix = bundle(tmp_path, {"table": entry_of(FOUR, DType.variant, ())}, FOUR)
    with open_checkpoint(prefix) as reader:
        assert reader.specs()["table"].nbytes == 16
        with pytest.raises(UsageError, match="opaque"):
            reader.read("table")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_to_an_entry_under_right_checksums_is_read_or_one_of_our_errors(
    golden, tmp_path_factory, data
):
    folder = data.draw(st.sampled_from(GOLDEN))
    where = tmp_path_factory.mktemp("fuzz") / folder
    shutil.copytree(golden / folder, where)
    index = next(where.glob("*.index"))
    with _local(index) as source:
        entries = dict(TableReader(source).items())
    key = data.draw(st.sampled_from(sorted(entries)))
    value = bytearray(entries[key])
    start = data.draw(st.integers(0, len(value)))
    value[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    entries[key] = bytes(value)
    index.write_bytes(table_of(entries))
    try:
        read_all(where)
    except CompatRestoreError as error:
        assert str(error)  # noqa: PT017
    finally:
        shutil.rmtree(where)


def _local(path):
    from compat_restore.checkpoint.files import LocalFile

    return LocalFile(str(path))


# -- traps ---------------------------------------------------------------------------------------

PEER_READS = """
import sys, tensorflow as tf
reader = tf.train.load_checkpoint(sys.argv[1])
print("opened", flush=True)
for name in ("row/w", "col/w"):
    try:
        reader.get_tensor(name)
        print("read", flush=True)
    except Exception:
        print("failed", flush=True)
"""


def peer(prefix):
    command = [sys.executable, "-c", PEER_READS, str(prefix)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_trap_23_a_truncated_data_file_is_one_error_when_it_is_opened(copied):
    where = copied("partitioned")
    path = where / "model.ckpt.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedCheckpointError, match="100 bytes, and tensor"):
        open_checkpoint(where)


def test_trap_23_a_missing_data_file_is_one_error_when_it_is_opened(copied):
    where = copied("partitioned")
    (where / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointNotFoundError, match="not the weights"):
        open_checkpoint(where)


def test_trap_23_a_foreign_data_file_is_one_error(copied):
    where = copied("partitioned")
    path = where / "model.ckpt.data-00000-of-00001"
    path.write_bytes(b"\x5a" * len(path.read_bytes()))
    with open_checkpoint(where) as reader, pytest.raises(DamagedCheckpointError, match="checksum"):
        reader.read("row/w")


@pytest.mark.tensorflow
def test_trap_23_tensorflow_opens_what_is_cut_short_and_aborts_at_the_second_read(copied):
    where = copied("partitioned")
    path = where / "model.ckpt.data-00000-of-00001"
    assert peer(where / "model.ckpt").stdout.split() == ["opened", "read", "read"]
    path.write_bytes(path.read_bytes()[:100])
    died = peer(where / "model.ckpt")
    assert died.stdout.split() == ["opened", "failed"]
    assert died.returncode == -signal.SIGABRT


def test_entries_round_trip_through_their_message():
    parts = (Slice((0, 0), (2, None)), Slice((2, 0), (0, None)))
    for entry in (
        BundleEntry(DType.float32, (3, 0), 2, 7, 0, 0xFFFFFFFF),
        BundleEntry(DType.uint4, (), 0, 0, 1, 0),
        BundleEntry(DType.bool, (2, 5), slices=parts),
    ):
        assert BundleEntry.decode(entry.encode()) == entry


def test_data_files_are_named_as_tensorflow_names_them():
    assert data_file("a/m", 3, 12) == "a/m.data-00003-of-00012"


def test_bookkeeping_and_slots_of_a_bundle_have_their_roles(golden):
    with open_checkpoint(golden / "plain") as reader:
        kinds = {name: role.kind for name, role in reader.roles().items()}
    assert [kinds[n] for n in ("beta1_power", "global_step")] == [RoleKind.BOOKKEEPING] * 2
    assert kinds["net/fc/kernel/Adam_1"] is RoleKind.SLOT
    assert kinds["net/conv_1/BatchNorm/moving_mean"] is RoleKind.VARIABLE


def test_opening_twice_and_closing_twice_is_allowed(golden):
    prefix = str(golden / "plain" / "model.ckpt")
    with BundleReader(prefix) as one, BundleReader(prefix) as other:
        assert one.read("global_step") == other.read("global_step") == 1
    one.close()


def test_a_closed_checkpoint_cannot_be_read(golden):
    with open_checkpoint(golden / "plain") as reader:
        name = next(iter(reader.specs()))
    with pytest.raises(UsageError, match="closed"):
        reader.read(name)


# Entries as every writer writes them are decoded together (see `_usual_entries`)

usual = st.builds(
    lambda dtype, shape, shard, offset, checksum: BundleEntry(
        dtype, shape, shard, offset, element_count(shape) * dtype.itemsize, checksum
    ),
    st.sampled_from([DType.float32, DType.int64, DType.bool, DType.bfloat16]),
    st.sampled_from([(), (3,), (0, 4), (200, 7), (1, 1, 1, 40_000)]),
    st.sampled_from([0, 0, 1, 127, 128, 99_998]),
    st.integers(0, (1 << 64) - 1) | st.integers(0, 1 << 20),
    st.integers(0, (1 << 32) - 1),
)
unusual = st.sampled_from(
    [
        BundleEntry(DType.string, (2,), 0, 5, 9, 77),
        BundleEntry(DType.float32, (4,), slices=(Slice((0,), (2,)), Slice((2,), (2,)))),
        BundleEntry(DType.float32, (4,), 0, 0, 15, 77),
    ]
)


def decoded(value):
    """Return the entry of a value as it is decoded alone, None if it is at fault."""
    try:
        return BundleEntry.decode(value)
    except (wire.WireError, CheckpointFormatError):
        return None


@settings(max_examples=400)
@given(st.data())
def test_entries_that_are_decoded_together_are_as_each_is_alone(data):
    values = [entry.encode() for entry in data.draw(st.lists(usual | unusual, max_size=6))] * 3
    for _ in range(data.draw(st.integers(0, 6)) if values else 0):
        at = data.draw(st.integers(0, len(values) - 1))
        value = bytearray(values[at])
        place = data.draw(st.integers(0, len(value)))
        how_many = data.draw(st.integers(0, 2))
        value[place : place + how_many] = data.draw(st.binary(max_size=2))
        values[at] = bytes(value)
        # As many of that form that they are decoded together, the others with a byte of their own.
        for _ in range(data.draw(st.integers(0, 3))):
            if value:
                value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(
                    st.integers(0, 7)
                )
            values.append(bytes(value))
    for value, entry in zip(values, _usual_entries(values), strict=True):
        assert entry is None or entry == decoded(value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"offset": 1},
        {"offset": 127},
        {"offset": 128},
        {"offset": (1 << 63) - 1},
        {"shard": 1},
        {"shard": 127, "offset": 1 << 40},
    ],
)
def test_what_writers_write_is_what_is_decoded_together(fields):
    for shape, size in (((), 4), ((3, 200), 2400), ((0,), 0), ((1,) * 31, 4)):
        entry = BundleEntry(DType.float32, shape, size=size, checksum=0x01020304, **fields)
        assert _usual_entries([entry.encode()] * 3) == [entry] * 3


def test_a_fault_among_many_entries_is_told_with_its_name(tmp_path):
    entries = {f"w{number:03}": entry_of(b"12", DType.int16, (1,)) for number in range(100)}
    entries["w050"] = entries["w050"]._replace(size=3)
    with pytest.raises(DamagedCheckpointError, match=r"malformed entry for b'w050': 3 bytes"):
        open_checkpoint(bundle(tmp_path, entries, b"12"))


def test_the_tensor_that_ends_past_its_data_is_told_of_many(tmp_path):
    entries = {
        f"w{number:03}": entry_of(b"12", DType.int16, (1,), offset=number) for number in range(100)
    }
    entries["empty"] = entry_of(b"", DType.int16, (0,), offset=101)
    with pytest.raises(DamagedCheckpointError, match="tensor 'w099' ends at byte 101"):
        open_checkpoint(bundle(tmp_path, entries, bytes(100)))


def test_a_name_among_many_that_is_no_text_is_damage(tmp_path):
    entries = {f"w{number:03}": entry_of(b"12", DType.int16, (1,)) for number in range(100)}
    entries[b"w05\xff"] = entries["w050"]
    with pytest.raises(DamagedCheckpointError, match=r"malformed entry for b.w05.xff"):
        open_checkpoint(bundle(tmp_path, entries, b"12"))


@pytest.mark.parametrize("shard", [0, 5])
def test_every_flipped_bit_of_an_entry_is_seen_among_many_as_it_is_alone(shard):
    entry = BundleEntry(DType.float32, (2, 3), shard, 0x0A0B0C, 24, 0x01020304)
    whole = entry.encode()
    assert _usual_entries([whole] * 3) == [entry] * 3
    for bit in range(8 * len(whole)):
        value = flipped(whole, bit // 8, 1 << bit % 8)
        for values in ([value] * 3, [whole, whole, whole, value]):
            for one, found in zip(values, _usual_entries(values), strict=True):
                assert found is None or found == decoded(one), one.hex(" ")
