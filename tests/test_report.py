"""Reports: what became of every variable, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from compat_restore.report import Initialized, Kept, Mismatched, Restored, RestoreReport
from compat_restore.restore_plan import Mismatch, Missing, Reason, RestoreItem, RestorePlan, Unused
from compat_restore.rules import Rules
from compat_restore.tensors import DType
from compat_restore.transforms import Transpose

F32 = DType.float32


def item(source: str, target: str, *shape: int, rule: str | None = None) -> RestoreItem:
    return RestoreItem(
        source=source,
        target=target,
        dtype=F32,
        shape=shape,
        target_dtype=F32,
        target_shape=shape,
        rule=rule,
    )


def report(**changes: object) -> RestoreReport:
    """Return a report, written by hand, in which there is something of everything."""
    items = (
        item("net/l_0/w", "my/l_0/w", 3, 4, rule="rename 1"),
        item("net/l_1/w", "my/l_1/w", 3, 4, rule="rename 1"),
        item("net/l_2/w", "my/l_2/w", 5, 4, rule="rename 1"),
        item("flat", "flat", 2, 3)._replace(transforms=(Transpose((1, 0)),), target_shape=(3, 2)),
    )
    pair = Mismatch(
        source="net/fc",
        name="my/fc",
        dtype=F32,
        shape=(4, 10),
        target_dtype=F32,
        target_shape=(4, None),
        reason=Reason.SHAPE,
    )
    skip = Unused(
        name="net/l_0/w/Adam",
        dtype=F32,
        shape=(3, 4),
        reason=Reason.EXCLUDED,
        detail="exclude '.*Adam'",
    )
    lost = Missing(name="head/w", dtype=F32, shape=(4, 3))
    held = Missing(name="step", dtype=DType.int64, shape=None)
    plan = RestorePlan(
        rules=Rules(exclude=".*Adam", rename=[("net/(.*)", r"my/\1")]),
        items=items,
        unused=(skip,),
        missing=(lost, held),
        mismatched=(pair,),
    )
    made = RestoreReport(
        target="session",
        checkpoint="/data/model.ckpt",
        checkpoint_format="V2 tensor bundle, name-based",
        plan=plan,
        restored=tuple(Restored(item=i, digest=f"sha256:{i.target}") for i in items),
        initialized=(Initialized(name="head/w", dtype=F32, shape=(4, 3), reason=lost.remark()),),
        unused=(skip,),
        mismatched=(Mismatched(pair=pair, outcome="initialized"),),
        kept=(Kept(name="step", dtype=DType.int64, shape=None, reason="set before"),),
        notes=("a note",),
    )
    return replace(made, **changes)


NAMES = ["my/l_0/w", "my/l_1/w", "my/l_2/w", "flat", "my/fc", "head/w", "step", "net/l_0/w/Adam"]


def test_a_report_reads_as_a_table_with_repeated_layers_folded():
    assert report().to_text().splitlines() == [
        "restored '/data/model.ckpt' (V2 tensor bundle, name-based)",
        "restored     float32[3,2]      flat  (float32[2,3], transpose [1, 0])",
        "restored     float32[3,4]  x2  my/l_{0,1}/w  (rename 1)",
        "restored     float32[5,4]      my/l_2/w  (rename 1)",
        (
            "mismatched   float32[4,?]      my/fc  (shape mismatch: the checkpoint has "
            "float32[4,10]; initialized)"
        ),
        "initialized  float32[4,3]      head/w  (not in the checkpoint)",
        "kept         int64[?]          step  (set before)",
        "unused       float32[3,4]      net/l_0/w/Adam  (excluded: exclude '.*Adam')",
        r"rename 1: net/(.*) = my/\1",
        "note: a note",
        "4 restored (200 B), 1 initialized, 1 kept as they were, 1 mismatched, 1 unused",
    ]
    assert str(report()) == report().to_text()


def test_the_full_text_has_a_row_for_every_name_and_names_the_sources():
    lines = report().to_text(full=True).splitlines()
    for name in NAMES:
        assert sum(name in line.split() for line in lines) == 1, name
    assert "restored     float32[3,4]  my/l_1/w  (from 'net/l_1/w')" in lines
    assert not any("rename 1" in line for line in lines)


def test_no_shape_is_hidden_by_folding():
    text = report().to_text()
    for entry in report().restored:
        assert f"float32[{','.join(map(str, entry.item.target_shape))}]" in text


def test_each_variable_stands_in_the_json_once_with_its_digest():
    data = json.loads(report().to_json())
    entries = [
        e for key in ("restored", "initialized", "mismatched", "kept", "unused") for e in data[key]
    ]
    assert sorted(entry["name"] for entry in entries) == sorted(NAMES)
    assert data["restored"][0] == {
        "name": "my/l_0/w",
        "source": "net/l_0/w",
        "dtype": "float32",
        "shape": [3, 4],
        "rule": "rename 1",
        "transforms": [],
        "digest": "sha256:my/l_0/w",
    }
    assert data["restored"][3]["transforms"] == [{"transpose": [1, 0]}]
    assert data["mismatched"] == [
        {
            "name": "my/fc",
            "source": "net/fc",
            "dtype": "float32",
            "shape": [4, None],
            "source_dtype": "float32",
            "source_shape": [4, 10],
            "reason": "shape mismatch",
            "outcome": "initialized",
        }
    ]
    assert data["kept"] == [
        {"name": "step", "dtype": "int64", "shape": None, "reason": "set before"}
    ]
    assert data["summary"] == {
        "restored": 4,
        "restored_bytes": 200,
        "initialized": 1,
        "mismatched": 1,
        "kept": 1,
        "unused": 1,
        "unused_but_wanted": 0,
    }
    assert Rules.from_dict(data["rules"]) == report().plan.rules
    assert (data["version"], data["target"], data["dry_run"]) == (1, "session", False)
    assert (data["checkpoint"], data["output"]) == ("/data/model.ckpt", None)
    assert data["notes"] == ["a note"]


def test_entries_answer_by_name_and_source():
    made = report()
    assert made.preserved == ("my/l_0/w", "my/l_1/w", "my/l_2/w", "flat")
    assert [entry.source for entry in made.restored][:1] == ["net/l_0/w"]
    assert [entry.name for entry in made.mismatched] == ["my/fc"]
    assert [entry.source for entry in made.mismatched] == ["net/fc"]
    assert made.nbytes == (12 + 12 + 20 + 6) * 4


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "restored 'a' (f)"),
        ({"output": "b", "output_format": "g"}, "'a' (f)\nbecame 'b' (g)"),
        (
            {"output": "b", "output_format": "g", "dry_run": True},
            "'a' (f)\nwould become 'b' (g)",
        ),
    ],
)
def test_the_title_says_what_was_done(changes: dict, title: str):
    made = report(checkpoint="a", checkpoint_format="f", **changes)
    assert made.to_text().startswith(f"{title}\n")


def test_what_was_not_read_back_has_no_digest():
    made = report()
    bare = replace(made, restored=(made.restored[0]._replace(digest=None),))
    assert json.loads(bare.to_json())["restored"][0]["digest"] is None


def test_nothing_kept_is_not_mentioned():
    assert "kept" not in report(kept=()).summary()


def test_hostile_names_do_not_reach_the_terminal():
    made = report(
        checkpoint="\x1b[2J.ckpt",
        notes=("a\nb",),
        kept=(Kept(name="k\x1b[31m", dtype=F32, shape=(), reason="set\rbefore"),),
    )
    for text in (made.to_text(), made.to_text(full=True)):
        assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(made.to_json())["kept"][0]["name"] == "k\x1b[31m"
    assert "\x1b" not in made.to_json()
