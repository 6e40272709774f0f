"""The plan: what goes where, and what becomes of all the rest.

A plan is frozen data in which every tensor of the checkpoint and every variable of the target
stands exactly once. It can be printed, saved, read back in another process, and carried out there.
`planner.py` makes plans.

Its rows are named tuples: a plan has as many as there are tensors (see `tensors.py`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from compat_restore.errors import PlanError
from compat_restore.names import in_order
from compat_restore.rules import Rules
from compat_restore.tables import escaped, format_bytes, format_statuses
from compat_restore.tensors import DType, TensorSpec, element_count, format_shape
from compat_restore.transforms import (
    Transform,
    transform_from_dict,
    transform_to_dict,
    transformed_spec,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compat_restore.tensors import Shape

__all__ = [
    "Mismatch",
    "Missing",
    "Reason",
    "RestoreItem",
    "RestorePlan",
    "Unused",
    "misfit",
    "rules_legend",
    "summary",
]

_JSON_VERSION = 1
_NOT_PLANNED = "the plan does not name it"


class Reason(str, enum.Enum):
    """Why something is not restored."""

    NOT_INCLUDED = "not included"
    EXCLUDED = "excluded"
    DROPPED = "dropped"
    SLOT = "slot left out"
    CONTAINER = "part of the container"
    COPY = "a copy of another"
    NO_VARIABLE = "no such variable"
    NOT_IN_CHECKPOINT = "not in the checkpoint"
    NOT_CHOSEN = "not chosen"
    SHAPE = "shape mismatch"
    DTYPE = "dtype mismatch"

    def __str__(self) -> str:
        return self.value


class RestoreItem(NamedTuple):
    """A tensor that goes into a variable.

    Attributes:
        source: the tensor's name in the checkpoint.
        target: the variable's name.
        dtype: of the tensor as stored.
        shape: of the tensor as stored.
        target_dtype: after the transforms, which is the variable's.
        target_shape: after the transforms, which is the variable's.
        rule: what decided, where the name did not: `rename 1`, or `same place` for objects that
            correspond by structure.
        transforms: what is done on the way.
    """

    source: str
    target: str
    dtype: DType
    shape: Shape
    target_dtype: DType
    target_shape: Shape
    rule: str | None = None
    transforms: tuple[Transform, ...] = ()

    @property
    def name(self) -> str:
        """The variable's name."""
        return self.target

    @property
    def nbytes(self) -> int:
        """Bytes of the values that go into the variable; 0 for strings."""
        return element_count(self.target_shape) * self.target_dtype.itemsize

    def remark(self, *, full: bool = False) -> str:
        """Return what a table says beside the name: the rename and the transforms.

        Args:
            full: name the tensor itself instead of the rule.
        """
        remarks = []
        if self.source != self.target:
            remarks.append(f"from '{self.source}'" if full or not self.rule else self.rule)
        if self.transforms:
            remarks.append(summary(self.dtype, self.shape))
            remarks += [str(transform) for transform in self.transforms]
        return ", ".join(remarks)


class Unused(NamedTuple):
    """A tensor of the checkpoint that goes nowhere.

    Attributes:
        name: its name in the checkpoint.
        reason: why.
        detail: the rule that decided, or the name of the variable that is not there.
    """

    name: str
    dtype: DType
    shape: Shape
    reason: Reason
    detail: str = ""

    def remark(self) -> str:
        """Return what a table says beside the name: the reason."""
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class Missing(NamedTuple):
    """A variable of the target that the checkpoint does not set.

    Attributes:
        name: the variable's name.
        reason: the checkpoint has nothing for it, or the rules left out what it has.
        detail: the tensor that the rules left out.
    """

    name: str
    dtype: DType
    shape: tuple[int | None, ...] | None
    reason: Reason = Reason.NOT_IN_CHECKPOINT
    detail: str = ""

    def remark(self) -> str:
        """Return what a table says beside the name: the reason."""
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class Mismatch(NamedTuple):
    """A tensor and a variable that belong together and do not fit; skipped because that was asked.

    Attributes:
        source: the tensor's name.
        name: the variable's name.
        dtype: of the tensor, after its transforms.
        shape: of the tensor, after its transforms.
        target_dtype: of the variable.
        target_shape: of the variable.
        reason: which of the two differs.
    """

    source: str
    name: str
    dtype: DType
    shape: Shape
    target_dtype: DType
    target_shape: tuple[int | None, ...] | None
    reason: Reason

    def remark(self) -> str:
        """Return what a table says beside the name: what differs."""
        return f"{self.reason}: the checkpoint has {summary(self.dtype, self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """What a restore will do. Every tensor and every variable stands here exactly once.

    Attributes:
        rules: the rules that it was made with.
        items: what is restored, by target.
        unused: tensors of the checkpoint that go nowhere.
        missing: variables that the checkpoint does not set.
        mismatched: pairs that do not fit, where skipping them was asked for.
    """

    rules: Rules
    items: tuple[RestoreItem, ...]
    unused: tuple[Unused, ...] = ()
    missing: tuple[Missing, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the plan as plain data."""
        return {
            "version": _JSON_VERSION,
            "rules": self.rules.to_dict(),
            "items": [_item_to_dict(item) for item in self.items],
            "unused": [
                {
                    "name": skip.name,
                    "dtype": skip.dtype.value,
                    "shape": list(skip.shape),
                    "reason": skip.reason.value,
                    "detail": skip.detail,
                }
                for skip in self.unused
            ],
            "missing": [
                {
                    "name": skip.name,
                    "dtype": skip.dtype.value,
                    "shape": None if skip.shape is None else list(skip.shape),
                    "reason": skip.reason.value,
                    "detail": skip.detail,
                }
                for skip in self.missing
            ],
            "mismatched": [
                {
                    "source": pair.source,
                    "name": pair.name,
                    "dtype": pair.dtype.value,
                    "shape": list(pair.shape),
                    "target_dtype": pair.target_dtype.value,
                    "target_shape": None if pair.target_shape is None else list(pair.target_shape),
                    "reason": pair.reason.value,
                }
                for pair in self.mismatched
            ],
        }

    def to_json(self) -> str:
        """Return the plan as JSON; `from_json` reads it back."""
        import json

        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> RestorePlan:
        """Read a plan that `to_json` wrote.

        Raises:
            PlanError: it is no such JSON.
        """
        import json

        try:
            plan = _plan_from_dict(json.loads(text))
            _check_sound(plan)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                "this is no plan:", [f"{type(error).__name__}: {error}; `to_json` writes plans"]
            ) from None
        return plan

    def check_fits(
        self, sources: Mapping[str, TensorSpec], targets: Mapping[str, TensorSpec] | None
    ) -> None:
        """Check that the plan can be carried out between these two.

        Args:
            sources: the checkpoint's specs.
            targets: the target's specs; None for a target that takes any name.

        Raises:
            PlanError: a tensor or variable is not there, or not of the dtype and shape planned.
        """
        faults = []
        for item in self.items:
            source = sources.get(item.source)
            if source is None:
                faults.append(f"tensor '{item.source}' is planned, and not in this checkpoint")
            elif (source.dtype, source.shape) != (item.dtype, item.shape):
                faults.append(
                    f"tensor '{item.source}' is planned as {item.dtype}{format_shape(item.shape)}, "
                    f"and is {source.summary} in this checkpoint"
                )
            if targets is None:
                continue
            target = targets.get(item.target)
            if target is None:
                faults.append(f"variable '{item.target}' is planned, and not in this target")
            elif misfit(item.target_dtype, item.target_shape, target):
                faults.append(
                    f"variable '{item.target}' is planned as {item.target_dtype}"
                    f"{format_shape(item.target_shape)}, and is {target.summary} in this target"
                )
        if faults:
            raise PlanError("the plan was made for another checkpoint or target:", faults)

    def fitted(
        self, sources: Mapping[str, TensorSpec], targets: Mapping[str, TensorSpec] | None
    ) -> RestorePlan:
        """Return this plan for a checkpoint and a target that may hold more than it knows of.

        What it knows of is carried out as it stands. What is new stands under `unused` and
        `missing` as not in the plan, and what is not there any more does not.

        Args:
            sources: the checkpoint's specs.
            targets: the target's specs; None for a target that takes any name.

        Raises:
            PlanError: as `check_fits`.
        """
        self.check_fits(sources, targets)
        unused = {skip.name: skip for skip in self.unused}
        mismatched = tuple(
            pair
            for pair in self.mismatched
            if pair.source in sources and (targets is None or pair.name in targets)
        )
        used = {item.source for item in self.items} | {pair.source for pair in mismatched}
        taken = {item.target for item in self.items} | {pair.name for pair in mismatched}
        missing = {skip.name: skip for skip in self.missing}
        return replace(
            self,
            mismatched=mismatched,
            unused=tuple(
                Unused(
                    name=name,
                    dtype=spec.dtype,
                    shape=spec.known_shape,
                    reason=unused[name].reason if name in unused else Reason.NOT_INCLUDED,
                    detail=unused[name].detail if name in unused else _NOT_PLANNED,
                )
                for name, spec in in_order(sources)
                if name not in used
            ),
            missing=tuple(
                Missing(
                    name=name,
                    dtype=spec.dtype,
                    shape=spec.shape,
                    reason=missing[name].reason if name in missing else Reason.NOT_CHOSEN,
                    detail=missing[name].detail if name in missing else _NOT_PLANNED,
                )
                for name, spec in in_order(targets or {})
                if name not in taken
            ),
        )

    def check_demands(self, *, strict: bool, allow_empty: bool) -> None:
        """Check that the plan does what is demanded of it.

        Args:
            strict: no variable may be missing, and no tensor lack its variable.
            allow_empty: a plan that restores nothing will do.

        Raises:
            PlanError: it does not.
        """
        faults = []
        if not self.items and not allow_empty:
            faults.append("the plan restores nothing; pass allow_empty=True if that is right")
        if strict:
            faults += [
                f"variable '{skip.name}': strict, and the plan restores nothing into it"
                for skip in self.missing
            ]
            faults += [
                f"tensor '{skip.name}': strict, and the target has no variable for it"
                for skip in self.unused
                if skip.reason is Reason.NO_VARIABLE
            ]
        if faults:
            raise PlanError("the plan does not do what is demanded:", faults)

    def __str__(self) -> str:
        """Return the plan as a table; repeated layers are folded."""
        rows = [
            ("restore", item.target, summary(item.target_dtype, item.target_shape), item.remark())
            for item in self.items
        ]
        rows += [
            ("mismatch", pair.name, summary(pair.target_dtype, pair.target_shape), pair.remark())
            for pair in self.mismatched
        ]
        rows += [
            ("initialize", skip.name, summary(skip.dtype, skip.shape), skip.remark())
            for skip in self.missing
        ]
        rows += [
            ("unused", skip.name, summary(skip.dtype, skip.shape), skip.remark())
            for skip in self.unused
        ]
        size = format_bytes(sum(item.nbytes for item in self.items))
        counts = (
            f"{len(self.items)} restored ({size}), "
            f"{len(self.missing)} initialized, {len(self.unused)} unused, "
            f"{len(self.mismatched)} mismatched"
        )
        return "\n".join([*format_statuses(rows), *rules_legend(self.rules), counts])


def rules_legend(rules: Rules) -> list[str]:
    """Return a line for each rename, by the number under which tables name it."""
    return [
        f"rename {number}: {escaped(str(rule))}"
        for number, rule in enumerate(rules.rename, start=1)
    ]


def misfit(dtype: DType, shape: Shape, target: TensorSpec) -> Reason | None:
    """Return what keeps values of a dtype and shape out of a variable, None if they fit."""
    if target.shape is not None:
        if len(shape) != len(target.shape):
            return Reason.SHAPE
        if any(
            want is not None and have != want
            for have, want in zip(shape, target.shape, strict=True)
        ):
            return Reason.SHAPE
    return None if dtype is target.dtype else Reason.DTYPE


@lru_cache(maxsize=4096)
def summary(dtype: DType, shape: tuple[int | None, ...] | None) -> str:
    """Return dtype and shape in one word: `float32[3,4]`."""
    return f"{dtype}{format_shape(shape)}"


def _item_to_dict(item: RestoreItem) -> dict[str, object]:
    return {
        "source": item.source,
        "target": item.target,
        "dtype": item.dtype.value,
        "shape": list(item.shape),
        "target_dtype": item.target_dtype.value,
        "target_shape": list(item.target_shape),
        "rule": item.rule,
        "transforms": [transform_to_dict(transform) for transform in item.transforms],
    }


def _plan_from_dict(data: dict[str, object]) -> RestorePlan:
    if data["version"] != _JSON_VERSION:
        raise ValueError(f"version {data['version']!r}, {_JSON_VERSION} is expected")

    def rows(key: str) -> list[dict[str, object]]:
        value = data[key]
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise TypeError(f"{key} is no list of objects")
        return value

    rules = data["rules"]
    if not isinstance(rules, dict):
        raise TypeError("rules is no object")
    return RestorePlan(
        rules=Rules.from_dict(rules),
        items=tuple(
            RestoreItem(
                source=_text(row, "source"),
                target=_text(row, "target"),
                dtype=DType(_text(row, "dtype")),
                shape=_shape(row, "shape"),
                target_dtype=DType(_text(row, "target_dtype")),
                target_shape=_shape(row, "target_shape"),
                rule=None if row["rule"] is None else _text(row, "rule"),
                transforms=tuple(transform_from_dict(t) for t in _objects(row, "transforms")),
            )
            for row in rows("items")
        ),
        unused=tuple(
            Unused(
                name=_text(row, "name"),
                dtype=DType(_text(row, "dtype")),
                shape=_shape(row, "shape"),
                reason=Reason(_text(row, "reason")),
                detail=_text(row, "detail"),
            )
            for row in rows("unused")
        ),
        missing=tuple(
            Missing(
                name=_text(row, "name"),
                dtype=DType(_text(row, "dtype")),
                shape=_open_shape(row, "shape"),
                reason=Reason(_text(row, "reason")),
                detail=_text(row, "detail"),
            )
            for row in rows("missing")
        ),
        mismatched=tuple(
            Mismatch(
                source=_text(row, "source"),
                name=_text(row, "name"),
                dtype=DType(_text(row, "dtype")),
                shape=_shape(row, "shape"),
                target_dtype=DType(_text(row, "target_dtype")),
                target_shape=_open_shape(row, "target_shape"),
                reason=Reason(_text(row, "reason")),
            )
            for row in rows("mismatched")
        ),
    )


def _check_sound(plan: RestorePlan) -> None:
    """Check what holds for every plan that was made here, and may not where one was edited.

    Raises:
        ValueError: a variable stands in it twice, or an item contradicts its transforms.
    """
    seen: set[str] = set()
    for name in (
        *(item.target for item in plan.items),
        *(pair.name for pair in plan.mismatched),
        *(skip.name for skip in plan.missing),
    ):
        if name in seen:
            raise ValueError(f"variable '{name}' stands in it twice")
        seen.add(name)
    for item in plan.items:
        made = transformed_spec(item.transforms, item.dtype, item.shape)
        if made != (item.target_dtype, item.target_shape):
            raise ValueError(
                f"variable '{item.target}' is {summary(item.target_dtype, item.target_shape)}, "
                f"and {summary(*made)} would go into it"
            )


def _text(row: Mapping[str, object], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is {value!r}, text is expected")
    return value


def _shape(row: Mapping[str, object], key: str) -> Shape:
    value = row[key]
    if isinstance(value, list) and all(type(dim) is int and dim >= 0 for dim in value):
        return tuple(value)
    raise TypeError(f"{key} is {value!r}, a shape is expected")


def _open_shape(row: Mapping[str, object], key: str) -> tuple[int | None, ...] | None:
    value = row[key]
    if value is None:
        return None
    if isinstance(value, list) and all(
        dim is None or (type(dim) is int and dim >= 0) for dim in value
    ):
        return tuple(value)
    raise TypeError(f"{key} is {value!r}, a shape is expected")


def _objects(row: Mapping[str, object], key: str) -> list[dict[str, object]]:
    value = row[key]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    raise TypeError(f"{key} is {value!r}, a list of objects is expected")
