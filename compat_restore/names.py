"""The grammar of variable names: canonical names, and which names are slots or bookkeeping.

TensorFlow 1 keeps an optimizer's slots, moving averages and counters beside the weights, told
apart by their names alone. Names lie (`dense_1/kernel_1` is a weight), so a name is taken for a
slot only where the variable that it would belong to is there too, with the same shape.
"""

from __future__ import annotations

import enum
import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat_restore.tensors import TensorSpec

    _AnyShape = tuple[int | None, ...] | None

__all__ = [
    "OBJECT_GRAPH_KEY",
    "Role",
    "RoleKind",
    "canonical_name",
    "classify",
    "in_order",
    "sort_key",
    "without_model_name",
]

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


class RoleKind(str, enum.Enum):
    """What a checkpoint's tensor is for."""

    VARIABLE = "variable"
    SLOT = "slot"
    AVERAGE = "average"
    BOOKKEEPING = "bookkeeping"
    COPY = "copy"
    CONTAINER = "container"

    def __str__(self) -> str:
        return self.value


class Role(NamedTuple):
    """What a tensor is for.

    Attributes:
        kind: a variable; an optimizer's slot or a moving average of one; bookkeeping (counters,
            powers of beta, the global step); a second copy of a variable, as SavedModels hold; or
            a part of the container itself (the object graph).
        owner: the variable that a slot, average or copy belongs to.
        slot: which slot it is: `Adam_1`, `m`, `ExponentialMovingAverage`.
    """

    kind: RoleKind
    owner: str | None = None
    slot: str | None = None


_VARIABLE = Role(RoleKind.VARIABLE)
_BOOKKEEPING_ROLE = Role(RoleKind.BOOKKEEPING)

# Slot names that TensorFlow's optimizers, and the best known others, give. A custom optimizer's
# slots carry the name that it was made with: recognised where it says "optimizer". (Words and not
# regular expressions, which took a tenth of the start-up to compile.)
_NUMBERED_SLOTS = frozenset(
    [
        "Adam",
        "AdamW",
        "Adamax",
        "Nadam",
        "AdaMax",
        "Momentum",
        "RMSProp",
        "Adagrad",
        "AdagradDA",
        "ProximalAdagrad",
        "Adadelta",
        "Ftrl",
        "LARS",
        "LAMB",
        "GradientDescent",
        "SGD",
    ]
)
# The last two, Adafactor's factored moments, have their own shapes and are not met here.
_SLOTS = frozenset(
    [
        "adam_m",
        "adam_v",
        "lamb_m",
        "lamb_v",
        "momentum",
        "accumulator",
        "linear",
        "gradient_accumulator",
        "vr",
        "vc",
    ]
)
_ZERO_DEBIAS = ("biased", "local_step")
_BOOKKEEPING = frozenset(
    ("global_step", "local_step", "current_loss_scale", "good_steps", "loss_scale", "save_counter")
)
_NUMBERED_BOOKKEEPING = ("beta1_power", "beta2_power")
# Deeper names are hostile ones; looking for their owners would take time without end.
_MOST_SCOPES = 100
_NUMBER = re.compile(r"([0-9]+)")


def canonical_name(name: str) -> str:
    """Return a variable's name as checkpoints have it: without the ":0" of its output tensor."""
    return name.removesuffix(":0")


def sort_key(name: str) -> str:
    """Return a key that sorts `layer_2` before `layer_10`.

    It is the name with the size of each number before its digits, and a character before that
    which is less than any of a name: a string, since those are compared fastest.
    """
    # Scopes and layers are in many names: each is taken apart once.
    return "/".join(map(_part_key, name.split("/")))


@lru_cache(maxsize=1 << 14)
def _part_key(part: str) -> str:
    pieces = _NUMBER.split(part)
    for at in range(1, len(pieces), 2):
        digits = pieces[at].lstrip("0")
        pieces[at] = f"\0{chr(min(len(digits), sys.maxunicode))}{digits}"
    return "".join(pieces)


def without_model_name(names: Iterable[str]) -> dict[str, str]:
    """Return the weights' names without the name of their model, if they begin with one.

    Keras 3 puts the name of a model before those of its layers, numbered by itself
    (`sequential_3/fc/kernel`). A first part is taken for that if all have it, and two parts remain.

    Args:
        names: of all weights of one object.
    """
    members = list(names)
    if len({name.partition("/")[0] for name in members}) != 1:
        return {}
    if any(name.count("/") < 2 for name in members):
        return {}
    return {name: name.partition("/")[2] for name in members}


def in_order(specs: Mapping[str, TensorSpec]) -> list[tuple[str, TensorSpec]]:
    """Return specs in the order in which plans list names."""
    return sorted(specs.items(), key=lambda pair: sort_key(pair[0]))


def classify(specs: Mapping[str, TensorSpec]) -> dict[str, Role]:
    """Return the role of each tensor of a name-based checkpoint, by name, in the order given."""
    roles = {}
    for name, spec in specs.items():
        scope, separator, last = name.rpartition("/")
        kind = _told_by(last) if separator else None
        # Nearly all are variables, which their last part tells.
        if kind is None and spec.shape != ():
            roles[name] = _VARIABLE
        else:
            roles[name] = _role(spec, scope, last, kind, specs)
    if OBJECT_GRAPH_KEY in specs:
        roles[OBJECT_GRAPH_KEY] = Role(RoleKind.CONTAINER)
    return roles


@lru_cache(maxsize=1024)
def _told_by(last: str) -> RoleKind | None:
    """Return what a name may be by its last part, of which there are few different ones."""
    stem = _without_number(last)
    if (
        stem == "ExponentialMovingAverage"
        or last in ("MovingAverage", *_ZERO_DEBIAS)
        or (last.endswith("EMA") and _is_word(last))
    ):
        return RoleKind.AVERAGE
    if (
        stem in _NUMBERED_SLOTS
        or last in _SLOTS
        or (stem.endswith("Optimizer") and _is_word(stem))
        or (last.endswith("_momentum") and last != "_momentum" and _is_word(last))
    ):
        return RoleKind.SLOT
    return None


def _without_number(word: str) -> str:
    """Return `Adam` for `Adam_1`: the number tells apart what would have one name."""
    stem, separator, number = word.rpartition("_")
    return stem if separator and number.isdecimal() else word


def _is_word(text: str) -> bool:
    """Whether there are letters, digits and underscores alone."""
    return text.replace("_", "a").isalnum()


def _is_bookkeeping(scope: str, last: str) -> bool:
    if last in _BOOKKEEPING or _without_number(last) in _NUMBERED_BOOKKEEPING:
        return True
    below_step = scope.rpartition("/")[2] == "global_step"
    return below_step and (not last or _is_word(last))


def _without_part(name: str) -> str:
    """Return a variable's name without the number of a partition: `w` for `w/part_0`."""
    whole, separator, number = name.rpartition("/part_")
    return whole if separator and number.isdecimal() else name


def _role(
    spec: TensorSpec,
    scope: str,
    last: str,
    kind: RoleKind | None,
    specs: Mapping[str, TensorSpec],
) -> Role:
    if kind is not None and scope.count("/") < _MOST_SCOPES:
        find = _averaged if last in _ZERO_DEBIAS else _owner
        owner = find(scope, last, spec.shape, specs)
        if owner:
            return Role(kind, owner, last)
    if spec.shape == () and _is_bookkeeping(scope, last):
        return _BOOKKEEPING_ROLE
    return _VARIABLE


def _owner(scope: str, _: str, shape: _AnyShape, specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the variable that the slot `scope`/... belongs to, if it is there in the same shape.

    Three ways in which slots were named: under the variable; under the variable in further outer
    scopes (`train/net/w/RMSProp`, `net/net/w/Adam`); and under the variable and a cut-short copy
    of its name (`dnn/logits/biases/ogits/biases/part_0/RMSProp`).
    """
    inner = scope
    while True:
        found = specs.get(inner)
        if found is not None and found.shape == shape:
            return inner
        whole = _without_part(inner)
        found = specs.get(whole)
        if found is not None and found.shape == shape:
            return whole
        _, separator, inner = inner.partition("/")
        if not separator:
            break
    outer = scope
    while True:
        outer, separator, _ = outer.rpartition("/")
        if not separator:
            return None
        found = specs.get(outer)
        if found is not None and found.shape == shape and _repeats(scope[len(outer) + 1 :], outer):
            return outer


def _repeats(copy: str, variable: str) -> bool:
    """Whether `copy`, without a partition's suffix, is the end of the variable's own name."""
    return variable.endswith(_without_part(copy))


def _averaged(
    scope: str, last: str, shape: _AnyShape, specs: Mapping[str, TensorSpec]
) -> str | None:
    """Return the average that `X/X/average/biased` or `.../local_step` corrects."""
    inner = scope
    while True:
        found = specs.get(inner)
        if found is not None and (found.shape == shape or last == "local_step"):
            return inner
        _, separator, inner = inner.partition("/")
        if not separator:
            return None
