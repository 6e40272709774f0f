"""Writing results to stdout, whatever stdout is."""

from __future__ import annotations

import sys

__all__ = ["write", "write_json"]


def write(text: str) -> None:
    """Write a line of text or several; what stdout's encoding lacks is written as escapes."""
    encoding = _encoding()
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def write_json(text: str) -> None:
    r"""Write JSON; what stdout's encoding lacks is written as `\u` escapes: it stays JSON."""
    import json
    import re

    try:
        text.encode(_encoding())
    except UnicodeEncodeError:  # a name's odd bytes, or a terminal without UTF-8
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    sys.stdout.write(text + "\n")


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"
