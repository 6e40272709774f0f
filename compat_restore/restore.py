"""Carrying a plan out: read, check, transform, assign, read back, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compat_restore.checkpoint import opened
from compat_restore.errors import PreservationError
from compat_restore.names import sort_key
from compat_restore.planning import Demands, plan_for_objects, planned
from compat_restore.report import (
    Initialized,
    Kept,
    Mismatched,
    Restored,
    RestoreReport,
    left_at_first_value,
)
from compat_restore.restore_plan import Reason
from compat_restore.targets.graph import all_variables, variable_name, variable_spec
from compat_restore.targets.initialization import Initialization, uninitialized_variables
from compat_restore.targets.objects import ObjectTarget, Structure, check_match_by, without_numbers
from compat_restore.targets.session import SessionTarget
from compat_restore.tensors import digest
from compat_restore.transforms import transformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from os import PathLike

    from compat_restore.checkpoint import CheckpointReader
    from compat_restore.restore_plan import RestorePlan
    from compat_restore.rules import RulesLike
    from compat_restore.targets import Target
    from compat_restore.targets.graph import Session
    from compat_restore.tensors import Array


__all__ = ["restore_objects", "restore_session"]

_RENUMBERED = "layers whose names differ in their numbers alone were matched by their places"
_BY_STRUCTURE = (
    "restored by tf.train.Checkpoint, object by object, and compared with the checkpoint"
)


def restore_session(
    session: Session,
    checkpoint: CheckpointReader | str | PathLike[str],
    rules: RulesLike | RestorePlan = None,
    *,
    variables: Iterable[object] | None = None,
    initialize: bool = True,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
) -> RestoreReport:
    """Restore variables of a TF1 graph, then initialise only those that nothing has set.

    No op is added to the graph, which may be finalised. Every fault of names, shapes, dtypes and
    checksums is raised before the first variable changes.

    Args:
        session: a `tf.compat.v1.Session`.
        checkpoint: an open checkpoint, or anything that `open_checkpoint` takes.
        rules: which tensors, into which variables: `Rules`, a plan that was made before, a
            TensorFlow-style assignment map, the path of a rules file, or None for all under
            their own names.
        variables: the variables to restore into; the graph's global variables if None.
        initialize: initialise the global and local variables that nothing has set; otherwise they
            are reported as kept.
        strict: a variable that the checkpoint does not set, or a wanted tensor that no variable
            takes, is an error.
        skip_mismatched: leave out what differs in shape or dtype, rather than fail.
        allow_empty: restoring nothing is no error.

    Returns:
        What became of every variable and every tensor; for the restored ones with a digest of the
        bytes, read back from the session.

    Raises:
        PlanError: names, shapes or dtypes do not fit; all faults are listed.
        DamagedCheckpointError: a tensor's bytes are not those that were written.
        TargetError: a variable cannot be set.
        InitializationError: the rest cannot be initialised; the restored variables stay restored.
    """
    target = SessionTarget(session, variables)
    with opened(checkpoint) as reader:
        demands = Demands(strict, skip_mismatched, allow_empty)
        made = planned(reader, target.specs(), rules, demands)
        planned_parts = [v for item in made.items for v in target.variables_of(item.target)]
        # What is not set is asked, and how to initialise it is settled, before anything changes.
        rest = Initialization(session, restored=planned_parts) if initialize else None
        given = _assign(made, reader, target)
        unset = set(rest.run()) if rest else set()
        # Read back last: no initialiser may have touched what was restored.
        restored = _read_back(made, target, given)
        still_unset = set() if initialize else set(uninitialized_variables(session))
        fresh, kept = _rest_of_session(made, session, target, unset, still_unset)
        return RestoreReport(
            target=target.kind,
            checkpoint=reader.path,
            checkpoint_format=reader.format,
            plan=made,
            restored=restored,
            initialized=fresh,
            unused=made.unused,
            mismatched=tuple(
                Mismatched(
                    pair=pair,
                    outcome="initialized"
                    if any(variable_name(v) in unset for v in target.variables_of(pair.name))
                    else "kept",
                )
                for pair in made.mismatched
            ),
            kept=kept,
            notes=reader.notes,
        )


def restore_objects(
    target: object,
    checkpoint: CheckpointReader | str | PathLike[str],
    rules: RulesLike | RestorePlan = None,
    *,
    match_by: str = "auto",
    root: str | None = None,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
) -> RestoreReport:
    """Restore variables of TF2 objects from a checkpoint of any kind.

    Args:
        target: a `tf.Module`, a tf_keras or Keras 3 model or layer, or a mapping or sequence of
            variables. Variables go by their own world's names: `fc/kernel` in tf_keras, `path` in
            Keras 3, the path of attributes in a `tf.Module`, the keys of a mapping.
        checkpoint: an open checkpoint, or anything that `open_checkpoint` takes.
        rules: as for `restore_session`.
        match_by: for an object-based checkpoint, "object_path" matches by the structure of the
            objects, "name" by the variables' full names; "auto" takes the structure where it is
            the same, and no rules are given.
        root: which object of the checkpoint the target is: a child of its root (`model` for what
            `tf.train.Checkpoint(model=...)` wrote), or "" for the root itself; found if None.
        strict: a variable that the checkpoint does not set, or a wanted tensor that no variable
            takes, is an error.
        skip_mismatched: leave out what differs in shape or dtype, rather than fail.
        allow_empty: restoring nothing is no error.

    Returns:
        What became of every variable and every tensor; for the restored ones with a digest of the
        bytes, read back from the variables. Variables that the checkpoint does not set keep the
        value that they were made with, and stand under `initialized`.

    Raises:
        PlanError: names, shapes or dtypes do not fit; all faults are listed.
        DamagedCheckpointError: a tensor's bytes are not those that were written.
        TargetError: the target has no variables, because it is not built yet, or is no target.
    """
    check_match_by(match_by)
    variables = ObjectTarget(target)
    with opened(checkpoint) as reader:
        demands = Demands(strict, skip_mismatched, allow_empty)
        made, structure = plan_for_objects(
            variables, reader, rules, demands, match_by=match_by, root=root
        )
        notes = (*reader.notes, *variables.notes)
        if structure and structure.conflicts:
            notes = (*notes, _RENUMBERED)
        elif structure is None:
            notes = (*notes, *_numbering_notes(made))
        if structure and structure.exact and made.rules.is_plain and not made.mismatched:
            restored = _carry_out_by_structure(made, reader, variables, structure)
            notes = (*notes, _BY_STRUCTURE)
        else:
            restored = _carry_out(made, reader, variables)
        return RestoreReport(
            target=variables.kind,
            checkpoint=reader.path,
            checkpoint_format=reader.format,
            plan=made,
            restored=restored,
            initialized=left_at_first_value(made, "keeps the value that it has"),
            unused=made.unused,
            mismatched=tuple(Mismatched(pair=pair, outcome="kept") for pair in made.mismatched),
            notes=notes,
        )


def _numbering_notes(made: RestorePlan) -> tuple[str, ...]:
    """Return a note where names that differ in a number alone found nobody on either side.

    Keras numbers layers that nobody named, and then equal names need not be the same layer.
    """
    left = {without_numbers(skip.name): skip.name for skip in made.missing}
    for skip in made.unused:
        if skip.reason is Reason.NO_VARIABLE and (other := left.get(without_numbers(skip.name))):
            note = (
                f"'{skip.name}' of the checkpoint found no variable, and '{other}' no tensor: were "
                "layers numbered anew? Names were matched as they stand; rename what is shifted"
            )
            return (note,)
    return ()


def _carry_out(made: RestorePlan, reader: CheckpointReader, target: Target) -> tuple[Restored, ...]:
    """Assign what is planned, and compare what the target then holds with what it was given."""
    return _read_back(made, target, _assign(made, reader, target))


def _assign(made: RestorePlan, reader: CheckpointReader, target: Target) -> dict[str, str]:
    """Assign what is planned; return the digest of what each variable was given."""
    if not target.collects:
        # Values are assigned as they come: nothing may turn out to be damaged on the way.
        reader.verify({item.source: None for item in made.items})
    given: dict[str, str] = {}

    def values() -> Iterator[tuple[str, Array]]:
        for item in made.items:
            value = transformed(item.transforms, reader.read(item.source))
            given[item.target] = digest(value, item.target_dtype)
            yield item.target, value

    target.assign(values())
    return given


def _carry_out_by_structure(
    made: RestorePlan, reader: CheckpointReader, target: ObjectTarget, structure: Structure
) -> tuple[Restored, ...]:
    """Let TensorFlow restore objects of the same structure, and see what it has restored."""
    given = {
        item.target: digest(reader.read(item.source), item.target_dtype) for item in made.items
    }
    target.restore_structure(reader.path, structure)
    return _read_back(made, target, given)


def _read_back(made: RestorePlan, target: Target, given: Mapping[str, str]) -> tuple[Restored, ...]:
    """Read what the target holds.

    Raises:
        PreservationError: it is not what it was given.
    """
    dtypes = {item.target: item.target_dtype for item in made.items}
    found = {name: digest(value, dtypes[name]) for name, value in target.read(dtypes)}
    changed = [name for name in dtypes if found[name] != given[name]]
    if changed:
        raise PreservationError(
            f"{len(changed)} variables do not hold what was restored into them: "
            + ", ".join(f"'{name}'" for name in changed[:10])
            + "; does something else assign to them, such as another variable's initialiser?"
        )
    return tuple(Restored(item=item, digest=found[item.target]) for item in made.items)


def _rest_of_session(
    made: RestorePlan, session: Session, target: SessionTarget, fresh: set[str], unset: set[str]
) -> tuple[tuple[Initialized, ...], tuple[Kept, ...]]:
    """Return what became of the variables that the checkpoint did not set.

    Args:
        made: the plan.
        session: the session.
        target: the variables that were planned for.
        fresh: the graph's variables that were initialised after the restore.
        unset: the graph's variables that are still not initialised.
    """
    done = {item.target for item in made.items} | {pair.name for pair in made.mismatched}
    remarks = {skip.name: skip.remark() for skip in made.missing}
    mine = {id(variable) for variable in target.graph_variables()}
    rows = [
        (name, spec, [variable_name(v) for v in target.variables_of(name)])
        for name, spec in target.specs().items()
        if name not in done
    ]
    for variable in all_variables(session):
        if id(variable) not in mine:  # each for itself, since it was not to be restored
            mine.add(id(variable))
            rows.append(
                (variable_name(variable), variable_spec(variable), [variable_name(variable)])
            )
    initialized, kept = [], []
    for name, spec, parts in rows:
        reason = remarks.get(name, "not among the variables to restore")
        if any(part in fresh for part in parts):
            initialized.append(
                Initialized(name=name, dtype=spec.dtype, shape=spec.shape, reason=reason)
            )
        else:
            state = "not initialised" if any(part in unset for part in parts) else "set before"
            kept.append(
                Kept(name=name, dtype=spec.dtype, shape=spec.shape, reason=f"{reason}; {state}")
            )
    return (
        tuple(sorted(initialized, key=lambda entry: sort_key(entry.name))),
        tuple(sorted(kept, key=lambda entry: sort_key(entry.name))),
    )
