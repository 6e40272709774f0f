"""Tables: folding repeated layers hides nothing, and what is shown is safe in a terminal."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_restore.tables import escaped, fold, format_bytes, format_statuses, format_table


def expanded(pattern: str) -> list[str]:
    """Return the names that a folded name stands for."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            choices.append([piece])
            continue
        chosen: list[str] = []
        for part in piece.split(","):
            if span := re.fullmatch(r"([0-9]+)-([0-9]+)", part):
                chosen += map(str, range(int(span[1]), int(span[2]) + 1))
            else:
                chosen.append(part)
        choices.append(chosen)
    return ["".join(combination) for combination in itertools.product(*choices)]


def names_in(rows: list[tuple[str, int, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return every (name, rest) that folded rows stand for; a row of one stands for itself."""
    found = []
    for pattern, count, rest in rows:
        names = [pattern] if count == 1 else expanded(pattern)
        assert len(names) == count, pattern
        found += [(name, rest) for name in names]
    return found


numbers = st.one_of(
    st.integers(0, 12).map(str), st.sampled_from(["00", "01", "02", "010", "9" * 30, "٣", "²"])
)
words = st.sampled_from(["layer", "kernel", "bias", "a-b", "", "x,y", "{z}", "0-2", "1-", "é", "_"])
names = st.lists(st.one_of(numbers, words, st.just("/")), min_size=1, max_size=7).map("".join)
shapes = st.sampled_from([("float32[3]",), ("float32[4]",), ("int64[]",)])


@settings(deadline=None, max_examples=200)
@given(table=st.dictionaries(names, shapes, max_size=40))
def test_expanding_a_folded_table_gives_exactly_the_names_that_went_in(
    table: dict[str, tuple[str, ...]],
):
    assert sorted(names_in(fold(table.items()))) == sorted(table.items())


@settings(deadline=None)
@given(
    layers=st.sets(st.integers(0, 120), min_size=1),
    leaves=st.sets(words, min_size=1),
    data=st.data(),
)
def test_a_layer_of_another_shape_has_a_row_of_its_own(
    layers: set[int], leaves: set[str], data: st.DataObject
):
    table = {f"net/layer_{n}/{leaf}": ("float32[3]",) for n in layers for leaf in leaves}
    odd = data.draw(st.sampled_from(sorted(table)))
    table[odd] = ("float32[4]",)
    assert [row for row in fold(table.items()) if row[2] == ("float32[4]",)] == [
        (odd, 1, ("float32[4]",))
    ]


@settings(deadline=None)
@given(table=st.dictionaries(names, shapes, max_size=20), data=st.data())
def test_folding_does_not_depend_on_the_order_of_the_rows(
    table: dict[str, tuple[str, ...]], data: st.DataObject
):
    shuffled = data.draw(st.permutations(sorted(table.items())))
    assert fold(shuffled) == fold(table.items())


def folded(*names: str) -> list[tuple[str, int]]:
    return [(pattern, count) for pattern, count, _ in fold((name, ()) for name in names)]


def test_repeated_layers_share_a_row():
    layers = [f"enc/layer_{n}/{leaf}" for n in range(12) for leaf in ("kernel", "bias")]
    assert folded(*layers, "enc/emb") == [("enc/emb", 1), ("enc/layer_{0-11}/{bias,kernel}", 24)]


def test_a_layer_that_is_missing_shows():
    assert folded("l_0", "l_1", "l_3", "l_4", "l_5", "l_6", "l_9") == [("l_{0,1,3-6,9}", 7)]


def test_numbers_that_do_not_make_up_every_combination_are_not_shown_as_if_they_did():
    assert folded("a0/b0", "a0/b1", "a1/b0") == [("a0/b{0,1}", 2), ("a1/b0", 1)]


def test_leading_zeros_are_kept_apart():
    assert folded("l_1", "l_01", "l_2", "l_3") == [("l_{01,1-3}", 4)]
    assert folded("l_01", "l_2", "l_3") == [("l_{01,2,3}", 3)]


def test_a_name_that_looks_like_a_pattern_stays_as_it_is():
    assert folded("s/a,b", "s/c", "s/{d}", "s/e") == [("s/a,b", 1), ("s/{c,e}", 2), ("s/{d}", 1)]
    assert folded("x{0-2}_1", "x{0-2}_2") == [("x{0-2}_1", 1), ("x{0-2}_2", 1)]


def test_names_at_the_root_are_not_gathered_into_words():
    assert folded("a", "b") == [("a", 1), ("b", 1)]


def test_folded_rows_are_in_natural_order():
    assert [name for name, _ in folded("l2/a", "l10/b", "l1/c", "k")] == [
        "k",
        "l1/c",
        "l2/a",
        "l10/b",
    ]


# Text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("conv/kernel", "conv/kernel"),
        ("Größe/核", "Größe/核"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x00\x7f\x85", "\\x00\\x7f\\x85"),
        ("left\u202eright", "left\\u202eright"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("", ""),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str):
    assert escaped(text) == shown


@given(text=st.text())
def test_escaped_text_is_printable(text: str):
    assert escaped(text).isprintable()


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1121984, "1.07 MiB"),
        (999 * 1024, "999 KiB"),
        (int(999.4 * 1024), "999 KiB"),
        (int(999.7 * 1024), "1000 KiB"),
        (1023 * 1024, "1023 KiB"),
        (5 << 30, "5 GiB"),
        (3 << 40, "3 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_bytes_are_shown_with_a_unit(count: int, shown: str):
    assert format_bytes(count) == shown


@given(count=st.integers(0, 1 << 62))
def test_bytes_are_never_shown_with_an_exponent(count: int):
    value, unit = format_bytes(count).split(" ")
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert re.fullmatch(r"\d+(\.\d+)?", value)
    assert abs(float(value) * scale - count) <= 0.005 * count


def test_columns_stand_under_each_other():
    assert format_table([("a", "1", "x"), ("bbb", "22", "")], right=(1,)) == [
        "a     1  x",
        "bbb  22",
    ]


def test_a_table_of_nothing_has_no_lines():
    assert format_table([]) == []


def test_a_column_that_is_empty_throughout_is_left_out():
    assert format_table([("a", "", "x"), ("b", "", "y")]) == ["a  x", "b  y"]


def test_no_cell_can_break_out_of_its_line():
    [line] = format_table([("evil\nname", "\x1b[2J")])
    assert line == "evil\\nname  \\x1b[2J"


def test_statuses_keep_their_order_and_are_folded_one_by_one():
    rows = [
        ("unused", "l_0", "f[1]", ""),
        ("restored", "l_1", "f[1]", ""),
        ("unused", "l_2", "f[1]", ""),
        ("restored", "l_3", "f[2]", "cast"),
    ]
    assert format_statuses(rows) == [
        "unused    f[1]  x2  l_{0,2}",
        "restored  f[1]      l_1",
        "restored  f[2]      l_3  (cast)",
    ]
    assert format_statuses(rows, full=True) == [
        "unused    f[1]  l_0",
        "unused    f[1]  l_2",
        "restored  f[1]  l_1",
        "restored  f[2]  l_3  (cast)",
    ]
