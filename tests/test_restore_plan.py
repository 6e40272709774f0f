"""The plan as data: printed, saved, read back, and held against what it is to be carried out on."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError

import pytest
from specs import F32, spec, specs

from compat_restore.errors import PlanError
from compat_restore.planner import plan_restore
from compat_restore.restore_plan import RestorePlan
from compat_restore.rules import Rules
from compat_restore.tensors import DType, TensorSpec
from compat_restore.transforms import Transpose


def rich_plan() -> RestorePlan:
    """Return a plan in which there is something of everything."""
    return plan_restore(
        specs("a", "b", "é\n'", "old", "x1", "left"),
        {
            **specs("a", spec("b", 5), "new", "é\n'", "more", spec("x1", 3, 2)),
            "open": TensorSpec("open", F32, (None, 3)),
            "any": TensorSpec("any", F32, None),
        },
        Rules(
            rename=[("old", ["new", "more"])], exclude="left", transform=[("x.", Transpose((1, 0)))]
        ),
        skip_mismatched=True,
    )


def test_a_plan_goes_to_json_and_back():
    plan = rich_plan()
    assert plan.unused
    assert plan.mismatched
    assert len(plan.missing) == 2
    assert RestorePlan.from_json(plan.to_json()) == plan


def test_a_plan_is_frozen_and_hashable():
    plan = rich_plan()
    with pytest.raises(FrozenInstanceError):
        plan.items = ()  # type: ignore[misc]
    assert hash(plan) == hash(rich_plan())


def edited(change) -> str:
    data = json.loads(rich_plan().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'version'"),
        (edited(lambda d: d.update(version=2)), "version 2, 1 is expected"),
        (edited(lambda d: d.pop("unused")), "'unused'"),
        (edited(lambda d: d.update(items={})), "items is no list"),
        (edited(lambda d: d.update(rules=[])), "rules is no object"),
        (edited(lambda d: d["rules"].update(includes=[])), "did you mean 'include'"),
        (edited(lambda d: d["items"][0].update(shape=[-1])), "a shape is expected"),
        (edited(lambda d: d["items"][0].update(shape=[True])), "a shape is expected"),
        (edited(lambda d: d["items"][0].update(dtype="float31")), "float31"),
        (edited(lambda d: d["items"][0].update(source=3)), "text is expected"),
        (edited(lambda d: d["items"][0].update(transforms=[{"rotate": 1}])), "is no transform"),
        (edited(lambda d: d["items"][0].update(transforms=3)), "a list of objects"),
        (edited(lambda d: d["unused"][0].update(reason="mood")), "mood"),
        (edited(lambda d: d["missing"][0].update(shape="x")), "a shape is expected"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        RestorePlan.from_json(text)


def test_a_plan_that_restores_two_tensors_into_one_variable_is_refused():
    text = edited(lambda d: d["items"].append({**d["items"][0], "source": "b"}))
    with pytest.raises(PlanError, match="variable 'a' stands in it twice"):
        RestorePlan.from_json(text)


def test_a_plan_whose_transforms_do_not_make_what_it_says_is_refused():
    def change(data: dict) -> None:
        [row] = [row for row in data["items"] if row["target"] == "x1"]
        row["transforms"] = []

    text = edited(change)
    with pytest.raises(PlanError, match="'x1'"):
        RestorePlan.from_json(text)


def test_a_plan_fits_what_it_was_made_for():
    sources, targets = specs("a", "b"), specs("a", "c")
    plan = plan_restore(sources, targets)
    plan.check_fits(sources, targets)
    plan.check_fits(sources, None)
    plan.check_fits(specs("a"), specs("a"))


def test_a_plan_for_something_else_is_told_fault_by_fault():
    plan = plan_restore(specs("a", "b", "c"), specs("a", "b", "c"))
    with pytest.raises(PlanError, match="made for another checkpoint or target") as caught:
        plan.check_fits(specs(spec("a", 9), "b"), specs("a", spec("b", 2, 3, dtype=DType.float16)))
    assert caught.value.faults == (
        "tensor 'a' is planned as float32[2,3], and is float32[9] in this checkpoint",
        "variable 'b' is planned as float32[2,3], and is float16[2,3] in this target",
        "tensor 'c' is planned, and not in this checkpoint",
        "variable 'c' is planned, and not in this target",
    )


def test_a_plan_reads_as_a_table():
    lines = str(rich_plan()).splitlines()
    assert lines[-1].endswith("2 initialized, 1 unused, 1 mismatched")
    assert lines[-1].startswith("5 restored (120 B), ")
    assert "rename 1: old = new, more" in lines
    assert [line.split()[0] for line in lines[:-2]] == sorted(
        (line.split()[0] for line in lines[:-2]),
        key=["restore", "mismatch", "initialize", "unused"].index,
    )
    assert "\\n" in "".join(lines)
