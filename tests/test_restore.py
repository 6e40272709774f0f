"""Carrying out plans: one plan for three targets, kept, replayed, and accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from checkpoints import (
    accounted_once,
    damage,
    digests_of,
    graph_and_session,
    numbers,
    write,
    write_from_graph,
)

import compat_restore as cr

ROOT = Path(__file__).parent.parent

v1 = tf.compat.v1

# What the checkpoint of these tests holds: two layers, a head, slots of Adam, a counter.
TENSORS = {
    "enc/layer_1/w": numbers(3, 2),
    "enc/layer_1/b": numbers(2, start=10),
    "enc/layer_10/w": numbers(3, 2, start=20),
    "enc/layer_10/b": numbers(2, start=30),
    "head/w": numbers(2, 5, start=40),
    "enc/layer_1/w/Adam": numbers(3, 2, start=60),
    "enc/layer_1/w/Adam_1": numbers(3, 2, start=70),
    "beta1_power": np.float32(0.9),
    "global_step": np.int64(7),
}
SHAPES = {
    "body/layer_1/w": (3, 2),
    "body/layer_1/b": (2,),
    "body/layer_10/w": (3, 2),
    "body/layer_10/b": (2,),
    "head/w": (2, 3),
}
RULES = cr.Rules(
    include=[r"enc/.*", "head/w"],
    exclude=["head/w"],
    rename=[(r"enc/(.*)", r"body/\1")],
    drop_slots=True,
)


@pytest.fixture
def ckpt(tmp_path) -> str:
    return write(tmp_path / "source" / "model.ckpt", TENSORS)


def graph_variables(shapes, *, resource=True):
    return {
        name: v1.get_variable(name, initializer=tf.zeros(shape, tf.float32), use_resource=resource)
        for name, shape in shapes.items()
    }


def eager_variables(shapes):
    return {name: tf.Variable(tf.zeros(shape)) for name, shape in shapes.items()}


def template(tmp_path, shapes) -> str:
    return write(
        tmp_path / "template" / "m", {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    )


def restored_everywhere(ckpt, rules, shapes, tmp_path, **options):
    """Restore into the three targets; return their reports."""
    with graph_and_session() as session:
        graph_variables(shapes)
        in_session = cr.restore_session(session, ckpt, rules, **options)
    in_objects = cr.restore_objects(eager_variables(shapes), ckpt, rules, **options)
    in_file = cr.convert(
        ckpt,
        tmp_path / "out" / "m",
        rules,
        into=template(tmp_path, shapes),
        digests=True,
        **options,
    )
    return in_session, in_objects, in_file


# -- accounting -----------------------------------------------------------------------------------

CASES = {
    "rules": (RULES, {}),
    "everything by its own name": (None, {"skip_mismatched": True, "allow_empty": True}),
    "one tensor for two variables": (
        cr.Rules(
            include=["enc/layer_1/b"],
            rename=[("enc/layer_1/b", ["body/layer_1/b", "body/layer_10/b"])],
        ),
        {},
    ),
    "a head that does not fit": (
        cr.Rules(rename=[(r"enc/(.*)", r"body/\1")]),
        {"skip_mismatched": True},
    ),
    "a drop rule": (
        cr.Rules(rename=[(r"enc/layer_1/.*", None), (r"enc/(.*)", r"body/\1"), ("head/.*", None)]),
        {},
    ),
    "nothing wanted": (cr.Rules(exclude=".*"), {"allow_empty": True}),
    "an assignment map": (
        {"enc/layer_1/": "body/layer_1/", "head/w": "head/w"},
        {"skip_mismatched": True},
    ),
    "a transform": (
        cr.Rules(
            include=["enc/layer_10/b"],
            rename=[(".*", "body/layer_10/b")],
            transform=[(".*", cr.Reshape((2,)))],
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_key_and_every_variable_is_told_of_once_and_the_targets_agree(tmp_path, ckpt, case):
    rules, options = CASES[case]
    reports = restored_everywhere(ckpt, rules, SHAPES, tmp_path, **options)
    for report in reports:
        accounted_once(report, TENSORS, SHAPES)
        assert report.preserved == tuple(digests_of(report))
    session, objects, file = reports
    assert digests_of(session) == digests_of(objects) == digests_of(file)
    assert session.plan == objects.plan == file.plan
    assert {e.name for e in session.initialized} == {e.name for e in objects.initialized}


def test_the_three_targets_hold_the_bytes_of_the_checkpoint(tmp_path, ckpt):
    with graph_and_session() as session:
        made = graph_variables(SHAPES)
        cr.restore_session(session, ckpt, RULES)
        in_session = session.run(made)
    in_objects = eager_variables(SHAPES)
    cr.restore_objects(in_objects, ckpt, RULES)
    cr.convert(ckpt, tmp_path / "out", RULES, into=template(tmp_path, SHAPES))
    with cr.open_checkpoint(tmp_path / "out") as reader:
        for name in SHAPES:
            source = name.replace("body", "enc")
            wanted = np.zeros((2, 3)) if name == "head/w" else TENSORS[source]
            for found in (in_session[name], in_objects[name].numpy(), reader.read(name)):
                np.testing.assert_array_equal(found, wanted)


def test_partitioned_variables_are_one_variable_in_plan_and_report(tmp_path):
    ckpt = write_from_graph(tmp_path / "m", {"emb": numbers(6, 2), "b": numbers(2)}, parts=2)
    with graph_and_session() as session:
        v1.get_variable(
            "emb",
            shape=(6, 2),
            partitioner=v1.fixed_size_partitioner(3),
            initializer=v1.zeros_initializer(),
        )
        in_session = cr.restore_session(session, ckpt)
    in_objects = cr.restore_objects({"emb": tf.Variable(tf.zeros((6, 2)))}, ckpt)
    assert digests_of(in_session) == digests_of(in_objects)
    accounted_once(in_session, ["emb", "b"], ["emb"])


def test_a_report_shows_the_same_digests_for_both_kerases(tmp_path):
    weights = {"fc/kernel": numbers(4, 3), "fc/bias": numbers(3, start=50)}
    ckpt = write(tmp_path / "m", weights)
    found = []
    for world in (tf_keras, keras):
        model = world.Sequential([world.Input((4,)), world.layers.Dense(3, name="fc")], name="net")
        report = cr.restore_objects(model, ckpt)
        accounted_once(report, weights, cr.ObjectTarget(model).specs())
        found.append({entry.source: entry.digest for entry in report.restored})
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_what_a_rule_left_out_is_the_reason_for_the_variable_it_would_have_set(tmp_path, ckpt):
    session, objects, _ = restored_everywhere(ckpt, RULES, SHAPES, tmp_path)
    for report in (session, objects):
        (head,) = report.initialized
        assert head.name == "head/w"
        assert head.reason.startswith("not chosen: excluded: 'head/w'")
        reasons = {entry.name: str(entry.reason) for entry in report.unused}
        assert reasons["head/w"] == "excluded"
        assert reasons["enc/layer_1/w/Adam"] == "slot left out"
        assert reasons["global_step"] == "not included"


# -- faults ---------------------------------------------------------------------------------------


def test_all_faults_are_raised_together_and_the_same_for_every_target(tmp_path, ckpt):
    rules = cr.Rules(
        include=["enc/.*", "head/.*", "nothing/.*"],
        exclude=["enc/.*/Adam.*"],
        rename=[(r"enc/layer_10?/(.*)", r"body/layer_1/\1")],
    )
    told = []
    with graph_and_session() as session:
        graph_variables(SHAPES)
        with pytest.raises(cr.PlanError) as caught:
            cr.restore_session(session, ckpt, rules)
        told.append(caught.value.faults)
    with pytest.raises(cr.PlanError) as caught:
        cr.restore_objects(eager_variables(SHAPES), ckpt, rules)
    told.append(caught.value.faults)
    with pytest.raises(cr.PlanError) as caught:
        cr.convert(ckpt, tmp_path / "out", rules, into=template(tmp_path, SHAPES))
    told.append(caught.value.faults)
    assert told[0] == told[1] == told[2]
    text = "\n".join(told[0])
    assert "include 'nothing/.*'" in text
    assert "variable 'body/layer_1/w': 2 tensors would go into it" in text
    assert "variable 'body/layer_1/b': 2 tensors would go into it" in text
    assert "tensor 'head/w': checkpoint has float32[2,5]" in text
    assert not list(tmp_path.glob("out*"))


def test_strict_tells_what_is_missing_and_what_is_unused(ckpt):
    rules = cr.Rules(exclude=["head/w"], rename=[(r"enc/(.*)", r"body/\1")])
    with pytest.raises(cr.PlanError) as caught:
        cr.restore_objects(eager_variables(SHAPES), ckpt, rules, strict=True)
    text = str(caught.value)
    assert "tensor 'global_step': strict" in text
    assert "variable 'head/w': strict" in text


@pytest.mark.parametrize(
    "rules", [3, ["enc/.*"], object()], ids=["a number", "a list", "an object"]
)
def test_what_are_no_rules_is_told_so(ckpt, rules):
    with pytest.raises(ValueError, match="Rules, a RestorePlan, an assignment map"):
        cr.restore_objects(eager_variables(SHAPES), ckpt, rules)


def test_a_damaged_tensor_among_many_is_told_before_the_first_variable_changes(ckpt):
    damage(ckpt, "enc/layer_10/w")
    made = eager_variables(SHAPES)
    with pytest.raises(cr.DamagedCheckpointError, match="enc/layer_10/w"):
        cr.restore_objects(made, ckpt, RULES)
    for variable in made.values():
        assert not np.any(variable.numpy())


# -- the public names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        "from compat_restore.planner import plan_restore",
        "import compat_restore.cli.convert",
        "pass",
    ],
)
def test_plan_and_convert_are_functions_whatever_was_imported_before(first):
    code = f"import compat_restore as cr; {first}; print(type(cr.plan), type(cr.convert), sep='')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "<class 'function'>" * 2


def test_every_public_name_is_there():
    assert [name for name in cr.__all__ if getattr(cr, name, None) is None] == []
    assert dir(cr) == sorted(cr.__all__)


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_changes_nothing_and_is_carried_out_as_it_stands(ckpt):
    made = eager_variables(SHAPES)
    plan = cr.plan(ckpt, cr.ObjectTarget(made), RULES)
    assert not any(np.any(variable.numpy()) for variable in made.values())
    report = cr.restore_objects(made, ckpt, plan)
    assert report.plan == plan
    np.testing.assert_array_equal(made["body/layer_1/w"], TENSORS["enc/layer_1/w"])


def test_a_plan_made_for_a_session_is_carried_out_in_objects_and_in_a_file(tmp_path, ckpt):
    with graph_and_session() as session:
        graph_variables(SHAPES)
        plan = cr.plan(ckpt, cr.SessionTarget(session), RULES)
        assert len(cr.uninitialized_variables(session)) == len(SHAPES)
        session_report = cr.restore_session(session, ckpt, plan)
    plan = cr.RestorePlan.from_json(plan.to_json())
    objects = cr.restore_objects(eager_variables(SHAPES), ckpt, plan)
    file = cr.convert(ckpt, tmp_path / "out", plan, into=template(tmp_path, SHAPES), digests=True)
    assert digests_of(session_report) == digests_of(objects) == digests_of(file)


def test_a_plan_that_is_given_with_an_open_checkpoint_leaves_it_open(ckpt):
    made = eager_variables(SHAPES)
    with cr.open_checkpoint(ckpt) as reader:
        plan = cr.plan(reader, cr.ObjectTarget(made), RULES)
        cr.restore_objects(made, reader, plan)
        np.testing.assert_array_equal(reader.read("head/w"), TENSORS["head/w"])


REPLAY = """
import sys
import tensorflow as tf
import compat_restore as cr
checkpoint, plan = sys.argv[1:]
made = {n: tf.Variable(tf.zeros(s)) for n, s in %r.items()}
report = cr.restore_objects(made, checkpoint, cr.RestorePlan.from_json(open(plan).read()))
print(report.to_json())
"""


def test_a_plan_is_replayed_from_json_in_another_process(tmp_path, ckpt):
    made = eager_variables(SHAPES)
    plan = cr.plan(ckpt, cr.ObjectTarget(made), RULES)
    kept = tmp_path / "plan.json"
    kept.write_text(plan.to_json())
    done = subprocess.run(
        [sys.executable, "-c", REPLAY % SHAPES, ckpt, str(kept)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    there = json.loads(done.stdout)
    here = json.loads(cr.restore_objects(made, ckpt, plan).to_json())
    assert there == here
    assert {row["name"] for row in there["restored"]} == set(SHAPES) - {"head/w"}


def test_a_plan_for_another_checkpoint_is_refused_with_all_that_differs(tmp_path, ckpt):
    made = eager_variables(SHAPES)
    plan = cr.plan(ckpt, cr.ObjectTarget(made), RULES)
    other = {**TENSORS, "enc/layer_1/w": numbers(2, 3)}
    del other["enc/layer_10/b"]
    other = write(tmp_path / "other", other)
    with pytest.raises(cr.PlanError) as caught:
        cr.restore_objects(made, other, plan)
    assert len(caught.value.faults) == 2
    assert not np.any(made["body/layer_10/w"].numpy())


def test_a_plan_for_another_target_is_refused_with_all_that_differs(ckpt):
    plan = cr.plan(ckpt, cr.ObjectTarget(eager_variables(SHAPES)), RULES)
    other = eager_variables({**SHAPES, "body/layer_1/w": (2, 3)})
    del other["body/layer_10/b"]
    with pytest.raises(cr.PlanError) as caught:
        cr.restore_objects(other, ckpt, plan)
    assert len(caught.value.faults) == 2


def test_what_a_plan_does_not_know_of_is_told_of_and_what_is_gone_is_not(tmp_path, ckpt):
    plan = cr.plan(ckpt, cr.ObjectTarget(eager_variables(SHAPES)), RULES)
    tensors = {**TENSORS, "late/w": numbers(1)}
    del tensors["beta1_power"]
    other = write(tmp_path / "other", tensors)
    shapes = {**SHAPES, "late": (1,)}
    del shapes["head/w"]
    for report in restored_everywhere(other, plan, shapes, tmp_path):
        accounted_once(report, tensors, shapes)
        assert report.plan.items == plan.items
        assert "late" in {entry.name for entry in report.initialized}
        assert "late/w" in {entry.name for entry in report.unused}


# -- other forms of rules -------------------------------------------------------------------------


def test_a_rules_file_says_the_same_to_every_target(tmp_path, ckpt):
    path = tmp_path / "rules.toml"
    path.write_text(RULES.to_toml())
    from_file = restored_everywhere(ckpt, path, SHAPES, tmp_path)
    for report in from_file:
        assert report.plan.rules == RULES
        assert len(report.restored) == 4


def test_an_assignment_map_takes_names_scopes_and_variables_of_a_graph(ckpt):
    with graph_and_session() as session:
        made = graph_variables(SHAPES)
        given = {"enc/layer_10/": "body/layer_10/", "enc/layer_1/w": made["body/layer_1/w"]}
        report = cr.restore_session(session, ckpt, given)
        found = session.run(made)
    assert len(given) == 2
    np.testing.assert_array_equal(found["body/layer_1/w"], TENSORS["enc/layer_1/w"])
    np.testing.assert_array_equal(found["body/layer_10/b"], TENSORS["enc/layer_10/b"])
    np.testing.assert_array_equal(found["body/layer_1/b"], np.zeros(2))
    assert len(report.restored) == 3


def test_an_assignment_map_takes_a_partitioned_variable_and_the_list_of_its_parts(tmp_path):
    ckpt = write(tmp_path / "m", {"emb": numbers(6, 2)})
    with graph_and_session() as session:
        table = v1.get_variable(
            "table",
            shape=(6, 2),
            partitioner=v1.fixed_size_partitioner(3),
            initializer=v1.zeros_initializer(),
        )
        for value in (table, list(table)):
            report = cr.restore_session(session, ckpt, {"emb": value})
            assert [entry.name for entry in report.restored] == ["table"]
        np.testing.assert_array_equal(session.run(table.as_tensor()), numbers(6, 2))


@pytest.mark.parametrize("world", [tf_keras, keras], ids=["tf_keras", "keras3"])
def test_an_assignment_map_takes_variables_of_a_model(tmp_path, world):
    ckpt = write(tmp_path / "m", {"dense/w": numbers(4, 3), "dense/b": numbers(3)})
    model = world.Sequential([world.Input((4,)), world.layers.Dense(3, name="fc")], name="net")
    layer = model.layers[-1]
    report = cr.restore_objects(model, ckpt, {"dense/w": layer.kernel})
    np.testing.assert_array_equal(layer.kernel, numbers(4, 3))
    assert not np.any(np.asarray(layer.bias))
    assert len(report.restored) == 1


def test_an_assignment_map_of_a_scope_to_the_root_and_back(tmp_path, ckpt):
    made = eager_variables({"layer_1/w": (3, 2), "layer_1/b": (2,)})
    report = cr.restore_objects(made, ckpt, {"enc/": "/"})
    assert {entry.name for entry in report.restored} == set(made)
    small = write(tmp_path / "small", {"layer_1/w": numbers(3, 2)})
    made = eager_variables(SHAPES)
    report = cr.restore_objects(made, small, {"/": "body/"})
    assert [entry.name for entry in report.restored] == ["body/layer_1/w"]


# -- reports --------------------------------------------------------------------------------------


def test_a_report_s_json_says_what_the_report_says(tmp_path, ckpt):
    rules = cr.Rules(rename=[(r"enc/(.*)", r"body/\1")])
    for report in restored_everywhere(ckpt, rules, SHAPES, tmp_path, skip_mismatched=True):
        data = json.loads(report.to_json())
        assert data["target"] in ("session", "objects", "file")
        assert data["checkpoint"] == ckpt
        assert data["summary"]["restored"] == len(report.restored) == 4
        assert data["summary"]["restored_bytes"] == report.nbytes == (6 + 2) * 2 * 4
        assert data["summary"]["mismatched"] == 1
        for group in ("restored", "initialized", "mismatched", "kept", "unused"):
            assert [row["name"] for row in data[group]] == [
                entry.name for entry in getattr(report, group)
            ]
        assert {row["name"]: row["digest"] for row in data["restored"]} == digests_of(report)
        assert all(row["rule"] == "rename 1" for row in data["restored"])
        assert cr.Rules.from_dict(data["rules"]) == rules


def test_a_report_s_text_names_every_variable_when_asked_for_in_full(tmp_path, ckpt):
    for report in restored_everywhere(ckpt, RULES, SHAPES, tmp_path):
        text = report.to_text(full=True)
        for name in [*SHAPES, *(entry.name for entry in report.unused)]:
            assert name in text
        assert report.summary() in str(report)


def test_restoring_leaves_the_caller_s_rules_and_mappings_alone(ckpt):
    rules = {"enc/layer_1/": "body/layer_1/"}
    made = eager_variables(SHAPES)
    before = dict(made)
    cr.restore_objects(made, ckpt, rules)
    assert rules == {"enc/layer_1/": "body/layer_1/"}
    assert made == before


def test_what_is_demanded_is_demanded_of_a_plan_too(ckpt):
    shapes = {**SHAPES, "another/head": (3,)}
    made = eager_variables(shapes)
    plan = cr.plan(ckpt, made, RULES)
    with pytest.raises(cr.PlanError, match="variable 'another/head': strict"):
        cr.restore_objects(made, ckpt, plan, strict=True)
    with pytest.raises(cr.UsageError, match="skip_mismatched"):
        cr.restore_objects(made, ckpt, plan, skip_mismatched=True)
    empty = cr.plan(ckpt, made, cr.Rules(include="no.*", allow_unmatched=True), allow_empty=True)
    with pytest.raises(cr.PlanError, match="restores nothing"):
        cr.restore_objects(made, ckpt, empty)
    assert cr.restore_objects(made, ckpt, empty, allow_empty=True).restored == ()
    assert not any(np.any(variable.numpy()) for variable in made.values())


def test_a_string_that_is_no_rules_file_is_told(ckpt):
    with pytest.raises(cr.RuleError, match="a string is the path of a rules file"):
        cr.restore_objects(eager_variables(SHAPES), ckpt, "enc/.*")
