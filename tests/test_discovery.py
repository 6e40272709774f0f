"""Which checkpoints stand below a directory."""

from __future__ import annotations

import os
import shutil

import pytest
from checkpoints import numbers, write

from compat_restore import convert
from compat_restore.checkpoint import open_checkpoint
from compat_restore.checkpoint.discovery import find_checkpoints
from compat_restore.errors import CheckpointNotFoundError, InputError, UsageError


def names_below(folder, **options) -> list[str]:
    return [one.name for one in find_checkpoints(str(folder), **options).checkpoints]


def model(path) -> str:
    return write(path, {"w": numbers(3)})


def test_every_golden_checkpoint_is_found_once_and_can_be_opened(golden):
    found = find_checkpoints(str(golden)).checkpoints
    assert [one.name for one in found] == [
        "dtypes/model.ckpt",
        "dtypes_v1/model.ckpt",
        "keras/keras.keras",
        "keras/keras.weights.h5",
        "keras/keras_model.h5",
        "keras/tf_keras.keras",
        "keras/tf_keras.weights.h5",
        "keras/tf_keras_model.h5",
        "keras/tf_keras_weights.h5",
        "object_based/ckpt-1",
        "partitioned/model.ckpt",
        "partitioned_v1/model.ckpt",
        "plain/model.ckpt",
        "sharded/model.ckpt",
        "sharded_v1/model.ckpt-?????-of-00003",
        "v1/model.ckpt",
    ]
    for one in found:
        open_checkpoint(one.path).close()


def test_names_are_sorted_by_their_numbers(tmp_path):
    for step in (10, 9, 100):
        model(tmp_path / "run" / f"model.ckpt-{step}")
    assert names_below(tmp_path) == [f"run/model.ckpt-{step}" for step in (9, 10, 100)]


def test_a_saved_model_is_found_once_by_its_variables(tmp_path):
    model(tmp_path / "export" / "variables" / "variables")
    (tmp_path / "export" / "saved_model.pb").write_bytes(b"")
    assert names_below(tmp_path) == ["export/variables/variables"]


def test_a_state_file_and_what_else_stands_there_are_no_checkpoints(tmp_path):
    model(tmp_path / "model.ckpt")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "empty").write_bytes(b"")
    assert names_below(tmp_path) == ["model.ckpt"]


def test_files_of_other_formats_are_found_and_sets_once(tmp_path):
    model(tmp_path / "m.ckpt")
    for suffix in (".safetensors", ".npz"):
        convert(tmp_path / "m.ckpt", tmp_path / f"m{suffix}")
    write(tmp_path / "two", {"a": numbers(9), "b": numbers(9)})
    convert(tmp_path / "two", tmp_path / "set.safetensors", max_shard_size=40)
    (tmp_path / "folder.npz").mkdir()
    found = find_checkpoints(str(tmp_path)).checkpoints
    names = ["m.ckpt", "m.npz", "m.safetensors", "set.safetensors", "two"]
    assert [one.name for one in found] == names
    for one in found:
        open_checkpoint(one.path).close()


def test_hidden_files_and_directories_are_none(tmp_path):
    model(tmp_path / ".model.ckpt")
    model(tmp_path / ".git" / "model.ckpt")
    assert names_below(tmp_path) == []


def test_data_without_its_index_is_found_so_that_it_is_told(tmp_path):
    os.unlink(model(tmp_path / "m") + ".index")
    [one] = find_checkpoints(str(tmp_path)).checkpoints
    with pytest.raises(CheckpointNotFoundError, match="its index"):
        open_checkpoint(one.path)


def test_a_v1_and_a_v2_checkpoint_of_one_prefix_are_one(golden, tmp_path):
    model(tmp_path / "model.ckpt")
    shutil.copy(golden / "v1" / "model.ckpt", tmp_path)
    assert names_below(tmp_path) == ["model.ckpt"]


def test_links_to_directories_are_told_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    model(outside / "m")
    source = tmp_path / "source"
    model(source / "a" / "m")
    (source / "loop").symlink_to(source)
    (source / "out").symlink_to(outside)
    found = find_checkpoints(str(source))
    assert [one.name for one in found.checkpoints] == ["a/m"]
    assert len(found.notes) == 2
    assert all("was not followed" in note for note in found.notes)


def test_a_directory_can_be_left_out(tmp_path):
    model(tmp_path / "a")
    model(tmp_path / "out" / "below" / "a")
    assert names_below(tmp_path, without=str(tmp_path / "out")) == ["a"]


def test_a_link_may_be_the_directory_that_is_searched(tmp_path):
    model(tmp_path / "real" / "m")
    (tmp_path / "link").symlink_to("real")
    assert names_below(tmp_path / "link") == ["m"]


def test_what_is_no_directory_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotFoundError, match="it is a file"):
        find_checkpoints(str(tmp_path / "file"))
    with pytest.raises(CheckpointNotFoundError, match="there is none"):
        find_checkpoints(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="local directories"):
        find_checkpoints("gs://bucket/runs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_directory_that_may_not_be_listed_is_told(tmp_path):
    model(tmp_path / "a")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        found = find_checkpoints(str(tmp_path))
        assert [one.name for one in found.checkpoints] == ["a"]
        assert "closed" in found.faults[0]
        with pytest.raises(InputError, match="closed"):
            find_checkpoints(str(tmp_path / "closed"))
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_directory_that_cannot_be_listed_is_a_fault_among_the_others(tmp_path, monkeypatch):
    model(tmp_path / "a")
    model(tmp_path / "closed" / "b")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find_checkpoints(str(tmp_path))
    assert [one.name for one in found.checkpoints] == ["a"]
    assert found.faults == (f"'{tmp_path}/closed' cannot be listed: Permission denied",)
