"""TF1 and TF2 preserve identical weights: the proof, on real checkpoints and on small ones."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from checkpoints import digests_of, graph_and_session, numbers, write, write_from_graph

import compat_restore as cr

if TYPE_CHECKING:
    from pathlib import Path

v1 = tf.compat.v1


def sha1(value: np.ndarray) -> str:
    """Return the SHA-1 of an array's little-endian bytes in C order."""
    return hashlib.sha1(np.ascontiguousarray(value).tobytes()).hexdigest()


# -- the check ------------------------------------------------------------------------------------
#
# A graph is made of the checkpoint's own names, and of variables that it does not have. Everything
# starts as another number than the checkpoint has, so that nothing is right by chance.

FRESH = {"new_head/kernel": (4, 3), "new_head/bias": (3,)}
START = -12345


def start_of(spec) -> np.ndarray:
    return np.full(spec.shape, START if spec.dtype != "bool" else 0).astype(str(spec.dtype))


def graph_of(specs) -> dict[str, tf.Variable]:
    made = {
        name: v1.get_variable(
            name, initializer=tf.constant(start_of(spec)), use_resource=i % 2 == 0
        )
        for i, (name, spec) in enumerate(specs.items())
    }
    for name, shape in FRESH.items():
        made[name] = v1.get_variable(name, initializer=tf.fill(shape, np.float32(START)))
    return made


def modules_of(specs) -> dict[str, tf.Variable]:
    made = {name: tf.Variable(start_of(spec), name="v") for name, spec in specs.items()}
    return made | {name: tf.Variable(tf.fill(s, np.float32(START))) for name, s in FRESH.items()}


def check_preserved(values, wanted, specs) -> None:
    """Check that the chosen variables hold the checkpoint's bytes, and the others their start."""
    assert set(wanted) < set(values)
    for name, value in values.items():
        if name in wanted:
            assert sha1(value) == wanted[name], f"{name} is not what the checkpoint has"
        else:
            shape = FRESH[name] if name in FRESH else specs[name].shape
            assert np.shape(value) == tuple(shape)
            assert np.all(np.asarray(value) == START), f"{name} is not freshly initialised"


@dataclass(frozen=True)
class Case:
    """A checkpoint of the corpus, and which of its variables are wanted."""

    folder: str
    prefix: str
    rules: cr.Rules
    chosen: str  # what the rules choose, said in another way
    count: int


CASES = {
    "mobilenet": Case(
        "slim/mobilenet_v1_0.25_128",
        "model.ckpt",
        cr.Rules(include=["MobilenetV1/.*"], exclude=[".*/Logits/.*"]),
        r"MobilenetV1/Conv2d_.*",
        135,
    ),
    "bert": Case(
        "transformers/bert_tiny_2_128_pretrain_adam",
        "bert_model.ckpt",
        cr.Rules(include=["bert/.*"], drop_slots=True),
        r"bert/(?!.*/adam_[mv]$).*",
        39,
    ),
    "character LSTM, V1": Case(
        "real/steffanigomez323+story-generation-rnn/save__models__shakespeare_50_50_100_2_128.ckpt",
        "shakespeare_50_50_100_2_128.ckpt",
        cr.Rules(include=["rnnlm/.*"], exclude=[".*/softmax_.*"]),
        r"rnnlm/(?!softmax_).*",
        15,
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def ckpt(case, corpus) -> str:
    return str(corpus / case.folder / case.prefix)


@pytest.fixture
def wanted(case, corpus) -> dict[str, str]:
    """The SHA-1 of each chosen variable, as TensorFlow 1.15.5 read it."""
    rows = json.loads((corpus / case.folder / "variables.json").read_text())["variables"]
    chosen = {row["name"]: row["sha1"] for row in rows if re.fullmatch(case.chosen, row["name"])}
    assert len(chosen) == case.count < len(rows)
    return chosen


@pytest.fixture
def specs(ckpt):
    with cr.open_checkpoint(ckpt) as reader:
        return dict(reader.specs())


@pytest.mark.corpus
def test_both_paths_and_the_converter_preserve_the_bytes_that_tensorflow_1_15_read(
    case, ckpt, wanted, specs, tmp_path
):
    with graph_and_session() as session:
        made = graph_of(specs)
        session.graph.finalize()
        in_session = cr.restore_session(session, ckpt, case.rules)
        assert cr.uninitialized_variables(session) == ()
        check_preserved(session.run(made), wanted, specs)
    assert set(in_session.preserved) == set(wanted)
    assert {entry.name for entry in in_session.initialized} == (set(specs) | set(FRESH)) - set(
        wanted
    )

    made = modules_of(specs)
    in_objects = cr.restore_objects(made, ckpt, case.rules)
    check_preserved({name: v.numpy() for name, v in made.items()}, wanted, specs)

    in_file = cr.convert(ckpt, tmp_path / "chosen", case.rules, digests=True)
    with graph_and_session() as session:
        made = graph_of(specs)
        cr.restore_session(session, tmp_path / "chosen")
        check_preserved(session.run(made), wanted, specs)
    made = modules_of(specs)
    cr.restore_objects(made, tmp_path / "chosen")
    check_preserved({name: v.numpy() for name, v in made.items()}, wanted, specs)
    reader = tf.train.load_checkpoint(str(tmp_path / "chosen"))
    assert {n: sha1(reader.get_tensor(n)) for n in reader.get_variable_to_shape_map()} == wanted

    assert digests_of(in_session) == digests_of(in_objects) == digests_of(in_file)


@pytest.mark.corpus
def test_the_check_fails_where_global_variables_initializer_is_run_instead(
    case, ckpt, wanted, specs
):
    with graph_and_session() as session:
        made = graph_of(specs)
        everything = v1.global_variables_initializer()
        cr.restore_session(session, ckpt, case.rules, initialize=False)
        assert set(cr.uninitialized_variables(session)) == set(made) - set(wanted)
        session.run(everything)
        with pytest.raises(AssertionError, match="is not what the checkpoint has"):
            check_preserved(session.run(made), wanted, specs)


@pytest.mark.corpus
def test_the_check_fails_where_one_preserved_variable_is_touched_by_one_bit(
    case, ckpt, wanted, specs
):
    made = modules_of(specs)
    cr.restore_objects(made, ckpt, case.rules)
    touched = made[max(wanted)]
    flat = touched.numpy().ravel()
    flat[-1] = np.nextafter(flat[-1], np.float32(np.inf))
    touched.assign(flat.reshape(touched.shape))
    with pytest.raises(AssertionError, match="is not what the checkpoint has"):
        check_preserved({name: v.numpy() for name, v in made.items()}, wanted, specs)


# -- MobileNet in Keras ---------------------------------------------------------------------------


def mobilenet_rules(depthwise: str) -> cr.Rules:
    block = r"MobilenetV1/Conv2d_(\d+)"
    return cr.Rules(
        rename=[
            (r"MobilenetV1/Conv2d_0/weights", r"conv1/kernel"),
            (r"MobilenetV1/Conv2d_0/BatchNorm/(.*)", r"conv1_bn/\1"),
            (rf"{block}_depthwise/depthwise_weights", rf"conv_dw_\1/{depthwise}"),
            (rf"{block}_depthwise/BatchNorm/(.*)", r"conv_dw_\1_bn/\2"),
            (rf"{block}_pointwise/weights", r"conv_pw_\1/kernel"),
            (rf"{block}_pointwise/BatchNorm/(.*)", r"conv_pw_\1_bn/\2"),
            (r"MobilenetV1/Logits/Conv2d_1c_1x1/weights", r"conv_preds/kernel"),
            (r"MobilenetV1/Logits/Conv2d_1c_1x1/biases", r"conv_preds/bias"),
        ],
    )


@pytest.mark.corpus
@pytest.mark.parametrize(
    ("world", "depthwise"),
    [(keras, "kernel"), (tf_keras, "depthwise_kernel")],
    ids=["keras3", "tf_keras"],
)
def test_mobilenet_renamed_into_keras_computes_what_tensorflow_1_15_computed(
    corpus, tmp_path, world, depthwise
):
    folder: Path = corpus / "slim/mobilenet_v1_0.25_128"

    def make():
        return world.applications.MobileNet(
            alpha=0.25, input_shape=(128, 128, 3), classes=1001, weights=None
        )

    given = np.load(folder / "input.npy")
    with np.load(folder / "outputs.npz") as outputs:
        wanted = outputs["endpoint/Predictions"]

    def check(model):
        found = np.asarray(model(given, training=False))
        wanted_here = wanted.reshape(found.shape)
        assert np.abs(found - wanted_here).max() < 1e-5 * np.abs(wanted_here).max()

    model = make()
    with pytest.raises(AssertionError):
        check(model)
    report = cr.restore_objects(model, folder / "model.ckpt", mobilenet_rules(depthwise))
    assert len(report.restored) == 137
    assert all("seed_generator" in entry.name for entry in report.initialized)
    check(model)

    # The same by way of a file: the template has the full names, and no model code is needed.
    template = tf.train.Checkpoint(model=make()).write(str(tmp_path / "fresh"))
    with cr.open_checkpoint(template) as reader:
        if world is tf_keras:
            assert "conv1/kernel" in reader.variables()
    cr.convert(folder / "model.ckpt", tmp_path / "out", mobilenet_rules(depthwise), into=template)
    model = make()
    tf.train.Checkpoint(model=model).restore(str(tmp_path / "out")).expect_partial()
    check(model)


# -- the same on small checkpoints ----------------------------------------------------------------

SMALL = {
    "enc/layer_1/w": numbers(4, 3),
    "enc/layer_1/b": numbers(3, start=20),
    "enc/layer_10/w": numbers(4, 3, start=30),
    "enc/layer_10/b": numbers(3, start=50),
    "enc/norm/moving_mean": numbers(3, start=60),
    "head/w": numbers(3, 7, start=70),
    "enc/layer_1/w/Momentum": numbers(4, 3, start=100),
    "global_step": np.int64(11),
}

# Rules, and what they restore: variable -> tensor.
TABLE = {
    "no rules": (None, {name: name for name in SMALL}),
    "a scope": (
        cr.Rules(include=["enc/layer_1/.*"], drop_slots=True),
        {"enc/layer_1/w": "enc/layer_1/w", "enc/layer_1/b": "enc/layer_1/b"},
    ),
    "all but a head": (
        cr.Rules(exclude=["head/.*"], drop_slots=True),
        {name: name for name in SMALL if name.startswith("enc") and "Momentum" not in name},
    ),
    "a renamed scope": (
        cr.Rules(include=["enc/.*"], rename=[("enc/(.*)", r"body/\1")], drop_slots=True),
        {
            name.replace("enc/", "body/"): name
            for name in SMALL
            if name.startswith("enc") and "Momentum" not in name
        },
    ),
    "numbers counted from elsewhere": (
        cr.Rules(
            include=["enc/layer_1.*/[wb]"],
            rename=[("enc/layer_1/(.)", r"block_a/\1"), ("enc/layer_10/(.)", r"block_b/\1")],
        ),
        {
            "block_a/w": "enc/layer_1/w",
            "block_a/b": "enc/layer_1/b",
            "block_b/w": "enc/layer_10/w",
            "block_b/b": "enc/layer_10/b",
        },
    ),
    "swapped siblings": (
        cr.Rules(
            include=["enc/layer_10?/w"],
            rename=[
                ("enc/layer_1/w", "enc/layer_10/w"),
                ("enc/layer_10/w", "enc/layer_1/w"),
            ],
        ),
        {"enc/layer_10/w": "enc/layer_1/w", "enc/layer_1/w": "enc/layer_10/w"},
    ),
    "an assignment map": (
        {"enc/layer_1/": "body/layer_1/", "global_step": "global_step"},
        {
            "body/layer_1/w": "enc/layer_1/w",
            "body/layer_1/b": "enc/layer_1/b",
            "global_step": "global_step",
        },
    ),
}


@pytest.mark.parametrize("kind", ["V2", "V1", "partitioned", "partitioned V1"])
@pytest.mark.parametrize("row", TABLE)
def test_both_paths_preserve_the_same_bytes_by_the_same_rules(tmp_path, row, kind):
    rules, expected = TABLE[row]
    values = {name: v for name, v in SMALL.items() if "partitioned" not in kind or np.ndim(v)}
    expected = {to: source for to, source in expected.items() if source in values}
    if isinstance(rules, dict):
        rules = {key: to for key, to in rules.items() if key in values or key.endswith("/")}
    if kind == "V2":
        ckpt = write(tmp_path / "m", values)
    else:
        parts = 3 if "partitioned" in kind else 1
        ckpt = write_from_graph(tmp_path / "m", values, parts=parts, v1="V1" in kind)
    with cr.open_checkpoint(ckpt) as reader:
        specs = {to: reader.specs()[source] for to, source in expected.items()}
        specs["untouched"] = reader.specs()["enc/layer_1/b"]
    wanted = {to: sha1(SMALL[source]) for to, source in expected.items()}

    with graph_and_session() as session:
        made = graph_of(specs)
        in_session = cr.restore_session(session, ckpt, rules)
        check_preserved(session.run(made), wanted, specs)
    made = modules_of(specs)
    in_objects = cr.restore_objects(made, ckpt, rules)
    check_preserved({name: v.numpy() for name, v in made.items()}, wanted, specs)
    cr.convert(ckpt, tmp_path / "out", rules)
    made = modules_of(specs)
    from_file = cr.restore_objects(made, tmp_path / "out")
    check_preserved({name: v.numpy() for name, v in made.items()}, wanted, specs)
    assert digests_of(in_session) == digests_of(in_objects) == digests_of(from_file)
    assert set(in_session.preserved) == set(expected)
