"""Small checkpoints for the tests of the restoring half."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from formats import write_bundle

from compat_restore import digest, open_checkpoint
from compat_restore.checkpoint.writer import Content
from compat_restore.tensors import DType, dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "CountingSession",
    "accounted_once",
    "damage",
    "digests_of",
    "graph_and_session",
    "numbers",
    "write",
    "write_from_graph",
]


def numbers(*shape: int, start: float = 1.0) -> np.ndarray:
    """Return float32 values that are all different from each other, and from 0."""
    count = int(np.prod(shape, dtype=int))
    return (np.arange(count, dtype=np.float32) + np.float32(start)).reshape(shape)


def write(
    prefix: object, tensors: Mapping[str, object], dtypes: Mapping[str, str] | None = None
) -> str:
    """Write a name-based checkpoint with this project's own writer; return its prefix.

    Args:
        prefix: where.
        tensors: values by name.
        dtypes: the types of those that NumPy has no type for (quantised ones).
    """
    contents = []
    for name, value in tensors.items():
        array = np.asarray(value)
        dtype = DType(dtypes[name]) if dtypes and name in dtypes else dtype_of(array.dtype)
        contents.append(Content.of(name, dtype, array))
    return write_bundle(prefix, contents)


@contextlib.contextmanager
def graph_and_session() -> Iterator[object]:
    """Give a session of a new graph, which is the default one."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        yield session


def write_from_graph(
    prefix: object, values: Mapping[str, np.ndarray], *, parts: int = 1, v1: bool = False, **saver
) -> str:
    """Write a checkpoint with TensorFlow's own `Saver`; return its prefix.

    Args:
        prefix: where.
        values: values by name.
        parts: into how many parts each variable is cut along its first axis.
        v1: in the old single-file format.
        saver: further arguments of `Saver`.
    """
    import tensorflow as tf

    v1_api = tf.compat.v1
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with graph_and_session() as session:
        for name, value in values.items():
            v1_api.get_variable(
                name,
                initializer=tf.constant(value) if parts == 1 else _piece_of(value),
                shape=None if parts == 1 else value.shape,
                dtype=None if parts == 1 else value.dtype,
                partitioner=None if parts == 1 else v1_api.fixed_size_partitioner(parts),
            )
        session.run(v1_api.global_variables_initializer())
        version = v1_api.train.SaverDef.V1 if v1 else v1_api.train.SaverDef.V2
        return v1_api.train.Saver(write_version=version, **saver).save(
            session, str(prefix), write_meta_graph=False
        )


def _piece_of(value: np.ndarray):
    """Return an initialiser that gives each part of a partitioned variable its part of a value."""

    def initializer(shape, dtype=None, partition_info=None):
        del dtype
        if partition_info is None:
            return value
        starts = partition_info.var_offset
        return value[tuple(slice(s, s + int(n)) for s, n in zip(starts, shape, strict=True))]

    return initializer


def damage(prefix: str, name: str) -> None:
    """Flip a bit in the bytes of one tensor of a checkpoint."""
    with open_checkpoint(prefix) as reader:
        [stored] = reader.stored(name)
        path, offset = Path(stored.source.name), stored.offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


class CountingSession:
    """A session that remembers what it was asked to run."""

    def __init__(self, session) -> None:
        self._session = session
        self.graph = session.graph
        self.runs = []

    def run(self, fetches, *args, **kwargs):
        self.runs.append(fetches)
        return self._session.run(fetches, *args, **kwargs)


def accounted_once(report, keys: Iterable[str], variables: Iterable[str]) -> None:
    """Check that every key of a checkpoint and every variable stands in a report exactly once."""
    sources = [e.source for e in report.restored + report.mismatched]
    assert sorted(set(sources) | {e.name for e in report.unused}) == sorted(keys)
    assert not set(sources) & {e.name for e in report.unused}
    assert len({e.name for e in report.unused}) == len(report.unused)
    names = [
        entry.name
        for group in (report.restored, report.initialized, report.mismatched, report.kept)
        for entry in group
    ]
    assert sorted(names) == sorted(variables)


def digests_of(report) -> dict[str, str]:
    """Return the digest of each restored variable."""
    return {entry.name: entry.digest for entry in report.restored}


def digest_of(value: object, dtype: str | None = None) -> str:
    """Return the digest that a report shows for a value."""
    return digest(np.asarray(value), DType(dtype) if dtype else None)
