"""Where a plan is carried out: a TF1 session, TF2 objects, or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from compat_restore.tensors import Array, TensorSpec

__all__ = ["Target"]


class Target(Protocol):
    """Variables that can be described, set and read, all by name.

    Attributes:
        kind: what it is, for the report: "session" or "objects".
        collects: `assign` takes all values before it changes anything; otherwise each is let go
            before the next is asked for, so that only one is held at a time.
    """

    kind: str
    collects: bool

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the spec of each variable by its name."""
        ...

    def assign(self, values: Iterable[tuple[str, Array]]) -> None:
        """Set variables, given as (name, value of the spec's dtype and shape)."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Array]]:
        """Yield (name, value) of variables, in the order given."""
        ...
