"""The TF2 target: variables of modules, of tf_keras and Keras 3 models, of mappings and lists."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from checkpoints import accounted_once, damage, digest_of, graph_and_session, numbers, write

import compat_restore as cr


@pytest.fixture(params=[tf_keras, keras], ids=["tf_keras", "keras3"])
def world(request):
    """One of the two Kerases."""
    return request.param


def names(entries) -> list[str]:
    return sorted(entry.name for entry in entries)


def values_of(target) -> dict[str, np.ndarray]:
    return {name: np.copy(value) for name, value in read(target)}


def read(target):
    chosen = cr.ObjectTarget(target)
    return chosen.read(chosen.specs())


def fill(model, start: float = 100.0) -> None:
    """Give every float variable of a model values that no other has."""
    for number, variable in enumerate(model.variables):
        if "float" in str(variable.dtype):
            variable.assign(numbers(*variable.shape, start=start * (number + 1)))


# -- tf.Module ------------------------------------------------------------------------------------


class Dense(tf.Module):
    def __init__(self, rows, columns, name=None):
        super().__init__(name=name)
        self.w = tf.Variable(tf.zeros((rows, columns)), name="kernel")
        self.b = tf.Variable(tf.zeros(columns), name="bias")


class Network(tf.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Dense(3, 2)
        self.layers = [Dense(2, 2), Dense(2, 2)]
        self.heads = {"left": Dense(2, 1), "right": Dense(2, 1)}
        self.step = tf.Variable(0, dtype=tf.int64, name="global_step")


def test_a_module_s_variables_go_by_their_attribute_paths(tmp_path):
    ckpt = write(
        tmp_path / "m",
        {
            "encoder/w": numbers(3, 2),
            "layers/1/b": numbers(2),
            "heads/left/w": numbers(2, 1),
            "other": numbers(1),
        },
    )
    module = Network()
    report = cr.restore_objects(module, ckpt)
    np.testing.assert_array_equal(module.encoder.w, numbers(3, 2))
    np.testing.assert_array_equal(module.layers[1].b, numbers(2))
    np.testing.assert_array_equal(module.heads["left"].w, numbers(2, 1))
    np.testing.assert_array_equal(module.layers[0].b, np.zeros(2))
    assert names(report.restored) == ["encoder/w", "heads/left/w", "layers/1/b"]
    assert report.restored[0].digest == digest_of(numbers(3, 2))
    accounted_once(
        report,
        ["encoder/w", "layers/1/b", "heads/left/w", "other"],
        [
            f"{place}/{leaf}"
            for place in ("encoder", "layers/0", "layers/1", "heads/left", "heads/right")
            for leaf in "wb"
        ]
        + ["step"],
    )


def test_a_module_s_variables_go_by_dotted_paths_too(tmp_path):
    ckpt = write(tmp_path / "m", {"encoder.w": numbers(3, 2), "layers.0.b": numbers(2)})
    module = Network()
    report = cr.restore_objects(module, ckpt)
    np.testing.assert_array_equal(module.encoder.w, numbers(3, 2))
    np.testing.assert_array_equal(module.layers[0].b, numbers(2))
    assert names(report.restored) == ["encoder/w", "layers/0/b"]


def test_a_module_s_variable_goes_by_its_own_name_where_no_other_has_it(tmp_path):
    ckpt = write(tmp_path / "m", {"global_step": np.int64(7)})
    module = Network()
    report = cr.restore_objects(module, ckpt)
    assert module.step.numpy() == 7
    assert names(report.restored) == ["step"]


def test_a_name_that_several_variables_go_by_is_a_fault(tmp_path):
    ckpt = write(tmp_path / "m", {"kernel": numbers(3, 2), "encoder/b": numbers(2)})
    module = Network()
    with pytest.raises(cr.PlanError, match="5 variables go by the name 'kernel'"):
        cr.restore_objects(module, ckpt)
    np.testing.assert_array_equal(module.encoder.b, np.zeros(2))
    rules = cr.Rules(rename=[("kernel", "encoder/w")])
    cr.restore_objects(module, ckpt, rules)
    np.testing.assert_array_equal(module.encoder.w, numbers(3, 2))


def test_a_variable_under_two_attributes_is_one_variable(tmp_path):
    module = tf.Module()
    module.embedding = tf.Variable(tf.zeros(3), name="table")
    module.softmax = module.embedding
    ckpt = write(tmp_path / "m", {"embedding": numbers(3)})
    report = cr.restore_objects(module, ckpt)
    accounted_once(report, ["embedding"], ["embedding"])
    np.testing.assert_array_equal(module.softmax, numbers(3))


def test_variables_in_a_tuple_or_behind_a_private_attribute_are_found(tmp_path):
    module = tf.Module()
    module._hidden = tf.Variable(tf.zeros(2), name="hidden")
    module.pair = (tf.Variable(tf.zeros(2), name="first"), tf.Variable(tf.zeros(2), name="second"))
    ckpt = write(
        tmp_path / "m", {n: numbers(2, start=i) for i, n in enumerate(["first", "hidden"])}
    )
    report = cr.restore_objects(module, ckpt)
    np.testing.assert_array_equal(module.pair[0], numbers(2, start=0))
    np.testing.assert_array_equal(module._hidden, numbers(2, start=1))
    assert len(report.restored) == 2
    assert len(report.initialized) == 1


# -- mappings and sequences -----------------------------------------------------------------------


def test_a_mapping_s_keys_are_the_names_whatever_the_variables_are_called(tmp_path):
    ckpt = write(tmp_path / "m", {"bert/w": numbers(2), "bert/b": numbers(1)})
    w = tf.Variable(tf.zeros(2), name="quite_another")
    given = {"bert/w": w, "head": tf.Variable(tf.ones(1))}
    report = cr.restore_objects(given, ckpt)
    np.testing.assert_array_equal(w, numbers(2))
    assert list(given) == ["bert/w", "head"]
    accounted_once(report, ["bert/w", "bert/b"], given)


def test_a_list_s_variables_go_by_their_own_names(tmp_path):
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(2, start=5)})
    made = [tf.Variable(tf.zeros(2), name="a"), tf.Variable(tf.zeros(2), name="b")]
    report = cr.restore_objects(made, ckpt)
    np.testing.assert_array_equal(made[1], numbers(2, start=5))
    assert names(report.restored) == ["a", "b"]


def test_variables_of_one_name_in_a_list_are_told_apart_and_never_guessed(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(2)})
    made = [tf.Variable(tf.zeros(2), name="w"), tf.Variable(tf.zeros(2), name="w")]
    with pytest.raises(cr.PlanError, match="'w#0' and 'w#1'"):
        cr.restore_objects(made, ckpt)
    cr.restore_objects(made, ckpt, cr.Rules(rename=[("w", "w#1")]))
    np.testing.assert_array_equal(made[0], np.zeros(2))
    np.testing.assert_array_equal(made[1], numbers(2))


@pytest.mark.parametrize("value", [b"text", [b"a", b"", b"\xff"]])
def test_string_variables_are_restored(tmp_path, value):
    stored = np.asarray(value, dtype=object)
    ckpt = write(tmp_path / "m", {"s": stored})
    made = {"s": tf.Variable(tf.fill(stored.shape, b"?"))}
    report = cr.restore_objects(made, ckpt)
    assert made["s"].numpy() == value if stored.shape == () else True
    assert np.asarray(made["s"].numpy(), object).tolist() == stored.tolist()
    assert report.restored[0].digest == digest_of(stored)


def test_bfloat16_and_bool_variables_are_restored_with_their_bytes(tmp_path):
    half = tf.constant([1.5, -2.0, 0.0], tf.bfloat16).numpy()
    ckpt = write(tmp_path / "m", {"h": half, "flag": np.array(1, bool)})
    made = {"h": tf.Variable(tf.zeros(3, tf.bfloat16)), "flag": tf.Variable(initial_value=False)}
    cr.restore_objects(made, ckpt)
    assert made["h"].numpy().tobytes() == half.tobytes()
    assert bool(made["flag"].numpy())


def test_a_variable_whose_shape_is_open_takes_the_checkpoint_s(tmp_path):
    ckpt = write(tmp_path / "m", {"v": numbers(4, 2)})
    made = {"v": tf.Variable(tf.zeros((1, 2)), shape=tf.TensorShape([None, 2]))}
    cr.restore_objects(made, ckpt)
    np.testing.assert_array_equal(made["v"], numbers(4, 2))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"a": 3}, "mapping of names to variables"),
        ([1, 2], "sequence of variables"),
        ({}, "has no variables"),
        (tf.Module(), "has no variables"),
        (object(), "has no variables that could be restored"),
    ],
    ids=["a mapping to numbers", "numbers", "nothing", "an empty module", "an object"],
)
def test_what_is_no_target_is_told_so(tmp_path, target, message):
    ckpt = write(tmp_path / "m", {"a": numbers(1)})
    with pytest.raises(cr.TargetError, match=message):
        cr.restore_objects(target, ckpt)


def test_a_single_variable_is_told_to_come_in_a_mapping(tmp_path):
    ckpt = write(tmp_path / "m", {"a": numbers(1)})
    with pytest.raises(cr.TargetError, match="a single variable"):
        cr.restore_objects(tf.Variable(1.0), ckpt)


def test_a_graph_s_variables_are_sent_to_restore_session(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(1)})
    with graph_and_session():
        w = tf.compat.v1.get_variable("w", shape=(1,), use_resource=True)
        with pytest.raises(cr.TargetError, match="restore_session"):
            cr.restore_objects({"w": w}, ckpt)


# -- Keras models ---------------------------------------------------------------------------------


def sequential(world, *, head=2):
    return world.Sequential(
        [
            world.Input((4,)),
            world.layers.Dense(3, name="fc"),
            world.layers.BatchNormalization(name="bn"),
            world.layers.Dropout(0.5),
            world.layers.Dense(head, name="head"),
        ],
        name="net",
    )


def functional(world):
    given = world.Input((4,))
    hidden = world.layers.Dense(3, name="fc")(given)
    hidden = world.layers.BatchNormalization(name="bn")(hidden)
    return world.Model(given, world.layers.Dense(2, name="head")(hidden), name="net")


def subclassed(world):
    class Net(world.Model):
        def __init__(self):
            super().__init__(name="net")
            self.fc = world.layers.Dense(3, name="fc")
            self.bn = world.layers.BatchNormalization(name="bn")
            self.head = world.layers.Dense(2, name="head")

        def call(self, given):
            return self.head(self.bn(self.fc(given)))

    model = Net()
    model(np.zeros((1, 4), np.float32))
    return model


WEIGHTS = {
    "fc/kernel": numbers(4, 3),
    "fc/bias": numbers(3, start=20),
    "bn/gamma": numbers(3, start=30),
    "bn/beta": numbers(3, start=40),
    "bn/moving_mean": numbers(3, start=50),
    "bn/moving_variance": numbers(3, start=60),
}


@pytest.mark.parametrize("build", [sequential, functional, subclassed])
def test_a_keras_model_is_restored_by_the_names_of_its_layers(tmp_path, world, build):
    ckpt = write(tmp_path / "m", {**WEIGHTS, "global_step": np.int64(3)})
    model = build(world)
    fresh = values_of(model)
    report = cr.restore_objects(model, ckpt)
    assert {entry.source for entry in report.restored} == set(WEIGHTS)
    now = values_of(model)
    for entry in report.restored:
        np.testing.assert_array_equal(now[entry.name], WEIGHTS[entry.source])
        assert entry.digest == digest_of(WEIGHTS[entry.source])
    for entry in report.initialized:
        np.testing.assert_array_equal(now[entry.name], fresh[entry.name])
    np.testing.assert_array_equal(model.get_layer("bn").moving_variance, numbers(3, start=60))
    accounted_once(report, [*WEIGHTS, "global_step"], cr.ObjectTarget(model).specs())


def test_a_keras_3_seed_generator_is_a_variable_that_the_checkpoint_does_not_set(tmp_path):
    ckpt = write(tmp_path / "m", WEIGHTS)
    report = cr.restore_objects(sequential(keras), ckpt)
    assert any("seed_generator_state" in entry.name for entry in report.initialized)


def test_a_model_within_a_model_is_reached_by_the_names_of_its_layers(tmp_path, world):
    ckpt = write(tmp_path / "m", {"fc/kernel": numbers(4, 3), "top/kernel": numbers(2, 5)})
    given = world.Input((4,))
    model = world.Model(given, world.layers.Dense(5, name="top")(functional(world)(given)))
    report = cr.restore_objects(model, ckpt)
    assert {e.source for e in report.restored} == {"fc/kernel", "top/kernel"}
    np.testing.assert_array_equal(model.get_layer("top").kernel, numbers(2, 5))
    inner = model.get_layer("net").get_layer("fc")
    np.testing.assert_array_equal(inner.kernel, numbers(4, 3))


def test_layers_of_one_name_in_two_inner_models_are_told_apart_and_never_guessed(tmp_path, world):
    def inner(name):
        return world.Sequential(
            [world.Input((2,)), world.layers.Dense(2, name="fc", use_bias=False)], name=name
        )

    given = world.Input((2,))
    model = world.Model(given, inner("right")(inner("left")(given)))
    ckpt = write(tmp_path / "m", {"fc/kernel": numbers(2, 2)})
    with pytest.raises(cr.PlanError, match="'fc/kernel'"):
        cr.restore_objects(model, ckpt)
    told = [name for name in cr.ObjectTarget(model).specs() if "kernel" in name]
    assert len(set(told)) == 2
    cr.restore_objects(model, ckpt, cr.Rules(rename=[("fc/kernel", told[1])]))
    left, right = model.get_layer("left").layers[-1], model.get_layer("right").layers[-1]
    kernels = [np.asarray(left.kernel), np.asarray(right.kernel)]
    assert sum(np.array_equal(kernel, numbers(2, 2)) for kernel in kernels) == 1


def test_a_layer_is_a_target_too(tmp_path, world):
    layer = world.layers.Dense(3, name="fc")
    layer.build((None, 4))
    ckpt = write(tmp_path / "m", {"kernel": numbers(4, 3)})
    rules = cr.Rules(
        rename=[("kernel", next(n for n in cr.ObjectTarget(layer).specs() if "kernel" in n))]
    )
    cr.restore_objects(layer, ckpt, rules)
    np.testing.assert_array_equal(layer.kernel, numbers(4, 3))


def test_a_model_that_is_not_built_is_told_so(tmp_path, world):
    ckpt = write(tmp_path / "m", WEIGHTS)
    model = world.Sequential([world.layers.Dense(3, name="fc")], name="net")
    with pytest.raises(cr.TargetError, match="not built"):
        cr.restore_objects(model, ckpt)
    model.build((None, 4))
    assert len(cr.restore_objects(model, ckpt).restored) == 2


def test_a_layer_that_is_not_built_is_named_in_the_report(tmp_path, world):
    class Net(world.Model):
        def __init__(self):
            super().__init__(name="net")
            self.fc = world.layers.Dense(3, name="fc")
            self.later = world.layers.Dense(3, name="later")

        def call(self, given):
            return self.fc(given)

    model = Net()
    model(np.zeros((1, 4), np.float32))
    report = cr.restore_objects(model, write(tmp_path / "m", WEIGHTS))
    assert any("'later'" in note for note in report.notes)


def test_a_head_of_another_size_is_a_fault_and_changes_nothing(tmp_path, world):
    ckpt = write(tmp_path / "m", {**WEIGHTS, "head/kernel": numbers(3, 10)})
    model = sequential(world)
    before = values_of(model)
    with pytest.raises(cr.PlanError, match=r"float32\[3,10\].*float32\[3,2\].*new head\?"):
        cr.restore_objects(model, ckpt)
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name])
    report = cr.restore_objects(model, ckpt, skip_mismatched=True)
    assert [e.source for e in report.mismatched] == ["head/kernel"]
    assert len(report.restored) == len(WEIGHTS)
    accounted_once(report, [*WEIGHTS, "head/kernel"], before)


@pytest.mark.parametrize("damaged", ["bn/beta", "fc/kernel", "fc/bias"])
def test_a_damaged_tensor_changes_nothing(tmp_path, world, damaged):
    ckpt = write(tmp_path / "m", WEIGHTS)
    damage(ckpt, damaged)
    model = sequential(world)
    before = values_of(model)
    with pytest.raises(cr.DamagedCheckpointError, match=damaged):
        cr.restore_objects(model, ckpt)
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name])


# -- object-based checkpoints ---------------------------------------------------------------------


@pytest.fixture
def restores(monkeypatch) -> list[str]:
    """The paths that `tf.train.Checkpoint.restore` is called with."""
    seen = []
    original = tf.train.Checkpoint.restore

    def restore(self, path, options=None):
        seen.append(str(path))
        return original(self, path, options)

    monkeypatch.setattr(tf.train.Checkpoint, "restore", restore)
    return seen


def saved(model, folder, **objects) -> str:
    return tf.train.Checkpoint(**(objects or {"model": model})).save(str(folder / "ckpt"))


@pytest.mark.parametrize("build", [sequential, functional, subclassed])
def test_the_same_structure_goes_through_tensorflow_s_own_restore(tmp_path, world, build, restores):
    source = build(world)
    fill(source)
    ckpt = saved(source, tmp_path)
    model = build(world)
    report = cr.restore_objects(model, ckpt)
    assert restores == [ckpt]
    assert any("tf.train.Checkpoint" in note for note in report.notes)
    wanted, found = values_of(source), values_of(model)
    # TensorFlow's checkpoints leave out the seeds of Keras 3's random layers.
    seeds = {name for name in found if "seed_generator" in name}
    assert set(names(report.restored)) == set(found) - seeds
    for entry in report.restored:
        np.testing.assert_array_equal(found[entry.name], wanted[entry.name])
    with cr.open_checkpoint(ckpt) as reader:
        accounted_once(report, reader.variables(), found)


def test_the_same_module_goes_through_tensorflow_s_own_restore(tmp_path, restores):
    source = Network()
    fill(source)
    ckpt = saved(source, tmp_path)
    module = Network()
    report = cr.restore_objects(module, ckpt)
    assert restores == [ckpt]
    assert len(report.restored) == len(source.variables)
    for ours, theirs in zip(module.variables, source.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_that_is_the_checkpoint_s_root_is_found(tmp_path, restores):
    source = Network()
    fill(source)
    ckpt = tf.train.Checkpoint(source).save(str(tmp_path / "ckpt"))
    module = Network()
    report = cr.restore_objects(module, ckpt)
    assert restores == [ckpt]
    assert len(report.restored) == len(source.variables)
    assert {e.name for e in report.unused} >= {"save_counter"}


def test_a_model_is_found_beside_the_optimizer_that_was_saved_with_it(tmp_path, restores):
    source = sequential(tf_keras)
    optimizer = tf_keras.optimizers.Adam()
    optimizer.build(source.trainable_variables)
    fill(source)
    ckpt = saved(source, tmp_path, optimizer=optimizer, net=source)
    model = sequential(tf_keras)
    report = cr.restore_objects(model, ckpt)
    assert restores == [ckpt]
    np.testing.assert_array_equal(model.get_layer("fc").kernel, source.get_layer("fc").kernel)
    assert len(report.unused) >= len(source.trainable_variables) * 2
    with cr.open_checkpoint(ckpt) as reader:
        accounted_once(report, reader.variables(), cr.ObjectTarget(model).specs())


def test_a_compiled_model_s_optimizer_keeps_its_state_since_no_report_names_it(tmp_path, world):
    def make():
        model = sequential(world)
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    source = make()
    fill(source)
    source.optimizer.iterations.assign(9)
    ckpt = saved(source, tmp_path)
    model = make()
    report = cr.restore_objects(model, ckpt)
    np.testing.assert_array_equal(model.get_layer("fc").kernel, source.get_layer("fc").kernel)
    assert int(model.optimizer.iterations) == 0
    assert any("iteration" in entry.name for entry in report.unused)
    with cr.open_checkpoint(ckpt) as reader:
        accounted_once(report, reader.variables(), cr.ObjectTarget(model).specs())


def test_what_only_partly_stands_in_the_same_place_is_matched_by_names(tmp_path, restores):
    source = tf.Module()
    source.a = tf.Variable(numbers(2), name="x")
    source.b = tf.Variable(numbers(2, start=9), name="y")
    ckpt = tf.train.Checkpoint(source).write(str(tmp_path / "ckpt"))
    module = tf.Module()
    module.a = tf.Variable(tf.zeros(2), name="x")
    module.moved = tf.Variable(tf.zeros(2), name="y")
    report = cr.restore_objects(module, ckpt)
    assert restores == []
    assert names(report.restored) == ["a", "moved"]
    np.testing.assert_array_equal(module.moved, numbers(2, start=9))


def test_a_damaged_object_based_checkpoint_changes_nothing(tmp_path, world):
    source = sequential(world)
    fill(source)
    ckpt = saved(source, tmp_path)
    with cr.open_checkpoint(ckpt) as reader:
        key = next(key for key in reader.specs() if "gamma" in key)
    damage(ckpt, key)
    model = sequential(world)
    before = values_of(model)
    with pytest.raises(cr.DamagedCheckpointError, match="gamma"):
        cr.restore_objects(model, ckpt)
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_an_object_based_checkpoint_of_other_shapes_is_a_fault_and_changes_nothing(tmp_path, world):
    source = sequential(world, head=5)
    fill(source)
    ckpt = saved(source, tmp_path)
    model = sequential(world)
    before = values_of(model)
    with pytest.raises(cr.PlanError) as caught:
        cr.restore_objects(model, ckpt)
    assert len(caught.value.faults) == 2
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name])
    report = cr.restore_objects(model, ckpt, skip_mismatched=True)
    assert len(report.mismatched) == 2
    np.testing.assert_array_equal(model.get_layer("fc").kernel, source.get_layer("fc").kernel)
    np.testing.assert_array_equal(model.get_layer("head").bias, before[report.mismatched[0].name])


@pytest.mark.parametrize(("old", "new"), [(tf_keras, keras), (keras, tf_keras)])
def test_a_checkpoint_goes_between_the_two_kerases_by_full_names(tmp_path, old, new, restores):
    source = sequential(old)
    fill(source)
    ckpt = saved(source, tmp_path)
    model = sequential(new)
    rules = cr.Rules(
        exclude=[r".*(save_counter|seed_generator_state)"],
        rename=[(r"(?:net/)?(fc|bn|head)/(.*)", r"\1/\2")],
        allow_unmatched=True,
    )
    report = cr.restore_objects(model, ckpt, rules)
    assert restores == []
    assert len(report.restored) == 8
    for layer in ("fc", "bn", "head"):
        for ours, theirs in zip(
            model.get_layer(layer).weights, source.get_layer(layer).weights, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_a_tf_keras_checkpoint_needs_no_rules_for_the_same_layers_of_keras_3(tmp_path):
    source = sequential(tf_keras)
    fill(source)
    ckpt = saved(source, tmp_path)
    model = sequential(keras)
    report = cr.restore_objects(model, ckpt)
    assert len(report.restored) == 8
    np.testing.assert_array_equal(model.get_layer("head").bias, source.get_layer("head").bias)
    with cr.open_checkpoint(ckpt) as reader:
        accounted_once(report, reader.variables(), cr.ObjectTarget(model).specs())


def two_layers(world, first, second):
    return world.Sequential(
        [
            world.Input((3,)),
            world.layers.Dense(3, name=first, use_bias=False),
            world.layers.Dense(3, name=second, use_bias=False),
        ],
        name="net",
    )


def test_layers_that_swapped_their_names_are_told_and_either_reading_can_be_asked_for(
    tmp_path, world
):
    source = two_layers(world, "query", "key")
    fill(source)
    ckpt = saved(source, tmp_path)
    model = two_layers(world, "key", "query")
    before = values_of(model)
    with pytest.raises(cr.PlanError, match="contradict"):
        cr.restore_objects(model, ckpt)
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name])
    cr.restore_objects(model, ckpt, match_by="name")
    np.testing.assert_array_equal(model.get_layer("key").kernel, source.get_layer("key").kernel)
    cr.restore_objects(model, ckpt, match_by="object_path")
    np.testing.assert_array_equal(model.get_layer("key").kernel, source.get_layer("query").kernel)


def test_matching_by_objects_goes_with_rules_for_some_of_them(tmp_path, world):
    source = two_layers(world, "first", "second")
    fill(source)
    ckpt = saved(source, tmp_path)
    model = two_layers(world, "one", "two")
    before = values_of(model)
    rules = cr.Rules(exclude=[".*second/kernel"])
    report = cr.restore_objects(model, ckpt, rules, match_by="object_path")
    np.testing.assert_array_equal(model.get_layer("one").kernel, source.get_layer("first").kernel)
    assert len(report.restored) == 1
    assert report.restored[0].item.rule == "same place"
    two = next(name for name in before if "two" in name)
    np.testing.assert_array_equal(model.get_layer("two").kernel, before[two])


def test_matching_by_objects_what_has_no_objects_is_told(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(1)})
    with pytest.raises(cr.TargetError, match="object_path"):
        cr.restore_objects(sequential(tf_keras), ckpt, match_by="object_path")


def test_an_unknown_way_to_match_is_told(tmp_path):
    ckpt = write(tmp_path / "m", {"w": numbers(1)})
    with pytest.raises(ValueError, match="object_path"):
        cr.restore_objects({"w": tf.Variable([0.0])}, ckpt, match_by="order")


def test_an_object_based_checkpoint_fills_a_mapping_by_full_names_or_keys(tmp_path):
    source = sequential(tf_keras)
    fill(source)
    ckpt = saved(source, tmp_path)
    made = {"fc/kernel": tf.Variable(tf.zeros((4, 3)))}
    report = cr.restore_objects(made, ckpt)
    np.testing.assert_array_equal(made["fc/kernel"], source.get_layer("fc").kernel)
    assert len(report.restored) == 1


# What names and places say of Keras 3 models, whose names Keras numbers


def dense_model(world, *names, **named):
    return world.Sequential(
        [world.Input((4,)), *(world.layers.Dense(4, name=name) for name in names)], **named
    )


@pytest.mark.parametrize("named", [{}, {"name": "other"}], ids=["numbered", "named"])
def test_swapped_layers_are_told_whatever_the_models_are_called(tmp_path, world, named):
    source = dense_model(world, "query", "key", name="net")
    fill(source)
    ckpt = tf.train.Checkpoint(model=source).write(str(tmp_path / "ckpt"))
    swapped = dense_model(world, "key", "query", **named)
    with pytest.raises(cr.PlanError, match="contradict each other"):
        cr.restore_objects(swapped, ckpt)
    cr.restore_objects(swapped, ckpt, match_by="name")
    for layer in ("query", "key"):
        np.testing.assert_array_equal(
            swapped.get_layer(layer).kernel, source.get_layer(layer).kernel
        )


def test_a_model_without_the_first_layer_goes_by_names_and_not_by_places(tmp_path, world):
    source = dense_model(world, "a", "b", "c")
    fill(source)
    ckpt = tf.train.Checkpoint(model=source).write(str(tmp_path / "ckpt"))
    shorter = dense_model(world, "b", "c")
    report = cr.restore_objects(shorter, ckpt)
    assert len(report.restored) == 4
    for layer in ("b", "c"):
        np.testing.assert_array_equal(
            shorter.get_layer(layer).kernel, source.get_layer(layer).kernel
        )


def test_of_two_models_in_a_checkpoint_the_one_of_the_target_s_name_is_taken(tmp_path, world):
    online, target = (dense_model(world, "fc", name=name) for name in ("online", "target"))
    fill(online)
    fill(target)
    ckpt = tf.train.Checkpoint(q=online, tq=target).write(str(tmp_path / "ckpt"))
    if world is not tf_keras:  # whose names do not begin with the model's
        fresh = dense_model(world, "fc", name="target")
        cr.restore_objects(fresh, ckpt)
        np.testing.assert_array_equal(fresh.get_layer("fc").kernel, target.get_layer("fc").kernel)
    stranger = dense_model(world, "fc", name="stranger")
    with pytest.raises(cr.PlanError, match="'q' and 'tq'"):
        cr.restore_objects(stranger, ckpt)
    cr.restore_objects(stranger, ckpt, match_by="object_path", root="tq")
    np.testing.assert_array_equal(stranger.get_layer("fc").kernel, target.get_layer("fc").kernel)


def test_weights_never_go_into_the_slots_of_an_optimizer(tmp_path):
    model = dense_model(tf_keras, "fc")
    optimizer = tf_keras.optimizers.SGD(momentum=0.9)
    optimizer.build(model.trainable_variables)
    ckpt = write(tmp_path / "m", {"fc/kernel": numbers(4, 4), "fc/bias": numbers(4)})
    with pytest.raises(cr.PlanError, match="nothing would be restored"):
        cr.restore_objects(optimizer, ckpt)


def test_a_variable_under_two_names_is_refused_before_it_changes(tmp_path):
    variable = tf.Variable(np.zeros(2, np.float32))
    ckpt = write(tmp_path / "m", {"a": numbers(2), "b": numbers(2) + 1})
    with pytest.raises(cr.TargetError, match="are one variable"):
        cr.restore_objects({"a": variable, "b": variable}, ckpt)
    assert not variable.numpy().any()


def test_what_is_made_after_a_restore_by_structure_is_not_restored_behind_one_s_back(tmp_path):
    source = tf.Module()
    source.a, source.b = tf.Variable([1.0]), tf.Variable([7.0])
    ckpt = tf.train.Checkpoint(source).write(str(tmp_path / "ckpt"))
    target = tf.Module()
    target.a = tf.Variable([0.0])
    report = cr.restore_objects(target, ckpt, match_by="object_path")
    assert [entry.name for entry in report.restored] == ["a"]
    target.b = tf.Variable([0.0])
    assert target.b.numpy() == [0.0]


@pytest.mark.parametrize(
    ("target", "message"),
    [(tf_keras.Sequential, "is a class"), (tf.Variable(1.0), "a single variable")],
)
def test_what_is_no_target_is_told(tmp_path, target, message):
    ckpt = write(tmp_path / "m", {"a": numbers(2)})
    with pytest.raises(cr.TargetError, match=message):
        cr.restore_objects(target, ckpt)


@pytest.mark.parametrize("world", [tf_keras, keras], ids=["tf_keras", "keras3"])
def test_a_saved_model_restores_by_names(tmp_path, world):
    source = dense_model(world, "fc1", "fc2", name="net")
    fill(source)
    folder = str(tmp_path / "exported")
    if world is keras:
        source.export(folder, verbose=False)
    else:
        source.save(folder)
    with cr.open_checkpoint(folder) as reader:
        assert reader.notes
    fresh = dense_model(world, "fc1", "fc2", name="net")
    report = cr.restore_objects(fresh, folder, match_by="name")
    assert len(report.restored) == 4
    for layer in ("fc1", "fc2"):
        np.testing.assert_array_equal(fresh.get_layer(layer).kernel, source.get_layer(layer).kernel)


@pytest.mark.parametrize("world", [tf_keras, keras], ids=["tf_keras", "keras3"])
def test_what_an_optimizer_keeps_is_no_variable_of_the_model(tmp_path, world):
    model = dense_model(world, "fc", name="net")
    optimizer = world.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    ckpt = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "ckpt"))
    with cr.open_checkpoint(ckpt) as reader:
        kinds = [role.kind.value for role in reader.roles().values()]
    assert kinds.count("variable") == 2
    assert kinds.count("slot") == 4
    report = cr.restore_objects(
        dense_model(world, "fc", name="net"), ckpt, cr.Rules(drop_slots=True)
    )
    assert len(report.restored) == 2


def test_where_names_lead_nowhere_the_places_that_match_are_told(tmp_path):
    """Keras 3 gives the variables of subclassed models names that say nothing of their layers."""

    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.a = keras.layers.Dense(2)
            self.b = keras.layers.Dense(2)

        def call(self, x):
            return self.b(self.a(x))

    source = Pair()
    source(np.zeros((1, 2), np.float32))
    fill(source)
    ckpt = tf.train.Checkpoint(model=source).write(str(tmp_path / "ckpt"))
    half = Pair()
    half.a.build((None, 2))
    with pytest.raises(cr.PlanError, match="match_by='object_path' restores those"):
        cr.restore_objects(half, ckpt)
    cr.restore_objects(half, ckpt, match_by="object_path")
    np.testing.assert_array_equal(half.a.kernel, source.a.kernel)


def auto_named(world, count, head=0):
    """Return a functional model whose layers are numbered by Keras."""
    given = world.Input((4,))
    out = given
    for _ in range(count):
        out = world.layers.Dense(4)(out)
    if head:
        out = world.layers.Dense(head, name="head")(out)
    return world.Model(given, out)


def test_layers_that_keras_numbered_anew_are_matched_by_their_places(tmp_path, world):
    world.backend.clear_session()
    source = auto_named(world, 3)
    fill(source)
    ckpt = tf.train.Checkpoint(model=source).write(str(tmp_path / "ckpt"))
    world.backend.clear_session()
    world.layers.Dense(1)
    fresh = auto_named(world, 3)
    report = cr.restore_objects(fresh, ckpt)
    assert any("numbers alone" in note for note in report.notes)
    for old, new in zip(source.layers[1:], fresh.layers[1:], strict=True):
        np.testing.assert_array_equal(old.kernel, new.kernel)


def test_numbers_are_not_trusted_where_the_structures_differ(tmp_path, world):
    world.backend.clear_session()
    source = auto_named(world, 3, head=2)
    fill(source)
    ckpt = tf.train.Checkpoint(model=source).write(str(tmp_path / "ckpt"))
    world.backend.clear_session()
    world.layers.Dense(1)(world.Input((4,)))
    with pytest.raises(cr.PlanError, match="contradict each other"):
        cr.restore_objects(auto_named(world, 3), ckpt)


def test_an_object_of_two_names_is_one_place(tmp_path, world):
    source = dense_model(world, "fc", name="net")
    fill(source)
    ckpt = tf.train.Checkpoint(model=source, net=source).write(str(tmp_path / "ckpt"))
    fresh = dense_model(world, "fc", name="net")
    assert len(cr.restore_objects(fresh, ckpt).restored) == 2


def test_slots_of_an_older_optimizer_are_not_restored_unseen(tmp_path):
    def made():
        module = tf.Module()
        module.w = tf.Variable([1.0, 2.0], name="w")
        optimizer = tf_keras.optimizers.legacy.Adam()
        optimizer.apply_gradients([(tf.constant([0.5, 0.25]), module.w)])
        return module, optimizer

    module, optimizer = made()
    ckpt = tf.train.Checkpoint(net=module, opt=optimizer).write(str(tmp_path / "ckpt"))
    module, optimizer = made()
    optimizer.apply_gradients([(tf.constant([0.5, 0.25]), module.w)])
    before = optimizer.get_slot(module.w, "m").numpy()
    cr.restore_objects(tf.train.Checkpoint(net=module, opt=optimizer), ckpt)
    np.testing.assert_array_equal(optimizer.get_slot(module.w, "m").numpy(), before)


def test_two_equal_variables_of_one_name_are_two_variables(tmp_path):
    module = tf.Module()
    module.b1, module.b2 = tf.Variable(tf.zeros(3)), tf.Variable(tf.zeros(3))
    ckpt = tf.train.Checkpoint(module).write(str(tmp_path / "ckpt"))
    rules = cr.Rules(rename=[(r"(\w+)/\.ATTRIBUTES/VARIABLE_VALUE", r"net/\1")])
    report = cr.convert(ckpt, tmp_path / "out", rules)
    assert {entry.name for entry in report.restored} >= {"net/b1", "net/b2"}


def test_a_module_with_a_child_called_iter_is_no_optimizer(tmp_path):
    module = tf.Module()
    module.iter, module.w = tf.Variable(1), tf.Variable([1.0, 2.0])
    ckpt = tf.train.Checkpoint(module).write(str(tmp_path / "ckpt"))
    with cr.open_checkpoint(ckpt) as reader:
        role = reader.roles()["w/.ATTRIBUTES/VARIABLE_VALUE" if "w" not in reader.roles() else "w"]
    assert role.kind.value == "variable"


def test_names_that_differ_in_a_number_alone_on_both_sides_are_noted(tmp_path):
    ckpt = write(
        tmp_path / "m", {"dense/kernel": numbers(2, 2), "dense_1/kernel": numbers(2, 2) + 1}
    )
    made = {name: tf.Variable(np.zeros((2, 2), np.float32)) for name in ("dense_1/kernel",)}
    assert not cr.restore_objects(dict(made), ckpt).notes
    made["dense_2/kernel"] = tf.Variable(np.zeros((2, 2), np.float32))
    (note,) = cr.restore_objects(made, ckpt).notes
    assert "'dense/kernel'" in note
    assert "'dense_2/kernel'" in note
