from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from formats import rows_of, snapshot, truth_of

from compat_restore import open_checkpoint
from compat_restore.checkpoint import bundle_writer
from compat_restore.checkpoint.bundle_writer import BundleWriter
from compat_restore.errors import DamagedCheckpointError, OutputError
from compat_restore.tensors import DType

ONE = {"a/w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1], np.int64)}
TWO = {"c": np.array([2.5, 3.5]), "a/w": np.zeros((2, 3), np.float32)}


def write(prefix, tensors, **options):
    with BundleWriter(str(prefix), **options) as writer:
        for name, value in tensors.items():
            writer.add(name, DType(value.dtype.name), value)
        writer.finish()


def contents(prefix):
    with open_checkpoint(prefix) as reader:
        reader.verify(reader.specs())
        return {name: reader.read(name).tolist() for name in reader.specs()}


def lists(tensors):
    return {name: value.tolist() for name, value in tensors.items()}


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "new" / "model.ckpt", ONE)
    assert contents(tmp_path / "new" / "model.ckpt") == lists(ONE)
    assert sorted(os.listdir(tmp_path / "new")) == [
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
    ]


@pytest.mark.parametrize("folder", ["plain", "sharded", "dtypes", "object_based"])
def test_a_checkpoint_copied_as_values_or_as_stored_bytes_is_the_same(golden, tmp_path, folder):
    for stored in (False, True):
        prefix = str(tmp_path / f"{stored}")
        with open_checkpoint(golden / folder) as reader, BundleWriter(prefix) as writer:
            for name, spec in reader.specs().items():
                if stored:
                    writer.add_stored(name, spec.dtype, spec.known_shape, reader.stored(name))
                else:
                    writer.add(name, spec.dtype, reader.read(name))
            writer.finish()
        with open_checkpoint(prefix) as reader:
            assert rows_of(reader) == truth_of(golden / folder)
    both = [(tmp_path / f"{stored}.data-00000-of-00001").read_bytes() for stored in (False, True)]
    assert both[0] == both[1]
    assert (tmp_path / "False.index").read_bytes() == (tmp_path / "True.index").read_bytes()


PEER = """
import hashlib, json, sys, tensorflow as tf
reader = tf.train.load_checkpoint(sys.argv[1])
rows = {}
for name, dtype in reader.get_variable_to_dtype_map().items():
    value = reader.get_tensor(name)
    if dtype == tf.string:
        data = value if isinstance(value, bytes) else b"\\0".join(value.ravel().tolist())
    else:
        data = value.tobytes()
    shape = reader.get_variable_to_shape_map()[name]
    rows[name] = {"dtype": dtype.name, "shape": shape, "sha1": hashlib.sha1(data).hexdigest()}
print(json.dumps(rows))
"""


@pytest.mark.tensorflow
def test_tensorflow_reads_what_is_written(golden, tmp_path):
    prefix = str(tmp_path / "model.ckpt")
    with open_checkpoint(golden / "dtypes") as reader, BundleWriter(prefix) as writer:
        for name, spec in reader.specs().items():
            writer.add(name, spec.dtype, reader.read(name))
        writer.finish()
    command = [sys.executable, "-c", PEER, prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == truth_of(golden / "dtypes")


@pytest.mark.tensorflow
def test_tensorflow_reads_a_checkpoint_that_replaced_another_as_one_of_two_data_files(tmp_path):
    write(tmp_path / "m", ONE)
    write(tmp_path / "m", TWO, overwrite=True)
    assert (tmp_path / "m.data-00001-of-00002").read_bytes() == b""
    command = [sys.executable, "-c", PEER, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == set(TWO)


# -- what is there already -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "there", ["m.index", "m.data-00000-of-00001", "m.data-00002-of-00007", "m", "m.meta"]
)
def test_any_file_of_a_checkpoint_under_the_prefix_is_refused(tmp_path, there):
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        BundleWriter(str(tmp_path / "m"))
    assert snapshot(tmp_path) == {there: b"precious"}


@pytest.mark.parametrize(
    "there", ["m2.index", "m.data-0-of-1", "m-1.data-00000-of-00001", "x.data-00000-of-00001"]
)
def test_files_of_other_prefixes_are_neither_in_the_way_nor_touched(tmp_path, there):
    (tmp_path / there).write_bytes(b"precious")
    write(tmp_path / "m", ONE)
    write(tmp_path / "m", TWO, overwrite=True)
    assert (tmp_path / there).read_bytes() == b"precious"
    assert contents(tmp_path / "m") == lists(TWO)


def test_overwriting_replaces_the_old_checkpoint_and_leaves_none_of_its_files(tmp_path):
    for tensors in (ONE, TWO, ONE):
        write(tmp_path / "m", tensors, overwrite=True)
        assert contents(tmp_path / "m") == lists(tensors)
        counts = {name.split("-of-")[1] for name in os.listdir(tmp_path) if "-of-" in name}
        assert len(counts) == 1


def test_overwriting_an_old_v1_checkpoint_leaves_no_second_set_of_weights(golden, tmp_path):
    v1 = golden / "v1" / "model.ckpt"
    (tmp_path / "model.ckpt").write_bytes(v1.read_bytes())
    (tmp_path / "model.ckpt.meta").write_bytes(b"graph")
    write(tmp_path / "model.ckpt", ONE, overwrite=True)
    with open_checkpoint(tmp_path / "model.ckpt") as reader:
        assert reader.notes == ()
        assert set(reader.specs()) == set(ONE)
    assert "model.ckpt.meta" not in os.listdir(tmp_path)


def test_the_old_checkpoint_is_whole_until_the_new_index_is_in_place(tmp_path, monkeypatch):
    write(tmp_path / "m", ONE)
    seen = []

    def replace(source, target):
        seen.append(contents(tmp_path / "m"))
        os.rename(source, target)

    monkeypatch.setattr(bundle_writer.os, "replace", replace)
    write(tmp_path / "m", TWO, overwrite=True)
    assert seen == [lists(ONE)] * 3  # two data files and the index
    assert contents(tmp_path / "m") == lists(TWO)


def test_everything_is_synced_before_the_index_is_put_in_place(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        number = os.fstat(descriptor).st_ino
        names = [path.suffix for path in tmp_path.iterdir() if path.stat().st_ino == number]
        calls.append(("fsync", *(names or ["directory"])))
        fsync(descriptor)

    def replaced(source, target):
        calls.append(("rename", os.path.splitext(target)[1]))
        replace(source, target)

    monkeypatch.setattr(bundle_writer.os, "fsync", synced)
    monkeypatch.setattr(bundle_writer.os, "replace", replaced)
    write(tmp_path / "m", ONE)
    assert calls == [
        ("fsync", ".data"),
        ("fsync", ".index"),
        ("rename", ".data-00000-of-00001"),
        ("fsync", "directory"),
        ("rename", ".index"),
        ("fsync", "directory"),
    ]


# -- whole or not at all -------------------------------------------------------------------------


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with BundleWriter(str(tmp_path / "m")) as writer:
        writer.add("w", DType.float32, ONE["a/w"])
    assert os.listdir(tmp_path) == []


def test_an_error_on_the_way_leaves_what_was_there(tmp_path):
    write(tmp_path / "m", ONE)
    before = snapshot(tmp_path)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        BundleWriter(str(tmp_path / "m"), overwrite=True) as writer,
    ):
        writer.add("w", DType.float32, ONE["a/w"])
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


class FailingAt:
    """Calls a function until the n-th call, which fails as a full disk does."""

    def __init__(self, function, number, kind=OSError):
        self.function, self.left, self.kind = function, number, kind

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.kind(errno.ENOSPC, "No space left on device")
        return self.function(*args, **kwargs)


# An overwriting write makes 3 renames, and opens data, index and an empty second data file. It
# syncs data, index and directory before the rename that decides, and the directory after it.
BEFORE_THE_INDEX = [
    ("os.replace", 1), ("os.replace", 2), ("os.replace", 3),
    ("os.fsync", 1), ("os.fsync", 2), ("os.fsync", 3),
    ("open", 1), ("open", 2), ("open", 3),
]  # fmt: skip


def fail(monkeypatch, call, number, kind=OSError):
    if call == "open":
        failing = FailingAt(builtins.open, number, kind)
        monkeypatch.setattr(bundle_writer, "open", failing, raising=False)
    else:
        name = call.removeprefix("os.")
        failing = FailingAt(getattr(os, name), number, kind)
        monkeypatch.setattr(bundle_writer.os, name, failing)
    return failing


@pytest.mark.parametrize(("call", "number"), BEFORE_THE_INDEX)
def test_a_failure_before_the_index_is_in_place_changes_nothing(
    tmp_path, monkeypatch, call, number
):
    write(tmp_path / "m", ONE)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        failing = fail(patch, call, number)
        with pytest.raises(OutputError, match="No space left on device; nothing was changed"):
            write(tmp_path / "m", TWO, overwrite=True)
    assert failing.left == 0
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("call", "number"), [*BEFORE_THE_INDEX, ("os.fsync", 4)])
def test_an_interruption_at_any_call_leaves_one_whole_checkpoint(
    tmp_path, monkeypatch, call, number
):
    write(tmp_path / "m", ONE)
    with monkeypatch.context() as patch:
        fail(patch, call, number, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "m", TWO, overwrite=True)
    assert contents(tmp_path / "m") in (lists(ONE), lists(TWO))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_an_interruption_right_after_the_index_is_in_place_leaves_the_new_checkpoint(
    tmp_path, monkeypatch
):
    write(tmp_path / "m", ONE)

    def replace(source, target):
        os.rename(source, target)
        if target.endswith(".index"):
            raise KeyboardInterrupt

    monkeypatch.setattr(bundle_writer.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", TWO, overwrite=True)
    assert contents(tmp_path / "m") == lists(TWO)


def test_a_sync_that_fails_after_the_index_is_in_place_is_told_and_loses_nothing(
    tmp_path, monkeypatch
):
    write(tmp_path / "m", ONE)
    with monkeypatch.context() as patch:
        fail(patch, "os.fsync", 4)
        with pytest.raises(OutputError, match="is written, but it is not sure"):
            write(tmp_path / "m", TWO, overwrite=True)
    assert contents(tmp_path / "m") == lists(TWO)
    assert "m.data-00000-of-00001" in os.listdir(tmp_path)  # the older data, still there


def test_old_files_that_cannot_be_removed_do_not_spoil_the_new_checkpoint(tmp_path, monkeypatch):
    write(tmp_path / "m", ONE)
    with monkeypatch.context() as patch:
        patch.setattr(bundle_writer.os, "unlink", FailingAt(os.unlink, 1))
        write(tmp_path / "m", TWO, overwrite=True)
    assert contents(tmp_path / "m") == lists(TWO)


def test_a_disk_that_fills_while_data_is_written_changes_nothing(tmp_path, monkeypatch):
    write(tmp_path / "m", ONE)
    before = snapshot(tmp_path)
    with (  # noqa: PT012
        pytest.raises(OutputError, match="No space left"),
        BundleWriter(str(tmp_path / "m"), overwrite=True) as writer,
    ):
        monkeypatch.setattr(writer._data, "write", FailingAt(writer._data.write, 1), raising=False)
        writer.add("w", DType.float32, ONE["a/w"])
    assert snapshot(tmp_path) == before


KILLED = """
import os, signal, sys
import numpy as np
from compat_restore.checkpoint import bundle_writer
from compat_restore.tensors import DType

call, number = sys.argv[2], int(sys.argv[3])
function = getattr(os, call)

def killing(*args):
    global number
    number -= 1
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

setattr(os, call, killing)
with bundle_writer.BundleWriter(sys.argv[1], overwrite=True) as writer:
    writer.add("new", DType.float32, np.ones(3, np.float32))
    writer.finish()
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [("replace", 1), ("replace", 2), ("replace", 3), ("fsync", 1), ("fsync", 4), ("unlink", 1)],
)
def test_trap_24_a_writer_killed_at_any_moment_leaves_one_whole_checkpoint(tmp_path, call, number):
    write(tmp_path / "m", ONE)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "m"), call, str(number)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    decided = (call, number) in {("fsync", 4), ("unlink", 1)}
    assert contents(tmp_path / "m") == ({"new": [1, 1, 1]} if decided else lists(ONE))
    # What the killed writer left is hidden, and in the way of neither a directory's reader
    # nor the next writer.
    assert contents(tmp_path) == contents(tmp_path / "m")
    write(tmp_path / "m", TWO, overwrite=True)
    assert contents(tmp_path / "m") == lists(TWO)


# -- refusals ------------------------------------------------------------------------------------


def test_a_directory_is_no_prefix(tmp_path):
    for name in (str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(OutputError, match="is a directory; a prefix"):
            BundleWriter(name)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_an_output_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        BundleWriter(str(tmp_path / "file" / "m"))


@pytest.mark.parametrize("name", ["", "\0w", "\udc80"])
def test_a_name_that_no_key_can_be_is_refused(tmp_path, name):
    with (
        BundleWriter(str(tmp_path / "m")) as writer,
        pytest.raises(OutputError, match="no name for a tensor"),
    ):
        writer.add(name, DType.float32, ONE["a/w"])
    assert os.listdir(tmp_path) == []


def test_a_name_given_twice_is_refused(tmp_path):
    with BundleWriter(str(tmp_path / "m")) as writer:
        writer.add("w", DType.float32, ONE["a/w"])
        with pytest.raises(OutputError, match="it is there already"):
            writer.add("w", DType.float32, ONE["a/w"])


@pytest.mark.parametrize("name", ["float32/matrix", "string/awkward"])
def test_damaged_bytes_are_not_copied(golden, tmp_path, name):
    for path in (golden / "dtypes").glob("model.ckpt*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open_checkpoint(tmp_path / "model.ckpt") as reader:
        spec, stored = reader.specs()[name], reader.stored(name)
        data = tmp_path / "model.ckpt.data-00000-of-00001"
        raw = bytearray(data.read_bytes())
        raw[stored.offset + stored.size - 1] ^= 1
        data.write_bytes(bytes(raw))
        with (
            BundleWriter(str(tmp_path / "copy")) as writer,
            pytest.raises(DamagedCheckpointError, match="is damaged"),
        ):
            writer.add_stored(name, spec.dtype, spec.known_shape, stored)
    assert not [path.name for path in tmp_path.glob("*copy*")]


def test_big_endian_and_strided_arrays_are_written_by_value(tmp_path):
    swapped = np.arange(6, dtype=">f4").reshape(2, 3)
    with BundleWriter(str(tmp_path / "m")) as writer:
        writer.add("swapped", DType.float32, swapped)
        writer.add("strided", DType.float32, np.arange(6, dtype=np.float32).reshape(3, 2).T)
        writer.finish()
    assert contents(tmp_path / "m") == {
        "swapped": [[0, 1, 2], [3, 4, 5]],
        "strided": [[0, 2, 4], [1, 3, 5]],
    }


def test_a_bundle_of_nothing_is_a_bundle(tmp_path):
    write(tmp_path / "m", {})
    assert contents(tmp_path / "m") == {}
