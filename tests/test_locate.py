from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from formats import rows_of, truth_of

from compat_restore import open_checkpoint
from compat_restore.checkpoint.locate import Location, locate, read_state_file
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    InputError,
)


@pytest.fixture
def put(golden, tmp_path):
    """Return a function that copies a golden checkpoint to a name in the temporary directory."""

    def copy(folder, name="model.ckpt", under=""):
        where = tmp_path / under
        where.mkdir(parents=True, exist_ok=True)
        for path in (golden / folder).iterdir():
            if path.name.startswith("model.ckpt"):
                shutil.copy(path, where / path.name.replace("model.ckpt", name, 1))
        return str(where / name)

    return copy


def state(folder, named, *others):
    lines = [f'model_checkpoint_path: "{named}"']
    lines += [f'all_model_checkpoint_paths: "{other}"' for other in others]
    (folder / "checkpoint").write_text("\n".join(lines) + "\n")


# -- prefixes and single files -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".index", ".data-00000-of-00001", ".meta"])
def test_any_file_of_a_v2_checkpoint_means_it(put, suffix):
    prefix = put("plain")
    with open(f"{prefix}.meta", "wb"):
        pass
    assert locate(prefix + suffix) == Location("V2", prefix)


@pytest.mark.parametrize("suffix", ["", ".meta"])
def test_a_v1_file_and_its_meta_mean_it(put, suffix):
    prefix = put("v1")
    assert locate(prefix + suffix) == Location("V1", prefix, (prefix,))


@pytest.mark.parametrize(
    "suffix", ["", "-?????-of-00003", "-00000-of-00003", "-00002-of-00003", ".meta"]
)
def test_a_sharded_v1_checkpoint_is_meant_by_prefix_pattern_shard_and_meta(put, suffix):
    prefix = put("sharded_v1")
    with open(f"{prefix}.meta", "wb"):
        pass
    found = locate(prefix + suffix)
    assert found.version == "V1"
    assert found.path == f"{prefix}-?????-of-00003"
    assert found.files == tuple(f"{prefix}-0000{number}-of-00003" for number in range(3))


@pytest.mark.parametrize("name", ["checkpoints", "x.ckpt", "final.ckpt-158301", "model", "a.b.c"])
@pytest.mark.parametrize("folder", ["plain", "v1", "sharded", "sharded_v1"])
def test_prefixes_are_called_anything(put, tmp_path, folder, name):
    prefix = put(folder, name)
    assert locate(prefix).path.startswith(prefix)
    assert locate(str(tmp_path)) == locate(prefix)


def test_a_prefix_may_be_relative_to_the_current_directory(put, tmp_path, monkeypatch):
    put("plain")
    put("sharded_v1", "old")
    monkeypatch.chdir(tmp_path)
    assert locate("model.ckpt") == locate("model.ckpt.index") == Location("V2", "model.ckpt")
    assert locate("old").files[0] == "old-00000-of-00003"


def test_a_directory_of_the_prefix_s_name_beside_the_index_does_not_hide_it(put):
    prefix = put("plain")
    os.mkdir(prefix)
    assert locate(prefix).version == "V2"


def test_a_path_object_opens(put, tmp_path):
    put("plain")
    with open_checkpoint(tmp_path / "model.ckpt") as reader:
        assert "net/fc/kernel" in reader.specs()


def test_a_link_to_a_checkpoint_is_followed(put, tmp_path):
    prefix = put("v1", under="real")
    os.symlink(prefix, tmp_path / "latest")
    assert locate(str(tmp_path / "latest")).version == "V1"


# -- trap 21 -------------------------------------------------------------------------------------

PEER = """
import sys, tensorflow as tf
print(tf.train.load_checkpoint(sys.argv[1]).has_tensor("net/fc/kernel"))
"""


def test_trap_21_one_prefix_with_a_v1_file_and_a_v2_index_is_told(put, golden):
    prefix = put("plain")
    shutil.copy(golden / "partitioned_v1" / "model.ckpt", prefix)
    with open_checkpoint(prefix) as reader:
        assert rows_of(reader) == truth_of(golden / "plain")
        (note,) = reader.notes
    assert "V1 checkpoint beside the V2 checkpoint" in note
    assert prefix in note


def test_trap_21_the_note_is_there_however_the_checkpoint_is_named(put, golden, tmp_path):
    prefix = put("plain")
    shutil.copy(golden / "v1" / "model.ckpt", prefix)
    state(tmp_path, "model.ckpt")
    for name in (f"{prefix}.index", f"{prefix}.data-00000-of-00001", str(tmp_path)):
        assert len(locate(name).notes) == 1, name


def test_trap_21_a_file_that_is_no_checkpoint_beside_the_index_is_no_second_one(put):
    prefix = put("plain")
    with open(prefix, "wb") as file:
        file.write(b"my notes on this run")
    assert locate(prefix).notes == ()


@pytest.mark.tensorflow
def test_trap_21_tensorflow_takes_the_v2_one_and_says_nothing(put, golden):
    prefix = put("plain")
    shutil.copy(golden / "partitioned_v1" / "model.ckpt", prefix)
    command = [sys.executable, "-c", PEER, prefix]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-1] == "True"
    assert prefix not in done.stdout + done.stderr


# -- directories and state files -----------------------------------------------------------------


def test_a_state_file_chooses_among_checkpoints(put, tmp_path):
    for number in (5, 6, 7):
        put("plain", f"model.ckpt-{number}")
    state(tmp_path, "model.ckpt-6", "model.ckpt-5", "model.ckpt-6", "model.ckpt-7")
    found = locate(str(tmp_path))
    assert found == Location("V2", str(tmp_path / "model.ckpt-6"))


def test_a_state_file_with_an_absolute_path_is_followed(put, tmp_path):
    elsewhere = put("plain", under="elsewhere")
    (tmp_path / "run").mkdir()
    state(tmp_path / "run", elsewhere)
    assert locate(str(tmp_path / "run")) == Location("V2", elsewhere)


@pytest.mark.parametrize("folder", ["plain", "v1", "sharded_v1"])
def test_a_state_file_whose_directory_is_gone_means_the_file_beside_it_and_says_so(
    put, tmp_path, folder
):
    put(folder, "model.ckpt-7")
    put("plain", "model.ckpt-5")
    state(tmp_path, "/gone/with/the/machine/model.ckpt-7")
    found = locate(str(tmp_path))
    assert found.path.startswith(str(tmp_path / "model.ckpt-7"))
    (note,) = found.notes
    assert "names '/gone/with/the/machine/model.ckpt-7', which is not there" in note


def test_a_state_file_names_a_sharded_v1_checkpoint_by_its_pattern(put, tmp_path):
    prefix = put("sharded_v1")
    state(tmp_path, "model.ckpt-?????-of-00003")
    assert locate(str(tmp_path)) == locate(prefix)


def test_octal_escapes_of_a_state_file_are_utf_8(put, tmp_path):
    put("plain", "\u6a29\u91cd.ckpt")
    put("plain", "other")
    state(tmp_path, r"\346\250\251\351\207\215.ckpt")
    assert locate(str(tmp_path)).path == str(tmp_path / "\u6a29\u91cd.ckpt")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('model_checkpoint_path: "a/b"\n', "a/b"),
        ("model_checkpoint_path: 'a b'", "a b"),
        ('  model_checkpoint_path :"m"\n', "m"),
        (r'model_checkpoint_path: "C:\\run\\m"', r"C:\run\m"),
        (r'model_checkpoint_path: "say \"m\"\'\t\n"', 'say "m"\'\t\n'),
        (r'model_checkpoint_path: "\303\251\n1"', "\u00e9\n1"),
        ('model_checkpoint_path: "\u00e9"', "\u00e9"),
        ('model_checkpoint_path: "new"\nall_model_checkpoint_paths: "old"', "new"),
        ('all_model_checkpoint_paths: "old"\nmodel_checkpoint_path: "new"', "new"),
        ('all_model_checkpoint_paths: "m"', None),
        ("", None),
        ('model_checkpoint_path: "unclosed', None),
    ],
)
def test_a_state_file_is_read(tmp_path, text, named):
    (tmp_path / "checkpoint").write_text(text)
    assert read_state_file(str(tmp_path / "checkpoint")) == named


def test_a_state_file_that_names_nothing_there_lists_what_is(put, tmp_path):
    put("plain", "model.ckpt-5")
    put("v1", "model.ckpt-10")
    state(tmp_path, "model.ckpt-11")
    with pytest.raises(
        CheckpointNotFoundError, match=r"'model.ckpt-11'.*holds 'model.ckpt-5', 'model.ckpt-10'"
    ):
        locate(str(tmp_path))


def test_a_state_file_beside_nothing_says_so(tmp_path):
    state(tmp_path, "model.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="the directory holds no other"):
        locate(str(tmp_path))


@pytest.mark.parametrize("named", [r"a\000b", ".", "..", "checkpoint", "", r"\377", "/"])
def test_a_state_file_that_names_nonsense_is_an_error_of_ours(tmp_path, named):
    state(tmp_path, named)
    with pytest.raises(CompatRestoreError):
        open_checkpoint(tmp_path)


def test_an_empty_state_file_is_passed_over(put, tmp_path):
    prefix = put("plain")
    (tmp_path / "checkpoint").write_bytes(b"")
    assert locate(str(tmp_path)).path == prefix


def test_a_directory_of_one_checkpoint_needs_no_state_file(put, tmp_path):
    prefix = put("sharded")
    (tmp_path / "events.out.tfevents.1").write_bytes(b"log")
    (tmp_path / "graph.pbtxt").write_bytes(b"node {}")
    assert locate(str(tmp_path)) == Location("V2", prefix)
    assert locate(f"{tmp_path}/") == Location("V2", prefix)


def test_a_directory_of_several_checkpoints_is_ambiguous_and_lists_them_in_natural_order(
    put, tmp_path
):
    for name in ("m-10", "m-9", "old"):
        put("v1" if name == "old" else "plain", name)
    with pytest.raises(CheckpointNotFoundError, match="3 checkpoints: name one of 'm-9', 'm-10',"):
        locate(str(tmp_path))


def test_hidden_files_of_a_killed_writer_are_no_checkpoints(put, tmp_path):
    prefix = put("plain")
    shutil.copy(f"{prefix}.index", tmp_path / ".model.ckpt.0123456789abcdef.index")
    (tmp_path / ".index").write_bytes(b"")
    assert locate(str(tmp_path)).path == prefix


def test_a_directory_of_one_hidden_index_holds_no_checkpoint(tmp_path):
    (tmp_path / ".index").write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        locate(str(tmp_path))


def test_an_empty_directory_holds_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        locate(str(tmp_path))


def test_a_directory_of_data_without_an_index_says_what_is_missing(put, tmp_path):
    prefix = put("plain")
    os.unlink(f"{prefix}.index")
    with pytest.raises(
        CheckpointNotFoundError, match=r"the data of '.*model.ckpt', but no '.index'"
    ):
        locate(str(tmp_path))


def test_a_prefix_of_data_without_an_index_says_what_is_missing(put, tmp_path):
    prefix = put("plain")
    os.unlink(f"{prefix}.index")
    state_of = r"its index '.*model.ckpt.index' is missing"
    for name in (prefix, f"{prefix}.data-00000-of-00001"):
        with pytest.raises(CheckpointNotFoundError, match=state_of):
            locate(name)
    state(tmp_path, "model.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=state_of):
        locate(str(tmp_path))


def test_a_saved_model_s_directory_means_its_variables(put, tmp_path):
    prefix = put("plain", "variables", under="sm/variables")
    (tmp_path / "sm" / "saved_model.pb").write_bytes(b"")
    found = locate(str(tmp_path / "sm"))
    assert found.path == prefix
    assert "the variables of the SavedModel" in found.notes[0]
    os.unlink(f"{prefix}.index")
    with pytest.raises(CheckpointNotFoundError, match="SavedModel without variables"):
        locate(str(tmp_path / "sm"))


def test_missing_shards_of_a_v1_checkpoint_are_named(put):
    prefix = put("sharded_v1")
    os.unlink(f"{prefix}-00001-of-00003")
    for name in (prefix, f"{prefix}-00000-of-00003", f"{prefix}-?????-of-00003"):
        with pytest.raises(CheckpointNotFoundError, match=r"model\.ckpt-00001-of-00003 is missing"):
            locate(name)


def test_shards_of_two_checkpoints_under_one_prefix_are_ambiguous(put):
    prefix = put("sharded_v1")
    shutil.copy(f"{prefix}-00000-of-00003", f"{prefix}-00000-of-00001")
    with pytest.raises(CheckpointFormatError, match=r"of \[1, 3\] files; name one: .*-of-00001"):
        locate(prefix)
    assert len(locate(f"{prefix}-?????-of-00003").files) == 3
    assert len(locate(f"{prefix}-00000-of-00001").files) == 1


# -- what is no checkpoint -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PK\x03\x04", "a zip archive"),
        (b"\x80\x02}q\x00", "a pickle"),
        (b"\x1f\x8b\x08", "a gzip file"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"<html><body>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_a_foreign_file_is_told_for_what_it_is(tmp_path, head, what):
    path = tmp_path / "model.ckpt"
    path.write_bytes(head + bytes(100))
    with pytest.raises(CheckpointFormatError, match=what):
        open_checkpoint(path)


def test_a_file_of_anything_else_is_no_checkpoint_table(tmp_path):
    (tmp_path / "m").write_bytes(b"whatever " * 20)
    with pytest.raises(CheckpointFormatError, match="no checkpoint table"):
        open_checkpoint(tmp_path / "m")


def test_an_empty_file_is_damage(tmp_path):
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="is empty"):
        open_checkpoint(tmp_path / "m")


def test_a_pipe_is_no_checkpoint_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m")
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path / "m")


def test_a_misspelt_prefix_is_told_with_its_neighbours(put, tmp_path):
    put("plain", "model.ckpt-500")
    with pytest.raises(CheckpointNotFoundError, match=r"the directory holds 'model\.ckpt-500'"):
        locate(str(tmp_path / "model.ckpt-50"))


@pytest.mark.parametrize(
    "name", ["nothing", "nothing.index", "nothing.data-00000-of-00001", "a\0b"]
)
def test_nothing_is_not_found(tmp_path, name):
    with pytest.raises(CheckpointNotFoundError):
        locate(str(tmp_path / name))


def test_a_missing_directory_is_told(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"the directory '.*gone' is missing"):
        locate(str(tmp_path / "gone" / "model.ckpt"))


def test_an_empty_path_is_not_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        locate("")


def test_a_file_that_may_not_be_read_is_told_as_that(put, monkeypatch):
    path = put("plain")
    real = os.open

    def refusing(name, *args, **kwargs):
        if str(name).endswith(".index"):
            raise PermissionError(13, "Permission denied", name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        open_checkpoint(path)
