"""From what people pass to a plan: checkpoint opened, rules understood, plan made or replayed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compat_restore.checkpoint import opened
from compat_restore.errors import PlanError, TargetError, UsageError
from compat_restore.planner import plan_restore
from compat_restore.restore_plan import RestorePlan
from compat_restore.rules import as_rules

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from compat_restore.checkpoint import CheckpointReader
    from compat_restore.rules import RulesLike
    from compat_restore.targets.objects import ObjectTarget, Structure
    from compat_restore.targets.session import SessionTarget
    from compat_restore.tensors import TensorSpec

__all__ = ["Demands", "plan", "plan_for_objects", "planned"]


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
    from compat_restore.targets.graph import is_session
    from compat_restore.targets.objects import ObjectTarget, check_match_by
    from compat_restore.targets.session import SessionTarget

    check_match_by(match_by)
    described: SessionTarget | ObjectTarget | None
    if target is None or isinstance(target, SessionTarget | ObjectTarget):
        described = target
    elif is_session(target):
        described = SessionTarget(target)
    else:
        described = ObjectTarget(target)
    with opened(checkpoint) as reader:
        demands = Demands(strict, skip_mismatched, allow_empty)
        if isinstance(described, ObjectTarget):
            return plan_for_objects(
                described, reader, rules, demands, match_by=match_by, root=root
            )[0]
        return planned(reader, None if described is None else described.specs(), rules, demands)


@dataclass(frozen=True, slots=True)
class Demands:
    """What is demanded of a plan, as `plan_restore` describes it."""

    strict: bool
    skip_mismatched: bool
    allow_empty: bool


def planned(
    reader: CheckpointReader,
    targets: Mapping[str, TensorSpec] | None,
    rules: RulesLike | RestorePlan,
    demands: Demands,
    pairs: Mapping[str, str] | None = None,
) -> RestorePlan:
    """Return the plan for a target's specs, or the one given in place of rules, if it fits."""
    if isinstance(rules, RestorePlan):
        if demands.skip_mismatched:
            raise UsageError("skip_mismatched goes into making a plan; this one is made already")
        made = rules.fitted(reader.variables(), targets)
        made.check_demands(strict=demands.strict, allow_empty=demands.allow_empty)
        return made
    return plan_restore(
        reader.variables(),
        targets,
        as_rules(rules),
        roles=reader.roles(),
        pairs=pairs,
        strict=demands.strict,
        skip_mismatched=demands.skip_mismatched,
        allow_empty=demands.allow_empty,
    )


def plan_for_objects(
    target: ObjectTarget,
    reader: CheckpointReader,
    rules: RulesLike | RestorePlan,
    demands: Demands,
    *,
    match_by: str,
    root: str | None,
) -> tuple[RestorePlan, Structure | None]:
    """Return the plan for objects, and the structure by which they were matched, if they were.

    Raises:
        PlanError: no plan can be made; where places would match, that is told.
    """
    structure = _structure_for(target, reader, rules, match_by, root)
    if structure is not None and structure.chosen:
        made = planned(reader, target.specs(), rules, demands, structure.pairs)
        return made, structure
    try:
        return planned(reader, target.specs(), rules, demands), None
    except PlanError as error:
        if structure is None or match_by == "name":
            raise
        hint = (
            f"by their places among the objects, {len(structure.pairs)} variables would match: "
            "match_by='object_path' restores those"
        )
        raise PlanError(error.summary, (*error.faults, hint)) from None


def _structure_for(
    target: ObjectTarget,
    reader: CheckpointReader,
    rules: RulesLike | RestorePlan,
    match_by: str,
    root: str | None = None,
) -> Structure | None:
    """Return how the objects correspond, `chosen` if they are to be matched by it.

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
        return replace(structure, chosen=True)
    if structure is None or not as_rules(rules).is_plain:
        return structure
    if structure.complete and structure.rivals:
        places = " and ".join(f"'{root}'" for root in sorted((structure.root, *structure.rivals)))
        raise PlanError(
            "the target fits several objects of the checkpoint equally well:",
            [f"{places}: choose one with root=..., or match by names with match_by='name'"],
        )
    from compat_restore.targets.objects import only_renumbered, same_but_for_numbers

    # Where the structures are the same, names that say something else must be explained: Keras may
    # have numbered the layers anew. Where they are not, names decide, unless they are such numbers.
    doubtful = (
        not only_renumbered(structure) if structure.complete else same_but_for_numbers(structure)
    )
    if structure.conflicts and doubtful:
        raise PlanError(
            "the structure of the objects and the names of the variables contradict each other; "
            "say which is right with match_by='name' or match_by='object_path':",
            [
                f"'{name}' of the checkpoint stands where '{place}' stands in the target, which "
                f"has '{namesake}' elsewhere"
                for name, place, namesake in structure.conflicts
            ],
        )
    return replace(structure, chosen=structure.complete)
