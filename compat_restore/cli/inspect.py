"""`compat-restore inspect`: list what a checkpoint holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compat_restore.checkpoint import open_checkpoint
from compat_restore.cli.options import HelpFormatter, add_rule_options, gives_rules, rules_from
from compat_restore.cli.output import write, write_json
from compat_restore.errors import PlanError, UsageError
from compat_restore.names import Role, RoleKind, sort_key
from compat_restore.tables import escaped, fold_alike, format_bytes, format_table, remarked, times
from compat_restore.tensors import format_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compat_restore.checkpoint import CheckpointReader
    from compat_restore.rules import Rules
    from compat_restore.tensors import TensorSpec

__all__ = ["run"]

_EXAMPLES = """examples:
  compat-restore inspect model.ckpt
  compat-restore inspect model.ckpt --include 'bert/encoder/.*' --drop-slots
  compat-restore inspect run1/ --json
"""


def run(arguments: Sequence[str]) -> int:
    """List the tensors of a checkpoint; return the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore inspect",
        description="List the tensors of a checkpoint: names, dtypes, shapes, bytes, and which are "
        "optimizer slots or bookkeeping. Repeated layers of one shape share a row.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "checkpoint", help="a prefix, one of a checkpoint's files, a directory, or a SavedModel"
    )
    parser.add_argument("--full", action="store_true", help="a row for every tensor")
    parser.add_argument("--json", action="store_true", help="machine-readable, every tensor")
    add_rule_options(parser, renames=False)
    args = parser.parse_args(arguments)
    if args.rename:
        raise UsageError("inspect shows names as they are; `convert --dry-run` shows renames")
    rules = None
    if gives_rules(args):
        rules = rules_from(args).replace(rename=(), transform=())  # a file's are for other commands
    with open_checkpoint(args.checkpoint) as reader:
        roles = reader.roles()
        specs = _chosen(reader.variables(), roles, rules)
        if args.json:
            write_json(_as_json(reader, specs, roles))
        else:
            write(_as_text(reader, specs, roles, full=args.full))
    return 0


def _chosen(
    specs: Mapping[str, TensorSpec], roles: Mapping[str, Role], rules: Rules | None
) -> Mapping[str, TensorSpec]:
    """Return the specs that the rules want.

    Raises:
        PlanError: a rule matches nothing.
    """
    if rules is None or not (rules.include or rules.exclude or rules.drop_slots):
        return specs
    from compat_restore.planner import plan_restore

    try:
        chosen = plan_restore(specs, None, rules, roles=roles, allow_empty=True)
    except PlanError as error:
        raise PlanError("these rules do not fit the checkpoint:", error.faults) from None
    wanted = {item.source for item in chosen.items}
    return {name: spec for name, spec in specs.items() if name in wanted}


def _as_text(
    reader: CheckpointReader,
    specs: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    *,
    full: bool,
) -> str:
    groups = _alike(specs, roles)
    alike = [
        ((str(spec.dtype), format_shape(spec.shape), _size(spec), _remark(spec, kind)), names)
        for kind, names in groups
        for spec in (specs[names[0]],)
    ]
    folded = (
        sorted(
            ((name, 1, rest) for rest, names in alike for name in names),
            key=lambda row: (sort_key(row[0]), row),
        )
        if full
        else fold_alike(alike)
    )
    lines = [f"{escaped(reader.path)}: {reader.format}"]
    lines += format_table(
        [
            ("dtype", "shape", "each", "", "name"),
            *(
                (dtype, shape, size, times(count), remarked(name, remark))
                for name, count, (dtype, shape, size, remark) in folded
            ),
        ],
        right=(2, 3),
    )
    lines += [f"note: {escaped(note)}" for note in reader.notes]
    lines.append(_summary(specs, groups))
    return "\n".join(lines)


def _size(spec: TensorSpec) -> str:
    # A V1 checkpoint does not say how long its strings are before they are read.
    unknown = spec.dtype.itemsize == 0 and spec.stored_bytes is None
    return "?" if unknown else format_bytes(spec.nbytes)


def _remark(spec: TensorSpec, kind: RoleKind) -> str:
    remarks = []
    if kind is not RoleKind.VARIABLE:
        remarks.append(str(kind))
    if spec.slices:
        remarks.append(f"{len(spec.slices)} parts")
    return ", ".join(remarks)


def _alike(
    specs: Mapping[str, TensorSpec], roles: Mapping[str, Role]
) -> list[tuple[RoleKind, list[str]]]:
    """Return the names of tensors of which the same is shown, and what they are for."""
    groups: dict[tuple[RoleKind, object], list[str]] = {}
    for name, (_, dtype, shape, slices, _, _, stored) in specs.items():
        group = roles[name].kind, (dtype, shape, slices, stored)
        groups.setdefault(group, []).append(name)
    return [(kind, names) for (kind, _), names in groups.items()]


def _summary(specs: Mapping[str, TensorSpec], groups: list[tuple[RoleKind, list[str]]]) -> str:
    """Return counts and bytes by role."""
    counts: dict[RoleKind, tuple[int, int]] = {}
    for kind, names in groups:
        count, size = counts.get(kind, (0, 0))
        counts[kind] = count + len(names), size + len(names) * specs[names[0]].nbytes
    total = format_bytes(sum(size for _, size in counts.values()))
    nouns = {
        RoleKind.VARIABLE: "variables",
        RoleKind.SLOT: "optimizer slots",
        RoleKind.AVERAGE: "moving averages",
        RoleKind.BOOKKEEPING: "bookkeeping",
        RoleKind.CONTAINER: "container",
    }
    parts = [
        f"{counts[kind][0]} {noun} ({format_bytes(counts[kind][1])})"
        for kind, noun in nouns.items()
        if kind in counts
    ]
    return f"{len(specs)} tensors, {total}: " + (", ".join(parts) or "none")


def _as_json(
    reader: CheckpointReader, specs: Mapping[str, TensorSpec], roles: Mapping[str, Role]
) -> str:
    import json

    data = {
        "version": 1,
        "path": reader.path,
        "format": reader.format,
        "notes": list(reader.notes),
        "tensors": [
            {
                "name": name,
                "key": reader.key_of(name),
                "full_name": spec.full_name,
                "dtype": spec.dtype.value,
                "shape": list(spec.known_shape),
                "bytes": spec.nbytes,
                "role": roles[name].kind.value,
                "owner": roles[name].owner,
                "slot": roles[name].slot,
                "parts": len(spec.slices),
            }
            for name, spec in specs.items()
        ],
    }
    return json.dumps(data, indent=1, ensure_ascii=False)
