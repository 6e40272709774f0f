"""`compat-restore verify`: whether checkpoints are what was written."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compat_restore.cli.output import write, write_json
from compat_restore.errors import CheckpointFormatError, DamagedCheckpointError
from compat_restore.tables import escaped, format_bytes
from compat_restore.verification import Verification, verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_DAMAGED = 3
_EXAMPLES = """examples:
  compat-restore verify model.ckpt
  compat-restore verify run1/ run2/ --json
"""


def run(arguments: Sequence[str]) -> int:
    """Check checkpoints against their checksums; return the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore verify",
        description="Read every tensor, compare it with the checksum that is stored for it, and "
        "list all that are damaged. Exit status 3 if any is.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="as for inspect")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(arguments)
    found = [_verified(path) for path in args.checkpoints]
    if args.json:
        write_json(_as_json(found))
    else:
        write("\n".join(_as_text(verification) for verification in found))
    return _DAMAGED if any(verification.faults for verification in found) else 0


def _verified(path: str) -> Verification:
    """Verify a checkpoint; one that cannot be opened is damaged, and hides no other."""
    try:
        return verify_checkpoint(path)
    except (DamagedCheckpointError, CheckpointFormatError) as error:
        return Verification(
            checkpoint=path,
            checkpoint_format="cannot be opened",
            tensors=0,
            nbytes=0,
            faults=(str(error),),
            checked=True,
        )


def _as_text(found: Verification) -> str:
    lines = [f"{escaped(found.checkpoint)}: {found.checkpoint_format}"]
    lines += [f"damaged: {escaped(fault)}" for fault in found.faults]
    if not found.tensors and found.faults:
        return "\n".join(lines)
    total = f"{found.tensors} tensors, {format_bytes(found.nbytes)}"
    if found.faults:
        lines.append(f"{total}: {len(found.faults)} damaged, the others as they were written")
    elif found.checked:
        lines.append(f"{total}: all as they were written")
    else:
        lines.append(f"{total}: readable; this format has no checksums to compare them with")
    return "\n".join(lines)


def _as_json(found: Sequence[Verification]) -> str:
    import json

    data = {
        "version": 1,
        "checkpoints": [
            {
                "path": verification.checkpoint,
                "format": verification.checkpoint_format,
                "tensors": verification.tensors,
                "bytes": verification.nbytes,
                "has_checksums": verification.checked,
                "damaged": list(verification.faults),
            }
            for verification in found
        ],
    }
    return json.dumps(data, indent=1, ensure_ascii=False)
