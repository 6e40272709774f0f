r"""Bring the weights of TensorFlow 1 checkpoints into today's code, and know what became of each.

One plan says which tensor goes into which variable and what becomes of the rest; it is carried
out in a TF1 session, in TF2 objects, or from file to file:

    import compat_restore as cr

    rules = cr.Rules(include=[r"encoder/.*"], rename=[(r"encoder/(.*)", r"backbone/\1")])
    report = cr.restore_session(sess, "model.ckpt", rules)   # then initialise only the rest
    report = cr.restore_objects(model, "model.ckpt", rules)  # tf_keras, Keras 3, tf.Module, ...
    report = cr.convert("model.ckpt", "out/model.ckpt", rules)
    print(report)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compat_restore.checkpoint import CheckpointReader, open_checkpoint
    from compat_restore.comparison import Comparison, diff
    from compat_restore.conversion import convert
    from compat_restore.errors import (
        CheckpointFormatError,
        CheckpointNotFoundError,
        CompatRestoreError,
        DamagedCheckpointError,
        DamagedTensorsError,
        FaultsError,
        InitializationError,
        InputError,
        MissingDependencyError,
        OutputError,
        PlanError,
        PreservationError,
        RuleError,
        TargetError,
        TensorNotFoundError,
        UsageError,
    )
    from compat_restore.fleet import FleetReport, convert_all
    from compat_restore.planner import plan_restore
    from compat_restore.planning import plan
    from compat_restore.report import RestoreReport
    from compat_restore.restore import restore_objects, restore_session
    from compat_restore.restore_plan import RestorePlan
    from compat_restore.rules import Rename, Rules
    from compat_restore.targets.initialization import (
        initialize_uninitialized,
        uninitialized_variables,
    )
    from compat_restore.targets.objects import ObjectTarget
    from compat_restore.targets.session import SessionTarget
    from compat_restore.tensors import DType, TensorSpec, digest
    from compat_restore.transforms import Cast, Reshape, Transpose
    from compat_restore.verification import Verification, verify_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Cast",
    "CheckpointFormatError",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "Comparison",
    "CompatRestoreError",
    "DType",
    "DamagedCheckpointError",
    "DamagedTensorsError",
    "FaultsError",
    "FleetReport",
    "InitializationError",
    "InputError",
    "MissingDependencyError",
    "ObjectTarget",
    "OutputError",
    "PlanError",
    "PreservationError",
    "Rename",
    "Reshape",
    "RestorePlan",
    "RestoreReport",
    "RuleError",
    "Rules",
    "SessionTarget",
    "TargetError",
    "TensorNotFoundError",
    "TensorSpec",
    "Transpose",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "convert_all",
    "diff",
    "digest",
    "initialize_uninitialized",
    "open_checkpoint",
    "plan",
    "plan_restore",
    "restore_objects",
    "restore_session",
    "uninitialized_variables",
    "verify_checkpoint",
]

# Where each name lives: imported when it is first used, so that the command line and the file work
# do not pay for what they do not touch.
_HOME = {
    "MissingDependencyError": "compat_restore.errors",
    "FaultsError": "compat_restore.errors",
    "UsageError": "compat_restore.errors",
    "Cast": "compat_restore.transforms",
    "CheckpointFormatError": "compat_restore.errors",
    "CheckpointNotFoundError": "compat_restore.errors",
    "CheckpointReader": "compat_restore.checkpoint",
    "CompatRestoreError": "compat_restore.errors",
    "Comparison": "compat_restore.comparison",
    "DType": "compat_restore.tensors",
    "DamagedCheckpointError": "compat_restore.errors",
    "DamagedTensorsError": "compat_restore.errors",
    "InitializationError": "compat_restore.errors",
    "InputError": "compat_restore.errors",
    "ObjectTarget": "compat_restore.targets.objects",
    "OutputError": "compat_restore.errors",
    "PlanError": "compat_restore.errors",
    "PreservationError": "compat_restore.errors",
    "Rename": "compat_restore.rules",
    "Reshape": "compat_restore.transforms",
    "RestorePlan": "compat_restore.restore_plan",
    "RestoreReport": "compat_restore.report",
    "RuleError": "compat_restore.errors",
    "Rules": "compat_restore.rules",
    "SessionTarget": "compat_restore.targets.session",
    "TargetError": "compat_restore.errors",
    "TensorNotFoundError": "compat_restore.errors",
    "TensorSpec": "compat_restore.tensors",
    "Transpose": "compat_restore.transforms",
    "FleetReport": "compat_restore.fleet",
    "convert": "compat_restore.conversion",
    "convert_all": "compat_restore.fleet",
    "diff": "compat_restore.comparison",
    "digest": "compat_restore.tensors",
    "initialize_uninitialized": "compat_restore.targets.initialization",
    "open_checkpoint": "compat_restore.checkpoint",
    "plan": "compat_restore.planning",
    "plan_restore": "compat_restore.planner",
    "restore_objects": "compat_restore.restore",
    "restore_session": "compat_restore.restore",
    "verify_checkpoint": "compat_restore.verification",
    "Verification": "compat_restore.verification",
    "uninitialized_variables": "compat_restore.targets.initialization",
}


def __getattr__(name: str) -> object:
    """Import a public name from where it lives.

    Raises:
        AttributeError: there is no such name.
    """
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
