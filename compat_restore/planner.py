"""Making a plan: which tensor goes into which variable, and what becomes of all the rest.

`plan_restore` is a pure function of the specs of a checkpoint, the specs of a target, and rules.
It touches no file and no TensorFlow.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

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
from compat_restore.rules import RuleMatcher, Rules, any_match, first_match, matches
from compat_restore.tensors import DType, TensorSpec, element_count
from compat_restore.transforms import transformed_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

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


class _Way(NamedTuple):
    """Where a name leads: to a variable, to several that go by it, or nowhere."""

    name: str
    target: str | None
    owners: tuple[str, ...] = ()
    by_alias: bool = False

    def without_alias(self) -> _Way:
        """Return the way without what it reaches by an alias."""
        return _Way(self.name, None) if self.by_alias else self


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
        self.matcher = RuleMatcher(rules)
        self.aliases = _aliases(self.targets or {})
        self.faults: list[str] = []
        self.items: list[RestoreItem] = []
        self.unused: list[Unused] = []
        self.mismatched: list[Mismatch] = []
        self.left_out: dict[str, str] = {}  # what a left-out tensor's variable would have been
        self.takers: dict[str, list[str]] = {}  # variable -> tensors that rules send there
        self.suggestions = 0

    def plan(self, *, strict: bool, skip_mismatched: bool, allow_empty: bool) -> RestorePlan:
        wanted: list[tuple[str, int | None, list[_Way]]] = []
        for name in self.sources:
            skip = self._skipped(name)
            if skip is not None and self.targets is None:
                self._leave_out(name, *skip)  # and no variable lacks it
                continue
            new_names, rule = self.matcher.targets_of(name)
            if skip is None and not new_names:
                skip = (Reason.DROPPED, "" if rule is None else f"rename {rule + 1}")
            ways = self._ways(name, new_names, rule)
            if skip is None:
                wanted.append((name, rule, ways))
                continue
            self._leave_out(name, *skip)
            for way in ways:
                if way.target is not None:
                    self.left_out.setdefault(way.target, f"{skip[0]}: '{name}'")
        renamed: dict[int, list[_Way]] = {}
        claimed = {way.target for _, _, ways in wanted for way in ways if not way.by_alias}
        for name, rule, all_ways in wanted:
            # A variable whose own name is called needs nobody who knows it by another.
            # What a rule sends there stays, and collides.
            ways = [
                way.without_alias() if rule is None and way.target in claimed else way
                for way in all_ways
            ]
            if rule is not None:
                renamed.setdefault(rule, []).extend(ways)
            self._place(name, ways, rule, skip_mismatched=skip_mismatched, strict=strict)
        self._check_collisions()
        self._check_rules(renamed)
        missing = self._missing(strict=strict)
        if not allow_empty and not self.faults and self._restores_nothing():
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
        if role and role.kind is RoleKind.COPY and name not in (self.pairs or ()):
            return Reason.COPY, f"'{role.owner}'"
        if self.rules.include and self.matcher.first_include(name) is None:
            return Reason.NOT_INCLUDED, ""
        number = self.matcher.first_exclude(name)
        if number is not None:
            return Reason.EXCLUDED, f"exclude '{self.rules.exclude[number]}'"
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

    def _ways(self, name: str, new_names: tuple[str, ...], rule: int | None) -> list[_Way]:
        """Return where each new name of a tensor leads."""
        if rule is None and self.pairs is not None:
            return [_Way(name, self.pairs.get(name))]
        ways = [self._way(new_name) for new_name in new_names]
        if rule is None and ways[0].target is None and not ways[0].owners:
            # By the name without that of its model, which may have another number today.
            for alias in self.sources[name].aliases:
                way = self._way(alias)
                if way.target is not None or way.owners:
                    return [_Way(name, way.target, way.owners, by_alias=True)]
        if "" in new_names:
            self.faults.append(
                f"tensor '{name}': rename {(rule or 0) + 1} gives it an empty name; None drops it"
            )
        return ways

    def _way(self, name: str) -> _Way:
        if self.targets is None or name in self.targets:
            return _Way(name, name)
        owners = self.aliases.get(name, ())
        return _Way(name, owners[0] if len(owners) == 1 else None, owners, by_alias=True)

    def _place(
        self,
        name: str,
        ways: list[_Way],
        rule: int | None,
        *,
        skip_mismatched: bool,
        strict: bool,
    ) -> None:
        """Put a wanted tensor into each variable that was found for it."""
        spec = self.sources[name]
        shape_stored = spec.known_shape
        for way in ways:
            if len(way.owners) > 1:
                self.faults.append(
                    f"tensor '{name}': {len(way.owners)} variables go by the name '{way.name}', "
                    + " and ".join(f"'{owner}'" for owner in way.owners)
                    + "; rename it to the one that is meant, or to all of them"
                )
        if len(ways) == 1:  # nearly always
            there = [] if ways[0].target is None else [ways[0].target]
        else:
            there = list(dict.fromkeys(way.target for way in ways if way.target is not None))
        if not there:
            names = ", ".join(f"'{way.name}'" for way in ways)
            self._leave_out(name, Reason.NO_VARIABLE, "" if rule is None else names)
            if strict:
                self.faults.append(
                    f"tensor '{name}': strict, and the target has no variable {names}"
                    + self._suggestion(ways[0].name, self.targets or {})
                )
            return
        transforms = self.matcher.transforms_of(name)
        try:
            dtype, shape = transformed_spec(transforms, spec.dtype, shape_stored)
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
                        shape=shape_stored,
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

    def _check_rules(self, renamed: Mapping[int, list[_Way]]) -> None:
        """Find rules that did nothing: a rule that nothing obeys is a misunderstanding."""
        if self.rules.allow_unmatched:
            return
        patterns = [("include", pattern) for pattern in self.rules.include]
        patterns += [("exclude", pattern) for pattern in self.rules.exclude]
        patterns += [("transform", rule.pattern) for rule in self.rules.transform]
        patterns += [("rename", rule.pattern) for rule in self.rules.rename]
        unmatched = set()
        for kind, pattern in patterns:
            if not any_match(pattern, self.sources):
                unmatched.add((kind, pattern))
                self.faults.append(self._unmatched_message(kind, pattern))
        transforms = [rule.pattern for rule in self.rules.transform]
        for number, pattern in enumerate(transforms):
            if ("transform", pattern) not in unmatched and self._shadowed(
                pattern, transforms[:number]
            ):
                self.faults.append(
                    f"transform '{pattern}': every name that it matches is decided by a "
                    "transform before it; put it first, or give one rule both transforms"
                )
        for number, rule in enumerate(self.rules.rename):
            if ("rename", rule.pattern) in unmatched:
                continue
            if rule.to is not None and (found := renamed.get(number)):
                count = 1 if isinstance(rule.to, str) else len(rule.to)
                for nth in range(count):  # of the new names of each tensor
                    new = found[nth].name
                    if all(way.target is None for way in found[nth::count]):
                        self.faults.append(
                            f"rename '{rule}': {_counted(len(found) // count, 'tensor')} matched, "
                            f"but the target has no variable of the new name, such as '{new}'"
                            + self._suggestion(new, self.targets or {})
                        )
            elif self._shadowed(
                rule.pattern, [other.pattern for other in self.rules.rename[:number]]
            ):
                self.faults.append(
                    f"rename '{rule}': every name that it matches is decided by a rename before "
                    "it; put it first, or remove it"
                )

    def _shadowed(self, pattern: str, before: Sequence[str]) -> bool:
        """Whether patterns before this one match all that it matches."""
        first = first_match(before)
        return bool(before) and all(
            first(name) is not None for name in self.sources if matches(pattern, name)
        )

    def _unmatched_message(self, kind: str, pattern: str) -> str:
        message = f"{kind} '{pattern}': it matches no name in the checkpoint"
        if pattern.endswith(":0"):
            return f'{message}; names in a checkpoint carry no ":0"'
        for longer in _longer_patterns(pattern):
            if found := next((name for name in self.sources if matches(longer, name)), None):
                return (
                    f"{message}; a pattern must match a whole name, and '{longer}' would match "
                    f"'{found}'"
                )
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

    def _restores_nothing(self) -> bool:
        """Whether nothing is restored, or counters and slots alone where weights were at hand."""
        if not self.items:
            return True
        if any(self._is_variable(item.source) for item in self.items):
            return False
        wanted = any(
            skip.reason is Reason.NO_VARIABLE and self._is_variable(skip.name)
            for skip in self.unused
        )
        roles = classify(self.targets or {})
        return wanted and any(
            roles[name].kind is RoleKind.VARIABLE for name in roles if name not in self.takers
        )

    def _is_variable(self, name: str) -> bool:
        role = self.roles.get(name)
        return role is None or role.kind in (RoleKind.VARIABLE, RoleKind.COPY)

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
        what = "nothing"
        if self.items:
            what = f"nothing but {_examples(item.target for item in self.items)}"
            wanted = [name for name in wanted if self._is_variable(name)]
        return (
            f"{what} would be restored: no name in the checkpoint "
            f"({_examples(wanted)}) is the name of a variable ({_examples(self.targets or {})}); "
            "rename what differs, or pass allow_empty=True (--allow-empty) if that is right"
        )


def _longer_patterns(pattern: str) -> Iterator[str]:
    """Yield what somebody may have meant: all below a scope, a glob, all that starts so."""
    if pattern.endswith("*"):
        yield f"{pattern[:-1]}.*"
    for whole in (pattern, f"(?:{pattern})"):
        yield f"{whole}/.*"
    for whole in (pattern, f"(?:{pattern})"):
        yield f"{whole}.*"
    yield f"(?i:{pattern})"


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
    settle = (
        f"exclude it with exclude={literal!r}, or leave out all such with "
        "skip_mismatched=True (--skip-mismatched)"
    )
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
