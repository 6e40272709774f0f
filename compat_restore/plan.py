"""The plan: what goes where, and what becomes of all the rest.

`plan_restore` is a pure function of the specs of a checkpoint, the specs of a target, and rules.
It touches no file and no TensorFlow. The plan that it returns is frozen data in which every tensor
of the checkpoint and every variable of the target stands exactly once; it can be printed, saved,
read back in another process, and carried out there.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compat_restore.errors import PlanError, RuleError, nearest
from compat_restore.names import Role, RoleKind, classify, sort_key
from compat_restore.rules import Rules, compiled
from compat_restore.tables import escaped, format_bytes, format_statuses
from compat_restore.tensors import DType, TensorSpec, element_count, format_shape
from compat_restore.transforms import (
    Transform,
    transform_from_dict,
    transform_to_dict,
    transformed_spec,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat_restore.tensors import Shape

__all__ = [
    "Mismatch",
    "Missing",
    "Reason",
    "RestoreItem",
    "RestorePlan",
    "Unused",
    "plan_restore",
    "rules_legend",
]

_JSON_VERSION = 1
_NOT_PLANNED = "the plan does not name it"
_MOST_SUGGESTIONS = 20


class Reason(str, enum.Enum):
    """Why something is not restored."""

    NOT_INCLUDED = "not included"
    EXCLUDED = "excluded"
    DROPPED = "dropped"
    SLOT = "slot left out"
    CONTAINER = "part of the container"
    NO_VARIABLE = "no such variable"
    NOT_IN_CHECKPOINT = "not in the checkpoint"
    NOT_CHOSEN = "not chosen"
    SHAPE = "shape mismatch"
    DTYPE = "dtype mismatch"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreItem:
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
            remarks.append(_summary(self.dtype, self.shape))
            remarks += [str(transform) for transform in self.transforms]
        return ", ".join(remarks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
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
        return f"{self.reason}: the checkpoint has {_summary(self.dtype, self.shape)}"


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
            elif _misfit(item.target_dtype, item.target_shape, target):
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
                unused.get(name)
                or Unused(
                    name=name,
                    dtype=spec.dtype,
                    shape=spec.known_shape,
                    reason=Reason.NOT_INCLUDED,
                    detail=_NOT_PLANNED,
                )
                for name, spec in _in_order(sources)
                if name not in used
            ),
            missing=tuple(
                missing.get(name)
                or Missing(
                    name=name,
                    dtype=spec.dtype,
                    shape=spec.shape,
                    reason=Reason.NOT_CHOSEN,
                    detail=_NOT_PLANNED,
                )
                for name, spec in _in_order(targets or {})
                if name not in taken
            ),
        )

    def __str__(self) -> str:
        """Return the plan as a table; repeated layers are folded."""
        rows = [
            ("restore", item.target, _summary(item.target_dtype, item.target_shape), item.remark())
            for item in self.items
        ]
        rows += [
            ("mismatch", pair.name, _summary(pair.target_dtype, pair.target_shape), pair.remark())
            for pair in self.mismatched
        ]
        rows += [
            ("initialize", skip.name, _summary(skip.dtype, skip.shape), skip.remark())
            for skip in self.missing
        ]
        rows += [
            ("unused", skip.name, _summary(skip.dtype, skip.shape), skip.remark())
            for skip in self.unused
        ]
        size = format_bytes(sum(item.nbytes for item in self.items))
        summary = (
            f"{len(self.items)} restored ({size}), "
            f"{len(self.missing)} initialized, {len(self.unused)} unused, "
            f"{len(self.mismatched)} mismatched"
        )
        return "\n".join([*format_statuses(rows), *rules_legend(self.rules), summary])


def rules_legend(rules: Rules) -> list[str]:
    """Return a line for each rename, by the number under which tables name it."""
    return [
        f"rename {number}: {escaped(str(rule))}"
        for number, rule in enumerate(rules.rename, start=1)
    ]


def plan_restore(
    sources: Mapping[str, TensorSpec],
    targets: Mapping[str, TensorSpec] | None,
    rules: Rules | None = None,
    *,
    roles: Mapping[str, Role] | None = None,
    pairs: Mapping[str, str] | None = None,
    strict: bool = False,
    skip_mismatched: bool = False,
    allow_empty: bool = False,
) -> RestorePlan:
    """Decide which tensor goes into which variable, and what becomes of the rest.

    Args:
        sources: the checkpoint's tensors by name.
        targets: the target's variables by name; None for a target that takes whatever it is given
            (a new name-based checkpoint).
        rules: which tensors, under which names; all under their own names if None.
        roles: what each tensor is for; told from its name if None.
        pairs: variable by tensor, for what corresponds by something else than its name (the
            structure of objects); then a tensor that no rename decides goes there, or nowhere.
        strict: a variable that the checkpoint does not set, and a wanted tensor that no variable
            takes, are faults too.
        skip_mismatched: leave out pairs whose shape or dtype differs, rather than fail.
        allow_empty: a plan that restores nothing is no fault.

    Returns:
        The plan.

    Raises:
        PlanError: with every fault that was found: rules that match nothing, two tensors for one
            variable, shapes and dtypes that differ, a plan that restores nothing.
    """
    planner = _Planner(sources, targets, rules or Rules(), roles, pairs)
    return planner.plan(strict=strict, skip_mismatched=skip_mismatched, allow_empty=allow_empty)


class _Planner:
    """The state of one call of `plan_restore`."""

    def __init__(
        self,
        sources: Mapping[str, TensorSpec],
        targets: Mapping[str, TensorSpec] | None,
        rules: Rules,
        roles: Mapping[str, Role] | None,
        pairs: Mapping[str, str] | None,
    ) -> None:
        # In one order, whatever order the readers have: the same question has the same answer.
        self.sources = {name: sources[name] for name in sorted(sources)}
        self.targets = None if targets is None else {n: targets[n] for n in sorted(targets)}
        self.rules = rules
        self.roles = classify(sources) if roles is None else roles
        self.pairs = pairs
        self.aliases = _aliases(self.targets or {})
        self.faults: list[str] = []
        self.items: list[RestoreItem] = []
        self.unused: list[Unused] = []
        self.mismatched: list[Mismatch] = []
        self.left_out: dict[str, str] = {}  # what a left-out tensor's variable would have been
        self.takers: dict[str, list[str]] = {}  # variable -> tensors that rules send there
        self.suggestions = 0

    def plan(self, *, strict: bool, skip_mismatched: bool, allow_empty: bool) -> RestorePlan:
        renamed: dict[int, list[tuple[str, str | None]]] = {}
        for name in self.sources:
            skip = self._skipped(name)
            new_names, rule = self.rules.targets_of(name)
            if skip is None and not new_names:
                skip = (Reason.DROPPED, "" if rule is None else f"rename {rule + 1}")
            if skip is not None:
                self._leave_out(name, *skip)
                for _, target in self._found(name, new_names, rule):
                    if target is not None:
                        self.left_out.setdefault(target, f"{skip[0]}: '{name}'")
                continue
            found = self._found(name, new_names, rule, wanted=True)
            if rule is not None:
                renamed.setdefault(rule, []).extend(found)
            self._place(name, found, rule, skip_mismatched=skip_mismatched, strict=strict)
        self._check_collisions()
        self._check_rules(renamed)
        missing = self._missing(strict=strict)
        if not self.items and not allow_empty and not self.faults:
            self.faults.append(self._nothing())
        if self.faults:
            raise PlanError(
                f"no plan can be made, {_counted(len(self.faults), 'fault')}:", self.faults
            )
        return RestorePlan(
            rules=self.rules,
            items=tuple(sorted(self.items, key=lambda item: sort_key(item.target))),
            unused=tuple(sorted(self.unused, key=lambda skip: sort_key(skip.name))),
            missing=missing,
            mismatched=tuple(sorted(self.mismatched, key=lambda pair: sort_key(pair.name))),
        )

    def _skipped(self, name: str) -> tuple[Reason, str] | None:
        """Return why the rules leave a tensor out, None if it is wanted."""
        role = self.roles.get(name)
        if role and role.kind is RoleKind.CONTAINER:
            return Reason.CONTAINER, ""
        if self.rules.include and not any(_matches(p, name) for p in self.rules.include):
            return Reason.NOT_INCLUDED, ""
        for pattern in self.rules.exclude:
            if _matches(pattern, name):
                return Reason.EXCLUDED, f"exclude '{pattern}'"
        if self.rules.drop_slots and role and role.kind is not RoleKind.VARIABLE:
            return Reason.SLOT, "" if role.owner else str(role.kind)
        return None

    def _leave_out(self, name: str, reason: Reason, detail: str) -> None:
        spec = self.sources[name]
        self.unused.append(
            Unused(
                name=name, dtype=spec.dtype, shape=spec.known_shape, reason=reason, detail=detail
            )
        )

    def _found(
        self, name: str, new_names: tuple[str, ...], rule: int | None, *, wanted: bool = False
    ) -> list[tuple[str, str | None]]:
        """Return (new name, the variable that it means) for each new name of a tensor."""
        if rule is None and self.pairs is not None:
            return [(name, self.pairs.get(name))]
        return [(new, self._resolve(new, name if wanted else None)) for new in new_names]

    def _resolve(self, name: str, tensor: str | None = None) -> str | None:
        """Return the variable that a name means, None if there is none.

        Args:
            name: the variable's name, or an alias that it alone has.
            tensor: the tensor that is to go there; a name that means several variables is a fault.
        """
        if self.targets is None or name in self.targets:
            return name
        owners = self.aliases.get(name, ())
        if len(owners) > 1 and tensor is not None:
            self.faults.append(
                f"tensor '{tensor}': {len(owners)} variables go by the name '{name}', "
                + " and ".join(f"'{owner}'" for owner in owners)
                + "; rename it to the one that is meant, or to all of them"
            )
        return owners[0] if len(owners) == 1 else None

    def _place(
        self,
        name: str,
        found: list[tuple[str, str | None]],
        rule: int | None,
        *,
        skip_mismatched: bool,
        strict: bool,
    ) -> None:
        """Put a wanted tensor into each variable that was found for it."""
        spec = self.sources[name]
        there = list(dict.fromkeys(target for _, target in found if target is not None))
        if not there:
            names = ", ".join(f"'{new}'" for new, _ in found)
            self._leave_out(name, Reason.NO_VARIABLE, "" if rule is None else names)
            if strict:
                self.faults.append(
                    f"tensor '{name}': strict, and the target has no variable {names}"
                    + self._suggestion(found[0][0], self.targets or {})
                )
            return
        transforms = self.rules.transforms_of(name)
        try:
            dtype, shape = transformed_spec(transforms, spec.dtype, spec.known_shape)
        except RuleError as error:
            self.faults.append(f"tensor '{name}': {error}")
            return
        for target in there:
            self.takers.setdefault(target, []).append(name)
            wanted = self.targets[target] if self.targets is not None else None
            reason = _misfit(dtype, shape, wanted) if wanted else None
            if wanted and reason and skip_mismatched:
                self.mismatched.append(
                    Mismatch(
                        source=name,
                        name=target,
                        dtype=dtype,
                        shape=shape,
                        target_dtype=wanted.dtype,
                        target_shape=wanted.shape,
                        reason=reason,
                    )
                )
            elif wanted and reason:
                self.faults.append(_mismatch_message(name, dtype, shape, wanted, reason))
            else:
                self.items.append(
                    RestoreItem(
                        source=name,
                        target=target,
                        dtype=spec.dtype,
                        shape=spec.known_shape,
                        target_dtype=dtype,
                        target_shape=shape,
                        rule=self._decided_by(rule),
                        transforms=transforms,
                    )
                )

    def _decided_by(self, rule: int | None) -> str | None:
        if rule is not None:
            return f"rename {rule + 1}"
        return None if self.pairs is None else "same place"

    def _check_collisions(self) -> None:
        for target, names in self.takers.items():
            if len(names) > 1:
                self.faults.append(
                    f"variable '{target}': {len(names)} tensors would go into it, "
                    + " and ".join(f"'{name}'" for name in names)
                    + "; exclude all but one, or rename them apart"
                )

    def _check_rules(self, renamed: Mapping[int, list[tuple[str, str | None]]]) -> None:
        """Find rules that did nothing: a rule that nothing obeys is a misunderstanding."""
        if self.rules.allow_unmatched:
            return
        names = list(self.sources)
        patterns = [("include", pattern) for pattern in self.rules.include]
        patterns += [("exclude", pattern) for pattern in self.rules.exclude]
        patterns += [("transform", rule.pattern) for rule in self.rules.transform]
        patterns += [("rename", rule.pattern) for rule in self.rules.rename]
        unmatched = set()
        for kind, pattern in patterns:
            if not any(_matches(pattern, name) for name in names):
                unmatched.add((kind, pattern))
                self.faults.append(self._unmatched_message(kind, pattern))
        for number, rule in enumerate(self.rules.rename):
            if ("rename", rule.pattern) in unmatched:
                continue
            if rule.to is not None and (found := renamed.get(number)):
                count = 1 if isinstance(rule.to, str) else len(rule.to)
                for nth in range(count):  # of the new names of each tensor
                    new = found[nth][0]
                    if all(target is None for _, target in found[nth::count]):
                        self.faults.append(
                            f"rename '{rule}': {_counted(len(found) // count, 'tensor')} matched, "
                            f"but the target has no variable of the new name, such as '{new}'"
                            + self._suggestion(new, self.targets or {})
                        )
            elif self._shadowed(number):
                self.faults.append(
                    f"rename '{rule}': every name that it matches is decided by a rename before "
                    "it; put it first, or remove it"
                )

    def _shadowed(self, number: int) -> bool:
        pattern = self.rules.rename[number].pattern
        before = self.rules.rename[:number]
        return all(
            any(_matches(rule.pattern, name) for rule in before)
            for name in self.sources
            if _matches(pattern, name)
        )

    def _unmatched_message(self, kind: str, pattern: str) -> str:
        message = f"{kind} '{pattern}': it matches no name in the checkpoint"
        try:
            started = [name for name in self.sources if re.match(pattern, name)]
        except re.error:
            started = []
        if started:
            longer = f"{pattern}.*"
            if not _matches(longer, started[0]):
                longer = f"(?:{pattern}).*"
            return (
                f"{message}; a pattern must match a whole name, and '{longer}' would match "
                f"'{started[0]}'"
            )
        if pattern.endswith(":0"):
            return f'{message}; names in a checkpoint carry no ":0"'
        return message + self._suggestion(pattern, self.sources)

    def _suggestion(self, name: str, among: Iterable[str]) -> str:
        """Return "; did you mean ...?", for the first few faults (it costs time)."""
        self.suggestions += 1
        if self.suggestions > _MOST_SUGGESTIONS:
            return ""
        near = nearest(name, list(among))
        return "; did you mean " + " or ".join(f"'{n}'" for n in near) + "?" if near else ""

    def _missing(self, *, strict: bool) -> tuple[Missing, ...]:
        """Return the variables that nothing goes into."""
        if self.targets is None:
            return ()
        missing = []
        for name, spec in self.targets.items():
            if name in self.takers:
                continue
            left_out = self.left_out.get(name)
            missing.append(
                Missing(
                    name=name,
                    dtype=spec.dtype,
                    shape=spec.shape,
                    reason=Reason.NOT_CHOSEN if left_out else Reason.NOT_IN_CHECKPOINT,
                    detail=left_out or "",
                )
            )
            if strict:
                self.faults.append(
                    f"variable '{name}': strict, and nothing is restored into it"
                    + (f" ({left_out})" if left_out else self._suggestion(name, self.sources))
                )
        return tuple(sorted(missing, key=lambda skip: sort_key(skip.name)))

    def _nothing(self) -> str:
        """Say why nothing would be restored, with names from both sides."""
        if not self.sources:
            return "nothing would be restored: the checkpoint is empty"
        wanted = [skip.name for skip in self.unused if skip.reason is Reason.NO_VARIABLE]
        if self.mismatched:
            return (
                f"nothing would be restored: all {len(self.mismatched)} pairs that belong together "
                "differ in shape or dtype"
            )
        if not wanted:
            return "nothing would be restored: the rules leave out every tensor of the checkpoint"
        return (
            "nothing would be restored: no name in the checkpoint "
            f"({_examples(wanted)}) is the name of a variable ({_examples(self.targets or {})}); "
            "rename what differs, or pass allow_empty=True if nothing is right"
        )


def _in_order(specs: Mapping[str, TensorSpec]) -> list[tuple[str, TensorSpec]]:
    """Return specs in the order in which plans list names."""
    return sorted(specs.items(), key=lambda pair: sort_key(pair[0]))


def _matches(pattern: str, name: str) -> bool:
    return compiled(pattern).fullmatch(name) is not None


def _aliases(targets: Mapping[str, TensorSpec]) -> dict[str, tuple[str, ...]]:
    """Return the variables that go by each alias which is not some variable's own name."""
    owners: dict[str, tuple[str, ...]] = {}
    for name, spec in targets.items():
        for alias in spec.aliases:
            if alias not in targets:
                owners[alias] = (*owners.get(alias, ()), name)
    return owners


def _misfit(dtype: DType, shape: Shape, target: TensorSpec) -> Reason | None:
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


def _mismatch_message(
    name: str, dtype: DType, shape: Shape, spec: TensorSpec, reason: Reason
) -> str:
    """Say what differs, and which options would settle it."""
    there = f"'{spec.name}' " if spec.name != name else ""
    message = (
        f"tensor '{name}': checkpoint has {_summary(dtype, shape)}, variable {there}has "
        f"{spec.summary}; "
    )
    literal = re.escape(name)
    if reason is Reason.DTYPE:
        return message + (
            f"convert it with transform=[({literal!r}, Cast('{spec.dtype}'))], or exclude it with "
            f"exclude={literal!r}"
        )
    wanted = spec.shape or ()
    settle = f"exclude it with exclude={literal!r}, or leave out all such with skip_mismatched=True"
    if (
        None not in wanted
        and len(shape) == len(wanted)
        and sorted(shape) == sorted(dim for dim in wanted if dim is not None)
    ):
        return f"{message}transposed? say so with a Transpose rule; or {settle}"
    if None not in wanted and element_count(shape) == element_count(
        dim for dim in wanted if dim is not None
    ):
        return f"{message}the same number of elements: a Reshape rule would fit; or {settle}"
    return f"{message}a new head? {settle}"


def _summary(dtype: DType, shape: tuple[int | None, ...] | None) -> str:
    return f"{dtype}{format_shape(shape)}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _examples(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(f"'{name}'" for name in listed[:3])
    return f"{shown}, ... {len(listed)} in all" if len(listed) > 3 else shown


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
                f"variable '{item.target}' is {_summary(item.target_dtype, item.target_shape)}, "
                f"and {_summary(*made)} would go into it"
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
