"""One conversion of many: what is to be done, and what came of it.

Both are plain data, so that another process, or another machine, can do it.
"""

from __future__ import annotations

import enum
import hashlib
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from compat_restore.checkpoint import open_checkpoint
from compat_restore.checkpoint.destination import check_destination
from compat_restore.checkpoint.files import is_url
from compat_restore.conversion import convert
from compat_restore.errors import CompatRestoreError, OutputError, UsageError
from compat_restore.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat_restore.report import RestoreReport
    from compat_restore.restore_plan import RestorePlan

__all__ = [
    "Counts",
    "Job",
    "Outcome",
    "Settings",
    "Stamp",
    "Status",
    "carry_out",
    "check_output",
    "digest_of",
    "failed",
    "outputs_of",
    "stamped",
]


class Status(str, enum.Enum):
    """What became of a checkpoint of many."""

    CONVERTED = "converted"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    PLANNED = "planned"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How checkpoints are converted; the arguments of `convert` that are the same for all.

    Attributes:
        root: the directory that no file of a source may lie outside of; None for any place.
        rules: rules, or a plan.
        into: the path of a template.
    """

    root: str | None = None
    rules: Rules | RestorePlan = field(default_factory=Rules)
    into: str | None = None
    dry_run: bool = False
    verify: bool = True
    digests: bool = False
    keep_slices: bool = False
    max_shard_size: int | None = None
    strict: bool = False
    skip_mismatched: bool = False
    allow_empty: bool = False

    def describe(self) -> dict[str, object]:
        """Return, as plain data, all that decides what is written and what is demanded of it.

        Where the template stands does not, but what it is: its files' names, sizes and times.

        Raises:
            CheckpointNotFoundError: the template is not there.
        """
        told: dict[str, object] = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in ("root", "rules", "into", "dry_run")
        }
        told["rules"] = self.rules.to_dict()
        template = None
        if self.into is not None:
            with open_checkpoint(self.into) as reader:
                files = reader.files()
            template = [[os.path.basename(path), *_size_and_time(path)] for path in files]
        told["into"] = template
        return told


def digest_of(described: Mapping[str, object]) -> str:
    """Return a SHA-256 that is the same for the same settings alone, in hexadecimal."""
    import json

    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """One checkpoint to be converted.

    Attributes:
        source: what `open_checkpoint` takes.
        destination: the name of the new checkpoint.
        overwrite: whether it may replace one.
    """

    source: str
    destination: str
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a file from another version of it.

    Attributes:
        path: from the directory that the conversion is about.
        size: in bytes.
        mtime_ns: when it was last changed, in nanoseconds.
    """

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tensors and variables there were of each kind; see `RestoreReport`.

    Attributes:
        restored: tensors that were written.
        nbytes: bytes of their values.
    """

    restored: int = 0
    nbytes: int = 0
    initialized: int = 0
    mismatched: int = 0
    unused: int = 0

    @classmethod
    def of(cls, report: RestoreReport) -> Counts:
        """Return the counts of a report."""
        return cls(
            restored=len(report.restored),
            nbytes=report.nbytes,
            initialized=len(report.initialized),
            mismatched=len(report.mismatched),
            unused=len(report.unused),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a job.

    Attributes:
        inputs: the files that were read, as they were before; empty if that is not known.
        outputs: the files that were written, or found done; none of a job that failed, since what
            stands at its destination may be somebody else's.
        counts: None for a job that failed.
        notes: what should be said about how it was done.
        digests: of each tensor that was written, if they were asked for.
        error: why it failed, None if it did not.
        kind: the class of the error.
    """

    status: Status
    inputs: tuple[Stamp, ...] = ()
    outputs: tuple[Stamp, ...] = ()
    counts: Counts | None = None
    notes: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    kind: str | None = None


def carry_out(job: Job, settings: Settings) -> Outcome:
    """Convert one checkpoint; what goes wrong with it is part of the outcome."""
    inputs: tuple[Stamp, ...] = ()
    try:
        if settings.root is not None:
            _check_inside((job.source, f"{job.source}.index"), settings.root)
        with open_checkpoint(job.source) as reader:
            if settings.root is not None:
                _check_inside(reader.files(), settings.root)
                inputs = stamped(reader.files(), settings.root)
            report = convert(
                reader,
                job.destination,
                settings.rules,
                into=settings.into,
                overwrite=job.overwrite,
                dry_run=settings.dry_run,
                verify=settings.verify,
                digests=settings.digests,
                keep_slices=settings.keep_slices,
                max_shard_size=settings.max_shard_size,
                strict=settings.strict,
                skip_mismatched=settings.skip_mismatched,
                allow_empty=settings.allow_empty,
            )
    except Exception as error:  # noqa: BLE001  # of one checkpoint among many: told, not raised
        return failed(error, inputs)
    return Outcome(
        status=Status.PLANNED if settings.dry_run else Status.CONVERTED,
        inputs=inputs,
        outputs=outputs_of(job.destination),
        counts=Counts.of(report),
        notes=report.notes,
        digests={entry.name: entry.digest for entry in report.restored if entry.digest},
    )


def failed(error: Exception, inputs: tuple[Stamp, ...] = ()) -> Outcome:
    """Return the outcome of a job that ended in an error."""
    kind = type(error).__name__
    return Outcome(
        status=Status.FAILED,
        inputs=inputs,
        error=str(error) if isinstance(error, CompatRestoreError) else f"{kind}: {error}",
        kind=kind,
    )


def outputs_of(destination: str) -> tuple[Stamp, ...]:
    """Return the files that stand under the name of an output, none if that cannot be told."""
    try:
        files = check_destination(destination, overwrite=True)
        return stamped(files, os.path.dirname(destination) or ".")
    except (CompatRestoreError, OSError):
        return ()


def check_output(name: str, destination_dir: str) -> str:
    """Return the path of an output, which lies inside the directory of all outputs.

    Args:
        name: from that directory, with slashes.
        destination_dir: a directory or URL.

    Raises:
        OutputError: the name, or a link on its way, leads out of the directory.
    """
    path = f"{destination_dir.rstrip('/')}/{name}"
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise OutputError(
            f"'{name}' is no name of an output: names without empty parts, '.' and '..' are "
            f"expected, which do not lead out of '{destination_dir}'; name the source plainly"
        )
    if is_url(destination_dir):
        return path
    root = os.path.realpath(destination_dir)
    real = os.path.realpath(os.path.dirname(path))
    if os.path.commonpath((real, root)) != root:
        raise OutputError(
            f"'{path}' would be written to '{real}', to where a link leads out of "
            f"'{destination_dir}'; remove the link"
        )
    return path


def stamped(files: Iterable[str], folder: str) -> tuple[Stamp, ...]:
    """Return the stamps of files, with their paths from a directory.

    Raises:
        OSError: one of them is not there.
    """
    stamps = []
    for path in files:
        status = os.stat(path)
        stamps.append(Stamp(os.path.relpath(path, folder), status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def _size_and_time(path: str) -> tuple[int, int] | tuple[()]:
    if not os.path.exists(path):  # of another file system
        return ()
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _check_inside(paths: Iterable[str], root: str) -> None:
    """Refuse files that a link leads out of a directory to.

    Raises:
        UsageError: one is.
    """
    inside = os.path.realpath(root)
    for path in paths:
        real = os.path.realpath(path)
        if os.path.commonpath((real, inside)) != inside:
            raise UsageError(
                f"'{path}' is a link to '{real}', which lies outside '{root}': nothing outside the "
                "directory that was named is read; convert it by itself, or name a directory that "
                "holds both"
            )
