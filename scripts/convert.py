#!/usr/bin/env python3
"""Port a name-filtered TF1 checkpoint to another layout: `compat-restore convert` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compat_restore.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
