"""Names of the weights in Keras's files: from places in a file to the names that people know.

A legacy file lists the names of its weights, and that is all there is to know. The newer files
(`.weights.h5`, `.keras`) know places: `layers/dense_1/vars/0` is the first variable of the second
`Dense` in the list of layers, whatever that layer is called. What it is called stands in the
attribute `name` of `vars` (Keras 3) or in the configuration beside the weights (`.keras`), and
which of a layer's variables comes first is known for the layers that Keras itself has:

    layers/dense_1/vars/0                     head/kernel
    layers/lstm/cell/vars/1                   lstm/lstm_cell/recurrent_kernel
    layers/sequential/layers/conv2d/vars/1    encoder/conv1/bias

The name is that of Keras's `variable.path`, without the name of the model as a whole (tf_keras
leaves out the names of models inside it as well). A variable of a layer that is not known keeps its
number (`attention_block/0`); one of a layer whose name the file does not tell keeps its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compat_restore.tensors import DType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compat_restore.tensors import Shape

__all__ = ["Layer", "class_of_name", "layers_of_config", "variable_names"]

_KERNEL_BIAS = (("kernel",), ("kernel", "bias"))
_RECURRENT = (("kernel", "recurrent_kernel"), ("kernel", "recurrent_kernel", "bias"))
_SCALED = (("gamma", "beta"),)

# The variables of Keras's layers, in the order in which they are stored, by class in snake case,
# where their number alone tells which they are.
_VARIABLES: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(
        (
            "dense",
            "einsum_dense",
            *(f"conv{rank}d" for rank in (1, 2, 3)),
            *(f"conv{rank}d_transpose" for rank in (1, 2, 3)),
        ),
        _KERNEL_BIAS,
    ),
    **dict.fromkeys(
        ("separable_conv1d", "separable_conv2d"),
        (
            ("depthwise_kernel", "pointwise_kernel"),
            ("depthwise_kernel", "pointwise_kernel", "bias"),
        ),
    ),
    **dict.fromkeys(
        ("batch_normalization", "sync_batch_normalization"),
        (("moving_mean", "moving_variance"), ("gamma", "beta", "moving_mean", "moving_variance")),
    ),
    **dict.fromkeys(("layer_normalization", "group_normalization"), _SCALED),
    "embedding": (("embeddings",),),
    "rms_normalization": (("scale",),),
    "p_re_lu": (("alpha",),),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "simple_rnn_cell", "conv_lstm_cell"),
        _RECURRENT,
    ),
}
_DEPTHWISE = ("depthwise_conv1d", "depthwise_conv2d")
_RECURRENT_LAYERS = ("lstm", "gru", "simple_rnn")
_ATTENTION = {
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
}
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
_NUMBERED = re.compile(r"_[0-9]+$")
_VARIABLE = re.compile(r"(?:(?P<owner>.+)/)?vars/[0-9]{1,9}")
_FLOATS = (DType.float16, DType.bfloat16, DType.float32, DType.float64)


@dataclass(frozen=True, slots=True)
class Layer:
    """What is known of a layer.

    Attributes:
        kind: its class in snake case; "" if unknown.
        name: what it is called; "" if unknown.
        parts: its own layers, by the way to them inside it: `layers/dense_1`, `cell`.
        flags: what its configuration says of the variables that it has: `center`, `scale`.
    """

    kind: str = ""
    name: str = ""
    parts: Mapping[str, Layer] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


def snake_case(name: str) -> str:
    """Return a class's name as Keras writes it into paths: `batch_normalization`."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def class_of_name(part: str) -> str:
    """Return the class of a layer that carries its class's name and perhaps a number, or ""."""
    kind = _NUMBERED.sub("", part)
    known = kind in _VARIABLES or kind in _DEPTHWISE or kind in _RECURRENT_LAYERS
    return kind if known or kind in ("multi_head_attention", "bidirectional") else ""


def layers_of_config(config: object) -> Layer:
    """Return the tree of layers that a model's configuration describes."""
    if not isinstance(config, dict):
        return Layer()
    kind = snake_case(_text(config.get("class_name")))
    inner = config.get("config")
    if not isinstance(inner, dict):
        return Layer(kind)
    parts: dict[str, Layer] = {}
    members = inner.get("layers")
    times: dict[str, int] = {}
    for member in members if isinstance(members, list) else []:
        layer = layers_of_config(member)
        # Keras tells members of a list apart by their class and how many of it came before.
        count = times[layer.kind] = times.get(layer.kind, -1) + 1
        part = f"{layer.kind}_{count}" if count else layer.kind
        for container in _CONTAINERS:
            parts[f"{container}/{part}"] = layer
    for key, part in (
        ("layer", "layer"),
        ("layer", "forward_layer"),
        ("backward_layer", "backward_layer"),
        ("cell", "cell"),
    ):
        if isinstance(inner.get(key), dict):
            parts[part] = _wrapped(kind, part, layers_of_config(inner[key]))
    if kind == "bidirectional" and "layer" in parts and "backward_layer" not in parts:
        parts["backward_layer"] = _wrapped(kind, "backward_layer", layers_of_config(inner["layer"]))
    flags = {key: value for key, value in inner.items() if isinstance(value, bool)}
    return Layer(kind, _text(inner.get("name")), parts, flags)


def _wrapped(kind: str, part: str, layer: Layer) -> Layer:
    """Return a layer inside a wrapper, which gives the two of a `Bidirectional` new names."""
    direction = part.removesuffix("_layer")
    if kind != "bidirectional" or direction == "layer" or layer.name.startswith(f"{direction}_"):
        return layer
    return Layer(layer.kind, f"{direction}_{layer.name}", layer.parts, layer.flags)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def variable_names(
    places: Mapping[str, tuple[DType, Shape]],
    told: Mapping[str, str],
    model: Layer | None,
    *,
    keras3: bool,
) -> dict[str, tuple[str, ...]]:
    """Return the names of variables, best first, by their places in a file, where they are known.

    Args:
        places: dtype and shape of the variables, by place: `layers/dense/vars/0`.
        told: the names of layers that the file tells, by place: `layers/dense`; the model's is "".
        model: the layers as the configuration describes them.
        keras3: whether Keras 3 wrote the file (which gave some variables other names).
    """
    owners: dict[str, list[str]] = {}
    for place in places:
        if match := _VARIABLE.fullmatch(place):
            owners.setdefault(match["owner"] or "", []).append(place)
    names: dict[str, tuple[str, ...]] = {}
    for owner, members in owners.items():
        if not owner:
            continue  # the model's own variables: nothing tells their names
        chain, layer = _chain(owner, told, model)
        if chain is None:
            continue
        members.sort(key=lambda place: int(place.rpartition("/")[2]))
        specs = [places[place] for place in members]
        own = _own_names(layer, specs, keras3=keras3)
        for number, place in enumerate(members):
            last = own[number] if own else place.rpartition("/")[2]
            full = "/".join((*(name for name, _ in chain), last))
            short = "/".join((*(name for name, is_model in chain if not is_model), last))
            names[place] = (full,) if keras3 else tuple(dict.fromkeys((short, full)))
    return names


def _chain(
    owner: str, told: Mapping[str, str], model: Layer | None
) -> tuple[list[tuple[str, bool]] | None, Layer]:
    """Return (name, whether it is a model) of the layers on the way to a place; the layer there.

    None in place of the names if one of them is not known.
    """
    parts = owner.split("/")
    chain: list[tuple[str, bool]] = []
    layer = model or Layer()
    begin = 0
    while begin < len(parts):
        for end in range(begin + 1, len(parts) + 1):
            step = "/".join(parts[begin:end])
            place = "/".join(parts[:end])
            found = layer.parts.get(step) or _implied(step, layer)
            if found is not None or place in told:
                break
        else:
            return None, layer
        name = told.get(place) or (found.name if found else "")
        kind = found.kind if found else _kind_of(parts[begin:end], name)
        if not name:
            return None, layer
        layer = found if found and found.kind else Layer(kind, name)
        chain.append((name, any(part.startswith(_CONTAINERS) for part in layer.parts)))
        begin = end
    return chain, layer


def _implied(step: str, above: Layer) -> Layer | None:
    """Return a layer that another makes for itself, always under the same name."""
    attribute = step.lstrip("_")
    if attribute == "cell" and above.kind in _RECURRENT_LAYERS:
        return Layer(f"{above.kind}_cell", f"{above.kind}_cell")
    if attribute in _ATTENTION and above.kind == "multi_head_attention":
        return Layer("einsum_dense", _ATTENTION[attribute])
    return None


def _kind_of(step: Sequence[str], name: str) -> str:
    """Return the class of a layer that the configuration does not describe, "" if unsure."""
    if len(step) > 1:  # in a list, whose members are called by their classes
        return _NUMBERED.sub("", step[-1])
    return class_of_name(name)


def _own_names(
    layer: Layer, specs: Sequence[tuple[DType, Shape]], *, keras3: bool
) -> tuple[str, ...]:
    """Return the names of a layer's variables in their order; none if they are not sure."""
    known = _VARIABLES.get(layer.kind, ())
    if layer.kind in _DEPTHWISE:
        first = "kernel" if keras3 else "depthwise_kernel"
        known = ((first,), (first, "bias"))
    elif (
        layer.kind in ("batch_normalization", "layer_normalization", "group_normalization")
        and {
            "center",
            "scale",
        }
        <= layer.flags.keys()
    ):
        own = [n for flag, n in (("scale", "gamma"), ("center", "beta")) if layer.flags[flag]]
        if layer.kind == "batch_normalization":
            own += ["moving_mean", "moving_variance"]
        known = (tuple(own),)
    for names in known:
        if len(names) == len(specs) and _fit(names, specs):
            return names
    return ()


def _fit(names: Sequence[str], specs: Sequence[tuple[DType, Shape]]) -> bool:
    """Whether the shapes are those that variables of these names have to one another."""
    if any(dtype not in _FLOATS for dtype, _ in specs):
        return False  # quantised layers store more, and in another order
    shapes = [shape for _, shape in specs]
    if names[0] in ("gamma", "beta", "moving_mean"):
        return all(shape == shapes[0] for shape in shapes)
    if "recurrent_kernel" in names:
        return len(shapes[1]) >= 2 and shapes[0][-1:] == shapes[1][-1:]
    if names[0] in ("kernel", "depthwise_kernel", "embeddings") and len(shapes[0]) < 2:
        return False
    return names[-1] != "bias" or 0 < len(shapes[-1]) < len(shapes[0])
