"""A conversion that may have been done already, or is being done by somebody else at this moment.

Systems that spread work over machines do parts of it again: after a fault, or twice at once to have
the faster one. So what stands at the destination is looked at: if it holds, byte for byte, what the
conversion would write, that is the result. Nobody replaces what is whole unless told to. Those who
do write the same, and the writers put it in place in turn (`alone_in`).
"""

from __future__ import annotations

import enum
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from compat_restore.checkpoint import open_checkpoint
from compat_restore.checkpoint.destination import check_destination
from compat_restore.comparison import unequal_targets
from compat_restore.conversion import convert
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    OutputError,
)
from compat_restore.jobs import (
    Counts,
    Job,
    Outcome,
    Settings,
    Status,
    carry_out,
    failed,
    outputs_of,
)
from compat_restore.names import RoleKind
from compat_restore.planner import plan_restore

if TYPE_CHECKING:
    from compat_restore.checkpoint import CheckpointReader
    from compat_restore.report import RestoreReport
    from compat_restore.tensors import TensorSpec

__all__ = ["carry_out_again"]

_ATTEMPTS = 8
_PAUSE = 0.25  # seconds for another process to put the last of its files in place
# Data that was put in place before what names it: a writer is at work, or was killed at that point.
_UNNAMED = re.compile(r".*(?:\.data-\d{5}-of-\d{5}|-\d{5}-of-\d{5}\.safetensors)", re.DOTALL)


class _Standing(enum.Enum):
    """What stands at a destination."""

    NOTHING = enum.auto()
    PART = enum.auto()
    WHOLE = enum.auto()


def carry_out_again(job: Job, settings: Settings) -> Outcome:
    """Convert one checkpoint, if that has not been done; `UNCHANGED` says that it had.

    What goes wrong is part of the outcome.
    """
    try:
        for attempt in range(_ATTEMPTS):
            match _standing(job.destination):
                case _Standing.WHOLE:
                    return _held_against(job, settings)
                case _Standing.PART if attempt < _ATTEMPTS // 2:
                    time.sleep(_PAUSE)
                    continue  # whoever is at work gets the time to end
                case _Standing.PART:
                    outcome = carry_out(replace(job, overwrite=True), settings)
                case _Standing.NOTHING:
                    outcome = carry_out(replace(job, overwrite=False), settings)
            faster = outcome.kind == OutputError.__name__ and outputs_of(job.destination)
            if not faster:  # if somebody else was, what they wrote is looked at
                return outcome
    except Exception as error:  # noqa: BLE001  # of one checkpoint among many: told, not raised
        return failed(error)
    return failed(
        OutputError(
            f"'{job.destination}' is being written and removed by somebody else, again and again"
        ),
    )


def _standing(destination: str) -> _Standing:
    try:
        there = check_destination(destination, overwrite=True)
    except OutputError:  # also of a file that is removed at this moment
        time.sleep(_PAUSE)
        there = check_destination(destination, overwrite=True)
    if not there:
        return _Standing.NOTHING
    return _Standing.PART if all(map(_UNNAMED.fullmatch, there)) else _Standing.WHOLE


def _held_against(job: Job, settings: Settings) -> Outcome:
    """Return the outcome where something stands at the destination that looks whole.

    Raises:
        OutputError: it is something else, and is not to be replaced.
    """
    if done := _done_before(job, settings):
        return done
    if not job.overwrite:
        raise OutputError(
            f"'{job.destination}' exists already, and holds something else than '{job.source}' "
            "would become; choose another directory, or replace it with overwrite=True"
        )
    # Others may do so at this moment. They write the same, and the writers put it in place in turn.
    return carry_out(job, settings)


def _done_before(job: Job, settings: Settings) -> Outcome | None:
    """Return the outcome if the destination holds what the conversion would write."""
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(job.source))
        template = None
        if settings.into is not None:
            template = stack.enter_context(open_checkpoint(settings.into))
        try:
            report = convert(
                reader,
                job.destination,
                settings.rules,
                into=settings.into,
                overwrite=True,
                dry_run=True,
                keep_slices=settings.keep_slices,
                max_shard_size=settings.max_shard_size,
                strict=settings.strict,
                skip_mismatched=settings.skip_mismatched,
                allow_empty=settings.allow_empty,
            )
            there = stack.enter_context(open_checkpoint(job.destination))
            same = _holds(there, report, reader, template)
        except (
            CheckpointNotFoundError,
            CheckpointFormatError,
            DamagedCheckpointError,
            OutputError,
        ):
            return None  # if the source is to blame, the conversion will tell
    if not same:
        return None
    return Outcome(
        status=Status.UNCHANGED,
        outputs=outputs_of(job.destination),
        counts=Counts.of(report),
        notes=report.notes,
    )


def _holds(
    there: CheckpointReader,
    report: RestoreReport,
    reader: CheckpointReader,
    template: CheckpointReader | None,
) -> bool:
    """Whether a checkpoint has the tensors of a planned conversion, and no others.

    Raises:
        DamagedTensorsError: tensors of one of them are damaged.
    """
    items = report.plan.items
    wanted = {item.target: (item.target_dtype, item.target_shape) for item in items}
    kept = {}
    if template is not None:
        kept = {name: spec for name, spec in _weights(template).items() if name not in wanted}
        wanted |= {name: (spec.dtype, spec.known_shape) for name, spec in kept.items()}
    found = {name: (spec.dtype, spec.known_shape) for name, spec in _weights(there).items()}
    if found != wanted or unequal_targets(items, reader, there):
        return False
    if template is None:
        return True
    same = plan_restore(kept, None, allow_empty=True).items
    return not unequal_targets(same, template, there)


def _weights(reader: CheckpointReader) -> dict[str, TensorSpec]:
    roles = reader.roles()
    return {
        name: spec
        for name, spec in reader.variables().items()
        if roles[name].kind is not RoleKind.CONTAINER
    }
