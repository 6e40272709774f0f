"""Making a plan: which tensor goes into which variable, and what becomes of all the rest.

`plan_restore` is a pure function of the specs of a checkpoint, the specs of a target, and rules.
It touches no file and no TensorFlow.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compat_restore.errors import PlanError, RuleError, nearest
from compat_restore.names import Role, RoleKind, classify, sort_key
from compat_restore.restore_plan import (
    Mismatch,
    Missing,
    Reason,
    RestoreItem,
    RestorePlan,
    Unused,
    misfit,
    summary,
)
from compat_restore.rules import Rules, compiled
from compat_restore.tensors import DType, TensorSpec, element_count
from compat_restore.transforms import transformed_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat_restore.tensors import Shape

__all__ = ["plan_restore"]

_MOST_SUGGESTIONS = 20


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
            reason = misfit(dtype, shape, wanted) if wanted else None
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


def _mismatch_message(
    name: str, dtype: DType, shape: Shape, spec: TensorSpec, reason: Reason
) -> str:
    """Say what differs, and which options would settle it."""
    there = f"'{spec.name}' " if spec.name != name else ""
    message = (
        f"tensor '{name}': checkpoint has {summary(dtype, shape)}, variable {there}has "
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


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _examples(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(f"'{name}'" for name in listed[:3])
    return f"{shown}, ... {len(listed)} in all" if len(listed) > 3 else shown
