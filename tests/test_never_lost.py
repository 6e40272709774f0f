"""Writers whose disk fails, whose process is killed or interrupted: one whole checkpoint remains.

The name that is written to holds the old checkpoint or the new one, whole: it is read, verified
and compared byte by byte after each fault. After an error or a signal that the process lived to
see, the directory is as it was. The quick tests go through every writing call; those marked `slow`
take random moments, and system calls as the kernel sees them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from faults import WRITING, faults_at, killed_after, killed_at, short_writes
from formats import snapshot, write_bundle

from compat_restore import convert, open_checkpoint
from compat_restore.checkpoint.writer import Content
from compat_restore.errors import CompatRestoreError, OutputError
from compat_restore.tensors import DType

TEMPLATES = Path(__file__).parent / "golden" / "keras"


@dataclass(frozen=True)
class Kind:
    """An output: what it is called, and how it is asked for."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    template: str = ""

    def write(self, source, folder, **options):
        convert(source, folder / self.name, **self.asked_for, overwrite=True, **options)

    @property
    def asked_for(self):
        into = {"into": TEMPLATES / self.template} if self.template else {}
        return {**self.options, **into, "allow_empty": True}

    @property
    def arguments(self):
        """The same as options of the command line."""
        into = ["--into", str(TEMPLATES / self.template)] if self.template else []
        sizes = [f"--{name.replace('_', '-')}={value}" for name, value in self.options.items()]
        return [*into, *sizes, "--overwrite", "--allow-empty"]


KINDS = {
    "V2": Kind("m"),
    "V2 of several files": Kind("m", {"max_shard_size": 1000}),
    "safetensors": Kind("m.safetensors"),
    "safetensors set": Kind("m.safetensors", {"max_shard_size": 1000}),
    "npz": Kind("m.npz"),
    "h5": Kind("m.weights.h5", template="keras.weights.h5"),
    "keras": Kind("m.keras", template="keras.keras"),
}


def every_kind(test):
    return pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)(test)


def values_like(kind, seed, size=300):
    """Return tensors that an output of this kind takes, all of them other for another seed."""
    chance = np.random.default_rng(seed)
    if kind.template:
        with open_checkpoint(TEMPLATES / kind.template) as reader:
            return {
                name: chance.standard_normal(spec.shape).astype(np.float32)
                for name, spec in reader.variables().items()
                if spec.dtype is DType.float32
            }
    tensors = {
        f"scope/layer_{number}/kernel": chance.standard_normal(size).astype(np.float32)
        for number in range(4)
    }
    return tensors | {"global_step": np.int64(seed), f"only/{seed}": np.full(5, seed, np.int32)}


def make_source(folder, kind, seed, size=300):
    prefix = folder / f"source-{seed}"
    write_bundle(
        prefix,
        [
            Content.of(name, DType(value.dtype.name), value)
            for name, value in values_like(kind, seed, size).items()
        ],
    )
    return prefix


def holds(path):
    """Return what a checkpoint holds, read and verified: bytes by name."""
    with open_checkpoint(path) as reader:
        reader.verify(reader.specs())
        return {name: reader.read(name).tobytes() for name in reader.specs()}


@dataclass
class Place:
    """A directory with an old checkpoint in it, and what a new one would be."""

    folder: Path
    kind: Kind
    sources: tuple[Path, Path]
    old: dict[str, bytes]
    new: dict[str, bytes]
    before: dict[str, bytes]
    after: list[str]

    @property
    def path(self):
        return self.folder / self.kind.name

    def write(self):
        self.kind.write(self.sources[1], self.folder)

    def restore(self):
        """Put everything back to how it was."""
        for name in os.listdir(self.folder):
            (self.folder / name).unlink()
        for name, data in self.before.items():
            (self.folder / name).write_bytes(data)

    def remaining(self):
        """Return "old" or "new": which checkpoint is there, whole."""
        found = holds(self.path)
        assert found in (self.old, self.new), "neither the old checkpoint nor the new one"
        return "old" if found == self.old else "new"

    def check_nothing_is_left(self):
        """Check that the directory holds one of the two checkpoints, and nothing else."""
        found = snapshot(self.folder)
        if self.remaining() == "old":
            assert found == self.before
        else:
            assert sorted(found) == self.after


def make_place(tmp_path, kind, size=300):
    tmp_path.mkdir(exist_ok=True)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "somebody.else").write_bytes(b"s")
    sources = tuple(make_source(tmp_path, kind, seed, size) for seed in (1, 2))
    kind.write(sources[0], folder)
    before, old = snapshot(folder), holds(folder / kind.name)
    kind.write(sources[1], folder)
    after, new = sorted(os.listdir(folder)), holds(folder / kind.name)
    place = Place(folder, kind, sources, old, new, before, after)
    place.restore()
    assert old != new
    return place


# -- errors --------------------------------------------------------------------------------------

FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT]


def failing(number):
    def act():
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("fault", FAULTS, ids=errno.errorcode.get)
@every_kind
def test_trap_25_a_fault_at_any_writing_call_leaves_one_whole_checkpoint_and_no_more(
    tmp_path, kind, fault, counts
):
    place = make_place(tmp_path, kind)
    outcomes = Counter()
    for number in range(1, 1000):
        with faults_at(number, failing(fault)) as counter:
            try:
                place.write()
                told = None
            except OutputError as error:
                told = str(error)
        if not counter.reached:
            break
        there = place.remaining()
        outcomes[f"{there}, {'an error' if told else 'no error'}"] += 1
        if told is None:
            assert there == "new"
        elif "is written" not in told:
            assert os.strerror(fault) in told
            assert there == "old"
            assert snapshot(place.folder) == place.before
        else:
            assert there == "new"
        assert not [name for name in os.listdir(place.folder) if name.startswith(".")]
        place.restore()
    counts(**{"writing calls": number - 1, **outcomes, "lost": 0})
    assert number > 8


@pytest.mark.parametrize("fault", FAULTS, ids=errno.errorcode.get)
@every_kind
def test_a_fault_at_any_writing_call_of_a_first_checkpoint_leaves_nothing(tmp_path, kind, fault):
    source = make_source(tmp_path, kind, 1)
    folder = tmp_path / "made" / "on the way"
    for number in range(1, 1000):
        with faults_at(number, failing(fault)) as counter:
            try:
                convert(source, folder / kind.name, **kind.asked_for)
                told = None
            except OutputError as error:
                told = str(error)
        if not counter.reached:
            break
        if told is None or "is written" in told:
            assert holds(folder / kind.name)
            shutil.rmtree(tmp_path / "made")
        else:
            assert not (tmp_path / "made").exists(), number
    assert number > 8


@every_kind
def test_an_interruption_at_any_writing_call_leaves_one_whole_checkpoint_and_no_more(
    tmp_path, kind
):
    def interrupt():
        raise KeyboardInterrupt

    place = make_place(tmp_path, kind)
    for number in range(1, 1000):
        with faults_at(number, interrupt) as counter, contextlib.suppress(KeyboardInterrupt):
            place.write()
        if not counter.reached:
            break
        if place.remaining() == "old":
            assert snapshot(place.folder) == place.before, number
        assert not [name for name in os.listdir(place.folder) if name.startswith(".")], number
        place.restore()
    assert number > 8


@every_kind
def test_short_writes_are_gone_on_with(tmp_path, kind):
    place = make_place(tmp_path, kind)
    with short_writes():
        place.write()
    assert place.remaining() == "new"
    place.check_nothing_is_left()


def test_every_call_by_which_files_are_written_is_one_that_fails_here():
    package = Path(convert.__code__.co_filename).parent / "checkpoint"
    text = "".join(path.read_text() for path in package.rglob("*.py"))
    for call in ("write", "writev", "pwritev", "sendfile", "truncate", "symlink", "splice"):
        assert f"os.{call}(" not in text
    for call in WRITING:
        assert f"os.{call}(" in text or f'os, "{call}"' in text


@pytest.fixture
def small_disk(tmp_path):
    """Give a file system of 1 MiB, of which the test is the only user."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


@every_kind
def test_trap_25_a_full_disk_is_told_and_the_old_checkpoint_stays(
    tmp_path, small_disk, kind, counts
):
    place = make_place(tmp_path, kind, size=30_000 if not kind.template else 300)
    outcomes = Counter()
    disk = Place(**{**vars(place), "folder": small_disk})
    disk.restore()
    largest = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    needed = sum(len(data) for data in place.before.values()) + 60_000
    steps = {largest - room for room in range(0, min(needed, largest), max(4096, needed // 60))}
    for filling in sorted(steps):
        disk.restore()
        (small_disk / "filler").write_bytes(bytes(max(filling, 0)))
        before = snapshot(small_disk)
        try:
            disk.write()
        except OutputError as error:
            assert "No space left" in str(error) or "is written" in str(error)  # noqa: PT017
            if "is written" not in str(error):
                assert snapshot(small_disk) == before
                assert disk.remaining() == "old"
                outcomes["old, told"] += 1
                continue
        assert disk.remaining() == "new"
        outcomes["new"] += 1
    counts(**{"fillings": len(steps), **outcomes, "lost": 0})
    assert outcomes["old, told"]
    assert outcomes["new"]


def check_by_directory(place):
    """Check that who names the directory, as one may of most formats, gets the same."""
    if not place.kind.template:
        assert holds(place.folder) == holds(place.path)


# -- kills ---------------------------------------------------------------------------------------


@every_kind
def test_trap_24_a_writer_killed_at_any_writing_call_leaves_one_whole_checkpoint(
    tmp_path, kind, counts
):
    place = make_place(tmp_path, kind)
    outcomes = Counter()
    for number in range(1, 1000):
        if not killed_at(number, place.write):
            break
        there = place.remaining()
        outcomes[there] += 1
        # What the killed writer left is in the way of nobody.
        check_by_directory(place)
        place.write()
        assert place.remaining() == "new"
        check_by_directory(place)
        place.restore()
    counts(**{"writing calls": number - 1, **outcomes, "lost": 0})
    assert outcomes["old"]
    assert outcomes["new"]


@every_kind
def test_a_writer_of_a_first_checkpoint_killed_at_any_call_leaves_it_whole_or_not_there(
    tmp_path, kind
):
    source = make_source(tmp_path, kind, 1)
    folder = tmp_path / "out"
    convert(source, folder / kind.name, **kind.asked_for)
    wanted = holds(folder / kind.name)
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        if not killed_at(number, lambda: convert(source, folder / kind.name, **kind.asked_for)):
            break
        with contextlib.suppress(CompatRestoreError):
            assert holds(folder / kind.name) == wanted
    assert number > 8


MOMENTS = {"V2": 150, "V2 of several files": 100, "safetensors": 80, "safetensors set": 60}


@pytest.mark.slow
@every_kind
def test_trap_24_a_writer_killed_at_random_moments_leaves_one_whole_checkpoint(
    tmp_path, kind, counts
):
    place = make_place(tmp_path, kind, size=300_000)  # enough for two threads
    moments = MOMENTS.get({id(k): name for name, k in KINDS.items()}[id(kind)], 40)
    longest = max(killed_after(60, place.write)[1] for _ in range(3))
    chance = random.Random(5)
    outcomes = Counter()
    for _ in range(moments):
        place.restore()
        killed, _ = killed_after(chance.uniform(0, longest * 1.05), place.write)
        outcomes[f"{place.remaining()}{'' if killed else ', not killed'}"] += 1
        check_by_directory(place)
    counts(**{"moments": moments, **outcomes, "lost": 0, "job": f"{longest * 1000:.0f} ms"})


CALLS = (
    "pwrite64,write,copy_file_range,fallocate,ftruncate,fsync,link,linkat,"
    "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
)


def traced(place, *options):
    """Convert in a process whose system calls are watched; return how it ended."""
    command = ["strace", "-f", "-qq", *options, sys.executable, "-B", "-m", "compat_restore"]
    command += ["convert", place.sources[1], place.path, *place.kind.arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def calls_of(place, tmp_path):
    """Return how often a conversion makes each system call that writes."""
    log = tmp_path / "calls"
    done = traced(place, "-o", str(log), "-e", f"trace={CALLS}")
    assert done.returncode == 0, done.stderr
    place.restore()
    lines = log.read_text().splitlines()
    return Counter(line.split("(")[0].split()[-1] for line in lines if "(" in line)


@pytest.fixture
def strace():
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    probe = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("processes cannot be traced here")


@pytest.mark.slow
@pytest.mark.usefixtures("strace")
@every_kind
def test_trap_24_a_process_killed_at_any_system_call_that_writes_leaves_one_whole_checkpoint(
    tmp_path, kind, counts
):
    place = make_place(tmp_path, kind)
    outcomes = Counter()
    for call, times in calls_of(place, tmp_path).items():
        for number in range(1, times + 1):
            inject = f"inject={call}:signal=KILL:when={number}"
            done = traced(place, "-o", os.devnull, "-e", inject)
            assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (inject, done.stderr)
            outcomes[place.remaining()] += 1
            check_by_directory(place)
            place.restore()
    counts(**{"system calls": outcomes.total(), **outcomes, "lost": 0})
    assert outcomes["old"]
    assert outcomes["new"]


@pytest.mark.slow
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EDQUOT"])
def test_trap_25_a_process_whose_system_calls_fail_leaves_one_whole_checkpoint_and_no_more(
    tmp_path, fault, counts
):
    place = make_place(tmp_path, KINDS["V2"])
    outcomes = Counter()
    # What frees room does not fail, nor does the report to stdout.
    fallible = calls_of(place, tmp_path)
    for call in ("unlink", "unlinkat", "rmdir", "write"):
        fallible.pop(call, None)
    for call, times in fallible.items():
        for number in range(1, times + 1):
            inject = f"inject={call}:error={fault}:when={number}+"
            done = traced(place, "-o", os.devnull, "-e", inject)
            there = place.remaining()
            outcomes[f"{there}, status {done.returncode}"] += 1
            assert "Traceback" not in done.stderr
            assert done.returncode in (0, 4), done.stderr
            if there == "old":
                assert snapshot(place.folder) == place.before
            place.restore()
    counts(**{"system calls": outcomes.total(), **outcomes, "lost": 0})
    assert outcomes["old, status 4"]


@pytest.mark.slow
@pytest.mark.usefixtures("strace")
@every_kind
def test_system_calls_that_signals_interrupt_are_made_again(tmp_path, kind):
    place = make_place(tmp_path, kind)
    calls = "pwrite64,fsync,fallocate,ftruncate,copy_file_range"
    done = traced(place, "-o", os.devnull, "-e", f"inject={calls}:error=EINTR:when=1+2")
    assert done.returncode == 0, done.stderr
    place.check_nothing_is_left()
    assert place.remaining() == "new"


# -- signals -------------------------------------------------------------------------------------


def signalled(place, number, seconds):
    """Convert by the command line, send a signal, and return (status, stderr, seconds it took)."""
    command = [sys.executable, "-m", "compat_restore", "convert"]
    command += [place.sources[1], place.path, *place.kind.arguments]
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(number)
    _, told = process.communicate()
    return process.returncode, told, time.perf_counter() - begun


SIGNALLED = ["V2", "safetensors set", "npz"]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def signal_at_random_moments(place, number, moments, seed):
    """Return how many ended in which way.

    A signal that comes while Python itself starts or ends is Python's to answer: the process dies
    of it, before anything was begun, or after everything is done.
    """
    longest = max(signalled(place, 0, 60)[2] for _ in range(3))
    assert place.remaining() == "new"
    chance = random.Random(seed)
    outcomes = Counter()
    for _ in range(moments):
        place.restore()
        status, told, _ = signalled(place, number, chance.uniform(0, longest))
        there = place.remaining()
        if status not in (0, STATUS[number]):
            # While it starts, Python shows a traceback of its own for SIGINT.
            early = number == signal.SIGINT and there == "old" and "in main" not in told
            assert status == -number or (status == 1 and early), (status, told)
            outcomes[f"died while Python started or ended, {there}"] += 1
        else:
            # Where a module is imported, Python itself may pass over a signal.
            assert "Traceback" not in told or "in: <function _get_module_lock" in told, told
            outcomes[f"{status}, {there}"] += 1
            assert (there == "new") or status == STATUS[number]
        assert not [name for name in os.listdir(place.folder) if name.startswith(".")]
        place.check_nothing_is_left()
    return outcomes


@pytest.mark.parametrize("number", STATUS, ids=["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_in_the_middle_of_the_work_leaves_nothing_behind(tmp_path, number):
    place = make_place(tmp_path, KINDS["V2"])
    code = (
        "import os, signal, sys\n"
        "import compat_restore.checkpoint.output as output\n"
        "real = output.OutputFile.sync\n"
        "def sync(self):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    real(self)\n"
        "output.OutputFile.sync = sync\n"
        "from compat_restore.cli import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", code, "convert", place.sources[1], place.path]
    done = subprocess.run(
        [*command, *place.kind.arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == STATUS[number]
    assert "Traceback" not in done.stderr
    assert snapshot(place.folder) == place.before


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS, ids=["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("kind", [KINDS[name] for name in SIGNALLED], ids=SIGNALLED)
def test_signals_at_random_moments_leave_one_whole_checkpoint_and_no_more(
    tmp_path, kind, number, counts
):
    place = make_place(tmp_path, kind, size=500_000)
    outcomes = signal_at_random_moments(place, number, 50, seed=6)
    counts(moments=50, **outcomes, lost=0, leftovers=0)


# -- two at once ---------------------------------------------------------------------------------


def race(place, sources, rounds, options):
    """Let processes write to one name at the same moment; return how that ended."""
    outcomes = Counter()
    wanted = {}
    for source in sources:
        place.kind.write(source, place.folder)
        wanted[source] = holds(place.path)
    for _ in range(rounds):
        place.restore()
        if not options["overwrite"]:
            for name in place.before:
                if name != "somebody.else":
                    (place.folder / name).unlink()
        gate_in, gate_out = os.pipe()
        children = []
        for source in sources:
            child = os.fork()
            if child == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    os.close(gate_out)
                    os.read(gate_in, 1)  # returns when the gate is closed
                    try:
                        convert(source, place.path, **place.kind.asked_for, **options)
                        status = 0
                    except OutputError:
                        status = 4
                os._exit(status)
            children.append(child)
        os.close(gate_in)
        os.close(gate_out)
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
        assert set(statuses) <= {0, 4}
        assert 0 in statuses, "nobody won"
        assert holds(place.path) in wanted.values(), "a mix"
        outcomes[f"{statuses.count(0)} of {len(sources)} wrote"] += 1
        assert not [name for name in os.listdir(place.folder) if name.startswith(".")]
    return outcomes


@pytest.mark.parametrize("overwrite", [False, True])
@every_kind
def test_two_writers_at_once_never_make_a_mix(tmp_path, kind, overwrite):
    place = make_place(tmp_path, kind)
    race(place, place.sources, 5, {"overwrite": overwrite})


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
@every_kind
def test_four_writers_at_once_never_make_a_mix(tmp_path, kind, overwrite, counts):
    place = make_place(tmp_path, kind)
    more = [make_source(tmp_path, kind, seed, size=200 * seed) for seed in (3, 4)]
    outcomes = race(place, [*place.sources, *more], 100, {"overwrite": overwrite})
    counts(rounds=100, **dict(sorted(outcomes.items())), mixes=0, lost=0)
