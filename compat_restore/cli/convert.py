"""`compat-restore convert`: write chosen tensors of a checkpoint to a new one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compat_restore.cli.options import add_rule_options, rules_from, size
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
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument(
        "--into",
        metavar="TEMPLATE",
        help="a checkpoint of the freshly made model, of any format: the new one is made like it, "
        "and what the rules do not set keeps its value",
    )
    form.add_argument(
        "--model", metavar="PACKAGE.MODULE:FUNCTION", help="a function that makes the model"
    )
    output.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    output.add_argument("--dry-run", action="store_true", help="write nothing, show the plan")
    output.add_argument("--json", action="store_true", help="the report as JSON")
    output.add_argument("--full", action="store_true", help="the report with a row for every name")
    output.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=size,
        help="begin another data file after this: 500MB, 2GiB (V2, safetensors)",
    )
    output.add_argument(
        "--keep-slices", action="store_true", help="keep partitioned variables partitioned"
    )
    output.add_argument(
        "--digests",
        action="store_true",
        help="read the new checkpoint back, and report the SHA-256 of each tensor",
    )
    output.add_argument(
        "--no-verify",
        action="store_true",
        help="copy without checking the bytes against their checksums",
    )
    faults = parser.add_argument_group("faults")
    faults.add_argument(
        "--strict", action="store_true", help="nothing may be missing, nothing wanted unused"
    )
    faults.add_argument(
        "--skip-mismatched", action="store_true", help="leave out what has another shape or dtype"
    )
    faults.add_argument("--allow-empty", action="store_true", help="writing nothing is no error")
    args = parser.parse_args(arguments)
    model = None
    if args.model is not None:
        from compat_restore.targets.template import load_function

        model = load_function(args.model)
    report = convert(
        args.source,
        args.destination,
        rules_from(args),
        into=args.into,
        model=model,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        verify=not args.no_verify,
        digests=args.digests,
        keep_slices=args.keep_slices,
        max_shard_size=args.max_shard_size,
        strict=args.strict,
        skip_mismatched=args.skip_mismatched,
        allow_empty=args.allow_empty,
    )
    if args.json:
        write_json(report.to_json())
    else:
        write(report.to_text(full=args.full))
    return 0
