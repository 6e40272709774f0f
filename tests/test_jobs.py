"""One conversion of many, as plain data."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from checkpoints import damage, numbers, write

import compat_restore as cr
from compat_restore.jobs import Counts, Job, Settings, Stamp, Status, carry_out, digest_of, stamped

TENSORS = {"enc/w": numbers(3, 2), "global_step": np.int64(7)}


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(write(tmp_path / "in" / "m", TENSORS), str(tmp_path / "out" / "m"))


def test_an_outcome_says_what_was_read_and_written(job, tmp_path):
    outcome = carry_out(job, Settings(root=str(tmp_path)))
    assert outcome.status is Status.CONVERTED
    assert [stamp.path for stamp in outcome.inputs] == [
        "in/m.index",
        "in/m.data-00000-of-00001",
    ]
    assert {stamp.path for stamp in outcome.outputs} == {"m.index", "m.data-00000-of-00001"}
    assert outcome.inputs == stamped(
        [f"{job.source}.index", f"{job.source}.data-00000-of-00001"], str(tmp_path)
    )
    assert outcome.counts == Counts(restored=2, nbytes=32)


def test_a_failure_is_an_outcome(job, tmp_path):
    damage(job.source, "enc/w")
    outcome = carry_out(job, Settings(root=str(tmp_path)))
    assert (outcome.status, outcome.kind) == (Status.FAILED, "DamagedTensorsError")
    assert outcome.inputs
    assert outcome.outputs == ()


def test_what_a_link_leads_out_to_is_not_read(job, tmp_path):
    outcome = carry_out(job, Settings(root=str(tmp_path / "elsewhere")))
    assert outcome.kind == "UsageError"
    assert "lies outside" in outcome.error
    assert not os.path.exists(job.destination + ".index")


def test_a_directory_of_a_similar_name_is_outside(job, tmp_path):
    (tmp_path / "i").mkdir()
    assert carry_out(job, Settings(root=str(tmp_path / "i"))).kind == "UsageError"


def test_other_processes_can_have_jobs_settings_and_outcomes(job, tmp_path):
    rules = cr.Rules(include="enc/.*", transform=[("enc/w", cr.Transpose((1, 0)))])
    settings = Settings(root=str(tmp_path), rules=rules)
    outcome = carry_out(job, settings)
    for value in (job, settings, outcome):
        assert pickle.loads(pickle.dumps(value)) == value


def test_settings_that_decide_anything_differ_in_their_digests(tmp_path):
    template = write(tmp_path / "t", TENSORS)
    different = [
        Settings(),
        Settings(rules=cr.Rules(drop_slots=True)),
        Settings(into=template),
        Settings(verify=False),
        Settings(digests=True),
        Settings(keep_slices=True),
        Settings(max_shard_size=5),
        Settings(strict=True),
        Settings(skip_mismatched=True),
        Settings(allow_empty=True),
    ]
    digests = {digest_of(settings.describe()) for settings in different}
    assert len(digests) == len(different)
    assert digest_of(Settings(root="a", dry_run=True).describe()) in digests


def test_a_template_that_changed_is_another_setting(tmp_path):
    template = write(tmp_path / "t", TENSORS)
    before = Settings(into=template).describe()
    os.utime(f"{template}.index", ns=(1, 1))
    assert Settings(into=template).describe() != before


def test_a_file_that_is_gone_has_no_stamp(tmp_path):
    with pytest.raises(FileNotFoundError):
        stamped([str(tmp_path / "gone")], str(tmp_path))
    (tmp_path / "there").write_bytes(b"123")
    os.utime(tmp_path / "there", ns=(1, 5))
    assert stamped([str(tmp_path / "there")], str(tmp_path)) == (Stamp("there", 3, 5),)
