from __future__ import annotations

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from checkpoints import damage, numbers
from checkpoints import write as write_bundle
from faults import faults_at, killed_at
from formats import snapshot

from compat_restore import convert, open_checkpoint
from compat_restore.checkpoint.safetensors import DTYPES, LONGEST_HEADER
from compat_restore.checkpoint.safetensors_writer import SafetensorsWriter, check_destination
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
    with SafetensorsWriter(str(path), **options) as writer:
        writer.write([of(name, value) for name, value in tensors.items()])
        writer.finish()
    return str(path)


def contents(path):
    with open_checkpoint(path) as reader:
        return {name: reader.read(name).tolist() for name in reader.specs()}


def lists(tensors):
    return {name: value.tolist() for name, value in tensors.items()}


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 2)])
def test_every_type_and_shape_comes_back_as_it_was(tmp_path, dtype, shape):
    kind = numpy_dtype(dtype)
    data = np.arange(int(np.prod(shape, dtype=int)) * kind.itemsize, dtype=np.uint8)
    value = (data % 2 if dtype is DType.bool else data).view(kind).reshape(shape)
    with SafetensorsWriter(str(tmp_path / "m.safetensors")) as writer:
        writer.write([of("w", value)])
        assert writer.read_back("w").tobytes() == value.tobytes()
        assert os.listdir(tmp_path) == []
        writer.finish()
    with open_checkpoint(tmp_path / "m.safetensors") as reader:
        found = reader.read("w")
    assert (found.dtype, found.shape, found.tobytes()) == (kind, shape, value.tobytes())


def test_the_safetensors_package_reads_what_is_written(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = ONE | {
        "é": np.array([True, False]),
        "empty": np.zeros((2, 0, 3), np.int16),
        "scalar": np.array(7, np.uint8),
        "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    }
    found = package.load_file(write(tmp_path / "new" / "m.safetensors", tensors))
    assert sorted(found) == sorted(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()


def test_tensors_of_large_elements_come_first_so_that_all_are_aligned(tmp_path):
    values = {name: np.zeros(3, name) for name in ("int8", "float64", "float16", "bool", "int32")}
    path = tmp_path / "m.safetensors"
    write(path, values)
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = header_of(path)
    assert list(header) == ["float64", "int32", "float16", "int8", "bool"]
    assert begin % 8 == 0
    assert all((begin + header[n]["data_offsets"][0]) % v.itemsize == 0 for n, v in values.items())


def test_a_checkpoint_is_converted_there_and_back_without_a_changed_byte(golden, tmp_path):
    for folder in ("plain", "partitioned", "v1"):
        path, back = tmp_path / f"{folder}.safetensors", tmp_path / f"{folder}.ckpt"
        with open_checkpoint(golden / folder) as source:
            names = [n for n, spec in source.specs().items() if spec.dtype in DTYPES.values()]
            convert(source.path, path, {name: name for name in names})
            convert(path, back)
            with open_checkpoint(back) as result:
                assert list(result.specs()) == names
                for name in names:
                    assert source.read(name).tobytes() == result.read(name).tobytes()
                    assert source.specs()[name].shape == result.specs()[name].shape


def test_values_are_read_one_at_a_time_and_copies_are_sorted_by_their_place(tmp_path):
    source = write(tmp_path / "s.safetensors", {n: numbers(3) for n in "dcba"})
    with open_checkpoint(source) as reader, SafetensorsWriter(str(tmp_path / "m")) as writer:
        copied = [
            Content(
                name=name, dtype=spec.dtype, shape=(3,), read=lambda: 1 / 0, stored=reader.stored(name)
            )
            for name, spec in reader.specs().items()
        ]  # fmt: skip
        writer.write([of("z", numbers(3)), *copied])
        writer.finish()
    assert list(header_of(tmp_path / "m")) == ["d", "c", "b", "a", "z"]


def test_a_tensor_may_be_given_in_several_pieces(tmp_path):
    source = write(tmp_path / "s.safetensors", {"x": numbers(2, 3), "y": numbers(1, 3, start=9)})
    with open_checkpoint(source) as reader, SafetensorsWriter(str(tmp_path / "m")) as writer:
        pieces = (*reader.stored("x"), *reader.stored("y"))
        whole = Content(
            name="w", dtype=DType.float32, shape=(3, 3), read=lambda: 1 / 0, stored=pieces
        )
        writer.write([whole])
        writer.finish()
    assert contents(tmp_path / "m") == {"w": [[1, 2, 3], [4, 5, 6], [9, 10, 11]]}


def test_a_checkpoint_of_nothing_is_one(tmp_path):
    assert contents(write(tmp_path / "m.safetensors", {})) == {}


# -- refusals ------------------------------------------------------------------------------------


def test_all_tensors_that_the_format_cannot_hold_are_told_before_anything_is_written(tmp_path):
    unfit = [
        DType.string, DType.resource, DType.variant, DType.complex128, DType.qint8, DType.quint8,
        DType.qint16, DType.quint16, DType.qint32, DType.int4, DType.uint4,
        DType.float8_e4m3b11fnuz,
    ]  # fmt: skip
    with SafetensorsWriter(str(tmp_path / "m.safetensors")) as writer:
        with pytest.raises(UsageError, match="cannot hold 12 of the tensors") as caught:
            writer.write(
                [of("w", numbers(3))]
                + [
                    Content(name=f"t{n}", dtype=dtype, shape=(), read=lambda: 1 / 0)
                    for n, dtype in enumerate(unfit)
                ]
            )
        for number, dtype in enumerate(unfit):
            assert f"'t{number}' ({dtype})" in str(caught.value)
        assert "--exclude" in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert set(unfit) == set(DType) - set(DTYPES.values())


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_the_format_cannot_have_is_refused(tmp_path, name):
    with (
        SafetensorsWriter(str(tmp_path / "m")) as writer,
        pytest.raises(UsageError, match="has no tensors of the names"),
    ):
        writer.write([of(name, numbers(3))])


def test_a_name_given_twice_is_refused(tmp_path):
    with (
        SafetensorsWriter(str(tmp_path / "m")) as writer,
        pytest.raises(UsageError, match="'w' cannot be written twice"),
    ):
        writer.write([of("w", numbers(3)), of("w", numbers(3))])


def test_a_partitioned_tensor_is_refused(tmp_path):
    part = Content(
        name="w", dtype=DType.int8, shape=(2,), read=lambda: 1 / 0, slices=(Slice((0,), (2,)),)
    )
    with (
        SafetensorsWriter(str(tmp_path / "m")) as writer,
        pytest.raises(UsageError, match="no partitioned tensors; 'w'"),
    ):
        writer.write([part])


def test_a_header_that_the_reference_implementation_would_not_read_is_refused(tmp_path):
    with (
        SafetensorsWriter(str(tmp_path / "m")) as writer,
        pytest.raises(UsageError, match="max-shard-size"),
    ):
        writer.write([of("w" * LONGEST_HEADER, numbers(1))])


def test_values_of_another_shape_than_announced_are_not_put_in_place(tmp_path):
    wrong = Content(name="w", dtype=DType.float32, shape=(4,), read=lambda: numbers(3))
    with (
        SafetensorsWriter(str(tmp_path / "m")) as writer,
        pytest.raises(PreservationError, match=r"was to be float32\[4\].*float32\[3\]"),
    ):
        writer.write([wrong])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_of_no_bytes_is_refused(tmp_path, size):
    with pytest.raises(UsageError, match="a number of bytes is expected"):
        SafetensorsWriter(str(tmp_path / "m"), max_shard_size=size)


def test_all_damaged_tensors_are_told_at_once_whichever_file_they_go_into(tmp_path):
    prefix = write_bundle(tmp_path / "s", {name: numbers(4) for name in "abc"})
    damage(prefix, "a")
    damage(prefix, "c")
    with pytest.raises(DamagedTensorsError) as caught:
        convert(prefix, tmp_path / "out" / "m.safetensors", max_shard_size=16)
    assert ["'a'" in caught.value.faults[0], "'c'" in caught.value.faults[1]] == [True, True]
    assert not (tmp_path / "out").exists()


# -- sets of files -------------------------------------------------------------------------------


def test_what_fits_into_one_file_is_one_file(tmp_path):
    write(tmp_path / "m.safetensors", ONE, max_shard_size=32)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_set_is_what_hugging_face_s_libraries_read(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = {f"layer{n}/w": numbers(4, start=n) for n in range(5)} | {"big": numbers(20)}
    write(tmp_path / "model.safetensors", tensors, max_shard_size=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(v.nbytes for v in tensors.values())}
    assert sorted(index["weight_map"]) == sorted(tensors)
    names = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    assert sorted(os.listdir(tmp_path)) == [*names, "model.safetensors.index.json"]
    found = {}
    for name in names:
        held = package.load_file(tmp_path / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(held)
        assert sum(value.nbytes for value in held.values()) <= 40 or list(held) == ["big"]
        found |= held
    assert lists(found) == lists(tensors)
    assert contents(tmp_path / "model.safetensors") == lists(tensors)


SMALL = 16  # bytes: ONE and TWO take two files each


@pytest.mark.parametrize("old", [None, SMALL])
@pytest.mark.parametrize("new", [None, SMALL])
def test_overwriting_replaces_files_and_sets_by_either(tmp_path, old, new):
    path = tmp_path / "m.safetensors"
    write(path, ONE, max_shard_size=old)
    other = write(tmp_path / "m-other.safetensors", ONE, max_shard_size=SMALL)
    write(path, TWO, max_shard_size=new, overwrite=True)
    assert contents(path) == lists(TWO)
    assert contents(other) == lists(ONE)
    count = len([name for name in os.listdir(tmp_path) if not name.startswith("m-other")])
    assert count == (1 if new is None else 3)
    assert set(check_destination(str(path), overwrite=True)) == {
        str(tmp_path / name) for name in os.listdir(tmp_path) if not name.startswith("m-other")
    }


@pytest.mark.parametrize("old", [None, SMALL])
def test_what_is_there_is_not_replaced_unless_asked_for(tmp_path, old):
    write(tmp_path / "m.safetensors", ONE, max_shard_size=old)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"exists already .*overwrite=True"):
        SafetensorsWriter(str(tmp_path / "m.safetensors"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("size", [None, 16])
def test_overwriting_never_removes_other_checkpoints_that_an_old_index_names(tmp_path, size):
    others = [
        "precious.safetensors",
        "m2-00001-of-00002.safetensors",
        "other-m-00001-of-00001.safetensors",
    ]
    for name in others:
        write(tmp_path / name, ONE)
    (tmp_path / "kept.txt").write_text("no weights")
    weight_map = {f"w{n}": name for n, name in enumerate([*others, "kept.txt"])}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = {name: (tmp_path / name).read_bytes() for name in [*others, "kept.txt"]}
    write(tmp_path / "m.safetensors", TWO, overwrite=True, max_shard_size=size)
    assert contents(tmp_path / "m.safetensors") == lists(TWO)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_overwriting_removes_the_files_of_an_old_set_whichever_of_its_names_they_have(tmp_path):
    path = tmp_path / "m.safetensors"
    for _ in range(3):
        write(path, ONE, overwrite=True, max_shard_size=16)
    for name in ("m-00001-of-00002-r7.safetensors", "m-00003-of-00009.safetensors"):
        (tmp_path / name).write_bytes(b"left behind")
    write(path, TWO, overwrite=True)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_old_index_that_names_files_elsewhere_removes_none_of_them(tmp_path):
    write(tmp_path / "kept.safetensors", ONE)
    (tmp_path / "set").mkdir()
    index = tmp_path / "set" / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../kept.safetensors"}}))
    write(tmp_path / "set" / "m.safetensors", TWO, overwrite=True)
    assert contents(tmp_path / "kept.safetensors") == lists(ONE)
    assert os.listdir(tmp_path / "set") == ["m.safetensors"]


def test_a_directory_is_no_name(tmp_path):
    with pytest.raises(OutputError, match="is a directory"):
        SafetensorsWriter(str(tmp_path))
    with pytest.raises(OutputError, match="is no name"):
        SafetensorsWriter("")


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(OutputError, match="no regular file"):
        SafetensorsWriter(str(tmp_path / "m.safetensors"), overwrite=True)


# -- faults --------------------------------------------------------------------------------------


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with SafetensorsWriter(str(tmp_path / "new" / "m"), max_shard_size=SMALL) as writer:
        writer.write([of(name, value) for name, value in ONE.items()])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("old", [None, SMALL])
@pytest.mark.parametrize("new", [None, SMALL])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_writing_call_leaves_one_whole_checkpoint(tmp_path, kind, old, new):
    def fail():
        raise OSError(kind, os.strerror(kind))

    path = tmp_path / "m.safetensors"
    write(path, ONE, max_shard_size=old)
    for number in range(1, 1000):
        before = snapshot(tmp_path)
        told = ""
        with faults_at(number, fail) as counter:
            try:
                write(path, TWO, overwrite=True, max_shard_size=new)
            except OutputError as error:
                told = str(error)
        if not counter.reached:
            break
        assert not told or os.strerror(kind) in told or "it cannot be removed" in told
        if "nothing was changed" in told.lower():
            assert snapshot(tmp_path) == before
        else:
            assert contents(path) == lists(TWO) or (told and contents(path) == lists(ONE))
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
        write(path, ONE, overwrite=True, max_shard_size=old)
        restored = set(check_destination(str(path), overwrite=True))
        assert len(restored) == (1 if old is None else 3)
    assert number > 8


@pytest.mark.parametrize("old", [None, SMALL])
@pytest.mark.parametrize("new", [None, SMALL])
def test_a_writer_killed_at_any_writing_call_leaves_one_whole_checkpoint(tmp_path, old, new):
    path = tmp_path / "m.safetensors"
    write(path, ONE, max_shard_size=old)
    for number in range(1, 1000):
        if not killed_at(number, lambda: write(path, TWO, overwrite=True, max_shard_size=new)):
            break
        assert contents(path) in (lists(ONE), lists(TWO)), number
        assert contents(tmp_path) == contents(path)
        write(path, ONE, overwrite=True, max_shard_size=old)
        assert contents(path) == lists(ONE)
    assert number > 8


def test_an_interruption_at_any_writing_call_leaves_one_whole_checkpoint(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    path = tmp_path / "m.safetensors"
    write(path, ONE, max_shard_size=SMALL)
    for number in range(1, 1000):
        with faults_at(number, interrupt) as counter:
            try:
                write(path, TWO, overwrite=True, max_shard_size=SMALL)
            except KeyboardInterrupt:
                pass
            else:
                break
        assert contents(path) in (lists(ONE), lists(TWO)), number
        write(path, ONE, overwrite=True, max_shard_size=SMALL)
    assert not counter.reached
    assert number > 15


def test_the_old_set_is_whole_until_the_new_index_is_in_place(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    write(path, ONE, max_shard_size=SMALL)
    real = os.replace
    seen = []

    def replace(source, target):
        seen.append(contents(path))
        real(source, target)
        seen.append(contents(path))

    monkeypatch.setattr(os, "replace", replace)
    write(path, TWO, max_shard_size=SMALL, overwrite=True)
    assert seen == [lists(ONE), lists(TWO)]


# -- URLs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, SMALL])
def test_files_and_sets_are_written_to_urls_and_read_from_there(size):
    fsspec = pytest.importorskip("fsspec")
    folder = "memory://safetensors"
    try:
        for tensors in (ONE, TWO):
            write(f"{folder}/m.safetensors", tensors, max_shard_size=size, overwrite=True)
            assert contents(f"{folder}/m.safetensors") == contents(folder) == lists(tensors)
        write(f"{folder}/m.safetensors", ONE, max_shard_size=20 - (size or 0), overwrite=True)
        assert contents(f"{folder}/m.safetensors") == lists(ONE)
        with pytest.raises(OutputError, match="exists already"):
            SafetensorsWriter(f"{folder}/m.safetensors")
    finally:
        fsspec.filesystem("memory").rm("/safetensors", recursive=True)
