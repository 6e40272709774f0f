"""Many checkpoints by Apache Beam: the same conversions as `convert_all`, spread over machines.

    from compat_restore.beam import ConvertCheckpoints, find_checkpoints

    with beam.Pipeline() as pipeline:
        results = (
            pipeline
            | beam.Create(find_checkpoints("runs"))
            | ConvertCheckpoints("runs", "converted", rules)
        )

There is no manifest: an output that holds what would be written counts as done.

Raises:
    MissingDependencyError: on import, if Apache Beam is not installed.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from compat_restore.checkpoint import discovery
from compat_restore.checkpoint.files import is_url
from compat_restore.errors import InputError, MissingDependencyError, OutputError, UsageError
from compat_restore.fleet import output_name
from compat_restore.jobs import Job, Outcome, Settings, check_output, failed
from compat_restore.repetition import carry_out_again
from compat_restore.restore_plan import RestorePlan
from compat_restore.rules import as_rules

try:
    import apache_beam as beam
except ImportError as error:
    raise MissingDependencyError(
        "Apache Beam is not installed; pip install 'compat_restore[beam]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from compat_restore.rules import RulesLike

__all__ = ["ConvertCheckpoints", "find_checkpoints"]


def find_checkpoints(source_dir: str | PathLike[str]) -> tuple[str, ...]:
    """Return the paths of all checkpoints below a local directory, for `beam.Create`.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        InputError: a directory in it cannot be listed.
    """
    found = discovery.find_checkpoints(os.fspath(source_dir))
    if found.faults:
        raise InputError("; ".join(found.faults))
    return tuple(one.path for one in found.checkpoints)


class ConvertCheckpoints(beam.PTransform):  # type: ignore[misc]  # Beam is not there for mypy
    """Convert the checkpoints of which a PCollection has the paths.

    An element is the path, or URL, of a checkpoint below `source_dir`: a prefix, or one of its
    files if that leads to the same name (an `.index`). Elements of one name are one conversion.

    The result is a PCollection of mappings with "source" and "output" (paths), "status"
    ("converted", "unchanged" for what was done before, or "failed"), "counts" (of tensors:
    "restored", "nbytes", ...; None if it failed), "error" and "kind" (the message and the class of
    the error, or None) and "notes". A checkpoint that cannot be converted fails nothing else.

    Beam does work again after faults, and may do it twice at once. That changes nothing: outputs
    appear whole or not at all, and one that holds what would be written counts as done. One that
    holds something else is an error, unless `overwrite` is set.
    """

    def __init__(
        self,
        source_dir: str | PathLike[str],
        destination_dir: str | PathLike[str],
        rules: RulesLike | RestorePlan = None,
        *,
        suffix: str | None = None,
        into: str | PathLike[str] | None = None,
        overwrite: bool = False,
        verify: bool = True,
        keep_slices: bool = False,
        max_shard_size: int | None = None,
        strict: bool = False,
        skip_mismatched: bool = False,
        allow_empty: bool = False,
    ) -> None:
        """Describe the conversions; the arguments are those of `convert_all`.

        Args:
            source_dir: a directory, or URL, that all elements lie below. Of a local one, nothing
                outside is read.
            destination_dir: a directory, or URL, that all workers can write to.
            rules: as for `convert_all`; a rules file is read here, not by the workers.
            suffix: as for `convert_all`.
            into: as for `convert_all`; the workers read it.
            overwrite: replace outputs that hold something else.
            verify: as for `convert`.
            keep_slices: as for `convert`.
            max_shard_size: as for `convert`.
            strict: as for `convert`.
            skip_mismatched: as for `convert`.
            allow_empty: as for `convert`.

        Raises:
            RuleError: the rules are not valid.
        """
        super().__init__()
        self._source = os.fspath(source_dir)
        self._destination = os.fspath(destination_dir)
        self._suffix = suffix
        self._overwrite = overwrite
        self._settings = Settings(
            root=None if is_url(self._source) else self._source,
            rules=rules if isinstance(rules, RestorePlan) else as_rules(rules),
            into=None if into is None else os.fspath(into),
            verify=verify,
            keep_slices=keep_slices,
            max_shard_size=max_shard_size,
            strict=strict,
            skip_mismatched=skip_mismatched,
            allow_empty=allow_empty,
        )

    def expand(self, checkpoints: beam.PCollection) -> beam.PCollection:
        """Return the results."""
        return (
            checkpoints
            | "Name outputs" >> beam.Map(self._named)
            # All that would become the same comes to one worker, which tells. It also parts the
            # conversions from what made the paths, so that they are spread over workers.
            | "Group by output" >> beam.GroupByKey()
            | "Convert" >> beam.FlatMap(self._converted)
        )

    def _named(self, checkpoint: str | PathLike[str]) -> tuple[str, str]:
        """Return (name of the output, path of the source); the name is "" if there is none."""
        path = os.fspath(checkpoint).removesuffix(".index")
        if is_url(self._source):
            start = self._source.rstrip("/") + "/"
            name = path.removeprefix(start) if path.startswith(start) else ""
        else:
            name = os.path.relpath(path, self._source).replace(os.sep, "/")
            if name.startswith("../") or name in (".", ".."):
                name = ""
        return (output_name(name, self._suffix) if name else ""), path

    def _converted(self, named: tuple[str, Iterable[str]]) -> list[dict[str, object]]:
        """Return the results for all sources that would become one output."""
        name, sources = named[0], sorted(set(named[1]))
        if not name:
            return [
                _result(
                    Job(path, ""),
                    UsageError(f"'{path}' does not lie below '{self._source}', as it should"),
                )
                for path in sources
            ]
        try:
            output = check_output(name, self._destination)
        except OutputError as error:
            return [_result(Job(path, ""), error) for path in sources]
        jobs = [Job(path, output, self._overwrite) for path in sources]
        if len(jobs) == 1:
            return [_result(jobs[0], carry_out_again(jobs[0], self._settings))]
        return [
            _result(
                job,
                OutputError(
                    f"'{job.source}' would become '{output}', and so would "
                    + ", ".join(f"'{path}'" for path in sources if path != job.source)
                    + ": rename one of them, or convert it by itself"
                ),
            )
            for job in jobs
        ]


def _result(job: Job, became: Outcome | Exception) -> dict[str, object]:
    outcome = failed(became) if isinstance(became, Exception) else became
    return {
        "source": job.source,
        "output": job.destination,
        "status": outcome.status.value,
        "counts": None if outcome.counts is None else asdict(outcome.counts),
        "error": outcome.error,
        "kind": outcome.kind,
        "notes": list(outcome.notes),
    }
