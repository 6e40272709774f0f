"""A template from a model function: the checkpoint of the freshly made model."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compat_restore.checkpoint import open_checkpoint
from compat_restore.errors import MissingDependencyError, TargetError, UsageError
from compat_restore.targets.objects import ObjectTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compat_restore.checkpoint import CheckpointReader

__all__ = ["load_function", "template_of"]


def load_function(reference: str) -> Callable[[], object]:
    """Return the function that `package.module:function` names.

    The current directory is on the path, as it is for `python -m`.

    Raises:
        UsageError: there is no such module or function.
    """
    module_name, separator, function_name = reference.partition(":")
    if not separator or not module_name or not function_name:
        raise UsageError(
            f"model {reference!r}: a module and a function are expected, 'package.module:function'"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"model {reference!r}: {error}; the current directory is searched too"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"model {reference!r}: the module has no function {function_name!r}")
    made: Callable[[], object] = function
    return made


@contextmanager
def template_of(model: Callable[[], object]) -> Iterator[CheckpointReader]:
    """Make the model, write its checkpoint to a temporary directory, and open that.

    The checkpoint is `tf.train.Checkpoint(model=...)` of what the function returns, or that itself
    if it is a `tf.train.Checkpoint`.

    Raises:
        MissingDependencyError: TensorFlow is not installed.
        TargetError: the function returns nothing that has variables, or a model that is not built.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages among the results
    try:
        import tensorflow as tf
    except ImportError as error:
        raise MissingDependencyError(
            "making a model needs TensorFlow: pip install 'compat_restore[tensorflow]'; a template "
            "(into=, --into) needs none"
        ) from error
    made = model()
    if isinstance(made, tf.train.Checkpoint):
        checkpoint = made
    else:
        ObjectTarget(made)
        try:
            checkpoint = tf.train.Checkpoint(model=made)
        except ValueError as error:
            raise TargetError(
                f"{type(made).__name__} cannot stand in a tf.train.Checkpoint: {error}"
            ) from error
    with (
        tempfile.TemporaryDirectory() as folder,
        open_checkpoint(checkpoint.write(os.path.join(folder, "template"))) as reader,
    ):
        yield reader
