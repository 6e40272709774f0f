"""A conversion that may have been done already, or is being done by somebody else."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import damage, numbers, write
from formats import snapshot

import compat_restore as cr
from compat_restore import repetition as module
from compat_restore.jobs import Job, Settings, Status, check_output
from compat_restore.repetition import carry_out_again

TENSORS = {"enc/w": numbers(3, 2), "enc/b": numbers(2, start=10), "global_step": np.int64(7)}
SETTINGS = Settings(rules=cr.Rules(rename=[("enc/(.*)", r"new/\1")], transform=[
    ("enc/w", cr.Transpose((1, 0)))
]))  # fmt: skip


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(write(tmp_path / "in" / "m", TENSORS), str(tmp_path / "out" / "m"))


def test_the_second_time_it_is_found_done_and_nothing_is_written(job, tmp_path):
    first = carry_out_again(job, SETTINGS)
    assert first.status is Status.CONVERTED
    before = snapshot(tmp_path / "out")
    second = carry_out_again(job, SETTINGS)
    assert second.status is Status.UNCHANGED
    assert second.counts == first.counts
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "enc/w": numbers(3, 2, start=5)},
        {**TENSORS, "more": numbers(1)},
        {"enc/w": numbers(3, 2), "enc/b": numbers(2, start=10), "global_step": np.int32(7)},
        {"enc/w": numbers(2, 3), "enc/b": numbers(2, start=10), "global_step": np.int64(7)},
        {"enc/w": numbers(3, 2), "enc/b": numbers(2, start=10)},
    ],
    ids=["values", "one more", "dtype", "shape", "one less"],
)
def test_what_stands_there_and_is_something_else_is_not_replaced(job, tmp_path, other):
    write(job.destination, other)
    before = snapshot(tmp_path / "out")
    outcome = carry_out_again(job, Settings())
    assert "holds something else" in outcome.error
    assert snapshot(tmp_path / "out") == before
    again = carry_out_again(Job(job.source, job.destination, overwrite=True), Settings())
    assert again.status is Status.CONVERTED
    assert cr.diff(job.source, job.destination).equal


@pytest.mark.tensorflow
def test_what_is_stored_in_other_parts_is_compared_by_values(tmp_path):
    tf = pytest.importorskip("tensorflow")

    def saved(name, array, specs):
        (tmp_path / name).mkdir()
        rows_or_columns = array if ":-" in specs[0] else array.T
        tf.raw_ops.SaveV2(
            prefix=str(tmp_path / name / "w"),
            tensor_names=["w"] * 2,
            shape_and_slices=specs,
            tensors=[tf.reshape(part, (1, 2) if ":-" in specs[0] else (2, 1))
                     for part in rows_or_columns],
        )  # fmt: skip
        return str(tmp_path / name / "w")

    value = numbers(2, 2)
    source = saved("rows", value, ["2 2 0,1:-", "2 2 1,1:-"])
    columns = ["2 2 -:0,1", "2 2 -:1,1"]
    same, other = saved("same", value, columns), saved("other", value.T, columns)
    for settings in (Settings(), Settings(keep_slices=True)):
        assert carry_out_again(Job(source, same), settings).status is Status.UNCHANGED
        before = snapshot(tmp_path / "other")
        assert "holds something else" in str(carry_out_again(Job(source, other), settings).error)
        assert snapshot(tmp_path / "other") == before


def test_damage_to_what_stands_there_is_something_else(job):
    carry_out_again(job, Settings())
    damage(job.destination, "enc/w")
    assert "holds something else" in carry_out_again(job, Settings()).error
    overwriting = Job(job.source, job.destination, overwrite=True)
    assert carry_out_again(overwriting, Settings()).status is Status.CONVERTED
    assert carry_out_again(overwriting, Settings()).status is Status.UNCHANGED


def test_damage_to_the_source_is_told(job):
    damage(job.source, "enc/w")
    assert carry_out_again(job, Settings()).kind == "DamagedTensorsError"


def test_with_a_template_what_it_gives_is_looked_at_too(job, tmp_path):
    template = write(tmp_path / "fresh", {"enc/w": numbers(3, 2) * 0, "head": numbers(4)})
    settings = Settings(rules=cr.Rules(include="enc/w"), into=template)
    assert carry_out_again(job, settings).status is Status.CONVERTED
    assert carry_out_again(job, settings).status is Status.UNCHANGED
    other = write(tmp_path / "fresh2", {"enc/w": numbers(3, 2) * 0, "head": numbers(4, start=9)})
    outcome = carry_out_again(job, Settings(rules=cr.Rules(include="enc/w"), into=other))
    assert "holds something else" in outcome.error


def test_data_that_a_killed_writer_left_is_replaced(job, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    carry_out_again(job, Settings())
    os.unlink(f"{job.destination}.index")
    assert carry_out_again(job, Settings()).status is Status.CONVERTED
    assert cr.diff(job.source, job.destination).equal


def test_a_file_of_that_name_is_not_replaced_though_it_is_no_checkpoint(job, tmp_path):
    (tmp_path / "out").mkdir()
    Path(f"{job.destination}.index").write_text("notes")
    assert carry_out_again(job, Settings()).status is Status.FAILED
    assert snapshot(tmp_path / "out") == {"m.index": b"notes"}


def test_no_name_of_an_output_leads_out_of_its_directory(tmp_path):
    for name in ("../esc", "a/../../esc", "a//b", "", "./a", "/abs"):
        for folder in (str(tmp_path), "memory://out"):
            with pytest.raises(cr.OutputError, match="no name of an output"):
                check_output(name, folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(cr.OutputError, match="a link leads out"):
        check_output("link/m", str(tmp_path / "out"))
    assert check_output("a/m", "memory://out/") == "memory://out/a/m"


def _together(job: Job, settings: Settings, barrier, results) -> None:
    barrier.wait()
    results.put(carry_out_again(job, settings))


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_the_same_moment_both_succeed(tmp_path, overwrite):
    context = multiprocessing.get_context("spawn")
    source = write(tmp_path / "in" / "m", {f"w{n}": numbers(100, 100, start=n) for n in range(9)})
    for attempt in range(3):
        folder = tmp_path / f"out{attempt}"
        if overwrite:
            write(folder / "m", {"old": numbers(5)})
        job = Job(source, str(folder / "m"), overwrite=overwrite)
        barrier, results = context.Barrier(3), context.Queue()
        processes = [
            context.Process(target=_together, args=(job, Settings(), barrier, results))
            for _ in range(3)
        ]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert {str(outcome.error) for outcome in outcomes} == {"None"}
        assert cr.diff(source, job.destination).equal
        assert len(list(folder.glob("*.index"))) == 1
