"""From what people pass to a plan: checkpoint opened, rules understood, plan made or replayed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from compat_restore.checkpoint import CheckpointReader, open_checkpoint
from compat_restore.errors import PlanError, TargetError, UsageError
from compat_restore.planner import plan_restore
from compat_restore.restore_plan import RestorePlan
from compat_restore.rules import as_rules
from compat_restore.targets.objects import ObjectTarget, Structure, check_match_by
from compat_restore.targets.session import SessionTarget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike

    from compat_restore.rules import RulesLike
    from compat_restore.targets.graph import Session
    from compat_restore.tensors import TensorSpec

__all__ = ["opened", "plan", "planned", "structure_for"]


def plan(
    checkpoint: CheckpointReader | str | PathLike[str],
    target: object,
    rules: RulesLike | RestorePlan = None,
    *,
    match_by: str = "auto",
    root: str | None = None,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
) -> RestorePlan:
    """Return what a restore will do, without doing it.

    Args:
        checkpoint: an open checkpoint, or anything that `open_checkpoint` takes.
        target: a session, or what `restore_objects` takes, or a `SessionTarget` or `ObjectTarget`
            of it; None for a new checkpoint that takes any name.
        rules: as for `restore_session`.
        match_by: as for `restore_objects`.
        root: as for `restore_objects`.
        strict: as for `restore_session`.
        skip_mismatched: as for `restore_session`.
        allow_empty: as for `restore_session`.

    Raises:
        PlanError: names, shapes or dtypes do not fit; all faults are listed.
    """
    check_match_by(match_by)
    described: SessionTarget | ObjectTarget | None
    if target is None or isinstance(target, SessionTarget | ObjectTarget):
        described = target
    elif hasattr(target, "graph") and hasattr(target, "run"):
        described = SessionTarget(cast("Session", target))
    else:
        described = ObjectTarget(target)
    with opened(checkpoint) as reader:
        structure = None
        if isinstance(described, ObjectTarget):
            structure = structure_for(described, reader, rules, match_by, root)
        return planned(
            reader,
            None if described is None else described.specs(),
            rules,
            pairs=structure.pairs if structure else None,
            strict=strict,
            skip_mismatched=skip_mismatched,
            allow_empty=allow_empty,
        )


@contextmanager
def opened(checkpoint: CheckpointReader | str | PathLike[str]) -> Iterator[CheckpointReader]:
    """Open a checkpoint for the time of a `with` statement; an open one stays open after it."""
    if isinstance(checkpoint, CheckpointReader):
        yield checkpoint
        return
    with open_checkpoint(checkpoint) as reader:
        yield reader


def planned(
    reader: CheckpointReader,
    targets: Mapping[str, TensorSpec] | None,
    rules: RulesLike | RestorePlan,
    *,
    pairs: Mapping[str, str] | None = None,
    strict: bool,
    skip_mismatched: bool,
    allow_empty: bool,
) -> RestorePlan:
    """Return the plan for a target's specs, or the one given in place of rules, if it fits."""
    if isinstance(rules, RestorePlan):
        if skip_mismatched:
            raise UsageError("skip_mismatched goes into making a plan; this one is made already")
        made = rules.fitted(reader.variables(), targets)
        made.check_demands(strict=strict, allow_empty=allow_empty)
        return made
    return plan_restore(
        reader.variables(),
        targets,
        as_rules(rules),
        roles=reader.roles(),
        pairs=pairs,
        strict=strict,
        skip_mismatched=skip_mismatched,
        allow_empty=allow_empty,
    )


def structure_for(
    target: ObjectTarget,
    reader: CheckpointReader,
    rules: RulesLike | RestorePlan,
    match_by: str,
    root: str | None = None,
) -> Structure | None:
    """Return the structure to match by, None to match by names.

    Raises:
        PlanError: places and names contradict each other.
        TargetError: matching by structure was asked for, and nothing corresponds.
    """
    if match_by == "name" or isinstance(rules, RestorePlan):
        return None
    structure = target.structure(reader, root)
    if match_by == "object_path":
        if structure is None:
            raise TargetError(
                f"match_by='object_path': no object of the target corresponds to one of checkpoint "
                f"'{reader.path}' ({reader.format}); match by name, with rules for what differs"
            )
        return structure
    if structure is None or not structure.complete or not as_rules(rules).is_plain:
        return None
    if structure.rivals:
        places = " and ".join(f"'{root}'" for root in sorted((structure.root, *structure.rivals)))
        raise PlanError(
            "the target fits several objects of the checkpoint equally well:",
            [f"{places}: choose one with root=..., or match by names with match_by='name'"],
        )
    if structure.conflicts:
        raise PlanError(
            "the structure of the objects and the names of the variables contradict each other; "
            "say which is right with match_by='name' or match_by='object_path':",
            [
                f"'{name}' of the checkpoint stands where '{target_name}' stands in the target, "
                f"which has a '{name}' too"
                for name, target_name in structure.conflicts
            ],
        )
    return structure
