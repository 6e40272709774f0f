"""`compat-restore convert-all`: what it says, where, and with which exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import damage, numbers, write

import compat_restore as cr
from compat_restore.cli import main
from compat_restore.manifest import MANIFEST, read_manifest

ROOT = Path(__file__).parent.parent
OK, FINDINGS, USAGE, DAMAGED, IO, MISMATCH = range(6)
TENSORS = {"enc/w": numbers(3, 2), "enc/b": numbers(2, start=10), "global_step": np.int64(7)}


@pytest.fixture
def runs(tmp_path) -> Path:
    for n in range(4):
        write(tmp_path / "runs" / f"run{n}" / "model.ckpt", TENSORS)
    return tmp_path / "runs"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def started(*arguments: object, env=None, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "compat_restore",
            "convert-all",
            *map(str, arguments),
        ],
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )


def test_help_tells_all(capsys):
    assert main(["convert-all", "--help"]) == OK
    said = capsys.readouterr().out
    for word in (
        "compat-restore convert-all",
        "SRC_DIR",
        "--jobs",
        "--into",
        "--strict",
        "examples:",
    ):
        assert word in said
    assert "--model" not in said


def test_a_summary_is_on_stdout_and_nothing_on_stderr(runs, out):
    process = started(runs, out, "--rename", r"enc/(.*)=new/\1")
    said, complained = process.communicate()
    assert process.returncode == OK
    assert said.split("\n") == [
        f"'{runs}' went to '{out}'",
        "converted  3 tensors, 40 B  x4  run{0-3}/model.ckpt",
        "4 converted (160 B), 0 done before, 0 failed",
        "",
    ]
    assert complained == ""
    with cr.open_checkpoint(out / "run3" / "model.ckpt") as reader:
        assert "new/w" in reader.specs()


def test_what_fails_is_a_finding(runs, out, capsys):
    damage(str(runs / "run1" / "model.ckpt"), "enc/w")
    assert main(["convert-all", str(runs), str(out), "--jobs", "1"]) == FINDINGS
    said = capsys.readouterr()
    assert "3 converted" in said.out
    assert "failed: " in said.out
    assert said.err == ""
    assert main(["convert-all", str(runs), str(out), "--jobs", "1", "--json"]) == FINDINGS
    data = json.loads(capsys.readouterr().out)
    assert data["summary"]["unchanged"] == 3
    assert data["summary"]["failed"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), USAGE, "SRC_DIR"),
        (("{runs}",), USAGE, "DST_DIR"),
        (("{runs}", "{runs}"), USAGE, "inputs are never written over"),
        (("{runs}", "{out}", "--jobs", "0"), USAGE, "jobs=0"),
        (("{runs}", "{out}", "--jobs", "many"), USAGE, "--jobs"),
        (("{runs}", "{out}", "--model", "a:b"), USAGE, "--model"),
        (("{runs}", "{out}", "--include", "("), USAGE, "no regular expression"),
        (("{runs}", "{out}", "--into", "nowhere"), IO, "nowhere"),
        (("{out}", "{runs}"), IO, "there is none"),
    ],
)
def test_what_concerns_all_is_an_error(runs, capsys, arguments, status, message):
    out = runs.parent / "out"
    given = [argument.format(runs=runs, out=out) for argument in arguments]
    assert main(["convert-all", *given]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert not out.exists()


def test_a_manifest_that_is_none_is_damaged_input(runs, out, capsys):
    out.mkdir()
    (out / MANIFEST).write_text("mine\n")
    assert main(["convert-all", str(runs), str(out)]) == DAMAGED
    assert MANIFEST in capsys.readouterr().err


def test_a_dry_run_shows_what_would_be(runs, out, capsys):
    assert main(["convert-all", str(runs), str(out), "--dry-run", "--jobs", "1"]) == OK
    assert "4 would be converted" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_leaves_whole_checkpoints_and_a_manifest(tmp_path, out, number, jobs):
    source = Path(write(tmp_path / "one", {f"w{n}": numbers(300, 1000) for n in range(8)}))
    runs = tmp_path / "runs"
    for n in range(20):
        (runs / f"run{n}").mkdir(parents=True)
        for end in (".index", ".data-00000-of-00001"):
            os.link(f"{source}{end}", runs / f"run{n}" / f"model.ckpt{end}")
    process = started(runs, out, "--jobs", jobs, "--digests")
    while process.poll() is None and not list(out.glob("run*/model.ckpt.index")):
        time.sleep(0.002)
    process.send_signal(number)
    said, complained = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert said == ""
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert complained == f"compat-restore: error: {word}\n"
    for folder in out.glob("run*"):
        assert sorted(path.name for path in folder.iterdir()) in (
            [],
            ["model.ckpt.data-00000-of-00001", "model.ckpt.index"],
        )
    ended = [r for r in read_manifest(str(out / MANIFEST)).values() if r.outcome is not None]
    assert {str(record.outcome.status) for record in ended} <= {"converted"}
    done = started(runs, out, "--digests", "--json")
    data = json.loads(done.communicate()[0])
    assert data["summary"]["converted"] + data["summary"]["unchanged"] == 20
    assert data["summary"]["unchanged"] == len(ended) < 20


# -- in a terminal --------------------------------------------------------------------------------


def in_terminal(*arguments: object, **environment: str) -> tuple[str, str]:
    """Run the command with a terminal for its stderr; return what went to stdout and to it."""
    ours, theirs = pty.openpty()
    process = started(*arguments, stderr=theirs, env={"TERM": "xterm-256color", **environment})
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.communicate()[0], said.decode()


def test_in_a_terminal_a_bar_shows_the_progress_and_goes(runs, out):
    damage(str(runs / "run1" / "model.ckpt"), "enc/w")
    said, shown = in_terminal(runs, out)
    assert said.endswith("3 converted (120 B), 0 done before, 1 failed\n")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "4/4" in plain
    assert "converting, 1 failed" in plain
    assert "\x1b[2K" in shown.rpartition("4/4")[2]


def test_without_colours_the_bar_has_none(runs, out):
    _, shown = in_terminal(runs, out, NO_COLOR="1")
    assert "4/4" in shown
    assert not re.search(r"\x1b\[3[0-9]", shown)


def test_where_no_terminal_is_nothing_of_the_bar_is_imported(runs, out):
    program = (
        "import sys; from compat_restore.cli import main\n"
        f"assert main(['convert-all', {str(runs)!r}, {str(out)!r}, '--jobs', '1']) == 0\n"
        "assert 'rich' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
