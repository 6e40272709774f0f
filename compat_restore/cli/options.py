"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, TypedDict

from compat_restore.errors import UsageError

if TYPE_CHECKING:
    from compat_restore.rules import Rename, Rules

__all__ = [
    "ConversionOptions",
    "HelpFormatter",
    "add_conversion_options",
    "add_rule_options",
    "conversion_options_from",
    "gives_rules",
    "rules_from",
    "size",
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_MARGIN = 2  # that argparse leaves on the right


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter of help that keeps line breaks, as wide as the terminal.

    The one of `argparse` imports `shutil`, and with it three compressors, to learn that width; and
    it is made whenever a parser is, with or without `--help`.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_terminal_width() - _MARGIN)


def _terminal_width() -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]  # None is caught
    except (AttributeError, ValueError, OSError):  # no stdout, or no terminal
        return 80


def add_rule_options(parser: argparse.ArgumentParser, *, renames: bool = True) -> None:
    """Add the options that make up rules.

    Args:
        parser: of the command.
        renames: whether the command can make use of new names.
    """
    group = parser.add_argument_group(
        "rules",
        "REGEX must match a whole name in the checkpoint: 'bert/.*' matches 'bert/pooler/bias', "
        "'bert' does not. Each of these can be repeated: --include A --include B",
    )
    group.add_argument(
        "--include", metavar="REGEX", action="append", default=[], help="take these tensors alone"
    )
    group.add_argument(
        "--exclude", metavar="REGEX", action="append", default=[], help="leave these out"
    )
    group.add_argument(
        "--rename",
        metavar="REGEX=NAME",
        action="append",
        default=[],
        help=r"new name, with \1 for the first group; the first rename that matches decides; "
        "'REGEX=' drops"
        if renames
        else argparse.SUPPRESS,
    )
    group.add_argument("--rules", metavar="FILE", help="rules from a TOML file")
    group.add_argument(
        "--drop-slots",
        action="store_true",
        help="leave out optimizer slots, moving averages of weights, and counters (the moving "
        "statistics of batch normalisation are weights, and stay)",
    )
    group.add_argument(
        "--allow-unmatched", action="store_true", help="a rule that matches nothing is no error"
    )


def gives_rules(args: argparse.Namespace) -> bool:
    """Whether any of the options of `add_rule_options` asks for something."""
    return bool(args.include or args.exclude or args.rename or args.rules or args.drop_slots)


def rules_from(args: argparse.Namespace) -> Rules:
    """Return the rules that the options describe; those of a file come after the others'.

    Raises:
        RuleError: a rule is not valid.
        UsageError: a rename has no "=".
    """
    from compat_restore.rules import Rules

    file = Rules() if args.rules is None else Rules.from_toml(args.rules)
    return Rules(
        include=(*args.include, *file.include),
        exclude=(*args.exclude, *file.exclude),
        rename=(*map(_rename, args.rename), *file.rename),
        transform=file.transform,
        drop_slots=args.drop_slots or file.drop_slots,
        allow_unmatched=args.allow_unmatched or file.allow_unmatched,
    )


class ConversionOptions(TypedDict):
    """What the options say for `convert` and for `convert_all`, by the names of their arguments."""

    into: str | None
    overwrite: bool
    dry_run: bool
    verify: bool
    digests: bool
    keep_slices: bool
    max_shard_size: int | None
    strict: bool
    skip_mismatched: bool
    allow_empty: bool


def add_conversion_options(parser: argparse.ArgumentParser, *, model: bool = False) -> None:
    """Add the options that say how a new checkpoint is written and which faults are let pass.

    Args:
        parser: of the command.
        model: whether a function can take the place of a template.
    """
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument(
        "--into",
        metavar="TEMPLATE",
        help="a checkpoint of the freshly made model, of any format: the new one is made like it, "
        "and what the rules do not set keeps its value",
    )
    if model:
        form.add_argument(
            "--model", metavar="PACKAGE.MODULE:FUNCTION", help="a function that makes the model"
        )
    output.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that has the name"
    )
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


def conversion_options_from(args: argparse.Namespace) -> ConversionOptions:
    """Return what the options of `add_conversion_options` say."""
    return ConversionOptions(
        into=args.into,
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


def _rename(text: str) -> Rename:
    """Split `REGEX=NAME` at the "=" that leaves a valid pattern before it.

    `(?=...)` and `(?<=...)` contain a "=" too, and so may names: the first "=" before which the
    pattern is valid decides.
    """
    from compat_restore.rules import Rules, compiled

    pieces = text.split("=")
    for at in range(1, len(pieces)):
        pattern, name = "=".join(pieces[:at]), "=".join(pieces[at:])
        try:
            compiled(pattern)
        except (re.error, RecursionError, OverflowError):
            continue
        return Rules(rename=[(pattern, name or None)]).rename[0]
    if len(pieces) == 1:
        raise UsageError(
            f"--rename {text!r}: REGEX=NAME is expected, such as 'encoder/(.*)=backbone/\\1'"
        )
    return Rules(rename=[(pieces[0], "=".join(pieces[1:]))]).rename[0]  # says what is wrong


def size(text: str) -> int:
    """Return the bytes that a text like "500MB" or "2GiB" says, for `argparse`."""
    match = _SIZE.fullmatch(text.strip())
    scale = " kmgt".index(match[2].lower() or " ") if match else 0
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** scale) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 500MB or 2GiB are")
    return count
