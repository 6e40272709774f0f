"""From checkpoint to checkpoint: filter, rename and transform, without model code."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from compat_restore.checkpoint import open_checkpoint
from compat_restore.checkpoint.bundle_writer import BundleWriter, check_destination
from compat_restore.errors import PreservationError, UsageError
from compat_restore.names import RoleKind
from compat_restore.planning import Demands, planned
from compat_restore.report import Mismatched, Restored, RestoreReport, left_at_first_value
from compat_restore.tensors import digest, opaque_digest
from compat_restore.transforms import transformed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from compat_restore.checkpoint import CheckpointReader
    from compat_restore.restore_plan import RestoreItem, RestorePlan
    from compat_restore.rules import RulesLike
    from compat_restore.tensors import Array, TensorSpec

__all__ = ["convert"]


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    rules: RulesLike | RestorePlan = None,
    *,
    into: str | PathLike[str] | None = None,
    model: Callable[[], object] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    digests: bool = True,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
) -> RestoreReport:
    """Write chosen tensors of a checkpoint to a new V2 checkpoint.

    Without a template, the new checkpoint is name-based: what TensorFlow 1's `Saver`, its
    `CheckpointReader` and TensorFlow 2 read by names. Partitioned variables become whole ones.

    With a template, the new checkpoint has the template's keys and, if it is object-based, its
    object graph: `tf.train.Checkpoint(model=m).restore(destination)` restores it. Tensors go to
    the variables of the template by full names; what the plan does not set keeps the template's
    value.

    Args:
        source: anything that `open_checkpoint` takes.
        destination: the prefix of the new checkpoint; missing directories are made.
        rules: which tensors, under which names: `Rules`, a plan that was made before, an
            assignment map, the path of a rules file, or None for all under their own names.
        into: a template: a checkpoint of the freshly made model.
        model: in place of a template, a function that makes the model; needs TensorFlow.
        overwrite: replace a checkpoint that is there; it stays whole until the new one is.
        dry_run: plan and report, and write nothing.
        digests: read the new checkpoint back, and put a digest of each tensor into the report.
        strict: a variable of the template that the checkpoint does not set, or a wanted tensor
            that no variable takes, is an error.
        skip_mismatched: leave out what differs in shape or dtype from the template.
        allow_empty: writing no tensor of the checkpoint is no error.

    Returns:
        What became of every tensor and every variable.

    Raises:
        PlanError: names, shapes or dtypes do not fit; all faults are listed.
        DamagedCheckpointError: a tensor's bytes are not those that were written; nothing is
            written then.
        OutputError: the destination exists, is the source, or cannot be written.
    """
    if into is not None and model is not None:
        raise UsageError("both a template and a model function: one says what the output is like")
    prefix = os.fspath(destination)
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(source))
        template = None
        if model is not None:
            from compat_restore.targets.template import template_of

            template = stack.enter_context(template_of(model))
        elif into is not None:
            template = stack.enter_context(open_checkpoint(into))
        targets = None if template is None else template_specs(template)
        made = planned(reader, targets, rules, Demands(strict, skip_mismatched, allow_empty))
        for opened_reader in (reader, template):
            if opened_reader is not None:
                _check_apart(opened_reader, prefix)
        check_destination(prefix, overwrite=overwrite)
        found: Mapping[str, str] = {}
        if not dry_run:
            found = _write(made, reader, template, prefix, overwrite=overwrite, digests=digests)
        return RestoreReport(
            target="file",
            checkpoint=reader.path,
            checkpoint_format=reader.format,
            plan=made,
            restored=tuple(
                Restored(item=item, digest=found.get(item.target)) for item in made.items
            ),
            initialized=left_at_first_value(made, "the template's value"),
            unused=made.unused,
            mismatched=tuple(
                Mismatched(pair=pair, outcome="the template's value") for pair in made.mismatched
            ),
            output=prefix,
            output_format=_format_of(template),
            dry_run=dry_run,
            notes=reader.notes,
        )


def _format_of(template: CheckpointReader | None) -> str:
    """Return what kind of checkpoint is written."""
    based = "object-based" if template and "object-based" in template.format else "name-based"
    return f"V2 tensor bundle, {based}"


def template_specs(template: CheckpointReader) -> dict[str, TensorSpec]:
    """Return the variables of a template by name, with the other names that rules may use.

    Those are a variable's key and object path, and both names as they are in the model itself:
    without the model's name (which Keras 3 puts before those of its layers), and the object path
    without the place of the model in the checkpoint (`model/encoder/w` is `encoder/w` in a
    `tf.Module`; the `_kernel` that Keras 3 tracks is called `kernel`).
    """
    roles = template.roles()
    specs = {}
    for name, spec in template.variables().items():
        if roles[name].kind is RoleKind.CONTAINER:
            continue
        key = template.key_of(name)
        path = key.split("/.ATTRIBUTES/")[0]
        inside = path.partition("/")[2]
        aliases = {key, path, spec.full_name or name, *spec.aliases}
        if key != name or path != key:
            aliases |= {inside, "/".join(part.lstrip("_") for part in inside.split("/"))}
        specs[name] = replace(spec, aliases=tuple(sorted(aliases - {name, ""})))
    return specs


def _check_apart(reader: CheckpointReader, prefix: str) -> None:
    """Refuse to write over what is being read.

    Raises:
        UsageError: one of them is read from, be it by another path or through a link.
    """
    inputs = {(status.st_dev, status.st_ino) for path in reader.files() if (status := _stat(path))}
    for path in (prefix, f"{prefix}.index", *check_destination(prefix, overwrite=True)):
        status = _stat(path)
        if status and (status.st_dev, status.st_ino) in inputs:
            raise UsageError(
                f"'{path}' is read from: an input is never written to; choose another name"
            )


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _write(
    made: RestorePlan,
    reader: CheckpointReader,
    template: CheckpointReader | None,
    prefix: str,
    *,
    overwrite: bool,
    digests: bool,
) -> dict[str, str]:
    """Write the new bundle; return the digest of each tensor that was asked for, read back.

    Raises:
        PreservationError: what was written is not what was to be; nothing is put in place then.
    """
    planned_targets = {item.target for item in made.items}
    sources = reader.variables()
    stored = {item.source: reader.stored(item.source) for item in made.items}
    given: dict[str, str] = {}
    keys: dict[str, str] = {}

    def place(source: str) -> tuple[str, int]:
        found = stored[source]
        return (found.source.name, found.offset) if found else ("", 0)

    with BundleWriter(prefix, overwrite=overwrite) as writer:
        for item in sorted(made.items, key=lambda item: place(item.source)):
            key = item.target if template is None else template.key_of(item.target)
            keys[item.target] = key
            as_it_is = stored[item.source]
            if as_it_is is not None and not item.transforms:
                writer.add_stored(key, item.dtype, sources[item.source].known_shape, as_it_is)
                continue
            value = transformed(item.transforms, reader.read(item.source))
            if digests:
                given[item.target] = digest(value, item.target_dtype)
            writer.add(key, item.target_dtype, value)
        for name, spec in (template.variables() if template else {}).items():
            assert template is not None
            if name not in planned_targets:
                _keep(writer, template, name, spec)
        found = {}
        if digests:
            for item in made.items:
                found[item.target] = _digest_of(writer.read_back(keys[item.target]), item)
        changed = [name for name, value in given.items() if found[name] != value]
        if changed:
            raise PreservationError(
                f"what was written for '{prefix}' is not what was to be: "
                + ", ".join(f"'{name}'" for name in changed)
                + "; nothing was put in place"
            )
        writer.finish()
    return found


def _keep(writer: BundleWriter, template: CheckpointReader, name: str, spec: TensorSpec) -> None:
    """Carry a variable of the template over as it is."""
    stored = template.stored(name)
    key = template.key_of(name)
    if stored is not None:
        writer.add_stored(key, spec.dtype, spec.known_shape, stored)
    else:
        writer.add(key, spec.dtype, template.read(name))


def _digest_of(value: Array | bytes, item: RestoreItem) -> str:
    if isinstance(value, bytes):
        return opaque_digest(value, item.target_dtype, item.target_shape)
    return digest(value, item.target_dtype)
