"""What is decoded here, held against h5py; and files that are damaged or made to harm."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import numpy as np
import pytest

from compat_restore.checkpoint.files import LocalFile
from compat_restore.checkpoint.hdf5 import MAGIC, Hdf5File, hdf5_start
from compat_restore.errors import (
    CheckpointFormatError,
    CompatRestoreError,
    DamagedCheckpointError,
)
from compat_restore.tensors import DType

WANTED = ("layer_names", "weight_names", "name", "dtype")


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


def opened(path):
    return opened_source(LocalFile(str(path)))


def opened_source(source):
    start = hdf5_start(source)
    if start is None:
        raise CheckpointFormatError("no HDF5")
    return Hdf5File(source, start, source.size - start, name=source.name, wanted=WANTED)


def made(h5py, path, fill):
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def plain(h5py, path):
    def fill(file):
        file["layer/w"] = np.arange(6, dtype=np.float32).reshape(2, 3)
        file["layer/b"] = np.zeros(3, np.float32)
        file["layer"].attrs["weight_names"] = ["w", "b"]

    return made(h5py, path, fill)


def changed(path, at, data):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def at_of(path, data):
    """Return where bytes stand, which have to stand once."""
    whole = path.read_bytes()
    assert whole.count(data) == 1, f"{data!r} stands {whole.count(data)} times"
    return whole.index(data)


@pytest.mark.parametrize(
    "dtype",
    [
        "i1",
        "i2",
        "i4",
        "i8",
        "u1",
        "u2",
        "u4",
        "u8",
        "f2",
        "f4",
        "f8",
        "c8",
        "c16",
        "?",
        ">f4",
        ">i8",
        ">f2",
    ],
)
def test_elements_of_this_type_are_read_as_h5py_reads_them(tmp_path, h5py, dtype):
    values = np.arange(-3, 9).reshape(3, 4).astype(dtype)
    path = made(h5py, tmp_path / "x.h5", lambda file: file.create_dataset("a/w", data=values))
    file = opened(path)
    found = file.values("a/w")
    assert found.dtype == values.dtype.newbyteorder("=")
    assert found.tolist() == values.tolist()
    with h5py.File(path) as theirs:
        place = theirs["a/w"].id.get_offset()
    dataset = file.datasets["a/w"]
    assert dataset.place == (place, values.nbytes)
    assert dataset.is_raw == (not dtype.startswith(">"))


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (5, 7)},
        {"chunks": (64, 64), "maxshape": (None, None)},
        {"compression": "gzip"},
        {"compression": 9, "shuffle": True, "chunks": (10, 3)},
        {"fletcher32": True},
        {"fletcher32": True, "compression": 1, "shuffle": True, "chunks": (1, 21)},
    ],
    ids=str,
)
def test_chunks_are_joined_and_unpacked_as_h5py_does(tmp_path, h5py, options):
    values = np.random.default_rng(0).standard_normal((37, 21)).astype(np.float32)
    path = made(
        h5py, tmp_path / "x.h5", lambda file: file.create_dataset("w", data=values, **options)
    )
    file = opened(path)
    assert not file.datasets["w"].is_raw
    assert file.values("w").tobytes() == values.tobytes()
    assert file.values("w").tobytes() == values.tobytes()  # twice: reading leaves nothing behind


def test_a_wrong_checksum_of_a_chunk_is_damage(tmp_path, h5py):
    values = np.arange(100, dtype=np.float32)
    path = made(
        h5py,
        tmp_path / "x.h5",
        lambda file: file.create_dataset("w", data=values, fletcher32=True, chunks=(100,)),
    )
    changed(path, at_of(path, values[50:].tobytes()), b"\1")
    with pytest.raises(DamagedCheckpointError, match="checksum of a chunk"):
        opened(path).values("w")


def test_values_that_were_never_written_are_the_fill_value(tmp_path, h5py):
    def fill(file):
        file.create_dataset("zero", shape=(3, 4), dtype="f4")
        file.create_dataset("two", shape=(3,), dtype="f4", fillvalue=2.5)
        file.create_dataset("seven", shape=(30, 4), dtype="i4", fillvalue=7, chunks=(7, 3))
        file["none"] = np.zeros((0, 3))

    file = opened(made(h5py, tmp_path / "x.h5", fill))
    assert file.values("zero").tolist() == np.zeros((3, 4)).tolist()
    assert file.values("two").tolist() == [2.5] * 3
    assert file.values("seven").tolist() == np.full((30, 4), 7).tolist()
    assert file.values("none").shape == (0, 3)


def test_values_in_the_header_have_a_place(tmp_path, h5py):
    def fill(file):
        space, properties = (
            h5py.h5s.create_simple((5,)),
            h5py.h5p.create(h5py.h5p.DATASET_CREATE),
        )
        properties.set_layout(h5py.h5d.COMPACT)
        dataset = h5py.h5d.create(file.id, b"w", h5py.h5t.IEEE_F32LE, space, properties)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(5, dtype=np.float32))

    path = made(h5py, tmp_path / "x.h5", fill)
    file = opened(path)
    assert file.values("w").tolist() == [0, 1, 2, 3, 4]
    begin, size = file.datasets["w"].place
    assert path.read_bytes()[begin : begin + size] == np.arange(5, dtype=np.float32).tobytes()


def test_strings_are_read_in_both_forms(tmp_path, h5py):
    def fill(file):
        file["fixed"] = np.array([b"ab", b"c"])
        file["heap"] = ["hello", "w\u00f6rld", ""]
        file["one"] = "x"

    file = opened(made(h5py, tmp_path / "x.h5", fill))
    assert file.datasets["heap"].dtype is DType.string
    assert file.values("fixed").tolist() == [b"ab", b"c"]
    assert file.values("heap").tolist() == [b"hello", "w\u00f6rld".encode(), b""]
    assert file.values("one").tolist() == b"x"


def test_opaque_pairs_of_bytes_are_bfloat16_and_other_opaque_bytes_have_to_be_told(tmp_path, h5py):
    import ml_dtypes

    values = np.array([1.5, -2], ml_dtypes.bfloat16)

    def fill(file):
        file["plain"] = values
        file["told"] = values
        file["told"].attrs["dtype"] = "bfloat16"
        file["eight"] = values.astype(ml_dtypes.float8_e4m3fn)
        file["eight"].attrs["dtype"] = "float8_e4m3fn"

    file = opened(made(h5py, tmp_path / "x.h5", fill))
    assert file.values("plain").dtype == file.values("told").dtype == values.dtype
    assert file.values("told").tolist() == values.tolist()
    assert file.datasets["eight"].dtype is DType.float8_e4m3fn

    def untold(file):
        file["w"] = values.astype(ml_dtypes.float8_e4m3fn)

    with pytest.raises(CheckpointFormatError, match="nothing tells"):
        opened(made(h5py, tmp_path / "y.h5", untold))


def test_large_groups_and_large_attributes_are_read(tmp_path, h5py):
    names = [f"variable_{number:04}" for number in range(1500)]

    def fill(file):
        for number, name in enumerate(names):
            file[f"g/{name}"] = np.float32(number)
        file.attrs["layer_names"] = [name.encode() for name in names]
        file.attrs["weight_names0"] = names

    file = opened(made(h5py, tmp_path / "x.h5", fill))
    assert list(file.groups[""]["layer_names"]) == names
    assert list(file.groups[""]["weight_names0"]) == names
    assert sorted(file.datasets) == [f"g/{name}" for name in names]
    assert file.values("g/variable_0777") == 777


def test_a_user_block_is_passed_over(tmp_path, h5py):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["w"] = np.arange(5.0)
    found = opened(path)
    assert found.values("w").tolist() == [0, 1, 2, 3, 4]
    begin, size = found.datasets["w"].place
    assert path.read_bytes()[begin : begin + size] == np.arange(5.0).tobytes()


def test_the_newer_dialect_is_told_with_a_cure(tmp_path, h5py):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["w"] = np.zeros(3)
    with pytest.raises(CheckpointFormatError, match="h5repack"):
        opened(path)
    path = tmp_path / "y.h5"
    with h5py.File(path, "w") as file:
        file.create_group("g", track_order=True)["w"] = np.zeros(3)
    with pytest.raises(CheckpointFormatError, match="newer dialect"):
        opened(path)


# -- hostile files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "link", ["external", "soft", "dangling"], ids=["external link", "soft link", "dangling link"]
)
def test_links_are_refused(tmp_path, h5py, link):
    other = plain(h5py, tmp_path / "other.h5")

    def fill(file):
        file["w"] = np.zeros(3)
        file["link"] = {
            "external": h5py.ExternalLink(str(other), "/layer/w"),
            "soft": h5py.SoftLink("/w"),
            "dangling": h5py.SoftLink("/nowhere"),
        }[link]

    with pytest.raises(CompatRestoreError, match=r"link|newer dialect"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_groups_in_a_circle_are_refused(tmp_path, h5py):
    def fill(file):
        file.create_group("a/b")
        file["a/b/c"] = file["a"]

    with pytest.raises(DamagedCheckpointError, match="reached in two ways"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_one_dataset_of_two_names_is_refused(tmp_path, h5py):
    def fill(file):
        file["a"] = np.zeros(3)
        file["b"] = file["a"]

    with pytest.raises(DamagedCheckpointError, match="reached in two ways"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_values_in_another_file_are_refused_and_that_file_is_not_opened(tmp_path, h5py):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")

    def fill(file):
        file.create_dataset("w", shape=(4,), dtype="f4", external=[(str(secret), 0, 16)])

    with pytest.raises(DamagedCheckpointError, match="in other files"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_virtual_datasets_are_refused(tmp_path, h5py):
    other = plain(h5py, tmp_path / "other.h5")
    path = tmp_path / "x.h5"
    layout = h5py.VirtualLayout(shape=(2, 3), dtype="f4")
    layout[:] = h5py.VirtualSource(str(other), "layer/w", shape=(2, 3))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("w", layout)
    with pytest.raises(CompatRestoreError, match=r"put together|newer dialect"):
        opened(path)


@pytest.mark.parametrize("kind", ["compound", "reference", "sequence", "array", "enum", "time"])
def test_elements_that_no_tensor_has_are_told(tmp_path, h5py, kind):
    def fill(file):
        file["fine"] = np.zeros(2)
        if kind == "compound":
            file["odd"] = np.zeros(2, [("x", "f4"), ("y", "i4")])
        elif kind == "reference":
            file.create_dataset("odd", data=np.array([file.ref], h5py.ref_dtype))
        elif kind == "sequence":
            file.create_dataset("odd", (2,), h5py.vlen_dtype(np.float32))
        elif kind == "array":
            file["odd"] = np.zeros(2, [("x", "f4", (3,))])["x"].view()
            file.create_dataset("odd2", (2,), np.dtype(("f4", (3,))))
        elif kind == "enum":
            file.create_dataset("odd", (2,), h5py.enum_dtype({"A": 0, "B": 1}))
        else:
            h5py.h5d.create(file.id, b"odd", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((2,)))

    with pytest.raises(CheckpointFormatError, match=r"'odd2?' is .*, which no tensor has"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_a_filter_that_keras_does_not_use_is_told_when_values_are_asked_for(tmp_path, h5py):
    def fill(file):
        file.create_dataset("w", data=np.zeros((30, 30)), compression="lzf")

    file = opened(made(h5py, tmp_path / "x.h5", fill))
    with pytest.raises(CheckpointFormatError, match="lzf"):
        file.values("w")


def test_a_filter_that_would_have_to_be_loaded_is_never_looked_for(tmp_path, h5py, monkeypatch):
    def fill(file):
        file.create_dataset("w", data=np.zeros((30, 30), "f4"), compression="lzf")

    path = made(h5py, tmp_path / "x.h5", fill)
    changed(path, at_of(path, b"lzf\0") - 8, struct.pack("<H", 32015))
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    with pytest.raises(CheckpointFormatError, match="32015"):
        opened(path).values("w")


def test_a_shape_of_exabytes_in_chunks_without_data_is_refused(tmp_path, h5py):
    def fill(file):
        file.create_dataset("w", shape=(1 << 30, 1 << 27), dtype="f8", chunks=(8, 8))

    with pytest.raises(DamagedCheckpointError, match="claims"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_a_chunk_of_gigabytes_is_refused(tmp_path, h5py):
    def fill(file):
        file.create_dataset("w", shape=(1,), dtype="f8", chunks=(1 << 28,), maxshape=(None,))

    with pytest.raises(DamagedCheckpointError, match="claims"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_a_shape_that_was_never_written_is_refused_if_it_is_huge(tmp_path, h5py):
    def fill(file):
        file.create_dataset("w", shape=(1 << 40,), dtype="f4")

    with pytest.raises(DamagedCheckpointError, match="claims"):
        opened(made(h5py, tmp_path / "x.h5", fill))


def test_a_deflate_bomb_is_stopped_at_the_size_of_its_chunk(tmp_path, h5py):
    import zlib

    def fill(file):
        file.create_dataset("w", shape=(64,), dtype="f4", chunks=(64,), compression=9)
        bomb = zlib.compress(bytes(64 << 20), 9)
        file["w"].id.write_direct_chunk((0,), bomb)

    file = opened(made(h5py, tmp_path / "x.h5", fill))
    begin = time.perf_counter()
    with pytest.raises(DamagedCheckpointError, match="bytes of 256"):
        file.values("w")
    assert time.perf_counter() - begin < 1


def header_of_overlapping_blocks(count, payload):
    """Return a file whose root has blocks that begin in each other, one more every 24 bytes.

    Each runs to the end, where one attribute stands: read by all of them, it would be kept by each.
    """
    header = 96
    chain = header + 16 + 24
    end = chain + 24 * count + 8 + payload
    superblock = MAGIC + bytes((0, 0, 0, 0, 0, 8, 8, 0)) + struct.pack("<HHI", 4, 16, 0)
    superblock += struct.pack("<6Q", 0, (1 << 64) - 1, end, (1 << 64) - 1, 0, header)
    data = bytearray(superblock.ljust(header, b"\0"))
    data += struct.pack("<BBHII4x", 1, 0, 1, 1, 24)
    for number in range(count + 1):
        at = chain + 24 * number
        data += struct.pack("<HHBxxxQQ", 16, 16, 0, at, end - at)
    data += struct.pack("<HHBxxx", 12, payload, 0) + bytes(payload)
    return bytes(data)


def test_blocks_of_a_header_that_overlap_do_not_fill_the_memory(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(header_of_overlapping_blocks(5000, 64_992))
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        with pytest.raises(DamagedCheckpointError, match="overlap"):
            opened(path)
        assert time.perf_counter() - begin < 1
        assert tracemalloc.get_traced_memory()[1] < 20 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_strings_that_share_bytes_do_not_fill_the_memory(tmp_path, h5py):
    def fill(file):
        file.attrs["layer_names"] = ["x" * 50_000] + ["y"] * 3000

    path = made(h5py, tmp_path / "x.h5", fill)
    whole = path.read_bytes()
    place = at_of(path, struct.pack("<I", 50_000) + b"\0")
    long = whole[place : place + 16]
    changed(path, place, long * 3001)
    with pytest.raises(DamagedCheckpointError, match=r"share bytes|heap|string"):
        opened(path)


def test_datasets_that_share_bytes_are_refused(tmp_path, h5py):
    path = plain(h5py, tmp_path / "x.h5")
    with h5py.File(path) as file:
        one, other = (file[f"layer/{name}"].id.get_offset() for name in "wb")
    changed(path, at_of(path, struct.pack("<QQ", other, 12)), struct.pack("<Q", one + 4))
    with pytest.raises(DamagedCheckpointError, match="share bytes"):
        opened(path)


def test_a_dataset_that_ends_after_the_file_is_refused(tmp_path, h5py):
    path = plain(h5py, tmp_path / "x.h5")
    with h5py.File(path) as file:
        place = file["layer/w"].id.get_offset()
    changed(
        path,
        at_of(path, struct.pack("<QQ", place, 24)),
        struct.pack("<Q", path.stat().st_size - 23),
    )
    with pytest.raises(DamagedCheckpointError, match="ends at byte"):
        opened(path)


def test_every_truncation_is_told(tmp_path, h5py):
    path = plain(h5py, tmp_path / "x.h5")
    whole = path.read_bytes()
    for length in [*range(8, 200), *range(200, len(whole), 37)]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError):
            opened(path)


def test_zeros_after_the_magic_are_told(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(MAGIC + bytes(1000))
    with pytest.raises(DamagedCheckpointError):
        opened(path)


def test_changed_bytes_make_nothing_but_documented_errors(tmp_path, golden):
    """h5py crashes on such files about once in a thousand, or does not come back."""
    sources = [
        (golden / "keras" / name).read_bytes()
        for name in ("keras.weights.h5", "tf_keras_model.h5", "tf_keras_weights.h5")
    ]
    path = tmp_path / "x.h5"
    outcomes = set()
    for seed in range(600):
        chance = random.Random(seed)
        data = bytearray(sources[seed % len(sources)])
        used = [at for at, byte in enumerate(data) if byte]
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.choice(used)
            new = chance.choice((b"\xff", b"\0", b"\xff" * 8, bytes([data[at] ^ 1]), b"\x30\0\0"))
            data[at : at + len(new)] = new
        path.write_bytes(data)
        begin = time.perf_counter()
        try:
            with LocalFile(str(path)) as source:
                file = opened_source(source)
                for name in file.datasets:
                    file.values(name)
            outcomes.add("read")
        except (CheckpointFormatError, DamagedCheckpointError) as error:
            outcomes.add(type(error).__name__)
        assert time.perf_counter() - begin < 2
    assert outcomes == {"read", "CheckpointFormatError", "DamagedCheckpointError"}
