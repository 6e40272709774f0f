from __future__ import annotations

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from formats import flipped
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore import open_checkpoint
from compat_restore.checkpoint import safetensors
from compat_restore.checkpoint.safetensors import SafetensorsReader
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    UsageError,
)

# What the format's types are called, by NumPy's name.
CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32",
    "float64": "F64", "complex64": "C64", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def file_of(header, data=b"", *, length=None):
    """Return the bytes of a file with this header (JSON, or what stands in its place)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def saved(path, tensors):
    """Write a file by hand; return its path."""
    header, data = {}, b""
    for name, value in tensors.items():
        array = np.asarray(value)
        begin = len(data)
        data += array.tobytes()
        header[name] = entry(CODES[array.dtype.name], array.shape, (begin, len(data)))
    path.write_bytes(file_of(header, data))
    return str(path)


def opened(tmp_path, content):
    """Open a file of this content, and read everything in it."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with SafetensorsReader(str(path)) as reader:
        return {name: reader.read(name) for name in reader.specs()}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 2)])
def test_every_type_and_shape_is_read(tmp_path, name, shape):
    data = np.arange(int(np.prod(shape, dtype=int)) * dtype_of(name).itemsize, dtype=np.uint8)
    value = (data % 2 if name == "bool" else data).view(dtype_of(name)).reshape(shape)
    with SafetensorsReader(saved(tmp_path / "m.safetensors", {"w": value})) as reader:
        found = reader.read("w")
        assert reader.specs()["w"].dtype.value == name
        assert reader.specs()["w"].shape == found.shape == shape
        assert (found.dtype, found.tobytes()) == (value.dtype, value.tobytes())
        (stored,) = reader.stored("w")
        assert stored.source.read(stored.offset, stored.size) == value.tobytes()
        assert stored.checksum is None
        assert found.flags.writeable


def test_what_the_safetensors_package_writes_is_read(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = {
        "layer/w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "é": np.array([True, False]),
        "empty": np.zeros((2, 0, 3), np.int16),
        "scalar": np.array(7, np.int64),
        "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    }
    package.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np"})
    with open_checkpoint(tmp_path / "m.safetensors") as reader:
        assert list(reader.specs()) == sorted(tensors)
        for name, value in tensors.items():
            found = reader.read(name)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert found.tobytes() == value.tobytes()


def test_the_format_its_files_and_the_lack_of_checksums_are_told(tmp_path):
    path = saved(tmp_path / "m.safetensors", {"w": np.zeros(3, np.float32)})
    with open_checkpoint(path) as reader:
        assert (reader.path, reader.format) == (path, "safetensors file")
        assert reader.files() == (path,)
        assert not reader.has_checksums
        assert "no checksums" in reader.notes[0]
        reader.verify(["w"])
    with pytest.raises(UsageError, match="is closed"):
        reader.read("w")


def test_verifying_reads_every_byte_in_chunks(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.safetensors", {"w": np.zeros(1 << 18, np.float64)})
    with open_checkpoint(path) as reader:
        (stored,) = reader.stored("w")
        lengths = []
        real = stored.source.read
        monkeypatch.setattr(
            stored.source, "read", lambda at, n: (lengths.append(n), real(at, n))[1]
        )
        reader.verify(["w"])
    assert (sum(lengths), max(lengths)) == (2 << 20, 1 << 20)


def test_metadata_empty_headers_and_further_fields_are_understood(tmp_path):
    assert opened(tmp_path, file_of(b"{}  ")) == {}
    content = file_of({"__metadata__": {"a": "b"}, "w": entry() | {"note": 1}}, bytes(8))
    assert list(opened(tmp_path, content)) == ["w"]


# -- hostile files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"1234567", b"12345678", bytes(8), bytes(64), b"whatever " * 9]
)
def test_a_file_of_anything_else_is_no_safetensors_file(tmp_path, content):
    with pytest.raises(CheckpointFormatError, match="is no safetensors file"):
        opened(tmp_path, content)


def test_a_header_over_100_megabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)
    with pytest.raises(CheckpointFormatError, match="at most 100000000"):
        SafetensorsReader(str(path))


def test_a_header_that_is_longer_than_the_file_is_damage(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="its header alone ends at byte 1008"):
        opened(tmp_path, file_of({"w": entry()}, bytes(8), length=1000))


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b'{"w": ', "malformed"),
        (b'{"w": 1} x', "malformed"),
        (b'{"\xff": 1}', "malformed"),
        (b'{"w": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "w": {}}', "'w' stands there twice"),
        (b'{"w": {"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "twice"),
        (b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "is no text"),
        (b'{"w": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"w": {"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', "5000 digits"),
        (b'{"w": 1}', "no dtype, shape and pair"),
        (b'{"w": {"dtype":"U8","shape":[0]}}', "no dtype, shape and pair"),
        (b'{"w": {"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}}', "no dtype, shape and pair"),
        (b'{"w": {"dtype":1,"shape":[0],"data_offsets":[0,0]}}', "no dtype, shape and pair"),
        (b'{"w": {"dtype":"U8","shape":0,"data_offsets":[0,0]}}', "no dtype, shape and pair"),
        (b'{"w": {"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', "has shape"),
        (b'{"w": {"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "has shape"),
        (b'{"w": {"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "has shape"),
        (b'{"w": {"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "has shape"),
        (b'{"w": {"dtype":"U8","shape":[0],"data_offsets":[-1,-1]}}', "has shape"),
        (b'{"__metadata__": {"a": 1}}', "does not map texts"),
        (b'{"__metadata__": []}', "does not map texts"),
        (b'{"w": {"dtype":"F99","shape":[0],"data_offsets":[0,0]}}', "'F99', which is none"),
    ],
)  # fmt: skip
def test_a_malformed_header_is_damage(tmp_path, header, what):
    with pytest.raises(DamagedCheckpointError, match=what):
        opened(tmp_path, file_of(header))


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"])
def test_types_that_no_tensorflow_has_are_told_by_their_names(tmp_path, code):
    with pytest.raises(CheckpointFormatError, match=f"tensor 'w' .* of type {code}, which"):
        opened(tmp_path, file_of({"w": entry(code, (2,), (0, 2))}, bytes(2)))


@pytest.mark.parametrize(
    ("tensors", "size", "what"),
    [
        ([((2,), (0, 4))], 8, r"has 4 bytes \(0 to 4\), where float32\[2\] takes 8"),
        ([((2,), (8, 0))], 8, "has -8 bytes"),
        ([((1 << 40, 1 << 40), (0, 8))], 8, "larger than any memory"),
        ([((0, 1 << 62, 1 << 62), (0, 0))], 0, "larger than any memory"),
        ([((1,) * 33, (0, 4))], 4, "a shape of 33 dimensions"),
        ([((2,), (4, 12))], 12, "neither a gap nor an overlap"),
        ([((2,), (0, 8)), ((2,), (12, 20))], 20, "neither a gap nor an overlap"),
        ([((2,), (0, 8)), ((2,), (4, 12))], 12, "neither a gap nor an overlap"),
        ([((2,), (0, 8)), ((2,), (0, 8))], 8, "neither a gap nor an overlap"),
        ([((2,), (0, 8)), ((0,), (4, 4))], 8, "neither a gap nor an overlap"),
        ([((2,), (0, 8))], 9, "1 bytes follow the last tensor"),
        ([((2,), (0, 8))], 7, "is cut short"),
        ([((1 << 50,), (0, 4 << 50))], 8, "is cut short"),
        ([((2,), (1 << 63, (1 << 63) + 8))], 8, "neither a gap"),
    ],
)
def test_places_that_cannot_be_are_damage(tmp_path, tensors, size, what):
    header = {f"w{n}": entry("F32", shape, at) for n, (shape, at) in enumerate(tensors)}
    with pytest.raises(DamagedCheckpointError, match=what):
        opened(tmp_path, file_of(header, bytes(size)))


def test_a_file_that_is_cut_anywhere_is_one_error(tmp_path):
    whole = file_of({"w": entry(), "v": entry("I64", (3,), (8, 32))}, bytes(32))
    for length in range(len(whole)):
        with pytest.raises((DamagedCheckpointError, CheckpointFormatError)):
            opened(tmp_path, whole[:length])
    assert len(opened(tmp_path, whole)) == 2


def test_a_flipped_byte_of_a_header_never_gives_more_than_the_file_has(tmp_path):
    whole = file_of({"w": entry(), "v": entry("I64", (3,), (8, 32))}, bytes(32))
    for at in range(len(whole) - 32):
        for bits in (1, 0x10, 0x80, 0xFF):
            try:
                found = opened(tmp_path, flipped(whole, at, bits))
            except CompatRestoreError:
                continue  # as it should be
            assert sum(array.nbytes for array in found.values()) == 32


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.sampled_from(["U8", "F32", "BOOL", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON),
    data=st.binary(max_size=24),
)
def test_any_header_is_read_or_refused_as_the_safetensors_package_does(
    tmp_path_factory, header, data
):
    package = pytest.importorskip("safetensors")
    content = file_of(header, data)
    try:
        theirs = {name: bytes(item["data"]) for name, item in package.deserialize(content)}
    except package.SafetensorError:
        theirs = None
    try:
        found = opened(tmp_path_factory.mktemp("f"), content)
    except CompatRestoreError:
        assert theirs is None
    else:
        assert theirs == {name: array.tobytes() for name, array in found.items()}


# -- sets of files -------------------------------------------------------------------------------

ONE = {"a": np.arange(3, dtype=np.float32), "b": np.array(5, np.int64)}
TWO = {"c": np.array([True, False])}


def set_of(folder, weight_map=None, **files):
    """Write a set of two files and its index; return the index."""
    folder.mkdir(exist_ok=True)
    saved(folder / "x-00001-of-00002.safetensors", files.get("one", ONE))
    saved(folder / "x-00002-of-00002.safetensors", files.get("two", TWO))
    if weight_map is None:
        weight_map = dict.fromkeys(ONE, "x-00001-of-00002.safetensors")
        weight_map |= dict.fromkeys(TWO, "x-00002-of-00002.safetensors")
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 22}, "weight_map": weight_map}))
    return index


def test_a_set_is_read_by_its_index(tmp_path):
    index = set_of(tmp_path)
    for name in (index, tmp_path, tmp_path / "x.safetensors"):
        with open_checkpoint(name) as reader:
            assert (reader.path, reader.format) == (str(index), "safetensors files, 2 by an index")
            assert {n: reader.read(n).tolist() for n in reader.specs()} == {
                n: value.tolist() for n, value in (ONE | TWO).items()
            }
            assert [os.path.basename(path) for path in reader.files()] == [
                "x.safetensors.index.json",
                "x-00001-of-00002.safetensors",
                "x-00002-of-00002.safetensors",
            ]
            reader.verify(reader.specs())


def test_tensors_that_the_index_does_not_name_are_told(tmp_path):
    index = set_of(tmp_path, two=TWO | {"a": np.zeros(1, np.float32)})
    with open_checkpoint(index) as reader:
        assert reader.read("a").tolist() == [0, 1, 2]
        assert "x-00002-of-00002.safetensors' also holds 'a'" in reader.notes[-1]


def test_a_tensor_that_its_file_does_not_hold_is_damage(tmp_path):
    index = set_of(tmp_path, one={"a": ONE["a"]})
    with pytest.raises(DamagedCheckpointError, match="holds 'b', which it does not"):
        open_checkpoint(index)


def test_missing_files_of_a_set_are_named(tmp_path):
    index = set_of(tmp_path)
    os.unlink(tmp_path / "x-00002-of-00002.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"x-00002-of-00002\.safetensors' is missing"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "a\0", "\ud800"]
)  # fmt: skip
def test_a_file_outside_of_the_index_s_directory_is_unsafe(tmp_path, file):
    saved(tmp_path / "secret.safetensors", ONE)
    index = set_of(tmp_path / "set", dict.fromkeys(ONE, file))
    with pytest.raises(DamagedCheckpointError, match="is unsafe: it names"):
        open_checkpoint(index)


def test_a_link_that_leads_out_of_the_directory_is_unsafe(tmp_path):
    saved(tmp_path / "secret.safetensors", ONE)
    index = set_of(tmp_path / "set")
    os.unlink(tmp_path / "set" / "x-00001-of-00002.safetensors")
    (tmp_path / "set" / "x-00001-of-00002.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(DamagedCheckpointError, match="is unsafe: it is a link to"):
        open_checkpoint(index)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    index = set_of(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in os.listdir(tmp_path / "blobs"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    with open_checkpoint(snapshot / index.name) as reader:
        assert sorted(reader.specs()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {',
        '{"weight_map": {"a": "x", "a": "y"}}', '{"weight_map": {"\\ud800": "x"}}',
    ],
)  # fmt: skip
def test_a_malformed_index_is_one_error(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises((DamagedCheckpointError, CheckpointFormatError)):
        open_checkpoint(tmp_path / "m.safetensors.index.json")


def test_a_file_of_a_set_that_is_a_git_lfs_pointer_is_told(tmp_path):
    index = set_of(tmp_path)
    (tmp_path / "x-00001-of-00002.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )
    with pytest.raises(DamagedCheckpointError, match="git lfs pull"):
        open_checkpoint(index)


# -- what a path means ---------------------------------------------------------------------------


def test_a_file_is_known_by_what_is_in_it(tmp_path):
    path = saved(tmp_path / "weights", ONE)
    with open_checkpoint(path) as reader:
        assert reader.format == "safetensors file"


def test_a_damaged_file_is_told_as_a_safetensors_file_by_its_name(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(file_of({"w": entry()}, length=10_000))
    with pytest.raises(DamagedCheckpointError, match="cut short"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_a_git_lfs_pointer_is_told_by_any_name(tmp_path):
    (tmp_path / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointFormatError, match="git lfs pull"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_one_file_of_a_set_is_read_alone_and_the_index_is_told(tmp_path):
    set_of(tmp_path)
    with open_checkpoint(tmp_path / "x-00001-of-00002.safetensors") as reader:
        assert sorted(reader.specs()) == ["a", "b"]
        assert "name its index for all of them" in reader.notes[0]


def test_a_single_file_counts_rather_than_an_index_beside_it(tmp_path):
    set_of(tmp_path)
    saved(tmp_path / "x.safetensors", TWO)
    for name in (tmp_path, tmp_path / "x.safetensors"):
        with open_checkpoint(name) as reader:
            assert list(reader.specs()) == ["c"]
            assert "was passed over" in reader.notes[0]


def test_two_files_in_a_directory_are_ambiguous(tmp_path):
    saved(tmp_path / "one.safetensors", ONE)
    saved(tmp_path / "two.safetensors", TWO)
    with pytest.raises(CheckpointNotFoundError, match=r"'one\.safetensors', 'two\.safetensors'"):
        open_checkpoint(tmp_path)


def test_a_misspelt_name_is_told_with_its_neighbours(tmp_path):
    saved(tmp_path / "model.safetensors", ONE)
    with pytest.raises(CheckpointNotFoundError, match=r"holds 'model\.safetensors'"):
        open_checkpoint(tmp_path / "modle.safetensors")


def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(tmp_path):
    spec = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'
    header = f'{{"w":{{{spec}}}}}'.ljust(640).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes((640).to_bytes(8, "little") + header + b"!")
    assert path.read_bytes().startswith(b"\x80\x02")
    for name in ("model.safetensors", "of another name"):
        path = path.rename(tmp_path / name)
        with open_checkpoint(path) as reader:
            assert reader.read("w").tolist() == [33]


def test_a_set_of_many_files_is_opened_in_time_linear_in_its_tensors(tmp_path):
    looked_at = 0

    class Counted(str):
        __slots__ = ()

        def __eq__(self, other):
            nonlocal looked_at
            looked_at += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    weight_map = {}
    for file in range(60):
        tensors = {f"f{file}/w{n}": np.zeros(1, np.uint8) for n in range(30)}
        saved(tmp_path / f"m-{file}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"m-{file}.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.MonkeyPatch.context() as patch:
        real = safetensors.read_index
        patch.setattr(
            safetensors,
            "read_index",
            lambda source: {name: Counted(file) for name, file in real(source).items()},
        )
        with SafetensorsReader(str(index)) as reader:
            assert len(reader.specs()) == 1800
    assert looked_at < 20 * 1800
