"""Rules: patterns match whole names, the first rename decides, and mistakes are told together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore.errors import CompatRestoreError, FaultsError, RuleError, UsageError
from compat_restore.planner import plan_restore
from compat_restore.rules import InvalidRulesError, Rename, Rules, TransformRule, as_rules, compiled
from compat_restore.tensors import DType, TensorSpec
from compat_restore.transforms import Cast, Reshape, Transpose

if TYPE_CHECKING:
    from pathlib import Path


def specs(*names: str) -> dict[str, TensorSpec]:
    """Return specs of one shape under these names."""
    return {name: TensorSpec(name, DType.float32, (2, 3)) for name in names}


def restored(rules: Rules, *names: str) -> dict[str, list[str]]:
    """Return the new names of each tensor that the rules take, by its name in the checkpoint."""
    plan = plan_restore(specs(*names), None, rules, allow_empty=True)
    found: dict[str, list[str]] = {}
    for item in plan.items:
        found.setdefault(item.source, []).append(item.target)
    return found


# Patterns


def test_a_pattern_matches_whole_names_alone():
    names = ("head", "head_norm", "my/head", "layer_1/w", "layer_10/w")
    assert set(restored(Rules(exclude="head"), *names)) == set(names) - {"head"}
    assert set(restored(Rules(include="layer_1/.*"), *names)) == {"layer_1/w"}
    assert set(restored(Rules(include="layer_1.*"), *names)) == {"layer_1/w", "layer_10/w"}


def test_a_whole_name_pattern_with_alternatives_is_anchored_on_both_sides():
    assert set(restored(Rules(include="a|ab"), "a", "ab", "abc", "ba")) == {"a", "ab"}


def test_a_dollar_does_not_let_a_newline_pass():
    assert restored(Rules(include="a", allow_unmatched=True), "a\n") == {}


def test_exclude_wins_over_include():
    rules = Rules(include=["enc/.*"], exclude=["enc/b"])
    assert set(restored(rules, "enc/a", "enc/b", "dec/a")) == {"enc/a"}


def test_a_single_string_stands_for_a_list_of_one():
    assert Rules(include="a/.*", exclude="b") == Rules(include=["a/.*"], exclude=("b",))


def test_patterns_may_come_from_a_generator():
    assert Rules(include=(f"l{i}/.*" for i in range(2))).include == ("l0/.*", "l1/.*")


def test_compiled_patterns_are_kept():
    assert compiled("some/(.*)/pattern") is compiled("some/(.*)/pattern")


@pytest.mark.parametrize("keyword", ["include", "exclude"])
def test_none_is_no_list_of_patterns(keyword: str):
    with pytest.raises(RuleError, match=f"{keyword}: a pattern or a list of patterns is expected"):
        Rules(**{keyword: None})


@pytest.mark.parametrize("pattern", [5, b"bytes", re.compile("compiled"), None, ["list"]])
def test_a_pattern_that_is_no_text_is_refused(pattern: object):
    with pytest.raises(RuleError, match="is no text"):
        Rules(include=[pattern])  # type: ignore[list-item]


# Renames


def test_the_first_rename_that_matches_decides():
    rules = Rules(rename=[("a/w", "x"), ("a/.*", "y"), ("a/w", "z")])
    assert rules.targets_of("a/w") == (("x",), 0)
    assert rules.targets_of("a/b") == (("y",), 1)
    assert rules.targets_of("b/w") == (("b/w",), None)


def test_a_rename_matches_whole_names_alone():
    assert Rename("layer_1", "x").names("layer_10") is None
    assert Rename("layer_1", "x").names("my_layer_1") is None


def test_none_as_new_name_drops():
    rules = Rules(rename=[("a/.*", None), (".*", "kept")])
    assert rules.targets_of("a/w") == ((), 0)
    assert restored(rules, "a/w", "b") == {"b": ["kept"]}


def test_back_references_and_named_groups_are_filled_in():
    rules = Rules(
        rename=[
            (r"net/conv(\d+)/(w|b)", r"conv_\1/\2"),
            (r"(?P<scope>\w+)/dense/(?P<leaf>.*)", r"\g<scope>_dense/\g<leaf>"),
        ]
    )
    assert rules.targets_of("net/conv7/w") == (("conv_7/w",), 0)
    assert rules.targets_of("top/dense/kernel") == (("top_dense/kernel",), 1)


def test_a_group_that_took_no_part_is_empty():
    assert Rename(r"a(/sub)?/w", r"b\1/w").names("a/w") == ("b/w",)


def test_a_digit_after_a_group_is_written_with_g():
    assert Rename(r"l(\d)", r"l\g<1>0").names("l4") == ("l40",)


def test_flags_at_the_start_of_a_pattern_are_allowed():
    rules = Rules(rename=[(r"(?i)ENCODER/(.*)", r"enc/\1")])
    assert rules.targets_of("Encoder/w") == (("enc/w",), 0)


def test_a_verbose_pattern_may_end_in_a_comment():
    assert Rules(rename=[("(?x) a / (.*)  # the old scope", r"b/\1")]).targets_of("a/w")[0] == (
        "b/w",
    )


def test_a_list_of_new_names_restores_one_tensor_into_each():
    rules = Rules(rename=[("emb", ["encoder/emb", "decoder/emb"])])
    assert restored(rules, "emb") == {"emb": ["decoder/emb", "encoder/emb"]}


def test_renames_may_be_a_mapping():
    mapping = {"a": "b", "c": None, "d": ["e", "f"]}
    assert Rules(rename=mapping).rename == (
        Rename("a", "b"),
        Rename("c", None),
        Rename("d", ("e", "f")),
    )
    assert mapping == {"a": "b", "c": None, "d": ["e", "f"]}


def test_rename_objects_and_pairs_may_be_mixed():
    assert Rules(rename=[Rename("a", "b"), ("c", "d"), ["e", "f"]]).rename == (
        Rename("a", "b"),
        Rename("c", "d"),
        Rename("e", "f"),
    )


def test_a_pair_in_place_of_a_list_of_pairs_is_not_taken_letter_by_letter():
    # Each of these strings has two letters, and would unpack into a pair.
    with pytest.raises(RuleError, match=r"rename 'ab': a pair \(pattern, new name\) is expected"):
        Rules(rename=("ab", "cd"))


@pytest.mark.parametrize("entry", [("a",), ("a", "b", "c"), 7, "a=b"])
def test_a_rename_that_is_no_pair_is_refused(entry: object):
    with pytest.raises(RuleError, match="a pair"):
        Rules(rename=[entry])  # type: ignore[list-item]


@pytest.mark.parametrize("to", [5, str.upper, ["a", 5], [None]])
def test_a_new_name_that_is_no_name_is_refused(to: object):
    with pytest.raises(RuleError, match="None, which drops"):
        Rules(rename=[("a", to)])  # type: ignore[list-item]


def test_a_rename_reads_like_its_command_line_option():
    assert str(Rename("a/(.*)", r"b/\1")) == r"a/(.*) = b/\1"
    assert str(Rename("a", ("b", "c"))) == "a = b, c"
    assert str(Rename("a", None)) == "a dropped"


def test_invalid_patterns_and_new_names_are_told_together():
    with pytest.raises(InvalidRulesError) as caught:
        Rules(
            include=["(", "fine"],
            exclude=["[a"],
            rename=[("a(b)", r"\2"), ("x", r"\g<nope>"), ("*", "y"), ("c", r"\q"), ("d", [])],
            transform=[("+", Transpose((0,)))],
        )
    assert isinstance(caught.value, RuleError)
    assert isinstance(caught.value, FaultsError)
    faults = caught.value.faults
    assert len(faults) == 8
    for subject in (
        r"'('",
        "'[a'",
        "'*'",
        "'+'",
        "rename 'a(b)'",
        "rename 'x'",
        "rename 'c'",
        "rename 'd'",
    ):
        assert sum(fault.startswith(subject) for fault in faults) == 1, subject
    assert "re.escape" in faults[0]
    assert all(fault in str(caught.value) for fault in faults)
    [bad_group] = [fault for fault in faults if "a(b)" in fault]
    assert "invalid group reference 2" in bad_group
    assert "the pattern has 1 groups" in bad_group


# Transforms


def test_the_first_transform_that_matches_decides():
    rules = Rules(transform=[("a/w", Transpose((1, 0))), ("a/.*", [Reshape((6,)), Cast("int32")])])
    assert rules.transforms_of("a/w") == (Transpose((1, 0)),)
    assert rules.transforms_of("a/b") == (Reshape((6,)), Cast(DType.int32))
    assert rules.transforms_of("a") == ()


def test_an_empty_list_of_transforms_is_an_exception_from_the_rules_after_it():
    rules = Rules(transform=[("a/w", []), ("a/.*", Transpose((1, 0)))])
    assert rules.transforms_of("a/w") == ()
    assert rules.transforms_of("a/v") == (Transpose((1, 0)),)


def test_transforms_may_be_a_mapping():
    assert Rules(transform={"w": Transpose((1, 0))}).transform == (
        TransformRule("w", (Transpose((1, 0)),)),
    )


@pytest.mark.parametrize("steps", ["transpose", None, [1, 0], [Transpose((0,)), "cast"]])
def test_a_transform_that_is_none_is_refused(steps: object):
    with pytest.raises(RuleError, match="is no transform"):
        Rules(transform=[("w", steps)])  # type: ignore[list-item]


@pytest.mark.parametrize("entry", [("a",), "ab", 3])
def test_a_transform_rule_that_is_no_pair_is_refused(entry: object):
    with pytest.raises(RuleError, match="a pair"):
        Rules(transform=[entry])  # type: ignore[list-item]


# Values


def test_rules_are_frozen_and_equal_by_value():
    rules = Rules(include="a", rename={"b": "c"})
    with pytest.raises(AttributeError):
        rules.include = ("z",)  # type: ignore[misc]
    assert rules == Rules(include=["a"], rename=[("b", "c")])
    assert hash(rules) == hash(Rules(include=["a"], rename=[("b", "c")]))


def test_replace_checks_what_it_changes():
    rules = Rules(include="a", drop_slots=True)
    assert rules.replace(include=["b"]) == Rules(include="b", drop_slots=True)
    assert rules.include == ("a",)
    with pytest.raises(RuleError):
        rules.replace(include=["("])


def test_rules_that_decide_everything_are_the_empty_ones():
    assert Rules().is_plain
    assert Rules(allow_unmatched=True).is_plain
    assert not Rules(drop_slots=True).is_plain
    assert not Rules(include=".*").is_plain


# Assignment maps


class FakeVariable:
    """A variable as TensorFlow 1 and tf_keras have it."""

    def __init__(self, name: str) -> None:
        self.name = name


class FakeKerasVariable:
    """A variable as Keras 3 has it: the name is the last component of the path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = path.rsplit("/", 1)[-1]


class FakeSliceInfo:
    """What TensorFlow keeps about a part of a partitioned variable."""

    def __init__(self, full_name: str) -> None:
        self.full_name = full_name


class FakePart(FakeVariable):
    """A part of a partitioned variable."""

    def __init__(self, full_name: str, number: int) -> None:
        super().__init__(f"{full_name}/part_{number}:0")
        self._save_slice_info = FakeSliceInfo(full_name)


def assigned(assignment_map: dict[str, object], *names: str) -> dict[str, list[str]]:
    return restored(Rules.from_assignment_map(assignment_map), *names)


def test_a_scope_is_mapped_to_a_scope():
    assert assigned({"old/": "new/"}, "old/w", "old/sub/b", "older/w", "w") == {
        "old/w": ["new/w"],
        "old/sub/b": ["new/sub/b"],
    }


def test_a_slash_stands_for_all_there_is():
    assert assigned({"/": "net/"}, "a/w", "b") == {"a/w": ["net/a/w"], "b": ["net/b"]}
    assert assigned({"net/": "/"}, "net/a/w", "b") == {"net/a/w": ["a/w"]}
    assert assigned({"/": "/"}, "a/w", "b") == {"a/w": ["a/w"], "b": ["b"]}


def test_a_name_is_mapped_to_a_name_or_a_variable():
    mapping = {
        "a": "x/a",
        "b": FakeVariable("y/b:0"),
        "c": FakeKerasVariable("dense/kernel"),
        "d": [FakeVariable("z/d:0")],
    }
    assert assigned(mapping, "a", "b", "c", "d", "e") == {
        "a": ["x/a"],
        "b": ["y/b"],
        "c": ["dense/kernel"],
        "d": ["z/d"],
    }


def test_the_parts_of_a_partitioned_variable_stand_for_the_whole():
    parts = [FakePart("emb/table", 0), FakePart("emb/table", 1)]
    assert assigned({"table": parts}, "table") == {"table": ["emb/table"]}
    assert assigned({"table": tuple(parts[:1])}, "table") == {"table": ["emb/table"]}


def test_the_longer_key_of_an_assignment_map_decides():
    for mapping in (
        {"a/": "x/", "a/b/": "y/", "a/b/c": "z"},
        {"a/b/c": "z", "a/b/": "y/", "a/": "x/"},
    ):
        assert assigned(mapping, "a/w", "a/b/w", "a/b/c") == {
            "a/w": ["x/w"],
            "a/b/w": ["y/w"],
            "a/b/c": ["z"],
        }


def test_what_an_assignment_map_does_not_name_is_left_out():
    plan = plan_restore(specs("a", "b"), None, Rules.from_assignment_map({"a": "a"}))
    assert [skip.name for skip in plan.unused] == ["b"]


def test_names_in_an_assignment_map_are_literal():
    assert assigned({"a.b+(c)": r"x\1"}, "a.b+(c)", "aXb+(c)") == {"a.b+(c)": [r"x\1"]}
    assert assigned({"s.c/": r"\g<0>/"}, "s.c/w", "sXc/w") == {"s.c/w": [r"\g<0>/w"]}


def test_a_key_that_the_checkpoint_does_not_have_is_told():
    with pytest.raises(CompatRestoreError, match="matches no name in the checkpoint"):
        assigned({"a": "a", "missing": "b"}, "a")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"old/": "new"}, "write 'new/'"),
        ({"old/": FakeVariable("w:0")}, "no scope"),
        ({"old": "new/"}, "write 'old/'"),
        ({"w": 3}, "is mapped to int"),
        ({"w": None}, "is mapped to NoneType"),
        ({"w": []}, "is mapped to list"),
        ({"w": [FakeVariable("a:0"), FakeVariable("b:0")]}, "is mapped to list"),
        ({7: "w"}, "the key 7 is no name"),
        ({FakeVariable("w:0"): "w"}, "keys are names in the checkpoint"),
    ],
)
def test_an_assignment_map_that_makes_no_sense_is_refused(mapping: dict, message: str):
    with pytest.raises(RuleError, match=message):
        Rules.from_assignment_map(mapping)


def test_an_assignment_map_is_not_changed():
    mapping = {"b/": "c/", "a": "x"}
    Rules.from_assignment_map(mapping)
    assert list(mapping.items()) == [("b/", "c/"), ("a", "x")]


# Files


# What can stand in a file at all: no lone surrogates.
texts = st.text(st.characters(codec="utf-8"), max_size=12)
patterns = st.one_of(
    texts.map(re.escape), st.sampled_from([r"a/(.*)", r".*'.*", r'"\w+"', "", "#=[x]", r"\\"])
)
literals = texts.filter(bool).map(lambda text: text.replace("\\", r"\\"))
replacements = st.one_of(st.none(), literals, st.lists(literals, min_size=1, max_size=3).map(tuple))
transforms = st.one_of(
    st.lists(st.integers(0, 3), max_size=3).map(lambda axes: Transpose(tuple(axes))),
    st.lists(st.integers(-1, 99), max_size=3).map(lambda shape: Reshape(tuple(shape))),
    st.sampled_from([DType.float16, DType.bfloat16, DType.int64]).map(Cast),
)
rule_sets = st.builds(
    Rules,
    include=st.lists(patterns, max_size=3),
    exclude=st.lists(patterns, max_size=3),
    rename=st.lists(st.tuples(patterns, replacements), max_size=3),
    transform=st.lists(
        st.tuples(patterns, st.lists(transforms, min_size=1, max_size=3)), max_size=2
    ),
    drop_slots=st.booleans(),
    allow_unmatched=st.booleans(),
)


def from_text(text: str, folder: Path) -> Rules:
    path = folder / "rules.toml"
    path.write_bytes(text.encode())
    return Rules.from_toml(path)


@settings(deadline=None)
@given(rules=rule_sets)
def test_rules_come_back_from_toml_as_they_were(
    rules: Rules, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.getbasetemp()
    assert from_text(rules.to_toml(), folder) == rules
    assert Rules.from_dict(rules.to_dict()) == rules


def test_a_rules_file_reads_as_a_person_would_write_it(tmp_path: Path):
    text = r"""
        include = 'encoder/.*'
        exclude = ['.*/Logits/.*', 'it''s']
        drop_slots = true

        [[rename]]
        from = 'encoder/(.*)'
        to = 'backbone/\1'

        [[rename]]
        from = 'emb'
        to = ['a/emb', 'b/emb']

        [[rename]]
        from = 'junk'
        drop = true

        [[transform]]
        match = '.*/kernel'
        transpose = [1, 0]

        [[transform]]
        match = 'flat'
        apply = [{ reshape = [2, -1] }, { cast = 'bfloat16' }]
    """.replace("it''s", "its")
    assert from_text(text, tmp_path) == Rules(
        include=["encoder/.*"],
        exclude=[".*/Logits/.*", "its"],
        rename=[
            ("encoder/(.*)", r"backbone/\1"),
            ("emb", ["a/emb", "b/emb"]),
            ("junk", None),
        ],
        transform=[
            (".*/kernel", Transpose((1, 0))),
            ("flat", [Reshape((2, -1)), Cast("bfloat16")]),
        ],
        drop_slots=True,
    )


def test_toml_keeps_backslashes_as_they_are_typed():
    text = Rules(rename=[(r"a/(\d+)", r"b/\1")]).to_toml()
    assert r"from = 'a/(\d+)'" in text
    assert r"to = 'b/\1'" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("includes = ['a']", "did you mean 'include'"),
        ("renames = []", "did you mean 'rename'"),
        ("zzz = 1", "known are .*'include'"),
        ("include = 3", "include: a list of patterns is expected, not 3"),
        ("include = ['a', 3]", "include: a list of patterns"),
        ("drop_slots = 'yes'", "drop_slots: true or false"),
        ("rename = ['a']", r"\[\[rename\]\] tables are expected"),
        ("[rename]\nfrom = 'a'\nto = 'b'", r"\[\[rename\]\] tables are expected"),
        ("[[rename]]\nfrom = 'a'", "or with drop = true"),
        ("[[rename]]\nfrom = 'a'\nto = 'b'\nnote = 'c'", "or with drop = true"),
        ("[[rename]]\nfrom = 'a'\ndrop = false", "or with drop = true"),
        ("[[rename]]\nfrom = 'a'\nto = [1]", "or with drop = true"),
        ("[[rename]]\nfrom = 'a'\nto = '\\1'", "invalid group reference"),
        ("[[transform]]\nmatch = 'a'", "with one transform"),
        ("[[transform]]\nmatch = 'a'\ntranspose = ['x']", "is no transform"),
        ("[[transform]]\nmatch = 'a'\nrotate = 1", "is no transform"),
        ("[[transform]]\nmatch = 'a'\ncast = 'float31'", "float31"),
        ("include = ['(']", "is no regular expression"),
        ('include = ["a\\d"]', "between single quotes"),
        ("\x00\x01\x02", "is not TOML"),
        ("include = [", "is not TOML"),
    ],
)
def test_a_rules_file_with_a_mistake_is_told_with_its_path(text: str, message: str, tmp_path: Path):
    with pytest.raises(RuleError, match=message) as caught:
        from_text(text, tmp_path)
    assert str(tmp_path / "rules.toml") in str(caught.value)


def test_a_rules_file_that_is_not_utf8_is_told(tmp_path: Path):
    path = tmp_path / "rules.toml"
    path.write_bytes(b"include = ['\xff']")
    with pytest.raises(RuleError, match="is not TOML"):
        Rules.from_toml(path)


def test_a_rules_file_that_is_missing_is_a_file_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        Rules.from_toml(tmp_path / "none.toml")


def test_whatever_people_pass_as_rules_becomes_rules(tmp_path: Path):
    rules = Rules(include="a/.*")
    path = tmp_path / "rules.toml"
    path.write_text(rules.to_toml())
    assert as_rules(None) == Rules()
    assert as_rules(rules) is rules
    assert as_rules(path) == rules
    assert as_rules(str(path)) == rules
    assert as_rules({"a/": "b/"}) == Rules.from_assignment_map({"a/": "b/"})
    with pytest.raises(UsageError, match="rules are list"):
        as_rules(["a"])  # type: ignore[arg-type]


def test_an_empty_new_name_is_a_fault_since_none_is_what_drops() -> None:
    with pytest.raises(RuleError, match="the new name is empty"):
        Rules(rename=[("a", "")])


def test_a_rules_file_with_several_faults_tells_of_each(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text("include = ['(', '[']\n", encoding="utf-8")
    with pytest.raises(FaultsError) as caught:
        Rules.from_toml(file)
    assert len(caught.value.faults) == 2
    assert str(file) in str(caught.value)
