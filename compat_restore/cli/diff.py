"""`compat-restore diff`: whether two checkpoints hold the same."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compat_restore.cli.options import add_rule_options, rules_from
from compat_restore.cli.output import write, write_json
from compat_restore.comparison import diff

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_FINDINGS = 1
_EXAMPLES = r"""examples:
  compat-restore diff model.ckpt out/model.safetensors
  compat-restore diff model.ckpt out/ckpt --drop-slots --rename 'MobilenetV1/(.*)=backbone/\1'
"""


def run(arguments: Sequence[str]) -> int:
    """Compare two checkpoints; return the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore diff",
        description="Compare two checkpoints of any formats, tensor by tensor and byte by byte: "
        "what differs, and what only one of them has. Exit status 1 if anything does. Rules choose "
        "tensors of the first, and say what they are called in the second.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="as for inspect")
    parser.add_argument("second", metavar="B", help="as for inspect")
    parser.add_argument("--full", action="store_true", help="a row for every name")
    parser.add_argument("--json", action="store_true", help="machine-readable, every tensor")
    add_rule_options(parser)
    args = parser.parse_args(arguments)
    found = diff(args.first, args.second, rules_from(args))
    if args.json:
        import json

        write_json(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        write(found.to_text(full=args.full))
    return 0 if found.equal else _FINDINGS
