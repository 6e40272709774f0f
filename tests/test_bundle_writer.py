from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from faults import faults_at, killed_at
from formats import rows_of, snapshot, truth_of, write_bundle

from compat_restore import open_checkpoint
from compat_restore.checkpoint import output
from compat_restore.checkpoint.bundle_writer import BundleWriter
from compat_restore.checkpoint.writer import Content
from compat_restore.errors import DamagedCheckpointError, OutputError, PreservationError, UsageError
from compat_restore.tensors import DType

ONE = {"a/w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1], np.int64)}
TWO = {"c": np.array([2.5, 3.5]), "a/w": np.zeros((2, 3), np.float32)}


def write(prefix, tensors, **options):
    write_bundle(prefix, [of(name, value) for name, value in tensors.items()], **options)


def of(name, value):
    return Content.of(name, DType(value.dtype.name), value)


def stored_content(reader, name):
    spec = reader.specs()[name]
    return Content(
        name=name,
        dtype=spec.dtype,
        shape=spec.known_shape,
        read=lambda: reader.read(name),
        stored=reader.stored(name),
        slices=spec.slices,
    )


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
        with open_checkpoint(golden / folder) as reader:
            contents = [stored_content(reader, name) for name in reader.specs()]
            if not stored:  # in the same order
                contents.sort(key=lambda c: (c.stored[0].source.name, c.stored[0].offset))
                contents = [content._replace(stored=()) for content in contents]
            write_bundle(prefix, contents)
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
    with open_checkpoint(golden / "dtypes") as reader:
        write_bundle(
            prefix,
            [Content.of(name, s.dtype, reader.read(name)) for name, s in reader.specs().items()],
        )
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
    "there", ["m.index", "m.data-00000-of-00001", "m.data-00002-of-00007", "m.meta"]
)
def test_any_file_of_a_checkpoint_under_the_prefix_is_refused(tmp_path, there):
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        BundleWriter(str(tmp_path / "m"))
    assert snapshot(tmp_path) == {there: b"precious"}


def test_a_file_of_the_same_name_that_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "notes").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a file, and no checkpoint"):
            BundleWriter(str(tmp_path / "notes"), overwrite=overwrite)
    assert snapshot(tmp_path) == {"notes": b"precious"}


def test_a_graph_without_its_checkpoint_is_left(tmp_path):
    (tmp_path / "m.meta").write_bytes(b"graph")
    write(tmp_path / "m", ONE, overwrite=True)
    assert (tmp_path / "m.meta").read_bytes() == b"graph"


def test_values_of_another_shape_than_announced_are_not_written(tmp_path):
    content = Content(name="w", dtype=DType.float32, shape=(2, 2), read=lambda: np.ones(3, "f4"))
    with pytest.raises(PreservationError, match="was to be float32"):
        write_bundle(tmp_path / "m", [content])
    assert os.listdir(tmp_path) == []


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
    replace, link = os.replace, os.link

    def replaced(source, target):
        seen.append(contents(tmp_path / "m"))
        replace(source, target)

    def linked(source, target, **options):
        seen.append(contents(tmp_path / "m"))
        link(source, target, **options)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "link", linked)
    write(tmp_path / "m", TWO, overwrite=True)
    assert seen == [lists(ONE)] * 4  # two data files, and the index under a hidden and its own name
    assert contents(tmp_path / "m") == lists(TWO)


def test_everything_is_synced_before_the_index_is_put_in_place(tmp_path, monkeypatch):
    calls = []
    fsync, link = os.fsync, os.link

    def synced(descriptor):
        calls.append("sync" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "sync directory")
        fsync(descriptor)

    def linked(source, target, **options):
        calls.append(os.path.splitext(target)[1])
        link(source, target, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    write(tmp_path / "m", ONE)
    assert calls == [
        "sync",
        ".data-00000-of-00001",
        "sync directory",
        "sync",
        ".index",
        "sync directory",
    ]


# -- whole or not at all -------------------------------------------------------------------------


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with BundleWriter(str(tmp_path / "m")) as writer:
        writer.write([of("w", ONE["a/w"])])
    assert os.listdir(tmp_path) == []


def test_an_error_on_the_way_leaves_what_was_there(tmp_path):
    write(tmp_path / "m", ONE)
    before = snapshot(tmp_path)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        BundleWriter(str(tmp_path / "m"), overwrite=True) as writer,
    ):
        writer.write([of("w", ONE["a/w"])])
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


def full(kind):
    def act():
        raise OSError(kind, os.strerror(kind))

    return act


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_trap_25_a_fault_at_any_writing_call_leaves_one_whole_checkpoint_and_nothing_else(
    tmp_path, kind
):
    write(tmp_path / "m", ONE)
    for number in range(1, 1000):
        before = snapshot(tmp_path)
        with faults_at(number, full(kind)) as counter:
            try:
                write(tmp_path / "m", TWO, overwrite=True)
            except OutputError as error:
                told = str(error)
            else:
                told = ""
        if not counter.reached:
            break
        assert not told or os.strerror(kind) in told
        if "nothing was changed" in told.lower():
            assert snapshot(tmp_path) == before
        else:
            assert contents(tmp_path / "m") == lists(TWO)
            write(tmp_path / "m", ONE, overwrite=True)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert number > 15


def test_an_interruption_at_any_writing_call_leaves_one_whole_checkpoint(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    write(tmp_path / "m", ONE)
    for number in range(1, 1000):
        with faults_at(number, interrupt) as counter:
            try:
                write(tmp_path / "m", TWO, overwrite=True)
            except KeyboardInterrupt:
                pass
            else:
                break
        assert contents(tmp_path / "m") in (lists(ONE), lists(TWO)), number
        write(tmp_path / "m", ONE, overwrite=True)
    assert not counter.reached
    assert number > 15


def test_an_interruption_right_after_the_index_is_in_place_leaves_the_new_checkpoint(
    tmp_path, monkeypatch
):
    write(tmp_path / "m", ONE)
    real = os.replace

    def replace(source, target):
        real(source, target)
        if target.endswith(".index"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", TWO, overwrite=True)
    assert contents(tmp_path / "m") == lists(TWO)


def test_a_sync_that_fails_after_the_index_is_in_place_is_told_and_loses_nothing(tmp_path):
    write(tmp_path / "m", ONE)
    with faults_at(5, full(errno.ENOSPC), only=("fsync",)) as counter:
        with pytest.raises(OutputError, match="is written, but it is not sure"):
            write(tmp_path / "m", TWO, overwrite=True)
        assert counter.reached
    assert contents(tmp_path / "m") == lists(TWO)
    assert "m.data-00000-of-00001" in os.listdir(tmp_path)  # the older data, still there


def test_trap_24_a_writer_killed_at_any_writing_call_leaves_one_whole_checkpoint(tmp_path):
    write(tmp_path / "m", ONE)
    for number in range(1, 1000):
        if not killed_at(number, lambda: write(tmp_path / "m", TWO, overwrite=True)):
            break
        assert contents(tmp_path / "m") in (lists(ONE), lists(TWO)), number
        # What the killed writer left is in the way of neither a directory's reader nor the next
        # writer.
        assert contents(tmp_path) == contents(tmp_path / "m")
        write(tmp_path / "m", ONE, overwrite=True)
        assert contents(tmp_path / "m") == lists(ONE)
    assert number > 15


def test_where_files_have_neither_no_name_nor_two_a_rename_puts_them_in_place(
    tmp_path, monkeypatch
):
    def unlinked(*_args, **_options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "link", unlinked)
    write(tmp_path / "new" / "m", ONE)
    assert contents(tmp_path / "new" / "m") == lists(ONE)
    write(tmp_path / "new" / "m", TWO, overwrite=True)
    assert contents(tmp_path / "new" / "m") == lists(TWO)
    (tmp_path / "new" / "n.index").write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path / "new" / "n", ONE)
    assert not [name for name in os.listdir(tmp_path / "new") if name.startswith(".")]


def test_where_files_have_no_second_name_one_that_appears_meanwhile_is_not_replaced(
    tmp_path, monkeypatch
):
    def unlinked(*_args, **_options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "link", unlinked)
    with BundleWriter(str(tmp_path / "m")) as writer:
        writer.write([of("w", ONE["a/w"])])
        written = writer._write_index

        def meanwhile(count):
            written(count)
            (tmp_path / "m.index").write_bytes(b"precious")

        monkeypatch.setattr(writer, "_write_index", meanwhile)
        with pytest.raises(OutputError, match="appeared while"):
            writer.finish()
    assert snapshot(tmp_path) == {"m.index": b"precious"}


# -- refusals ------------------------------------------------------------------------------------


def test_a_directory_is_no_prefix(tmp_path):
    for name in (str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(OutputError, match="is a directory; a name for the new checkpoint"):
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
        pytest.raises(UsageError, match="has no tensors of the names"),
    ):
        writer.write([of(name, ONE["a/w"])])
    assert os.listdir(tmp_path) == []


def test_a_name_given_twice_is_refused(tmp_path):
    twice = [of("w", ONE["a/w"]), of("w", ONE["a/w"])]
    with pytest.raises(UsageError, match="cannot be written twice"):
        write_bundle(tmp_path / "m", twice)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["float32/matrix", "string/awkward"])
def test_damaged_bytes_are_not_copied(golden, tmp_path, name):
    for path in (golden / "dtypes").glob("model.ckpt*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open_checkpoint(tmp_path / "model.ckpt") as reader:
        [stored] = reader.stored(name)
        data = tmp_path / "model.ckpt.data-00000-of-00001"
        raw = bytearray(data.read_bytes())
        raw[stored.offset + stored.size - 1] ^= 1
        data.write_bytes(bytes(raw))
        with pytest.raises(DamagedCheckpointError, match="is damaged"):
            write_bundle(tmp_path / "copy", [stored_content(reader, name)])
    assert not [path.name for path in tmp_path.glob("*copy*")]


def test_big_endian_and_strided_arrays_are_written_by_value(tmp_path):
    swapped = np.arange(6, dtype=">f4").reshape(2, 3)
    strided = np.arange(6, dtype=np.float32).reshape(3, 2).T
    write_bundle(
        tmp_path / "m",
        [
            Content.of("swapped", DType.float32, swapped),
            Content.of("strided", DType.float32, strided),
        ],
    )
    assert contents(tmp_path / "m") == {
        "swapped": [[0, 1, 2], [3, 4, 5]],
        "strided": [[0, 2, 4], [1, 3, 5]],
    }


def test_a_bundle_of_nothing_is_a_bundle(tmp_path):
    write(tmp_path / "m", {})
    assert contents(tmp_path / "m") == {}


# -- several at once -----------------------------------------------------------------------------


def two_writers(prefix):
    writers = [BundleWriter(str(prefix), overwrite=True) for _ in range(2)]
    for writer, tensors in zip(writers, (ONE, TWO), strict=True):
        writer.write([of(name, value) for name, value in tensors.items()])
    return writers


def test_of_two_writers_that_replace_one_checkpoint_the_last_one_stays_whole(tmp_path):
    write(tmp_path / "m", TWO)
    first, second = two_writers(tmp_path / "m")
    first.finish()
    assert contents(tmp_path / "m") == lists(ONE)
    second.finish()
    assert contents(tmp_path / "m") == lists(TWO)
    for writer in (first, second):
        writer.close()
    assert contents(tmp_path / "m") == lists(TWO)
    assert len({name.split("-of-")[1] for name in os.listdir(tmp_path) if "-of-" in name}) == 1


def test_a_writer_that_fails_takes_back_no_file_of_another_s(tmp_path, monkeypatch):
    write(tmp_path / "m", TWO)
    first, second = two_writers(tmp_path / "m")

    def fails(**_):
        raise OutputError("the index cannot be put in place")

    monkeypatch.setattr(first._index, "place", fails)
    with pytest.raises(OutputError, match="cannot be put in place"):
        first.finish()
    second.finish()
    first.close()
    second.close()
    assert contents(tmp_path / "m") == lists(TWO)


def test_a_checkpoint_that_appeared_meanwhile_is_replaced_only_where_that_is_said(tmp_path):
    with BundleWriter(str(tmp_path / "m")) as late:
        late.write([of("b", ONE["b"])])
        write(tmp_path / "m", TWO)
        with pytest.raises(OutputError, match="exists already"):
            late.finish()
    assert contents(tmp_path / "m") == lists(TWO)


def test_others_are_waited_for_before_files_are_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_LONGEST_WAIT", 0.05)
    with (
        BundleWriter(str(tmp_path / "m")) as writer,
        output.alone_in(str(tmp_path)),
    ):
        writer.write([of("b", ONE["b"])])
        with pytest.raises(OutputError, match="is locked by another program"):
            writer.finish()
    assert os.listdir(tmp_path) == []
    write(tmp_path / "m", ONE)
    assert contents(tmp_path / "m") == lists(ONE)


def test_directories_that_have_no_locks_are_written_to_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def unlocked(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unlocked)
    write(tmp_path / "m", ONE)
    assert contents(tmp_path / "m") == lists(ONE)


def test_what_was_begun_and_forgotten_leaves_nothing(tmp_path):
    made = output.OutputFile(str(tmp_path / "new" / "m"))
    made.write(b"x")
    del made
    assert os.listdir(tmp_path) == []
