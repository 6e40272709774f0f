from __future__ import annotations

import errno
import io
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
from checkpoints import damage, numbers
from checkpoints import write as write_bundle
from faults import faults_at, killed_at
from formats import snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore import convert, open_checkpoint
from compat_restore.checkpoint import npz_writer
from compat_restore.checkpoint.npz import KINDS
from compat_restore.checkpoint.npz_writer import NpzWriter
from compat_restore.checkpoint.writer import Content
from compat_restore.errors import (
    DamagedTensorsError,
    OutputError,
    PreservationError,
    UsageError,
)
from compat_restore.tensors import DType, Slice, dtype_of, numpy_dtype

ONE = {"a/w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1], np.int64)}
TWO = {"c": np.array([2.5, 3.5]), "a/w": np.zeros((2, 3), np.float32)}


def of(name, value):
    return Content.of(name, dtype_of(value.dtype), value)


def write(path, tensors, **options):
    with NpzWriter(str(path), **options) as writer:
        writer.write([of(name, value) for name, value in tensors.items()])
        writer.finish()
    return str(path)


def contents(path):
    with open_checkpoint(path) as reader:
        reader.verify(reader.specs())
        return {name: reader.read(name).tolist() for name in reader.specs()}


def lists(tensors):
    return {name: value.tolist() for name, value in tensors.items()}


def strings(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 2)])
def test_every_type_and_shape_comes_back_as_it_was(tmp_path, dtype, shape):
    kind = numpy_dtype(dtype)
    value = np.arange(int(np.prod(shape, dtype=int))).astype(kind).reshape(shape)
    with NpzWriter(str(tmp_path / "m.npz")) as writer:
        writer.write([of("w", value)])
        assert writer.read_back("w").tobytes() == value.tobytes()
        assert os.listdir(tmp_path) == []
        writer.finish()
    with open_checkpoint(tmp_path / "m.npz") as reader:
        for found in (reader.read("w"), np.load(tmp_path / "m.npz", allow_pickle=False)["w"]):
            assert (found.dtype, found.shape) == (kind, shape)
            assert found.tobytes() == value.tobytes()


def test_zipfile_finds_no_fault_and_every_array_is_aligned(tmp_path):
    tensors = {"x" * n: numbers(n % 7) for n in range(1, 200)} | {
        "é/日本": numbers(2),
        "": numbers(1),
    }
    path = write(tmp_path / "m.npz", tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.filename for info in archive.infolist()} == {f"{n}.npy" for n in tensors}
        # A member that is unpacked is an .npy file as NumPy writes it.
        assert np.load(io.BytesIO(archive.read("é/日本.npy"))).tolist() == [1, 2]
    with open_checkpoint(path) as reader:
        assert all(s.offset % 64 == 0 for name in tensors for s in reader.stored(name))
    with np.load(path) as loaded:
        assert {name: loaded[name].tolist() for name in loaded} == lists(tensors)


def test_the_same_values_give_the_same_file(tmp_path):
    write(tmp_path / "a.npz", ONE)
    write(tmp_path / "b.npz", ONE)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_members_stand_in_the_order_of_their_sources(tmp_path):
    source = write(tmp_path / "s.npz", {n: numbers(3) for n in "dcba"})
    with open_checkpoint(source) as reader, NpzWriter(str(tmp_path / "m.npz")) as writer:
        copied = [
            Content(name=n, dtype=s.dtype, shape=(3,), read=lambda: 1 / 0, stored=reader.stored(n))
            for n, s in reader.specs().items()
        ]
        writer.write([of("z", numbers(3)), *copied])
        writer.finish()
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        assert archive.namelist() == ["d.npy", "c.npy", "b.npy", "a.npy", "z.npy"]


def test_a_tensor_may_be_given_in_several_pieces(tmp_path):
    source = write(tmp_path / "s.npz", {"x": numbers(2, 3), "y": numbers(1, 3, start=9)})
    with open_checkpoint(source) as reader, NpzWriter(str(tmp_path / "m.npz")) as writer:
        pieces = (*reader.stored("x"), *reader.stored("y"))
        writer.write(
            [
                Content(
                    name="w", dtype=DType.float32, shape=(3, 3), read=lambda: 1 / 0, stored=pieces
                )
            ]
        )
        writer.finish()
    assert contents(tmp_path / "m.npz") == {"w": [[1, 2, 3], [4, 5, 6], [9, 10, 11]]}


def test_strided_and_big_endian_values_are_written_as_what_they_mean(tmp_path):
    tensors = {"t": numbers(2, 3).T, "big": np.arange(3, dtype=">i4")}
    path = write(tmp_path / "m.npz", tensors)
    assert contents(path) == lists(tensors)


def test_a_checkpoint_is_converted_there_and_back_without_a_changed_byte(golden, tmp_path):
    for folder in ("plain", "partitioned", "v1", "dtypes"):
        path, back = tmp_path / f"{folder}.npz", tmp_path / f"{folder}.ckpt"
        with open_checkpoint(golden / folder) as source:
            names = [n for n, spec in source.specs().items() if spec.dtype in KINDS]
            convert(source.path, path, {name: name for name in names})
            convert(path, back)
            with open_checkpoint(back) as result:
                assert list(result.specs()) == names
                for name in names:
                    assert source.read(name).tobytes() == result.read(name).tobytes()


# -- strings -------------------------------------------------------------------------------------


def test_strings_are_written_as_bytes_of_one_width(tmp_path):
    tensors = {"s": strings(b"ab", b"", b"a\0c"), "none": strings(), "empty": strings(b"", b"")}
    path = write(tmp_path / "m.npz", tensors)
    assert contents(path) == lists(tensors)
    loaded = np.load(path, allow_pickle=False)
    assert {name: loaded[name].dtype.str for name in loaded} == {
        "s": "|S3", "none": "|S1", "empty": "|S1",
    }  # fmt: skip
    with NpzWriter(str(tmp_path / "n.npz")) as writer:
        writer.write([of(name, value) for name, value in tensors.items()])
        assert writer.read_back("s").tolist() == [b"ab", b"", b"a\0c"]


def test_strings_of_a_bundle_are_decoded(tmp_path):
    prefix = write_bundle(tmp_path / "s", {"s": strings(b"x", b"yz"), "w": numbers(3)})
    convert(prefix, tmp_path / "m.npz")
    assert contents(tmp_path / "m.npz") == {"s": [b"x", b"yz"], "w": [1, 2, 3]}


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.binary(max_size=9), max_size=5))
def test_strings_come_back_or_are_refused(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("f") / "m.npz"
    try:
        write(path, {"s": strings(*values)})
    except UsageError:
        assert any(value.endswith(b"\0") for value in values)
    else:
        assert contents(path) == {"s": values}


# -- zip64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 200, 700])
def test_what_does_not_fit_into_32_bits_is_written_as_zip64(tmp_path, monkeypatch, limit):
    tensors = {f"w{n}": numbers(n) for n in range(1, 6)} | {"large": numbers(100)}
    monkeypatch.setattr(npz_writer, "_ZIP64_FROM", limit)
    path = write(tmp_path / "m.npz", tensors)
    monkeypatch.undo()
    assert contents(path) == lists(tensors)
    with np.load(path) as loaded:
        assert {name: loaded[name].tolist() for name in loaded} == lists(tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        versions = [info.extract_version for info in archive.infolist()]
        assert 45 in versions
        assert (20 in versions) == (limit > 1)


def test_more_members_than_16_bits_can_count_are_written_as_zip64(tmp_path):
    value = np.zeros((), np.uint8)
    path = write(tmp_path / "m.npz", {f"w{n}": value for n in range(65_536)})
    with open_checkpoint(path) as reader:
        assert len(reader.specs()) == 65_536
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 65_536


# -- refusals ------------------------------------------------------------------------------------


def test_all_tensors_that_numpy_could_not_load_again_are_told_before_anything_is_written(tmp_path):
    unfit = set(DType) - set(KINDS) - {DType.string}
    assert {DType.bfloat16, DType.qint8, DType.variant, DType.int4} <= unfit
    with NpzWriter(str(tmp_path / "m.npz")) as writer:
        with pytest.raises(UsageError, match=f"cannot hold {len(unfit) + 1} of") as caught:
            writer.write(
                [of("w", numbers(3)), of("nul", strings(b"a\0"))]
                + [
                    Content(name=f"t/{d}", dtype=d, shape=(), read=lambda: 1 / 0)
                    for d in sorted(unfit)
                ]
            )
        for dtype in unfit:
            assert f"'t/{dtype}' ({dtype})" in str(caught.value)
        assert "'nul' (strings that end in NUL bytes" in str(caught.value)
        assert "--exclude" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_numpy_itself_loses_what_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(2, ml_dtypes.bfloat16), s=np.array([b"a\0"]))
    loaded = np.load(tmp_path / "m.npz")
    assert loaded["w"].dtype.kind == "V"
    assert loaded["s"].tolist() == [b"a"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 40_000])
def test_a_name_that_no_member_can_have_is_refused(tmp_path, name):
    with NpzWriter(str(tmp_path / "m")) as writer, pytest.raises(UsageError, match="of the names"):
        writer.write([of(name, numbers(3))])


def test_a_name_given_twice_is_refused(tmp_path):
    with NpzWriter(str(tmp_path / "m")) as writer, pytest.raises(UsageError, match="twice"):
        writer.write([of("w", numbers(3)), of("w", numbers(3))])


def test_a_partitioned_tensor_is_refused(tmp_path):
    part = Content(
        name="w", dtype=DType.int8, shape=(2,), read=lambda: 1 / 0, slices=(Slice((0,), (2,)),)
    )
    with NpzWriter(str(tmp_path / "m")) as writer, pytest.raises(UsageError, match="partitioned"):
        writer.write([part])


def test_values_of_another_shape_than_announced_are_not_put_in_place(tmp_path):
    wrong = Content(name="w", dtype=DType.float32, shape=(4,), read=lambda: numbers(3))
    with NpzWriter(str(tmp_path / "m")) as writer, pytest.raises(PreservationError, match="was to"):
        writer.write([wrong])
    assert os.listdir(tmp_path) == []


def test_all_damaged_tensors_are_told_at_once(tmp_path):
    prefix = write_bundle(tmp_path / "s", {name: numbers(4) for name in "abc"})
    damage(prefix, "a")
    damage(prefix, "c")
    with pytest.raises(DamagedTensorsError) as caught:
        convert(prefix, tmp_path / "out" / "m.npz")
    assert ["'a'" in caught.value.faults[0], "'c'" in caught.value.faults[1]] == [True, True]
    assert not (tmp_path / "out").exists()
    convert(prefix, tmp_path / "out" / "m.npz", verify=False)


def test_what_is_there_is_not_replaced_unless_asked_for(tmp_path):
    path = write(tmp_path / "m.npz", ONE)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"exists already.*overwrite=True"):
        NpzWriter(path)
    assert snapshot(tmp_path) == before
    write(path, TWO, overwrite=True)
    assert contents(path) == lists(TWO)


def test_what_appears_while_writing_is_not_replaced(tmp_path):
    with NpzWriter(str(tmp_path / "m.npz")) as writer:
        writer.write([of("w", numbers(3))])
        (tmp_path / "m.npz").write_text("somebody else's")
        with pytest.raises(OutputError, match="appeared"):
            writer.finish()
    assert (tmp_path / "m.npz").read_text() == "somebody else's"


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "m.npz")
    with pytest.raises(OutputError, match="no regular file"):
        NpzWriter(str(tmp_path / "m.npz"), overwrite=True)
    with pytest.raises(OutputError, match="is a directory"):
        NpzWriter(str(tmp_path), overwrite=True)
    with pytest.raises(OutputError, match="is no name"):
        NpzWriter("")


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_writing_call_leaves_one_whole_file(tmp_path, kind):
    def fail():
        raise OSError(kind, os.strerror(kind))

    path = write(tmp_path / "m.npz", ONE)
    for number in range(1, 1000):
        before = snapshot(tmp_path)
        told = ""
        with faults_at(number, fail) as counter:
            try:
                write(path, TWO, overwrite=True)
            except OutputError as error:
                told = str(error)
        if not counter.reached:
            break
        assert not told or os.strerror(kind) in told
        if "nothing was changed" in told.lower():
            assert snapshot(tmp_path) == before
        else:
            assert contents(path) == lists(TWO)
            write(path, ONE, overwrite=True)
        assert os.listdir(tmp_path) == ["m.npz"]
    assert number > 8


def test_a_writer_killed_at_any_writing_call_leaves_one_whole_file(tmp_path):
    path = write(tmp_path / "m.npz", ONE)
    for number in range(1, 1000):
        if not killed_at(number, lambda: write(path, TWO, overwrite=True)):
            break
        assert contents(path) in (lists(ONE), lists(TWO)), number
        assert contents(tmp_path) == contents(path)
        write(path, ONE, overwrite=True)
    assert number > 8


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with NpzWriter(str(tmp_path / "new" / "m")) as writer:
        writer.write([of(name, value) for name, value in ONE.items()])
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_to_a_url_and_read_from_there():
    fsspec = pytest.importorskip("fsspec")
    try:
        for tensors in (ONE, TWO):
            write("memory://npz/m.npz", tensors, overwrite=True)
            assert contents("memory://npz/m.npz") == contents("memory://npz") == lists(tensors)
        with pytest.raises(OutputError, match="exists already"):
            NpzWriter("memory://npz/m.npz")
    finally:
        fsspec.filesystem("memory").rm("/npz", recursive=True)
