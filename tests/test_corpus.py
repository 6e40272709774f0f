"""The reference checkpoints, read in processes that know nothing of TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.corpus

# For each folder with a variables.json: what reads differently from what is written there.
READ_ALL = """
import hashlib, json, os, sys
import numpy as np
from compat_restore import open_checkpoint

def sha1(data):
    return hashlib.sha1(data).hexdigest()

for folder in sys.argv[1:]:
    truth = json.load(open(os.path.join(folder, "variables.json"), encoding="utf-8"))
    differ = []
    with open_checkpoint(os.path.join(folder, truth["checkpoint"])) as reader:
        specs = reader.specs()
        rows = {row["name"]: row for row in truth["variables"]}
        differ += [f"only in one: {name}" for name in set(rows) ^ set(specs)]
        for name in set(rows) & set(specs):
            row, array = rows[name], reader.read(name)
            if array.dtype == object:
                elements = array.ravel().tolist()
                joined = sha1(b"\\0".join(elements))
                alone = sha1(np.asarray(elements[0]).tobytes()) if array.shape == () else joined
                right = joined == row["sha1_of_joined"] if "sha1_of_joined" in row else alone == row["sha1"]
            else:
                right = sha1(array.tobytes()) == row["sha1"]
            if not (right and list(array.shape) == row["shape"] and specs[name].dtype == row["dtype"]):
                differ.append(name)
        reader.verify(specs)
    print(json.dumps([folder, len(truth["variables"]), differ]), flush=True)
assert "tensorflow" not in sys.modules
"""

OPEN_AND_READ = """
import json, sys
from compat_restore import open_checkpoint
from compat_restore.errors import CompatRestoreError

for path in sys.argv[1:]:
    found = []
    try:
        with open_checkpoint(path) as reader:
            for name in reader.specs():
                try:
                    reader.read(name)
                except CompatRestoreError as error:
                    found.append([type(error).__name__, str(error)])
    except CompatRestoreError as error:
        found.append([type(error).__name__, str(error)])
    print(json.dumps([path, found]), flush=True)
assert "tensorflow" not in sys.modules
"""


def run(program, *arguments):
    """Return the lines that a program printed in an interpreter of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_variable_of_every_reference_checkpoint_reads_as_tensorflow_read_it(corpus):
    folders = sorted(path.parent for path in corpus.rglob("variables.json"))
    assert len(folders) >= 30
    found = run(READ_ALL, *folders)
    assert [(folder, differ) for folder, _, differ in found] == [(str(f), []) for f in folders]
    assert sum(count for _, count, _ in found) > 1000


# Each damaged checkpoint, the error that it gives, and what that has to say.
DAMAGED = {
    "empty_index": ("DamagedCheckpointError", "is empty"),
    "flipped_byte": ("DamagedCheckpointError", "checksum"),
    "flipped_v1/v1": ("DamagedCheckpointError", "checksum"),
    "lfs_pointer_data": ("DamagedCheckpointError", "git lfs pull"),
    "lfs_pointer_v1/v1": ("CheckpointFormatError", "git lfs pull"),
    "missing_data": ("CheckpointNotFoundError", "not the weights"),
    "missing_index": ("CheckpointNotFoundError", "index"),
    "pytorch_zip": ("CheckpointFormatError", "zip archive"),
    "truncated_data": ("DamagedCheckpointError", "cut short"),
    "truncated_index": ("CheckpointFormatError", "cut short"),
    "truncated_v1/v1": ("CheckpointFormatError", "cut short"),
}


def test_every_damaged_checkpoint_is_in_the_table(corpus):
    folders = {path.name for path in (corpus / "special" / "damaged").iterdir() if path.is_dir()}
    assert folders == {name.split("/")[0] for name in DAMAGED}


@pytest.mark.parametrize("named", ["", "model.ckpt"], ids=["directory", "prefix"])
def test_every_damaged_checkpoint_gives_exactly_one_error_that_says_what_is_wrong(corpus, named):
    paths = [corpus / "special" / "damaged" / name / named for name in DAMAGED]
    found = [errors for _, errors in run(OPEN_AND_READ, *paths)]
    assert [len(errors) for errors in found] == [1] * len(DAMAGED)
    for (name, (kind, what)), ((given, message),) in zip(DAMAGED.items(), found, strict=True):
        assert (given, what in message) == (kind, True), f"{name}: {given}: {message}"


def test_state_files_of_moved_directories_are_understood(corpus):
    program = """
import json, sys
from compat_restore import open_checkpoint
for folder in sys.argv[1:]:
    with open_checkpoint(folder) as reader:
        print(json.dumps([reader.path, len(reader.notes)]))
"""
    folder = corpus / "special" / "multi_ckpt_dir"
    names = ("absolute", "moved", "relative")
    found = run(program, *(folder / name for name in names))
    assert [path for path, _ in found] == [str(folder / name / "model.ckpt-7") for name in names]
    assert found[2][1] == 0


def test_a_prefix_of_two_checkpoints_is_told(corpus):
    folder = corpus / "real" / "ardiya+siamesenetwork-tensorflow" / "model__model.ckpt"
    program = """
import json, sys
from compat_restore import open_checkpoint
with open_checkpoint(sys.argv[1]) as reader:
    print(json.dumps([reader.format, list(reader.notes)]))
"""
    ((found, notes),) = run(program, folder / "model.ckpt")
    assert found == "V2 tensor bundle, name-based"
    assert len(notes) == 1


ROLES = """
import json, sys
from compat_restore import open_checkpoint
with open_checkpoint(sys.argv[1]) as reader:
    roles = reader.roles()
    print(json.dumps([[name, role.kind.value, role.owner] for name, role in roles.items()]))
"""


# In these checkpoints the last word of a name tells its role, whatever the rest of it is.
@pytest.mark.parametrize(
    ("folder", "slots", "averages", "bookkeeping"),
    [
        (
            "real/pypi_guesslang-0.9.3/guesslang__data__model__model.ckpt-40198",
            {"RMSProp", "RMSProp_1"}, set(), {"global_step"},
        ),
        (
            "special/optimizers/adam",
            {"Adam", "Adam_1"}, set(), {"global_step", "beta1_power", "beta2_power"},
        ),
        (
            "special/ema",
            {"Momentum"}, {"ExponentialMovingAverage", "biased", "local_step"}, {"global_step"},
        ),
        (
            "transformers/bert_tiny_2_128_pretrain_adam",
            {"adam_m", "adam_v"}, set(), {"global_step"},
        ),
    ],
)  # fmt: skip
def test_the_roles_of_real_names_and_their_owners(corpus, folder, slots, averages, bookkeeping):
    (found,) = run(ROLES, corpus / folder)
    kinds = dict.fromkeys(slots, "slot") | dict.fromkeys(averages, "average")
    kinds |= dict.fromkeys(bookkeeping, "bookkeeping")
    assert {kind for _, kind, _ in found} == {"variable", *kinds.values()}
    for name, kind, owner in found:
        assert kind == kinds.get(name.rsplit("/", 1)[-1], "variable"), name
        if kind in {"slot", "average"}:
            assert name.startswith(f"{owner}/"), name
