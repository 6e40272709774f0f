"""Many checkpoints at once: found, converted, resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import damage, numbers, write

import compat_restore as cr
from compat_restore import fleet as module
from compat_restore.fleet import convert_all, output_name
from compat_restore.jobs import Status
from compat_restore.manifest import MANIFEST, read_manifest

TENSORS = {"enc/w": numbers(3, 2), "enc/b": numbers(2, start=10), "global_step": np.int64(7)}


@pytest.fixture
def runs(tmp_path) -> Path:
    """A directory of three checkpoints."""
    folder = tmp_path / "runs"
    for n in range(3):
        write(folder / f"run{n}" / "model.ckpt", {**TENSORS, "enc/w": numbers(3, 2, start=n)})
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def tree(folder) -> dict[str, bytes]:
    """Return the bytes of every file below a directory but the manifest."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def statuses(report) -> dict[str, str]:
    return {one.source: str(one.status) for one in report.conversions}


def error_of(report, source: str) -> str:
    [one] = [one for one in report.conversions if one.source == source]
    assert one.status is Status.FAILED
    assert one.outcome.error is not None
    return one.outcome.error


def value(path, name: str):
    with cr.open_checkpoint(path) as reader:
        return reader.read(name)


# -- converting -----------------------------------------------------------------------------------


def test_every_checkpoint_is_converted_by_the_same_rules_under_its_own_name(runs, out):
    rules = cr.Rules(include=["enc/.*"], rename=[("enc/(.*)", r"new/\1")])
    report = convert_all(runs, out, rules, jobs=1)
    assert report.complete
    assert set(statuses(report).values()) == {"converted"}
    for n in range(3):
        np.testing.assert_array_equal(
            value(out / f"run{n}" / "model.ckpt", "new/w"), numbers(3, 2, start=n)
        )
    counts = report.conversions[0].outcome.counts
    assert (counts.restored, counts.unused, counts.nbytes) == (2, 1, 32)


def test_in_parallel_the_files_are_the_same_byte_for_byte(runs, tmp_path, golden):
    # Some of Keras's would become the same: `keras.keras` and `keras.weights.h5`.
    shutil.copytree(golden, runs / "golden", ignore=shutil.ignore_patterns("*.keras"))
    one = convert_all(runs, tmp_path / "one", jobs=1)
    two = convert_all(runs, tmp_path / "two", jobs=3)
    assert one.complete
    assert statuses(one) == statuses(two)
    assert len(one.conversions) == 3 + 9 + 5
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_damaged_checkpoint_fails_alone(runs, out):
    damage(str(runs / "run1" / "model.ckpt"), "enc/w")
    for jobs in (1, 2):
        report = convert_all(runs, out / str(jobs), jobs=jobs)
        assert not report.complete
        assert "enc/w" in error_of(report, "run1/model.ckpt")
        assert statuses(report)["run0/model.ckpt"] == "converted"
        assert statuses(report)["run2/model.ckpt"] == "converted"
        assert not (out / str(jobs) / "run1").exists()


def test_a_rule_that_matches_nothing_in_one_fails_that_one(runs, out):
    write(runs / "odd", {"other": numbers(1)})
    report = convert_all(runs, out, cr.Rules(exclude="global_step"), jobs=1)
    assert "matches no name" in error_of(report, "odd")
    assert len(report.of(Status.CONVERTED)) == 3
    rules = cr.Rules(exclude="global_step", allow_unmatched=True)
    assert convert_all(runs, out / "2", rules, jobs=1).complete


def test_an_unexpected_error_is_of_one_checkpoint_too(runs, out, monkeypatch):
    from compat_restore import jobs

    def converting(reader, destination, *args, **kwargs):
        if "run1" in destination:
            raise MemoryError("no room")
        return cr.convert(reader, destination, *args, **kwargs)

    monkeypatch.setattr(jobs, "convert", converting)
    report = convert_all(runs, out, jobs=1)
    assert error_of(report, "run1/model.ckpt") == "MemoryError: no room"
    assert len(report.of(Status.CONVERTED)) == 2


def test_into_a_template_each_becomes_like_it(runs, out, tmp_path):
    template = write(tmp_path / "fresh", {"enc/w": numbers(3, 2) * 0, "head": numbers(4)})
    report = convert_all(runs, out, cr.Rules(include="enc/w"), into=template, jobs=1)
    assert report.complete
    np.testing.assert_array_equal(value(out / "run2" / "model.ckpt", "head"), numbers(4))
    np.testing.assert_array_equal(
        value(out / "run2" / "model.ckpt", "enc/w"), numbers(3, 2, start=2)
    )


def test_a_file_of_keras_is_made_from_each(runs, out, golden):
    template = golden / "keras" / "keras.weights.h5"
    name = "head/bias"
    for n in range(3):
        write(runs / f"run{n}" / "bias", {name: numbers(2, start=n)})
    report = convert_all(runs, out, into=template, suffix=".weights.h5", jobs=2)
    assert len(report.of(Status.CONVERTED)) == 3
    np.testing.assert_array_equal(
        value(out / "run2" / "bias.weights.h5", name), numbers(2, start=2)
    )


def test_a_template_that_is_not_there_is_told_before_anything_is_done(runs, out, tmp_path):
    with pytest.raises(cr.CheckpointNotFoundError):
        convert_all(runs, out, into=tmp_path / "nowhere")
    assert not out.exists()


def test_a_dry_run_writes_nothing_and_says_what_would_be(runs, out):
    report = convert_all(runs, out, jobs=1, dry_run=True)
    assert set(statuses(report).values()) == {"planned"}
    assert report.manifest is None
    assert not out.exists()
    assert "3 would be converted" in report.summary()


def test_a_script_needs_no_guard_around_it(runs, out, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import compat_restore as cr\n"
        f"print(cr.convert_all({str(runs)!r}, {str(out)!r}, jobs=2).summary())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(cr.__file__).parent.parent)},
    )
    assert done.stdout == "3 converted (120 B), 0 done before, 0 failed\n"
    assert done.stderr == ""


def test_two_hundred_checkpoints_take_seconds(tmp_path, out):
    for n in range(200):
        write(tmp_path / "runs" / f"{n % 20}" / f"model.ckpt-{n}", TENSORS)
    begin = time.monotonic()
    report = convert_all(tmp_path / "runs", out, jobs=2)
    assert report.complete
    assert len(report.conversions) == 200
    assert time.monotonic() - begin < 60
    begin = time.monotonic()
    assert len(convert_all(tmp_path / "runs", out, jobs=2).of(Status.UNCHANGED)) == 200
    assert time.monotonic() - begin < 10


def test_progress_is_told_of_each(runs, out):
    calls = []
    convert_all(
        runs,
        out,
        jobs=1,
        on_progress=lambda done, total, latest: calls.append(
            (done, total, latest and latest.source)
        ),
    )
    assert calls == [(0, 3, None), *((n + 1, 3, f"run{n}/model.ckpt") for n in range(3))]


def test_digests_are_in_the_manifest_and_in_the_report(runs, out):
    report = convert_all(runs, out, jobs=1, digests=True)
    wanted = cr.digest(numbers(3, 2, start=0))
    assert report.conversions[0].outcome.digests["enc/w"] == wanted
    again = convert_all(runs, out, jobs=1, digests=True)
    assert again.conversions[0].status is Status.UNCHANGED
    assert again.conversions[0].outcome.digests["enc/w"] == wanted


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix", "output"),
    [
        ("a/model.ckpt", None, "a/model.ckpt"),
        ("a/model.ckpt-100", None, "a/model.ckpt-100"),
        ("a/model.npz", None, "a/model"),
        ("model.ckpt-?????-of-00003", None, "model.ckpt"),
        ("model.ckpt", ".safetensors", "model.safetensors"),
        ("model.ckpt-100", ".safetensors", "model.ckpt-100.safetensors"),
        ("model.weights.h5", ".npz", "model.npz"),
        ("model.safetensors", ".safetensors", "model.safetensors"),
        ("a.ckpt/b", ".npz", "a.ckpt/b.npz"),
        ("odd.npz.npz", None, "odd"),
    ],
)
def test_the_name_of_an_output_follows_from_that_of_its_source(name, suffix, output):
    assert output_name(name, suffix) == output


def test_the_ending_of_the_outputs_says_their_format_and_any_format_is_a_source(
    runs, out, tmp_path
):
    for suffix in (".safetensors", ".npz"):
        report = convert_all(runs, tmp_path / suffix[1:], suffix=suffix, jobs=2)
        assert report.complete
        assert (tmp_path / suffix[1:] / "run0" / f"model{suffix}").exists()
        back = convert_all(tmp_path / suffix[1:], out / suffix[1:], jobs=1)
        assert statuses(back)[f"run0/model{suffix}"] == "converted"
        assert cr.diff(runs / "run0" / "model.ckpt", out / suffix[1:] / "run0" / "model").equal
    sets = tmp_path / "sets"
    options = {"suffix": ".safetensors", "max_shard_size": 10, "jobs": 1}
    assert convert_all(runs, sets, **options).complete
    assert len(convert_all(runs, sets, **options).of(Status.UNCHANGED)) == 3
    assert len(convert_all(sets, out / "sets", jobs=1).of(Status.CONVERTED)) == 3


def test_two_that_would_become_one_output_are_both_errors(runs, out):
    write(runs / "m", TENSORS)
    cr.convert(runs / "m", runs / "m.npz")
    report = convert_all(runs, out, jobs=1)
    assert "so would 'm.npz'" in error_of(report, "m")
    assert "so would 'm'" in error_of(report, "m.npz")
    assert len(report.of(Status.CONVERTED)) == 3
    assert not (out / "m.index").exists()


def test_a_v1_checkpoint_beside_a_v2_one_of_the_same_name_is_told(runs, out, golden):
    shutil.copy(golden / "v1" / "model.ckpt", runs / "run0" / "model.ckpt")
    report = convert_all(runs, out, jobs=1)
    [note] = report.conversions[0].outcome.notes
    assert "V1 checkpoint beside the V2 checkpoint" in note
    assert f"note: {note}" in report.to_text()


@pytest.mark.parametrize("suffix", ["", "a/b", "\0"])
def test_a_suffix_is_part_of_a_name(runs, out, suffix):
    with pytest.raises(cr.UsageError, match="ending"):
        convert_all(runs, out, suffix=suffix)


# -- where things are -----------------------------------------------------------------------------


def test_the_destination_may_lie_in_the_source_and_is_not_searched(runs):
    for _ in range(2):
        report = convert_all(runs, runs / "converted", jobs=1)
        assert len(report.conversions) == 3


def test_inputs_are_never_written_over(runs, tmp_path):
    with pytest.raises(cr.UsageError, match="is '"):
        convert_all(runs, runs, overwrite=True)
    (tmp_path / "link").symlink_to(runs)
    with pytest.raises(cr.UsageError, match="is '"):
        convert_all(runs, tmp_path / "link", overwrite=True)
    with pytest.raises(cr.UsageError, match="lies in"):
        convert_all(runs, tmp_path, overwrite=True)


def test_nothing_outside_the_source_is_read(runs, out, tmp_path):
    secret = Path(write(tmp_path / "secret", TENSORS))
    for end in (".index", ".data-00000-of-00001"):
        (runs / f"linked{end}").symlink_to(f"{secret}{end}")
    shutil.copy(f"{secret}.index", runs / "half.index")
    (runs / "half.data-00000-of-00001").symlink_to(f"{secret}.data-00000-of-00001")
    report = convert_all(runs, out, jobs=1)
    for name in ("linked", "half"):
        assert "lies outside" in error_of(report, name)
    assert len(report.of(Status.CONVERTED)) == 3


def test_links_within_the_source_are_followed_to_files(runs, out):
    for end in (".index", ".data-00000-of-00001"):
        (runs / f"latest{end}").symlink_to(f"run2/model.ckpt{end}")
    report = convert_all(runs, out, jobs=1)
    assert statuses(report)["latest"] == "converted"


def test_nothing_outside_the_destination_is_written(runs, out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    (out / "run1").symlink_to(tmp_path / "elsewhere")
    report = convert_all(runs, out, jobs=1, overwrite=True)
    assert "a link leads out" in error_of(report, "run1/model.ckpt")
    assert tree(tmp_path / "elsewhere") == {}


def test_what_cannot_be_searched_or_written_is_told(runs, out, tmp_path):
    with pytest.raises(cr.CheckpointNotFoundError, match="there is none"):
        convert_all(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(cr.CheckpointNotFoundError, match="no checkpoint below"):
        convert_all(tmp_path / "empty", out)
    with pytest.raises(cr.UsageError, match="jobs=0"):
        convert_all(runs, out, jobs=0)
    with pytest.raises(cr.UsageError, match="local director"):
        convert_all("gs://bucket/runs", out)
    with pytest.raises(cr.UsageError, match="local director"):
        convert_all(runs, "gs://bucket/out")
    out.write_text("")
    with pytest.raises(cr.OutputError, match="cannot be made"):
        convert_all(runs, out)


# -- going on -------------------------------------------------------------------------------------


def test_a_second_run_leaves_out_what_is_done(runs, out):
    convert_all(runs, out, jobs=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.index")}
    report = convert_all(runs, out, jobs=2)
    assert set(statuses(report).values()) == {"unchanged"}
    assert report.conversions[0].outcome.counts.restored == 3
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.index")}


def test_a_new_checkpoint_and_a_failed_one_are_done_by_the_next_run(runs, out):
    data = runs / "run1" / "model.ckpt.data-00000-of-00001"
    kept = data.read_bytes()
    data.write_bytes(kept[:-1])
    assert not convert_all(runs, out, jobs=1).complete
    data.write_bytes(kept)
    write(runs / "run9" / "model.ckpt", TENSORS)
    assert statuses(convert_all(runs, out, jobs=1)) == {
        "run0/model.ckpt": "unchanged",
        "run1/model.ckpt": "converted",
        "run2/model.ckpt": "unchanged",
        "run9/model.ckpt": "converted",
    }


def test_what_changed_is_converted_anew(runs, out):
    convert_all(runs, out, jobs=1)
    shutil.rmtree(runs / "run1")
    write(runs / "run1" / "model.ckpt", {**TENSORS, "enc/w": numbers(3, 2, start=77)})
    report = convert_all(runs, out, jobs=1)
    assert [one.source for one in report.of(Status.CONVERTED)] == ["run1/model.ckpt"]
    np.testing.assert_array_equal(
        value(out / "run1" / "model.ckpt", "enc/w"), numbers(3, 2, start=77)
    )


@pytest.mark.parametrize("how", ["index", "data", "all"])
def test_what_is_gone_is_converted_anew(runs, out, how):
    convert_all(runs, out, jobs=1)
    wanted = tree(out)
    for path in (out / "run1").iterdir():
        if how == "all" or how in path.name:
            path.unlink()
    report = convert_all(runs, out, jobs=1)
    assert [one.source for one in report.of(Status.CONVERTED)] == ["run1/model.ckpt"]
    if how in ("all", "data"):  # else the number of data files tells the new from the old
        assert {*tree(out)} >= {name for name in wanted if name.endswith(".index")}
    for n in range(3):
        np.testing.assert_array_equal(
            value(out / f"run{n}" / "model.ckpt", "enc/w"), numbers(3, 2, start=n)
        )


def test_other_rules_or_options_need_overwrite(runs, out):
    convert_all(runs, out, jobs=1)
    before = tree(out)
    rules = cr.Rules(include="enc/.*")
    report = convert_all(runs, out, rules, jobs=1)
    assert "by other rules or options" in error_of(report, "run0/model.ckpt")
    assert tree(out) == before
    assert not convert_all(runs, out, strict=True, jobs=1).complete
    report = convert_all(runs, out, rules, jobs=1, overwrite=True)
    assert len(report.of(Status.CONVERTED)) == 3
    assert len(convert_all(runs, out, rules, jobs=1).of(Status.UNCHANGED)) == 3


def test_another_template_is_another_option(runs, out, tmp_path):
    template = write(tmp_path / "fresh", TENSORS)
    convert_all(runs, out, into=template, jobs=1)
    assert len(convert_all(runs, out, into=template, jobs=1).of(Status.UNCHANGED)) == 3
    template = write(tmp_path / "b" / "fresh", {**TENSORS, "more": numbers(2)})
    assert len(convert_all(runs, out, into=template, jobs=1).of(Status.FAILED)) == 3


def test_the_directories_may_move(runs, out, tmp_path):
    convert_all(runs, out, jobs=1)
    runs.rename(tmp_path / "runs2")
    out.rename(tmp_path / "out2")
    report = convert_all(tmp_path / "runs2", tmp_path / "out2", jobs=1)
    assert len(report.of(Status.UNCHANGED)) == 3


def test_what_somebody_else_wrote_is_not_replaced(runs, out):
    write(out / "run1" / "model.ckpt", {"mine": numbers(1)})
    before = tree(out)
    report = convert_all(runs, out, jobs=1)
    assert "exists already" in error_of(report, "run1/model.ckpt")
    assert before.items() <= tree(out).items()
    # Not even by a later run, for which the manifest knows that name.
    assert "exists already" in error_of(convert_all(runs, out, jobs=1), "run1/model.ckpt")
    assert before.items() <= tree(out).items()
    assert convert_all(runs, out, jobs=1, overwrite=True).complete


def test_a_file_of_somebody_else_where_ours_failed_is_not_replaced(runs, out):
    damage(str(runs / "run1" / "model.ckpt"), "enc/w")
    convert_all(runs, out, jobs=1)
    write(out / "run1" / "model.ckpt", {"mine": numbers(1)})
    assert "exists already" in error_of(convert_all(runs, out, jobs=1), "run1/model.ckpt")


def test_what_a_run_was_to_replace_and_did_not_stays_somebody_elses(runs, out):
    write(out / "run1" / "model.ckpt", {"mine": numbers(1)})
    before = tree(out)
    bad = cr.Rules(include="none")
    assert not convert_all(runs, out, bad, jobs=1, overwrite=True).complete
    assert "exists already" in error_of(convert_all(runs, out, jobs=1), "run1/model.ckpt")
    assert before.items() <= tree(out).items()


def test_what_stood_there_when_a_run_that_was_killed_began_stays_somebody_elses(runs, out):
    write(out / "run1" / "model.ckpt", {"mine": numbers(1)})
    before = tree(out)
    name = "run1/model.ckpt"
    with module.Manifest(str(out / MANIFEST)) as manifest:
        manifest.begin(name, name, "s", module.outputs_of(str(out / name)))
    assert "exists already" in error_of(convert_all(runs, out, jobs=1), name)
    assert before.items() <= tree(out).items()


def test_what_a_run_that_was_killed_left_is_replaced(runs, out):
    name = "run1/model.ckpt"
    (out / "run1").mkdir(parents=True)
    with module.Manifest(str(out / MANIFEST)) as manifest:
        manifest.begin(name, name, "s", ())
    (out / "run1" / "model.ckpt.data-00000-of-00001").write_bytes(b"part")
    assert convert_all(runs, out, jobs=1).complete


def test_what_is_left_is_ours_however_often_runs_are_killed_or_fail(runs, out):
    name = "run1/model.ckpt"
    write(out / name, {"part": numbers(1)})
    with module.Manifest(str(out / MANIFEST)) as manifest:
        manifest.begin(name, name, "s", ())
    data = runs / f"{name}.data-00000-of-00001"
    kept = data.read_bytes()
    data.write_bytes(kept[:-1])
    for _ in range(2):
        assert "model.ckpt" in error_of(convert_all(runs, out, jobs=1), name)
    data.write_bytes(kept)
    assert convert_all(runs, out, jobs=1).complete


def test_an_output_of_ours_is_done_again_though_a_run_failed_since(runs, out):
    convert_all(runs, out, jobs=1)
    data = runs / "run1" / "model.ckpt.data-00000-of-00001"
    kept = data.read_bytes()
    data.write_bytes(kept[:-1])
    assert not convert_all(runs, out, jobs=1).complete
    data.write_bytes(kept)
    assert convert_all(runs, out, jobs=1).complete


@pytest.mark.parametrize("how", ["damaged", "cut short", "another checkpoint"])
def test_an_output_that_somebody_changed_is_told_and_replaced_with_overwrite_alone(runs, out, how):
    convert_all(runs, out, jobs=1)
    output = out / "run1" / "model.ckpt"
    if how == "damaged":
        damage(str(output), "enc/w")
    elif how == "cut short":
        data = out / "run1" / "model.ckpt.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:-1])
    else:
        cr.convert(runs / "run2" / "model.ckpt", output, overwrite=True)
    before = tree(out / "run1")
    report = convert_all(runs, out, jobs=1)
    assert [one.source for one in report.of(Status.FAILED)] == ["run1/model.ckpt"]
    assert tree(out / "run1") == before
    assert convert_all(runs, out, jobs=1, overwrite=True).complete
    assert cr.diff(runs / "run1" / "model.ckpt", output).equal


def test_an_error_while_the_manifest_is_written_stops_the_run(runs, out, monkeypatch):
    def full(*_args, **_kwargs):
        raise cr.OutputError("disk full")

    monkeypatch.setattr(module.Manifest, "end", full)
    for jobs in (1, 2):
        with pytest.raises(cr.OutputError, match="disk full"):
            convert_all(runs, out, jobs=jobs)
    monkeypatch.undo()
    assert convert_all(runs, out, jobs=2).complete


def test_a_run_that_is_killed_is_resumed(tmp_path, out):
    """Kill it at several moments; each later run goes on, and in the end all is done and whole."""
    runs = tmp_path / "runs"
    for n in range(60):
        write(runs / f"run{n}" / "model.ckpt", {**TENSORS, "enc/w": numbers(40, 50, start=n)})
    command = [sys.executable, "-m", "compat_restore", "convert-all", str(runs), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cr.__file__).parent.parent)}
    kills = 0
    for wanted in (1, 10, 20, 35, 50):
        process = subprocess.Popen(
            [*command, "--jobs", "2"], stdout=subprocess.DEVNULL, env=environment
        )
        while process.poll() is None and done_in(out) < wanted:
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -9
    assert kills >= 3, "the runs were too short to be killed"
    report = convert_all(runs, out, jobs=2)
    assert report.complete
    assert report.of(Status.UNCHANGED)
    assert not list(out.rglob(".*"))
    for n in range(60):
        assert cr.diff(runs / f"run{n}" / "model.ckpt", out / f"run{n}" / "model.ckpt").equal


def done_in(folder: Path) -> int:
    path = folder / MANIFEST
    if not path.exists():
        return 0
    return sum(record.outcome is not None for record in read_manifest(str(path)).values())


# -- the report -----------------------------------------------------------------------------------


def test_the_table_folds_those_that_are_alike(runs, out):
    damage(str(runs / "run1" / "model.ckpt"), "enc/w")
    report = convert_all(runs, out, cr.Rules(drop_slots=True), jobs=1)
    lines = report.to_text().split("\n")
    assert lines[0] == f"'{runs}' went to '{out}'"
    assert lines[1] == "converted  2 tensors, 32 B  x2  run{0,2}/model.ckpt  (1 unused)"
    assert lines[2] == "failed                          run1/model.ckpt"
    assert lines[3].startswith("failed: ")
    assert lines[-1] == "2 converted (64 B), 0 done before, 1 failed"
    assert "run0/model.ckpt" in report.to_text(full=True)


def test_errors_that_are_alike_are_told_once(runs, out):
    report = convert_all(runs, out, cr.Rules(include="none"), jobs=1)
    assert report.to_text().count("failed: ") == 1
    assert "(and 2 more in the same way)" in report.to_text()
    assert report.to_text(full=True).count("failed: ") == 3


def test_the_report_is_json_with_every_checkpoint(runs, out):
    damage(str(runs / "run1" / "model.ckpt"), "enc/w")
    data = json.loads(convert_all(runs, out, jobs=1).to_json())
    assert data["summary"] == {
        "converted": 2, "unchanged": 0, "failed": 1, "planned": 0, "bytes": 80,
    }  # fmt: skip
    assert [one["status"] for one in data["checkpoints"]] == ["converted", "failed", "converted"]
    assert data["checkpoints"][1]["kind"] == "DamagedTensorsError"
    assert data["manifest"] == str(out / MANIFEST)


def test_names_in_the_report_cannot_steer_a_terminal(tmp_path, out):
    write(tmp_path / "runs" / "a\x1b[2J", TENSORS)
    write(tmp_path / "runs" / "b\nfake", {"x": numbers(1)})
    report = convert_all(tmp_path / "runs", out, cr.Rules(include="enc/.*"), jobs=1)
    assert "\x1b" not in report.to_text(full=True)
    assert "\nfake" not in report.to_text(full=True)
