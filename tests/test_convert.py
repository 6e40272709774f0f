"""From checkpoint to checkpoint, and what TensorFlow 1.15, TensorFlow 2 and Keras read back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from checkpoints import (
    accounted_once,
    damage,
    digest_of,
    digests_of,
    graph_and_session,
    numbers,
    write,
    write_from_graph,
)

import compat_restore as cr

v1 = tf.compat.v1
ROOT = Path(__file__).parent.parent

TENSORS = {
    "enc/w": numbers(3, 2),
    "enc/b": numbers(2, start=10),
    "enc/w/Adam": numbers(3, 2, start=20),
    "enc/w/Adam_1": numbers(3, 2, start=30),
    "head/w": numbers(2, 5, start=40),
    "beta1_power": np.float32(0.9),
    "global_step": np.int64(7),
}


@pytest.fixture
def source(tmp_path) -> str:
    return write(tmp_path / "source" / "model.ckpt", TENSORS)


@pytest.fixture(params=[tf_keras, keras], ids=["tf_keras", "keras3"])
def world(request):
    """One of the two Kerases."""
    return request.param


def contents(prefix) -> dict[str, np.ndarray]:
    with cr.open_checkpoint(prefix) as reader:
        return {name: reader.read(name) for name in reader.specs()}


def assert_holds(prefix, wanted) -> None:
    found = contents(prefix)
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.asarray(value).dtype


def files_in(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# -- name-based -----------------------------------------------------------------------------------


def test_a_conversion_without_rules_is_a_copy(tmp_path, source):
    report = cr.convert(source, tmp_path / "out" / "m", digests=True)
    assert_holds(tmp_path / "out" / "m", TENSORS)
    assert len(report.restored) == len(TENSORS)
    assert digests_of(report) == {name: digest_of(value) for name, value in TENSORS.items()}
    assert files_in(tmp_path / "out") == ["m.data-00000-of-00001", "m.index"]


def test_tensors_are_filtered_renamed_and_stripped_of_slots(tmp_path, source):
    rules = cr.Rules(exclude="head/.*", rename=[(r"enc/(.*)", r"body/\1")], drop_slots=True)
    report = cr.convert(source, tmp_path / "m", rules)
    assert_holds(tmp_path / "m", {"body/w": TENSORS["enc/w"], "body/b": TENSORS["enc/b"]})
    accounted_once(report, TENSORS, ["body/w", "body/b"])


def test_what_was_converted_is_what_tensorflow_2_lists_and_loads(tmp_path, source):
    cr.convert(source, tmp_path / "m", cr.Rules(rename=[(r"enc/(.*)", r"body/\1")]))
    out = str(tmp_path / "m")
    wanted = {name.replace("enc/", "body/"): value for name, value in TENSORS.items()}
    assert dict(tf.train.list_variables(out)) == {n: list(np.shape(v)) for n, v in wanted.items()}
    reader = tf.train.load_checkpoint(out)
    for name, value in wanted.items():
        np.testing.assert_array_equal(reader.get_tensor(name), value)
        assert reader.get_variable_to_dtype_map()[name] == np.asarray(value).dtype


def test_what_was_converted_is_what_a_saver_restores(tmp_path, source):
    cr.convert(source, tmp_path / "m", cr.Rules(rename=[(r"enc/(.*)", r"body/\1")]))
    with graph_and_session() as session:
        w = v1.get_variable("body/w", (3, 2))
        step = v1.get_variable("global_step", (), tf.int64)
        v1.train.Saver().restore(session, str(tmp_path / "m"))
        np.testing.assert_array_equal(session.run(w), TENSORS["enc/w"])
        assert session.run(step) == 7


def test_what_was_converted_is_what_load_variable_and_init_from_checkpoint_take(tmp_path, source):
    cr.convert(source, tmp_path / "m", cr.Rules(include=["enc/w"]))
    np.testing.assert_array_equal(
        tf.train.load_variable(str(tmp_path / "m"), "enc/w"), TENSORS["enc/w"]
    )
    with graph_and_session() as session:
        w = v1.get_variable("w", (3, 2))
        v1.train.init_from_checkpoint(str(tmp_path / "m"), {"enc/": "/"})
        session.run(v1.global_variables_initializer())
        np.testing.assert_array_equal(session.run(w), TENSORS["enc/w"])


DTYPES = {
    "bfloat16": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "half": np.array([1.5, -2.0], np.float16),
    "double": np.array([np.pi, np.nan]),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex128),
    "uint16": np.array([65535], np.uint16),
    "string": np.array([b"a", b"", b"\xff\x00" * 300], object),
    "no elements": np.zeros((2, 0, 3), np.float32),
    "scalar": np.int8(-3),
    "name with spaces//and \N{SNOWMAN}": numbers(2),
}


def test_every_dtype_survives_a_conversion_and_tensorflow_reads_it(tmp_path):
    source = write(tmp_path / "s", DTYPES)
    cr.convert(source, tmp_path / "m", cr.Rules(rename=[("(.*)", r"x/\1")]))
    reader = tf.train.load_checkpoint(str(tmp_path / "m"))
    for name, value in DTYPES.items():
        found = reader.get_tensor(f"x/{name}")
        assert np.asarray(found).tolist() == np.asarray(value).tolist() or name == "double"
        assert np.asarray(found).shape == np.asarray(value).shape
    assert reader.get_tensor("x/double").tobytes() == DTYPES["double"].tobytes()


@pytest.mark.parametrize("kind", ["V1", "partitioned", "sharded", "partitioned V1"])
def test_every_kind_of_source_becomes_one_whole_checkpoint(tmp_path, kind):
    values = {"emb": numbers(6, 2), "b": numbers(4, start=50)}
    source = write_from_graph(
        tmp_path / "source" / "m",
        values,
        parts=2 if "partitioned" in kind else 1,
        v1="V1" in kind,
        sharded=kind == "sharded",
    )
    rules = cr.Rules(rename=[("emb", "table")])
    report = cr.convert(source, tmp_path / "out" / "m", rules, digests=True)
    assert_holds(tmp_path / "out" / "m", {"table": values["emb"], "b": values["b"]})
    assert digests_of(report)["table"] == digest_of(values["emb"])
    reader = tf.train.load_checkpoint(str(tmp_path / "out" / "m"))
    np.testing.assert_array_equal(reader.get_tensor("table"), values["emb"])


def test_two_data_files_become_one(tmp_path):
    values = {"a": numbers(3), "b": numbers(4, start=9)}
    for name, value in values.items():
        write(tmp_path / name, {name: value})
    v1_api = tf.raw_ops
    with tf.device("cpu"):
        v1_api.MergeV2Checkpoints(
            checkpoint_prefixes=[str(tmp_path / "a"), str(tmp_path / "b")],
            destination_prefix=str(tmp_path / "both"),
            delete_old_dirs=False,
        )
    assert len(list(tmp_path.glob("both.data-*-of-00002"))) == 2
    cr.convert(tmp_path / "both", tmp_path / "out")
    assert_holds(tmp_path / "out", values)
    assert len(list(tmp_path.glob("out.data-*"))) == 1


def test_an_object_based_checkpoint_becomes_a_name_based_one_by_full_names(tmp_path, world):
    model = dense_model(world)
    source = tf.train.Checkpoint(model=model).save(str(tmp_path / "ckpt"))
    rules = cr.Rules(include=[r".*(kernel|bias)"], rename=[(r"(?:net/)?(.*)", r"scope/\1")])
    cr.convert(source, tmp_path / "out" / "m", rules)
    assert_holds(
        tmp_path / "out" / "m",
        {
            "scope/fc/kernel": np.asarray(model.get_layer("fc").kernel),
            "scope/fc/bias": np.asarray(model.get_layer("fc").bias),
            "scope/head/kernel": np.asarray(model.get_layer("head").kernel),
            "scope/head/bias": np.asarray(model.get_layer("head").bias),
        },
    )


def test_the_object_graph_itself_is_no_variable_of_a_name_based_output(tmp_path):
    source = tf.train.Checkpoint(step=tf.Variable(3, name="step")).write(str(tmp_path / "ckpt"))
    report = cr.convert(source, tmp_path / "out")
    assert_holds(tmp_path / "out", {"step": np.int32(3)})
    assert [str(entry.reason) for entry in report.unused] == ["part of the container"]


def test_transforms_are_done_on_the_way(tmp_path, source):
    rules = cr.Rules(
        include=["enc/.*", "head/w", "global_step"],
        exclude=["enc/w/Adam.*"],
        transform=[
            ("enc/w", cr.Transpose((1, 0))),
            ("head/w", [cr.Reshape((5, 2)), cr.Cast("float64")]),
            ("global_step", cr.Cast("int32")),
        ],
    )
    report = cr.convert(source, tmp_path / "m", rules, digests=True)
    wanted = {
        "enc/w": TENSORS["enc/w"].T,
        "enc/b": TENSORS["enc/b"],
        "head/w": TENSORS["head/w"].reshape(5, 2).astype(np.float64),
        "global_step": np.int32(7),
    }
    assert_holds(tmp_path / "m", wanted)
    assert digests_of(report) == {name: digest_of(value) for name, value in wanted.items()}


def test_one_tensor_becomes_two(tmp_path, source):
    cr.convert(source, tmp_path / "m", cr.Rules(include="enc/b", rename=[("enc/b", ["x", "y"])]))
    assert_holds(tmp_path / "m", {"x": TENSORS["enc/b"], "y": TENSORS["enc/b"]})


def test_a_kept_plan_is_converted_by(tmp_path, source):
    plan = cr.convert(source, tmp_path / "m", cr.Rules(drop_slots=True), dry_run=True).plan
    cr.convert(source, tmp_path / "m", cr.RestorePlan.from_json(plan.to_json()))
    assert sorted(contents(tmp_path / "m")) == sorted(item.target for item in plan.items)


def test_without_digests_nothing_is_read_back_and_the_file_is_the_same(tmp_path, source):
    report = cr.convert(source, tmp_path / "fast")
    assert {entry.digest for entry in report.restored} == {None}
    assert_holds(tmp_path / "fast", TENSORS)


# -- into a template ------------------------------------------------------------------------------


def dense_model(world, *, start: float | None = 500.0):
    model = world.Sequential(
        [
            world.Input((3,)),
            world.layers.Dense(2, name="fc"),
            world.layers.BatchNormalization(name="bn"),
            world.layers.Dense(4, name="head"),
        ],
        name="net",
    )
    if start is not None:
        for number, variable in enumerate(model.variables):
            variable.assign(numbers(*variable.shape, start=start + 100 * number))
    return model


RULES = cr.Rules(
    include=["enc/.*"],
    exclude=["enc/w/Adam.*"],
    rename=[("enc/w", "fc/kernel"), ("enc/b", "fc/bias")],
)


def test_a_template_of_a_keras_model_is_filled_by_name_and_restored(tmp_path, source, world):
    fresh = dense_model(world)
    template = tf.train.Checkpoint(model=fresh).save(str(tmp_path / "fresh"))
    report = cr.convert(source, tmp_path / "out" / "ckpt", RULES, into=template)
    assert {entry.source for entry in report.restored} == {"enc/w", "enc/b"}
    assert all("template's value" in entry.reason for entry in report.initialized)
    model = dense_model(world, start=-9000)
    tf.train.Checkpoint(model=model).restore(str(tmp_path / "out" / "ckpt")).expect_partial()
    np.testing.assert_array_equal(model.get_layer("fc").kernel, TENSORS["enc/w"])
    np.testing.assert_array_equal(model.get_layer("fc").bias, TENSORS["enc/b"])
    for layer in ("bn", "head"):
        for ours, theirs in zip(
            model.get_layer(layer).weights, fresh.get_layer(layer).weights, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    with cr.open_checkpoint(template) as reader:
        everything = set(reader.variables()) - {"_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter"}
    accounted_once(report, TENSORS, everything)


def test_a_template_of_a_module_is_filled_by_object_path_or_name(tmp_path, source):
    def make():
        module = tf.Module()
        module.kernel = tf.Variable(tf.fill((3, 2), -1.0), name="enc/w")
        module.inner = tf.Module()
        module.inner.bias = tf.Variable(tf.fill(2, -2.0), name="odd")
        module.rest = tf.Variable(tf.fill(3, -3.0), name="rest")
        return module

    template = tf.train.Checkpoint(model=make()).write(str(tmp_path / "fresh"))
    rules = cr.Rules(include=["enc/w", "enc/b"], rename=[("enc/b", "model/inner/bias")])
    report = cr.convert(source, tmp_path / "out", rules, into=template)
    assert {entry.name for entry in report.restored} == {"enc/w", "odd"}
    module = make()
    module.rest.assign(numbers(3))
    tf.train.Checkpoint(model=module).restore(str(tmp_path / "out")).expect_partial()
    np.testing.assert_array_equal(module.kernel, TENSORS["enc/w"])
    np.testing.assert_array_equal(module.inner.bias, TENSORS["enc/b"])
    np.testing.assert_array_equal(module.rest, np.full(3, -3.0))


def test_a_model_function_stands_for_its_template(tmp_path, source, world):
    report = cr.convert(source, tmp_path / "out", RULES, model=lambda: dense_model(world))
    model = dense_model(world, start=None)
    tf.train.Checkpoint(model=model).restore(str(tmp_path / "out")).expect_partial()
    np.testing.assert_array_equal(model.get_layer("fc").kernel, TENSORS["enc/w"])
    wanted = dense_model(world).get_layer("head").bias
    np.testing.assert_array_equal(model.get_layer("head").bias, wanted)
    assert len(report.restored) == 2


def test_a_model_function_may_return_a_checkpoint_with_an_optimizer(tmp_path, source):
    def make():
        model = dense_model(tf_keras)
        optimizer = tf_keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)
        return tf.train.Checkpoint(net=model, optimizer=optimizer)

    cr.convert(source, tmp_path / "out", RULES, model=make)
    checkpoint = make()
    checkpoint.net.get_layer("fc").kernel.assign(tf.zeros((3, 2)))
    checkpoint.restore(str(tmp_path / "out")).expect_partial()
    np.testing.assert_array_equal(checkpoint.net.get_layer("fc").kernel, TENSORS["enc/w"])


def test_a_model_that_is_not_built_makes_no_template(tmp_path, source, world):
    with pytest.raises(cr.TargetError, match="not built"):
        cr.convert(
            source,
            tmp_path / "out" / "m",
            RULES,
            model=lambda: world.Sequential([world.layers.Dense(2, name="fc")], name="net"),
        )
    assert not (tmp_path / "out").exists()


def test_a_name_based_template_keeps_its_values_too(tmp_path, source):
    template = write(tmp_path / "fresh", {"enc/w": np.zeros((3, 2), np.float32), "new": numbers(2)})
    cr.convert(source, tmp_path / "out", into=template)
    assert_holds(tmp_path / "out", {"enc/w": TENSORS["enc/w"], "new": numbers(2)})


@pytest.mark.parametrize("form", ["V1", "partitioned"])
def test_a_template_of_an_older_kind_is_a_template(tmp_path, source, form):
    fresh = {"enc/w": numbers(3, 2, start=900), "new": numbers(4, start=800)}
    template = write_from_graph(
        tmp_path / "fresh", fresh, parts=2 if form == "partitioned" else 1, v1=form == "V1"
    )
    cr.convert(source, tmp_path / "out", cr.Rules(include="enc/w"), into=template)
    assert_holds(tmp_path / "out", {"enc/w": TENSORS["enc/w"], "new": fresh["new"]})


def test_what_does_not_fit_the_template_is_a_fault_until_skipping_is_asked_for(tmp_path, source):
    template = write(
        tmp_path / "fresh",
        {
            "enc/w": np.zeros((3, 2), np.float32),
            "head/w": numbers(2, 3),
            "global_step": np.int32(0),
        },
    )
    with pytest.raises(cr.PlanError) as caught:
        cr.convert(source, tmp_path / "out" / "m", into=template)
    assert len(caught.value.faults) == 2
    assert not (tmp_path / "out").exists()
    report = cr.convert(source, tmp_path / "out" / "m", into=template, skip_mismatched=True)
    assert_holds(
        tmp_path / "out" / "m",
        {"enc/w": TENSORS["enc/w"], "head/w": numbers(2, 3), "global_step": np.int32(0)},
    )
    assert {e.name: e.outcome for e in report.mismatched} == {
        "head/w": "the template's value",
        "global_step": "the template's value",
    }
    accounted_once(report, TENSORS, ["enc/w", "head/w", "global_step"])


def test_a_template_and_a_model_are_one_too_many(tmp_path, source):
    with pytest.raises(ValueError, match="both"):
        cr.convert(source, tmp_path / "out", into=source, model=dense_model)


# -- what is written, and when --------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_reports_the_same_plan(tmp_path, source):
    report = cr.convert(source, tmp_path / "out" / "m", RULES, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert report.dry_run
    assert report.plan == cr.convert(source, tmp_path / "out" / "m", RULES).plan


def test_a_checkpoint_that_is_there_is_replaced_only_when_asked_for(tmp_path, source):
    old = write(tmp_path / "out" / "m", {"old": numbers(2)})
    with pytest.raises(cr.OutputError, match="overwrite"):
        cr.convert(source, old)
    assert_holds(old, {"old": numbers(2)})
    cr.convert(source, old, overwrite=True)
    assert_holds(old, TENSORS)


@pytest.mark.parametrize("spelling", ["{}", "{}.index", "{}.data-00000-of-00001"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_source_that_is_named_by_one_of_its_files_is_never_the_destination(
    tmp_path, source, spelling, overwrite
):
    before = {path.name: path.read_bytes() for path in Path(source).parent.iterdir()}
    with pytest.raises((cr.CompatRestoreError, OSError), match="read from"):
        cr.convert(spelling.format(source), source, overwrite=overwrite)
    (tmp_path / "link").symlink_to(Path(source).parent)
    with pytest.raises((cr.CompatRestoreError, OSError), match="read from"):
        cr.convert(source, tmp_path / "link" / "model.ckpt", overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in Path(source).parent.iterdir()} == before


def test_the_directory_of_the_destination_is_listed_a_few_times_and_no_more(tmp_path, monkeypatch):
    from compat_restore.checkpoint import bundle_writer

    listed = []
    real = bundle_writer.listing
    monkeypatch.setattr(
        bundle_writer, "listing", lambda folder: (listed.append(folder), real(folder))[1]
    )
    prefix = write(tmp_path / "a", {"w": np.zeros(3, np.float32)})
    listed.clear()
    cr.convert(prefix, tmp_path / "out" / "b")
    cr.convert(prefix, tmp_path / "out" / "b", overwrite=True)
    assert len(listed) <= 6, (
        "for each, what is there, what is there when writing begins, and when it ends"
    )


def test_the_template_is_never_the_destination(tmp_path, source):
    template = write(tmp_path / "fresh", {"enc/w": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match="read from"):
        cr.convert(source, template, into=template, overwrite=True)
    assert_holds(template, {"enc/w": np.zeros((3, 2), np.float32)})


@pytest.mark.parametrize("v1_source", [False, True])
def test_a_v1_file_is_not_written_over_by_its_own_conversion(tmp_path, v1_source):
    source = write_from_graph(tmp_path / "m", {"w": numbers(2)}, v1=v1_source)
    with pytest.raises(ValueError, match="read from"):
        cr.convert(source, source, overwrite=True)
    assert contents(source)["w"].tolist() == [1, 2]


def test_a_damaged_tensor_leaves_nothing_behind(tmp_path, source):
    damage(source, "head/w")
    for rules in (None, cr.Rules(transform=[("head/w", cr.Transpose((1, 0)))])):
        with pytest.raises(cr.DamagedCheckpointError, match="head/w"):
            cr.convert(source, tmp_path / "out" / "m", rules)
        assert not (tmp_path / "out").exists()


def test_a_damaged_tensor_leaves_the_old_checkpoint_whole(tmp_path, source):
    old = write(tmp_path / "out" / "m", {"old": numbers(2)})
    damage(source, "head/w")
    with pytest.raises(cr.DamagedCheckpointError):
        cr.convert(source, old, overwrite=True)
    assert_holds(old, {"old": numbers(2)})
    assert files_in(tmp_path / "out") == ["m.data-00000-of-00001", "m.index"]


def test_a_damaged_tensor_that_is_left_out_does_no_harm(tmp_path, source):
    damage(source, "head/w")
    cr.convert(source, tmp_path / "out", cr.Rules(exclude="head/w"))
    assert sorted(contents(tmp_path / "out")) == sorted(set(TENSORS) - {"head/w"})


def test_a_damaged_template_leaves_nothing_behind(tmp_path, source):
    template = write(tmp_path / "fresh", {"enc/w": np.zeros((3, 2), np.float32), "new": numbers(2)})
    damage(template, "new")
    with pytest.raises(cr.DamagedCheckpointError, match="new"):
        cr.convert(source, tmp_path / "out" / "m", into=template)
    assert not list(tmp_path.glob("out/*"))


def test_the_source_is_the_same_afterwards(tmp_path, source):
    before = {path.name: path.read_bytes() for path in Path(source).parent.iterdir()}
    cr.convert(source, tmp_path / "out", RULES)
    assert {path.name: path.read_bytes() for path in Path(source).parent.iterdir()} == before


# -- TensorFlow 1.15.5 ----------------------------------------------------------------------------

READ_BY_TF1 = """
import sys, json
import numpy as np
import tensorflow as tf
assert tf.__version__ == "1.15.5", tf.__version__
prefix, out = sys.argv[1:]
reader = tf.train.NewCheckpointReader(prefix)
names = sorted(reader.get_variable_to_shape_map())
values = {}
for i, name in enumerate(names):
    value = reader.get_tensor(name)
    if value.dtype == object:
        value = np.frombuffer(b"".join(value.ravel()), np.uint8)
    elif value.dtype.name == "bfloat16":
        value = value.view(np.uint16)
    values["reader_%d" % i] = value
with tf.Session() as session:
    made = []
    for name, shape in sorted(reader.get_variable_to_shape_map().items()):
        dtype = reader.get_variable_to_dtype_map()[name]
        if dtype == tf.float32:
            made.append((name, tf.Variable(tf.zeros(shape), name="v%d" % len(made))))
    tf.train.Saver(dict(made)).restore(session, prefix)
    for i, (name, variable) in enumerate(made):
        values["saver_%d" % i] = session.run(variable)
np.savez(out + ".npz", **values)
json.dump({"names": names, "saver": [name for name, _ in made]}, open(out + ".json", "w"))
"""


def read_by_tf1(python, prefix, out):
    """Return what TensorFlow 1.15.5 reads: by its reader, and the floats by its Saver."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TF_"))}
    subprocess.run(
        [python, "-c", READ_BY_TF1, str(prefix), str(out)],
        check=True,
        env=environment,
        capture_output=True,
        timeout=120,
    )
    told = json.loads(Path(f"{out}.json").read_text())
    with np.load(f"{out}.npz", allow_pickle=False) as values:
        reader = {name: values[f"reader_{i}"] for i, name in enumerate(told["names"])}
        saver = {name: values[f"saver_{i}"] for i, name in enumerate(told["saver"])}
    return reader, saver


@pytest.mark.tf1
def test_tensorflow_1_15_reads_what_was_converted(tmp_path, tf1_python):
    tensors = {**TENSORS, **DTYPES, "emb": numbers(6, 2)}
    source = write(tmp_path / "s", tensors)
    cr.convert(source, tmp_path / "out" / "m", cr.Rules(rename=[(r"enc/(.*)", r"body/\1")]))
    reader, saver = read_by_tf1(tf1_python, tmp_path / "out" / "m", tmp_path / "told")
    wanted = {name.replace("enc/", "body/"): np.asarray(v) for name, v in tensors.items()}
    assert sorted(reader) == sorted(wanted)
    for name, value in wanted.items():
        raw = b"".join(value.tolist()) if value.dtype == object else value.tobytes()
        assert reader[name].tobytes() == raw, name
        assert reader[name].shape == value.shape or value.dtype == object
    assert sorted(saver) == sorted(n for n, v in wanted.items() if v.dtype == np.float32)
    for name, value in saver.items():
        assert value.tobytes() == wanted[name].tobytes()


@pytest.mark.tf1
def test_tensorflow_1_15_reads_what_partitioned_v1_and_object_based_sources_became(
    tmp_path, tf1_python
):
    made = {
        "parts": write_from_graph(tmp_path / "parts", {"emb": numbers(6, 2)}, parts=3),
        "v1": write_from_graph(tmp_path / "v1", {"w": numbers(3)}, v1=True),
        "objects": tf.train.Checkpoint(model=dense_model(tf_keras)).write(str(tmp_path / "obj")),
    }
    # One TensorFlow 1.15 for the three: starting it takes seconds.
    for name, source in made.items():
        cr.convert(source, tmp_path / "out" / name, cr.Rules(rename=[("(.*)", rf"{name}/\1")]))
    merged = {}
    for name in made:
        merged |= contents(tmp_path / "out" / name)
    everything = write(tmp_path / "everything", merged)
    cr.convert(everything, tmp_path / "out" / "all")
    reader, saver = read_by_tf1(tf1_python, tmp_path / "out" / "all", tmp_path / "told")
    assert sorted(reader) == sorted(saver) == sorted(merged)
    np.testing.assert_array_equal(saver["parts/emb"], numbers(6, 2))
    np.testing.assert_array_equal(reader["v1/w"], numbers(3))
    kernel = dense_model(tf_keras).get_layer("fc").kernel
    np.testing.assert_array_equal(saver["objects/fc/kernel"], kernel)


# -- the script -----------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """Run `scripts/convert.py` where TensorFlow cannot be imported."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("tensorflow", "keras", "tf_keras"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not to be imported')\n")

    def run(*arguments, cwd=tmp_path, **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "convert.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(blocked), **environment},
            timeout=120,
        )

    return run


def test_the_script_converts_without_tensorflow(tmp_path, source, script):
    done = script(
        *(source, "out/m", "--exclude", "head/.*", "--drop-slots"),
        *("--include", "enc/.*", "--include", "head/.*"),
        *("--rename", r"enc/w=body/kernel", "--rename", r"enc/(.*)=body/\1", "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert [row["name"] for row in data["restored"]] == ["body/b", "body/kernel"]
    assert_holds(
        tmp_path / "out" / "m", {"body/kernel": TENSORS["enc/w"], "body/b": TENSORS["enc/b"]}
    )


def test_the_script_fills_a_template_without_tensorflow(tmp_path, source, script):
    model = dense_model(tf_keras)
    template = tf.train.Checkpoint(model=model).write(str(tmp_path / "fresh"))
    (tmp_path / "rules.toml").write_text(RULES.to_toml())
    done = script(source, "out/ckpt", "--into", template, "--rules", "rules.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fc/kernel" in done.stdout
    restored = dense_model(tf_keras, start=None)
    tf.train.Checkpoint(model=restored).restore(str(tmp_path / "out" / "ckpt")).expect_partial()
    np.testing.assert_array_equal(restored.get_layer("fc").kernel, TENSORS["enc/w"])
    np.testing.assert_array_equal(restored.get_layer("head").kernel, model.get_layer("head").kernel)


MODEL_CODE = """
import tensorflow as tf
import tf_keras

def make():
    return tf_keras.Sequential(
        [tf_keras.Input((3,)), tf_keras.layers.Dense(2, name="fc", bias_initializer="ones")]
    )
"""


def test_the_script_makes_a_model_by_the_name_of_a_function(tmp_path, source, script):
    (tmp_path / "mymodels.py").write_text(MODEL_CODE)
    arguments = (source, "out/ckpt", "--include", "enc/w", "--rename", "enc/w=fc/kernel")
    done = script(*arguments, "--model", "mymodels:make")
    assert done.returncode != 0  # where TensorFlow cannot be imported
    assert not (tmp_path / "out").exists()
    done = script(*arguments, "--model", "mymodels:make", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    layer = tf_keras.layers.Dense(2, name="fc")
    model = tf_keras.Sequential([tf_keras.Input((3,)), layer])
    tf.train.Checkpoint(model=model).restore(str(tmp_path / "out" / "ckpt")).expect_partial()
    np.testing.assert_array_equal(layer.kernel, TENSORS["enc/w"])
    np.testing.assert_array_equal(layer.bias, np.ones(2))


def test_the_script_s_dry_run_writes_nothing(tmp_path, source, script):
    done = script(source, "out/m", "--dry-run")
    assert done.returncode == 0
    assert "would become" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_script_replaces_a_checkpoint_only_with_overwrite(tmp_path, source, script):
    write(tmp_path / "out", {"old": numbers(2)})
    refused = script(source, "out")
    assert refused.returncode == 4
    assert "--overwrite" in refused.stderr
    assert refused.stdout == ""
    assert script(source, "out", "--overwrite").returncode == 0
    assert_holds(tmp_path / "out", TENSORS)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["SOURCE"], 2, "DST"),
        (["SOURCE", "out", "--nonsense"], 2, "--nonsense"),
        (["SOURCE", "out", "--rename", "enc/w"], 2, "REGEX=NAME"),
        (["SOURCE", "out", "--include", "enc/("], 2, "no regular expression"),
        (["SOURCE", "out", "--into", "SOURCE", "--model", "a:b"], 2, "not allowed with"),
        (["SOURCE", "out", "--model", "nowhere:make"], 2, "nowhere"),
        (["SOURCE", "SOURCE", "--overwrite"], 2, "read from"),
        (["nowhere/model.ckpt", "out"], 4, "nowhere/model.ckpt"),
        (["SOURCE", "out", "--include", "nothing/.*"], 5, "nothing/.*"),
        (["SOURCE", "out", "--rename", ".*=one"], 5, "tensors would go into it"),
        (["DAMAGED", "out"], 3, "head/w"),
        (["SOURCE", "out", "--rules", "nowhere.toml"], 4, "nowhere.toml"),
    ],
)
def test_the_script_s_exit_status_says_what_was_wrong(  # noqa: PLR0917
    tmp_path, source, script, arguments, status, message
):
    places = {"SOURCE": source, "DAMAGED": write(tmp_path / "damaged", TENSORS)}
    damage(places["DAMAGED"], "head/w")
    done = script(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.glob("out*"))


# What the output must not be


def test_a_shard_of_a_v1_source_is_never_the_destination(golden, tmp_path):
    for path in (golden / "sharded_v1").glob("model.ckpt-*"):
        shutil.copy(path, tmp_path / path.name)
    shards = sorted(tmp_path.iterdir())
    with pytest.raises(cr.UsageError, match="is read from"):
        cr.convert(tmp_path / "model.ckpt", shards[0], overwrite=True)
    assert sorted(tmp_path.iterdir()) == shards


def test_a_data_file_that_a_link_of_the_source_leads_to_is_never_replaced(tmp_path):
    real = write(tmp_path / "real" / "d", {"w": numbers(3)})
    for suffix in (".index", ".data-00000-of-00001"):
        (tmp_path / f"s{suffix}").symlink_to(f"{real}{suffix}")
    with pytest.raises(cr.UsageError, match="is read from"):
        cr.convert(tmp_path / "s", real, overwrite=True)
    with cr.open_checkpoint(tmp_path / "s") as reader:
        np.testing.assert_array_equal(reader.read("w"), numbers(3))


@pytest.mark.parametrize("name", ["", "sub/"])
def test_a_destination_that_is_no_file_name_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    ckpt = write(tmp_path / "m", {"w": numbers(3)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(cr.OutputError, match="a name for the new checkpoint is expected"):
        cr.convert(ckpt, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_foresees_that_the_destination_is_taken(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(3)})
    taken = write(tmp_path / "taken", {"w": numbers(3)})
    with pytest.raises(cr.OutputError, match="exists already"):
        cr.convert(ckpt, taken, dry_run=True)


def test_variants_are_carried_over_with_a_digest_of_their_stored_bytes(tmp_path):
    dataset = tf.data.Dataset.range(4)
    ckpt = tf.train.Checkpoint(w=tf.Variable([1.0]), it=iter(dataset)).write(str(tmp_path / "c"))
    report = cr.convert(ckpt, tmp_path / "out", digests=True)
    assert all(entry.digest.startswith("sha256:") for entry in report.restored)
    assert any(entry.item.dtype == "variant" for entry in report.restored)


def test_what_was_written_wrongly_is_never_put_in_place(tmp_path, monkeypatch):
    from compat_restore.checkpoint.bundle_writer import BundleWriter

    ckpt = write(tmp_path / "m", {"w": numbers(2, 3)})
    old = write(tmp_path / "out", {"old": numbers(1)})
    real = BundleWriter._append
    monkeypatch.setattr(
        BundleWriter, "_append", lambda self, key, dtype, array: real(self, key, dtype, array + 1)
    )
    rules = cr.Rules(transform=[("w", cr.Transpose((1, 0)))])
    with pytest.raises(cr.PreservationError, match="'w'"):
        cr.convert(ckpt, old, rules, overwrite=True, digests=True)
    with cr.open_checkpoint(old) as reader:
        assert list(reader.specs()) == ["old"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class Encoder(tf.Module):
    def __init__(self):
        super().__init__()
        self.pooler = tf.Module()
        self.pooler.w = tf.Variable(np.zeros((2, 3), np.float32))


def test_the_same_rules_serve_a_module_and_its_template(tmp_path):
    ckpt = write(tmp_path / "m", {"bert/pooler/kernel": numbers(2, 3)})
    rules = cr.Rules(rename=[("bert/pooler/kernel", "pooler/w")])
    assert len(cr.restore_objects(Encoder(), ckpt, rules).restored) == 1
    cr.convert(ckpt, tmp_path / "out", rules, model=Encoder)
    module = Encoder()
    tf.train.Checkpoint(model=module).restore(str(tmp_path / "out")).expect_partial()
    np.testing.assert_array_equal(module.pooler.w, numbers(2, 3))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def build(): raise ValueError('no weights today')", "ValueError: no weights today"),
        ("def build(size): pass", "called without arguments"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_model_function_that_fails_is_told_without_a_traceback(
    tmp_path, monkeypatch, capsys, source, message
):
    from compat_restore.cli import main

    (tmp_path / "models_of_mine.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ckpt = write(tmp_path / "m", {"w": numbers(3)})
    monkeypatch.delitem(sys.modules, "models_of_mine", raising=False)
    assert main(["convert", ckpt, "out", "--model", "models_of_mine:build"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


# -- parts, data files and checks -----------------------------------------------------------------


def entries_of(prefix):
    with cr.open_checkpoint(prefix) as reader:
        return {name: spec.slices for name, spec in reader.specs().items()}


def without_reading(monkeypatch):
    """Let no tensor be decoded: what is copied, is copied as bytes."""
    from compat_restore.checkpoint.bundle import BundleReader

    def read(_reader, name):
        raise AssertionError(f"{name} was decoded")

    monkeypatch.setattr(BundleReader, "read", read)


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_become_one_tensor_or_stay_parts(tmp_path, axis):
    value = numbers(6, 4)
    with graph_and_session() as session:
        v1.get_variable(
            "emb",
            shape=value.shape,
            initializer=v1.constant_initializer(7.0),
            partitioner=v1.fixed_size_partitioner(3 if axis == 0 else 2, axis=axis),
        )
        for part in v1.global_variables():
            info = part._get_save_slice_info()
            where = tuple(
                slice(s, s + n) for s, n in zip(info.var_offset, info.var_shape, strict=True)
            )
            session.run(part.initializer)
            part.load(value[where], session)
        source = v1.train.Saver().save(session, str(tmp_path / "parts"), write_meta_graph=False)
    cr.convert(source, tmp_path / "merged", cr.Rules(rename=[("emb", "table")]))
    assert_holds(tmp_path / "merged", {"table": value})
    assert entries_of(tmp_path / "merged") == {"table": ()}
    report = cr.convert(
        source, tmp_path / "kept", cr.Rules(rename=[("emb", "t")]), keep_slices=True, digests=True
    )
    assert entries_of(tmp_path / "kept") == {"t": entries_of(source)["emb"]}
    assert digests_of(report) == {"t": digest_of(value)}
    reader = tf.train.load_checkpoint(str(tmp_path / "kept"))
    np.testing.assert_array_equal(reader.get_tensor("t"), value)


def test_rows_are_joined_without_decoding_them(tmp_path, monkeypatch):
    value = numbers(8, 3)
    source = write_from_graph(tmp_path / "s", {"emb": value}, parts=4)
    with monkeypatch.context() as patch:
        without_reading(patch)
        cr.convert(source, tmp_path / "m")
        cr.convert(source, tmp_path / "kept", keep_slices=True)
    assert_holds(tmp_path / "m", {"emb": value})
    assert_holds(tmp_path / "kept", {"emb": value})


def test_a_part_that_is_damaged_is_told_whether_it_is_joined_or_kept(tmp_path):
    source = write_from_graph(tmp_path / "s", {"emb": numbers(8, 3), "b": numbers(2)}, parts=2)
    with cr.open_checkpoint(source) as reader:
        place = reader.stored("emb")[1]
    data = bytearray(Path(place.source.name).read_bytes())
    data[place.offset] ^= 1
    Path(place.source.name).write_bytes(data)
    for keep in (True, False):
        with pytest.raises(cr.DamagedTensorsError, match="'emb"):
            cr.convert(source, tmp_path / "m", keep_slices=keep)
    assert not list(tmp_path.glob("m*"))


def test_parts_that_a_rule_transforms_become_one_tensor(tmp_path):
    source = write_from_graph(tmp_path / "s", {"emb": numbers(6, 2)}, parts=2)
    rules = cr.Rules(transform=[("emb", cr.Transpose((1, 0)))])
    cr.convert(source, tmp_path / "m", rules, keep_slices=True)
    assert_holds(tmp_path / "m", {"emb": numbers(6, 2).T})


def test_a_partitioned_template_takes_whole_tensors_and_other_parts(tmp_path):
    template = write_from_graph(tmp_path / "t", {"emb": np.zeros((6, 2), np.float32)}, parts=3)
    for parts in (1, 2, 3):
        source = write_from_graph(tmp_path / f"s{parts}", {"emb": numbers(6, 2)}, parts=parts)
        cr.convert(source, tmp_path / f"o{parts}", into=template)
        assert_holds(tmp_path / f"o{parts}", {"emb": numbers(6, 2)})
        assert entries_of(tmp_path / f"o{parts}") == entries_of(template)


def test_a_size_limit_makes_as_many_data_files_as_it_takes(tmp_path):
    tensors = {f"w{n}": numbers(100, start=100 * n) for n in range(7)} | {"big": numbers(300)}
    source = write(tmp_path / "s", tensors)
    cr.convert(source, tmp_path / "m", max_shard_size=1000)
    assert_holds(tmp_path / "m", tensors)
    files = sorted(tmp_path.glob("m.data-*"))
    assert len(files) == 5  # two of 400 bytes each, and the one of 1200 alone
    assert max(path.stat().st_size for path in files) == 1200
    reader = tf.train.load_checkpoint(str(tmp_path / "m"))
    for name, value in tensors.items():
        np.testing.assert_array_equal(reader.get_tensor(name), value)
    cr.convert(source, tmp_path / "m", max_shard_size=2000, overwrite=True)
    assert_holds(tmp_path / "m", tensors)
    assert len({path.name[-5:] for path in tmp_path.glob("m.data-*")}) == 1


def test_a_size_limit_holds_for_values_that_are_decoded(tmp_path, golden):
    v1_source = golden / "v1"
    cr.convert(v1_source, tmp_path / "m", max_shard_size=1)
    with cr.open_checkpoint(v1_source) as reader:
        count = len(reader.specs())
    assert len(list(tmp_path.glob("m.data-*"))) == count
    assert cr.diff(v1_source, tmp_path / "m").equal


def test_all_damaged_tensors_are_told_and_nothing_is_written(tmp_path, source):
    for name in ("enc/w", "head/w", "global_step"):
        damage(source, name)
    rules = cr.Rules(transform=[("head/w", cr.Transpose((1, 0)))])
    with pytest.raises(cr.DamagedTensorsError) as caught:
        cr.convert(source, tmp_path / "out" / "m", rules)
    assert len(caught.value.faults) == 3
    assert not (tmp_path / "out").exists()


def test_unverified_damage_travels_with_the_checksum_that_tells_it(tmp_path, source):
    damage(source, "enc/w")
    cr.convert(source, tmp_path / "m", verify=False)
    [fault] = cr.verify_checkpoint(tmp_path / "m").faults
    assert "'enc/w'" in fault


def test_trap_18_from_tf1_to_tf2_and_back_is_the_same_checkpoint(tmp_path, world):
    tensors = {
        "net.Scale/fc/kernel": numbers(3, 2),
        "net.Scale/fc/bias": numbers(2),
        "net.Scale/head/kernel": numbers(2, 4),
        "net.Scale/head/bias": numbers(4),
    }
    old = write(tmp_path / "tf1", tensors)
    # As the official guide does it: variables in a dict, whose keys are escaped in the checkpoint
    # ("/" as ".S", "." as "..") and unescaped by a plain replacement.
    holder = tf.train.Checkpoint(vars={name: tf.Variable(v) for name, v in tensors.items()})
    keys = tf.train.load_checkpoint(
        holder.save(str(tmp_path / "guide"))
    ).get_variable_to_shape_map()
    names = {key.split("/")[1].replace(".S", "/") for key in keys if key.startswith("vars/")}
    assert names.isdisjoint(tensors)
    # And a checkpoint of a model has no such dict at all.
    model = dense_model(world)
    fresh = tf.train.Checkpoint(model=model).write(str(tmp_path / "fresh"))
    keys = tf.train.load_checkpoint(fresh).get_variable_to_shape_map()
    found = [key for key in keys if key.startswith("vars/")]
    with tf.Graph().as_default(), pytest.raises(ValueError, match="No variables to save"):
        v1.train.Saver(var_list=found)

    there = cr.Rules(rename=[(r"net\.Scale/(.*)", r"\1")])
    back = cr.Rules(include=[r".*(kernel|bias)"], rename=[(r"(?:net/)?(.*)", r"net.Scale/\1")])
    cr.convert(old, tmp_path / "tf2", there, into=fresh)
    cr.convert(tmp_path / "tf2", tmp_path / "tf1 again", back)
    assert cr.diff(old, tmp_path / "tf1 again").equal


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("m.SAFETENSORS", "small letters"),
        ("m.index", "name the whole: '.*m'"),
        ("m.data-00000-of-00001", "name the whole: '.*m'"),
        ("m.safetensors.index.json", "name the whole: '.*m.safetensors'"),
        ("m.pt", r"\.pt files are not written"),
        ("m.npy", r"\.npy files are not written"),
    ],
)
def test_a_name_that_is_surely_a_slip_is_told(tmp_path, source, name, told):
    with pytest.raises(cr.UsageError, match=told):
        cr.convert(source, tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, -5])
def test_a_size_limit_that_is_no_size_is_told(tmp_path, source, size):
    with pytest.raises(cr.UsageError, match="max_shard_size"):
        cr.convert(source, tmp_path / "m", max_shard_size=size)


@pytest.mark.parametrize("form", ["checkpoint", "two objects", "root", "weights", "SavedModel"])
def test_the_report_says_what_restores_an_object_based_output(tmp_path, source, form):
    model = dense_model(tf_keras)
    template = str(tmp_path / "fresh")
    if form == "checkpoint":
        template = tf.train.Checkpoint(model=model).save(template)
    elif form == "two objects":
        template = tf.train.Checkpoint(net=model, step=tf.Variable(1)).write(template)
    elif form == "root":
        template = tf.train.Checkpoint(model).write(template)
    elif form == "weights":
        model.save_weights(template)
    else:
        tf.saved_model.save(model, template)
    report = cr.convert(source, tmp_path / "out", RULES, into=template)
    call = report.notes[-1].partition(".restore(")[0]
    model = dense_model(tf_keras, start=None)
    names = {"tf": tf, "model": model, "net": model, "step": tf.Variable(0)}
    eval(call, names).restore(str(tmp_path / "out")).expect_partial()
    assert np.asarray(model.get_layer("fc").kernel).tolist() == TENSORS["enc/w"].tolist()


def test_an_object_based_template_s_graph_is_left_out_of_other_formats(tmp_path, source):
    template = tf.train.Checkpoint(model=dense_model(keras)).write(str(tmp_path / "fresh"))
    cr.convert(source, tmp_path / "m.npz", RULES, into=template)
    found = contents(tmp_path / "m.npz")
    assert len(found) == 8
    assert sum(np.array_equal(value, TENSORS["enc/w"]) for value in found.values()) == 1
