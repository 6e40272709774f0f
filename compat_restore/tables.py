"""Tables of names as plain text: aligned columns, and repeated layers folded into one row.

Folding never hides a difference: rows are folded only where everything but the numbers in their
names is the same, and only where the numbers make up exactly the set that is shown.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING

from compat_restore.names import sort_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "escaped",
    "fold",
    "fold_alike",
    "format_bytes",
    "format_statuses",
    "format_table",
    "remarked",
    "times",
]

_NUMBER = re.compile(r"[0-9]{1,18}")  # longer ones are told apart piece by piece
_NOTATION = re.compile(r"[{},]|/[0-9]+-[0-9]+$")  # what patterns are written with
_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")
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
    lines: list[list[str]] = []
    columns = list(zip(*rows, strict=True))
    for number, column in enumerate(columns):
        shown = {cell: escaped(cell) for cell in set(column)}
        width = max(map(len, shown.values()))
        if not width:
            continue
        for cell, text in shown.items():
            if number in right:
                shown[cell] = text.rjust(width)
            elif number < len(columns) - 1:
                shown[cell] = text.ljust(width)
        lines.append([shown[cell] for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*lines, strict=True)]


def format_statuses(rows: Iterable[tuple[str, str, str, str]], *, full: bool = False) -> list[str]:
    """Return the lines of a table of (status, name, dtype and shape, remark), grouped by status.

    Names stand last, with the remark behind them, so that the columns stay where they are however
    long a name is and however narrow the terminal.

    Args:
        rows: in the order in which the statuses are to stand.
        full: a row for every name; otherwise repeated layers are folded.
    """
    shown: list[tuple[str, str, str, str]] = []
    if full:
        by_name: dict[str, list[tuple[str, str, str, str]]] = {}
        for status, name, spec, remark in rows:
            by_name.setdefault(status, []).append((status, spec, "", remarked(name, remark)))
        return format_table([row for members in by_name.values() for row in members], right=(2,))
    by_status: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for status, name, *rest in rows:
        by_status.setdefault(status, {}).setdefault(tuple(rest), []).append(name)
    for status, alike in by_status.items():
        folded = fold_alike(alike.items())
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
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, rest in rows:
        alike.setdefault(rest, []).append(name)
    return fold_alike(alike.items())


def fold_alike(
    alike: Iterable[tuple[tuple[str, ...], Iterable[str]]],
) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return what `fold` returns, of names that stand with others of which the same is shown.

    Args:
        alike: (everything that is shown of them but their names, the names).
    """
    # Names that have digits at the same places are taken apart at the same places: those are looked
    # for in one of them.
    masked: dict[tuple[bytes, tuple[str, ...]], list[str]] = {}
    for rest, names in alike:
        masks: dict[bytes, list[str]] = {}
        for name in names:
            mask = name.encode("utf-8", "surrogatepass").translate(_ANY_DIGIT)
            masks.setdefault(mask, []).append(name)
        for mask, members in masks.items():
            masked.setdefault((mask, rest), []).extend(members)
    return _folded(masked)


def _folded(
    masked: Mapping[tuple[bytes, tuple[str, ...]], list[str]],
) -> list[tuple[str, int, tuple[str, ...]]]:
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[str, ...]]] = {}
    folded = []
    for (encoded, rest), names in masked.items():
        skeleton = encoded.decode("utf-8", "surrogatepass")
        if _NOTATION.search(skeleton):  # in a pattern it would read as something else
            folded += [(name, 1, rest) for name in names]
            continue
        spans = [match.span() for match in _NUMBER.finditer(skeleton)]
        columns = [[name[start:end] for name in names] for start, end in spans]
        members = groups.setdefault((tuple(_NUMBER.split(skeleton)), rest), [])
        members += zip(*columns, strict=True) if columns else [()] * len(names)
    families: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    for (pieces, rest), members in groups.items():
        for pattern, count in _patterns(pieces, members):
            scope, separator, leaf = pattern.rpartition("/")
            families.setdefault((scope + separator, count, rest), []).append(leaf)
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
    form = "%s".join(piece.replace("%", "%%") for piece in skeleton)
    if len(members) == 1 or not members[0]:
        for numbers in members:
            yield form % numbers, 1
        return
    columns = list(zip(*members, strict=True))
    choices = [frozenset(column) for column in columns]
    combinations = 1
    for choice in choices:
        combinations *= len(choice)
    if combinations == len(members) == len(set(members)):
        yield form % tuple(map(_range, choices)), len(members)
        return
    # Not every combination: fold by the last number that varies, whatever stands before it.
    at = max(index for index, choice in enumerate(choices) if len(choice) > 1)
    parts: dict[tuple[str, ...], list[str]] = {}
    fixed = zip(*columns[:at], repeat("", len(members)), *columns[at + 1 :], strict=True)
    for numbers, number in zip(fixed, columns[at], strict=True):
        parts.setdefault(numbers, []).append(number)
    for numbers, varying in parts.items():
        choice = frozenset(varying)
        yield form % (*numbers[:at], _range(choice), *numbers[at + 1 :]), len(choice)


@lru_cache(maxsize=1024)
def _range(choice: frozenset[str]) -> str:
    """Return `{0-11}` for 0 to 11, `{1,3,7-9}` for those; a single number as it is."""
    if len(choice) == 1:
        return next(iter(choice))
    pieces: list[list[str]] = []
    for digits in sorted(choice, key=lambda digits: (int(digits), digits)):
        before = pieces[-1][-1] if pieces else ""
        # "01" before "2" is no range: nobody could tell whether "01" or "1" is its beginning.
        if before == str(int(digits) - 1) and digits == str(int(digits)):
            pieces[-1].append(digits)
        else:
            pieces.append([digits])
    shown = [f"{piece[0]}-{piece[-1]}" if len(piece) > 2 else ",".join(piece) for piece in pieces]
    return "{" + ",".join(shown) + "}"
