"""`compat-restore verify`: whether checkpoints are what was written."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compat_restore.cli.output import write, write_json
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    InputError,
)
from compat_restore.tables import escaped, format_bytes
from compat_restore.verification import Verification, verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_DAMAGED, _IO = 3, 4
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
        "list all that are damaged. Exit status 3 if any is, 4 if a checkpoint is missing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="as for inspect")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(arguments)
    statuses, found = zip(*(_verified(path) for path in args.checkpoints), strict=True)
    if args.json:
        write_json(_as_json(found))
    else:
        write("\n".join(_as_text(verification) for verification in found))
    # Damage is worse than a file that is not there.
    return next((status for status in (_DAMAGED, _IO) if status in statuses), 0)


def _verified(path: str) -> tuple[int, Verification]:
    """Verify a checkpoint; one that cannot be opened hides no other.

    Returns:
        The exit status that it alone would have, and what was found.
    """
    try:
        found = verify_checkpoint(path)
    except (
        DamagedCheckpointError,
        CheckpointFormatError,
        CheckpointNotFoundError,
        InputError,
    ) as error:
        missing = isinstance(error, CheckpointNotFoundError | InputError)
        return (_IO if missing else _DAMAGED), Verification(
            checkpoint=path,
            checkpoint_format="cannot be opened",
            tensors=0,
            nbytes=0,
            faults=(str(error),),
            checked=True,
        )
    return (_DAMAGED if found.faults else 0), found


def _as_text(found: Verification) -> str:
    lines = [f"{escaped(found.checkpoint)}: {found.checkpoint_format}"]
    if not found.tensors:
        return "\n".join([*lines, *(escaped(fault) for fault in found.faults)])
    lines += [f"damaged: {escaped(fault)}" for fault in found.faults]
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
