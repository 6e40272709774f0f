"""Small files that announce large things, and names that lead elsewhere: refused at once.

Every test has its own process, in which more than 256 MB are refused.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cramjam
import pytest
from formats import table_of, write_bundle
from hostile import MOST_MEMORY, MOST_SECONDS, limit_memory, put

from compat_restore import open_checkpoint
from compat_restore.checkpoint import wire
from compat_restore.checkpoint.bundle import BundleEntry
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.object_graph import ObjectGraph
from compat_restore.checkpoint.slices import encode_slice, slice_key
from compat_restore.checkpoint.strings import encode_strings
from compat_restore.checkpoint.table import MAGIC, BlockHandle
from compat_restore.checkpoint.wire import bytes_field, varint_field, write_varint
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CompatRestoreError,
    DamagedCheckpointError,
    DamagedTensorsError,
)
from compat_restore.names import OBJECT_GRAPH_KEY
from compat_restore.tensors import DType, Slice

HEADER = varint_field(1, 1)
FOUR = bytes(16)
REASONS = (DamagedCheckpointError, CheckpointFormatError, CheckpointNotFoundError)


@pytest.fixture
def bounded():
    """Return a function that reads a checkpoint within the limits; it returns what was told."""

    def read(path):
        import numpy  # noqa: F401, ICN001  # before memory is counted

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        begun = time.process_time()
        limit_memory()
        try:
            with open_checkpoint(path) as reader:
                reader.roles()
                reader.verify(reader.specs())
                for name in reader.specs():
                    reader.read(name)
        except REASONS as error:
            assert len(str(error)) < 20_000  # noqa: PT017
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            assert time.process_time() - begun < MOST_SECONDS
        return ""

    return read
