"""Many checkpoints by Apache Beam, on its local runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import damage, numbers, write

import compat_restore as cr

ROOT = Path(__file__).parent.parent
TENSORS = {"enc/w": numbers(3, 2), "enc/b": numbers(2, start=10), "global_step": np.int64(7)}


def test_without_beam_its_installation_is_told(tmp_path):
    (tmp_path / "apache_beam.py").write_text("raise ImportError('hidden')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import compat_restore.beam"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert "MissingDependencyError: Apache Beam is not installed; pip install" in done.stderr
    assert "'compat_restore[beam]'" in done.stderr


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam")


@pytest.fixture
def runs(tmp_path) -> Path:
    folder = tmp_path / "runs"
    for n in range(5):
        write(folder / f"run{n}" / "model.ckpt", {**TENSORS, "enc/w": numbers(3, 2, start=n)})
    return folder


def converted(beam, elements, *arguments, **options) -> dict[str, dict[str, object]]:
    """Run a pipeline; return its results by source."""
    from apache_beam.testing.util import assert_that

    from compat_restore.beam import ConvertCheckpoints

    results: list[dict[str, object]] = []

    def take(found) -> None:
        folder = Path(str(arguments[1])).parent
        import json

        (folder / "results.json").write_text(json.dumps(found))

    with beam.Pipeline("DirectRunner") as pipeline:
        found = pipeline | beam.Create(list(elements)) | ConvertCheckpoints(*arguments, **options)
        assert_that(found, take)
    import json

    results = json.loads((Path(str(arguments[1])).parent / "results.json").read_text())
    assert len({one["source"] for one in results}) == len(results)
    return {str(one["source"]): one for one in results}


@pytest.mark.beam
@pytest.mark.filterwarnings("default")
class TestOnTheLocalRunner:
    def test_every_checkpoint_is_converted_and_the_second_time_found_done(
        self, beam, runs, tmp_path
    ):
        from compat_restore.beam import find_checkpoints

        rules = cr.Rules(include=["enc/.*"], rename=[("enc/(.*)", r"new/\1")])
        for status in ("converted", "unchanged"):
            results = converted(beam, find_checkpoints(runs), runs, tmp_path / "out", rules)
            assert {one["status"] for one in results.values()} == {status}
            first = results[f"{runs}/run0/model.ckpt"]
            assert first["output"] == f"{tmp_path}/out/run0/model.ckpt"
            assert first["counts"]["restored"] == 2
            assert first["error"] is None
        for n in range(5):
            with cr.open_checkpoint(tmp_path / "out" / f"run{n}" / "model.ckpt") as reader:
                np.testing.assert_array_equal(reader.read("new/w"), numbers(3, 2, start=n))

    def test_it_writes_what_convert_all_writes(self, beam, runs, tmp_path):
        from compat_restore.beam import find_checkpoints

        converted(beam, find_checkpoints(runs), runs, tmp_path / "a" / "out")
        cr.convert_all(runs, tmp_path / "b", jobs=1)
        for n in range(5):
            for end in (".index", ".data-00000-of-00001"):
                name = f"run{n}/model.ckpt{end}"
                assert (tmp_path / "a" / "out" / name).read_bytes() == (
                    tmp_path / "b" / name
                ).read_bytes()

    def test_a_damaged_checkpoint_fails_alone(self, beam, runs, tmp_path):
        from compat_restore.beam import find_checkpoints

        damage(str(runs / "run1" / "model.ckpt"), "enc/w")
        results = converted(beam, find_checkpoints(runs), runs, tmp_path / "out")
        bad = results.pop(f"{runs}/run1/model.ckpt")
        assert (bad["status"], bad["counts"], bad["kind"]) == (
            "failed", None, "DamagedTensorsError",
        )  # fmt: skip
        assert {one["status"] for one in results.values()} == {"converted"}

    def test_elements_that_mean_the_same_are_one(self, beam, runs, tmp_path):
        path = f"{runs}/run0/model.ckpt"
        results = converted(beam, [path, path, f"{path}.index"], runs, tmp_path / "out")
        assert [one["status"] for one in results.values()] == ["converted"]

    def test_elements_that_would_become_the_same_are_errors(self, beam, runs, tmp_path):
        paths = [write(runs / "m", TENSORS), str(runs / "m.npz")]
        cr.convert(paths[0], paths[1])
        results = converted(beam, paths, runs, tmp_path / "out")
        assert all("so would" in str(results[path]["error"]) for path in paths)

    def test_an_element_from_elsewhere_is_an_error(self, beam, runs, tmp_path):
        outside = write(tmp_path / "outside", TENSORS)
        results = converted(beam, [outside], runs, tmp_path / "out")
        assert results[outside]["kind"] == "UsageError"
        assert "does not lie below" in str(results[outside]["error"])

    @pytest.mark.parametrize("name", ["../../esc", "a//b", "./a", "a/.."])
    def test_no_name_leads_out_of_the_destination(self, beam, tmp_path, name):
        pytest.importorskip("fsspec")
        source = f"memory://runs/{name}"
        results = converted(beam, [source], "memory://runs", tmp_path / "out")
        assert results[source]["kind"] == "OutputError"
        assert "no name of an output" in str(results[source]["error"])

    def test_no_link_leads_out_of_the_destination(self, beam, runs, tmp_path):
        for folder in ("out", "elsewhere"):
            (tmp_path / folder).mkdir()
        (tmp_path / "out" / "run1").symlink_to(tmp_path / "elsewhere")
        path = f"{runs}/run1/model.ckpt"
        results = converted(beam, [path], runs, tmp_path / "out", overwrite=True)
        assert "a link leads out" in str(results[path]["error"])
        assert not list((tmp_path / "elsewhere").iterdir())
