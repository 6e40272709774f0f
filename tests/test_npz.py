from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from formats import flipped
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compat_restore import convert, open_checkpoint
from compat_restore.checkpoint.npz import KINDS, NpzReader
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    DamagedTensorsError,
)
from compat_restore.tensors import DType

SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3, 4)]


def npy(header, data=b"", version=1):
    """Return a member with this header: a descr and a shape, or the text itself."""
    if isinstance(header, tuple):
        header = f"{{'descr': '{header[0]}', 'fortran_order': False, 'shape': {header[1]}, }}"
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def zipped(members, method=zipfile.ZIP_STORED):
    """Return a zip file of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def opened(tmp_path, content):
    """Open a file of this content, and read everything in it."""
    path = tmp_path / "m.npz"
    path.write_bytes(content)
    with NpzReader(str(path)) as reader:
        return {name: reader.read(name) for name in reader.specs()}


def patched(data, magic, offset, fmt, *values):
    """Return `data` with fields of the first record of this kind replaced."""
    at = data.index(magic) + offset
    return data[:at] + struct.pack(fmt, *values) + data[at + struct.calcsize(fmt) :]


FLOATS = npy(("<f4", "(3,)"), np.arange(3, dtype="<f4").tobytes())
LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_every_type_order_and_shape_is_what_numpy_saved(tmp_path, save, order, fortran, dtype):
    tensors = {}
    for number, shape in enumerate(SHAPES):
        kind = np.dtype(dtype.value).newbyteorder(order)
        value = np.arange(int(np.prod(shape, dtype=int))).astype(kind).reshape(shape)
        tensors[f"scope/w{number}"] = np.asfortranarray(value) if fortran and shape else value
    save(tmp_path / "m.npz", **tensors)
    with open_checkpoint(tmp_path / "m.npz") as reader:
        assert list(reader.specs()) == list(tensors)
        reader.verify(tensors)
        for name, value in tensors.items():
            found = reader.read(name)
            assert reader.specs()[name].dtype is dtype
            assert (found.dtype, found.shape) == (np.dtype(dtype.value), value.shape)
            assert found.tolist() == value.tolist()
            assert found.flags.c_contiguous
            assert found.flags.writeable
            assert found.flags.aligned
            for stored in reader.stored(name):
                assert save is np.savez
                assert stored.source.read(stored.offset, stored.size) == found.tobytes()


def test_only_what_is_stored_as_it_is_can_be_copied(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(
        tmp_path / "m.npz", plain=value, fortran=np.asfortranarray(value), big=value.astype(">f4"),
        text=np.array(["a"]), column=np.asfortranarray(value[:, :1]), bytes=value.astype(">i1"),
        nothing=value[:0],
    )  # fmt: skip
    np.savez_compressed(tmp_path / "packed.npz", plain=value)
    with open_checkpoint(tmp_path / "m.npz") as reader:
        copied = {name for name in reader.specs() if reader.stored(name)}
    assert copied == {"plain", "column", "bytes"}
    with open_checkpoint(tmp_path / "packed.npz") as reader:
        assert reader.stored("plain") == ()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_strings_are_bytes(tmp_path, save):
    save(
        tmp_path / "m.npz",
        b=np.array([b"ab", b"", b"c\0d"]),
        t=np.array([["é", "xyz"], ["", "日本"]]),
        big=np.array(["é"]).astype(">U1"),
        one=np.array("abc"),
    )
    with open_checkpoint(tmp_path / "m.npz") as reader:
        assert {spec.dtype for spec in reader.specs().values()} == {DType.string}
        assert reader.read("b").tolist() == [b"ab", b"", b"c\0d"]
        assert reader.read("t").tolist() == [["é".encode(), b"xyz"], [b"", "日本".encode()]]
        assert reader.read("big").tolist() == ["é".encode()]
        assert reader.read("one").item() == b"abc"
        assert reader.specs()["t"].nbytes == 4 * 3 * 4


@settings(max_examples=60, deadline=None)
@given(
    value=arrays.arrays(
        st.sampled_from(["<f8", ">i2", "<c8", "|b1", "<u4", "|S5", "<U3"]),
        arrays.array_shapes(min_dims=0, min_side=0, max_side=4),
    ),
    packed=st.booleans(),
)
def test_whatever_numpy_saves_is_read_as_numpy_loads_it(tmp_path_factory, value, packed):
    path = tmp_path_factory.mktemp("f") / "m.npz"
    (np.savez_compressed if packed else np.savez)(path, w=value)
    with open_checkpoint(path) as reader:
        found = reader.read("w")
    expected = np.load(path)["w"]
    if expected.dtype.kind in "SU":
        expected = np.char.encode(expected, "utf-8") if expected.dtype.kind == "U" else expected
        assert found.tolist() == expected.tolist()
    else:
        assert found.tobytes() == expected.astype(found.dtype).tobytes()


def test_headers_as_other_programs_write_them_are_understood(tmp_path):
    data = np.arange(2, dtype="<f4").tobytes()
    for header in (
        "{'shape': (2L,), 'fortran_order': False, 'descr': '<f4'}",
        '{"descr": "<f4", "fortran_order": False, "shape": (2,)}',
        "{'descr':'=f4','fortran_order':True,'shape':(2 , )}   ",
    ):
        for version in (1, 2, 3):
            found = opened(tmp_path, zipped({"w.npy": npy(header, data, version)}))
            assert found["w"].tolist() == [0, 1]


def test_names_are_just_names(tmp_path):
    names = ["../../etc/passwd", "/abs", "a/b:0", "é", "x.npy", "", "日本"]
    (tmp_path / "in").mkdir()
    found = opened(tmp_path / "in", zipped({f"{name}.npy": FLOATS for name in names}))
    assert sorted(found) == sorted(names)
    assert os.listdir(tmp_path) == ["in"]


def test_members_of_other_kinds_are_told_and_passed_over(tmp_path):
    (tmp_path / "m.npz").write_bytes(zipped({"README": b"hello", "w.npy": FLOATS}))
    with NpzReader(str(tmp_path / "m.npz")) as reader:
        assert list(reader.specs()) == ["w"]
        assert "passed over: 'README'" in reader.notes[0]


def test_an_archive_with_a_comment_is_read_and_one_with_other_bytes_around_it_is_damage(tmp_path):
    content = patched(zipped({"w.npy": FLOATS}), END, 20, "<H", 5)
    assert opened(tmp_path, content + b"hello")["w"].tolist() == [0, 1, 2]
    for other in (content, content + b"hello!", b"!" + content + b"hello"):
        with pytest.raises(DamagedCheckpointError):
            opened(tmp_path, other)


def test_an_archive_of_nothing_is_a_checkpoint_of_nothing(tmp_path):
    np.savez(tmp_path / "m.npz")
    with open_checkpoint(tmp_path / "m.npz") as reader:
        assert reader.specs() == {}


def test_a_zip64_archive_is_read(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, archive.open("w.npy", "w", force_zip64=True) as to:
        to.write(FLOATS)
    assert opened(tmp_path, file.getvalue())["w"].tolist() == [0, 1, 2]


# -- what no checkpoint holds --------------------------------------------------------------------


def test_pickles_are_never_loaded_and_everything_that_is_unfit_is_told(tmp_path):
    np.savez(
        tmp_path / "m.npz",
        objects=np.array([{"a": 1}], object), half=np.ones(2, ml_dtypes.bfloat16),
        small=np.ones(2, ml_dtypes.float8_e5m2), dates=np.array(["2020-01-01"], "M8[D]"),
        records=np.zeros(2, [("x", "f4")]), long=np.zeros(1, np.longdouble), good=np.zeros(3),
    )  # fmt: skip
    with pytest.raises(CheckpointFormatError, match="6 arrays that no checkpoint holds") as caught:
        open_checkpoint(tmp_path / "m.npz")
    for what in ("'objects' (Python objects", "'half' (bytes without a type", "'small' (", "'dates' (dates",
                 "'records' (records", "'long' ("):  # fmt: skip
        assert what in str(caught.value)


@pytest.mark.parametrize("name", ["m.npz", "model.ckpt"])
def test_a_pytorch_file_is_told_for_what_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(zipped({"archive/data.pkl": b"\x80\x02}q\x00."}))
    with pytest.raises(CheckpointFormatError, match="zip archive"):
        open_checkpoint(tmp_path / name)


def test_a_file_of_anything_else_is_no_zip_file(tmp_path):
    (tmp_path / "m.npz").write_bytes(b"whatever " * 20)
    with pytest.raises(CheckpointFormatError, match="is no zip file"):
        open_checkpoint(tmp_path / "m.npz")


def test_an_encrypted_member_is_refused(tmp_path):
    content = patched(zipped({"w.npy": FLOATS}), CENTRAL, 8, "<H", 1)
    with pytest.raises(CheckpointFormatError, match="is encrypted"):
        opened(tmp_path, content)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_numpy_never_uses_is_refused(tmp_path, method):
    with pytest.raises(CheckpointFormatError, match=f"method {method}, which NumPy never uses"):
        opened(tmp_path, zipped({"w.npy": FLOATS}, method))


# -- hostile files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "what"),
    [
        (b"", "no header"),
        (b"\x93NUMPY", "no header"),
        (b"PNG" * 10, "no header"),
        (npy(("<f4", "(3,)"), version=9), "version 9"),
        (npy(("<f4", "(3,)"))[:40], "cut short"),
        (npy("x" * 11_000), "a header of 11001 bytes"),
        (npy("{'descr': __import__('os'), 'fortran_order': False, 'shape': ()}"), "malformed"),
        (npy("(" * 9000), "malformed"),
        (npy("{'descr': '<f4', 'fortran_order': False}"), "without descr"),
        (npy("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}"), "without"),
        (npy("{'descr': '<f4', 'fortran_order': 'no', 'shape': ()}"), "malformed"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': '()'}"), "malformed"),
        (npy("{'descr': False, 'fortran_order': False, 'shape': ()}"), "elements of type"),
        (npy(("<f4", "(-1,)")), "malformed"),
        (npy(("<f4", f"({'9' * 5000},)")), "malformed shape"),
        (npy(("<f4", "(1,) * 9")), "malformed"),
        (npy(("<f4", f"({'1,' * 33})")), "a shape of 33 dimensions"),
        (npy(("<f4", f"({1 << 40}, {1 << 40})")), "larger than any memory"),
        (npy(("<f4", f"(0, {1 << 62}, {1 << 62})")), "larger than any memory"),
        (npy(("<f4", "(3,)"), bytes(11)), r"has 11 bytes, where float32\[3\] takes 12"),
        (npy(("<f4", "(3,)"), bytes(13)), r"has 13 bytes, where float32\[3\] takes 12"),
        (npy(("<f4", f"({1 << 40},)"), bytes(4)), "has 4 bytes, where"),
        (npy(("|S999999999", "(1000000,)"), bytes(4)), "has 4 bytes, where"),
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_malformed_member_is_damage(tmp_path, member, what, method):
    with pytest.raises(DamagedCheckpointError, match=what):
        opened(tmp_path, zipped({"w.npy": member}, method))


@pytest.mark.parametrize("descr", ["|S0", "<U0", "<f3", "<i16", "|V2", "|O", "<g16"])
def test_elements_that_no_checkpoint_holds_are_told(tmp_path, descr):
    with pytest.raises(CheckpointFormatError, match="no checkpoint holds"):
        opened(tmp_path, zipped({"w.npy": npy((descr, "(1000000000000,)"))}))


def test_characters_that_are_none_are_damage(tmp_path):
    for number in (0xFFFFFFFF, 0xD800):
        member = npy(("<U1", "(1,)"), struct.pack("<I", number))
        with pytest.raises(DamagedCheckpointError, match="array 'w' holds"):
            opened(tmp_path, zipped({"w.npy": member}))


def test_a_bomb_that_claims_more_than_deflate_can_hold_is_refused_before_it_is_unpacked(tmp_path):
    content = zipped({"w.npy": npy(("<f4", f"({1 << 32},)"), bytes(1 << 20))}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedCheckpointError, match="which cannot hold more than"):
        opened(tmp_path, patched(content, CENTRAL, 24, "<I", 0xFFFFFFF0))


def test_a_bomb_that_claims_less_than_it_holds_is_stopped_there(tmp_path):
    member = npy(("|u1", "(1000,)"), bytes(1000))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(member + bytes(50 << 20)) + packer.flush()
    content = zipped({"w.npy": packed})
    for magic, method, crc in ((LOCAL, 8, 14), (CENTRAL, 10, 16)):
        content = patched(content, magic, method, "<H", 8)
        content = patched(content, magic, crc, "<III", zlib.crc32(member), len(packed), len(member))
    with pytest.raises(DamagedCheckpointError, match="has more bytes"):
        opened(tmp_path, content)


def test_a_deflated_member_that_ends_early_is_damage(tmp_path):
    member = npy(("|u1", "(100000,)"), os.urandom(100_000))
    content = zipped({"w.npy": member}, zipfile.ZIP_DEFLATED)
    content = patched(content, CENTRAL, 20, "<I", 50_000)
    with pytest.raises(DamagedCheckpointError):
        opened(tmp_path, content)


def test_two_members_of_one_name_are_damage(tmp_path):
    content = zipped({"w.npy": FLOATS, "v.npy": FLOATS}).replace(b"v.npy", b"w.npy")
    with pytest.raises(DamagedCheckpointError, match=r"several members of the name 'w\.npy'"):
        opened(tmp_path, content)


def test_members_that_share_bytes_are_damage(tmp_path):
    content = zipped({"w.npy": FLOATS, "v.npy": FLOATS})
    second = content.index(CENTRAL, content.index(CENTRAL) + 1)
    content = content[: second + 42] + bytes(4) + content[second + 46 :]
    with pytest.raises(DamagedCheckpointError, match=r"not where the directory says|share bytes"):
        opened(tmp_path, content)


@pytest.mark.parametrize(
    ("offset", "fmt", "value"),
    [(42, "<I", 1), (42, "<I", 1 << 30), (20, "<I", 1 << 30), (24, "<I", 5)],
)
def test_a_directory_that_contradicts_the_file_is_damage(tmp_path, offset, fmt, value):
    content = patched(zipped({"w.npy": FLOATS}), CENTRAL, offset, fmt, value)
    with pytest.raises(DamagedCheckpointError):
        opened(tmp_path, content)


@pytest.mark.parametrize("field", [10, 12, 16])
def test_an_end_that_contradicts_the_file_is_one_error(tmp_path, field):
    for value in (0xFFFF, 0x7FFF, 2):
        content = patched(zipped({"w.npy": FLOATS}), END, field, "<H", value)
        with contextlib.suppress(DamagedCheckpointError, CheckpointFormatError):
            assert opened(tmp_path, content)["w"].tolist() == [0, 1, 2]


def test_a_name_that_is_no_text_is_damage(tmp_path):
    content = patched(zipped({"w.npy": FLOATS}), CENTRAL, 8, "<H", 1 << 11)
    content = content.replace(b"w.npy", b"\xff.npy")
    with pytest.raises(DamagedCheckpointError, match="its directory is malformed"):
        opened(tmp_path, content)


def test_a_flipped_byte_is_found_whether_values_are_read_verified_or_copied(tmp_path):
    path = tmp_path / "m.npz"
    np.savez(path, good=np.arange(3), bad=np.arange(4.0))
    content = path.read_bytes()
    at = content.index(np.arange(4.0).tobytes()) + 9
    path.write_bytes(flipped(content, at))
    with open_checkpoint(path) as reader:
        assert reader.read("good").tolist() == [0, 1, 2]
        with pytest.raises(DamagedCheckpointError, match=r"'bad\.npy' .* its checksum is"):
            reader.read("bad")
        with pytest.raises(DamagedTensorsError, match=r"'bad\.npy'"):
            reader.verify(["good", "bad"])
    for name in ("copy.npz", "copy.safetensors", "copy.ckpt"):
        with pytest.raises(DamagedTensorsError, match=r"'bad\.npy'"):
            convert(path, tmp_path / "out" / name)
    assert os.listdir(tmp_path) == ["m.npz"]


def test_every_flipped_byte_is_found_or_changes_nothing(tmp_path):
    file = io.BytesIO()
    np.savez(file, **{"a/w": np.arange(6, dtype=np.float32).reshape(2, 3), "e": np.zeros((2, 0))})
    whole = file.getvalue()
    truth = opened(tmp_path, whole)
    for at in range(len(whole)):
        for bits in (1, 0x80, 0xFF):
            try:
                found = opened(tmp_path, flipped(whole, at, bits))
            except CompatRestoreError:
                continue  # as it should be
            for name, value in found.items():
                assert value.tobytes() == truth[name].tobytes()
                assert value.shape == truth[name].shape
            assert set(found) == set(truth)


def test_a_file_that_is_cut_anywhere_is_one_error(tmp_path):
    whole = zipped({"w.npy": FLOATS, "v.npy": FLOATS}, zipfile.ZIP_DEFLATED)
    for length in range(len(whole)):
        with pytest.raises((DamagedCheckpointError, CheckpointFormatError)):
            opened(tmp_path, whole[:length])


# -- what a path means ---------------------------------------------------------------------------


def test_a_file_is_known_by_what_is_in_it_and_by_its_directory(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.zeros(3))
    with open_checkpoint(tmp_path) as reader:
        assert (reader.path, reader.format) == (str(tmp_path / "m.npz"), "npz file")
        assert reader.files() == (str(tmp_path / "m.npz"),)
    os.rename(tmp_path / "m.npz", tmp_path / "weights")
    with open_checkpoint(tmp_path / "weights") as reader:
        assert reader.format == "npz file"


def test_a_checkpoint_of_tensorflow_counts_rather_than_an_npz_file_beside_it(golden, tmp_path):
    for name in os.listdir(golden / "plain"):
        (tmp_path / name).write_bytes((golden / "plain" / name).read_bytes())
    np.savez(tmp_path / "values.npz", w=np.zeros(3))
    with open_checkpoint(tmp_path) as reader:
        assert reader.format.startswith("V2")


def test_a_misspelt_name_is_told_with_its_neighbours(tmp_path):
    np.savez(tmp_path / "weights.npz", w=np.zeros(3))
    with pytest.raises(CheckpointNotFoundError, match=r"holds 'weights\.npz'"):
        open_checkpoint(tmp_path / "weihgts.npz")
