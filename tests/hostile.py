"""Files of right checksums and wrong contents, made from a seed, and what reading them does.

Each face is a way in: the table, a V2 bundle, a V1 file, an object graph, and
the files of other formats. A case takes something
that is whole, changes a few things in the way in which its format is built, mends the checksums,
and reads everything. Whatever it holds, the outcome has to be a documented error or values of the
shapes that were announced, in bounded time and memory.

    python tests/hostile.py FACE FIRST_SEED CASES DIRECTORY
    python tests/hostile.py SERVE  (reads paths from stdin, and tells of each on stdout)
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import cramjam
import numpy as np
from formats import MemoryFile, table_of

from compat_restore import convert, errors, open_checkpoint
from compat_restore.checkpoint import wire
from compat_restore.checkpoint.bundle import BundleEntry
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.slices import encode_slice, slice_key
from compat_restore.checkpoint.strings import encode_strings
from compat_restore.checkpoint.table import MAGIC, BlockHandle, TableReader
from compat_restore.names import OBJECT_GRAPH_KEY
from compat_restore.tensors import DType, Slice, numpy_dtype

MOST_MEMORY = 256 << 20
MOST_SECONDS = 2.0
GOLDEN = Path(__file__).parent / "golden"
DATA = "data-00000-of-00001"

# What may be raised: the errors that this library documents, and of those the ones that fit.
EXPECTED = (
    errors.CheckpointFormatError,
    errors.CheckpointNotFoundError,
    errors.DamagedCheckpointError,
    errors.DamagedTensorsError,
)
NUMBERS = [
    0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32,
    1 << 40, 1 << 59, (1 << 59) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
]  # fmt: skip
PIECES = [b"", b"\0", b"\0\1", b"/", b"../x", b"\xff", b"\xff\0", b"w", b"\x80", b"a" * 300, MAGIC]


class Chance(random.Random):
    """Random choices among what formats are made of."""

    def often(self, probability):
        return self.random() < probability

    def number(self, near=0):
        if self.often(0.4):
            return max(0, near + self.choice([-2, -1, 1, 2, 4, 16]))
        return self.choice(NUMBERS)

    def varint(self, value):
        """Return a varint, now and then a longer one than needed."""
        data = wire.write_varint(value)
        if self.often(0.05):
            data = data[:-1] + bytes([data[-1] | 0x80]) + b"\x80" * self.randrange(9) + b"\0"
        return data

    def mangled(self, data):
        """Return bytes with some others among them, some gone or some turned."""
        at = self.randrange(len(data) + 1)
        match self.randrange(5):
            case 0:
                return data[:at] + self.choice(PIECES) + data[at:]
            case 1:
                return data[:at] + data[at + self.randrange(1, 9) :]
            case 2:
                return data[:at]
            case 3 if data:
                at %= len(data)
                return data[:at] + bytes([data[at] ^ 1 << self.randrange(8)]) + data[at + 1 :]
            case _:
                return data[:at] + self.randbytes(self.randrange(1, 6)) + data[at:]

    def message(self, data, depth=0):
        """Return a protocol buffer message in which a field is another one."""
        try:
            fields = list(wire.fields(data))
        except wire.WireError:
            return self.mangled(data)
        if not fields or self.often(0.1):
            return self.mangled(data)
        at = self.randrange(len(fields))
        number, kind, payload = fields[at]
        match self.randrange(12):
            case 0:
                del fields[at]
            case 1:
                fields.insert(self.randrange(len(fields) + 1), fields[at])
            case 2:
                self.shuffle(fields)
            case 3:
                fields[at] = (self.choice([1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 1 << 28]), kind, payload)
            case 4:
                fields[at] = (number, wire.BYTES, self.choice(PIECES))
            case 5:
                fields[at] = (number, wire.VARINT, self.number())
            case 6:
                fields += [fields[at]] * self.randrange(2, 40)
            case _ if isinstance(payload, bytes):
                changed = self.message(payload, depth + 1) if depth < 8 else self.mangled(payload)
                fields[at] = (number, kind, changed)
            case _:
                fields[at] = (number, kind, self.number(payload))
        return b"".join(self.field(*field) for field in fields)

    def field(self, number, kind, payload):
        tag = self.varint(number << 3 | kind)
        if kind == wire.VARINT:
            return tag + self.varint(payload)
        if kind == wire.BYTES:
            return tag + self.varint(len(payload)) + payload
        width = 8 if kind == wire.FIXED64 else 4
        return tag + (payload & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    def shape(self):
        return tuple(
            self.choice([0, 1, 2, 3, 5, 1 << 16, 1 << 31, 1 << 40, 1 << 59])
            for _ in range(self.choice([0, 1, 1, 2, 2, 3, 33]))
        )

    def slice(self):
        rank = self.choice([0, 1, 1, 2, 2, 3])
        starts = tuple(self.choice([0, 0, 1, 2, 1 << 40]) for _ in range(rank))
        return Slice(starts, tuple(self.choice([None, 0, 1, 2, 1 << 40]) for _ in range(rank)))


# -- tables --------------------------------------------------------------------------------------


def hostile_table(chance, entries):
    """Return a table of many small blocks, each with a right checksum and perhaps wrong contents."""
    out = bytearray()
    index = []
    pairs = list(entries)
    if chance.often(0.1):
        chance.shuffle(pairs)
    while pairs or not index:
        count = chance.choice([1, 2, 5, 20, 100])
        some, pairs = pairs[:count], pairs[count:]
        bound = some[-1][0] if some else b""
        if chance.often(0.05):
            bound = chance.mangled(bound)
        index.append((bound, handle(chance, out, block(chance, some))))
        if len(index) > 1 and chance.often(0.03):
            index.append((bound + b"\0", chance.choice(index)[1]))
    metaindex = handle(chance, out, block(chance, []))
    last = handle(chance, out, block(chance, index))
    if chance.often(0.02):
        out += chance.choice(PIECES)
    footer = (metaindex + last).ljust(40, b"\0")[:40] + MAGIC
    return bytes(out) + (chance.mangled(footer) if chance.often(0.02) else footer)


def block(chance, pairs):
    """Return (contents, type) of a block."""
    interval, before = chance.choice([1, 2, 16]), b""
    out, restarts = bytearray(), []
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % interval:
            limit = min(len(key), len(before))
            shared = next((at for at in range(limit) if key[at] != before[at]), limit)
        else:
            restarts.append(len(out))
        header = [shared, len(key) - shared, len(value)]
        if chance.often(0.01):
            at = chance.randrange(3)
            header[at] = chance.number(header[at])
        out += b"".join(map(chance.varint, header)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    numbers = [*restarts, len(restarts)]
    if chance.often(0.03):
        numbers[-1] = chance.number(numbers[-1])
    out += b"".join((n & 0xFFFFFFFF).to_bytes(4, "little") for n in numbers)
    data = chance.mangled(bytes(out)) if chance.often(0.03) else bytes(out)
    if chance.often(0.2):
        packed = bytes(cramjam.snappy.compress_raw(data))
        if chance.often(0.1):
            packed = chance.mangled(packed)
        elif chance.often(0.1):
            packed = chance.varint(chance.number(len(data))) + packed[1:]
        return packed, 1
    return data, chance.randrange(256) if chance.often(0.01) else 0


def handle(chance, out, made):
    """Append a block, and return its handle, encoded."""
    contents, kind = made
    offset, size = len(out), len(contents)
    data = contents + bytes([kind])
    out += data + mask(crc32c(data)).to_bytes(4, "little")
    if chance.often(0.01):
        offset = chance.number(offset)
    if chance.often(0.01):
        size = chance.number(size)
    encoded = BlockHandle(offset, size).encode()
    return chance.mangled(encoded) if chance.often(0.01) else encoded


def table_case(chance, folder):
    del folder
    keys = {chance.randbytes(chance.choice([0, 1, 2, 8, 30])) for _ in range(chance.randrange(60))}
    keys |= {b"scope/layer_%d/kernel" % number for number in range(chance.randrange(60))}
    entries = [(key, bytes(chance.choice([0, 1, 9, 200]))) for key in sorted(keys)]
    reader = TableReader(MemoryFile(hostile_table(chance, entries)))
    found = dict(reader.items())
    for key in [*found, b"absent"]:
        assert reader.get(key) == found.get(key), "get and items disagree"


# -- V2 ------------------------------------------------------------------------------------------


class Bundle:
    """The parts of a whole bundle of one data file."""

    def __init__(self, folder):
        [index] = folder.glob("*.index")
        self.entries = dict(TableReader(MemoryFile(index.read_bytes())).items())
        self.header = self.entries.pop(b"")
        self.data = [path.read_bytes() for path in sorted(folder.glob("*.data-*"))]
        self.keys = sorted(self.entries)


BUNDLES = {}


def bundle(name):
    if name not in BUNDLES:
        BUNDLES[name] = Bundle(GOLDEN / name)
    return BUNDLES[name]


def put(folder, header, entries, data, table=table_of):
    """Write a bundle; return its prefix."""
    (folder / "m.index").write_bytes(table({b"": header} | entries))
    for number, content in enumerate(data):
        (folder / f"m.data-{number:05d}-of-{len(data):05d}").write_bytes(content)
    return str(folder / "m")


def bundle_case(chance, folder):
    base = bundle(chance.choice(["plain", "partitioned", "sharded", "dtypes", "object_based"]))
    keys = set(chance.sample(base.keys, min(len(base.keys), chance.choice([1, 3, 8]))))
    if chance.often(0.7):
        # A partitioned variable with its parts, and the parts of those that were taken.
        names = {key for key in keys if not key.startswith(b"\0")}
        keys |= {key for key in base.keys if key[1:].split(b"\0\1")[0] in names}
    entries, header, data = {key: base.entries[key] for key in keys}, base.header, list(base.data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        key = chance.choice(sorted(entries))
        match chance.randrange(12):
            case 0:
                header = chance.message(header)
            case 1:
                entries[chance.mangled(key) or b"x"] = entries[key]
            case 2:
                entries[key] = strange_entry(chance).encode()
            case 3:
                name, part = key if not key.startswith(b"\0") else b"w", chance.slice()
                parts = (part,) * chance.choice([1, 2, 50])
                entry = BundleEntry(chance.choice(list(DType)), chance.shape(), slices=parts)
                entries[name] = entry.encode()
                entries[slice_key(name.decode(errors="ignore"), part)] = strange_entry(
                    chance
                ).encode()
            case 4 | 5 | 6:
                entries[key], data = other_bytes(chance, entries[key], data)
            case _:
                entries[key] = chance.message(entries[key])
    table = table_of
    if chance.often(0.1):
        table = lambda rows: hostile_table(chance, sorted(rows.items()))  # noqa: E731
    examine(chance, put(folder, header, entries, data, table), folder)


def strange_entry(chance):
    shape, dtype = chance.shape(), chance.choice(list(DType))
    size = min(int(np.prod(shape, dtype=object)) * dtype.itemsize, (1 << 64) - 1)
    if chance.often(0.3):
        size = chance.number(size)
    return BundleEntry(
        dtype,
        shape,
        chance.choice([0, 0, 0, 1, 1 << 40]),
        chance.number(),
        size,
        chance.number() & 0xFFFFFFFF,
    )


def other_bytes(chance, entry, data):
    """Return the entry of a tensor with other bytes, under a right checksum, and the data."""
    try:
        decoded = BundleEntry.decode(entry)
        stored = data[decoded.shard][decoded.offset : decoded.offset + decoded.size]
    except (errors.CompatRestoreError, wire.WireError, IndexError):
        return entry, data
    if decoded.dtype is DType.string:
        many = [chance.choice(PIECES) for _ in range(chance.randrange(30))]
        stored, crc = encode_strings(many)
        if chance.often(0.5):
            stored = chance.mangled(stored)
    else:
        stored = chance.mangled(stored)
        crc = crc32c(stored)
    shard = decoded.shard
    data = [*data[:shard], data[shard] + stored, *data[shard + 1 :]]
    values = {"offset": len(data[shard]) - len(stored), "size": len(stored), "checksum": mask(crc)}
    if chance.often(0.5):
        values["shape"] = chance.shape()
    kept = {name: getattr(decoded, name) for name in ("dtype", "shape", "shard", "slices")}
    return BundleEntry(**(kept | values)).encode(), data


# -- object graphs -------------------------------------------------------------------------------

GRAPHS = []


def graph_case(chance, folder):
    base = bundle("object_based")
    key = OBJECT_GRAPH_KEY.encode()
    if not GRAPHS:
        entry = BundleEntry.decode(base.entries[key])
        with open_checkpoint(GOLDEN / "object_based") as reader:
            GRAPHS.append(bytes(reader.read(OBJECT_GRAPH_KEY)[()]))
        assert entry.dtype is DType.string
    message = GRAPHS[0] if chance.often(0.6) else random_graph(chance, base.keys)
    for _ in range(chance.choice([1, 1, 2, 5])):
        message = chance.message(message)
    stored, crc = encode_strings([message])
    entries = {name: base.entries[name] for name in chance.sample(base.keys, 6)}
    entry = BundleEntry(DType.string, (), 0, len(base.data[0]), len(stored), mask(crc))
    entries[key] = entry.encode()
    prefix = put(folder, base.header, entries, [base.data[0] + stored])
    examine(chance, prefix, folder)
    with open_checkpoint(prefix) as reader:
        if reader.graph is not None:
            for node in range(3):
                if node < len(reader.graph._nodes):
                    reader.graph.below(node)
                    reader.graph.slot_keys_below(node)
                    reader.graph.children(node)
            assert reader.graph.optimizer_keys is not None
            reader.graph.save_counter_key()


def random_graph(chance, keys):
    """Return a graph of any children, cycles and slots, over keys that are there."""
    count = chance.choice([1, 3, 20])
    names = [b"a", b"_variables", b"_iterations", b"_learning_rate", b"iter", b"save_counter", b""]
    nodes = []
    for _ in range(count):
        node = b""
        for _ in range(chance.randrange(4)):
            child = wire.varint_field(1, chance.randrange(count))
            node += wire.bytes_field(1, child + wire.bytes_field(2, chance.choice(names)))
        if chance.often(0.5):
            node += wire.bytes_field(
                2,
                wire.bytes_field(1, b"VARIABLE_VALUE")
                + wire.bytes_field(2, chance.choice([b"", b"m/d/k", b"m/d/b", b"k"]))
                + wire.bytes_field(3, chance.choice(keys)),
            )
        if chance.often(0.2):
            slot = wire.varint_field(1, chance.randrange(count)) + wire.bytes_field(2, b"m")
            node += wire.bytes_field(3, slot + wire.varint_field(3, chance.randrange(count)))
        nodes.append(wire.bytes_field(1, node))
    return b"".join(nodes)


# -- V1 ------------------------------------------------------------------------------------------

V1_FILES = {}


def v1_case(chance, folder):
    kind = chance.choice(["v1", "partitioned_v1", "dtypes_v1", "sharded_v1"])
    if kind not in V1_FILES:
        files = sorted(
            path for path in (GOLDEN / kind).glob("model.ckpt*") if path.suffix != ".meta"
        )
        V1_FILES[kind] = [dict(TableReader(MemoryFile(f.read_bytes())).items()) for f in files]
    files = [dict(entries) for entries in V1_FILES[kind]]
    if kind == "dtypes_v1":  # most of the time goes into reading what was not touched
        files = [some_tensors(chance, files[0], 8)]
    for _ in range(chance.choice([1, 1, 2, 3])):
        entries = chance.choice(files)
        key = b"" if chance.often(0.4) or not entries else chance.choice(sorted(entries))
        match chance.randrange(10):
            case 0:
                entries[chance.mangled(key)] = entries.get(key, b"")
            case 1:
                part = encode_slice(chance.slice())
                meta = wire.bytes_field(1, chance.choice(PIECES)) + wire.bytes_field(4, part)
                meta += wire.bytes_field(2, BundleEntry(DType.bool, chance.shape()).encode())
                entries[b""] = wire.bytes_field(1, wire.bytes_field(1, meta))
            case 2:
                entries.pop(key, None)
            case _:
                entries[key] = chance.message(entries.get(key, b""))
    table = table_of
    if chance.often(0.1):
        table = lambda rows: hostile_table(chance, sorted(rows.items()))  # noqa: E731
    names = (
        ["m"] if len(files) == 1 else [f"m-{n:05d}-of-{len(files):05d}" for n in range(len(files))]
    )
    for name, entries in zip(names, files, strict=True):
        (folder / name).write_bytes(table(entries))
    examine(chance, str(folder / names[0]), folder)


def some_tensors(chance, entries, number):
    """Return the entries of a V1 file with a few of its tensors alone."""
    [(_, _, meta)] = wire.fields(entries[b""])
    fields = list(wire.fields(meta))
    kept = chance.sample([field for field in fields if field[0] == 1], number)
    names = {next(p for n, _, p in wire.fields(field[2]) if n == 1) for field in kept}
    taken = {key: v for key, v in entries.items() if key[1:].split(b"\0\1")[0] in names}
    meta = b"".join(chance.field(*field) for field in kept)
    return {b"": wire.bytes_field(1, meta)} | taken


# -- safetensors and npz -------------------------------------------------------------------------

SMALL = {
    "a/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a/bias": np.ones(4, np.float16),
    "b": np.int64(7),
    "none": np.zeros((0, 3), np.float64),
    "flag": np.array([True, False]),
}


def safetensors_header():
    header, at = {"__metadata__": {"format": "np"}}, 0
    codes = {"float32": "F32", "float16": "F16", "int64": "I64", "float64": "F64", "bool": "BOOL"}
    for name, value in SMALL.items():
        array = np.asarray(value)
        offsets = [at, at + array.nbytes]
        code = codes[array.dtype.name]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    return header, b"".join(np.asarray(value).tobytes() for value in SMALL.values())


ODD = [None, True, -1, 1.5, 1e300, "", "F32", "F8_E4M3", "F4", "../x", "\ud800", [], {}, [[]], "\0"]


def changed(chance, value):  # noqa: PLR0911
    """Return JSON data in which one thing is another."""
    if isinstance(value, dict) and value and chance.often(0.9):
        key = chance.choice(sorted(value))
        match chance.randrange(8):
            case 0:
                return {name: v for name, v in value.items() if name != key}
            case 1:
                return {
                    **value,
                    chance.choice(["", "../x", "a\nb", "__metadata__", "w"]): value[key],
                }
            case 2:
                return {**value, key: chance.choice(ODD)}
            case _:
                return {**value, key: changed(chance, value[key])}
    if isinstance(value, list) and value and chance.often(0.9):
        at = chance.randrange(len(value))
        match chance.randrange(6):
            case 0:
                return value[:at]
            case 1:
                return value + value
            case 2:
                return [*value[:at], chance.choice(ODD), *value[at + 1 :]]
            case _:
                return [*value[:at], changed(chance, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and chance.often(0.8):
        return chance.number(value)
    return chance.choice(ODD)


def safetensors_file(chance, header, data):
    text = json.dumps(header, allow_nan=True).encode(errors="surrogatepass")
    if chance.often(0.1):
        text = chance.mangled(text)
    elif chance.often(0.03):
        text = b'{"a":' * chance.choice([10, 5000]) + text
    elif chance.often(0.03):
        text = text[:1] + b'"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},' + text[1:]
    length = chance.number(len(text)) if chance.often(0.1) else len(text)
    if chance.often(0.15):
        data = chance.mangled(data)
    return (length & (1 << 64) - 1).to_bytes(8, "little") + text + data


def safetensors_case(chance, folder):
    header, data = safetensors_header()
    for _ in range(chance.choice([1, 1, 2, 3])):
        header = changed(chance, header)
    if chance.often(0.7):
        path = folder / "m.safetensors"
        path.write_bytes(safetensors_file(chance, header, data))
    else:
        names = [f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
        whole, data = safetensors_header()
        (folder / names[0]).write_bytes(safetensors_file(chance, header, data))
        other = {"other": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
        (folder / names[1]).write_bytes(safetensors_file(chance, other, b"ab"))
        where = {name: names[0] for name in whole if name != "__metadata__"} | {"other": names[1]}
        index = {"metadata": {"total_size": len(data) + 2}, "weight_map": where}
        for _ in range(chance.choice([0, 1, 1, 2])):
            index = changed(chance, index)
        text = json.dumps(index).encode()
        path = folder / "m.safetensors.index.json"
        path.write_bytes(chance.mangled(text) if chance.often(0.1) else text)
    examine(chance, str(path), folder)


def npz_case(chance, folder):
    path = folder / "m.npz"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in SMALL.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(value), chance.choice([None, (2, 0)]))
            data = member.getvalue()
            if chance.often(0.3):
                end = data.index(b"\n")
                data = data.replace(*chance.choice(NPY_CHANGES), 1)
                if chance.often(0.3):
                    at = chance.randrange(end)
                    data = data[:at] + chance.mangled(data[at:])
            kind = chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            if chance.often(0.1):
                name = chance.choice(["../x", "", "a/../b", "x" * 5000, "a\nb"])  # noqa: PLW2901
            info = zipfile.ZipInfo(f"{name}{chance.choice(['.npy'] * 9 + [''])}")
            info.compress_type = kind
            archive.writestr(info, data)
    data = stream.getvalue()
    if chance.often(0.5):
        data = directory_changed(chance, data)
    path.write_bytes(data)
    examine(chance, str(path), folder)


NPY_CHANGES = [
    (b"<f4", b"<f8"), (b"<f4", b"|O "), (b"<f4", b">f4"), (b"<i8", b"<U9"), (b"False", b"True "),
    (b"(3, 4)", b"(9, 9)"), (b"(3, 4)", b"(-3,4)"), (b"(4,)", b"(1<<"), (b"(0, 3)", b"(0,1)"),
    (b"shape", b"shape'"), (b"{", b"[" * 40), (b"NUMPY", b"NUMPx"), (b"PY\x01", b"PY\x09"),
]  # fmt: skip


def directory_changed(chance, data):
    """Return a zip archive in whose headers a number is another."""
    marks = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"]
    mark = chance.choice(marks)
    places = [at for at in range(len(data)) if data.startswith(mark, at)]
    at = chance.choice(places) + chance.randrange(4, 46)
    width = chance.choice([1, 2, 4])
    number = chance.number(int.from_bytes(data[at : at + width], "little"))
    return (
        data[:at] + (number & (1 << 8 * width) - 1).to_bytes(width, "little") + data[at + width :]
    )


# -- HDF5 ----------------------------------------------------------------------------------------

KERAS = ["keras.weights.h5", "keras_model.h5", "tf_keras.weights.h5", "tf_keras_weights.h5"]
ARCHIVES = ["keras.keras", "tf_keras.keras"]
KERAS_FILES = {}
SIGNS = [b"\x89HDF", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"FRHP", b"BTHD"]


def hdf5_changed(chance, name, data):
    """Return an HDF5 file in which fields of its structure are others."""
    if name not in KERAS_FILES:
        KERAS_FILES[name] = [
            at for sign in SIGNS for at in range(len(data)) if data.startswith(sign, at)
        ]
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        if chance.often(0.5):
            at = chance.choice(KERAS_FILES[name]) + chance.randrange(0, 64)
        else:
            at = chance.randrange(len(out)) & ~7
        width = chance.choice([1, 1, 2, 4, 8])
        match chance.randrange(4):
            case 0:
                number = chance.choice(KERAS_FILES[name])  # the place of another structure
            case _:
                number = chance.number(int.from_bytes(out[at : at + width], "little"))
        out[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
    if chance.often(0.05):
        return chance.mangled(bytes(out))
    return bytes(out)


def hdf5_case(chance, folder):
    name = chance.choice(KERAS)
    path = folder / name
    path.write_bytes(hdf5_changed(chance, name, (GOLDEN / "keras" / name).read_bytes()))
    examine(chance, str(path), folder)


def keras_case(chance, folder):
    name = chance.choice(ARCHIVES)
    path = folder / name
    stream = io.BytesIO()
    with zipfile.ZipFile(GOLDEN / "keras" / name) as given, zipfile.ZipFile(stream, "w") as archive:
        for member in given.namelist():
            data = given.read(member)
            if member.endswith(".h5"):
                if chance.often(0.5):
                    data = hdf5_changed(chance, f"{name} {member}", data)
            elif chance.often(0.3):
                data = json.dumps(changed(chance, changed(chance, json.loads(data)))).encode()
                data = chance.mangled(data) if chance.often(0.2) else data
            kind = chance.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED])
            archive.writestr(zipfile.ZipInfo(member), data, kind)
    data = stream.getvalue()
    path.write_bytes(directory_changed(chance, data) if chance.often(0.3) else data)
    examine(chance, str(path), folder)


# -- reading -------------------------------------------------------------------------------------


def examine(chance, path, folder):
    """Read everything of a checkpoint, in every way.

    Raises:
        AssertionError: what was read is not what was announced.
        CompatRestoreError: whatever was told.
    """
    with open_checkpoint(path) as reader:
        specs = reader.specs()
        variables, roles = reader.variables(), reader.roles()
        assert len(variables) == len(specs)
        assert set(roles) == set(variables)
        assert set(map(reader.key_of, variables)) == set(specs)
        told, values = {}, {}
        for name, spec in specs.items():
            try:
                places = reader.stored(name)
                assert all(p.offset + p.size <= p.source.size for p in places if p.size)
                values[name] = value = reader.read(name)
                assert value.shape == spec.shape
                assert value.dtype == numpy_dtype(spec.dtype)
            except EXPECTED as error:
                told[name] = error
            except errors.UsageError as error:
                assert "opaque" in str(error)  # noqa: PT017
        try:
            reader.verify(specs)
        except errors.DamagedTensorsError:
            assert told or len(values) < len(specs), "verify tells what reading does not"
        else:
            assert not told, "reading tells what verify does not"
        if chance.often(0.05):
            converted(reader, folder, values)
        if told:
            raise next(iter(told.values()))


def converted(reader, folder, values):
    """Convert a checkpoint, and compare what was written with what was read."""
    with_names = {name: reader.key_of(name) for name in reader.variables()}
    try:
        convert(reader.path, folder / "out" / "m", allow_empty=True)
    except (errors.PlanError, errors.OutputError, errors.UsageError):
        return  # names that no V2 checkpoint can have, and that is said
    with open_checkpoint(folder / "out" / "m") as written:
        for name in written.specs():
            key = with_names[name]
            if key in values:
                assert written.read(name).tobytes() == values[key].tobytes() or (
                    values[key].dtype == object
                )


FACES = {
    "table": table_case,
    "bundle": bundle_case,
    "object graph": graph_case,
    "V1": v1_case,
    "safetensors": safetensors_case,
    "npz": npz_case,
    "HDF5": hdf5_case,
    "Keras archive": keras_case,
}


def run(face, first, cases, directory):
    """Run cases, and return what came of them."""
    case = FACES[face]
    outcomes, faults = Counter(), []
    slowest, slowest_seed = 0.0, first
    folder = Path(directory) / "case"
    before = None
    for seed in range(first, first + cases):
        if seed == first + 20 or cases == 1:  # everything is imported by now
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            descriptors = len(os.listdir("/proc/self/fd"))
            limit_memory()
        folder.mkdir()
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, 10 * MOST_SECONDS)
        try:
            case(Chance(f"{face} {seed}"), folder)
            outcomes["right"] += 1
        except EXPECTED as error:
            outcomes[type(error).__name__] += 1
            if not str(error) or len(str(error)) > 20_000:
                faults.append(f"{seed}: a message of {len(str(error))} characters")
        except BaseException as error:  # noqa: BLE001  # which is what is looked for
            outcomes["faults"] += 1
            faults.append(f"{seed}: {''.join(traceback.format_exception(error))[-3000:]}")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        seconds = time.process_time() - begun
        if seconds > slowest:
            slowest, slowest_seed = seconds, seed
        shutil.rmtree(folder)
    if slowest > MOST_SECONDS:
        faults.append(f"{slowest_seed}: {slowest:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if peak - before > MOST_MEMORY:
        faults.append(f"{(peak - before) >> 20} MB")
    if len(os.listdir("/proc/self/fd")) > descriptors:
        faults.append("files were left open")
    return {
        "cases": cases,
        "outcomes": outcomes,
        "faults": faults,
        "slowest": slowest,
        "slowest_seed": slowest_seed,
        "memory": peak - before,
        "peak": peak,
    }


def limit_memory():
    """Let more memory than a case may take be refused."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_long(number, frame):
    del number, frame
    raise TimeoutError(f"more than {10 * MOST_SECONDS} s of work")


def read_within_limits(path):
    """Read all of a checkpoint in a process of its own; return (what was told, seconds, bytes)."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            limit_memory()
            signal.setitimer(signal.ITIMER_VIRTUAL, 10 * MOST_SECONDS)
            told = _told(path)
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            result = json.dumps([told, time.process_time() - begun, taken])
            os.write(writing, result.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pipe.read()
    os.wait()
    return result.decode()


def _told(path):
    try:
        with open_checkpoint(path) as reader:
            reader.roles()
            reader.verify(reader.specs())
            for name in reader.specs():
                reader.read(name)
    except EXPECTED as error:
        return str(error)[:20_000]
    except BaseException as error:  # noqa: BLE001  # which is what is looked for
        return "".join(traceback.format_exception(error))[-3000:]
    return ""


if __name__ == "__main__":
    signal.signal(signal.SIGVTALRM, _too_long)
    warnings.filterwarnings("ignore", "Duplicate name", UserWarning)  # which is what is wanted
    if sys.argv[1] == "SERVE":
        for line in sys.stdin:
            print(read_within_limits(line.rstrip("\n")), flush=True)
        sys.exit()
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
