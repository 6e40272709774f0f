"""The manifest of many conversions: what was done, so that a later run goes on from there.

A file of JSON Lines to which a line is added when a run begins, when a conversion begins, and when
one ends:

    {"manifest": "compat_restore", "version": 1}
    {"event": "run", "settings": "9f...", "options": {"rules": {"drop_slots": true}, ...}}
    {"event": "begin", "source": "a/m.ckpt", "output": "a/m.ckpt", "settings": "9f...",
     "before": [], "ours": []}
    {"event": "end", "source": "a/m.ckpt", "output": "a/m.ckpt", "settings": "9f...",
     "status": "converted", "inputs": [["a/m.ckpt.index", 215, 1700000000000000000], ...], ...}

Digests that are too many for one line stand in "digests" lines before that of the end. Paths are
given from the two directories, which may move. A line that was cut short by a power cut or a full
disk is the last one, and counts for nothing.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from compat_restore.checkpoint.files import ClosedAtEnd
from compat_restore.checkpoint.output import output_error, sync_directory
from compat_restore.errors import DamagedCheckpointError, InputError, OutputError
from compat_restore.jobs import Counts, Outcome, Stamp, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MANIFEST", "Manifest", "Record", "read_manifest"]

MANIFEST = "compat_restore.manifest.jsonl"
_HEADER = {"manifest": "compat_restore", "version": 1}
_PATIENCE = 10.0  # seconds for processes of a run that was killed to end
_LONGEST_LINE = 64 << 20
_LONGEST_PART = 1 << 20  # characters of digests in one line
_LONGEST_TEXT = 1 << 16  # characters
_MOST_NOTES = 100


@dataclass(frozen=True, slots=True)
class Record:
    """The last that is known of a conversion.

    Attributes:
        settings: the digest of those it was done with.
        outcome: None if it began and did not end.
        before: what stood at its output when it began; None if that is not known.
        ours: what earlier runs had made of that, or the last that succeeded has written.
    """

    settings: str
    outcome: Outcome | None
    before: tuple[Stamp, ...] | None = None
    ours: tuple[Stamp, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether it may have left a part of an output."""
        return self.outcome is None or self.outcome.kind == "Killed"


_Records = dict[tuple[str, str], Record]


class Manifest(ClosedAtEnd):
    """A manifest that is open for one run alone; it is made if it is missing.

    Attributes:
        path: of the file.
        descriptor: the open file; the lock lasts until all processes that have it ended.
        records: by (source, output).
    """

    def __init__(self, path: str) -> None:
        """Open a manifest, and keep other runs from it.

        Raises:
            DamagedCheckpointError: it is not what a run wrote.
            OutputError: it cannot be written, or another run is at work.
        """
        self.path = path
        self.descriptor = -1
        try:
            new = not os.path.exists(path)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
            self._lock()
            self.records, whole = _read(path)
            os.ftruncate(self.descriptor, whole)
            if not whole:
                self._add(_HEADER)
            if new:
                sync_directory(os.path.dirname(path) or ".")
        except OSError as error:
            self.close()
            if isinstance(error, OutputError | InputError):
                raise
            raise output_error(path, error) from error
        except BaseException:
            self.close()
            raise

    def run(self, settings: str, options: Mapping[str, object]) -> None:
        """Note that a run begins, and what its settings are.

        Raises:
            OutputError: the disk does not take it.
        """
        line = {"event": "run", "settings": settings, "options": options}
        if len(json.dumps(line)) >= _LONGEST_LINE:  # a plan of very many tensors
            line["options"] = {"omitted": "they are too long"}
        self._write(line)

    def begin(
        self,
        source: str,
        output: str,
        settings: str,
        before: tuple[Stamp, ...],
        ours: tuple[Stamp, ...] = (),
    ) -> None:
        """Note that a conversion begins; it is on the disk when this returns.

        What stands at its output later, and did not before, was made by it.

        Args:
            source: the name of the source.
            output: the name of the output.
            settings: the digest of them.
            before: the files that stand at the output now.
            ours: those of them that runs have made.

        Raises:
            OutputError: the disk does not take it.
        """
        line: dict[str, object] = {"event": "begin", "source": source, "output": output}
        line |= {"settings": settings, "before": _plain(before), "ours": _plain(ours)}
        self._add(line)
        self.records[source, output] = Record(settings, None, before, ours)

    def end(self, source: str, output: str, settings: str, outcome: Outcome) -> None:
        """Note what came of a conversion; it is on the disk when this returns.

        Raises:
            OutputError: the disk does not take it.
        """
        line: dict[str, object] = {"event": "end", "source": source, "output": output}
        line |= {"settings": settings, "status": outcome.status.value}
        line |= {
            key: _plain(stamps)
            for key, stamps in (("inputs", outcome.inputs), ("outputs", outcome.outputs))
        }
        if outcome.counts:
            line["counts"] = asdict(outcome.counts)
        if outcome.error is not None:
            line |= {"error": _cut(outcome.error), "kind": outcome.kind}
        if outcome.notes:
            line["notes"] = [_cut(note) for note in outcome.notes[:_MOST_NOTES]]
        *parts, last = _in_parts(outcome.digests)
        for part in parts:
            self._write({"event": "digests", "source": source, "output": output, "digests": part})
        if last:
            line["digests"] = last
        self._add(line)
        _ended(self.records, (source, output), settings, outcome)

    def close(self) -> None:
        """Let other runs have it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _add(self, line: Mapping[str, object]) -> None:
        self._write(line)
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise output_error(self.path, error) from error

    def _write(self, line: Mapping[str, object]) -> None:
        data = json.dumps(line).encode() + b"\n"
        before = os.fstat(self.descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self.descriptor, data[written:])
        except BaseException as error:
            with suppress(OSError):  # what cannot be taken back is a last line cut short
                os.ftruncate(self.descriptor, before)
            if isinstance(error, OSError):
                raise output_error(self.path, error) from error
            raise

    def _lock(self) -> None:
        import fcntl

        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise OutputError(
                        f"'{self.path}' is in use: another run converts into this directory; wait "
                        "for it, or choose another directory"
                    ) from error
                time.sleep(0.05)
            except OSError:  # a file system without locks
                return
            else:
                return


def read_manifest(path: str) -> dict[tuple[str, str], Record]:
    """Return what a manifest tells, by (source, output); nothing if there is none.

    Raises:
        DamagedCheckpointError: it is not what a run wrote.
        InputError: it cannot be read.
    """
    return _read(path)[0] if os.path.exists(path) else {}


def _read(path: str) -> tuple[dict[tuple[str, str], Record], int]:
    """Return the records, and how many bytes the whole lines are."""
    records: _Records = {}
    digests: dict[tuple[str, str], dict[str, str]] = {}
    whole = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if not line.endswith(b"\n"):
                    if len(line) == _LONGEST_LINE:
                        raise _damaged(path, whole)
                    break
                try:
                    _take(json.loads(line), records, digests, first=not whole)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise _damaged(path, whole) from error
                whole += len(line)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}") from error
    return records, whole


def _damaged(path: str, offset: int) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"'{path}': the line at byte {offset} is none of a manifest; has something else written to "
        "it? Move it away to begin anew: what was converted then counts as not made by it"
    )


def _take(
    line: object,
    records: _Records,
    digests: dict[tuple[str, str], dict[str, str]],
    *,
    first: bool,
) -> None:
    """Take one line into the records.

    Raises:
        ValueError: it is none of a manifest; so are `KeyError` and `TypeError`.
    """
    if first:
        if line != _HEADER:
            raise ValueError(line)
        return
    match line:
        case {"event": "run"}:  # for people
            pass
        case {
            "event": "begin",
            "source": str(source),
            "output": str(output),
            "settings": str(settings),
            **rest,
        }:
            digests.pop((source, output), None)
            before = rest.get("before")
            stamps = None if before is None else _stamps(before)
            ours = _stamps(rest.get("ours", []))
            records[source, output] = Record(settings, None, stamps, ours)
        case {
            "event": "digests",
            "source": str(source),
            "output": str(output),
            "digests": dict(part),
        }:
            digests.setdefault((source, output), {}).update(_digests(part))
        case {
            "event": "end",
            "source": str(source),
            "output": str(output),
            "settings": str(settings),
            "status": str(status),
            "inputs": list(inputs),
            "outputs": list(outputs),
            **rest,
        }:
            outcome = Outcome(
                status=Status(status),
                inputs=tuple(map(_stamp, inputs)),
                outputs=tuple(map(_stamp, outputs)),
                counts=_counts(rest.get("counts")),
                notes=_texts(rest.get("notes", [])),
                digests=digests.pop((source, output), {}) | _digests(rest.get("digests", {})),
                error=_text_or_none(rest.get("error")),
                kind=_text_or_none(rest.get("kind")),
            )
            _ended(records, (source, output), settings, outcome)
        case _:
            raise ValueError(line)


def _ended(records: _Records, names: tuple[str, str], settings: str, outcome: Outcome) -> None:
    last = records.get(names) or Record(settings, None)
    ours = outcome.outputs if outcome.status is Status.CONVERTED else last.ours
    records[names] = Record(settings, outcome, last.before, ours)


def _plain(stamps: tuple[Stamp, ...]) -> list[list[str | int]]:
    return [[stamp.path, stamp.size, stamp.mtime_ns] for stamp in stamps]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " [...]"


def _in_parts(digests: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the digests in parts, none of which is too long for a line; one part at least."""
    parts: list[dict[str, str]] = [{}]
    length = 0
    for name, digest in digests.items():
        length += len(name) + len(digest)
        if length > _LONGEST_PART and parts[-1]:
            parts.append({})
            length = len(name) + len(digest)
        parts[-1][name] = digest
    return parts


def _stamps(value: object) -> tuple[Stamp, ...]:
    if isinstance(value, list):
        return tuple(map(_stamp, value))
    raise ValueError(value)


def _stamp(value: object) -> Stamp:
    match value:
        case [str(path), int(size), int(mtime_ns)]:
            return Stamp(path, size, mtime_ns)
    raise ValueError(value)


def _counts(value: object) -> Counts | None:
    if value is None:
        return None
    match value:
        case dict() if all(isinstance(number, int) for number in value.values()):
            return Counts(**value)
    raise ValueError(value)


def _text_or_none(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(value)


def _texts(value: object) -> tuple[str, ...]:
    match value:
        case list() if all(isinstance(text, str) for text in value):
            return tuple(value)
    raise ValueError(value)


def _digests(value: object) -> dict[str, str]:
    match value:
        case dict() if all(isinstance(text, str) for text in value.values()):
            return value
    raise ValueError(value)
