"""The report of a restore or a conversion: what became of every tensor and every variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.restore_plan import Reason, rules_legend, summary
from compat_restore.tables import escaped, format_bytes, format_statuses
from compat_restore.transforms import transform_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compat_restore.restore_plan import Mismatch, RestoreItem, RestorePlan, Unused
    from compat_restore.tensors import DType

__all__ = ["Initialized", "Kept", "Mismatched", "RestoreReport", "Restored", "left_at_first_value"]

_JSON_VERSION = 1


class Restored(NamedTuple):
    """A variable that holds what the checkpoint had for it.

    Attributes:
        item: what the plan said.
        digest: of the dtype, shape and bytes (`tensors.digest`) read back from the target; the
            same as of what the checkpoint gave. None where no read-back was asked for.
    """

    item: RestoreItem
    digest: str | None

    @property
    def name(self) -> str:
        """The variable's name."""
        return self.item.target

    @property
    def source(self) -> str:
        """The tensor's name in the checkpoint."""
        return self.item.source


class Initialized(NamedTuple):
    """A variable that the checkpoint did not set, and that holds an initial value.

    Attributes:
        name: the variable's name.
        reason: why the checkpoint did not set it.
    """

    name: str
    dtype: DType
    shape: tuple[int | None, ...] | None
    reason: str


def left_at_first_value(made: RestorePlan, what: str) -> tuple[Initialized, ...]:
    """Return the variables that a plan does not set, where they hold a first value already.

    Args:
        made: the plan.
        what: which value that is, for the reason.
    """
    return tuple(
        Initialized(
            name=skip.name, dtype=skip.dtype, shape=skip.shape, reason=f"{skip.remark()}; {what}"
        )
        for skip in made.missing
    )


class Kept(NamedTuple):
    """A variable that the checkpoint did not set, and that was left as it was found.

    Attributes:
        name: the variable's name.
        reason: why: something had set it before, or initialising was not asked for.
    """

    name: str
    dtype: DType
    shape: tuple[int | None, ...] | None
    reason: str


class Mismatched(NamedTuple):
    """A variable that did not fit its tensor; skipped, because that was asked for.

    Attributes:
        pair: what the plan said.
        outcome: what the variable holds now: "initialized" or "kept".
    """

    pair: Mismatch
    outcome: str

    @property
    def name(self) -> str:
        """The variable's name."""
        return self.pair.name

    @property
    def source(self) -> str:
        """The tensor's name in the checkpoint."""
        return self.pair.source


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What became of every tensor of the checkpoint and every variable of the target.

    Each variable stands in exactly one of `restored`, `initialized`, `mismatched` and `kept`; each
    tensor of the checkpoint in `restored`, `mismatched` or `unused`.

    Attributes:
        target: what was restored into: "session", "objects" or "file".
        checkpoint: the checkpoint, as it was found.
        checkpoint_format: what kind of checkpoint it is.
        output: the file that was written, for a conversion.
        output_format: what kind of checkpoint that is.
        plan: the plan that was carried out.
        dry_run: nothing was changed; this is what would be.
        notes: what should be said about how it was done.
    """

    target: str
    checkpoint: str
    checkpoint_format: str
    plan: RestorePlan
    restored: tuple[Restored, ...]
    initialized: tuple[Initialized, ...] = ()
    unused: tuple[Unused, ...] = ()
    mismatched: tuple[Mismatched, ...] = ()
    kept: tuple[Kept, ...] = ()
    output: str | None = None
    output_format: str | None = None
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    @property
    def preserved(self) -> tuple[str, ...]:
        """The names of the variables that hold what the checkpoint had for them."""
        return tuple(entry.name for entry in self.restored)

    @property
    def wanted(self) -> tuple[Unused, ...]:
        """The tensors that the rules wanted, and that no variable of the target took."""
        return tuple(skip for skip in self.unused if skip.reason is Reason.NO_VARIABLE)

    @property
    def nbytes(self) -> int:
        """Bytes of all restored values, strings not counted."""
        return sum(entry.item.nbytes for entry in self.restored)

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain data."""
        return {
            "version": _JSON_VERSION,
            "target": self.target,
            "checkpoint": self.checkpoint,
            "checkpoint_format": self.checkpoint_format,
            "output": self.output,
            "output_format": self.output_format,
            "dry_run": self.dry_run,
            "notes": list(self.notes),
            "summary": {
                "restored": len(self.restored),
                "restored_bytes": self.nbytes,
                "initialized": len(self.initialized),
                "mismatched": len(self.mismatched),
                "kept": len(self.kept),
                "unused": len(self.unused),
                "unused_but_wanted": len(self.wanted),
            },
            "restored": [
                {
                    "name": entry.name,
                    "source": entry.source,
                    "dtype": entry.item.target_dtype.value,
                    "shape": list(entry.item.target_shape),
                    "rule": entry.item.rule,
                    "transforms": [transform_to_dict(t) for t in entry.item.transforms],
                    "digest": entry.digest,
                }
                for entry in self.restored
            ],
            "initialized": [_variable_to_dict(entry) for entry in self.initialized],
            "mismatched": [
                {
                    "name": entry.name,
                    "source": entry.source,
                    "dtype": entry.pair.target_dtype.value,
                    "shape": _shape(entry.pair.target_shape),
                    "source_dtype": entry.pair.dtype.value,
                    "source_shape": list(entry.pair.shape),
                    "reason": entry.pair.reason.value,
                    "outcome": entry.outcome,
                }
                for entry in self.mismatched
            ],
            "kept": [_variable_to_dict(entry) for entry in self.kept],
            "unused": [
                {
                    "name": entry.name,
                    "dtype": entry.dtype.value,
                    "shape": list(entry.shape),
                    "reason": entry.reason.value,
                    "detail": entry.detail,
                }
                for entry in self.unused
            ],
            "rules": self.plan.rules.to_dict(),
        }

    def to_json(self) -> str:
        """Return the report as JSON, indented by one space."""
        import json

        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def to_text(self, *, full: bool = False) -> str:
        """Return the report as a table.

        Args:
            full: a row for every name; otherwise repeated layers of one shape share a row, and
                so do all tensors that were left out for one of the plainer reasons.
        """
        source = f"'{escaped(self.checkpoint)}' ({self.checkpoint_format})"
        title = f"restored {source}"
        if self.output:
            becomes = "would become" if self.dry_run else "became"
            title = f"{source}\n{becomes} '{escaped(self.output)}' ({self.output_format})"
        lines = [title]
        lines += format_statuses(self._rows(full=full), full=full)
        if not full:
            lines += rules_legend(self.plan.rules)
        lines += [f"note: {escaped(note)}" for note in self.notes]
        lines.append(self.summary())
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the counts as one line."""
        counts = [f"{len(self.restored)} restored ({format_bytes(self.nbytes)})"]
        counts.append(f"{len(self.initialized)} initialized")
        if self.kept:
            counts.append(f"{len(self.kept)} kept as they were")
        counts.append(f"{len(self.mismatched)} mismatched")
        wanted = len(self.wanted)
        counts.append(
            f"{len(self.unused)} unused" + (f" ({wanted} of them wanted)" if wanted else "")
        )
        return ", ".join(counts)

    def __str__(self) -> str:
        return self.to_text()

    def _rows(self, *, full: bool) -> Iterable[tuple[str, str, str, str]]:
        for done in self.restored:
            item = done.item
            spec = summary(item.target_dtype, item.target_shape)
            yield "restored", item.target, spec, item.remark(full=full)
        for off in self.mismatched:
            spec = summary(off.pair.target_dtype, off.pair.target_shape)
            yield "mismatched", off.name, spec, f"{off.pair.remark()}; {off.outcome}"
        for fresh in self.initialized:
            yield "initialized", fresh.name, summary(fresh.dtype, fresh.shape), fresh.reason
        for kept in self.kept:
            yield "kept", kept.name, summary(kept.dtype, kept.shape), kept.reason
        plain: dict[str, int] = {}
        for skip in self.unused:
            if not full and skip.reason in _PLAIN_REASONS:
                remark = skip.reason.value
                plain[remark] = plain.get(remark, 0) + 1
                continue
            yield "unused", skip.name, summary(skip.dtype, skip.shape), skip.remark()
        for remark, count in plain.items():
            yield "unused", f"{count} {'tensor' if count == 1 else 'tensors'}", "", remark


# What somebody left out by a word needs no row for each name.
_PLAIN_REASONS = (Reason.NOT_INCLUDED, Reason.SLOT, Reason.CONTAINER, Reason.COPY)


def _variable_to_dict(entry: Initialized | Kept) -> dict[str, object]:
    return {
        "name": entry.name,
        "dtype": entry.dtype.value,
        "shape": _shape(entry.shape),
        "reason": entry.reason,
    }


def _shape(shape: tuple[int | None, ...] | None) -> list[int | None] | None:
    return None if shape is None else list(shape)
