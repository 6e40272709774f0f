"""Rules: which tensors of a checkpoint are wanted, and under which names.

One set of rules serves every target. A pattern is a regular expression that must match a *whole*
name (`re.fullmatch`): `head` does not match `head_norm`, and `layer_1` does not match `layer_10`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from compat_restore.errors import FaultsError, RuleError, UsageError, nearest
from compat_restore.names import canonical_name
from compat_restore.transforms import Transform, transform_from_dict, transform_to_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from os import PathLike

    Replacement: TypeAlias = str | tuple[str, ...] | None
    RulesLike: TypeAlias = "Rules | Mapping[str, object] | str | PathLike[str] | None"

__all__ = [
    "InvalidRulesError",
    "Rename",
    "RuleMatcher",
    "Rules",
    "TransformRule",
    "any_match",
    "as_rules",
    "compiled",
    "first_match",
    "matches",
]

_SPECIAL = frozenset(".^$*+?{}[]|()\\")
_RULES_KEYS = ("include", "exclude", "rename", "transform", "drop_slots", "allow_unmatched")


@dataclass(frozen=True, slots=True)
class Rename:
    r"""Give the tensors whose whole name matches `pattern` another name.

    Attributes:
        pattern: a regular expression for the name in the checkpoint.
        to: the new name, with back-references as in `re.sub` (`\1`, `\g<scope>`); several names
            to restore one tensor into several variables; None to drop the tensor.
    """

    pattern: str
    to: Replacement

    def names(self, name: str) -> tuple[str, ...] | None:
        """Return the new names of `name`: none if it is dropped, None if it does not match."""
        match = compiled(self.pattern).fullmatch(name)
        if match is None:
            return None
        if isinstance(self.to, str):
            return (match.expand(self.to),)
        return tuple(match.expand(replacement) for replacement in self.to or ())

    def __str__(self) -> str:
        if self.to is None:
            return f"{self.pattern} dropped"
        return f"{self.pattern} = {self.to if isinstance(self.to, str) else ', '.join(self.to)}"


@dataclass(frozen=True, slots=True)
class TransformRule:
    """Transform the tensors whose whole name in the checkpoint matches `pattern`."""

    pattern: str
    transforms: tuple[Transform, ...]


@dataclass(frozen=True, slots=True, init=False)
class Rules:
    r"""Which tensors to restore, and into which variables.

    Rules see the names of the checkpoint. A tensor is wanted if an `include` pattern matches it
    (all are, if there is none) and no `exclude` pattern does. It goes into the variable that the
    first matching `rename` names, or else into the one of its own name.

        Rules(
            include=[r"MobilenetV1/.*"],
            exclude=[r".*/Logits/.*"],
            rename=[(r"MobilenetV1/(.*)", r"backbone/\1")],
        )

    Attributes:
        include: patterns; empty for all.
        exclude: patterns.
        rename: in the order tried.
        transform: in the order tried; the first that matches a name decides.
        drop_slots: leave out optimizer slots, moving averages and optimizer bookkeeping.
        allow_unmatched: a rule that matches nothing is no error.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    rename: tuple[Rename, ...]
    transform: tuple[TransformRule, ...]
    drop_slots: bool
    allow_unmatched: bool

    def __init__(
        self,
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        rename: Mapping[str, str | Iterable[str] | None]
        | Iterable[Rename | tuple[str, str | Iterable[str] | None]] = (),
        transform: Mapping[str, Transform | Iterable[Transform]]
        | Iterable[TransformRule | tuple[str, Transform | Iterable[Transform]]] = (),
        *,
        drop_slots: bool = False,
        allow_unmatched: bool = False,
    ) -> None:
        """Make rules; a single pattern may stand for a list of one, a mapping for its items.

        Raises:
            FaultsError: patterns or replacements that are not valid; all are listed.
        """
        renames = rename.items() if isinstance(rename, AnyMapping) else rename
        transforms = transform.items() if isinstance(transform, AnyMapping) else transform
        put = object.__setattr__
        put(self, "include", _patterns("include", include))
        put(self, "exclude", _patterns("exclude", exclude))
        put(self, "rename", tuple(_rename(entry) for entry in renames))
        put(self, "transform", tuple(_transform_rule(entry) for entry in transforms))
        put(self, "drop_slots", drop_slots)
        put(self, "allow_unmatched", allow_unmatched)
        self._check()

    def _check(self) -> None:
        faults = []
        patterns: tuple[object, ...] = (
            *self.include,
            *self.exclude,
            *(rule.pattern for rule in self.rename),
            *(rule.pattern for rule in self.transform),
        )
        for pattern in patterns:
            if not isinstance(pattern, str):
                faults.append(f"the pattern {pattern!r} is no text; write it as a string")
                continue
            try:
                compiled(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                faults.append(
                    f"{pattern!r} is no regular expression: {error}; a literal name is written "
                    "with re.escape"
                )
        for rule in self.rename:
            if isinstance(rule.pattern, str) and isinstance(rule.to, str | tuple):
                faults += _replacement_faults(rule)
        if faults:
            raise InvalidRulesError("the rules are not valid:", faults)

    @property
    def is_plain(self) -> bool:
        """Whether these want every tensor, under its own name, as it is."""
        return self == Rules(allow_unmatched=self.allow_unmatched)

    def targets_of(self, name: str) -> tuple[tuple[str, ...], int | None]:
        """Return (names of the variables for a wanted tensor, number of the rename that decided).

        The number is None where no rename matches and the tensor keeps its name.
        """
        return RuleMatcher(self).targets_of(name)

    def transforms_of(self, name: str) -> tuple[Transform, ...]:
        """Return the transforms for a tensor, none unless a rule says so."""
        return RuleMatcher(self).transforms_of(name)

    def replace(self, **changes: object) -> Rules:
        """Return rules that differ in the given attributes."""
        return replace(self, **changes)  # type: ignore[arg-type]  # __init__ checks them

    @classmethod
    def from_assignment_map(cls, assignment_map: Mapping[str, object]) -> Rules:
        """Compile a TensorFlow-style `assignment_map` into rules.

        As `tf.compat.v1.train.init_from_checkpoint` reads it: `"scope/": "other/"` for all that
        stands below a scope (`"/"` for all there is), `"name": "other"` or `"name": variable` for
        one tensor, `"name": [parts]` for a partitioned variable. What the map does not name is not
        restored. Where a scope and a name in it are both named, the longer key decides.

        Raises:
            RuleError: a key or value cannot be understood; a scope is mapped to a single name.
        """
        include, rename = [], []
        for key in assignment_map:
            if not isinstance(key, str):
                raise RuleError(
                    f"assignment map: the key {key!r} is no name; the keys are names in the "
                    "checkpoint, the values variables or their names"
                )
        for key, value in sorted(assignment_map.items(), key=lambda item: -len(item[0])):
            target = _assigned_name(key, value)
            if key.endswith("/"):
                if not target.endswith("/") and target:
                    raise RuleError(
                        f"assignment map: scope {key!r} is mapped to {target!r}, no scope; "
                        f"write {target + '/'!r}"
                    )
                source = "" if key == "/" else re.escape(key)
                prefix = "" if target == "/" else _literal_replacement(target)
                include.append(f"{source}.*")
                rename.append((f"{source}(.*)", f"{prefix}\\1"))
            else:
                if target.endswith("/"):
                    raise RuleError(
                        f"assignment map: tensor {key!r} is mapped to the scope {target!r}; "
                        f"write {key + '/'!r} if a scope is meant"
                    )
                include.append(re.escape(key))
                rename.append((re.escape(key), _literal_replacement(target)))
        return cls(include=include, rename=rename)

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> Rules:
        """Read rules from a TOML file; `to_toml` shows its form.

        Raises:
            FileNotFoundError: there is no such file.
            RuleError: it is not TOML, or says something that rules do not have.
        """
        import sys

        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib

        with open(path, "rb") as file:
            try:
                data = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise RuleError(
                    f"rules file '{os.fspath(path)}' is not TOML: {error}; patterns with "
                    "backslashes go between single quotes"
                ) from None
        try:
            return cls.from_dict(data)
        except InvalidRulesError as error:
            summary = f"rules file '{os.fspath(path)}': {error.summary}"
            raise InvalidRulesError(summary, error.faults) from None
        except RuleError as error:
            raise RuleError(f"rules file '{os.fspath(path)}': {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Rules:
        """Return the rules that `to_dict` (or a rules file) describes.

        Raises:
            RuleError: something is not as rules have it.
        """
        for key in data:
            if key not in _RULES_KEYS:
                near = nearest(key, _RULES_KEYS)
                raise RuleError(
                    f"{key!r} is not known; "
                    + (f"did you mean {near[0]!r}?" if near else f"known are {list(_RULES_KEYS)}")
                )
        return cls(
            include=_texts(data, "include"),
            exclude=_texts(data, "exclude"),
            rename=[_rename_from_dict(entry) for entry in _tables(data, "rename")],
            transform=[_transform_rule_from_dict(entry) for entry in _tables(data, "transform")],
            drop_slots=_flag(data, "drop_slots"),
            allow_unmatched=_flag(data, "allow_unmatched"),
        )

    def to_dict(self) -> dict[str, object]:
        """Return the rules as plain data, without what is at its default."""
        data: dict[str, object] = {}
        if self.include:
            data["include"] = list(self.include)
        if self.exclude:
            data["exclude"] = list(self.exclude)
        if self.drop_slots:
            data["drop_slots"] = True
        if self.allow_unmatched:
            data["allow_unmatched"] = True
        if self.rename:
            data["rename"] = [_rename_to_dict(rule) for rule in self.rename]
        if self.transform:
            data["transform"] = [
                {"match": rule.pattern, "apply": [transform_to_dict(t) for t in rule.transforms]}
                for rule in self.transform
            ]
        return data

    def to_toml(self) -> str:
        """Return the text of a rules file that says the same."""
        import json

        lines, tables = [], []
        for key, value in self.to_dict().items():
            if key in ("rename", "transform"):
                assert isinstance(value, list)
                for entry in value:
                    tables.append(f"\n[[{key}]]")
                    tables += [f"{name} = {_toml(item)}" for name, item in entry.items()]
            elif isinstance(value, list):
                lines.append(f"{key} = [{', '.join(_toml(item) for item in value)}]")
            else:
                lines.append(f"{key} = {json.dumps(value)}")
        return "\n".join([*lines, *tables]) + "\n"


class RuleMatcher:
    """Rules made ready to decide on many names, since rules made of names can be thousands."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.first_include = first_match(rules.include)
        self.first_exclude = first_match(rules.exclude)
        self._first_rename = first_match([rule.pattern for rule in rules.rename])
        self._first_transform = first_match([rule.pattern for rule in rules.transform])

    def targets_of(self, name: str) -> tuple[tuple[str, ...], int | None]:
        """Return what `Rules.targets_of` does."""
        number = self._first_rename(name)
        if number is None:
            return (name,), None
        return self._rules.rename[number].names(name) or (), number

    def transforms_of(self, name: str) -> tuple[Transform, ...]:
        """Return what `Rules.transforms_of` does."""
        number = self._first_transform(name)
        return () if number is None else self._rules.transform[number].transforms


class InvalidRulesError(RuleError, FaultsError):
    """Several faults in one set of rules."""


def as_rules(rules: RulesLike) -> Rules:
    """Return the `Rules` that somebody means who passes rules, a map, a path or None.

    Raises:
        UsageError: it is none of these.
        RuleError: the rules are not valid.
    """
    if rules is None:
        return Rules()
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, AnyMapping):
        return Rules.from_assignment_map(rules)
    if isinstance(rules, str | os.PathLike):
        if not os.path.exists(rules):
            raise RuleError(
                f"rules '{os.fspath(rules)}': a string is the path of a rules file, and there is "
                "none; patterns are passed as Rules(include=[...])"
            )
        return Rules.from_toml(rules)
    raise UsageError(
        f"rules are {type(rules).__name__}; Rules, a RestorePlan, an assignment map, the path of a "
        "rules file, or None, are expected"
    )


_cache: dict[str, re.Pattern[str]] = {}


def compiled(pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern.

    Raises:
        re.error: it is no regular expression.
    """
    # `re` keeps 512 patterns; rules made of names can be thousands.
    found = _cache.get(pattern)
    if found is None:
        found = _cache[pattern] = re.compile(pattern)
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name."""
    return compiled(pattern).fullmatch(name) is not None


def any_match(pattern: str, names: Collection[str]) -> bool:
    """Whether a pattern matches any of some names, which are looked up where it is one itself."""
    literal = _literal(pattern)
    if literal is not None:
        return literal in names
    return any(matches(pattern, name) for name in names)


def first_match(patterns: Sequence[str]) -> Callable[[str], int | None]:
    """Return a function that gives the number of the first pattern that matches a name.

    Patterns that are plain names, of which there can be thousands, are looked up.
    """
    literals: dict[str, int] = {}
    others: list[tuple[int, re.Pattern[str]]] = []
    for number, pattern in enumerate(patterns):
        literal = _literal(pattern)
        if literal is None:
            others.append((number, compiled(pattern)))
        else:
            literals.setdefault(literal, number)
    if not others:
        return literals.get

    def first(name: str) -> int | None:
        exact = literals.get(name)
        for number, pattern in others:
            if exact is not None and number > exact:
                break
            if pattern.fullmatch(name):
                return number
        return exact

    return first


def _literal(pattern: str) -> str | None:
    """Return the only name that a pattern matches, None if it is more than a name."""
    if not _SPECIAL & set(pattern):
        return pattern
    name = re.sub(r"\\([^0-9A-Za-z])", r"\1", pattern)
    return name if re.escape(name) == pattern else None


def _patterns(kind: str, patterns: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        return (patterns,)
    if isinstance(patterns, Iterable):
        return tuple(patterns)
    raise RuleError(f"{kind}: a pattern or a list of patterns is expected, not {patterns!r}")


def _rename(entry: Rename | tuple[str, str | Iterable[str] | None]) -> Rename:
    if isinstance(entry, Rename):
        return entry
    pattern, to = _pair("rename", entry, "a pair (pattern, new name)")
    if to is None or isinstance(to, str):
        return Rename(pattern, to)
    if isinstance(to, Iterable):
        names = tuple(to)
        if all(isinstance(name, str) for name in names):
            return Rename(pattern, names)
    raise RuleError(
        f"rename {pattern!r}: the new name is {to!r}; a name, a list of names, or None, which "
        "drops the tensor, is expected"
    )


def _transform_rule(
    entry: TransformRule | tuple[str, Transform | Iterable[Transform]],
) -> TransformRule:
    from compat_restore.transforms import Cast, Reshape, Transpose

    if isinstance(entry, TransformRule):
        return entry
    pattern, steps = _pair("transform", entry, "a pair (pattern, transform)")
    if isinstance(steps, Transpose | Reshape | Cast):
        return TransformRule(pattern, (steps,))
    if isinstance(steps, Iterable):
        transforms = tuple(steps)
        if all(isinstance(step, Transpose | Reshape | Cast) for step in transforms):
            return TransformRule(pattern, transforms)
    raise RuleError(
        f"transform {pattern!r}: {steps!r} is no transform; Transpose, Reshape or Cast, or a list "
        "of them, is expected"
    )


def _pair(kind: str, entry: object, expected: str) -> tuple[str, object]:
    """Return the two halves of a rule; a string is none, though it may have two letters."""
    if isinstance(entry, list | tuple) and len(entry) == 2:
        return entry[0], entry[1]
    raise RuleError(f"{kind} {entry!r}: {expected} is expected, in a list or a mapping")


def _replacement_faults(rule: Rename) -> list[str]:
    try:
        groups = compiled(rule.pattern).groups
    except (re.error, RecursionError, OverflowError):
        return []  # told already
    replacements = (rule.to,) if isinstance(rule.to, str) else rule.to or ()
    faults = []
    for text in replacements:
        if not text:
            faults.append(
                f"rename {rule.pattern!r}: the new name is empty; None (on the command line: "
                "nothing after the '=') drops the tensor"
            )
        try:
            # `sub` checks its template against the groups of the pattern before it searches.
            compiled(rule.pattern).sub(text, "")
        except (re.error, IndexError) as error:
            faults.append(
                f"rename {rule.pattern!r}: the new name {text!r} is not valid: {error} (the "
                f"pattern has {groups} groups)"
            )
    if not replacements:
        faults.append(f"rename {rule.pattern!r}: no new name; None drops the tensor")
    return faults


def _literal_replacement(text: str) -> str:
    """Return a replacement that stands for `text` itself."""
    return text.replace("\\", r"\\")


def _assigned_name(key: str, value: object) -> str:
    """Return the name that a value of an assignment map stands for."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value:
        info = getattr(value[0], "_save_slice_info", None)
        if info is not None:
            return str(info.full_name)
        value = value[0] if len(value) == 1 else value
    name = getattr(value, "path", None) or getattr(value, "name", None)
    if isinstance(name, str):
        return canonical_name(name)
    raise RuleError(
        f"assignment map: {key!r} is mapped to {type(value).__name__}; a name, a scope that ends "
        "in '/', a variable or the list of a partitioned variable's parts is expected"
    )


def _all_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _all_dicts(value: object) -> TypeGuard[list[dict[str, object]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _texts(data: Mapping[str, object], key: str) -> list[str]:
    value = data.get(key, [])
    if isinstance(value, str):
        return [value]
    if _all_texts(value):
        return value
    raise RuleError(f"{key}: a list of patterns is expected, not {value!r}")


def _tables(data: Mapping[str, object], key: str) -> list[dict[str, object]]:
    value = data.get(key, [])
    if _all_dicts(value):
        return value
    raise RuleError(f"{key}: [[{key}]] tables are expected, not {value!r}")


def _flag(data: Mapping[str, object], key: str) -> bool:
    value = data.get(key, False)
    if isinstance(value, bool):
        return value
    raise RuleError(f"{key}: true or false is expected, not {value!r}")


def _rename_from_dict(data: Mapping[str, object]) -> Rename:
    match dict(data):
        case {"from": str(pattern), "to": str(to), **rest} if not rest:
            return Rename(pattern, to)
        case {"from": str(pattern), "to": list(names), **rest} if not rest and _all_texts(names):
            return Rename(pattern, tuple(names))
        case {"from": str(pattern), "drop": True, **rest} if not rest:
            return Rename(pattern, None)
    raise RuleError(
        f"rename {dict(data)!r}: from = 'pattern' with to = 'new name' (or a list of them), or "
        "with drop = true, is expected"
    )


def _rename_to_dict(rule: Rename) -> dict[str, object]:
    if rule.to is None:
        return {"from": rule.pattern, "drop": True}
    return {"from": rule.pattern, "to": rule.to if isinstance(rule.to, str) else list(rule.to)}


def _transform_rule_from_dict(data: Mapping[str, object]) -> TransformRule:
    match dict(data):
        case {"match": str(pattern), "apply": list(steps), **rest} if not rest and _all_dicts(
            steps
        ):
            return TransformRule(pattern, tuple(transform_from_dict(step) for step in steps))
        case {"match": str(pattern), **single} if len(single) == 1:
            return TransformRule(pattern, (transform_from_dict(single),))
    raise RuleError(
        f"transform {dict(data)!r}: match = 'pattern' with one transform (transpose = [1, 0]), or "
        "with apply = [a list of them], is expected"
    )


def _toml(value: object) -> str:
    r"""Return a TOML value; strings between single quotes where they can, so that \ stays \."""
    import json

    if isinstance(value, str):
        if "'" not in value and value.isprintable():
            return f"'{value}'"
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    raise TypeError(type(value))
