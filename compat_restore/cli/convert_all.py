"""`compat-restore convert-all`: convert every checkpoint below a directory."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compat_restore.cli.options import (
    HelpFormatter,
    add_conversion_options,
    add_rule_options,
    conversion_options_from,
    rules_from,
)
from compat_restore.cli.output import write, write_json
from compat_restore.fleet import convert_all
from compat_restore.jobs import Status
from compat_restore.tables import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compat_restore.fleet import Conversion, OnProgress

__all__ = ["run"]

_FINDINGS = 1
_EXAMPLES = r"""examples:
  the weights of every run, under another scope:
    compat-restore convert-all runs/ converted/ --drop-slots --rename 'old/(.*)=new/\1'
  for other tools, four at a time:
    compat-restore convert-all runs/ converted/ --suffix .safetensors --jobs 4
  see what would happen:
    compat-restore convert-all runs/ converted/ --rules rules.toml --dry-run
"""


def run(arguments: Sequence[str]) -> int:
    """Convert every checkpoint below a directory; return the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="compat-restore convert-all",
        description="Convert every checkpoint below SRC_DIR, as `convert` does each, to the same "
        "name below DST_DIR. What fails is told, and the others go on: exit status 1. The same "
        "command goes on where it stopped, and does again what failed or changed: a manifest in "
        "DST_DIR says what was done. What was converted by other rules or options is done again "
        "with --overwrite alone.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("source_dir", metavar="SRC_DIR", help="searched with all below it")
    parser.add_argument("destination_dir", metavar="DST_DIR", help="made if it is missing")
    parser.add_argument(
        "--suffix",
        metavar="ENDING",
        help="what the new names end in, which says their format: .safetensors, .npz, "
        ".weights.h5, .h5 or .keras; V2 checkpoints without it",
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, help="how many at once; as many as there are CPUs"
    )
    add_rule_options(parser)
    add_conversion_options(parser)
    args = parser.parse_args(arguments)
    with _progress() as on_progress:
        report = convert_all(
            args.source_dir,
            args.destination_dir,
            rules_from(args),
            suffix=args.suffix,
            jobs=args.jobs,
            on_progress=on_progress,
            **conversion_options_from(args),
        )
    if args.json:
        write_json(report.to_json())
    else:
        write(report.to_text(full=args.full))
    return 0 if report.complete else _FINDINGS


@contextmanager
def _progress() -> Iterator[OnProgress | None]:
    """Give what shows the progress on stderr, if that is a terminal.

    The bar is gone when the work is done; what was interrupted says how far it came.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    failures = reached = whole = 0
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[latest]}"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("converting", total=None, latest="")

        def on_progress(done: int, total: int, latest: Conversion | None) -> None:
            nonlocal failures, reached, whole
            reached, whole = done, total
            if latest is None:
                bar.update(task, total=total)
                return
            failures += latest.status is Status.FAILED
            bar.update(
                task,
                completed=done,
                description=f"converting, {failures} failed" if failures else "converting",
                latest=escape(escaped(latest.source)),
            )

        try:
            yield on_progress
        except BaseException:
            bar.stop()
            if whole:
                sys.stderr.write(
                    f"{reached} of {whole} done; the same command goes on from there\n"
                )
            raise
