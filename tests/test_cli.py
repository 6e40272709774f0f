"""The command line: what it says, where it says it, and with which exit status."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from formats import write_bundle

from compat_restore import __version__
from compat_restore.checkpoint import open_checkpoint
from compat_restore.checkpoint.writer import Content
from compat_restore.cli import main
from compat_restore.cli.options import _rename
from compat_restore.errors import CompatRestoreError
from compat_restore.rules import Rename
from compat_restore.tensors import DType

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "convert.py"

OK, FINDINGS, USAGE, DAMAGED, IO, MISMATCH = range(6)


def written(prefix: Path, tensors: dict[str, np.ndarray]) -> str:
    """Write a checkpoint of these tensors; return its prefix."""
    return write_bundle(
        prefix,
        (Content.of(name, DType(value.dtype.name), value) for name, value in tensors.items()),
    )


def network(layers: int) -> dict[str, np.ndarray]:
    """Return weights, Adam's slots, and a counter."""
    tensors: dict[str, np.ndarray] = {"global_step": np.array(7, np.int64)}
    for n in range(layers):
        for leaf, shape in (("kernel", (2, 3)), ("bias", (3,))):
            value = np.full(shape, n, np.float32)
            name = f"net/layer_{n}/{leaf}"
            tensors |= {name: value, f"{name}/Adam": value + 1, f"{name}/Adam_1": value + 2}
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return written(tmp_path / "model.ckpt", network(3))


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    # Buffered, as users have it: what is flushed at exit fails in other ways.
    settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    environment = {**os.environ, **settings, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "compat_restore", *arguments],
        env=environment,
        text=True,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command line that fails; return its status and what it says on stderr."""
    status = main(arguments)
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: " in said.err
    assert "Traceback" not in said.err
    return status, said.err


# Help


def test_help_lists_the_commands_and_the_exit_statuses(capsys):
    assert main(["--help"]) == OK
    out = capsys.readouterr().out
    for word in ("inspect", "convert", "demo", "exit status", "damaged or unsafe input"):
        assert word in out


@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_each_command_has_its_own_help(verb: str, capsys):
    assert main([verb, "--help"]) == OK
    out = capsys.readouterr().out
    assert f"compat-restore {verb}" in out
    assert "must match a whole name" in out
    assert "examples:" in out


def test_the_version_is_told(capsys):
    assert main(["--version"]) == OK
    assert capsys.readouterr().out == f"compat-restore {__version__}\n"


def test_without_arguments_help_is_shown_and_the_status_is_wrong_use(capsys):
    assert main([]) == USAGE
    assert "commands" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspekt"], "no command 'inspekt'; did you mean 'inspect'?"),
        (["zzz"], "no command 'zzz'; commands: inspect, convert"),
        ([""], "no command ''"),
        (["--verbose"], "--verbose"),
        (["inspect"], "required: checkpoint"),
        (["inspect", "a", "--fulll"], "--fulll"),
        (["convert", "a"], "required: DST"),
        (["convert", "a", "b", "--into", "c", "--model", "d:e"], "not allowed with"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], message: str, capsys):
    status, said = failing(capsys, *arguments)
    assert status == USAGE
    assert message in said


def test_python_m_and_the_script_are_the_same_command(checkpoint: str):
    assert run("--version").stdout == f"compat-restore {__version__}\n"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), checkpoint, checkpoint + "-2", "--dry-run", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert json.loads(done.stdout)["dry_run"] is True


# inspect


def test_inspect_lists_a_checkpoint_with_repeated_layers_folded(checkpoint: str, capsys):
    assert main(["inspect", checkpoint]) == OK
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        f"{checkpoint}: V2 tensor bundle, name-based",
        "dtype    shape  each      name",
        "int64    []      8 B      global_step  (bookkeeping)",
        "float32  [3]    12 B  x3  net/layer_{0-2}/bias",
        "float32  [3]    12 B  x6  net/layer_{0-2}/bias/{Adam,Adam_1}  (slot)",
        "float32  [2,3]  24 B  x3  net/layer_{0-2}/kernel",
        "float32  [2,3]  24 B  x6  net/layer_{0-2}/kernel/{Adam,Adam_1}  (slot)",
        "19 tensors, 332 B: 6 variables (108 B), 12 optimizer slots (216 B), 1 bookkeeping (8 B)",
    ]


def test_inspect_full_has_a_row_for_every_tensor(checkpoint: str, capsys):
    assert main(["inspect", checkpoint, "--full"]) == OK
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [row[4] for row in rows] == sorted(network(3))
    assert ["float32", "[3]", "12", "B", "net/layer_1/bias/Adam_1", "(slot)"] in rows


def test_inspect_json_has_every_tensor_and_what_it_is_for(checkpoint: str, capsys):
    assert main(["inspect", checkpoint, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert (data["version"], data["path"], data["notes"]) == (1, checkpoint, [])
    tensors = {tensor["name"]: tensor for tensor in data["tensors"]}
    assert set(tensors) == set(network(3))
    assert tensors["net/layer_1/kernel/Adam"] == {
        "name": "net/layer_1/kernel/Adam",
        "key": "net/layer_1/kernel/Adam",
        "full_name": None,
        "dtype": "float32",
        "shape": [2, 3],
        "bytes": 24,
        "role": "slot",
        "owner": "net/layer_1/kernel",
        "slot": "Adam",
        "parts": 0,
    }
    assert tensors["global_step"]["role"] == "bookkeeping"


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["--include", "net/layer_1/.*", "--drop-slots"], ["kernel", "bias"]),
        (["--include", "net/layer_1/.*", "--exclude", ".*Adam(_1)?"], ["kernel", "bias"]),
        (["--include", "net/layer_1/bias", "--include", "net/layer_1/kernel"], ["kernel", "bias"]),
    ],
)
def test_inspect_filters(filters: list[str], names: list[str], checkpoint: str, capsys):
    assert main(["inspect", checkpoint, "--json", *filters]) == OK
    data = json.loads(capsys.readouterr().out)
    assert {tensor["name"] for tensor in data["tensors"]} == {f"net/layer_1/{n}" for n in names}


def test_inspect_takes_filters_from_a_rules_file(checkpoint: str, tmp_path: Path, capsys):
    rules = tmp_path / "rules.toml"
    rules.write_text("include = '.*/bias'\n")
    assert main(["inspect", checkpoint, "--rules", str(rules)]) == OK
    assert capsys.readouterr().out.splitlines()[-1] == "3 tensors, 36 B: 3 variables (36 B)"


def test_a_filter_that_matches_nothing_is_told_unless_that_is_allowed(checkpoint: str, capsys):
    status, said = failing(capsys, "inspect", checkpoint, "--include", "net/layer_9")
    assert status == MISMATCH
    assert "these rules do not fit the checkpoint" in said
    assert "include 'net/layer_9': it matches no name" in said
    assert main(["inspect", checkpoint, "--include", "net/layer_9", "--allow-unmatched"]) == OK
    assert capsys.readouterr().out.splitlines()[-1] == "0 tensors, 0 B: none"


def test_inspect_does_not_rename(checkpoint: str, capsys):
    status, said = failing(capsys, "inspect", checkpoint, "--rename", "a=b")
    assert status == USAGE
    assert "convert --dry-run" in said


def test_inspect_takes_a_directory_and_the_files_of_a_checkpoint(checkpoint: str, capsys):
    for path in (os.path.dirname(checkpoint), f"{checkpoint}.index"):
        assert main(["inspect", path]) == OK
        assert capsys.readouterr().out.startswith(f"{checkpoint}: V2")


def test_inspect_imports_neither_tensorflow_nor_numpy(checkpoint: str):
    code = (
        "import sys; from compat_restore.cli import main; "
        f"status = main(['inspect', {checkpoint!r}]) or main(['inspect', {checkpoint!r}, '--json']);"
        "print([m for m in ('numpy', 'tensorflow', 'keras') if m in sys.modules], status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_inspect_starts_without_what_only_other_commands_need(checkpoint: str):
    code = (
        "import sys; from compat_restore.cli import main; "
        f"status = main(['inspect', {checkpoint!r}]); "
        "print([m for m in ('dataclasses', 'inspect', 'shutil', 'compat_restore.rules') "
        "if m in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(("columns", "width"), [("50", 48), ("0", 78), ("wide", 78)])
def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys, columns: str, width: int):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["inspect", "--help"]) == 0
    described = capsys.readouterr().out.partition("\nrules:")[2].partition("--drop-slots")[2]
    lines = described.partition("--allow")[0].splitlines()
    assert width - 15 < max(map(len, lines)) <= width


def test_main_leaves_the_collector_as_it_was(checkpoint: str):
    before = gc.get_threshold(), gc.get_freeze_count()
    assert main(["inspect", checkpoint]) == 0
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_help_and_inspect_start_in_a_blink(arguments: list[str], tmp_path: Path):
    if arguments[0] == "inspect":
        arguments = [*arguments, written(tmp_path / "model.ckpt", network(23))]
        assert len(network(23)) == 139

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    spent = []
    for _ in range(3):  # the first may compile
        before = cpu()
        assert run(*arguments).returncode == OK
        spent.append(cpu() - before)
    assert min(spent) < 0.3, spent


# convert


def test_convert_writes_what_was_chosen_under_new_names(checkpoint: str, tmp_path: Path, capsys):
    output = str(tmp_path / "out" / "small.ckpt")
    arguments = ["--drop-slots", "--exclude", ".*/layer_2/.*", "--rename", r"net/(.*)=my/\1"]
    assert main(["convert", checkpoint, output, *arguments]) == OK
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(
        f"'{checkpoint}' (V2 tensor bundle, name-based)\nbecame '{output}' (V2"
    )
    assert said.out.endswith("4 restored (72 B), 0 initialized, 0 mismatched, 15 unused\n")
    with open_checkpoint(output) as reader:
        assert sorted(reader.specs()) == [
            f"my/layer_{n}/{x}" for n in (0, 1) for x in ("bias", "kernel")
        ]
        assert np.array_equal(reader.read("my/layer_1/kernel"), np.ones((2, 3), np.float32))


def test_convert_json_is_the_report(checkpoint: str, tmp_path: Path, capsys):
    output = str(tmp_path / "out.ckpt")
    assert main(["convert", checkpoint, output, "--json", "--include", ".*/bias"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["output"] == output
    assert [entry["name"] for entry in data["restored"]] == [
        f"net/layer_{n}/bias" for n in range(3)
    ]


def test_convert_full_has_a_row_for_every_name(checkpoint: str, tmp_path: Path, capsys):
    assert main(["convert", checkpoint, str(tmp_path / "out.ckpt"), "--full"]) == OK
    lines = capsys.readouterr().out.splitlines()
    for name in network(3):
        assert sum(name in line.split() for line in lines) == 1


def test_convert_reads_back_where_digests_are_asked_for(checkpoint: str, tmp_path: Path, capsys):
    assert main(["convert", checkpoint, str(tmp_path / "o"), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert {entry["digest"] for entry in data["restored"]} == {None}
    assert main(["convert", checkpoint, str(tmp_path / "p"), "--digests", "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert all(entry["digest"].startswith("sha256:") for entry in data["restored"])


def test_a_dry_run_writes_nothing(checkpoint: str, tmp_path: Path, capsys):
    before = sorted(tmp_path.iterdir())
    output = str(tmp_path / "new" / "out.ckpt")
    assert main(["convert", checkpoint, output, "--dry-run"]) == OK
    assert "would become" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_options_go_before_the_rules_file(checkpoint: str, tmp_path: Path, capsys):
    rules = tmp_path / "rules.toml"
    rules.write_text(
        "include = 'net/.*'\ndrop_slots = true\n"
        "[[rename]]\nfrom = 'net/layer_0/bias'\nto = 'file'\n"
        "[[rename]]\nfrom = 'net/(.*)'\nto = 'file/\\1'\n"
    )
    arguments = ["--rules", str(rules), "--rename", "net/layer_1/bias=line", "--dry-run", "--json"]
    assert main(["convert", checkpoint, str(tmp_path / "o"), *arguments]) == OK
    found = {e["source"]: e["name"] for e in json.loads(capsys.readouterr().out)["restored"]}
    assert len(found) == 6
    assert found["net/layer_0/bias"] == "file"
    assert found["net/layer_1/bias"] == "line"
    assert found["net/layer_2/bias"] == "file/layer_2/bias"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a=b", Rename("a", "b")),
        ("a=", Rename("a", None)),
        (r"a/(.*)=b/\1", Rename("a/(.*)", r"b/\1")),
        (r"(?=a)(.*)=b/\1", Rename("(?=a)(.*)", r"b/\1")),
        (r"(.*)(?<=x)/(?P<y>w)(?P=y)?=b", Rename("(.*)(?<=x)/(?P<y>w)(?P=y)?", "b")),
        ("[=]a=b", Rename("[=]a", "b")),
        ("a=b=c", Rename("a", "b=c")),
        (r"a\=b=c", Rename(r"a\=b", "c")),
    ],
)
def test_a_rename_is_split_where_the_pattern_is_whole(text: str, rule: Rename):
    assert _rename(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab", "REGEX=NAME is expected"),
        ("(a=b", r"'\(a' is no regular expression"),
        (r"a=\1", "invalid group reference 1"),
        (r"(?=a)b=\2=x", "invalid group reference 2"),
    ],
)
def test_a_rename_that_cannot_be_split_is_told(text: str, message: str):
    with pytest.raises(CompatRestoreError, match=message):
        _rename(text)


def test_a_rename_with_an_equals_sign_in_its_pattern_works(checkpoint: str, tmp_path: Path, capsys):
    rename = r"net/(?=layer_0)(.*)=first/\1"
    assert main(["convert", checkpoint, str(tmp_path / "o"), "--rename", rename, "--json"]) == OK
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)["restored"]]
    assert sum(name.startswith("first/") for name in names) == 6
    assert sum(name.startswith("net/layer_0") for name in names) == 0


# Exit statuses


def test_names_and_shapes_that_do_not_match_are_told_together(checkpoint: str, tmp_path, capsys):
    template = written(tmp_path / "template", {"net/layer_0/bias": np.zeros(9, np.float32)})
    status, said = failing(
        capsys, "convert", checkpoint, str(tmp_path / "o"), "--into", template, "--exclude", "typo"
    )
    assert status == MISMATCH
    assert "2 faults" in said
    assert "checkpoint has float32[3], variable has float32[9]" in said
    assert "exclude 'typo'" in said
    assert not (tmp_path / "o.index").exists()


def damaged_index(checkpoint: str) -> None:
    path = Path(checkpoint + ".index")
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(bytes(raw))


def damaged_data(checkpoint: str) -> None:
    path = Path(checkpoint + ".data-00000-of-00001")
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(bytes(raw))


def cut_data(checkpoint: str) -> None:
    path = Path(checkpoint + ".data-00000-of-00001")
    path.write_bytes(path.read_bytes()[:-10])


def garbage(checkpoint: str) -> None:
    Path(checkpoint + ".index").write_bytes(bytes(range(256)) * 8)


@pytest.mark.parametrize("damage", [damaged_index, damaged_data, cut_data, garbage])
def test_damage_is_told_and_nothing_is_written(damage, checkpoint: str, tmp_path: Path, capsys):
    damage(checkpoint)
    before = sorted(tmp_path.iterdir())
    status, _ = failing(capsys, "convert", checkpoint, str(tmp_path / "o"))
    assert status == DAMAGED
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 20,
        b"",
        b"PK\x03\x04 a zip archive",
        b"\x89HDF\r\n\x1a\n",
        b"<!DOCTYPE html>",
        b"\xff" * 48,
        b"\0" * 4096,
        b"text\n",
    ],
)
def test_a_file_that_is_no_checkpoint_is_told(content: bytes, tmp_path: Path, capsys):
    path = tmp_path / "file"
    path.write_bytes(content)
    status, said = failing(capsys, "inspect", str(path))
    assert status == DAMAGED
    assert str(path) in said


def test_what_is_not_there_is_told(checkpoint: str, tmp_path: Path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    for arguments, subject in (
        (["inspect", str(tmp_path / "model.ckp")], "model.ckpt"),
        (["inspect", str(tmp_path / "no" / "model")], "is missing"),
        (["inspect", str(folder)], "holds no checkpoint"),
        (["inspect", ""], "no checkpoint"),
        (
            ["convert", checkpoint, str(tmp_path / "o"), "--into", str(folder)],
            "holds no checkpoint",
        ),
        (["inspect", checkpoint, "--rules", str(tmp_path / "none.toml")], "none.toml"),
        (["inspect", checkpoint, "--rules", str(folder)], str(folder)),
    ):
        status, said = failing(capsys, *arguments)
        assert status == IO, arguments
        assert subject in said


def test_what_cannot_be_written_is_told(checkpoint: str, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    written(tmp_path / "taken", {"w": np.zeros(1, np.float32)})
    for output, subject in (
        (tmp_path / "file" / "out.ckpt", "cannot be written"),
        (tmp_path / "folder", "is a directory"),
        (tmp_path / "taken", "--overwrite"),
    ):
        status, said = failing(capsys, "convert", checkpoint, str(output))
        assert status == IO, said
        assert subject in said


def test_an_existing_checkpoint_is_replaced_only_where_that_is_said(
    checkpoint: str, tmp_path: Path, capsys
):
    output = written(tmp_path / "taken", {"w": np.zeros(1, np.float32)})
    assert main(["convert", checkpoint, output, "--overwrite"]) == OK
    capsys.readouterr()
    with open_checkpoint(output) as reader:
        assert set(reader.specs()) == set(network(3))


def test_an_input_is_never_written_over(checkpoint: str, capsys):
    status, said = failing(capsys, "convert", checkpoint, checkpoint, "--overwrite")
    assert status == USAGE
    assert "an input is never written to" in said


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("include = [", "is not TOML"),
        ("\x00", "is not TOML"),
        ("includ = []", "did you mean 'include'"),
        ("include = ['(']", "is no regular expression"),
    ],
)
def test_a_bad_rules_file_is_wrong_use(rules: str, message: str, checkpoint, tmp_path, capsys):
    path = tmp_path / "rules.toml"
    path.write_text(rules)
    status, said = failing(capsys, "inspect", checkpoint, "--rules", str(path))
    assert status == USAGE
    assert message in said
    assert str(path) in said


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_bad_pattern_is_wrong_use(option: str, checkpoint: str, capsys):
    status, said = failing(capsys, "inspect", checkpoint, option, "net/(")
    assert status == USAGE
    assert "'net/(' is no regular expression" in said


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "package.module:function"),
        ("no_such_module_here:f", "no_such_module_here"),
        ("json:no_such_function", "no_such_function"),
        ("json:__name__", "__name__"),
    ],
)
def test_a_model_that_cannot_be_made_is_wrong_use(model, message, checkpoint, tmp_path, capsys):
    status, said = failing(capsys, "convert", checkpoint, str(tmp_path / "o"), "--model", model)
    assert status == USAGE
    assert message in said


# Terminals and pipes


HOSTILE = "evil\x1b[31m\r\nname/w"


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    tensors = {HOSTILE: np.zeros(2, np.float32), "größe/核": np.zeros(2, np.float32)}
    return written(tmp_path / "hostile\x1b[2J.ckpt", tensors)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{0}"],
        ["inspect", "{0}", "--full"],
        ["convert", "{0}", "{0}.out", "--rename", "(?s)(evil.*)=x/\\1", "--full"],
        ["convert", "{0}", "{0}.out", "--full"],
        ["convert", "{0}", "{0}"],
        ["inspect", "{0}x"],
        ["inspect", "{0}", "--include", "\x1b[31m]"],
        ["inspect", "{0}", "--include", "\x1b.*"],
    ],
)
def test_control_characters_never_reach_the_terminal(arguments: list[str], hostile: str, capsys):
    main([argument.replace("{0}", hostile) for argument in arguments])
    said = capsys.readouterr()
    shown = said.out + said.err
    assert "\\x1b" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_names_stand_in_json_as_they_are(hostile: str, capsys):
    assert main(["inspect", hostile, "--json"]) == OK
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [tensor["name"] for tensor in json.loads(out)["tensors"]] == [HOSTILE, "größe/核"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_any_terminal_can_show_any_name(encoding: str, form: list[str], hostile: str):
    done = run(
        "inspect", hostile, *form, env={"PYTHONIOENCODING": f"{encoding}:strict"}, encoding=encoding
    )
    assert (done.returncode, done.stderr) == (OK, "")
    if form:
        assert [t["name"] for t in json.loads(done.stdout)["tensors"]] == [HOSTILE, "größe/核"]
    elif encoding == "utf-8":
        assert "größe/核" in done.stdout
    else:
        assert "\\u6838" in done.stdout


def test_a_path_that_is_no_text_is_shown_in_escapes(checkpoint: str, tmp_path: Path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    for suffix in (".index", ".data-00000-of-00001"):
        Path(odd + suffix).write_bytes(Path(checkpoint + suffix).read_bytes())
    done = run("inspect", odd, "--json", encoding="utf-8")
    assert done.returncode == OK
    assert json.loads(done.stdout)["path"] == odd
    done = run("inspect", odd, encoding="utf-8")
    assert "/\\udcff: V2" in done.stdout


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["inspect", "--full"]])
@pytest.mark.parametrize("layers", [1, 400])
def test_a_reader_that_goes_away_is_no_fault(arguments: list[str], layers: int, tmp_path: Path):
    # Little output breaks the pipe when it is flushed, much of it when it is written.
    prefix = written(tmp_path / "model.ckpt", network(layers))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*arguments, prefix, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (OK, "")


def test_help_into_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run("--help", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (OK, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_told(checkpoint: str):
    with open("/dev/full", "w") as full:
        done = run("inspect", checkpoint, stdout=full)
    assert done.returncode == IO
    assert done.stderr == "compat-restore: error: No space left on device\n"


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_are_no_fault(closed: int, checkpoint: str):
    done = run("inspect", checkpoint, preexec_fn=lambda: os.close(closed))
    assert (done.returncode, done.stderr) == (OK, "")
    done = run("inspect", checkpoint + "x", preexec_fn=lambda: os.close(closed))
    assert done.returncode == IO


def test_an_interrupt_is_told_without_a_traceback(monkeypatch, capsys):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("compat_restore.cli.inspect.run", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "compat-restore: error: interrupted\n"
