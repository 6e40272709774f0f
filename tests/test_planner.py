"""Planning: every tensor and every variable once, and all faults told together."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import F32, spec, specs

from compat_restore.errors import PlanError
from compat_restore.names import OBJECT_GRAPH_KEY
from compat_restore.planner import plan_restore
from compat_restore.restore_plan import Mismatch, Missing, Reason, RestoreItem, RestorePlan, Unused
from compat_restore.rules import Rules
from compat_restore.tensors import DType, TensorSpec
from compat_restore.transforms import Cast, Reshape, Transpose


def item(source: str, target: str | None = None, rule: str | None = None, **changes) -> RestoreItem:
    """Return the item of a float32[2,3] tensor."""
    made = RestoreItem(
        source=source,
        target=source if target is None else target,
        dtype=F32,
        shape=(2, 3),
        target_dtype=F32,
        target_shape=(2, 3),
        rule=rule,
    )
    return made._replace(**changes)


def unused(name: str, reason: Reason, detail: str = "") -> Unused:
    return Unused(name=name, dtype=F32, shape=(2, 3), reason=reason, detail=detail)


def missing(name: str, reason: Reason = Reason.NOT_IN_CHECKPOINT, detail: str = "") -> Missing:
    return Missing(name=name, dtype=F32, shape=(2, 3), reason=reason, detail=detail)


def faults_of(*args, **kwargs) -> tuple[str, ...]:
    """Return the faults for which no plan can be made."""
    with pytest.raises(PlanError) as caught:
        plan_restore(*args, **kwargs)
    return caught.value.faults


def the_fault_of(*args, **kwargs) -> str:
    faults = faults_of(*args, **kwargs)
    assert len(faults) == 1, faults
    return faults[0]


# What goes where


def test_tensors_go_into_the_variables_of_their_names():
    plan = plan_restore(specs("a", "b"), specs("b", "c"))
    assert plan.items == (item("b"),)
    assert plan.unused == (unused("a", Reason.NO_VARIABLE),)
    assert plan.missing == (missing("c"),)
    assert plan.mismatched == ()


def test_without_a_target_everything_goes_out_under_its_new_name():
    rules = Rules(rename=[("a", "x"), ("b", None)])
    plan = plan_restore(specs("a", "b", "c"), None, rules)
    assert plan.items == (item("c"), item("a", "x", "rename 1"))
    assert plan.unused == (unused("b", Reason.DROPPED, "rename 2"),)
    assert plan.missing == ()


def test_every_reason_to_leave_a_tensor_out_is_told():
    sources = specs("in/a", "in/b", "in/c", "out", "in/a/Adam", OBJECT_GRAPH_KEY)
    rules = Rules(
        include="in/.*",
        exclude="in/b",
        rename=[("in/c", "nowhere"), ("in/a", "x")],
        drop_slots=True,
    )
    plan = plan_restore(sources, specs("x"), rules.replace(allow_unmatched=True))
    assert plan.items == (item("in/a", "x", "rename 2"),)
    assert {skip.name: (skip.reason, skip.detail) for skip in plan.unused} == {
        OBJECT_GRAPH_KEY: (Reason.CONTAINER, ""),
        "in/a/Adam": (Reason.SLOT, ""),
        "in/b": (Reason.EXCLUDED, "exclude 'in/b'"),
        "in/c": (Reason.NO_VARIABLE, "'nowhere'"),
        "out": (Reason.NOT_INCLUDED, ""),
    }


def test_a_variable_whose_tensor_was_left_out_says_so():
    rules = Rules(exclude=["a", "old"], rename=[("old", "new")])
    plan = plan_restore(specs("a", "b", "old"), specs("a", "b", "new", "z"), rules)
    assert plan.missing == (
        missing("a", Reason.NOT_CHOSEN, "excluded: 'a'"),
        missing("new", Reason.NOT_CHOSEN, "excluded: 'old'"),
        missing("z"),
    )


def test_one_tensor_goes_into_several_variables_where_a_list_says_so():
    rules = Rules(rename=[("emb", ["enc/emb", "dec/emb"])])
    plan = plan_restore(specs("emb"), specs("enc/emb", "dec/emb"), rules)
    assert plan.items == (item("emb", "dec/emb", "rename 1"), item("emb", "enc/emb", "rename 1"))
    assert plan.unused == plan.missing == ()


def test_a_variable_that_a_list_names_twice_is_restored_once():
    plan = plan_restore(specs("a"), specs("x"), Rules(rename=[("a", ["x", "x"])]))
    assert plan.items == (item("a", "x", "rename 1"),)


def test_a_transform_makes_a_tensor_fit():
    rules = Rules(transform=[("w", [Transpose((1, 0)), Cast("float16")])])
    plan = plan_restore(specs("w"), specs(spec("w", 3, 2, dtype=DType.float16)), rules)
    assert plan.items == (
        item(
            "w",
            target_dtype=DType.float16,
            target_shape=(3, 2),
            transforms=(Transpose((1, 0)), Cast("float16")),
        ),
    )
    assert plan.items[0].nbytes == 12
    assert plan.items[0].remark() == "float32[2,3], transpose [1, 0], cast float16"


@pytest.mark.parametrize("shape", [None, (None, 3), (None, None), (2, 3)])
def test_open_dimensions_take_any_extent(shape: tuple[int | None, ...] | None):
    target = {"w": TensorSpec("w", F32, shape)}
    assert plan_restore(specs("w"), target).items == (item("w"),)


@pytest.mark.parametrize("shape", [(None, 4), (None,), (), (2, 3, None)])
def test_open_dimensions_do_not_excuse_the_others(shape: tuple[int | None, ...]):
    target = {"w": TensorSpec("w", F32, shape)}
    assert "checkpoint has float32[2,3]" in the_fault_of(specs("w"), target)


def test_items_are_in_natural_order():
    plan = plan_restore(specs("l_10", "l_9", "l_1"), None)
    assert [entry.name for entry in plan.items] == ["l_1", "l_9", "l_10"]


# Aliases and pairs


def test_an_alias_reaches_a_variable_if_nothing_else_has_it():
    targets = specs(spec("model/fc/kernel", 2, 3, aliases=("fc/kernel", "taken")), "taken")
    plan = plan_restore(specs("fc/kernel", "taken"), targets)
    assert plan.items == (item("fc/kernel", "model/fc/kernel"), item("taken"))


def test_an_alias_of_two_variables_is_told_as_ambiguous():
    targets = specs(spec("a/w", 2, 3, aliases=("w",)), spec("b/w", 2, 3, aliases=("w",)))
    fault = the_fault_of(specs("w"), targets)
    assert "tensor 'w': 2 variables go by the name 'w', 'a/w' and 'b/w'" in fault
    plan = plan_restore(specs("w"), targets, Rules(rename=[("w", ["a/w", "b/w"])]))
    assert [entry.target for entry in plan.items] == ["a/w", "b/w"]


def test_an_ambiguous_alias_of_a_tensor_that_is_left_out_is_no_fault():
    targets = specs(spec("a/w", 2, 3, aliases=("w",)), spec("b/w", 2, 3, aliases=("w",)), "v")
    plan = plan_restore(specs("w", "v"), targets, Rules(exclude="w"))
    assert [entry.target for entry in plan.items] == ["v"]


def test_a_variable_called_by_its_own_name_is_not_reached_by_an_alias_too():
    targets = specs(spec("net/w", 2, 3, aliases=("w",)))
    plan = plan_restore(specs("net/w", "w"), targets)
    assert [(entry.source, entry.target) for entry in plan.items] == [("net/w", "net/w")]
    assert plan.unused == (unused("w", Reason.NO_VARIABLE),)


def test_what_a_rename_sends_to_a_variable_s_other_name_collides_with_its_own():
    targets = specs(spec("net/w", 2, 3, aliases=("w",)))
    rules = Rules(rename=[("old/(.*)", r"\1")])
    assert "2 tensors would go into it" in the_fault_of(specs("net/w", "old/w"), targets, rules)


def test_two_tensors_that_reach_a_variable_by_aliases_collide():
    targets = specs(spec("net/w", 2, 3, aliases=("w", "v")))
    assert "2 tensors would go into it" in the_fault_of(specs("v", "w"), targets)


def test_a_tensor_goes_by_the_name_without_that_of_its_model_if_its_own_leads_nowhere():
    sources = {
        "old_1/fc/w": spec("old_1/fc/w", 2, 3, aliases=("fc/w",)),
        "old_1/fc/b": spec("old_1/fc/b", 2, 3, aliases=("fc/b",)),
    }
    plan = plan_restore(sources, specs(spec("new/fc/w", 2, 3, aliases=("fc/w",)), "old_1/fc/b"))
    assert {entry.source: entry.target for entry in plan.items} == {
        "old_1/fc/w": "new/fc/w",
        "old_1/fc/b": "old_1/fc/b",
    }


def test_a_plan_that_restores_nothing_but_counters_is_a_fault_where_weights_were_wanted():
    counters = spec("global_step")
    sources, targets = specs(counters, "a/w"), specs(counters, "b/w")
    fault = the_fault_of(sources, targets)
    assert "nothing but 'global_step' would be restored" in fault
    assert "('a/w')" in fault
    assert len(plan_restore(sources, targets, allow_empty=True).items) == 1
    assert len(plan_restore(sources, targets, Rules(include="global_step")).items) == 1
    assert len(plan_restore(sources, specs(counters)).items) == 1


def test_an_empty_new_name_is_a_fault():
    fault = faults_of(specs("a/w", "b"), None, Rules(rename=[("(a?).*", r"\1")]))[0]
    assert "gives it an empty name" in fault


def test_a_transform_that_others_before_it_decide_is_a_fault():
    rules = Rules(transform=[(".*", Cast("float16")), ("a", Transpose((1, 0)))])
    assert "transform 'a'" in the_fault_of(specs("a"), None, rules)


def test_thousands_of_literal_rules_are_looked_up():
    sources = specs(*(f"scope/v{number}" for number in range(4000)))
    rules = Rules.from_assignment_map({name: f"new/{name}" for name in sources})
    begun = time.process_time()
    assert len(plan_restore(sources, None, rules).items) == 4000
    assert time.process_time() - begun < 3


def test_pairs_go_before_names_and_renames_before_pairs():
    plan = plan_restore(
        specs("root/a", "root/b", "c"),
        specs("x", "y", "c"),
        Rules(rename=[("root/b", "y")]),
        pairs={"root/a": "x", "root/b": "x"},
    )
    assert plan.items == (item("root/a", "x", "same place"), item("root/b", "y", "rename 1"))
    assert plan.unused == (unused("c", Reason.NO_VARIABLE),)
    assert plan.missing == (missing("c"),)


def test_a_variable_whose_paired_tensor_was_left_out_says_so():
    plan = plan_restore(
        specs("root/a", "root/b"),
        specs("x", "y"),
        Rules(exclude="root/a"),
        pairs={"root/a": "x", "root/b": "y"},
    )
    assert plan.missing == (missing("x", Reason.NOT_CHOSEN, "excluded: 'root/a'"),)


# Slots and bookkeeping


def adam() -> dict[str, TensorSpec]:
    """Return a variable with its slots, an average, and counters."""
    return specs(
        "w",
        "w/Adam",
        "w/Adam_1",
        "w/ExponentialMovingAverage",
        spec("beta1_power"),
        spec("global_step", dtype=DType.int64),
    )


def test_slots_are_kept_unless_dropping_them_is_asked_for():
    assert len(plan_restore(adam(), None).items) == 6


def test_dropped_slots_and_bookkeeping_say_what_they_are():
    plan = plan_restore(adam(), None, Rules(drop_slots=True))
    assert plan.items == (item("w"),)
    assert {skip.name: (skip.reason, skip.detail) for skip in plan.unused} == {
        "w/Adam": (Reason.SLOT, ""),
        "w/Adam_1": (Reason.SLOT, ""),
        "w/ExponentialMovingAverage": (Reason.SLOT, ""),
        "beta1_power": (Reason.SLOT, "bookkeeping"),
        "global_step": (Reason.SLOT, "bookkeeping"),
    }


def test_a_weight_that_is_called_like_a_slot_is_kept():
    plan = plan_restore(specs("lstm/Adam", "w"), None, Rules(drop_slots=True))
    assert [entry.name for entry in plan.items] == ["lstm/Adam", "w"]


def test_given_roles_are_believed():
    plan = plan_restore(adam(), None, Rules(drop_slots=True), roles={})
    assert len(plan.items) == 6


# Faults


@pytest.mark.parametrize("kind", ["include", "exclude", "rename", "transform"])
def test_a_rule_that_matches_nothing_is_a_fault(kind: str):
    value = {"rename": [("encodr/w", "x")], "transform": [("encodr/w", Cast("int8"))]}
    rules = Rules(**{kind: value.get(kind, ["encodr/w"])})
    faults = faults_of(specs("encoder/w"), None, rules)
    assert faults[0] == (
        f"{kind} 'encodr/w': it matches no name in the checkpoint; did you mean 'encoder/w'?"
    )
    plan_restore(specs("encoder/w"), None, rules.replace(allow_unmatched=True), allow_empty=True)


@pytest.mark.parametrize(
    ("pattern", "longer"),
    [
        ("head", "head/.*"),
        ("he", "he.*"),
        ("head/*", "head/.*"),
        ("head|x", "(?:head|x)/.*"),
        ("HEAD/.*", "(?i:HEAD/.*)"),
    ],
)
def test_a_pattern_that_matches_a_beginning_is_told_how_to_match_the_whole(
    pattern: str, longer: str
):
    sources = specs("head/w", "b")
    fault = the_fault_of(sources, None, Rules(exclude=pattern))
    assert f"must match a whole name, and '{longer}' would match 'head/w'" in fault
    plan = plan_restore(sources, None, Rules(exclude=longer))
    assert [entry.name for entry in plan.items] == ["b"]


def test_a_pattern_with_an_output_number_is_told_that_names_have_none():
    assert 'names in a checkpoint carry no ":0"' in the_fault_of(
        specs("w"), None, Rules(exclude="w:0")
    )


def test_a_rename_that_others_before_it_decide_is_a_fault():
    rules = Rules(rename=[("a/.*", "x"), ("a/w", "y")])
    fault = the_fault_of(specs("a/w"), specs("x", "y"), rules)
    assert fault.startswith("rename 'a/w = y': every name that it matches is decided")
    assert "put it first" in fault


def test_a_drop_that_others_before_it_decide_is_a_fault():
    rules = Rules(rename=[("a", "x"), ("a", None)])
    assert "rename 'a dropped'" in the_fault_of(specs("a"), specs("x"), rules)


def test_a_rename_of_tensors_that_are_left_out_is_no_fault():
    plan = plan_restore(specs("a", "b"), None, Rules(exclude="a", rename=[("a", "x")]))
    assert plan.items == (item("b"),)


def test_a_rename_whose_new_names_are_no_variables_is_a_fault():
    rules = Rules(rename=[(r"net/(.*)", r"bakbone/\1")])
    fault = the_fault_of(
        specs("net/a", "net/b", "c"), specs("backbone/a", "backbone/b", "c"), rules
    )
    assert "2 tensors matched, but the target has no variable of the new name" in fault
    assert "such as 'bakbone/a'; did you mean 'backbone/a'" in fault


def test_a_rename_that_fits_some_variables_is_no_fault():
    rules = Rules(rename=[(r"net/(.*)", r"my/\1")])
    plan = plan_restore(specs("net/a", "net/b"), specs("my/a"), rules)
    assert plan.items == (item("net/a", "my/a", "rename 1"),)
    assert plan.unused == (unused("net/b", Reason.NO_VARIABLE, "'my/b'"),)


def test_a_new_name_in_a_list_that_is_no_variable_is_a_fault():
    rules = Rules(rename=[("emb/(.*)", [r"enc/\1", r"dce/\1"])])
    fault = the_fault_of(specs("emb/a", "emb/b"), specs("enc/a", "enc/b", "dec/a", "dec/b"), rules)
    assert "2 tensors matched" in fault
    assert "such as 'dce/a'; did you mean 'dec/a'" in fault


def test_two_tensors_for_one_variable_are_a_fault():
    rules = Rules(rename=[("a", "x"), ("b", "x")])
    fault = the_fault_of(specs("a", "b"), specs("x"), rules)
    assert fault.startswith("variable 'x': 2 tensors would go into it, 'a' and 'b'; exclude")
    assert fault == the_fault_of(specs("a", "b"), None, rules)


def test_a_tensor_that_does_not_fit_collides_all_the_same():
    rules = Rules(rename=[("a", "x"), ("b", "x")])
    sources = specs("a", spec("b", 7))
    assert "2 tensors would go into it" in the_fault_of(
        sources, specs("x"), rules, skip_mismatched=True
    )


@pytest.mark.parametrize(
    ("source", "target", "cures"),
    [
        (spec("fc/w", 4, 10), spec("fc/w", 4, 3), ["a new head?", "skip_mismatched=True"]),
        (spec("fc/w", 4, 10), spec("fc/w", 10, 4), ["transposed?", "Transpose", "skip_mismatched"]),
        (spec("fc/w", 4, 10), spec("fc/w", 40), ["Reshape", "skip_mismatched=True"]),
        (spec("fc/w", 4), spec("fc/w", 4, dtype=DType.float16), ["Cast('float16')"]),
        (spec("fc/w"), spec("fc/w", 1), ["Reshape"]),
    ],
)
def test_a_mismatch_names_both_sides_and_what_would_settle_it(
    source: TensorSpec, target: TensorSpec, cures: list[str]
):
    fault = the_fault_of(specs(source), specs(target))
    assert fault.startswith("tensor 'fc/w': checkpoint has ")
    assert f"checkpoint has {source.summary}, variable has {target.summary}" in fault
    assert "exclude='fc/w'" in fault
    for cure in cures:
        assert cure in fault


def test_a_mismatch_after_a_rename_names_the_variable_too():
    rules = Rules(rename=[("a", "x")])
    fault = the_fault_of(specs("a"), specs(spec("x", 5)), rules)
    assert "checkpoint has float32[2,3], variable 'x' has float32[5]" in fault


@pytest.mark.parametrize("name", ["a.b/w+1", "it's", r"back\slash", "[x]"])
def test_the_cure_of_a_mismatch_works_as_it_stands(name: str):
    sources, targets = specs(name, "ok"), specs(spec(name, 5), "ok")
    fault = the_fault_of(sources, targets)
    found = re.search(r"exclude=('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", fault)
    assert found
    pattern = eval(found[1])
    plan = plan_restore(sources, targets, Rules(exclude=pattern))
    assert plan.items == (item("ok"),)


def test_the_casting_cure_of_a_mismatch_works_as_it_stands():
    targets = specs(spec("w", 2, 3, dtype=DType.float16))
    fault = the_fault_of(specs("w"), targets)
    transform = eval(re.search(r"transform=(\[.*?\])", fault)[1])  # type: ignore[index]
    assert plan_restore(specs("w"), targets, Rules(transform=transform)).items[0].transforms


def test_a_transform_that_does_not_fit_is_a_fault():
    fault = the_fault_of(specs("w"), None, Rules(transform=[("w", Reshape((7,)))]))
    assert fault == "tensor 'w': reshape [7] has 7 elements, [2, 3] has 6"


def test_mismatches_are_left_out_where_that_is_asked_for():
    targets = specs("a", spec("b", 5), spec("c", 2, 3, dtype=DType.int8), "d")
    plan = plan_restore(specs("a", "b", "c"), targets, skip_mismatched=True)
    assert plan.items == (item("a"),)
    assert plan.unused == ()
    assert plan.missing == (missing("d"),)
    shared = {"dtype": F32, "shape": (2, 3)}
    assert plan.mismatched == (
        Mismatch(
            source="b", name="b", target_dtype=F32, target_shape=(5,), reason=Reason.SHAPE, **shared
        ),
        Mismatch(
            source="c",
            name="c",
            target_dtype=DType.int8,
            target_shape=(2, 3),
            reason=Reason.DTYPE,
            **shared,
        ),
    )
    assert plan.mismatched[0].remark() == "shape mismatch: the checkpoint has float32[2,3]"


def test_strict_wants_every_variable_set_and_every_wanted_tensor_used():
    faults = faults_of(specs("a", "old"), specs("a", "new"), strict=True)
    assert len(faults) == 2
    assert faults[0].startswith("tensor 'old': strict, and the target has no variable 'old'")
    assert faults[1].startswith("variable 'new': strict, and nothing is restored into it")


def test_strict_says_which_rule_left_a_variable_out():
    [fault] = faults_of(specs("a", "b"), specs("a", "b"), Rules(exclude="b"), strict=True)
    assert fault.endswith("nothing is restored into it (excluded: 'b')")


def test_strict_does_not_mind_what_the_rules_leave_out():
    plan = plan_restore(specs("a", "b"), specs("a"), Rules(exclude="b"), strict=True)
    assert plan.items == (item("a"),)


def test_faults_of_every_kind_are_told_together():
    sources = specs("dup1", "dup2", "shape", "dtype", "bad", "lost", "ok", "amb", "low")
    targets = specs(
        "dup",
        spec("shape", 9),
        spec("dtype", 2, 3, dtype=DType.int8),
        "bad",
        "ok",
        spec("m/amb", 2, 3, aliases=("amb",)),
        spec("n/amb", 2, 3, aliases=("amb",)),
    )
    rules = Rules(
        exclude=["typo"],
        rename=[("dup.", "dup"), ("dup1", "ok"), ("lost", "nowhere")],
        transform=[("bad", Transpose((0,)))],
    )
    faults = faults_of(sources, targets, rules, strict=True)
    for beginning in (
        "variable 'dup': 2 tensors",
        "tensor 'shape': checkpoint has",
        "tensor 'dtype': checkpoint has",
        "tensor 'bad': transpose [0]",
        "tensor 'amb': 2 variables",
        "tensor 'low': strict",
        "exclude 'typo': it matches no name",
        "rename 'dup1 = ok': every name",
        "rename 'lost = nowhere': 1 tensor matched",
        "variable 'm/amb': strict",
    ):
        assert sum(fault.startswith(beginning) for fault in faults) == 1, beginning
    with pytest.raises(PlanError, match=rf"no plan can be made, {len(faults)} faults:\n  - "):
        plan_restore(sources, targets, rules, strict=True)


# Nothing


def test_a_plan_that_restores_nothing_names_both_sides():
    fault = the_fault_of(specs("net/a", "net/b"), specs("kernel", "bias"))
    for name in ("'net/a'", "'net/b'", "'kernel'", "'bias'", "allow_empty=True"):
        assert name in fault


def test_a_long_list_of_names_is_cut_short():
    fault = the_fault_of(specs(*(f"a{n}" for n in range(9))), specs("x"))
    assert "'a0', 'a1', 'a2', ... 9 in all" in fault


@pytest.mark.parametrize(
    ("sources", "rules", "options", "message"),
    [
        (specs(), Rules(), {}, "the checkpoint is empty"),
        (specs("w"), Rules(exclude=".*"), {}, "the rules leave out every tensor"),
        (specs("w"), Rules(rename=[("w", None)]), {}, "the rules leave out every tensor"),
        (specs(spec("w", 9)), Rules(), {"skip_mismatched": True}, "all 1 pairs .* differ"),
    ],
)
def test_a_plan_that_restores_nothing_says_why(sources, rules, options, message):
    assert re.search(
        f"nothing would be restored: .*{message}",
        the_fault_of(sources, specs("w"), rules, **options),
    )
    plan = plan_restore(sources, specs("w"), rules, allow_empty=True, **options)
    assert plan.items == ()
    assert len(plan.missing) + len(plan.mismatched) == 1


# Total accounting

leaves = st.sampled_from(["w", "b", "w/Adam", "l_1", "l_01", "l_10", "x.y", "global_step"])
some_names = st.builds(lambda scope, leaf: scope + leaf, st.sampled_from(["", "a/", "b/"]), leaves)
some_specs = st.builds(
    lambda shape, dtype: (shape, dtype),
    st.sampled_from([(2, 3), (2, 3), (3, 2), ()]),
    st.sampled_from([F32, F32, F32, DType.int64]),
)
checkpoints = st.dictionaries(some_names, some_specs, max_size=10).map(
    lambda found: {name: TensorSpec(name, dtype, shape) for name, (shape, dtype) in found.items()}
)
targets_or_none = st.one_of(
    st.none(),
    st.dictionaries(
        some_names, st.tuples(some_specs, st.lists(some_names, max_size=2)), max_size=10
    ).map(
        lambda found: {
            name: TensorSpec(name, dtype, shape, aliases=tuple(aliases))
            for name, ((shape, dtype), aliases) in found.items()
        }
    ),
)
some_patterns = st.one_of(some_names.map(re.escape), st.sampled_from(["a/.*", ".*", ".*/w", ".*1"]))
some_rules = st.builds(
    Rules,
    include=st.lists(some_patterns, max_size=2),
    exclude=st.lists(some_patterns, max_size=2),
    rename=st.lists(
        st.one_of(
            st.tuples(some_patterns, st.one_of(st.none(), some_names)),
            st.tuples(some_patterns, st.lists(some_names, min_size=1, max_size=3)),
            st.sampled_from(
                [(r"a/(.*)", r"b/\1"), (r"b/(.*)", r"\1"), (r"(\w)", [r"a/\1", r"\1"])]
            ),
        ),
        max_size=3,
    ),
    transform=st.lists(
        st.tuples(some_patterns, st.sampled_from([Transpose((1, 0)), Reshape((-1,)), Cast(F32)])),
        max_size=1,
    ),
    drop_slots=st.booleans(),
    allow_unmatched=st.just(value=True),
)
flags = st.fixed_dictionaries(
    {"skip_mismatched": st.booleans(), "allow_empty": st.booleans(), "strict": st.just(value=False)}
)


@settings(deadline=None, max_examples=400)
@given(sources=checkpoints, targets=targets_or_none, rules=some_rules, options=flags)
def test_every_tensor_and_every_variable_stands_in_the_plan_once(sources, targets, rules, options):
    try:
        plan = plan_restore(sources, targets, rules, **options)
    except PlanError:
        return
    taken = [entry.source for entry in plan.items] + [pair.source for pair in plan.mismatched]
    idle = [skip.name for skip in plan.unused]
    assert sorted({*taken, *idle}) == sorted(sources)
    assert len(idle) == len(set(idle))
    assert not set(taken) & set(idle)
    for source in taken:  # more than once only where a list says so
        names, _ = rules.targets_of(source)
        assert taken.count(source) <= len(names)
    set_ones = [entry.target for entry in (*plan.items,)] + [pair.name for pair in plan.mismatched]
    assert len(set_ones) == len(set(set_ones))
    if targets is not None:
        assert sorted([*set_ones, *(skip.name for skip in plan.missing)]) == sorted(targets)
        for entry in plan.items:
            have = targets[entry.target]
            assert (entry.target_dtype, entry.target_shape) == (have.dtype, have.shape)
    for entry in plan.items:
        have = sources[entry.source]
        assert (entry.dtype, entry.shape) == (have.dtype, have.shape)
    assert plan.items or options["allow_empty"]
    plan.check_fits(sources, targets)
    assert RestorePlan.from_json(plan.to_json()) == plan
    assert str(plan)


@settings(deadline=None)
@given(
    sources=checkpoints,
    targets=targets_or_none,
    rules=some_rules,
    strict=st.booleans(),
    data=st.data(),
)
def test_the_plan_does_not_depend_on_the_order_of_tensors_and_variables(
    sources, targets, rules, strict, data
):
    def outcome(sources, targets) -> object:
        try:
            return plan_restore(sources, targets, rules, strict=strict)
        except PlanError as error:
            return error.faults

    shuffled = dict(data.draw(st.permutations(list(sources.items()))))
    turned = targets and dict(data.draw(st.permutations(list(targets.items()))))
    assert outcome(sources, targets) == outcome(shuffled, turned)


def test_planning_changes_nothing_that_it_is_given():
    sources, targets = specs("b", "a"), specs("a", "c")
    before = list(sources.items()), list(targets.items())
    plan_restore(sources, targets)
    assert (list(sources.items()), list(targets.items())) == before


# Purity


def test_planning_imports_neither_numpy_nor_tensorflow():
    code = (
        "import sys; from compat_restore.planner import plan_restore; "
        "from compat_restore import Rules, TensorSpec, DType, Cast; "
        "s = {'w': TensorSpec('w', DType.float32, (2,))}; "
        "plan_restore(s, s, Rules()).to_json(); "
        "print([m for m in ('numpy', 'tensorflow', 'keras') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
