from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compat_restore.checkpoint.files import (
    LocalFile,
    absolute,
    can_be_listed,
    identity,
    is_directory,
    is_regular_file,
    is_there,
    is_url,
    join,
    listing,
    local_path,
    open_source,
    scheme_of,
    split,
)
from compat_restore.checkpoint.output import OutputFile, create_output, remove, sync_directory
from compat_restore.errors import CheckpointNotFoundError, InputError, UsageError

# -- what is a URL -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        ("gs://bucket/model.ckpt", "gs"),
        ("S3://bucket/model.ckpt", "s3"),
        ("https://example.org/a?b=c", "https"),
        ("simplecache::gs://bucket/model.ckpt", "gs"),
        ("memory://", "memory"),
        ("hdfs:///user/model.ckpt", "hdfs"),
    ],
)
def test_a_url_is_told_by_its_scheme(path, scheme):
    assert is_url(path)
    assert scheme_of(path) == scheme


@pytest.mark.parametrize(
    "path",
    ["model.ckpt", "/run/gs://bucket/m", "C://run/m", "c:\\run\\m", "a b://x", "://x", "", "x:/y"],
)
def test_what_looks_like_a_url_from_afar_is_a_path(path):
    assert not is_url(path)
    assert local_path(path) == path


def test_a_file_url_is_a_local_path(tmp_path):
    (tmp_path / "m").write_bytes(b"abc")
    url = f"file://{tmp_path}/m"
    assert local_path(url) == str(tmp_path / "m")
    assert is_regular_file(url)
    with open_source(url) as source:
        assert isinstance(source, LocalFile)
        assert source.name == str(tmp_path / "m")
    assert identity(url) == identity(str(tmp_path / "m"))


def test_a_local_file_whose_name_looks_like_a_url_stays_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("gs:/bucket")
    with open("gs://bucket/m.index", "wb") as file:
        file.write(b"abc")
    assert not is_url("gs://bucket/m.index")
    assert not is_url("gs://bucket/m"), "its other files stand in the same directory"
    assert is_url("gs://other/m")
    with open_source("gs://bucket/m.index") as source:
        assert source.read(0, 3) == b"abc"
    assert listing("gs://bucket") == ["m.index"]
    assert split("gs://bucket/m") == ("gs://bucket", "m")
    with create_output("gs://bucket/new") as output:
        output.write(b"x")
        output.place(replace=False)
    assert os.path.exists("gs:/bucket/new")


# -- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "folder", "name"),
    [
        ("memory://x", "memory://", "x"),
        ("memory://b/x", "memory://b", "x"),
        ("gs://bucket/run/x.ckpt", "gs://bucket/run", "x.ckpt"),
        ("hdfs:///x", "hdfs:///", "x"),
        ("hdfs:///user/x", "hdfs:///user", "x"),
        ("https://h/run/x?sign=a/b", "https://h/run", "x?sign=a/b"),
        ("simplecache::gs://b/x", "simplecache::gs://b", "x"),
        ("run/x", "run", "x"),
        ("x", "", "x"),
        ("/x", "/", "x"),
    ],
)
def test_a_path_comes_apart_and_together(path, folder, name):
    assert split(path) == (folder, name)
    assert join(folder, name.partition("?")[0]) == path.partition("?")[0]


def test_a_directory_s_slash_at_the_end_adds_no_second():
    assert join("gs://bucket/run/", "variables", "variables") == (
        "gs://bucket/run/variables/variables"
    )
    assert split("gs://bucket/run/") == ("gs://bucket/run", "")


def test_urls_are_absolute():
    assert absolute("memory://x") == "memory://x"
    assert absolute("x") == os.path.abspath("x")


# -- local files ---------------------------------------------------------------------------------


def test_what_is_there_is_told(tmp_path):
    (tmp_path / "m").write_bytes(b"")
    os.symlink("nowhere", tmp_path / "broken")
    assert is_regular_file(str(tmp_path / "m"))
    assert not is_regular_file(str(tmp_path))
    assert is_directory(str(tmp_path))
    assert is_there(str(tmp_path / "broken"))
    assert not is_there(str(tmp_path / "nothing"))
    assert listing(str(tmp_path)) == ["broken", "m"]
    assert listing(str(tmp_path / "nothing")) == listing(str(tmp_path / "m")) == []
    assert can_be_listed(str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="is missing"):
        open_source(str(tmp_path / "nothing"))


def test_a_directory_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refusing(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(InputError, match=r"the directory '.*' cannot be read: Permission denied"):
        listing(str(tmp_path))


def test_two_paths_of_one_file_have_one_identity(tmp_path):
    (tmp_path / "m").write_bytes(b"")
    os.symlink("m", tmp_path / "link")
    assert identity(str(tmp_path / "m")) == identity(str(tmp_path / "link"))
    assert identity(str(tmp_path / "nothing")) is None
    assert identity("a\0b") is None


def test_outputs_at_local_paths_are_local_files(tmp_path):
    with create_output(str(tmp_path / "m")) as output:
        assert type(output) is OutputFile
        output.write(b"abc")
        output.place(replace=False)
    sync_directory(str(tmp_path))
    assert (tmp_path / "m").read_bytes() == b"abc"
    remove(str(tmp_path / "m"))
    remove(str(tmp_path / "m"))
    assert not is_there(str(tmp_path / "m"))


def test_local_paths_do_not_import_fsspec(golden):
    code = (
        "import sys, compat_restore\n"
        f"with compat_restore.open_checkpoint({str(golden / 'plain')!r}) as reader:\n"
        "    reader.read('net/fc/kernel')\n"
        "found = {'fsspec', 'aiohttp', 'compat_restore.checkpoint.remote'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- URLs ----------------------------------------------------------------------------------------


def test_an_unknown_protocol_is_told_with_its_neighbours():
    pytest.importorskip("fsspec")
    with pytest.raises(UsageError, match=r"'memry://x' is no file here.*did you mean memory://\?"):
        open_source("memry://x")


def test_urls_of_one_file_have_one_identity():
    pytest.importorskip("fsspec")
    assert identity("memory://b/x") == identity("memory:///b/x")
    assert identity("memory://b/x") != identity("memory://b/y")
