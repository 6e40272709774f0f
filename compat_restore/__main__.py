"""`python -m compat_restore`."""

import sys

from compat_restore.cli import main

if __name__ == "__main__":
    sys.exit(main())
