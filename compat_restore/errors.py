"""The errors of compat_restore: one class a kind of fault, each also the fitting builtin.

A message names its subject in quotes, what was expected, what was found, the likely cause and the
cure. `FaultsError` carries several faults that were found together, so that nobody has to mend
them one run at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CheckpointFormatError",
    "CheckpointNotFoundError",
    "CompatRestoreError",
    "DamagedCheckpointError",
    "DamagedTensorsError",
    "FaultsError",
    "InitializationError",
    "InputError",
    "MissingDependencyError",
    "OutputError",
    "PlanError",
    "PreservationError",
    "RuleError",
    "TargetError",
    "TensorNotFoundError",
    "UsageError",
    "faults_of",
    "nearest",
]


class CompatRestoreError(Exception):
    """Any error that this library raises on purpose."""

    def __str__(self) -> str:
        """Return the message alone (`KeyError` would show its representation)."""
        return str(self.args[0]) if self.args else type(self).__name__


class CheckpointNotFoundError(CompatRestoreError, FileNotFoundError):
    """Nothing stands where a checkpoint was named, or a part of it is missing."""


class CheckpointFormatError(CompatRestoreError, ValueError):
    """What stands there is whole, as far as one can see, but it is no checkpoint that we read."""


class DamagedCheckpointError(CompatRestoreError, ValueError):
    """A checkpoint is cut short, altered, or contradicts itself."""


class TensorNotFoundError(CompatRestoreError, KeyError):
    """A tensor was asked for by a name that the checkpoint does not hold."""


class RuleError(CompatRestoreError, ValueError):
    """A rule, an assignment map or a rules file cannot be understood."""


class TargetError(CompatRestoreError, ValueError):
    """A target cannot be restored into: an unbuilt model, two variables of one name, and so on."""


class InitializationError(CompatRestoreError, RuntimeError):
    """Variables cannot be initialised: no initialiser, or initialisers that read each other."""


class PreservationError(CompatRestoreError, RuntimeError):
    """A variable does not hold the bytes that were restored into it."""


class InputError(CompatRestoreError, OSError):
    """A file that is there cannot be read."""


class OutputError(CompatRestoreError, OSError):
    """A file cannot be written where it was asked for."""


class UsageError(CompatRestoreError, ValueError):
    """Arguments that contradict each other, or that mean nothing."""


class MissingDependencyError(CompatRestoreError, ImportError):
    """An optional package is needed for what was asked."""


_MOST_SHOWN = 50


class FaultsError(CompatRestoreError, ValueError):
    """Several faults found together.

    The message shows the first of them where they are many.

    Attributes:
        faults: one message a fault, all of them.
    """

    def __init__(self, summary: str, faults: Iterable[str]) -> None:
        self.summary = summary
        self.faults: tuple[str, ...] = tuple(faults)
        lines = [f"\n  - {fault}" for fault in self.faults[:_MOST_SHOWN]]
        if len(self.faults) > _MOST_SHOWN:
            lines.append(f"\n  ... and {len(self.faults) - _MOST_SHOWN} more")
        super().__init__(f"{summary}{''.join(lines)}")

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to make it again, for errors that cross into another process."""
        return type(self), (self.summary, self.faults)


class DamagedTensorsError(FaultsError, DamagedCheckpointError):
    """Tensors of a checkpoint are damaged; the message is the fault itself where it is one."""

    def __init__(self, faults: Iterable[str]) -> None:
        # What is wrong with an archive as a whole is found at each of its tensors.
        found = tuple(dict.fromkeys(faults))
        super().__init__(f"{len(found)} tensors are damaged:", found)
        if len(found) == 1:
            self.args = found

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to make it again, for errors that cross into another process."""
        return type(self), (self.faults,)


def faults_of(error: CompatRestoreError) -> tuple[str, ...]:
    """Return the messages that an error lists, or its own."""
    return error.faults if isinstance(error, FaultsError) else (str(error),)


class PlanError(FaultsError):
    """No plan can be made, or a plan does not fit, for the reasons listed."""


_MOST_COMPARED = 300


def nearest(name: str, candidates: Sequence[str], count: int = 3) -> tuple[str, ...]:
    """Return up to `count` candidates whose spelling is nearest to `name`, best first.

    Where there are too many to compare letter by letter (seconds at 20,000 names), those that
    share the most words with `name` are compared.
    """
    from difflib import get_close_matches

    pool = candidates
    if len(pool) > _MOST_COMPARED:
        words = _words(name)
        pool = sorted(candidates, key=lambda other: -len(words & _words(other)))[:_MOST_COMPARED]
    return tuple(get_close_matches(name, pool, n=count, cutoff=0.6))


def _words(name: str) -> set[str]:
    return set(name.replace("_", "/").split("/"))
