"""`compat-restore demo`: the whole line once, on a checkpoint that it makes itself."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat_restore.conversion import convert
from compat_restore.errors import MissingDependencyError
from compat_restore.restore import restore_objects, restore_session
from compat_restore.rules import Rules
from compat_restore.targets.template import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compat_restore.tensors import Array

__all__ = ["run"]

_CLASSES, _NEW_CLASSES, _LAYERS = 10, 3, 3
_BACKBONE = Rules(include=[r"net/block.*"], drop_slots=True)
_TO_KERAS = _BACKBONE.replace(rename=[(r"net/(.*)", r"\1")])


def run(arguments: Sequence[str]) -> int:
    """Show the trap and the ways around it; return the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore demo",
        description="Make a TF1 checkpoint, add a new head, show what global_variables_initializer "
        "does to loaded weights, then restore in TF1 and TF2 and convert, with reports.",
    )
    parser.add_argument("--keep", metavar="DIR", help="keep the files there")
    args = parser.parse_args(arguments)
    tf = _tensorflow()
    with _folder(args.keep) as folder:
        checkpoint = str(folder / "pretrained" / "model.ckpt")
        trained = _train(tf, checkpoint)
        chosen = {n: v for n, v in trained.items() if n.startswith("net/block") and "Adam" not in n}
        _title("The checkpoint")
        _say(
            f"A TF1 program trained a small network and saved {len(trained)} variables. Its "
            f"{len(chosen)} backbone weights\nare wanted in a program with a new head."
        )
        lost = _naive(tf, checkpoint, chosen)
        held, report = _sound(tf, checkpoint, chosen)
        same_objects, objects = _keras(tf, checkpoint, chosen)
        same_files, files = _converted(tf, checkpoint, folder, chosen)
        count = len(chosen)
        _title("The trap: Saver.restore, then global_variables_initializer()")
        _say(f"{count - lost} of {count} weights are still those of the checkpoint.")
        _title("The rules: what is wanted")
        _say(_BACKBONE.to_toml().rstrip())
        _title("TF1: compat_restore.restore_session(sess, checkpoint, rules)")
        _say(f"{held} of {count} weights are those of the checkpoint, byte for byte.\n")
        _say(str(report))
        _title("TF2: compat_restore.restore_objects(keras_model, checkpoint, rules with a rename)")
        _say(f"{same_objects} of {count} weights are those of the checkpoint, byte for byte.\n")
        _say(str(objects))
        _title("Files: compat_restore.convert, then tf.train.Checkpoint(model=m).restore")
        _say(f"{same_files} of {count} weights are those of the checkpoint, byte for byte.\n")
        _say(str(files))
        if args.keep:
            _say(f"\nThe files are in {folder}")
        _say("\nNext: migration_guide/index.md shows each of these as code to copy.")
    good = lost == count and held == same_objects == same_files == count
    return 0 if good else 1


def _tensorflow() -> Any:  # the module has no types
    """Import TensorFlow without its start-up messages.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with quiet():
            import tensorflow as tf

            tf.zeros(())  # the first op prints the rest
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs TensorFlow ({error}): pip install 'compat_restore[tensorflow]'"
        ) from error
    return tf


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is not None:
        folder = Path(keep)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="compat-restore-demo-") as temporary:
        yield Path(temporary)


def _network(tf: Any, classes: int, head: str) -> tuple[Any, Any]:
    """Build a small classifier with TF1's variables; return its input and logits."""
    v1 = tf.compat.v1
    features = v1.placeholder(tf.float32, [None, 8])
    layer = features
    with v1.variable_scope("net"):
        for number in range(_LAYERS):
            with v1.variable_scope(f"block{number}"):
                kernel = v1.get_variable("kernel", [8, 8])
                bias = v1.get_variable("bias", [8], initializer=tf.zeros_initializer())
                layer = tf.nn.relu(tf.matmul(layer, kernel) + bias)
    with v1.variable_scope(head):
        kernel = v1.get_variable("kernel", [8, classes])
        logits = tf.matmul(layer, kernel) + v1.get_variable("bias", [classes])
    return features, logits


def _train(tf: Any, checkpoint: str) -> Mapping[str, Array]:
    """Train a network for two steps and save it as TF1 programs do; return its variables."""
    import numpy as np

    v1 = tf.compat.v1
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        v1.set_random_seed(1)
        features, logits = _network(tf, _CLASSES, "net/logits")
        loss = tf.reduce_mean(tf.square(logits - 1.0))
        step = v1.train.AdamOptimizer().minimize(loss, v1.train.get_or_create_global_step())
        session.run(v1.global_variables_initializer())
        batch = np.random.default_rng(0).normal(size=(16, 8))
        for _ in range(2):
            session.run(step, {features: batch})
        v1.train.Saver().save(session, checkpoint)
        variables = v1.global_variables()
        return dict(zip([v.op.name for v in variables], session.run(variables), strict=True))


def _naive(tf: Any, checkpoint: str, chosen: Mapping[str, Array]) -> int:
    """Restore, then initialise everything; return how many weights are lost."""
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        v1.set_random_seed(2)
        _network(tf, _NEW_CLASSES, "head")
        backbone = v1.global_variables("net/block")
        v1.train.Saver(backbone).restore(session, checkpoint)
        session.run(v1.global_variables_initializer())
        return len(chosen) - _same(_session_values(session, backbone), chosen)


def _sound(tf: Any, checkpoint: str, chosen: Mapping[str, Array]) -> tuple[int, object]:
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        v1.set_random_seed(2)
        _network(tf, _NEW_CLASSES, "head")
        report = restore_session(session, checkpoint, _BACKBONE)
        values = _session_values(session, v1.global_variables("net/block"))
        return _same(values, chosen), report


def _model() -> Any:
    """Make the Keras twin of the network, with a new head and names of its own."""
    import keras

    layers = [
        keras.layers.Dense(8, activation="relu", name=f"block{number}") for number in range(_LAYERS)
    ]
    inputs = keras.Input((8,))
    outputs = inputs
    for layer in [*layers, keras.layers.Dense(_NEW_CLASSES, name="head")]:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="twin")


def _keras(tf: Any, checkpoint: str, chosen: Mapping[str, Array]) -> tuple[int, object]:
    del tf
    model = _model()
    report = restore_objects(model, checkpoint, _TO_KERAS)
    return _same(_model_values(model), chosen), report


def _converted(
    tf: Any, checkpoint: str, folder: Path, chosen: Mapping[str, Array]
) -> tuple[int, object]:
    destination = str(folder / "converted" / "ckpt")
    report = convert(checkpoint, destination, _TO_KERAS, model=_model, overwrite=True)
    model = _model()
    tf.train.Checkpoint(model=model).restore(destination).expect_partial()
    return _same(_model_values(model), chosen), report


def _session_values(session: Any, variables: Sequence[Any]) -> dict[str, Array]:
    return dict(zip([v.op.name for v in variables], session.run(list(variables)), strict=True))


def _model_values(model: Any) -> dict[str, Array]:
    return {f"net/{variable.path}": variable.numpy() for variable in model.variables}


def _same(values: Mapping[str, Array], chosen: Mapping[str, Array]) -> int:
    """Return how many of the chosen weights have the bytes that they had when saved.

    A bias that was trained is not zero, so that a freshly initialised one never counts.
    """
    return sum(values[name].tobytes() == wanted.tobytes() for name, wanted in chosen.items())


def _title(text: str) -> None:
    sys.stdout.write(f"\n== {text}\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
