"""`compat-restore convert`: write chosen tensors of a checkpoint to a new one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compat_restore.cli.options import (
    add_conversion_options,
    add_rule_options,
    conversion_options_from,
    rules_from,
)
from compat_restore.cli.output import write, write_json
from compat_restore.conversion import convert

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_EXAMPLES = r"""examples:
  weights alone, under another scope, as a TF1 checkpoint:
    compat-restore convert model.ckpt out/model.ckpt --drop-slots \
        --rename 'MobilenetV1/(.*)=backbone/\1'
  into the object-based checkpoint of a freshly made TF2 model, without its code:
    compat-restore convert model.ckpt out/ckpt --rules rules.toml --into fresh/ckpt-1
  for other tools, and into the weights file of a Keras model:
    compat-restore convert model.ckpt out/model.safetensors --max-shard-size 2GB
    compat-restore convert model.ckpt out.weights.h5 --rules rules.toml --into fresh.weights.h5
  see what would happen:
    compat-restore convert model.ckpt out/model.ckpt --exclude '.*/Logits/.*' --dry-run
"""


def run(arguments: Sequence[str]) -> int:
    """Convert a checkpoint; return the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore convert",
        description="Write chosen tensors of a checkpoint to a new one. The name of DST says the "
        "format: .safetensors, .npz, .weights.h5, .h5 or .keras at its end; any other name is the "
        "prefix of a V2 checkpoint: name-based (TensorFlow 1's Saver and TensorFlow 2 restore it "
        "by names), or with an object-based --into, or --model, object-based "
        "(tf.train.Checkpoint(model=m).restore(DST) restores it).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a prefix, one of a checkpoint's files, a directory, or a SavedModel",
    )
    parser.add_argument("destination", metavar="DST", help="the name of the new checkpoint")
    add_rule_options(parser)
    add_conversion_options(parser, model=True)
    args = parser.parse_args(arguments)
    model = None
    if args.model is not None:
        from compat_restore.targets.template import load_function

        model = load_function(args.model)
    report = convert(
        args.source,
        args.destination,
        rules_from(args),
        model=model,
        **conversion_options_from(args),
    )
    if args.json:
        write_json(report.to_json())
    else:
        write(report.to_text(full=args.full))
    return 0
