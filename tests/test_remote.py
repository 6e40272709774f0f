from __future__ import annotations

import contextlib
import http.server
import io
import os
import shutil
import sys
import tempfile
import threading

import numpy as np
import pytest
from checkpoints import numbers, write
from formats import rows_of, truth_of

from compat_restore import Rules, convert, open_checkpoint
from compat_restore.checkpoint import remote
from compat_restore.checkpoint.files import is_directory, is_regular_file, listing, open_source
from compat_restore.checkpoint.locate import Location, locate
from compat_restore.checkpoint.output import create_output, remove, sync_directory
from compat_restore.cli import main
from compat_restore.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    InputError,
    MissingDependencyError,
    OutputError,
    UsageError,
)

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

MIB = 1 << 20


class FileServer:
    """An HTTP server of files in memory, on this machine; it counts what it is asked.

    Attributes:
        files: bytes by path.
        faults: what to answer for a path: a status, or "cut" to break off in the middle.
        ranges: whether it answers with ranges; one that does not sends whole files.
        sizes: whether it says how long an answer is.
        tagged: whether it sends ETags, and keeps to `If-Match`.
        requests: method, path and bytes sent of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, object] = {}
        self.ranges = self.sizes = self.tagged = True
        self.requests: list[list] = []
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def sent(self, suffix: str = "") -> int:
        """Return how many bytes of files with this ending were sent."""
        return sum(count for _, path, count in self.requests if path.endswith(suffix))

    def put(self, folder, prefix: str = "") -> None:
        """Take the files of a directory."""
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.files[f"{prefix}/{path.name}"] = path.read_bytes()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FileServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        owner = self.owner
        path = self.path.partition("?")[0]
        entry = [self.command, path, 0]
        owner.requests.append(entry)
        fault = owner.faults.get(path)
        data = owner.files.get(path)
        etag = f'"{hash(data):x}"'
        if data is None or isinstance(fault, int):
            self._empty(fault if isinstance(fault, int) else 404)
            return
        if owner.tagged and self.headers.get("If-Match", etag) != etag:
            self._empty(412)
            return
        status, body = 200, data
        asked = self.headers.get("Range")
        if asked and owner.ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            if int(start) >= len(data):
                self._empty(416)
                return
            status, body = 206, data[int(start) : int(end) + 1]
        self.send_response(status)
        if status == 206:
            self.send_header(
                "Content-Range", f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}"
            )
        if owner.sizes:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        if owner.tagged:
            self.send_header("ETag", etag)
        self.end_headers()
        if fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        if with_body:
            with contextlib.suppress(OSError):  # the reader has seen enough
                for start in range(0, len(body), MIB // 4):
                    entry[2] += len(body[start : start + MIB // 4])
                    self.wfile.write(body[start : start + MIB // 4])

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server():
    running = FileServer()
    yield running
    running.close()


@pytest.fixture
def memory():
    """Return fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")

    def clear():
        system.store.clear()
        system.pseudo_dirs[:] = [""]

    clear()
    yield system
    clear()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.0)


def put(system, folder, where, name="model.ckpt"):
    """Copy a golden checkpoint into a file system; return its URL."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("model.ckpt"):
            system.pipe_file(
                f"{where}/{path.name.replace('model.ckpt', name, 1)}", path.read_bytes()
            )
    return f"memory:/{where}/{name}"


# -- locating ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["plain", "sharded", "v1", "sharded_v1", "partitioned_v1"])
def test_a_checkpoint_in_memory_reads_as_it_does_from_the_disk(memory, golden, folder):
    url = put(memory, golden / folder, "/bucket/run")
    with open_checkpoint(url) as reader:
        assert rows_of(reader) == truth_of(golden / folder)
        assert reader.path.startswith(url)
        assert all(is_regular_file(path) for path in reader.files())


@pytest.mark.parametrize("suffix", ["", ".index", ".data-00000-of-00001", ".meta"])
def test_any_file_of_a_checkpoint_at_a_url_means_it(memory, golden, suffix):
    url = put(memory, golden / "plain", "/bucket")
    memory.pipe_file("/bucket/model.ckpt.meta", b"graph")
    assert locate(url + suffix) == Location("V2", url)


def test_a_checkpoint_at_the_root_of_a_file_system_is_found(memory, golden):
    put(memory, golden / "plain", "", "m")
    assert locate("memory://m") == Location("V2", "memory://m")
    with open_checkpoint("memory://m") as reader:
        assert rows_of(reader) == truth_of(golden / "plain")


def test_a_directory_at_a_url_means_its_one_checkpoint(memory, golden):
    url = put(memory, golden / "plain", "/bucket/run")
    memory.pipe_file("/bucket/run/events.out.tfevents.1", b"log")
    for folder in ("memory://bucket/run", "memory://bucket/run/"):
        assert locate(folder) == Location("V2", url)


@pytest.mark.parametrize("named", ["m-6", "memory://bucket/run/m-6"])
def test_a_state_file_at_a_url_chooses_among_checkpoints(memory, golden, named):
    put(memory, golden / "plain", "/bucket/run", "m-5")
    url = put(memory, golden / "plain", "/bucket/run", "m-6")
    memory.pipe_file("/bucket/run/checkpoint", f'model_checkpoint_path: "{named}"\n'.encode())
    assert locate("memory://bucket/run") == Location("V2", url)


@pytest.mark.parametrize(
    ("named", "lost"),
    [
        ("/tmp/m-6", "on another machine"),
        ("gs://elsewhere/m-6", "on another machine"),
        ("memory://elsewhere/m-6", "on another machine"),
        ("old/m-6", "not there"),
    ],
)
def test_a_state_file_at_a_url_leads_to_no_other_machine(memory, golden, named, lost):
    url = put(memory, golden / "plain", "/bucket/run", "m-6")
    memory.pipe_file("/bucket/run/checkpoint", f'model_checkpoint_path: "{named}"\n'.encode())
    found = locate("memory://bucket/run")
    assert found.path == url
    assert found.notes[0].endswith(f"names '{named}', which is {lost}; '{url}' was taken")


def test_a_local_state_file_leads_to_no_server(server, golden, tmp_path):
    server.put(golden / "plain")
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{server.url}/model.ckpt"\n')
    with pytest.raises(CheckpointNotFoundError, match="neither there nor beside it"):
        locate(str(tmp_path))
    for path in (golden / "plain").iterdir():
        shutil.copy(path, tmp_path / path.name)
    found = locate(str(tmp_path))
    assert found.path == str(tmp_path / "model.ckpt")
    assert "on another machine" in found.notes[0]
    assert server.requests == []


def test_a_saved_model_at_a_url_means_its_variables(memory, golden):
    url = put(memory, golden / "plain", "/bucket/sm/variables", "variables")
    memory.pipe_file("/bucket/sm/saved_model.pb", b"")
    assert locate("memory://bucket/sm").path == url
    with open_checkpoint("memory://bucket/sm/saved_model.pb") as reader:
        assert rows_of(reader) == truth_of(golden / "plain")


def test_trap_21_is_told_at_a_url(memory, golden):
    url = put(memory, golden / "plain", "/bucket")
    memory.pipe_file("/bucket/model.ckpt", (golden / "v1" / "model.ckpt").read_bytes())
    (note,) = locate(url).notes
    assert "V1 checkpoint beside the V2 checkpoint" in note


def test_what_is_missing_at_a_url_is_told_with_its_neighbours(memory, golden):
    put(memory, golden / "plain", "/bucket", "model.ckpt-500")
    with pytest.raises(CheckpointNotFoundError, match=r"directory holds 'model\.ckpt-500'"):
        locate("memory://bucket/model.ckpt-50")
    with pytest.raises(CheckpointNotFoundError, match="the directory 'memory://gone' is missing"):
        locate("memory://gone/model.ckpt")
    memory.rm_file("/bucket/model.ckpt-500.data-00000-of-00001")
    with pytest.raises(CheckpointNotFoundError, match="is there, but not the weights"):
        open_checkpoint("memory://bucket/model.ckpt-500")


def test_a_file_that_was_just_written_is_seen(memory, golden):
    assert listing("memory://bucket") == []
    put(memory, golden / "plain", "/bucket")
    assert listing("memory://bucket") == ["model.ckpt.data-00000-of-00001", "model.ckpt.index"]
    assert is_directory("memory://bucket")


# -- over HTTP -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("plain", "model.ckpt"),
        ("plain", "model.ckpt.index"),
        ("sharded", "model.ckpt"),
        ("v1", "model.ckpt"),
        ("sharded_v1", "model.ckpt-?????-of-00003"),
        ("sharded_v1", "model.ckpt-00001-of-00003"),
    ],
)
def test_a_checkpoint_is_read_over_http_by_its_whole_name(server, golden, folder, name):
    server.put(golden / folder, "/run")
    with open_checkpoint(f"{server.url}/run/{name}") as reader:
        assert rows_of(reader) == truth_of(golden / folder)


def test_a_directory_over_http_needs_a_state_file(server, golden):
    server.put(golden / "plain", "/run")
    with pytest.raises(CheckpointNotFoundError, match="cannot be listed over http://: name the"):
        locate(f"{server.url}/run/")
    server.files["/run/checkpoint"] = b'model_checkpoint_path: "model.ckpt"\n'
    assert locate(f"{server.url}/run/").path == f"{server.url}/run/model.ckpt"


def test_what_is_missing_over_http_is_told(server):
    with pytest.raises(CheckpointNotFoundError, match=r"has neither .*/m' nor .*/m\.index'"):
        locate(f"{server.url}/m")
    with pytest.raises(CheckpointNotFoundError, match=r"'.*/m' is missing"):
        open_source(f"{server.url}/m")


def test_a_page_that_lists_a_directory_is_no_checkpoint(server):
    server.files["/run"] = b"<!DOCTYPE HTML><html>Directory listing</html>"
    with pytest.raises(CheckpointFormatError, match="it is a web page"):
        locate(f"{server.url}/run")


def test_listing_a_thousand_tensors_over_http_leaves_the_data_where_it_is(server, tmp_path):
    tensors = {f"layer_{n}/kernel": np.full((64, 16), n, np.float32) for n in range(1000)}
    write(tmp_path / "m", tensors)
    server.put(tmp_path)
    with open_checkpoint(f"{server.url}/m") as reader:
        assert len(reader.specs()) == 1000
    index = (tmp_path / "m.index").stat().st_size
    assert server.sent(".index") == index, "once"
    assert server.sent() == index
    assert len(server.requests) <= 8


def test_a_thousand_small_tensors_are_read_in_few_requests(server, tmp_path):
    tensors = {f"layer_{n:03d}/kernel": np.full((64, 64), n, np.float32) for n in range(1000)}
    write(tmp_path / "m", tensors)
    server.put(tmp_path)
    with open_checkpoint(f"{server.url}/m") as reader:
        server.requests.clear()
        for name, value in tensors.items():
            assert np.array_equal(reader.read(name), value)
    assert len(server.requests) <= 10
    assert server.sent() == 1000 * 64 * 64 * 4, "each byte once"


def test_a_tensor_far_inside_a_file_takes_no_more_than_a_window(server, tmp_path):
    write(tmp_path / "m", {f"w{n}": numbers(MIB) for n in range(4)})
    server.put(tmp_path)
    with open_checkpoint(f"{server.url}/m") as reader, open_source(reader.files()[1]) as source:
        server.requests.clear()
        assert source.read(5 * MIB, 10) == server.files["/m.data-00000-of-00001"][5 * MIB :][:10]
    assert len(server.requests) == 1
    assert server.sent() <= MIB


@pytest.mark.parametrize("size", [0, 1, 100, MIB, MIB + 1, 20 * MIB + 7])
def test_every_range_is_what_the_file_holds(server, size):
    data = np.random.default_rng(7).bytes(size)
    server.files["/f"] = data
    random = np.random.default_rng(8)
    with open_source(f"{server.url}/f") as source:
        assert source.size == size
        assert source.descriptor is None
        assert source.read(size, 0) == b""
        for _ in range(40):
            start, end = sorted(random.integers(0, size + 1, 2).tolist())
            if random.integers(2):
                end = min(end, start + 1000)
            assert source.read(start, end - start) == data[start:end]
        for start, end in ((0, size + 1), (size, size + 1), (-1, 0)):
            with pytest.raises(DamagedCheckpointError, match="bytes, but bytes"):
                source.read(start, end - start)


def test_what_is_kept_of_a_file_is_bounded(server):
    server.files["/f"] = bytes(80 * MIB)
    with open_source(f"{server.url}/f") as source:
        for offset in range(0, 80 * MIB, MIB // 2):
            source.read(offset, MIB // 2)
        kept = sum(len(window.data.result()) for window in source._windows)
    assert kept <= 32 * MIB
    assert server.sent() == 80 * MIB


def test_what_is_kept_of_all_files_together_is_bounded(server):
    names = [f"/f{number}" for number in range(6)]
    server.files = dict.fromkeys(names, bytes(20 * MIB))
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(open_source(f"{server.url}{name}")) for name in names]
        for source in sources:
            for offset in range(0, source.size, MIB // 2):
                source.read(offset, MIB // 2)
            windows = [window for other in sources for window in other._windows]
            assert sum(len(window.data.result()) for window in windows) <= 32 * MIB
            assert source._windows, "what is being read is kept"
        assert server.sent() == 6 * 20 * MIB, "each byte once"
        assert not sources[0]._windows
        assert remote._KEPT._size == sum(window.end - window.start for window in windows)
    assert remote._KEPT._size == 0
    assert not remote._KEPT._owners


def test_threads_that_read_many_files_get_the_bytes_of_each(memory, monkeypatch):
    monkeypatch.setattr(remote, "_MOST_KEPT", 3 * MIB)
    random = np.random.default_rng(7)
    data = {f"/f{number}": random.bytes(3 * MIB) for number in range(4)}
    for path, content in data.items():
        memory.pipe_file(path, content)
    wrong = []
    with contextlib.ExitStack() as stack:
        sources = {path: stack.enter_context(open_source(f"memory:/{path}")) for path in data}

        def work(seed):
            chosen = np.random.default_rng(seed)
            for _ in range(300):
                path = f"/f{chosen.integers(4)}"
                at = int(chosen.integers(3 * MIB - 1000))
                if sources[path].read(at, 1000) != data[path][at : at + 1000]:
                    wrong.append((path, at))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert remote._KEPT._size == 0


def test_a_connection_that_another_thread_took_first_is_opened_anew(memory):
    memory.pipe_file("/f", bytes(3 * MIB))

    class Taken(list):
        """Seems to hold a connection, which is gone when it is asked for."""

        def __bool__(self):
            return True

    with open_source("memory://f") as source:
        source._unused = Taken()
        assert source.read(10, 20) == bytes(20)
        source._unused = []


def test_several_threads_read_one_file(server, memory):
    data = np.random.default_rng(7).bytes(24 * MIB)
    server.files["/f"] = data
    memory.pipe_file("/f", data)
    for url in (f"{server.url}/f", "memory://f"):
        wrong = []
        with open_source(url) as source:

            def work(first, source=source, wrong=wrong):
                step = 9 * MIB if first else MIB // 3
                for at in range(first, 12 * MIB, step):
                    if source.read(at, step) != data[at : at + step]:
                        wrong.append(at)

            threads = [threading.Thread(target=work, args=(n * 1000,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []


# -- servers that do less, and faults --------------------------------------------------------------


def test_a_server_without_ranges_is_asked_for_the_whole_file_once(server, golden, tmp_path):
    server.put(golden / "plain", "/run")
    write(tmp_path / "m", {f"w{n}": numbers(2_000_000, start=n) for n in range(4)})
    server.put(tmp_path)
    server.ranges = False
    with open_checkpoint(f"{server.url}/run/model.ckpt") as reader:
        assert rows_of(reader) == truth_of(golden / "plain")
    server.requests.clear()
    with open_checkpoint(f"{server.url}/m") as reader:
        for n in (3, 1, 2, 0):
            assert np.array_equal(reader.read(f"w{n}"), numbers(2_000_000, start=n))
    whole = [path for method, path, sent in server.requests if sent == 4 * 8_000_000]
    assert len(whole) == 1


def test_a_server_that_does_not_say_how_long_a_file_is_is_read_all_the_same(server, golden):
    server.put(golden / "plain", "/run")
    server.sizes = False
    with open_checkpoint(f"{server.url}/run/model.ckpt") as reader:
        assert rows_of(reader) == truth_of(golden / "plain")


def test_a_whole_file_that_finds_no_room_is_told(server, monkeypatch):
    server.files["/f"] = bytes(2 * MIB)
    server.sizes = False

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(InputError, match=r"sends whole files alone.*TMPDIR"):
        open_source(f"{server.url}/f")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_told_as_that_and_not_as_missing(server, golden, status):
    server.put(golden / "plain", "/run")
    server.faults["/run/model.ckpt.index"] = status
    with pytest.raises(InputError, match=f"may not be read: the server answers {status} .*creden"):
        locate(f"{server.url}/run/model.ckpt")


def test_a_refused_neighbour_does_no_harm(server, golden):
    server.put(golden / "plain", "/run")
    server.faults["/run/model.ckpt"] = 403
    server.faults["/run/model.ckpt.index.index"] = 403
    for name in ("model.ckpt", "model.ckpt.index"):
        assert locate(f"{server.url}/run/{name}").version == "V2"


def test_a_server_in_trouble_is_told_as_that(server, golden):
    server.put(golden / "plain", "/run")
    server.faults["/run/model.ckpt.index"] = 500
    with pytest.raises(InputError, match="cannot be reached: the server answers 500 Internal"):
        locate(f"{server.url}/run/model.ckpt")


def test_a_server_that_is_not_there_is_told(server):
    server.close()
    with pytest.raises(InputError, match=r"cannot be reached: ClientConnectorError.*network up"):
        open_checkpoint(f"{server.url}/model.ckpt")


def test_a_passing_fault_is_overcome(server):
    server.files["/f"] = bytes(range(200))
    with open_source(f"{server.url}/f") as source:
        server.faults["/f"] = 503
        counted = source._request

        def mending(start, end):
            try:
                return counted(start, end)
            finally:
                server.faults.clear()

        source._request = mending
        assert source.read(10, 5) == bytes(range(10, 15))


def test_an_answer_that_breaks_off_is_an_error(server):
    server.files["/f"] = bytes(1000)
    with open_source(f"{server.url}/f") as source:
        server.faults["/f"] = "cut"
        with pytest.raises(InputError, match="cannot be reached: ClientPayloadError"):
            source.read(0, 100)
    assert len(server.requests) == 1 + 3, "three attempts"


@pytest.mark.parametrize("tagged", [True, False])
def test_a_file_that_is_replaced_while_it_is_read_is_an_error(server, monkeypatch, tagged):
    monkeypatch.setattr(remote, "_CHECK_EVERY", 0.0)
    server.tagged = tagged
    server.files["/f"] = bytes(4 * MIB)
    with open_source(f"{server.url}/f") as source:
        source.read(0, 10)
        server.files["/f"] = bytes(4 * MIB) + b"more"
        with pytest.raises(DamagedCheckpointError, match="was replaced while it was read"):
            source.read(2 * MIB, 10)


@pytest.mark.parametrize("over_http", [True, False])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(server, memory, over_http):
    server.tagged = False

    def put_file(data):
        server.files["/f"] = data
        memory.pipe_file("/f", data)

    put_file(bytes(4 * MIB))
    with open_source(f"{server.url}/f" if over_http else "memory://f") as source:
        put_file(bytes(MIB))
        with pytest.raises(DamagedCheckpointError, match="was replaced while it was read"):
            source.read(2 * MIB, 10)


def test_a_file_in_memory_that_is_replaced_by_one_of_its_size_is_an_error(memory, monkeypatch):
    monkeypatch.setattr(remote, "_CHECK_EVERY", 0.0)
    memory.pipe_file("/f", bytes(10))
    with open_source("memory://f") as source:
        memory.pipe_file("/f", bytes(10))
        with pytest.raises(DamagedCheckpointError, match="was replaced"):
            source.read(0, 10)


def test_a_closed_file_is_not_read(server):
    server.files["/f"] = bytes(10)
    source = open_source(f"{server.url}/f")
    source.close()
    source.close()
    with pytest.raises(UsageError, match="is closed"):
        source.read(0, 1)


@pytest.mark.parametrize(
    ("module", "url", "line"),
    [
        ("fsspec", "memory://x", r"pip install 'compat_restore\[remote\]'"),
        ("fsspec", "s3://b/x", r"pip install 'compat_restore\[remote\]' s3fs"),
        ("aiohttp", "https://example.org/x", r"pip install 'compat_restore\[remote\]'"),
        ("s3fs", "s3://b/x", "pip install s3fs"),
        ("gcsfs", "gs://b/x", "pip install gcsfs"),
    ],
)
def test_what_is_not_installed_is_told_with_the_line_that_installs_it(
    monkeypatch, module, url, line
):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [n for n in sys.modules if n.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    if module == "aiohttp":
        monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
        for scheme in ("http", "https"):
            registry = sys.modules["fsspec.registry"]._registry
            monkeypatch.delitem(registry, scheme, raising=False)
    with pytest.raises(MissingDependencyError, match=line):
        open_source(url)


class NoCredentialsError(Exception):
    """What botocore raises."""


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FileNotFoundError("x"), CheckpointNotFoundError, "is missing"),
        (PermissionError(13, "Forbidden"), InputError, "may not be read: PermissionError"),
        (NoCredentialsError("Unable to locate"), InputError, "Unable to locate.*aws configure"),
        (TimeoutError(), InputError, "cannot be reached: TimeoutError; is the name right"),
        (ConnectionResetError(104, "reset"), InputError, "cannot be reached: ConnectionReset"),
        (OSError(22, "Bad Request"), InputError, "cannot be read: OSError: .*Bad Request"),
        (KeyError("what"), InputError, "cannot be read: KeyError: 'what'"),
    ],
)
def test_every_exception_of_a_file_system_becomes_one_of_ours(
    memory, monkeypatch, error, kind, text
):
    def failing(*_args, **_options):
        raise error

    monkeypatch.setattr(remote, "file_system", lambda url: (memory, url))
    monkeypatch.setattr(type(memory), "info", failing)
    with pytest.raises(kind, match=text):
        open_source("s3://bucket/x")


# -- writing -------------------------------------------------------------------------------------


def test_a_file_appears_at_a_url_whole_when_it_is_placed(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with create_output("memory://bucket/run/f") as output:
        output.write(b"abcdef")
        output.write_at(2, b"XY")
        output.sync()
        assert output.read(0, 6) == b"abXYef"
        assert memory.find("/") == []
        with open(output.working_path, "rb") as file:
            assert file.read() == b"abXYef"
        output.place(replace=False)
    sync_directory("memory://bucket/run")
    assert memory.find("/") == ["/bucket/run/f"]
    assert memory.cat_file("/bucket/run/f") == b"abXYef"
    assert os.listdir(tmp_path) == []
    remove("memory://bucket/run/f")
    remove("memory://bucket/run/f")
    assert memory.find("/") == []


def test_a_file_that_is_not_placed_leaves_nothing(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with create_output("memory://bucket/f") as output:
        output.write(b"abc")
    assert memory.find("/") == []
    assert os.listdir(tmp_path) == []


def test_a_file_at_a_url_is_replaced_only_when_that_is_asked_for(memory):
    memory.pipe_file("/bucket/f", b"old")
    with create_output("memory://bucket/f") as output:
        output.write(b"new")
        with pytest.raises(OutputError, match="exists already, or appeared"):
            output.place(replace=False)
        assert memory.cat_file("/bucket/f") == b"old"
        output.place(replace=True)
    assert memory.cat_file("/bucket/f") == b"new"
    assert memory.find("/") == ["/bucket/f"]


@pytest.mark.parametrize("at", ["put_file", "cp_file", "info"])
def test_an_upload_that_fails_leaves_what_was_there(memory, monkeypatch, at):
    memory.pipe_file("/bucket/f", b"old")
    real = getattr(type(memory), at)

    def failing(self, first, *rest, **options):
        if at == "info" and "/.f." not in first:
            return real(self, first, *rest, **options)
        if at == "put_file":
            self.pipe_file(rest[0], b"n")
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(memory), at, failing)
    with create_output("memory://bucket/f") as output:
        output.write(b"new")
        with pytest.raises(
            OutputError, match=r"cannot be written: ConnectionReset.*nothing was ch"
        ):
            output.place(replace=True)
    monkeypatch.undo()
    assert memory.cat_file("/bucket/f") == b"old"
    assert memory.find("/") == ["/bucket/f"]


def test_an_upload_whose_answer_is_lost_is_none_that_fails(memory, monkeypatch):
    monkeypatch.setattr(remote, "_ATOMIC", {"memory"})
    real = type(memory).put_file

    def losing(self, path, there):
        real(self, path, there)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(memory), "put_file", losing)
    for data in (b"old", b"new"):
        with create_output("memory://bucket/f") as output:
            output.write(data)
            output.place(replace=data == b"new")
            assert output.is_placed
        assert memory.cat_file("/bucket/f") == data


def test_data_stays_where_nobody_can_tell_whether_its_index_arrived(memory, monkeypatch):
    monkeypatch.setattr(remote, "_ATOMIC", {"memory"})
    real = type(memory).put_file
    down = []

    def losing(self, path, there):
        real(self, path, there)
        if there.endswith(".index"):
            down.append(there)
            raise ConnectionResetError(104, "Connection reset by peer")

    def asking(self, path, **options):
        if down:
            raise ConnectionResetError(104, "Connection reset by peer")
        return info(self, path, **options)

    info = type(memory).info
    monkeypatch.setattr(type(memory), "put_file", losing)
    monkeypatch.setattr(type(memory), "info", asking)
    with pytest.raises(OutputError, match="Connection reset"):
        write("memory://bucket/m", {"a": numbers(3)})
    monkeypatch.undo()
    with open_checkpoint("memory://bucket/m") as reader:
        assert np.array_equal(reader.read("a"), numbers(3))


def test_an_upload_that_loses_bytes_is_an_error(memory, monkeypatch):
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, _, there: self.pipe_file(there, b"n")
    )
    with create_output("memory://bucket/f") as output:
        output.write(b"new")
        with pytest.raises(OutputError, match="of its 3 bytes 1 arrived"):
            output.place(replace=False)
    assert memory.find("/") == []


def test_nothing_is_written_over_http(server):
    with pytest.raises(OutputError, match="http:// is for reading alone"):
        create_output(f"{server.url}/f")
    assert server.requests == []


@pytest.mark.usefixtures("memory")
def test_a_temporary_directory_without_room_is_told(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with create_output("memory://bucket/f") as output:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=r"'memory://bucket/f' cannot.*No space left.*TMPDIR"):
            output.write(b"abc")


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
def test_a_checkpoint_is_written_to_a_url_and_read_from_there():
    url = write("memory://bucket/run/m", {"a": numbers(3), "b": numbers(1000)})
    assert listing("memory://bucket/run") == ["m.data-00000-of-00001", "m.index"]
    with open_checkpoint(url) as reader:
        assert np.array_equal(reader.read("b"), numbers(1000))


def test_the_index_is_the_last_to_be_uploaded(memory, monkeypatch):
    order = []
    real = type(memory).cp_file

    def noting(self, first, second, **options):
        order.append(second)
        return real(self, first, second, **options)

    monkeypatch.setattr(type(memory), "cp_file", noting)
    write("memory://bucket/m", {"a": numbers(3)})
    assert order == ["/bucket/m.data-00000-of-00001", "/bucket/m.index"]


@pytest.mark.usefixtures("memory")
def test_a_checkpoint_is_converted_from_the_web_into_an_object_store(server, golden):
    server.put(golden / "plain", "/run")
    report = convert(
        f"{server.url}/run/model.ckpt", "memory://bucket/new", Rules(include=["net/.*"])
    )
    assert report.output == "memory://bucket/new"
    truth = truth_of(golden / "plain")
    with open_checkpoint("memory://bucket/new") as reader:
        assert rows_of(reader) == {name: truth[name] for name in truth if name.startswith("net/")}


def test_a_large_checkpoint_is_copied_with_each_byte_fetched_about_once(server, memory, tmp_path):
    random = np.random.default_rng(7)
    sizes = [int(size) for size in random.integers(1, 1_500_000, 40)]
    tensors = {f"w{n:02d}": numbers(size, start=n) for n, size in enumerate(sizes)}
    write(tmp_path / "m", tensors)
    server.put(tmp_path)
    convert(f"{server.url}/m", "memory://bucket/new")
    total = sum(map(len, server.files.values()))
    assert server.sent() < 1.3 * total
    assert len(server.requests) < 40 + total / MIB
    for suffix in (".index", ".data-00000-of-00001"):
        assert memory.size(f"/bucket/new{suffix}") > 0
    with open_checkpoint("memory://bucket/new") as reader:
        for name, value in tensors.items():
            assert np.array_equal(reader.read(name), value)


@pytest.mark.usefixtures("memory")
def test_a_checkpoint_at_a_url_is_replaced_only_when_that_is_asked_for(tmp_path):
    old = write("memory://bucket/m", {"a": numbers(3)})
    new = write(tmp_path / "m", {"a": numbers(3, start=7)})
    with pytest.raises(OutputError, match="exists already"):
        convert(new, old)
    convert(new, old, overwrite=True)
    assert listing("memory://bucket") == [
        "m.data-00000-of-00002",
        "m.data-00001-of-00002",
        "m.index",
    ]
    with open_checkpoint(old) as reader:
        assert reader.read("a")[0] == 7


@pytest.mark.parametrize("suffix", [".data-00000-of-00002", ".data-00001-of-00002", ".index"])
def test_an_upload_that_fails_leaves_the_old_checkpoint_and_nothing_else(
    memory, tmp_path, monkeypatch, suffix
):
    old = write("memory://bucket/m", {"a": numbers(3)})
    new = write(tmp_path / "m", {"a": numbers(3, start=7)})
    before = {path: memory.cat_file(path) for path in memory.find("/")}
    real = type(memory).put_file

    def failing(self, path, there):
        real(self, path, there)
        if suffix in there:
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(memory), "put_file", failing)
    with pytest.raises(OutputError, match="Connection reset by peer"):
        convert(new, old, overwrite=True)
    assert {path: memory.cat_file(path) for path in memory.find("/")} == before


@pytest.mark.usefixtures("memory")
def test_a_checkpoint_at_a_url_is_not_written_over_itself():
    url = write("memory://bucket/m", {"a": numbers(3)})
    with pytest.raises(UsageError, match="is read from"):
        convert(url, "memory:///bucket/m", overwrite=True)


def test_a_destination_on_the_web_is_refused_before_anything_is_written(server, golden):
    with pytest.raises(OutputError, match="is for reading alone"):
        convert(golden / "plain", f"{server.url}/new")
    assert server.requests == []


def test_the_command_line_takes_urls(memory, golden, capsys):
    url = put(memory, golden / "plain", "/bucket")
    assert main(["inspect", url]) == 0
    assert "net/fc/kernel" in capsys.readouterr().out
    assert main(["convert", url, "memory://bucket/new"]) == 0
    assert main(["inspect", "memory://bucket/gone"]) == 4
    assert main(["inspect", "memry://bucket/gone"]) == 2
