"""Every byte of a checkpoint flipped, cut off, added to or mixed up: never a wrong value.

The quick tests take a sample of the places; those marked `slow` take all of them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from formats import rows_of, table_of, truth_of, v1_entries, write_bundle

from compat_restore import open_checkpoint
from compat_restore.checkpoint.npz_writer import NpzWriter
from compat_restore.checkpoint.writer import Content
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DamagedTensorsError,
)
from compat_restore.tensors import DType, Slice

V2 = ("plain", "partitioned", "sharded", "dtypes", "object_based")
V1 = ("v1", "partitioned_v1", "sharded_v1", "dtypes_v1")
OURS = "ours"
ALL = (*V2, *V1, OURS)

TOLD = "told when opened"
LISTED = "told of the tensor"
HARMLESS = "harmless"


def write_ours(folder):
    """Write a checkpoint of every way in which the writer stores a tensor; return its rows."""
    folder.mkdir()
    strings = np.array([b"", b"\0", b"a longer one" * 20], object)
    contents = [
        Content.of("scope/kernel", DType.float32, np.arange(60, dtype=np.float32).reshape(6, 10)),
        Content.of("scope/strings", DType.string, strings),
        Content.of("nothing", DType.float64, np.zeros((0, 3))),
        Content.of("half", DType.float16, np.arange(5, dtype=np.float16)),
        Content(
            name="parted",
            dtype=DType.int64,
            shape=(4, 3),
            read=lambda: np.arange(12).reshape(4, 3),
            slices=(Slice((0, 0), (3, 3)), Slice((3, 0), (1, 3))),
        ),
    ]
    write_bundle(folder / "model.ckpt", contents, max_shard_size=200)
    with open_checkpoint(folder) as reader:
        return rows_of(reader)


@pytest.fixture
def checkpoint(golden, tmp_path):
    """Return a function that gives (a checkpoint that may be damaged, what it holds)."""

    def copy(kind):
        where = tmp_path / kind
        if kind == OURS:
            return where, write_ours(where)
        shutil.copytree(golden / kind, where)
        return where, truth_of(golden / kind)

    return copy


def parts_of(folder):
    """Return the files that make up a checkpoint, and what to open."""
    with open_checkpoint(folder) as reader:
        return [Path(name) for name in reader.files()], reader.path


def outcome(path, truth):
    """Return what became of a damaged checkpoint.

    Raises:
        AssertionError: a value is wrong, a variable is missing, or an error is not one of damage.
    """
    try:
        reader = open_checkpoint(path)
    except (DamagedCheckpointError, CheckpointFormatError) as error:
        told = str(error)
        assert os.path.basename(path).split("-?")[0] in told
        return TOLD
    with reader:
        if ".keras" in str(path) and set(reader.specs()) != set(truth):
            # One checksum over names and values: names are listed without it, values never given.
            for name in reader.specs():
                with pytest.raises(DamagedCheckpointError):
                    reader.read(name)
            return LISTED
        assert set(reader.specs()) == set(truth), "variables are missing"
        damaged = set()
        for name in truth:
            try:
                value = reader.read(name)
            except DamagedCheckpointError as error:
                told = str(error)
                assert name in told or os.path.basename(path) in told
                damaged.add(name)
                continue
            assert row_of(reader, name, value) == truth[name], f"a wrong value of {name}"
        try:
            reader.verify(truth)
        except DamagedTensorsError as error:
            told = "\n".join(error.faults)
            found = {n for n in truth if any(f"'{n}{end}" in told for end in ("'", " (part", "."))}
            assert found == damaged
        except DamagedCheckpointError:  # of all tensors, under one checksum
            assert damaged == set(truth)
        else:
            assert not damaged
    return LISTED if damaged else HARMLESS


def row_of(reader, name, value):
    class One:
        def specs(self):
            return {name: reader.specs()[name]}

        def read(self, _):
            return value

    return rows_of(One())[name]


class Flips:
    """A file of which one byte at a time is another, and what came of it each time."""

    def __init__(self, path, truth, checkpoint):
        self.whole = path.read_bytes()
        self.counts = Counter()
        self._truth, self._checkpoint = truth, checkpoint
        self._file = path.open("r+b", buffering=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def flip(self, at, bits):
        descriptor = self._file.fileno()
        os.pwrite(descriptor, bytes([self.whole[at] ^ bits]), at)
        try:
            found = outcome(self._checkpoint, self._truth)
        except BaseException as error:
            error.add_note(f"byte {at} of {self._file.name}, bits {bits:#04x}")
            raise
        finally:
            os.pwrite(descriptor, self.whole[at : at + 1], at)
        self.counts[found] += 1
        return found


def flip_all(folder, truth, step):
    """Flip every `step`-th byte of every file of a checkpoint; return what came of it."""
    files, path = parts_of(folder)
    total = Counter()
    for file in files:
        with Flips(file, truth, path) as flips:
            for at in range(0, len(flips.whole), step):
                flips.flip(at, 0xFF if at % 2 else 1 << at // 2 % 8)
            total += flips.counts
    return total


# -- flips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_flipped_bytes_are_damage_and_never_a_wrong_value(checkpoint, kind):
    found = flip_all(*checkpoint(kind), step=29)
    assert found[HARMLESS] == 0
    assert found[TOLD]
    assert found[LISTED] or kind in V1  # which are so small that one block has all


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_every_flipped_byte_is_damage_and_never_a_wrong_value(checkpoint, kind, counts):
    found = flip_all(*checkpoint(kind), step=1)
    counts(**{"flips": found.total(), **found, "wrong values": 0, "missing variables": 0})
    assert found[HARMLESS] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [V2, (*V1, OURS)])
def test_ten_thousand_random_flips_are_damage_and_never_a_wrong_value(checkpoint, kinds, counts):
    chance = random.Random(1)
    total = Counter()
    for kind in kinds:
        folder, truth = checkpoint(kind)
        files, path = parts_of(folder)
        for number, file in enumerate(files):
            with Flips(file, truth, path) as flips:
                share = 5000 // len(kinds) * (number + 1) // len(files)
                share -= 5000 // len(kinds) * number // len(files)
                for _ in range(share):
                    flips.flip(chance.randrange(len(flips.whole)), chance.randrange(1, 256))
                total += flips.counts
    counts(**{"flips": total.total(), **total, "wrong values": 0, "missing variables": 0})
    assert total.total() == 5000
    assert total[HARMLESS] == 0


@pytest.fixture(scope="module")
def large_index(tmp_path_factory):
    """Return (prefix, truth) of a checkpoint of 20,000 scalars: an index of several blocks."""
    prefix = tmp_path_factory.mktemp("large") / "model.ckpt"
    contents = [
        Content.of(f"scope/layer_{number:05d}/kernel", DType.float32, np.float32(number))
        for number in range(20_000)
    ]
    write_bundle(prefix, contents)
    return prefix, {content.name: None for content in contents}


def flip_index(large_index, number):
    prefix, truth = large_index
    index = prefix.with_name("model.ckpt.index")
    chance = random.Random(2)
    with Flips(index, truth, str(prefix)) as flips:
        for _ in range(number):
            at = chance.randrange(len(flips.whole))
            assert flips.flip(at, chance.randrange(1, 256)) == TOLD, at
    return len(flips.whole)


def test_trap_22_a_flipped_byte_of_a_large_index_is_told_when_it_is_opened(large_index):
    flip_index(large_index, 30)


@pytest.mark.slow
def test_trap_22_two_thousand_flips_of_a_large_index_are_told_when_it_is_opened(
    large_index, counts
):
    size = flip_index(large_index, 2000)
    counts(entries=20_000, bytes=size, flips=2000, **{"told when opened": 2000, "shorter lists": 0})


@pytest.fixture
def large_v1(tmp_path):
    """Return (path, truth) of a V1 file of over 1 MB, in several blocks."""
    chance = np.random.default_rng(3)
    tensors = {
        f"scope/layer_{number:02d}/kernel": chance.standard_normal(
            24_000 if number % 5 == 0 else 300
        ).astype(np.float32)
        for number in range(60)
    }
    path = tmp_path / "model.ckpt"
    path.write_bytes(table_of(v1_entries(tensors)))
    with open_checkpoint(path) as reader:
        return path, rows_of(reader)


def flip_v1(path, truth, number):
    chance = random.Random(4)
    with Flips(path, truth, str(path)) as flips:
        for _ in range(number):
            flips.flip(chance.randrange(len(flips.whole)), chance.randrange(1, 256))
    assert flips.counts[HARMLESS] == 0
    return len(flips.whole), flips.counts


def test_a_flipped_byte_of_a_large_v1_file_is_damage(large_v1):
    size, _ = flip_v1(*large_v1, 40)
    assert size > 1 << 20


@pytest.mark.slow
def test_two_thousand_flips_of_a_large_v1_file_are_damage(large_v1, counts):
    size, found = flip_v1(*large_v1, 2000)
    counts(bytes=size, flips=2000, **found, **{"not found": 0})
    assert size > 1 << 20


@pytest.mark.slow
@pytest.mark.corpus
def test_two_thousand_flips_of_a_published_v1_file_are_damage(corpus, tmp_path, counts):
    [published] = corpus.glob("real/ardiya*/v1_only/model.ckpt")
    path = tmp_path / "model.ckpt"
    path.write_bytes(published.read_bytes())
    with open_checkpoint(path) as reader:
        truth = rows_of(reader)
    size, found = flip_v1(path, truth, 2000)
    counts(bytes=size, flips=2000, **found, **{"not found": 0})
    assert size > 1 << 20


def npz_of(tmp_path):
    path = tmp_path / "m.npz"
    with NpzWriter(str(path)) as writer:
        tensors = {"a/kernel": np.arange(40, dtype=np.float32), "b": np.int64(3)}
        tensors["none"] = np.zeros((0, 2))
        writer.write([Content.of(n, DType(v.dtype.name), v) for n, v in tensors.items()])
        writer.finish()
    with open_checkpoint(path) as reader:
        return path, rows_of(reader)


def test_every_flipped_byte_of_an_npz_file_is_damage_or_harmless(tmp_path, counts):
    path, truth = npz_of(tmp_path)
    with Flips(path, truth, str(path)) as flips:
        for at in range(len(flips.whole)):
            flips.flip(at, 0xFF if at % 2 else 1 << at // 2 % 8)
    counts(flips=flips.counts.total(), **flips.counts, **{"wrong values": 0})
    # Times, versions, attributes and padding of members say nothing of values.
    assert flips.counts[HARMLESS] < 100 * len(truth)


@pytest.mark.parametrize("name", ["keras.keras", "tf_keras.keras"])
@pytest.mark.parametrize("step", [211, pytest.param(3, marks=pytest.mark.slow)])
def test_flipped_bytes_of_a_keras_archive_are_damage_or_harmless(
    golden, tmp_path, name, step, counts
):
    path = tmp_path / name
    path.write_bytes((golden / "keras" / name).read_bytes())
    with open_checkpoint(path) as reader:
        truth = rows_of(reader)
    with Flips(path, truth, str(path)) as flips:
        for at in range(0, len(flips.whole), step):
            flips.flip(at, 0xFF if at % 2 else 1 << at // 2 % 8)
    counts(flips=flips.counts.total(), **flips.counts, **{"wrong values": 0})


# -- cut short, and added to ---------------------------------------------------------------------


def cut_everywhere(folder, truth, step):
    files, path = parts_of(folder)
    total = Counter()
    for file in files:
        whole = file.read_bytes()
        for length in range(0, len(whole), step):
            os.truncate(file, length)
            with pytest.raises((DamagedCheckpointError, CheckpointFormatError)) as told:
                open_checkpoint(path)
            assert file.name in str(told.value)
            total["told when opened"] += 1
            file.write_bytes(whole)
    assert outcome(path, truth) == HARMLESS
    return total


@pytest.mark.parametrize("kind", ALL)
def test_a_file_cut_short_is_one_error_when_it_is_opened(checkpoint, kind):
    cut_everywhere(*checkpoint(kind), step=97)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_a_file_cut_short_at_any_length_is_one_error_when_it_is_opened(checkpoint, kind, counts):
    counts(**cut_everywhere(*checkpoint(kind), step=1))


@pytest.mark.parametrize("more", [b"\0", b"\n", bytes(48), bytes(4096), b"\xff" * 100])
@pytest.mark.parametrize("kind", ALL)
def test_bytes_appended_are_an_error_or_after_the_last_tensor_harmless(checkpoint, kind, more):
    folder, truth = checkpoint(kind)
    files, path = parts_of(folder)
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole + more)
        assert outcome(path, truth) == (HARMLESS if ".data-" in file.name else TOLD)
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", ["plain", "v1"])
def test_a_table_appended_to_a_table_is_no_table(checkpoint, kind):
    folder, truth = checkpoint(kind)
    files, path = parts_of(folder)
    files[0].write_bytes(files[0].read_bytes() * 2)
    assert outcome(path, truth) == TOLD


# -- the wrong files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_missing_file_is_told_by_its_name(checkpoint, kind):
    folder, _ = checkpoint(kind)
    files, path = parts_of(folder)
    for file in files:
        moved = file.rename(folder / "elsewhere")
        with pytest.raises(CheckpointNotFoundError, match=file.name.replace("-00000-of-00003", "")):
            open_checkpoint(path)
        moved.rename(file)


@pytest.mark.parametrize("kind", ALL)
def test_an_empty_file_is_damage(checkpoint, kind):
    folder, _ = checkpoint(kind)
    files, path = parts_of(folder)
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(b"")
        with pytest.raises(DamagedCheckpointError, match=file.name):
            open_checkpoint(path)
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("foreign", [b"\0", b"<html>not here</html>", b"version https://git-lfs"])
def test_a_foreign_file_of_the_same_size_is_damage(checkpoint, kind, foreign):
    folder, truth = checkpoint(kind)
    files, path = parts_of(folder)
    for file in files:
        whole = file.read_bytes()
        file.write_bytes((foreign * len(whole))[: len(whole)])
        found = outcome(path, truth)
        # The object graph is read when the checkpoint is opened, and is data.
        assert found in ((TOLD, LISTED) if kind == "object_based" else (LISTED,)) or (
            ".data-" not in file.name and found == TOLD
        )
        file.write_bytes(whole)


def swap(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_swapped_data_files_are_damage(checkpoint, pair):
    folder, truth = checkpoint("sharded")
    data = sorted(folder.glob("*.data-*"))
    swap(data[pair[0]], data[pair[1]])
    assert outcome(str(folder / "model.ckpt"), truth) in (TOLD, LISTED)


def test_swapped_data_files_of_one_size_are_damage_to_every_tensor(tmp_path):
    tensors = [Content.of(name, DType.int32, np.full(50, ord(name))) for name in "ab"]
    write_bundle(tmp_path / "m", tensors, max_shard_size=200)
    swap(*sorted(tmp_path.glob("*.data-*")))
    with open_checkpoint(tmp_path / "m") as reader, pytest.raises(DamagedTensorsError) as told:
        reader.verify(reader.specs())
    assert len(told.value.faults) == 2


def test_swapped_v1_files_say_themselves_what_they_hold(checkpoint):
    folder, truth = checkpoint("sharded_v1")
    files, path = parts_of(folder)
    swap(files[0], files[2])
    assert outcome(path, truth) == HARMLESS


def test_a_v1_file_that_stands_there_twice_is_damage(checkpoint):
    folder, truth = checkpoint("sharded_v1")
    files, path = parts_of(folder)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(DamagedCheckpointError, match="stands in two files"):
        open_checkpoint(path)
    assert truth


def test_an_index_of_another_checkpoint_is_damage(checkpoint):
    folder, truth = checkpoint("plain")
    other, _ = checkpoint("object_based")
    shutil.copy(other / "ckpt-1.index", folder / "model.ckpt.index")
    with pytest.raises((DamagedCheckpointError, CheckpointNotFoundError)):
        open_checkpoint(folder / "model.ckpt")
    shutil.copy(folder / "model.ckpt.data-00000-of-00001", other / "ckpt-1.data-00000-of-00001")
    with pytest.raises(DamagedCheckpointError):
        open_checkpoint(other / "ckpt-1")
    assert truth


def test_data_of_the_same_model_at_another_step_is_damage_to_what_changed(tmp_path):
    for step in (1, 2):
        tensors = {"w": np.full(9, step, np.float32), "same": np.ones(3, np.float32)}
        write_bundle(
            tmp_path / f"m-{step}", [Content.of(n, DType.float32, v) for n, v in tensors.items()]
        )
    data = "data-00000-of-00001"
    (tmp_path / f"m-1.{data}").write_bytes((tmp_path / f"m-2.{data}").read_bytes())
    with open_checkpoint(tmp_path / "m-1") as reader:
        assert reader.read("same").tolist() == [1, 1, 1]
        with pytest.raises(DamagedTensorsError, match="'w'") as told:
            reader.verify(reader.specs())
    assert len(told.value.faults) == 1
