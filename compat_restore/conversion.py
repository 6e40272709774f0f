"""From checkpoint to checkpoint: filter, rename and transform, without model code."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from compat_restore.checkpoint import open_checkpoint, opened
from compat_restore.checkpoint.bundle import BundleReader
from compat_restore.checkpoint.destination import check_destination, create_writer, kind_of
from compat_restore.checkpoint.files import identity
from compat_restore.checkpoint.slices import consecutive
from compat_restore.checkpoint.writer import Content
from compat_restore.errors import DamagedCheckpointError, PreservationError, UsageError
from compat_restore.names import RoleKind
from compat_restore.planning import Demands, planned
from compat_restore.report import Mismatched, Restored, RestoreReport, left_at_first_value
from compat_restore.tensors import DType, digest, opaque_digest
from compat_restore.transforms import transformed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike

    from compat_restore.checkpoint import CheckpointReader, StoredTensor
    from compat_restore.checkpoint.writer import CheckpointWriter
    from compat_restore.restore_plan import RestoreItem, RestorePlan
    from compat_restore.rules import RulesLike
    from compat_restore.tensors import Array, Slice, TensorSpec

__all__ = ["convert"]


def convert(
    source: CheckpointReader | str | PathLike[str],
    destination: str | PathLike[str],
    rules: RulesLike | RestorePlan = None,
    *,
    into: str | PathLike[str] | None = None,
    model: Callable[[], object] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    digests: bool = False,
    keep_slices: bool = False,
    max_shard_size: int | None = None,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
) -> RestoreReport:
    """Write chosen tensors of a checkpoint to a new checkpoint.

    The name of the new one says its format: `.safetensors`, `.npz`, `.weights.h5`, `.h5` or
    `.keras` at its end; any other is the prefix of a V2 checkpoint.

    Without a template, a V2 checkpoint is name-based: what TensorFlow 1's `Saver`, its
    `CheckpointReader` and TensorFlow 2 read by names. Variables of an object-based checkpoint go by
    their full names. Partitioned variables become whole ones, unless `keep_slices` is set.

    With a template, the new checkpoint has the template's keys and, if it is object-based, its
    object graph: `tf.train.Checkpoint(model=m).restore(destination)` restores it. Tensors go to
    the variables of the template by full names; what the plan does not set keeps the template's
    value. Keras files need a template.

    Bytes that no rule transforms are copied as they are.

    Args:
        source: an open checkpoint, or anything that `open_checkpoint` takes.
        destination: the name of the new checkpoint; missing directories are made.
        rules: which tensors, under which names: `Rules`, a plan that was made before, an
            assignment map, the path of a rules file, or None for all under their own names.
        into: a template: a checkpoint, of any format, of the freshly made model.
        model: in place of a template, a function that makes the model; needs TensorFlow.
        overwrite: replace a checkpoint that is there; it stays whole until the new one is.
        dry_run: plan and report, and write nothing.
        verify: check bytes against the checksums that are stored for them, while they are copied.
        digests: read the new checkpoint back, and put a digest of each tensor into the report.
        keep_slices: store partitioned variables partitioned, as they are. Those that a rule
            transforms become whole ones. With a template, the template decides.
        max_shard_size: bytes after which another data file begins (V2, safetensors).
        strict: a variable of the template that the checkpoint does not set, or a wanted tensor
            that no variable takes, is an error.
        skip_mismatched: leave out what differs in shape or dtype from the template.
        allow_empty: writing no tensor of the checkpoint is no error.

    Returns:
        What became of every tensor and every variable.

    Raises:
        PlanError: names, shapes or dtypes do not fit; all faults are listed.
        DamagedCheckpointError: tensors' bytes are not those that were written; all such are listed,
            and nothing is written.
        UsageError: the format cannot hold what it is given; an input would be written to.
        OutputError: the destination exists, is the source, or cannot be written.
    """
    if into is not None and model is not None:
        raise UsageError("both a template and a model function: one says what the output is like")
    path = os.fspath(destination)
    if keep_slices and kind_of(path) != "bundle":
        raise UsageError(f"'{path}': parts of variables can be kept in V2 checkpoints alone")
    with ExitStack() as stack:
        reader = stack.enter_context(opened(source))
        template = None
        if model is not None:
            from compat_restore.targets.template import template_of

            template = stack.enter_context(template_of(model))
        elif into is not None:
            template = stack.enter_context(open_checkpoint(into))
        targets = None if template is None else template_specs(template)
        made = planned(reader, targets, rules, Demands(strict, skip_mismatched, allow_empty))
        there = check_destination(path, overwrite=True)
        for opened_reader in (reader, template):
            if opened_reader is not None:
                _check_apart(opened_reader, (path, *there))
        if there and not overwrite:  # to look again takes long in a directory of thousands of files
            check_destination(path, overwrite=False)
        found: Mapping[str, str] = {}
        if not dry_run:
            writer = stack.enter_context(
                create_writer(path, template, overwrite=overwrite, max_shard_size=max_shard_size)
            )
            found = _write(
                made,
                reader,
                template,
                writer,
                keep_slices=keep_slices,
                verify=verify,
                digests=digests,
            )
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
            output=path,
            output_format=_format_of(path, template),
            dry_run=dry_run,
            notes=(*reader.notes, *_how_to_restore(path, template)),
        )


def _how_to_restore(path: str, template: CheckpointReader | None) -> tuple[str, ...]:
    """Return what to call to restore an object-based output: its root is that of the template."""
    graph = template.graph if isinstance(template, BundleReader) else None
    if graph is None or kind_of(path) != "bundle":
        return ()
    names = [name for name in graph.children() if name != "save_counter"]
    # Models and SavedModels track layers and lists; a Checkpoint has what it was given.
    is_model = any(name.startswith(("_", "layer", "keras_api", "signatures")) for name in names)
    given = "model" if is_model or not names else ", ".join(f"{name}={name}" for name in names)
    return (f"tf.train.Checkpoint({given}).restore('{path}') restores it",)


def _format_of(path: str, template: CheckpointReader | None) -> str:
    """Return what kind of checkpoint is written."""
    match kind_of(path):
        case "bundle":
            based = (
                "object-based" if template and "object-based" in template.format else "name-based"
            )
            return f"V2 tensor bundle, {based}"
        case "h5":
            return "Keras file" if template is None else template.format
        case kind:
            return f"{kind} file"


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
        specs[name] = spec._replace(aliases=tuple(sorted(aliases - {name, ""})))
    return specs


def _check_apart(reader: CheckpointReader, written: Iterable[str]) -> None:
    """Refuse to write over what is being read.

    Args:
        reader: of what is read.
        written: the paths of what is written or replaced.

    Raises:
        UsageError: one of them is read from, be it by another path or through a link.
    """
    inputs = {found for path in reader.files() if (found := identity(path))}
    for path in written:
        if identity(path) in inputs:
            raise UsageError(
                f"'{path}' is read from: an input is never written to; choose another name"
            )


def _contents(
    made: RestorePlan,
    reader: CheckpointReader,
    template: CheckpointReader | None,
    *,
    keep_slices: bool,
) -> dict[str, Content]:
    """Return what the plan sets, by the name of the variable that it goes into."""
    sources = reader.variables()
    wanted = {} if template is None else template.variables()
    contents = {}
    for item in made.items:
        spec = sources[item.source]
        slices = spec.slices if keep_slices and not item.transforms else ()
        key = item.target
        if template is not None:
            key, slices = template.key_of(item.target), wanted[item.target].slices
            if slices:
                template.stored(item.target)  # which checks that the parts make up the whole
        contents[item.target] = Content(
            name=key,
            dtype=item.target_dtype,
            shape=item.target_shape,
            read=partial(_transformed, reader, item),
            stored=() if item.transforms else _stored(reader, item.source, spec, slices),
            slices=slices,
        )
    return contents


def _transformed(reader: CheckpointReader, item: RestoreItem) -> Array:
    return transformed(item.transforms, reader.read(item.source))


def _stored(
    reader: CheckpointReader, name: str, spec: TensorSpec, slices: tuple[Slice, ...]
) -> tuple[StoredTensor, ...]:
    """Return the pieces that can be copied for a tensor that is to be stored in `slices`."""
    try:
        pieces = reader.stored(name)
    except DamagedCheckpointError:
        return ()  # told with all others that are damaged, when it is read
    if not pieces or spec.slices == slices:
        return pieces
    order = (
        None if slices or spec.dtype is DType.string else consecutive(spec.known_shape, spec.slices)
    )
    return () if order is None else tuple(pieces[number] for number in order)


def _kept(made: RestorePlan, template: CheckpointReader, path: str) -> list[Content]:
    """Return what the plan does not set: it keeps the template's value."""
    passed_over = {item.target for item in made.items}
    if kind_of(path) != "bundle":  # other formats have no object graphs
        roles = template.roles()
        passed_over |= {name for name in roles if roles[name].kind is RoleKind.CONTAINER}
    return [
        Content(
            name=template.key_of(name),
            dtype=spec.dtype,
            shape=spec.known_shape,
            read=partial(template.read, name),
            stored=template.stored(name),
            slices=spec.slices,
        )
        for name, spec in template.variables().items()
        if name not in passed_over
    ]


def _write(
    made: RestorePlan,
    reader: CheckpointReader,
    template: CheckpointReader | None,
    writer: CheckpointWriter,
    *,
    keep_slices: bool,
    verify: bool,
    digests: bool,
) -> dict[str, str]:
    """Write the new checkpoint; return the digests that were asked for, of what was read back.

    Raises:
        PreservationError: what was written is not what was to be; nothing is put in place then.
    """
    contents = _contents(made, reader, template, keep_slices=keep_slices)
    kept = _kept(made, template, writer.path) if template and not writer.fills_template else []
    given: dict[str, str] = {}
    if digests:
        contents = {
            name: content if content.stored else content._replace(read=_noted(name, content, given))
            for name, content in contents.items()
        }
    writer.write([*contents.values(), *kept], verify=verify)
    found = {}
    if digests:
        for item in made.items:
            value = writer.read_back(contents[item.target].name)
            found[item.target] = _digest_of(value, item)
    changed = [name for name, value in given.items() if found[name] != value]
    if changed:
        raise PreservationError(
            f"what was written for '{writer.path}' is not what was to be: "
            + ", ".join(f"'{name}'" for name in changed)
            + "; nothing was put in place"
        )
    writer.finish()
    return found


def _noted(name: str, content: Content, given: dict[str, str]) -> Callable[[], Array]:
    """Return a reading that also notes the digest of what it gives."""

    def read() -> Array:
        value = content.read()
        given[name] = digest(value, content.dtype)
        return value

    return read


def _digest_of(value: Array | bytes, item: RestoreItem) -> str:
    if isinstance(value, bytes):
        return opaque_digest(value, item.target_dtype, item.target_shape)
    return digest(value, item.target_dtype)
