"""The manifest of many conversions."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from compat_restore import manifest as module
from compat_restore.errors import DamagedCheckpointError, OutputError
from compat_restore.jobs import Counts, Outcome, Stamp, Status
from compat_restore.manifest import Manifest, Record, read_manifest

CONVERTED = Outcome(
    status=Status.CONVERTED,
    inputs=(Stamp("a/m.index", 10, 1_700_000_000_000_000_001),),
    outputs=(Stamp("m.index", 12, 5), Stamp("m.data-00000-of-00001", 0, 6)),
    counts=Counts(restored=3, nbytes=48, unused=1),
    notes=("a note",),
    digests={"w": "00ff"},
)
FAILED = Outcome(status=Status.FAILED, error="no\nplan \N{SNOWMAN} \udcff", kind="PlanError")

BEFORE = (Stamp("z.index", 3, 4),)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "manifest.jsonl")


def written(path) -> dict[tuple[str, str], Record]:
    with Manifest(path) as manifest:
        manifest.run("s1", {"strict": True})
        manifest.begin("a", "x", "s1", ())
        manifest.end("a", "x", "s1", CONVERTED)
        manifest.end("b", "y", "s1", FAILED)
        manifest.begin("c", "z", "s2", BEFORE)
        return dict(manifest.records)


def test_what_was_noted_is_read_back(path):
    records = written(path)
    assert records == {
        ("a", "x"): Record("s1", CONVERTED, (), CONVERTED.outputs),
        ("b", "y"): Record("s1", FAILED),
        ("c", "z"): Record("s2", None, BEFORE),
    }
    assert read_manifest(path) == records
    with Manifest(path) as again:
        assert again.records == records


def test_every_line_is_json(path):
    written(path)
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    assert lines[0] == {"manifest": "compat_restore", "version": 1}
    assert [line["event"] for line in lines[1:]] == ["run", "begin", "end", "end", "begin"]


def test_a_manifest_cut_at_any_byte_tells_what_its_whole_lines_tell(path):
    written(path)
    with open(path, "rb") as file:
        data = file.read()
    for length in range(len(data)):
        with open(path, "wb") as file:
            file.write(data[:length])
        whole = data[:length].count(b"\n")
        assert len(read_manifest(path)) == (0, 0, 0, 1, 1, 2, 3)[whole]
        with Manifest(path) as manifest:
            manifest.begin("later", "l", "s", ())
        assert ("later", "l") in read_manifest(path)


def test_there_is_nothing_in_a_manifest_that_is_not_there(path):
    assert read_manifest(path) == {}
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"event": "other"}\n',
        b'{"event": "begin", "source": 1, "output": "x", "settings": "s"}\n',
        (
            b'{"event": "end", "source": "a", "output": "x", "settings": "s", "status": "odd", '
            b'"inputs": [], "outputs": []}\n'
        ),
        (
            b'{"event": "end", "source": "a", "output": "x", "settings": "s", "status": "failed", '
            b'"inputs": [["p", "1", 2]], "outputs": []}\n'
        ),
        (
            b'{"event": "end", "source": "a", "output": "x", "settings": "s", "status": "converted", '
            b'"inputs": [], "outputs": [], "counts": {"other": 1}}\n'
        ),
        (
            b'{"event": "end", "source": "a", "output": "x", "settings": "s", "status": "converted", '
            b'"inputs": [], "outputs": [], "notes": "text"}\n'
        ),
        (
            b'{"event": "end", "source": "a", "output": "x", "settings": "s", "status": "converted", '
            b'"inputs": [], "outputs": [], "digests": {"w": 1}}\n'
        ),
        (
            b'{"event": "end", "source": "a", "output": "x", "settings": "s", "status": "failed", '
            b'"inputs": [], "outputs": [], "error": 5}\n'
        ),
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_no_run_wrote_is_damage(path, line):
    written(path)
    with open(path, "ab") as file:
        file.write(line + b"{}\n")
    for use in (read_manifest, Manifest):
        with pytest.raises(DamagedCheckpointError, match="the line at byte"):
            use(path)


def test_another_file_of_that_name_is_no_manifest_and_stays_as_it_is(path):
    with open(path, "w") as file:
        file.write('{"mine": 1}\n')
    with pytest.raises(DamagedCheckpointError, match="the line at byte 0"):
        Manifest(path)
    with open(path) as file:
        assert file.read() == '{"mine": 1}\n'


def test_a_line_without_end_is_not_taken_into_memory(path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_LINE", 100)
    with open(path, "wb") as file:
        file.write(b"x" * 101)
    with pytest.raises(DamagedCheckpointError, match="the line at byte 0"):
        read_manifest(path)


def test_digests_of_very_many_tensors_stand_in_several_lines(path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_LINE", 2000)
    monkeypatch.setattr(module, "_LONGEST_PART", 500)
    outcome = replace(CONVERTED, digests={f"w{n}": "00ff" * 16 for n in range(200)})
    with Manifest(path) as manifest:
        manifest.run("s", {"rules": "x" * 5000})
        manifest.begin("a", "x", "s", ())
        manifest.end("a", "x", "s", outcome)
        records = dict(manifest.records)
    assert read_manifest(path) == records
    assert records["a", "x"].outcome.digests == outcome.digests
    with open(path, "rb") as file:
        assert max(map(len, file)) < 2000


def test_what_a_later_failure_does_not_tell_is_what_was_converted_before(path):
    with Manifest(path) as manifest:
        manifest.end("a", "x", "s", CONVERTED)
        manifest.begin("a", "x", "s", (*BEFORE, *CONVERTED.outputs), CONVERTED.outputs)
        manifest.end("a", "x", "s", FAILED)
    assert read_manifest(path)["a", "x"] == Record(
        "s", FAILED, (*BEFORE, *CONVERTED.outputs), CONVERTED.outputs
    )


def test_two_runs_cannot_have_it_at_once(path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    with Manifest(path), pytest.raises(OutputError, match="another run"):
        Manifest(path)
    Manifest(path).close()


def test_a_line_that_the_disk_does_not_take_leaves_the_lines_before(path, monkeypatch):
    manifest = Manifest(path)
    manifest.begin("a", "x", "s", ())
    write = os.write

    def full(descriptor, data):
        if len(data) > 5:
            return write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    with manifest, monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left"):
            manifest.end("a", "x", "s", FAILED)
    assert read_manifest(path) == {("a", "x"): Record("s", None, ())}


def test_a_manifest_that_may_not_be_written_is_told(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        Manifest(str(tmp_path / "missing" / "manifest"))
