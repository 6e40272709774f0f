"""What goes wrong today, shown on TensorFlow's own ways, and that it does not go wrong here.

Each test first lets the peer fall in; should a new TensorFlow no longer do so, the test says it.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from checkpoints import graph_and_session, numbers, write

import compat_restore as cr

v1 = tf.compat.v1


def variable(name, *shape, resource=True):
    return v1.get_variable(name, shape, initializer=v1.zeros_initializer(), use_resource=resource)


def same(value, wanted) -> bool:
    return np.array_equal(np.asarray(value), wanted)


@pytest.mark.parametrize("resource", [False, True], ids=["ref", "resource"])
def test_trap_01_global_variables_initializer_after_restore_overwrites_loaded_weights(
    tmp_path, resource
):
    ckpt = write(tmp_path / "m", {"enc/w": numbers(3)})
    with graph_and_session() as session:
        w = variable("enc/w", 3, resource=resource)
        head = variable("head/w", 2, resource=resource)
        v1.train.Saver([w]).restore(session, ckpt)
        assert same(session.run(w), numbers(3))
        session.run(v1.global_variables_initializer())
        assert same(session.run(w), np.zeros(3))  # gone, and nobody said so
    with graph_and_session() as session:
        w = variable("enc/w", 3, resource=resource)
        head = variable("head/w", 2, resource=resource)
        report = cr.restore_session(session, ckpt)
        assert same(session.run(w), numbers(3))
        assert same(session.run(head), np.zeros(2))
        assert report.preserved == ("enc/w",)
        assert cr.initialize_uninitialized(session) == ()
        assert same(session.run(w), numbers(3))


def test_trap_01_loaded_by_a_saver_the_rest_can_be_initialised_without_harm(tmp_path):
    ckpt = write(tmp_path / "m", {"enc/w": numbers(3)})
    with graph_and_session() as session:
        w = variable("enc/w", 3)
        variable("head/w", 2)
        v1.train.Saver([w]).restore(session, ckpt)
        assert cr.initialize_uninitialized(session) == ("head/w",)
        assert same(session.run(w), numbers(3))


@pytest.mark.parametrize("missing", ["head/w", "beta1_power"])
def test_trap_02_a_default_saver_on_a_partial_checkpoint_restores_nothing(tmp_path, missing):
    ckpt = write(tmp_path / "m", {"enc/w": numbers(3)})
    with graph_and_session() as session:
        w = variable("enc/w", 3)
        if missing == "head/w":
            variable("head/w", 2)
        else:
            v1.train.AdamOptimizer().minimize(tf.reduce_sum(w))
        with pytest.raises(tf.errors.NotFoundError, match="not found in checkpoint"):
            v1.train.Saver().restore(session, ckpt)
        assert "enc/w" in cr.uninitialized_variables(session)
        report = cr.restore_session(session, ckpt)
        assert same(session.run(w), numbers(3))
        assert missing in {entry.name for entry in report.initialized}


def test_trap_03_a_saver_over_variable_names_finds_no_name_that_ends_in_0(tmp_path):
    ckpt = write(tmp_path / "m", {"enc/b": numbers(3)})
    with graph_and_session() as session:
        b = variable("enc/b", 3)
        with pytest.raises(tf.errors.NotFoundError, match="enc/b:0 not found"):
            v1.train.Saver({v.name: v for v in [b]}).restore(session, ckpt)
        with pytest.raises(cr.PlanError, match='names in a checkpoint carry no ":0"'):
            cr.restore_session(session, ckpt, {v.name: v for v in [b]})
        cr.restore_session(session, ckpt, {"enc/b": b})
        assert same(session.run(b), numbers(3))


def test_trap_04_a_saver_gives_a_resource_variable_another_shape_than_it_declares(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(2, 5)})
    with graph_and_session() as session:
        w = variable("w", 3, 4)
        v1.train.Saver().restore(session, ckpt)
        assert w.shape == (3, 4)
        assert session.run(w.value()).shape == (2, 5)  # what it declares is not what it holds
    with graph_and_session() as session:
        variable("w", 3, 4)
        with pytest.raises(cr.PlanError, match=r"float32\[2,5\].*float32\[3,4\]"):
            cr.restore_session(session, ckpt)
        assert cr.uninitialized_variables(session) == ("w",)


def two_dense(world, first, second, *, units=2, name="net"):
    return world.Sequential(
        [
            world.Input((2,)),
            world.layers.Dense(2, name=first, use_bias=False),
            world.layers.Dense(units, name=second, use_bias=False),
        ],
        name=name,
    )


def kernels(model) -> list[np.ndarray]:
    return [np.asarray(variable) for variable in model.trainable_variables]


def test_trap_06_a_shape_that_does_not_fit_is_found_after_other_variables_are_overwritten(tmp_path):
    ckpt = write(tmp_path / "m", {"fc/kernel": numbers(2, 2), "head/kernel": numbers(2, 5)})
    model = two_dense(tf_keras, "fc", "head")
    before = kernels(model)
    with pytest.raises(ValueError, match="shape"):
        tf.train.Checkpoint(model=model).restore(ckpt).expect_partial()
    assert same(kernels(model)[0], numbers(2, 2))  # half a restore
    model = two_dense(tf_keras, "fc", "head")
    before = kernels(model)
    with pytest.raises(cr.PlanError, match="head/kernel"):
        cr.restore_objects(model, ckpt)
    assert all(map(same, kernels(model), before))


def test_trap_06_a_saver_tells_a_ref_variable_s_shape_after_it_has_begun(tmp_path):
    values = {f"w{i}": numbers(3, start=i + 1) for i in range(40)}
    ckpt = write(tmp_path / "m", {**values, "x": numbers(5)})

    def overwritten(restore, error):
        with graph_and_session() as session:
            made = [variable(name, 3, resource=False) for name in values]
            variable("x", 2, resource=False)
            session.run(v1.global_variables_initializer())
            with pytest.raises(error):
                restore(session)
            return sum(bool(np.any(value)) for value in session.run(made))

    def peer(session):
        v1.train.Saver().restore(session, ckpt)

    # Its assignments run side by side, so how many come through differs from run to run.
    counts = [overwritten(peer, tf.errors.InvalidArgumentError) for _ in range(5)]
    assert max(counts) > 0
    assert overwritten(lambda session: cr.restore_session(session, ckpt), cr.PlanError) == 0


def test_trap_07_a_keras_3_model_takes_nothing_from_a_name_based_checkpoint_in_silence(tmp_path):
    ckpt = write(tmp_path / "m", {"fc/kernel": numbers(2, 2), "head/kernel": numbers(2, 2)})
    model = two_dense(keras, "fc", "head")
    before = kernels(model)
    tf.train.Checkpoint(model=model).restore(ckpt).expect_partial()
    assert all(map(same, kernels(model), before))
    report = cr.restore_objects(model, ckpt)
    assert [same(kernel, numbers(2, 2)) for kernel in kernels(model)] == [True, True]
    assert len(report.restored) == 2


def test_trap_08_a_tf_keras_model_of_other_names_takes_nothing_in_silence(tmp_path):
    ckpt = write(tmp_path / "m", {"net/fc/weights": numbers(2, 2)})
    model = two_dense(tf_keras, "fc", "head")
    before = kernels(model)
    tf.train.Checkpoint(model=model).restore(ckpt).expect_partial()
    assert all(map(same, kernels(model), before))
    with pytest.raises(cr.PlanError, match=r"nothing would be restored.*'net/fc/weights'"):
        cr.restore_objects(model, ckpt)
    cr.restore_objects(model, ckpt, cr.Rules(rename=[("net/(.*)/weights", r"\1/kernel")]))
    assert same(kernels(model)[0], numbers(2, 2))


@pytest.mark.parametrize(
    ("old", "new"), [(tf_keras, keras), (keras, tf_keras)], ids=["to keras3", "to tf_keras"]
)
def test_trap_09_an_object_based_checkpoint_of_the_other_keras_is_ported_as_a_file(
    tmp_path, old, new
):
    source = two_dense(old, "fc", "head")
    ckpt = tf.train.Checkpoint(model=source).save(str(tmp_path / "m"))
    model = two_dense(new, "fc", "head")
    before = kernels(model)
    tf.train.Checkpoint(model=model).restore(ckpt).assert_nontrivial_match()
    assert all(map(same, kernels(model), before))
    fresh = tf.train.Checkpoint(model=model).write(str(tmp_path / "fresh"))
    rules = cr.Rules(include=[".*kernel"], rename=[(r"(?:.*/)?(\w+/kernel)", r"\1")])
    cr.convert(ckpt, tmp_path / "ported", rules, into=fresh)
    tf.train.Checkpoint(model=model).restore(str(tmp_path / "ported")).expect_partial()
    assert all(map(same, kernels(model), kernels(source)))


def test_trap_10_assert_consumed_passes_with_unused_keys(tmp_path):
    ckpt = write(
        tmp_path / "m",
        {"fc/kernel": numbers(2, 2), "head/kernel": numbers(2, 2), "forgotten": numbers(1)},
    )
    model = two_dense(tf_keras, "fc", "head")
    tf.train.Checkpoint(model).read(ckpt).assert_consumed()
    report = cr.restore_objects(model, ckpt)
    assert [entry.name for entry in report.unused] == ["forgotten"]
    with pytest.raises(cr.PlanError, match="forgotten"):
        cr.restore_objects(model, ckpt, strict=True)


@pytest.mark.parametrize("world", [tf_keras, keras], ids=["tf_keras", "keras3"])
def test_trap_10_assert_consumed_passes_with_two_layers_swapped(tmp_path, world):
    source = two_dense(world, "query", "key")
    ckpt = tf.train.Checkpoint(model=source).save(str(tmp_path / "m"))
    model = two_dense(world, "key", "query")
    tf.train.Checkpoint(model=model).restore(ckpt).assert_consumed()
    assert same(model.get_layer("key").kernel, kernels(source)[0])  # which was the query's
    with pytest.raises(cr.PlanError, match="contradict"):
        cr.restore_objects(two_dense(world, "key", "query"), ckpt)


def test_trap_11_two_variables_of_one_name_get_the_same_tensor(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(2)})

    def make():
        module = tf.Module()
        module.left = tf.Variable(tf.zeros(2), name="w")
        module.right = tf.Variable(tf.zeros(2), name="w")
        return module

    module = make()
    tf.train.Checkpoint(module).restore(ckpt).expect_partial()
    assert same(module.left, numbers(2))
    assert same(module.right, numbers(2))
    module = make()
    with pytest.raises(cr.PlanError, match="2 variables go by the name 'w', 'left' and 'right'"):
        cr.restore_objects(module, ckpt)
    cr.restore_objects(module, ckpt, cr.Rules(rename=[("w", "right")]))
    assert same(module.left, np.zeros(2))
    assert same(module.right, numbers(2))


def test_trap_14_an_exclusion_by_prefix_takes_its_neighbour_with_it(tmp_path):
    ckpt = write(tmp_path / "m", {"head/w": numbers(2), "head_norm/w": numbers(2)})
    with graph_and_session() as session:
        variable("head/w", 2)
        norm = variable("head_norm/w", 2)
        # tf_slim's get_variables_to_restore(exclude=["head"]) asks the collections like this.
        excluded = v1.get_collection(v1.GraphKeys.GLOBAL_VARIABLES, scope="head")
        assert {v.op.name for v in excluded} == {"head/w", "head_norm/w"}
        with pytest.raises(cr.PlanError, match=r"exclude 'head'.*must match a whole name"):
            cr.restore_session(session, ckpt, cr.Rules(exclude=["head"]))
        report = cr.restore_session(session, ckpt, cr.Rules(exclude=["head/.*"]))
        assert same(session.run(norm), numbers(2))
        assert [entry.name for entry in report.initialized] == ["head/w"]


def chains(links: int, count: int) -> list:
    """Make chains of variables, each of which starts one above the one before it."""
    ends = []
    for chain in range(count):
        link = variable(f"c{chain}/0")
        for depth in range(1, links):
            start = link.read_value() + 1.0
            link = v1.get_variable(
                f"c{chain}/{depth}", initializer=lambda s=start: s, use_resource=True
            )
        ends.append(link)
    return ends


OVER_AN_OLD_CHECKPOINT = """
import resource, signal, sys
import numpy as np

ours, prefix, fatal = sys.argv[1] == "ours", sys.argv[2], sys.argv[3] == "killed"
if ours:
    import compat_restore as cr
else:
    import tensorflow as tf
    tf.raw_ops.SaveV2(
        prefix=prefix + "_new", tensor_names=["w"], shape_and_slices=[""],
        tensors=[tf.constant(np.full(1000, 2, np.float32))],
    )
# The disk takes no more: an error, or the end of the process, when the index is to be written.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    if ours:
        cr.convert(prefix + "_source", prefix, overwrite=True)
    else:
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[prefix + "_new"], destination_prefix=prefix, delete_old_dirs=False
        )
except Exception as error:
    sys.exit(str(error))
"""


def saving_fails(who: str, prefix: str, how: str) -> None:
    """Write a new checkpoint over an old one in a process whose disk is full."""
    command = [sys.executable, "-c", OVER_AN_OLD_CHECKPOINT, who, prefix, how]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode != 0
    assert (done.returncode == -signal.SIGXFSZ) == (how == "killed"), done.stderr


def value_of(prefix):
    """Return what TensorFlow reads; None where it cannot."""
    try:
        return tf.train.load_checkpoint(prefix).get_tensor("w")[0]
    except (tf.errors.OpError, ValueError, RuntimeError):
        return None


@pytest.mark.parametrize("how", ["killed", "disk full"])
def test_traps_24_and_25_a_save_that_ends_while_the_index_is_written_loses_old_and_new(
    tmp_path, how
):
    old = write(tmp_path / "m", {"w": np.full(1000, 1, np.float32)})
    saving_fails("theirs", old, how)
    assert value_of(old) is None

    old = write(tmp_path / "o" / "m", {"w": np.full(1000, 1, np.float32)})
    write(tmp_path / "o" / "m_source", {"w": np.full(1000, 2, np.float32)})
    before = sorted(path.name for path in (tmp_path / "o").iterdir())
    saving_fails("ours", old, how)
    assert value_of(old) == 1
    assert cr.verify_checkpoint(old).faults == ()
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == before


def test_trap_26_initialisers_that_read_other_variables_run_in_no_order():
    def right(initialize) -> bool:
        with graph_and_session() as session:
            ends = chains(links=8, count=5)
            try:
                initialize(session)
                return session.run(ends) == [7.0] * 5
            except tf.errors.FailedPreconditionError:
                return False

    def peer(session):
        session.run(v1.global_variables_initializer())

    assert not all(right(peer) for _ in range(5))
    assert all(right(cr.initialize_uninitialized) for _ in range(5))


@pytest.mark.parametrize("resource", [False, True], ids=["ref", "resource"])
def test_trap_27_a_finalised_graph_takes_no_saver_and_no_assign(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(3)})
    with graph_and_session() as session:
        w = variable("w", 3, resource=resource)
        variable("rest", 2, resource=resource)
        session.graph.finalize()
        with pytest.raises(RuntimeError, match="finalized"):
            v1.train.Saver()
        with pytest.raises(RuntimeError, match="finalized"):
            v1.assign(w, numbers(3))
        with pytest.raises(RuntimeError, match="finalized"):
            v1.report_uninitialized_variables()
        cr.restore_session(session, ckpt)
        assert same(session.run(w), numbers(3))


def test_trap_28_an_assign_for_each_variable_grows_the_graph(tmp_path):
    values = {f"w{i}": numbers(2, start=i + 1) for i in range(50)}
    ckpt = write(tmp_path / "m", values)
    with graph_and_session() as session:
        made = {name: variable(name, 2) for name in values}
        before = len(session.graph.get_operations())
        for name, value in values.items():
            session.run(v1.assign(made[name], value))
        assert len(session.graph.get_operations()) >= before + 2 * len(values)
    with graph_and_session() as session:
        made = {name: variable(name, 2) for name in values}
        before = len(session.graph.get_operations())
        for _ in range(3):
            cr.restore_session(session, ckpt)
        assert len(session.graph.get_operations()) == before
        for name, value in session.run(made).items():
            assert same(value, values[name])
