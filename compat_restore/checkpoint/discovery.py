"""Which checkpoints stand below a directory.

Hidden files and directories are none: a writer that was killed leaves such. Directories are not
followed through links, so that no link leads in a circle or out of what was named.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from compat_restore.checkpoint.files import is_url
from compat_restore.checkpoint.locate import all_in
from compat_restore.errors import CheckpointNotFoundError, InputError, UsageError
from compat_restore.names import sort_key

__all__ = ["Discovered", "Discovery", "find_checkpoints"]


@dataclass(frozen=True, slots=True)
class Discovered:
    """A checkpoint that was found, or what is left of one.

    Attributes:
        path: what `open_checkpoint` takes.
        name: the same from the directory that was searched, with "/" between its parts.
    """

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a search found.

    Attributes:
        checkpoints: naturally sorted by name.
        faults: one message for each directory that could not be searched.
        notes: what was passed over.
    """

    checkpoints: tuple[Discovered, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_checkpoints(folder: str, *, without: str | None = None) -> Discovery:
    """Find every checkpoint in a directory and those below it, of any format, each once.

    Whether they are whole is not looked at: what lacks a file is found too, to be told when it is
    opened.

    Args:
        folder: a local directory.
        without: a directory that is left out, with all below it.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        UsageError: it is a URL.
        InputError: it cannot be listed.
    """
    if is_url(folder):
        raise UsageError(
            f"'{folder}': checkpoints are searched for in local directories; name those of another "
            "file system one by one"
        )
    if not os.path.isdir(folder):
        why = "it is a file" if os.path.exists(folder) else "there is none"
        raise CheckpointNotFoundError(f"'{folder}': a directory is expected, and {why}")
    all_in(folder)  # raises what would else be one fault of several
    left_out = None if without is None else os.path.realpath(without)
    found: list[Discovered] = []
    faults: list[str] = []
    notes: list[str] = []

    def cannot_list(error: OSError) -> None:
        faults.append(f"'{error.filename}' cannot be listed: {error.strerror or error}")

    for place, below, _ in os.walk(folder, onerror=cannot_list):
        inside = os.path.relpath(place, folder)
        kept = []
        for name in sorted(below):
            path = os.path.join(place, name)
            if name.startswith("."):
                continue
            if os.path.islink(path):
                notes.append(f"the link '{path}' to a directory was not followed")
            elif left_out is None or os.path.realpath(path) != left_out:
                kept.append(name)
        below[:] = kept
        try:
            names = all_in(place)
        except InputError:  # it vanished, or `os.walk` told it
            names = []
        for name in names:
            relative = name if inside == "." else os.path.join(inside, name)
            found.append(Discovered(os.path.join(place, name), relative.replace(os.sep, "/")))
    found.sort(key=lambda one: sort_key(one.name))
    return Discovery(tuple(found), tuple(faults), tuple(notes))
