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

__all__ = ["load_function", "quiet", "template_of"]


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
        with quiet():
            module = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        cause = "the current directory is searched too" if missing else "importing it failed"
        raise UsageError(
            f"model {reference!r}: {type(error).__name__}: {error}; {cause}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"model {reference!r}: the module has no function {function_name!r}")
    made: Callable[[], object] = function
    return made


@contextmanager
def quiet() -> Iterator[None]:
    """Keep TensorFlow's start-up messages, which native code writes to stderr, off the terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def template_of(model: Callable[[], object]) -> Iterator[CheckpointReader]:
    """Make the model, write its checkpoint to a temporary directory, and open that.

    The checkpoint is `tf.train.Checkpoint(model=...)` of what the function returns, or that itself
    if it is a `tf.train.Checkpoint`.

    Raises:
        MissingDependencyError: TensorFlow is not installed.
        TargetError: the function returns nothing that has variables, or a model that is not built.
    """
    try:
        with quiet():
            import tensorflow as tf
    except ImportError as error:
        raise MissingDependencyError(
            "making a model needs TensorFlow: pip install 'compat_restore[tensorflow]'; a template "
            "(into=, --into) needs none"
        ) from error
    try:
        made = model()
    except Exception as error:
        raise UsageError(
            f"the function that makes the model failed, called without arguments: "
            f"{type(error).__name__}: {error}"
        ) from error
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
