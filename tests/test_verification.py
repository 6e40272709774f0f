from __future__ import annotations

import json

import pytest
from checkpoints import damage, numbers, write

import compat_restore as cr
from compat_restore.cli import main


def test_a_whole_checkpoint_is_as_it_was_written(tmp_path, capsys):
    ckpt = write(tmp_path / "m", {"w": numbers(2, 3), "b": numbers(4)})
    found = cr.verify_checkpoint(ckpt)
    assert (found.tensors, found.nbytes, found.faults, found.checked) == (2, 40, (), True)
    assert main(["verify", ckpt]) == 0
    assert "2 tensors, 40 B: all as they were written" in capsys.readouterr().out


def test_all_damaged_tensors_are_listed_and_the_others_are_readable(tmp_path, capsys):
    ckpt = write(tmp_path / "m", {f"w{n}": numbers(3, start=n + 1.0) for n in range(5)})
    damage(ckpt, "w1")
    damage(ckpt, "w3")
    found = cr.verify_checkpoint(ckpt)
    assert len(found.faults) == 2
    assert "'w1'" in found.faults[0]
    assert "'w3'" in found.faults[1]
    assert main(["verify", ckpt]) == 3
    out = capsys.readouterr().out
    assert out.count("damaged: tensor") == 2
    assert "2 damaged, the others as they were written" in out
    with cr.open_checkpoint(ckpt) as reader:
        assert reader.read("w2").tolist() == [3, 4, 5]


def test_several_checkpoints_are_verified_and_told_as_json(tmp_path, capsys):
    good = write(tmp_path / "good", {"w": numbers(2)})
    bad = write(tmp_path / "bad", {"w": numbers(2)})
    damage(bad, "w")
    assert main(["verify", good, bad, "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert [len(entry["damaged"]) for entry in data["checkpoints"]] == [0, 1]


def test_a_checkpoint_that_cannot_be_opened_does_not_hide_the_others(tmp_path, capsys):
    good = write(tmp_path / "good", {"w": numbers(2)})
    (tmp_path / "cut.index").write_bytes((tmp_path / "good.index").read_bytes()[:-9])
    assert main(["verify", str(tmp_path / "cut"), good]) == 3
    said = capsys.readouterr().out
    assert "no checkpoint table" in said
    assert "all as they were written" in said


@pytest.mark.parametrize("folder", ["plain", "partitioned", "v1", "dtypes", "object_based"])
def test_checkpoints_of_tensorflow_are_as_they_were_written(golden, folder):
    found = cr.verify_checkpoint(golden / folder)
    assert found.faults == ()
    assert found.tensors > 0


def test_a_checkpoint_that_is_missing_does_not_hide_the_others(tmp_path, capsys):
    good, bad = (
        write(tmp_path / "good", {"w": numbers(2)}),
        write(tmp_path / "bad", {"w": numbers(2)}),
    )
    damage(bad, "w")
    nowhere = str(tmp_path / "nowhere")
    assert main(["verify", nowhere, good]) == 4
    assert "all as they were written" in capsys.readouterr().out
    assert main(["verify", good, bad, nowhere, "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert [len(entry["damaged"]) for entry in data["checkpoints"]] == [0, 1, 1]
