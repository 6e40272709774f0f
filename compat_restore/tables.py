"""Tables of names as plain text: aligned columns, and repeated layers folded into one row.

Folding never hides a difference: rows are folded only where everything but the numbers in their
names is the same, and only where the numbers make up exactly the set that is shown.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compat_restore.names import sort_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "escaped",
    "fold",
    "format_bytes",
    "format_statuses",
    "format_table",
    "remarked",
    "times",
]

_NUMBER = re.compile(r"[0-9]{1,18}")  # longer ones are told apart piece by piece
_NOTATION = re.compile(r"[{},]|/[0-9]+-[0-9]+$")  # what patterns are written with
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def escaped(text: str) -> str:
    """Return text that is safe to show in a terminal: control characters as escapes."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def format_bytes(count: int) -> str:
    """Return a number of bytes with a unit, three digits at least: `1.07 MiB`."""
    value, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return (
        f"{count} B"
        if unit == "B"
        else f"{value:.3g} {unit}"
        if value < 999.5  # three digits of more than that are 1e+03
        else f"{value:.0f} {unit}"
    )


def format_table(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return lines in which the columns of the rows stand under each other.

    Args:
        rows: each of the same number of cells; control characters are escaped.
        right: the columns to align on the right.

    A column that is empty in every row is left out.
    """
    cells = [[escaped(cell) for cell in row] for row in rows]
    if not cells:
        return []
    shown = [column for column in range(len(cells[0])) if any(row[column] for row in cells)]
    widths = {column: max(len(row[column]) for row in cells) for column in shown}
    return [
        "  ".join(
            row[column].rjust(widths[column])
            if column in right
            else row[column].ljust(widths[column])
            for column in shown
        ).rstrip()
        for row in cells
    ]


def format_statuses(rows: Iterable[tuple[str, str, str, str]], *, full: bool = False) -> list[str]:
    """Return the lines of a table of (status, name, dtype and shape, remark), grouped by status.

    Names stand last, with the remark behind them, so that the columns stay where they are however
    long a name is and however narrow the terminal.

    Args:
        rows: in the order in which the statuses are to stand.
        full: a row for every name; otherwise repeated layers are folded.
    """
    by_status: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for status, name, *rest in rows:
        by_status.setdefault(status, []).append((name, tuple(rest)))
    shown = []
    for status, members in by_status.items():
        folded = [(name, 1, rest) for name, rest in members] if full else fold(members)
        shown += [
            (status, spec, times(count), remarked(name, remark))
            for name, count, (spec, remark) in folded
        ]
    return format_table(shown, right=(2,))


def times(count: int) -> str:
    """Return how many names a row stands for, as it is shown: nothing for one."""
    return f"x{count}" if count > 1 else ""


def remarked(name: str, remark: str) -> str:
    """Return a name with what is to be said of it."""
    return f"{name}  ({remark})" if remark else name


def fold(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, int, tuple[str, ...]]]:
    """Fold rows that differ in the numbers of their names, then in the last part of their names.

    Args:
        rows: (name, everything else that is shown of it).

    Returns:
        (name or pattern, how many rows it stands for, everything else), naturally sorted. In a
        pattern `{0-11}` stands for each of those numbers and `{bias,kernel}` for each of those
        words; with several such, every combination is there. Rows are folded only where
        everything else is the same, so that a differing shape always has a row of its own.
    """
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[str, ...]]] = {}
    literal = []
    for name, rest in rows:
        if _NOTATION.search(name):  # in a pattern it would read as something else
            literal.append((name, 1, rest))
            continue
        numbers = tuple(_NUMBER.findall(name))
        skeleton = tuple(_NUMBER.split(name))
        groups.setdefault((skeleton, rest), []).append(numbers)
    families: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    for (skeleton, rest), members in groups.items():
        for pattern, count in _patterns(skeleton, members):
            scope, separator, leaf = pattern.rpartition("/")
            families.setdefault((scope + separator, count, rest), []).append(leaf)
    folded = literal
    for (scope, count, rest), leaves in families.items():
        words = [leaf for leaf in leaves if "{" not in leaf] if scope else []
        if len(words) > 1:
            folded.append((f"{scope}{{{','.join(sorted(words))}}}", count * len(words), rest))
        else:
            words = []
        folded += [(scope + leaf, count, rest) for leaf in leaves if leaf not in words]
    return sorted(folded, key=lambda row: (sort_key(row[0].replace("{", "")), row))


def _patterns(
    skeleton: tuple[str, ...], members: list[tuple[str, ...]]
) -> Iterable[tuple[str, int]]:
    """Yield (pattern, count) for names of one skeleton, given by their numbers."""
    if len(members) == 1 or not members[0]:
        for numbers in members:
            yield _join(skeleton, numbers), 1
        return
    choices = [sorted({m[at] for m in members}, key=_as_number) for at in range(len(members[0]))]
    combinations = 1
    for choice in choices:
        combinations *= len(choice)
    if combinations == len(members) == len(set(members)):
        yield _join(skeleton, tuple(_range(choice) for choice in choices)), len(members)
        return
    # Not every combination: fold by the last number that varies, whatever stands before it.
    at = max(index for index, choice in enumerate(choices) if len(choice) > 1)
    parts: dict[tuple[str, ...], set[str]] = {}
    for numbers in members:
        parts.setdefault((*numbers[:at], "", *numbers[at + 1 :]), set()).add(numbers[at])
    for fixed, varying in parts.items():
        shown = _range(sorted(varying, key=_as_number))
        yield _join(skeleton, (*fixed[:at], shown, *fixed[at + 1 :])), len(varying)


def _as_number(digits: str) -> tuple[int, str]:
    return int(digits), digits


def _range(choice: list[str]) -> str:
    """Return `{0-11}` for 0 to 11, `{1,3,7-9}` for those; a single number as it is."""
    if len(choice) == 1:
        return choice[0]
    pieces: list[list[str]] = []
    for digits in choice:
        before = pieces[-1][-1] if pieces else ""
        # "01" before "2" is no range: nobody could tell whether "01" or "1" is its beginning.
        if before == str(int(digits) - 1) and digits == str(int(digits)):
            pieces[-1].append(digits)
        else:
            pieces.append([digits])
    shown = [f"{piece[0]}-{piece[-1]}" if len(piece) > 2 else ",".join(piece) for piece in pieces]
    return "{" + ",".join(shown) + "}"


def _join(skeleton: tuple[str, ...], numbers: tuple[str, ...]) -> str:
    out = [skeleton[0]]
    for number, text in zip(numbers, skeleton[1:], strict=True):
        out += [number, text]
    return "".join(out)
