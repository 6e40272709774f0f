"""Many checkpoints at once: found below a directory, converted by one set of rules, and resumed.

Each becomes a checkpoint of the same name below another directory. What fails is told with its
error, and the others go on. A manifest in that directory says what was done: a later run goes on
from there.
"""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

from compat_restore.checkpoint.destination import check_destination
from compat_restore.checkpoint.discovery import find_checkpoints
from compat_restore.checkpoint.files import is_url
from compat_restore.errors import (
    CheckpointNotFoundError,
    CompatRestoreError,
    OutputError,
    UsageError,
)
from compat_restore.jobs import (
    Counts,
    Job,
    Outcome,
    Settings,
    Stamp,
    Status,
    carry_out,
    check_output,
    digest_of,
    failed,
    outputs_of,
    stamped,
)
from compat_restore.manifest import MANIFEST, Manifest, Record, read_manifest
from compat_restore.restore_plan import RestorePlan
from compat_restore.rules import as_rules
from compat_restore.tables import escaped, format_bytes, format_statuses

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from os import PathLike

    from compat_restore.checkpoint.discovery import Discovered, Discovery
    from compat_restore.rules import RulesLike

__all__ = ["Conversion", "FleetReport", "OnProgress", "convert_all", "output_name"]

_JSON_VERSION = 1
_MOST_TOLD = 20
# What the names of checkpoint files end in; a V2 prefix and a V1 file end in anything.
_ENDINGS = (".weights.h5", ".safetensors", ".npz", ".h5", ".hdf5", ".keras")
_PATTERN_OF_SHARDS = "-?????-of-"


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint of many, and what became of it.

    Attributes:
        source: its name from the directory that was searched.
        output: the name of the new one from the directory of all new ones.
        outcome: what became of it.
    """

    source: str
    output: str
    outcome: Outcome

    @property
    def status(self) -> Status:
        """What became of it, in a word."""
        return self.outcome.status

    def to_dict(self) -> dict[str, object]:
        """Return it as plain data."""
        outcome = self.outcome
        data: dict[str, object] = {
            "source": self.source,
            "output": self.output,
            "status": outcome.status.value,
            "counts": None if outcome.counts is None else asdict(outcome.counts),
            "error": outcome.error,
            "kind": outcome.kind,
            "notes": list(outcome.notes),
        }
        if outcome.digests:
            data["digests"] = dict(outcome.digests)
        return data


class OnProgress(Protocol):
    """What is told of each checkpoint as it is done."""

    def __call__(self, done: int, total: int, latest: Conversion | None) -> None:
        """Take note; the first call is made before anything is done, with None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """What became of many checkpoints.

    Attributes:
        source_dir: where they were searched for.
        destination_dir: where the new ones are.
        conversions: one for each that was found, naturally sorted by name.
        manifest: the file that says what was done; None for a dry run.
        faults: what could not be searched.
        notes: what was passed over.
        dry_run: nothing was written; this is what would be.
    """

    source_dir: str
    destination_dir: str
    conversions: tuple[Conversion, ...]
    manifest: str | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def complete(self) -> bool:
        """Whether nothing failed."""
        return not self.faults and not self.of(Status.FAILED)

    def of(self, status: Status) -> tuple[Conversion, ...]:
        """Return those of which this became."""
        return tuple(one for one in self.conversions if one.status is status)

    @property
    def nbytes(self) -> int:
        """Bytes of the values that were written, or would be."""
        return sum(
            one.outcome.counts.nbytes
            for one in self.conversions
            if one.outcome.counts and one.status is not Status.UNCHANGED
        )

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain data."""
        return {
            "version": _JSON_VERSION,
            "source_dir": self.source_dir,
            "destination_dir": self.destination_dir,
            "manifest": self.manifest,
            "dry_run": self.dry_run,
            "summary": {
                **{status.value: len(self.of(status)) for status in Status},
                "bytes": self.nbytes,
            },
            "faults": list(self.faults),
            "notes": list(self.notes),
            "checkpoints": [one.to_dict() for one in self.conversions],
        }

    def to_json(self) -> str:
        """Return the report as JSON, indented by one space."""
        import json

        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def to_text(self, *, full: bool = False) -> str:
        """Return the report as a table, with all that failed below it.

        Args:
            full: a row for every checkpoint, and every note; otherwise those whose names differ
                in numbers and that have the same counts share a row.
        """
        becomes = "would go" if self.dry_run else "went"
        lines = [f"'{escaped(self.source_dir)}' {becomes} to '{escaped(self.destination_dir)}'"]
        lines += format_statuses(self._rows(full=full), full=full)
        lines += _listed("failed", [*self.faults, *self._errors(full=full)], full=full)
        notes = [*self.notes]
        notes += [note for one in self.conversions for note in one.outcome.notes]
        lines += _listed("note", notes, full=full)
        lines.append(self.summary())
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the counts as one line."""
        done = Status.PLANNED if self.dry_run else Status.CONVERTED
        said = "would be converted" if self.dry_run else "converted"
        counts = [f"{len(self.of(done))} {said} ({format_bytes(self.nbytes)})"]
        counts.append(f"{len(self.of(Status.UNCHANGED))} done before")
        counts.append(f"{len(self.of(Status.FAILED))} failed")
        if self.faults:
            counts.append(f"{len(self.faults)} not searched")
        return ", ".join(counts)

    def __str__(self) -> str:
        return self.to_text()

    def _errors(self, *, full: bool) -> Iterator[str]:
        """Yield what went wrong; what went wrong likewise with several is told of the first."""
        alike: dict[str, list[str]] = {}
        for number, one in enumerate(self.conversions):
            message = one.outcome.error
            if message is not None:
                rest = message.replace(one.source, "").replace(one.output, "")
                if one.source not in message:
                    message = f"'{one.source}': {message}"
                alike.setdefault(f"{number}" if full else rest, []).append(message)
        for messages in alike.values():
            more = len(messages) - 1
            yield messages[0] + (f"\n(and {more} more in the same way)" if more else "")

    def _rows(self, *, full: bool) -> Iterator[tuple[str, str, str, str]]:
        for status in (Status.PLANNED, Status.CONVERTED, Status.UNCHANGED, Status.FAILED):
            for one in self.of(status):
                counts = one.outcome.counts
                spec, remarks = "", []
                if counts is not None:
                    tensors = "tensor" if counts.restored == 1 else "tensors"
                    spec = f"{counts.restored} {tensors}, {format_bytes(counts.nbytes)}"
                    remarks = [
                        f"{number} {what}"
                        for what, number in (
                            ("initialized", counts.initialized),
                            ("mismatched", counts.mismatched),
                            ("unused", counts.unused),
                        )
                        if number
                    ]
                if full and one.output != one.source:
                    remarks.append(f"as {one.output}")
                yield status.value, one.source, spec, ", ".join(remarks)


def _listed(what: str, messages: Sequence[str], *, full: bool) -> list[str]:
    shown = messages if full else messages[:_MOST_TOLD]
    lines = [
        "\n    ".join(escaped(line) for line in f"{what}: {message}".split("\n"))
        for message in shown
    ]
    if len(shown) < len(messages):
        lines.append(f"{what}: and {len(messages) - len(shown)} more, which --full and JSON list")
    return lines


def convert_all(
    source_dir: str | PathLike[str],
    destination_dir: str | PathLike[str],
    rules: RulesLike | RestorePlan = None,
    *,
    suffix: str | None = None,
    into: str | PathLike[str] | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    digests: bool = False,
    keep_slices: bool = False,
    max_shard_size: int | None = None,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
    on_progress: OnProgress | None = None,
) -> FleetReport:
    """Convert every checkpoint below a directory, as `convert` does each, and resume.

    `runs/a/model.ckpt` below `source_dir` becomes `runs/a/model.ckpt` below `destination_dir`, in
    V2; `model.npz` becomes `model`, and with `suffix=".safetensors"` both `model.ckpt` and
    `model.npz` become `model.safetensors` (two that become the same are errors).

    A checkpoint that cannot be converted fails alone: its error is in the report, and the others go
    on. That holds for rules too: one that matches nothing in a checkpoint fails that checkpoint,
    unless `Rules(allow_unmatched=True)` says otherwise.

    A manifest in `destination_dir` is kept up to date all the time. A later run leaves out what was
    converted by the same rules and options, if the names, sizes and times of change of neither its
    source's files nor its output's are others since; it does again what failed, was interrupted,
    is gone, or whose source changed. What was converted by other rules or options, and outputs that
    somebody else made or changed since, are told, and replaced with `overwrite` alone. (A copy of
    `destination_dir` counts as changed unless the times of its files were copied too: `cp -a`.)

    Args:
        source_dir: a local directory. Hidden files, and what lies outside of it, are not read.
        destination_dir: a local directory, made if it is missing. It may lie in `source_dir`, and
            is not searched then.
        rules: as for `convert`.
        suffix: what the names of the new checkpoints end in, which says their format; None for V2.
        into: as for `convert`: one template for all.
        jobs: how many to convert at once, in as many processes; None for as many as there are
            CPUs. One is done in this process.
        overwrite: also replace what somebody else made or changed, or was converted otherwise.
        dry_run: plan and report, and write nothing.
        verify: as for `convert`.
        digests: as for `convert`; the manifest holds them too.
        keep_slices: as for `convert`.
        max_shard_size: as for `convert`.
        strict: as for `convert`.
        skip_mismatched: as for `convert`.
        allow_empty: as for `convert`.
        on_progress: called before the first and after each.

    Returns:
        What became of each checkpoint, those that failed included.

    Raises:
        CheckpointNotFoundError: there is no such directory, no checkpoint in it, or no template.
        UsageError: the two directories are the same, or the first lies in the second.
        RuleError: the rules are not valid.
        DamagedCheckpointError: the manifest, or the template, is damaged.
        OutputError: nothing can be written to `destination_dir`, or another run is at work there.
    """
    source, destination = os.fspath(source_dir), os.fspath(destination_dir)
    processes = _processes(jobs)
    _check_suffix(suffix)
    settings = Settings(
        root=source,
        rules=rules if isinstance(rules, RestorePlan) else as_rules(rules),
        into=None if into is None else os.fspath(into),
        dry_run=dry_run,
        verify=verify,
        digests=digests,
        keep_slices=keep_slices,
        max_shard_size=max_shard_size,
        strict=strict,
        skip_mismatched=skip_mismatched,
        allow_empty=allow_empty,
    )
    _check_apart(source, destination)
    described = settings.describe()
    digest = digest_of(described)
    found = find_checkpoints(source, without=destination)
    if not found.checkpoints:
        raise CheckpointNotFoundError(_nothing_found(source, found))
    path = os.path.join(destination, MANIFEST)
    with nullcontext() if dry_run else _manifest(path) as manifest:
        if manifest is not None:
            manifest.run(digest, described)
        records = read_manifest(path) if manifest is None else manifest.records
        fleet = _Fleet(destination, settings, digest, records, overwrite, manifest)
        done = fleet.converted(found.checkpoints, suffix, processes, on_progress)
    return FleetReport(
        source_dir=source,
        destination_dir=destination,
        conversions=done,
        manifest=None if manifest is None else path,
        faults=found.faults,
        notes=found.notes,
        dry_run=dry_run,
    )


def output_name(name: str, suffix: str | None = None) -> str:
    """Return the name of the output for a checkpoint of this name.

    Args:
        name: as `find_checkpoints` gives it.
        suffix: what the name is to end in; None for V2.
    """
    stem, pattern, _ = name.rpartition(_PATTERN_OF_SHARDS)
    if not pattern:
        stem = name
    while ending := next((e for e in _ENDINGS if stem.endswith(e)), None):
        stem = stem.removesuffix(ending)
    if suffix is not None:
        stem = stem.removesuffix(".ckpt")
    return stem + (suffix or "")


@dataclass(slots=True)
class _Fleet:
    """One run over many checkpoints."""

    destination: str
    settings: Settings
    digest: str
    records: Mapping[tuple[str, str], Record]
    overwrite: bool
    manifest: Manifest | None
    names: dict[Job, tuple[str, str]] = field(default_factory=dict)
    ours: dict[Job, tuple[Stamp, ...]] = field(default_factory=dict)

    def converted(
        self,
        found: Sequence[Discovered],
        suffix: str | None,
        processes: int,
        on_progress: OnProgress | None,
    ) -> tuple[Conversion, ...]:
        """Convert all that is not done; return what became of each."""
        outputs = {one.name: output_name(one.name, suffix) for one in found}
        rivals: dict[str, list[str]] = {}
        for name, output in outputs.items():
            rivals.setdefault(output, []).append(name)
        done: dict[str, Conversion] = {}
        waiting: list[Job] = []
        if on_progress:
            on_progress(0, len(found), None)

        def finish(name: str, outcome: Outcome) -> None:
            done[name] = Conversion(name, outputs[name], outcome)
            if on_progress:
                on_progress(len(done), len(found), done[name])

        for one in found:
            output = outputs[one.name]
            decided = self._decided(one, output, [n for n in rivals[output] if n != one.name])
            if isinstance(decided, Job):
                self.names[decided] = (one.name, output)
                waiting.append(decided)
            else:
                finish(one.name, decided)
        with closing(self._outcomes(waiting, processes)) as outcomes:
            for job, outcome in outcomes:
                source, output = self.names[job]
                if self.manifest:
                    self.manifest.end(source, output, self.digest, outcome)
                finish(source, outcome)
        return tuple(done[one.name] for one in found)

    def _outcomes(self, waiting: list[Job], processes: int) -> Generator[tuple[Job, Outcome]]:
        count = min(processes, len(waiting))
        if count > 1:
            from compat_restore.workers import in_processes

            # The lock lasts until the last of the processes has ended, however this one does.
            keep_open = () if self.manifest is None else (self.manifest.descriptor,)
            yield from in_processes(
                waiting, self.settings, count, begin=self._begin, keep_open=keep_open
            )
            return
        for job in waiting:
            self._begin(job)
            yield job, carry_out(job, self.settings)

    def _begin(self, job: Job) -> None:
        if self.manifest:
            before = outputs_of(job.destination)
            self.manifest.begin(*self.names[job], self.digest, before, self.ours[job])

    def _decided(self, one: Discovered, output: str, rivals: list[str]) -> Job | Outcome:
        """Return what is to be done, or the outcome if nothing is."""
        path = os.path.join(self.destination, *output.split("/"))
        try:
            if rivals:
                raise OutputError(
                    f"'{one.path}' would become '{path}', and so would "
                    + ", ".join(f"'{name}'" for name in rivals)
                    + ": rename one of them, or convert it by itself"
                )
            check_output(output, self.destination)
            there = check_destination(path, overwrite=True)
            record = self.records.get((one.name, output))
            if record and record.outcome and record.outcome.status is Status.CONVERTED and there:
                if record.settings == self.digest:
                    if self._is_as_it_was(record.outcome, path, there):
                        return _unchanged(record.outcome)
                elif not self.overwrite:
                    raise OutputError(
                        f"'{path}' was converted by other rules or options; convert it anew with "
                        "overwrite=True (--overwrite), or choose another directory"
                    )
            ours = _ours(record, path) if record else ()
            overwrite = self.overwrite or bool(ours)
            check_destination(path, overwrite=overwrite)
        except CompatRestoreError as error:
            return failed(error)
        job = Job(one.path, path, overwrite)
        self.ours[job] = ours
        return job

    def _is_as_it_was(self, outcome: Outcome, path: str, there: Sequence[str]) -> bool:
        """Whether the sources and the output of a conversion are those that were noted."""
        root = self.settings.root or ""
        try:
            inputs = stamped([os.path.join(root, i.path) for i in outcome.inputs], root)
            outputs = stamped(there, os.path.dirname(path) or ".")
        except OSError:
            return False
        same = {*outputs} == {*outcome.outputs}
        return bool(inputs) and inputs == outcome.inputs and same


def _ours(record: Record, path: str) -> tuple[Stamp, ...]:
    """Return what stands at an output if runs made all of it, be it whole or not; else nothing."""
    stamps = outputs_of(path)
    others = set(stamps).difference(record.ours)
    if record.interrupted and record.before is not None:
        others &= set(record.before)  # what appeared since was made by the one that did not end
    return () if others else stamps


def _unchanged(outcome: Outcome) -> Outcome:
    return Outcome(
        status=Status.UNCHANGED,
        inputs=outcome.inputs,
        outputs=outcome.outputs,
        counts=outcome.counts or Counts(),
        notes=outcome.notes,
        digests=outcome.digests,
    )


def _manifest(path: str) -> Manifest:
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be made: {error.strerror or error}; nothing was changed"
        ) from error
    return Manifest(path)


def _processes(jobs: int | None) -> int:
    if jobs is None:
        # What this process may use, which in a container is less than what there is.
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if jobs < 1:
        raise UsageError(f"jobs={jobs}: how many to convert at once, 1 at least")
    return jobs


def _check_suffix(suffix: str | None) -> None:
    if suffix is not None and (not suffix or "/" in suffix or "\0" in suffix):
        raise UsageError(
            f"suffix {suffix!r}: the ending of a file's name is expected, such as '.safetensors'"
        )


def _check_apart(source: str, destination: str) -> None:
    """Refuse directories of which the one would be written over the other.

    Raises:
        UsageError: they are the same, or the first lies in the second.
    """
    if is_url(destination):
        raise UsageError(
            f"'{destination}': many checkpoints are converted into a local directory; "
            "compat_restore.beam, and `convert` for a single one, write to other file systems"
        )
    real, other = os.path.realpath(source), os.path.realpath(destination)
    if real == other or real.startswith(os.path.join(other, "")):
        where = "is" if real == other else "lies in"
        raise UsageError(
            f"'{source}' {where} '{destination}': inputs are never written over; choose a "
            "destination beside it, or below it"
        )


def _nothing_found(source: str, found: Discovery) -> str:
    message = f"no checkpoint below '{source}'"
    return "; ".join([message, *found.faults, *found.notes])
