"""The TF1 target: variables of a graph in a session, set and initialised without adding an op."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from checkpoints import (
    CountingSession,
    accounted_once,
    damage,
    digest_of,
    graph_and_session,
    numbers,
    write,
    write_from_graph,
)

import compat_restore as cr

v1 = tf.compat.v1


@pytest.fixture(params=[False, True], ids=["ref", "resource"])
def resource(request) -> bool:
    """Whether the variables of a test are resource variables."""
    return request.param


def variable(name, initial, resource, **options):
    """Make a variable whose initial value is a constant."""
    return v1.get_variable(name, initializer=tf.constant(initial), use_resource=resource, **options)


def ops_of(session) -> int:
    return len(session.graph.get_operations())


def names(entries) -> list[str]:
    return sorted(entry.name for entry in entries)


# -- restoring ------------------------------------------------------------------------------------


def test_a_restore_sets_what_is_planned_and_initialises_only_the_rest(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"enc/w": numbers(2, 3), "old/head": numbers(4)})
    with graph_and_session() as session:
        w = variable("enc/w", np.zeros((2, 3), np.float32), resource)
        head = variable("new/head", np.full(3, 0.5, np.float32), resource)
        report = cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(w), numbers(2, 3))
        np.testing.assert_array_equal(session.run(head), np.full(3, 0.5, np.float32))
    assert names(report.restored) == ["enc/w"]
    assert names(report.initialized) == ["new/head"]
    assert names(report.unused) == ["old/head"]
    assert report.restored[0].digest == digest_of(numbers(2, 3))
    accounted_once(report, ["enc/w", "old/head"], ["enc/w", "new/head"])


def test_no_op_is_added_and_a_finalised_graph_will_do(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"a": numbers(3), "s": np.float32(7)})
    with graph_and_session() as session:
        a = variable("a", np.zeros(3, np.float32), resource)
        variable("s", np.float32(0), resource)
        variable("b", np.ones(2, np.float32), resource)
        session.graph.finalize()
        before = ops_of(session)
        report = cr.restore_session(session, ckpt)
        assert cr.uninitialized_variables(session) == ()
        assert ops_of(session) == before
        np.testing.assert_array_equal(session.run(a), numbers(3))
    assert names(report.restored) == ["a", "s"]
    assert names(report.initialized) == ["b"]


def test_a_hundred_variables_take_one_run_to_set_one_to_read_and_one_to_ask(tmp_path, resource):
    values = {f"layer_{i}/w": numbers(2, start=i + 1) for i in range(100)}
    ckpt = write(tmp_path / "m", values)
    with graph_and_session() as session:
        for name in values:
            variable(name, np.zeros(2, np.float32), resource)
        counting = CountingSession(session)
        cr.SessionTarget(counting).assign(values.items())
        assert len(counting.runs) == 1
        counting.runs.clear()
        assert cr.uninitialized_variables(counting) == ()
        assert len(counting.runs) == 1
        counting.runs.clear()
        cr.restore_session(counting, ckpt)
        assert len(counting.runs) == 3


def test_all_that_is_left_is_initialised_in_one_run_where_nothing_reads_another(resource):
    with graph_and_session() as session:
        for i in range(30):
            variable(f"w{i}", np.float32(i), resource)
        counting = CountingSession(session)
        assert len(cr.initialize_uninitialized(counting)) == 30
        assert len(counting.runs) == 2


def test_ref_and_resource_variables_live_in_one_graph(tmp_path):
    ckpt = write(tmp_path / "m", {"ref": numbers(2), "res": numbers(2, start=9)})
    with graph_and_session() as session:
        ref = variable("ref", np.zeros(2, np.float32), resource=False)
        res = variable("res", np.zeros(2, np.float32), resource=True)
        variable("ref_rest", np.zeros(2, np.float32), resource=False)
        variable("res_rest", np.zeros(2, np.float32), resource=True)
        counting = CountingSession(session)
        assert set(cr.uninitialized_variables(counting)) == {"ref", "res", "ref_rest", "res_rest"}
        assert len(counting.runs) == 1
        report = cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(ref), numbers(2))
        np.testing.assert_array_equal(session.run(res), numbers(2, start=9))
    assert names(report.initialized) == ["ref_rest", "res_rest"]


def test_variables_that_share_one_initial_value_tensor_get_their_own_values(tmp_path, resource):
    ckpt = write(tmp_path / "m", {n: numbers(2, start=i * 10) for i, n in enumerate("abc")})
    with graph_and_session() as session:
        shared = tf.constant(np.zeros(2, np.float32))
        made = [v1.get_variable(n, initializer=shared, use_resource=resource) for n in "abc"]
        cr.restore_session(session, ckpt)
        for i, value in enumerate(session.run(made)):
            np.testing.assert_array_equal(value, numbers(2, start=i * 10))


def test_one_tensor_for_two_variables_leaves_them_independent(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(3)})
    with graph_and_session() as session:
        first = variable("first", np.zeros(3, np.float32), resource)
        second = variable("second", np.zeros(3, np.float32), resource)
        cr.restore_session(session, ckpt, cr.Rules(rename=[("w", ["first", "second"])]))
        session.run(v1.assign_add(first, np.ones(3, np.float32)))
        np.testing.assert_array_equal(session.run(second), numbers(3))
        np.testing.assert_array_equal(session.run(first), numbers(3) + 1)


def test_a_variable_that_trains_after_a_restore_starts_from_the_restored_value(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(3)})
    with graph_and_session() as session:
        w = variable("w", np.zeros(3, np.float32), resource)
        step = v1.train.GradientDescentOptimizer(0.5).minimize(tf.reduce_sum(w * 2.0))
        cr.restore_session(session, ckpt)
        session.run(step)
        np.testing.assert_array_equal(session.run(w), numbers(3) - 1)


# -- partitioned variables ------------------------------------------------------------------------


def partitioned(name, shape, parts, resource, axis=0):
    return v1.get_variable(
        name,
        shape=shape,
        initializer=v1.zeros_initializer(),
        partitioner=v1.fixed_size_partitioner(parts, axis=axis),
        use_resource=resource,
    )


@pytest.mark.parametrize("saved_in", [1, 2, 3])
@pytest.mark.parametrize(("parts", "axis"), [(4, 0), (2, 1)])
def test_a_partitioned_variable_takes_any_partitioning(tmp_path, resource, saved_in, parts, axis):
    value = numbers(7, 4)
    ckpt = write_from_graph(tmp_path / "m", {"emb": value}, parts=saved_in)
    with graph_and_session() as session:
        emb = partitioned("emb", (7, 4), parts, resource, axis)
        before = ops_of(session)
        report = cr.restore_session(session, ckpt)
        assert ops_of(session) == before
        np.testing.assert_array_equal(session.run(emb.as_tensor()), value)
    assert names(report.restored) == ["emb"]
    assert report.restored[0].digest == digest_of(value)
    accounted_once(report, ["emb"], ["emb"])


def test_a_whole_variable_takes_a_partitioned_tensor(tmp_path, resource):
    ckpt = write_from_graph(tmp_path / "m", {"emb": numbers(5, 2)}, parts=3)
    with graph_and_session() as session:
        emb = variable("emb", np.zeros((5, 2), np.float32), resource)
        cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(emb), numbers(5, 2))


def test_a_partitioned_variable_of_another_full_shape_is_a_fault(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"emb": numbers(8, 2)})
    with graph_and_session() as session:
        partitioned("emb", (7, 2), 2, resource)
        with pytest.raises(cr.PlanError, match=r"float32\[8,2\].*float32\[7,2\]"):
            cr.restore_session(session, ckpt)
        assert len(cr.uninitialized_variables(session)) == 2


def test_a_partitioned_variable_that_is_not_restored_is_initialised_part_by_part(
    tmp_path, resource
):
    ckpt = write(tmp_path / "m", {"w": numbers(1)})
    with graph_and_session() as session:
        variable("w", np.zeros(1, np.float32), resource)
        emb = partitioned("emb", (6, 2), 3, resource)
        report = cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(emb.as_tensor()), np.zeros((6, 2)))
    assert names(report.initialized) == ["emb"]


def test_a_partitioned_variable_is_chosen_as_a_whole(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"emb": numbers(6, 2), "w": numbers(1)})
    with graph_and_session() as session:
        emb = partitioned("emb", (6, 2), 3, resource)
        w = variable("w", np.zeros(1, np.float32), resource)
        report = cr.restore_session(session, ckpt, variables=[emb])
        np.testing.assert_array_equal(session.run(emb.as_tensor()), numbers(6, 2))
        np.testing.assert_array_equal(session.run(w), [0.0])
    assert names(report.restored) == ["emb"]
    assert names(report.unused) == ["w"]
    assert names(report.initialized) == ["w"]


def test_parts_without_their_siblings_are_refused_rather_than_half_told(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"emb": numbers(6, 2)})
    with graph_and_session() as session:
        emb = partitioned("emb", (6, 2), 3, resource)
        with pytest.raises(cr.TargetError, match=r"'emb'.*2 of its parts"):
            cr.restore_session(session, ckpt, variables=list(emb)[1:])
        assert len(cr.uninitialized_variables(session)) == 3


# -- dtypes and shapes ----------------------------------------------------------------------------

DTYPES = {
    "bfloat16": np.array([1.5, -2.0, 0.0], ml_dtypes.bfloat16),
    "float16": np.array([1.5, -2.0, 0.0], np.float16),
    "float64": np.array([1.5, np.nan, -0.0]),
    "int32": np.array([1, -2, 3], np.int32),
    "int64": np.array([1, -2, 2**40]),
    "uint8": np.array([1, 2, 255], np.uint8),
    "bool": np.array([True, False, True]),
    "complex64": np.array([1 + 2j, 0, -1j], np.complex64),
    "string": np.array([b"a", b"", b"\xff\x00z"], object),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(3),
}


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_is_restored_with_its_bytes(tmp_path, resource, kind):
    value = np.asarray(DTYPES[kind])
    ckpt = write(tmp_path / "m", {"v": value})
    with graph_and_session() as session:
        dtype = tf.string if kind == "string" else tf.as_dtype(value.dtype)
        initial = tf.zeros(value.shape, dtype) if kind != "string" else tf.fill(value.shape, b"?")
        made = v1.get_variable("v", initializer=initial, use_resource=resource)
        if kind != "empty":
            assert cr.uninitialized_variables(session) == ("v",)
        report = cr.restore_session(session, ckpt)
        found = np.asarray(session.run(made))
        assert cr.uninitialized_variables(session) == ()
    assert report.restored[0].digest == digest_of(value)
    if kind == "string":
        assert found.tolist() == value.tolist()
    else:
        assert found.dtype == value.dtype
        assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("kind", "holds"),
    [("qint8", np.int8), ("quint8", np.uint8), ("qint32", np.int32)],
)
def test_quantised_variables_are_restored(tmp_path, resource, kind, holds):
    value = np.array([1, 2, 100], holds)
    ckpt = write(tmp_path / "m", {"q": value}, dtypes={"q": kind})
    with graph_and_session() as session:
        initial = tf.bitcast(tf.constant(np.zeros(3, holds)), tf.as_dtype(kind))
        made = v1.get_variable("q", initializer=initial, use_resource=resource)
        bits = tf.bitcast(made, tf.as_dtype(holds))
        report = cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(bits), value)
    assert report.restored[0].digest == digest_of(value, kind)


def test_another_dtype_is_a_fault_until_a_cast_is_asked_for(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": np.array([1.0, 2.5])})
    with graph_and_session() as session:
        w = variable("w", np.zeros(2, np.float32), resource)
        with pytest.raises(cr.PlanError, match="Cast"):
            cr.restore_session(session, ckpt)
        rules = cr.Rules(transform=[("w", cr.Cast("float32"))])
        cr.restore_session(session, ckpt, rules)
        np.testing.assert_array_equal(session.run(w), np.array([1.0, 2.5], np.float32))


def test_a_variable_without_a_declared_shape_takes_the_checkpoint_s(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"v": numbers(4, 2)})
    with graph_and_session() as session:
        v = v1.get_variable(
            "v",
            initializer=v1.placeholder_with_default(np.zeros(3, np.float32), shape=None),
            validate_shape=False,
            use_resource=resource,
        )
        report = cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(v), numbers(4, 2))
    assert report.restored[0].digest == digest_of(numbers(4, 2))


# -- which variables ------------------------------------------------------------------------------


def test_only_the_chosen_variables_are_restored_and_the_rest_is_initialised(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(2)})
    with graph_and_session() as session:
        a = variable("a", np.zeros(2, np.float32), resource)
        b = variable("b", np.zeros(2, np.float32), resource)
        report = cr.restore_session(session, ckpt, variables=[a])
        np.testing.assert_array_equal(session.run(a), numbers(2))
        np.testing.assert_array_equal(session.run(b), np.zeros(2))
    assert names(report.restored) == ["a"]
    assert names(report.initialized) == ["b"]
    assert names(report.unused) == ["b"]
    accounted_once(report, ["a", "b"], ["a", "b"])


def test_local_variables_are_initialised_and_restored_only_if_chosen(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(2), "count": np.float32(5)})
    with graph_and_session() as session:
        w = variable("w", np.zeros(2, np.float32), resource)
        local = variable(
            "count",
            np.float32(0),
            resource,
            collections=[v1.GraphKeys.LOCAL_VARIABLES],
            trainable=False,
        )
        report = cr.restore_session(session, ckpt)
        assert session.run(local) == 0
        assert names(report.restored) == ["w"]
        assert names(report.initialized) == ["count"]
        report = cr.restore_session(session, ckpt, variables=[w, local])
        assert session.run(local) == 5
        assert names(report.restored) == ["count", "w"]


def test_variables_that_were_set_before_are_reported_as_kept_and_not_touched(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(2)})
    with graph_and_session() as session:
        variable("w", np.zeros(2, np.float32), resource)
        trained = variable("trained", np.zeros(2, np.float32), resource)
        variable("fresh", np.zeros(2, np.float32), resource)
        session.run(trained.initializer)
        session.run(v1.assign(trained, np.array([4, 5], np.float32)))
        report = cr.restore_session(session, ckpt)
        np.testing.assert_array_equal(session.run(trained), [4, 5])
    assert names(report.kept) == ["trained"]
    assert "set before" in report.kept[0].reason
    assert names(report.initialized) == ["fresh"]
    accounted_once(report, ["w"], ["w", "trained", "fresh"])


def test_without_initialize_the_rest_stays_uninitialised_and_is_told(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(2)})
    with graph_and_session() as session:
        variable("w", np.zeros(2, np.float32), resource)
        variable("rest", np.zeros(2, np.float32), resource)
        report = cr.restore_session(session, ckpt, initialize=False)
        assert cr.uninitialized_variables(session) == ("rest",)
    assert report.initialized == ()
    assert names(report.kept) == ["rest"]
    assert "not initialised" in report.kept[0].reason


def test_a_second_restore_goes_over_the_first(tmp_path, resource):
    first = write(tmp_path / "1", {"a": numbers(2), "b": numbers(2)})
    second = write(tmp_path / "2", {"a": numbers(2, start=7)})
    with graph_and_session() as session:
        a = variable("a", np.zeros(2, np.float32), resource)
        b = variable("b", np.zeros(2, np.float32), resource)
        cr.restore_session(session, first)
        report = cr.restore_session(session, second)
        np.testing.assert_array_equal(session.run(a), numbers(2, start=7))
        np.testing.assert_array_equal(session.run(b), numbers(2))
    assert names(report.kept) == ["b"]


def test_a_graph_that_came_from_a_meta_file_is_restored_like_any_other(tmp_path, resource):
    meta = str(tmp_path / "graph.meta")
    with graph_and_session():
        variable("a", np.zeros(2, np.float32), resource)
        variable("b", np.full(2, 3, np.float32), resource)
        v1.train.export_meta_graph(meta)
    ckpt = write(tmp_path / "m", {"a": numbers(2)})
    with graph_and_session() as session:
        v1.train.import_meta_graph(meta)
        before = ops_of(session)
        assert set(cr.uninitialized_variables(session)) == {"a", "b"}
        report = cr.restore_session(session, ckpt)
        assert ops_of(session) == before
        found = session.run({v.op.name: v for v in v1.global_variables()})
    np.testing.assert_array_equal(found["a"], numbers(2))
    np.testing.assert_array_equal(found["b"], [3, 3])
    assert names(report.initialized) == ["b"]


def test_a_graph_imported_under_a_scope_is_reached_by_a_rename(tmp_path, resource):
    meta = str(tmp_path / "graph.meta")
    with graph_and_session():
        variable("a", np.zeros(2, np.float32), resource)
        v1.train.export_meta_graph(meta)
    ckpt = write(tmp_path / "m", {"a": numbers(2)})
    with graph_and_session() as session:
        v1.train.import_meta_graph(meta, import_scope="twin")
        cr.restore_session(session, ckpt, {"/": "twin/"})
        np.testing.assert_array_equal(session.run(v1.global_variables()[0]), numbers(2))


def test_variables_that_share_a_name_are_refused(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(2)})
    with graph_and_session() as session:
        w = variable("w", np.zeros(2, np.float32), resource)
        with pytest.raises(cr.TargetError, match="is no variable"):
            cr.restore_session(session, ckpt, variables=[w, tf.constant(1.0)])
        cr.restore_session(session, ckpt, variables=[w, w])
        np.testing.assert_array_equal(session.run(w), numbers(2))


# -- the order of initialisation ------------------------------------------------------------------


def chained(name, before, resource):
    """Make a variable that starts one above another's value."""
    return v1.get_variable(
        name, initializer=before.read_value() + 1.0, use_resource=resource, trainable=False
    )


def test_chains_of_initialisers_run_in_the_order_in_which_they_read(resource):
    with graph_and_session() as session:
        ends = []
        for chain in range(5):
            link = variable(f"c{chain}/0", np.float32(chain * 100), resource)
            for depth in range(1, 6):
                link = chained(f"c{chain}/{depth}", link, resource)
            ends.append(link)
        counting = CountingSession(session)
        assert len(cr.initialize_uninitialized(counting)) == 30
        assert len(counting.runs) == 1 + 6  # the question, and a run for each depth
        assert session.run(ends) == [5, 105, 205, 305, 405]


def test_an_initialiser_that_reads_variables_of_several_depths_waits_for_the_deepest(resource):
    with graph_and_session() as session:
        a = variable("a", np.float32(1), resource)
        b = chained("b", a, resource)
        c = chained("c", b, resource)
        total = v1.get_variable(
            "total",
            initializer=a.read_value() + b.read_value() * 10.0 + c.read_value() * 100.0,
            use_resource=resource,
        )
        cr.initialize_uninitialized(session)
        assert session.run(total) == 1 + 20 + 300


def test_an_initialiser_that_reads_a_restored_variable_sees_the_restored_value(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": np.float32(40)})
    with graph_and_session() as session:
        w = variable("w", np.float32(0), resource)
        follower = chained("follower", w, resource)
        last = chained("last", follower, resource)
        report = cr.restore_session(session, ckpt)
        assert session.run([w, follower, last]) == [40, 41, 42]
    assert names(report.initialized) == ["follower", "last"]


def test_a_restored_variable_cuts_a_chain_and_what_it_would_have_read_is_initialised(
    tmp_path, resource
):
    ckpt = write(tmp_path / "m", {"b": np.float32(40)})
    with graph_and_session() as session:
        a = variable("a", np.float32(0), resource)
        b = chained("b", a, resource)
        c = chained("c", b, resource)
        cr.restore_session(session, ckpt)
        assert session.run([a, b, c]) == [0, 40, 41]


def test_a_guarded_read_of_a_restored_variable_sees_the_restored_value(tmp_path):
    ckpt = write(tmp_path / "m", {"w": np.float32(40)})
    with graph_and_session() as session:
        w = v1.Variable(0.0, name="w", use_resource=False)
        mirror = v1.Variable(w.initialized_value() * 2.0, name="mirror", use_resource=False)
        cr.restore_session(session, ckpt)
        assert session.run(mirror) == 80


def test_initialisers_that_read_each_other_are_told_with_their_names(resource):
    with graph_and_session() as session:
        start = tf.identity(tf.constant(0.0))
        c = v1.get_variable("c", initializer=start, use_resource=resource)
        chained("d", c, resource)
        e = chained("e", c, resource)
        start.op._update_input(0, e.read_value())
        with pytest.raises(cr.InitializationError, match=r"circle.*'c'.*'e'|circle.*'e'.*'c'"):
            cr.initialize_uninitialized(session)
        assert set(cr.uninitialized_variables(session)) == {"c", "d", "e"}


def test_an_initialiser_that_needs_what_is_not_chosen_says_so(resource):
    with graph_and_session() as session:
        a = variable("a", np.float32(1), resource)
        b = chained("b", a, resource)
        with pytest.raises(cr.InitializationError, match=r"'b'.*variable a|'b'.*value a"):
            cr.initialize_uninitialized(session, [b])
        assert "a" in cr.uninitialized_variables(session)
        assert cr.initialize_uninitialized(session, [a]) == ("a",)
        cr.initialize_uninitialized(session, [b])
        assert session.run(b) == 2


def test_an_initialiser_that_would_run_another_variable_s_initialiser_never_undoes_a_restore(
    tmp_path, resource
):
    ckpt = write(tmp_path / "m", {"w": np.float32(40)})
    with graph_and_session() as session:
        w = variable("w", np.float32(0), resource)

        def after_w():
            with tf.control_dependencies([w.initializer]):
                return tf.identity(w.read_value()) + 1.0

        v1.get_variable("b", initializer=after_w, use_resource=resource)
        with pytest.raises(cr.InitializationError, match=r"'b'.*'w'"):
            cr.restore_session(session, ckpt)
        assert cr.uninitialized_variables(session) == ("w", "b")


def test_an_initialiser_that_needs_a_feed_is_told_before_anything_changes(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": np.float32(40)})
    with graph_and_session() as session:
        variable("w", np.float32(0), resource)
        fed = v1.placeholder(tf.float32, [], name="fed")
        v1.get_variable("b", initializer=lambda: fed * 2.0, use_resource=resource)
        with pytest.raises(cr.InitializationError, match=r"'b' needs the placeholder 'fed'"):
            cr.restore_session(session, ckpt)
        assert cr.uninitialized_variables(session) == ("w", "b")


def test_an_initialiser_that_fails_is_told_by_the_variable_s_name(resource):
    with graph_and_session() as session:
        bad = lambda: tf.debugging.check_numerics(tf.math.log(-1.0) + tf.zeros(()), "no number")  # noqa: E731
        v1.get_variable("b", initializer=bad, use_resource=resource)
        with pytest.raises(cr.InitializationError, match=r"initialising 'b' failed: .*no number"):
            cr.initialize_uninitialized(session)


@pytest.mark.parametrize("session", [None, object(), "session"])
def test_what_is_no_session_is_told(tmp_path, session):
    with pytest.raises(cr.TargetError, match="Session is expected"):
        cr.restore_session(session, write(tmp_path / "m", {"w": np.float32(40)}))


def test_a_bare_variable_in_place_of_a_list_is_told(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": np.float32(40)})
    with graph_and_session() as session:
        w = variable("w", np.float32(0), resource)
        with pytest.raises(cr.TargetError, match=r"variables=\[...\]"):
            cr.restore_session(session, ckpt, variables=w)


def test_an_initialiser_that_sets_a_restored_variable_unseen_is_found_out(tmp_path):
    ckpt = write(tmp_path / "m", {"w": np.float32(40)})
    with graph_and_session() as session:
        w = variable("w", np.float32(0), resource=True)
        inside = tf.cond(tf.constant(value=True), lambda: w.assign(7.0) * 1.0, lambda: 0.0)
        v1.get_variable("b", initializer=inside, use_resource=True)
        with pytest.raises(cr.PreservationError, match="'w'"):
            cr.restore_session(session, ckpt)


def test_initialising_again_touches_nothing(resource):
    with graph_and_session() as session:
        w = variable("w", np.float32(1), resource)
        assert cr.initialize_uninitialized(session) == ("w",)
        session.run(v1.assign(w, 5.0))
        assert cr.initialize_uninitialized(session) == ()
        assert session.run(w) == 5


def test_a_graph_without_variables_has_none_uninitialised():
    with graph_and_session() as session:
        counting = CountingSession(session)
        assert cr.uninitialized_variables(counting) == ()
        assert cr.initialize_uninitialized(counting) == ()
        assert counting.runs == []


def test_two_sessions_of_one_graph_are_told_apart(resource):
    with graph_and_session() as first:
        w = variable("w", np.float32(1), resource)
        with v1.Session(graph=first.graph) as second:
            first.run(w.initializer)
            assert cr.uninitialized_variables(first) == ()
            assert cr.uninitialized_variables(second) == ("w",)


# -- a restore that fails changes nothing ---------------------------------------------------------


def failing(session, resource):
    """Make a graph in which one variable is set, and return all of them."""
    a = variable("a", np.zeros(2, np.float32), resource)
    b = variable("b", np.zeros(2, np.float32), resource)
    c = variable("c", np.zeros((2, 2), np.float32), resource)
    session.run(b.initializer)
    session.run(v1.assign(b, np.array([8, 9], np.float32)))
    return a, b, c


def unchanged(session, b):
    assert set(cr.uninitialized_variables(session)) == {"a", "c"}
    np.testing.assert_array_equal(session.run(b), [8, 9])


def test_a_shape_that_does_not_fit_leaves_every_variable_as_it_was(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(3), "c": numbers(4)})
    with graph_and_session() as session:
        _, b, _ = failing(session, resource)
        with pytest.raises(cr.PlanError) as caught:
            cr.restore_session(session, ckpt)
        unchanged(session, b)
    assert len(caught.value.faults) == 2
    assert "'b'" in caught.value.faults[0]
    assert "'c'" in caught.value.faults[1]


def test_a_tensor_that_strict_misses_leaves_every_variable_as_it_was(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(2), "old": numbers(1)})
    with graph_and_session() as session:
        _, b, _ = failing(session, resource)
        with pytest.raises(cr.PlanError) as caught:
            cr.restore_session(session, ckpt, strict=True)
        unchanged(session, b)
    assert "'old'" in str(caught.value)
    assert "variable 'c'" in str(caught.value)


@pytest.mark.parametrize("damaged", ["a", "b", "c"])
def test_a_damaged_tensor_leaves_every_variable_as_it_was(tmp_path, resource, damaged):
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(2), "c": numbers(2, 2)})
    damage(ckpt, damaged)
    with graph_and_session() as session:
        _, b, _ = failing(session, resource)
        with pytest.raises(cr.DamagedCheckpointError, match=f"'{damaged}'"):
            cr.restore_session(session, ckpt)
        unchanged(session, b)


def test_a_damaged_tensor_that_is_not_chosen_does_no_harm(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(2)})
    damage(ckpt, "b")
    with graph_and_session() as session:
        a = variable("a", np.zeros(2, np.float32), resource)
        cr.restore_session(session, ckpt, cr.Rules(exclude="b"))
        np.testing.assert_array_equal(session.run(a), numbers(2))


def test_a_restore_that_would_set_nothing_is_an_error_unless_asked_for(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"net/w": numbers(2)})
    with graph_and_session() as session:
        variable("w", np.zeros(2, np.float32), resource)
        with pytest.raises(cr.PlanError, match="'net/w'"):
            cr.restore_session(session, ckpt)
        assert cr.uninitialized_variables(session) == ("w",)
        report = cr.restore_session(session, ckpt, allow_empty=True)
        assert names(report.initialized) == ["w"]


def test_what_does_not_fit_is_left_out_and_initialised_if_asked_for(tmp_path, resource):
    ckpt = write(tmp_path / "m", {"w": numbers(2), "head": numbers(10)})
    with graph_and_session() as session:
        variable("w", np.zeros(2, np.float32), resource)
        head = variable("head", np.zeros(3, np.float32), resource)
        report = cr.restore_session(session, ckpt, skip_mismatched=True)
        np.testing.assert_array_equal(session.run(head), np.zeros(3))
        assert [(e.name, e.outcome) for e in report.mismatched] == [("head", "initialized")]
        accounted_once(report, ["w", "head"], ["w", "head"])
        again = cr.restore_session(session, ckpt, skip_mismatched=True)
        assert [(e.name, e.outcome) for e in again.mismatched] == [("head", "kept")]
