"""Whether two checkpoints hold the same, tensor by tensor and byte by byte.

What corresponds to what is decided as for a restore of the first into the second: by a plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compat_restore.checkpoint import opened
from compat_restore.checkpoint.checksum import crc32c
from compat_restore.checkpoint.copying import read_checked, wrong
from compat_restore.checkpoint.parallel import for_each
from compat_restore.conversion import template_specs
from compat_restore.errors import DamagedCheckpointError, DamagedTensorsError, faults_of
from compat_restore.names import RoleKind
from compat_restore.planner import plan_restore
from compat_restore.restore_plan import Reason
from compat_restore.rules import as_rules
from compat_restore.tables import escaped, format_bytes, format_statuses
from compat_restore.tensors import OPAQUE, format_shape, numpy_dtype
from compat_restore.transforms import transformed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from os import PathLike

    from compat_restore.checkpoint import CheckpointReader, StoredTensor
    from compat_restore.restore_plan import Mismatch, RestoreItem, RestorePlan, Unused
    from compat_restore.rules import RulesLike
    from compat_restore.tensors import Array

__all__ = ["Comparison", "Difference", "diff", "unequal_targets"]

_JSON_VERSION = 1
_CHUNK = 512 << 10
_ELEMENTS = 1 << 18  # looked at together where tensors differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two tensors of one dtype and shape whose bytes differ.

    Attributes:
        item: which they are.
        elements: how many elements differ; None for values that only TensorFlow understands.
        first: the index of the first that does.
        values: the two values there, as text.
        largest: the largest absolute difference of two finite numbers; None where there are none.
    """

    item: RestoreItem
    elements: int | None = None
    first: tuple[int, ...] = ()
    values: tuple[str, str] = ("", "")
    largest: float | None = None

    def remark(self) -> str:
        """Return what a table says beside the name."""
        if self.elements is None:
            return "other bytes"
        at = f" at {list(self.first)}" if self.first else ""
        text = f"{self.elements} elements differ, first{at}: {self.values[0]} and {self.values[1]}"
        return text if self.largest is None else f"{text}; by {self.largest:.6g} at most"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two checkpoints have in common, and what not.

    Attributes:
        first: the first checkpoint, as it was found; `second` likewise.
        first_format: what kind of checkpoint it is; `second_format` likewise.
        plan: what corresponds to what. Its `items` are the pairs that were compared, `mismatched`
            those of different dtypes or shapes, `unused` what the first alone has or rules left
            out, `missing` what the second alone has.
        identical: the names, in the second checkpoint, of tensors with the same bytes.
        different: the others that were compared.
    """

    first: str
    second: str
    first_format: str
    second_format: str
    plan: RestorePlan
    identical: tuple[str, ...]
    different: tuple[Difference, ...]

    @property
    def only_in_first(self) -> tuple[Unused, ...]:
        """What the first alone has; what rules left out does not count."""
        return tuple(skip for skip in self.plan.unused if skip.reason is Reason.NO_VARIABLE)

    @property
    def mismatched(self) -> tuple[Mismatch, ...]:
        """Pairs of different dtypes or shapes."""
        return self.plan.mismatched

    @property
    def only_in_second(self) -> tuple[str, ...]:
        """What the second alone has; what rules left out of the first does not count."""
        return tuple(
            skip.name for skip in self.plan.missing if skip.reason is Reason.NOT_IN_CHECKPOINT
        )

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same bytes."""
        found = self.different or self.mismatched or self.only_in_first or self.only_in_second
        return not found

    def summary(self) -> str:
        """Return the counts as one line."""
        size = format_bytes(sum(item.nbytes for item in self.plan.items))
        return (
            f"{len(self.plan.items)} compared ({size}): {len(self.identical)} identical, "
            f"{len(self.different)} different; {len(self.mismatched)} of other shapes or dtypes, "
            f"{len(self.only_in_first)} only in the first, "
            f"{len(self.only_in_second)} only in the second"
        )

    def to_dict(self) -> dict[str, object]:
        """Return the comparison as plain data."""
        return {
            "version": _JSON_VERSION,
            "first": {"path": self.first, "format": self.first_format},
            "second": {"path": self.second, "format": self.second_format},
            "equal": self.equal,
            "identical": list(self.identical),
            "different": [
                {
                    "name": found.item.target,
                    "source": found.item.source,
                    "dtype": found.item.target_dtype.value,
                    "shape": list(found.item.target_shape),
                    "elements": found.elements,
                    "first": list(found.first),
                    "values": list(found.values),
                    "largest": found.largest,
                }
                for found in self.different
            ],
            "mismatched": [
                {
                    "name": pair.name,
                    "source": pair.source,
                    "dtypes": [pair.dtype.value, pair.target_dtype.value],
                    "shapes": [list(pair.shape), list(pair.target_shape or ())],
                }
                for pair in self.mismatched
            ],
            "only_in_first": [skip.name for skip in self.only_in_first],
            "only_in_second": list(self.only_in_second),
            "left_out": [
                {"name": skip.name, "reason": skip.remark()}
                for skip in self.plan.unused
                if skip.reason is not Reason.NO_VARIABLE
            ],
        }

    def to_text(self, *, full: bool = False) -> str:
        """Return the comparison as a table.

        Args:
            full: a row for every name, the identical ones too.
        """
        lines = [
            f"first:  '{escaped(self.first)}' ({self.first_format})",
            f"second: '{escaped(self.second)}' ({self.second_format})",
        ]
        lines += format_statuses(self._rows(full=full), full=full)
        lines.append(self.summary())
        return "\n".join(lines)

    def _rows(self, *, full: bool) -> Iterable[tuple[str, str, str, str]]:
        different = {found.item.target: found for found in self.different}
        for item in self.plan.items:
            spec = f"{item.target_dtype}{format_shape(item.target_shape)}"
            if item.target in different:
                yield "different", item.target, spec, different[item.target].remark()
            elif full:
                yield "identical", item.target, spec, item.remark(full=True)
        for pair in self.mismatched:
            yield (
                "mismatched",
                pair.name,
                f"{pair.dtype}{format_shape(pair.shape)}",
                f"the second has {pair.target_dtype}{format_shape(pair.target_shape)}",
            )
        for skip in self.only_in_first:
            yield "first only", skip.name, f"{skip.dtype}{format_shape(skip.shape)}", ""
        for gone in self.plan.missing:
            if gone.reason is Reason.NOT_IN_CHECKPOINT:
                yield "second only", gone.name, f"{gone.dtype}{format_shape(gone.shape)}", ""


def diff(
    first: CheckpointReader | str | PathLike[str],
    second: CheckpointReader | str | PathLike[str],
    rules: RulesLike = None,
) -> Comparison:
    """Compare two checkpoints of any formats, tensor by tensor.

    Bytes are compared as they are stored where both sides allow, in constant memory, and checked
    against their checksums on the way.

    Args:
        first: an open checkpoint, or anything that `open_checkpoint` takes.
        second: the same.
        rules: which tensors of the first to compare, under which names and after which transforms.

    Raises:
        DamagedTensorsError: tensors of either do not have their checksums; all are listed.
        PlanError: a rule matches nothing.
    """
    with opened(first) as one, opened(second) as other:
        roles = one.roles()
        made = plan_restore(
            {n: spec for n, spec in one.variables().items() if _counts(roles[n].kind)},
            template_specs(other),
            as_rules(rules),
            roles=roles,
            skip_mismatched=True,
            allow_empty=True,
        )
        unequal = unequal_targets(made.items, one, other)
        different = [_difference(item, one, other) for item in made.items if item.target in unequal]
        return Comparison(
            first=one.path,
            second=other.path,
            first_format=one.format,
            second_format=other.format,
            plan=made,
            identical=tuple(item.target for item in made.items if item.target not in unequal),
            different=tuple(different),
        )


def _counts(kind: RoleKind) -> bool:
    return kind is not RoleKind.CONTAINER


def unequal_targets(
    items: Iterable[RestoreItem], one: CheckpointReader, other: CheckpointReader
) -> set[str]:
    """Return the targets of the pairs whose bytes differ.

    Raises:
        DamagedTensorsError: tensors are damaged.
    """
    unequal: set[str] = set()
    faults: list[str] = []
    places: list[tuple[RestoreItem, tuple[StoredTensor, ...], tuple[StoredTensor, ...]]] = []
    for item in items:
        try:
            if pieces := _same_pieces(item, one, other):
                places.append((item, *pieces))
            elif item.dtype in OPAQUE or not _same_values(item, one, other):
                unequal.add(item.target)
        except DamagedCheckpointError as error:
            faults += faults_of(error)
    places.sort(key=lambda place: (place[1][0].source.name, place[1][0].offset))

    def compare(
        place: tuple[RestoreItem, tuple[StoredTensor, ...], tuple[StoredTensor, ...]],
        stopped: Callable[[], bool],
    ) -> None:
        item, mine, theirs = place
        for a, b in zip(mine, theirs, strict=True):
            try:
                if not _same_bytes(item, a, b, stopped):
                    unequal.add(item.target)
            except DamagedCheckpointError as error:
                faults.append(str(error))

    for_each(places, compare, size=2 * sum(p.size for _, mine, _ in places for p in mine))
    if faults:
        raise DamagedTensorsError(faults)
    return unequal


def _same_pieces(
    item: RestoreItem, one: CheckpointReader, other: CheckpointReader
) -> tuple[tuple[StoredTensor, ...], tuple[StoredTensor, ...]] | None:
    """Return the places of the same parts of two tensors, None if they are not stored alike."""
    if item.transforms or (
        one.variables()[item.source].slices != other.variables()[item.target].slices
    ):
        return None
    mine, theirs = one.stored(item.source), other.stored(item.target)
    alike = mine and [place.size for place in mine] == [place.size for place in theirs]
    return (mine, theirs) if alike else None


def _same_bytes(
    item: RestoreItem, a: StoredTensor, b: StoredTensor, stopped: Callable[[], bool]
) -> bool:
    """Whether two places hold the same bytes.

    Raises:
        DamagedCheckpointError: the bytes of one do not have their checksum.
    """
    if a.strings is not None or a.opaque:
        return read_checked(item.source, a) == read_checked(item.target, b)
    same, done, crc_a, crc_b = True, 0, 0, 0
    while done < a.size and not stopped():
        length = min(a.size - done, _CHUNK)
        mine = a.source.read(a.offset + done, length)
        theirs = b.source.read(b.offset + done, length)
        same = same and mine == theirs
        crc_a = crc32c(mine, crc_a)
        crc_b = crc_a if same else crc32c(theirs, crc_b)
        done += length
    for name, stored, crc in ((item.source, a, crc_a), (item.target, b, crc_b)):
        if done == a.size and (message := wrong(name, stored, crc)):
            raise DamagedCheckpointError(message)
    return same


def _values(item: RestoreItem, one: CheckpointReader, other: CheckpointReader) -> list[Array]:
    return [transformed(item.transforms, one.read(item.source)), other.read(item.target)]


def _same_values(item: RestoreItem, one: CheckpointReader, other: CheckpointReader) -> bool:
    mine, theirs = _values(item, one, other)
    if mine.dtype == object:
        return bool(mine.tolist() == theirs.tolist())
    import numpy as np

    return np.array_equal(_raw(mine), _raw(theirs))


def _raw(array: Array) -> Array:
    """Return the bytes of an array, which may be its own."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _pairs_of_elements(
    item: RestoreItem, one: CheckpointReader, other: CheckpointReader
) -> Iterator[tuple[Array, Array]]:
    """Yield the elements of two tensors in C order, some at a time."""
    import numpy as np

    pieces = _same_pieces(item, one, other)
    if pieces and len(pieces[0]) == 1 and item.dtype.itemsize:
        dtype, (a, b) = numpy_dtype(item.dtype), (pieces[0][0], pieces[1][0])
        for start in range(0, a.size, _ELEMENTS * dtype.itemsize):
            length = min(_ELEMENTS * dtype.itemsize, a.size - start)
            yield (
                np.frombuffer(a.source.read(a.offset + start, length), dtype),
                np.frombuffer(b.source.read(b.offset + start, length), dtype),
            )
        return
    mine, theirs = (array.reshape(-1) for array in _values(item, one, other))
    for start in range(0, mine.size, _ELEMENTS):
        yield mine[start : start + _ELEMENTS], theirs[start : start + _ELEMENTS]


def _difference(item: RestoreItem, one: CheckpointReader, other: CheckpointReader) -> Difference:
    """Look at the values of two tensors whose bytes differ."""
    if item.dtype in OPAQUE:
        return Difference(item=item)
    import numpy as np

    elements = passed = 0
    found = Difference(item=item)
    largest: float | None = None
    for mine, theirs in _pairs_of_elements(item, one, other):
        if mine.dtype == object:
            unequal = np.not_equal(mine, theirs).astype(bool)
        else:
            # Bytes decide, not values: 0.0 is not -0.0, and a NaN is equal to the same NaN.
            shape = (-1, mine.dtype.itemsize)
            unequal = (_raw(mine).reshape(shape) != _raw(theirs).reshape(shape)).any(axis=1)
        where = np.flatnonzero(unequal)
        if where.size and not elements:
            at = int(where[0])
            index = np.unravel_index(passed + at, item.target_shape) if item.target_shape else ()
            first = tuple(int(axis) for axis in index)
            found = replace(found, first=first, values=(str(mine[at]), str(theirs[at])))
        apart = _largest(mine[where], theirs[where]) if where.size else None
        largest = apart if largest is None else max(largest, apart or 0.0)
        elements += where.size
        passed += mine.size
    return replace(found, elements=elements, largest=largest)


def _largest(mine: Array, theirs: Array) -> float | None:
    """Return the largest difference of numbers, NaN and infinity left aside; None for others."""
    import numpy as np

    if mine.dtype in (object, bool):
        return None
    wide = np.complex128 if mine.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        apart = np.abs(mine.astype(wide) - theirs.astype(wide))
    finite = apart[np.isfinite(apart)]
    return float(finite.max()) if finite.size else None
