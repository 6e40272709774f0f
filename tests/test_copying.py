from __future__ import annotations

import os

import numpy as np
import pytest
from formats import MemoryFile, flipped
from hypothesis import given
from hypothesis import strategies as st

from compat_restore.checkpoint import copying
from compat_restore.checkpoint.checksum import crc32c, mask
from compat_restore.checkpoint.copying import Copy, check_tensors, copy_tensors, read_checked
from compat_restore.checkpoint.files import LocalFile
from compat_restore.checkpoint.output import OutputFile
from compat_restore.checkpoint.reader import StoredTensor
from compat_restore.checkpoint.strings import encode_strings
from compat_restore.errors import DamagedCheckpointError, DamagedTensorsError

MIB = 1 << 20
BYTES = np.random.default_rng(0).bytes(9 * MIB + 77)


def stored(source, offset, size, data=BYTES, **changes):
    return StoredTensor(source, offset, size, mask(crc32c(data[offset : offset + size])), **changes)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(BYTES)
    with LocalFile(str(path)) as file:
        yield file


def copied(tmp_path, copies, **options):
    """Return (the bytes that were written, the checksums)."""
    with OutputFile(str(tmp_path / "out")) as output:
        crcs = copy_tensors(copies, output, **options)
        output.place(replace=True)
    return (tmp_path / "out").read_bytes(), crcs


# Large and small ones, some next to each other and some not, all kept tight in the output.
PLACES = [(0, 10), (10, 0), (10, 990), (2000, 5 * MIB), (2000 + 5 * MIB, 3), (8 * MIB, MIB + 77)]


def copies_of(source, places=PLACES):
    copies, position = [], 0
    for number, (offset, size) in enumerate(places):
        copies.append(Copy(f"t{number}", (stored(source, offset, size),), position))
        position += size
    return copies


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("memory", [True, False])
def test_bytes_and_checksums_arrive(tmp_path, source, verify, memory):
    copies = copies_of(MemoryFile(BYTES) if memory else source)
    data, crcs = copied(tmp_path, copies, verify=verify)
    assert data == b"".join(BYTES[offset : offset + size] for offset, size in PLACES)
    assert crcs == [crc32c(BYTES[offset : offset + size]) for offset, size in PLACES]


@given(
    st.lists(
        st.tuples(st.integers(0, 9 * MIB), st.one_of(st.integers(0, 40), st.integers(0, 2 * MIB))),
        max_size=12,
    ),
    st.booleans(),
)
def test_any_ranges_in_any_order_arrive(tmp_path_factory, ranges, verify):
    places = [(offset, min(size, len(BYTES) - offset)) for offset, size in ranges]
    data, crcs = copied(
        tmp_path_factory.mktemp("any"), copies_of(MemoryFile(BYTES), places), verify=verify
    )
    assert data == b"".join(BYTES[offset : offset + size] for offset, size in places)
    assert crcs == [crc32c(BYTES[offset : offset + size]) for offset, size in places]


@pytest.mark.parametrize("verify", [True, False])
def test_pieces_become_one_tensor_with_one_checksum(tmp_path, source, verify):
    pieces = (stored(source, 5 * MIB, 1000), stored(source, 0, 2 * MIB), stored(source, 77, 0))
    data, crcs = copied(tmp_path, [Copy("w", pieces, 0)], verify=verify)
    assert data == BYTES[5 * MIB : 5 * MIB + 1000] + BYTES[: 2 * MIB]
    assert crcs == [crc32c(data)]


def test_what_has_no_stored_checksum_gets_one(tmp_path, source):
    plain = StoredTensor(source, 100, 3 * MIB)
    for verify in (True, False):
        data, crcs = copied(tmp_path, [Copy("w", (plain,), 0)], verify=verify)
        assert crcs == [crc32c(data)]
        assert data == BYTES[100 : 100 + 3 * MIB]


def test_all_damaged_tensors_are_told_at_once(tmp_path):
    source = MemoryFile(flipped(flipped(BYTES, 5), 3 * MIB))
    copies = copies_of(source)
    expected = (
        r"(?s)2 tensors are damaged:.*tensor 't0' in 'memory' \(bytes 0 to 10\) is damaged: the "
        r"checksum of its bytes is [0-9a-f]{8}, [0-9a-f]{8} was stored.*'t3'"
    )
    with pytest.raises(DamagedTensorsError, match=expected) as caught:
        copied(tmp_path, copies)
    assert len(caught.value.faults) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(DamagedTensorsError, match="2 tensors"):
        check_tensors((copy.name, copy.stored[0]) for copy in copies)


def test_one_damaged_tensor_is_a_message_without_a_list(tmp_path):
    with pytest.raises(DamagedTensorsError, match=r"^tensor 't0' in 'memory'"):
        copied(tmp_path, copies_of(MemoryFile(flipped(BYTES, 5))))


def test_a_damaged_piece_of_several_is_told(tmp_path):
    source = MemoryFile(flipped(BYTES, 5 * MIB))
    pieces = (stored(source, 0, 10), stored(source, 5 * MIB, 10))
    with pytest.raises(DamagedTensorsError, match=f"bytes {5 * MIB} to"):
        copied(tmp_path, [Copy("w", pieces, 0)])


def test_unverified_damage_is_carried_along_with_the_checksum_that_tells_it(tmp_path, source):
    wrong = StoredTensor(source, 0, 10, 12345)
    assert copied(tmp_path, [Copy("w", (wrong,), 0)], verify=False)[0] == BYTES[:10]
    with pytest.raises(DamagedCheckpointError):
        read_checked("w", wrong)


def test_strings_are_checked_by_their_own_rule(tmp_path):
    data, crc = encode_strings([b"a", b"", b"ccc"])
    good = StoredTensor(MemoryFile(data), 0, len(data), mask(crc), strings=3)
    assert copied(tmp_path, [Copy("s", (good,), 0)]) == (data, [crc])
    bad = StoredTensor(MemoryFile(flipped(data, 3)), 0, len(data), mask(crc), strings=3)
    with pytest.raises(DamagedTensorsError, match="tensor 's'"):
        copied(tmp_path, [Copy("s", (bad,), 0)])


def test_a_source_that_is_shorter_than_it_was_is_told(tmp_path, source):
    os.truncate(tmp_path / "source", MIB)
    for verify in (True, False):
        with pytest.raises(DamagedCheckpointError, match="is it being written"):
            copied(tmp_path, copies_of(source), verify=verify)


@pytest.mark.parametrize("kernel", ["missing", "refuses", "stops"])
def test_where_the_kernel_does_not_copy_the_bytes_arrive_all_the_same(
    tmp_path, source, monkeypatch, kernel
):
    def refuse(*_args):
        raise OSError(18, "Invalid cross-device link")

    if kernel == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        call = refuse if kernel == "refuses" else lambda *_args: 0
        monkeypatch.setattr(os, "copy_file_range", call, raising=False)
    data, _ = copied(tmp_path, copies_of(source), verify=False)
    assert data == b"".join(BYTES[offset : offset + size] for offset, size in PLACES)


def test_unverified_bytes_are_not_read_where_the_kernel_copies(tmp_path, source, monkeypatch):
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system has no copy_file_range")
    read = []
    real = LocalFile.read
    monkeypatch.setattr(
        LocalFile, "read", lambda self, at, length: read.append(length) or real(self, at, length)
    )
    copied(tmp_path, copies_of(source), verify=False)
    assert sum(read) < 20  # a byte here and there, to see that the file is long enough


@pytest.fixture
def sharing(tmp_path):
    """A directory on a file system that shares blocks between files; needs root to mount one."""
    import shutil
    import subprocess

    image, folder = tmp_path / "image", tmp_path / "xfs"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root and mkfs.xfs, to make a file system that shares blocks")
    with image.open("wb") as file:
        file.truncate(320 << 20)
    made = subprocess.run(["mkfs.xfs", "-q", str(image)], capture_output=True, check=False)
    mount = ["mount", "-o", "loop", str(image), str(folder)]
    if made.returncode or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no such file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("verify", [True, False])
def test_blocks_are_shared_where_the_file_system_can(sharing, monkeypatch, verify):
    (sharing / "source").write_bytes(BYTES)
    written = []
    real = OutputFile.write_at
    monkeypatch.setattr(
        OutputFile,
        "write_at",
        lambda self, at, data: written.append(len(data)) or real(self, at, data),
    )
    size = 8 * MIB
    with LocalFile(str(sharing / "source")) as source, OutputFile(str(sharing / "out")) as output:
        assert copying.shares_blocks(source, output)
        [crc] = copy_tensors([Copy("w", (stored(source, 100, size),), 100)], output, verify=verify)
        output.place(replace=False)
    assert (sharing / "out").read_bytes()[100:] == BYTES[100 : 100 + size]
    assert crc == crc32c(BYTES[100 : 100 + size])
    assert sum(written) < 2 * copying.BLOCK  # the ends, which are no whole blocks


def test_a_tensor_that_shares_blocks_is_checked(sharing):
    (sharing / "source").write_bytes(flipped(BYTES, 4 * MIB))
    with (
        LocalFile(str(sharing / "source")) as source,
        OutputFile(str(sharing / "out")) as output,
        pytest.raises(DamagedTensorsError),
    ):
        copy_tensors([Copy("w", (stored(source, 0, 8 * MIB),), 0)], output)
