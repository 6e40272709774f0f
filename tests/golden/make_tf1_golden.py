"""Writes the small checkpoints of this directory; run it with TensorFlow 1.15.5 on Python 3.7.

    python3.7 make_tf1_golden.py

Each folder holds one checkpoint, `model.ckpt` (`ckpt-1` where it is object-based), and a
`truth.json`: name -> dtype, shape, and the SHA-1 of the values' little-endian bytes in C order (of
a string tensor: of its elements joined with a NUL). The truth is what the session held when it
saved, not what a reader of checkpoints made of the files (`object_based`: what TensorFlow's reader
made of them, the layers' and slots' values checked against the objects). `VERSION` says what wrote
them.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zlib

import numpy as np
import tensorflow as tf

HERE = os.path.dirname(os.path.abspath(__file__))
WANTED = "1.15.5"
V1, V2 = tf.train.SaverDef.V1, tf.train.SaverDef.V2


def fresh(folder):
    """Return the path of an empty folder of this directory."""
    path = os.path.join(HERE, folder)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path


def row(dtype, value):
    """Return what `truth.json` says of one tensor."""
    value = np.asarray(value)
    if dtype == "string":
        elements = [bytes(element) for element in np.asarray(value, object).ravel()]
        data = b"\0".join(elements)
    else:
        data = value.tobytes()
    return {"dtype": dtype, "shape": list(value.shape), "sha1": hashlib.sha1(data).hexdigest()}


def write_truth(folder, rows):
    """Write `truth.json`."""
    with open(os.path.join(folder, "truth.json"), "w") as file:
        json.dump(rows, file, indent=0, sort_keys=True)
        file.write("\n")


def joined(parts, axis):
    """Return a tensor of the values of a variable's parts."""
    return tf.concat([part.read_value() for part in parts], axis)


def save(folder, session, version, named, **options):
    """Save a session's variables with a Saver, and the truth beside them."""
    keep_meta = options.pop("keep_meta", False)
    saver = tf.train.Saver(write_version=version, **options)
    saver.save(session, os.path.join(folder, "model.ckpt"), write_meta_graph=keep_meta)
    held = session.run({name: tf.convert_to_tensor(v) for name, v in named.items()})
    rows = {name: row(v.dtype.base_dtype.name, held[name]) for name, v in named.items()}
    write_truth(folder, rows)


def seeded(name):
    """Return an initialiser of normal values that are a variable's own, and a part's own."""

    def initialise(shape, dtype=None, partition_info=None):
        offset = [] if partition_info is None else partition_info.var_offset
        state = np.random.RandomState(zlib.crc32((f"{name}{list(offset)}").encode()))
        return tf.constant(state.standard_normal(shape), dtype or tf.float32)

    return initialise


def make_plain():
    """Write `plain` and `v1`: a small convolutional net after one step of Adam."""
    with tf.Graph().as_default(), tf.Session() as session:
        for scope, kernel, width in (("net/conv_1", (3, 3, 2, 4), 4), ("net/fc", (6, 5), 5)):
            with tf.variable_scope(scope):
                tf.get_variable("kernel", kernel, initializer=seeded(scope + "/kernel"))
                tf.get_variable("bias", (width,), initializer=seeded(scope + "/bias"))
        with tf.variable_scope("net/conv_1/BatchNorm"):
            for name in ("moving_mean", "moving_variance"):
                tf.get_variable(name, (4,), initializer=seeded(name), trainable=False)
        step = tf.train.get_or_create_global_step()
        loss = tf.add_n([tf.nn.l2_loss(v) for v in tf.trainable_variables()])
        train = tf.train.AdamOptimizer(0.1).minimize(loss, global_step=step)
        session.run(tf.global_variables_initializer())
        session.run(train)
        named = {v.op.name: v for v in tf.global_variables()}
        save(fresh("plain"), session, V2, named)
        save(fresh("v1"), session, V1, named, keep_meta=True)


def make_partitioned():
    """Write `partitioned` and `partitioned_v1`: parts along axis 0 and along axis 1, with slots."""
    with tf.Graph().as_default(), tf.Session() as session:
        variables = {}
        axes = {"row/w": 0, "col/w": 1, "whole": 0}
        for name, shape, count in (("row/w", (7, 3), 3), ("col/w", (2, 5), 2)):
            cut = tf.fixed_size_partitioner(count, axes[name])
            variables[name] = tf.get_variable(
                name, shape, initializer=seeded(name), partitioner=cut
            )
        variables["whole"] = tf.get_variable("whole", (3,), initializer=seeded("whole"))
        loss = tf.add_n([tf.nn.l2_loss(tf.convert_to_tensor(v)) for v in variables.values()])
        optimizer = tf.train.AdamOptimizer(0.1)
        train = optimizer.minimize(loss)
        session.run(tf.global_variables_initializer())
        session.run(train)
        named = {}
        for name, variable in variables.items():
            parts = [variable] if name == "whole" else list(variable)
            named[name] = joined(parts, axes[name])
            for slot, suffix in (("m", "Adam"), ("v", "Adam_1")):
                slots = [optimizer.get_slot(part, slot) for part in parts]
                named[f"{name}/{suffix}"] = joined(slots, axes[name])
        for name in ("beta1_power", "beta2_power"):
            named[name] = next(v for v in tf.global_variables() if v.op.name == name)
        save(fresh("partitioned"), session, V2, named)
        save(fresh("partitioned_v1"), session, V1, named)


def make_sharded():
    """Write `sharded` and `sharded_v1`: variables on three devices, a data file for each."""
    config = tf.ConfigProto(device_count={"CPU": 3})
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        for number in range(6):
            with tf.device(f"/cpu:{number % 3}"):
                name = f"layer_{number}/w"
                tf.get_variable(name, (number + 1, 3), initializer=seeded(name))
        session.run(tf.global_variables_initializer())
        named = {v.op.name: v for v in tf.global_variables()}
        save(fresh("sharded"), session, V2, named, sharded=True)
        save(fresh("sharded_v1"), session, V1, named, sharded=True)


NUMBERS = [
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
    "qint8",
    "quint8",
    "qint16",
    "quint16",
    "qint32",
]
NOT_IN_V1 = ("bfloat16", "uint32", "uint64", "qint16", "quint16")
SHAPES = {"scalar": (), "vector": (5,), "matrix": (2, 3), "empty": (0, 4), "empty_mid": (2, 0, 3)}
QUANTISED = {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}
QUANTISED.update({"qint16": "int16", "quint16": "uint16"})


def typed_values(random, dtype, shape):
    """Return values of a dtype that TensorFlow can make a constant of."""
    held = QUANTISED.get(dtype, dtype)
    count = int(np.prod(shape))
    if held == "bool":
        return random.randint(0, 2, count).astype(bool).reshape(shape)
    kind = tf.as_dtype(held).as_numpy_dtype
    if held.startswith(("int", "uint")):
        limits = np.iinfo(kind)
        extremes = [limits.min, limits.max, 0, 1, limits.max - 1, limits.min + 1][:count]
        return np.array(extremes, kind).reshape(shape)
    normal = random.standard_normal(count)
    if held.startswith("complex"):
        normal = normal + 1j * random.standard_normal(count)
    return normal.astype(kind).reshape(shape)


def strings():
    """Return string tensors by name."""
    long = bytes(bytearray(i % 251 for i in range(3000)))
    awkward = [b"", b"\0", b"a\0b", "\u00e9\u6a29\U0001f600".encode("utf-8"), b"\xff\xfe", long]
    return {
        "string/scalar": np.array(b"one", object),
        "string/empty_scalar": np.array(b"", object),
        "string/awkward": np.array(awkward, object).reshape(2, 3),
        "string/empty": np.empty((0, 4), object),
    }


def make_dtypes():
    """Write `dtypes` and `dtypes_v1`: every dtype that TensorFlow 1.15.5 saves, in five shapes."""
    with tf.Graph().as_default(), tf.Session() as session:
        random = np.random.RandomState(7)
        tensors = {}
        for dtype in NUMBERS:
            for shape_name, shape in SHAPES.items():
                held = QUANTISED.get(dtype, dtype)
                tensor = tf.constant(typed_values(random, dtype, shape), held, shape)
                if held != dtype:
                    tensor = tf.bitcast(tensor, tf.as_dtype(dtype))
                tensors[f"{dtype}/{shape_name}"] = tensor
        for name, value in strings().items():
            tensors[name] = tf.constant(value, tf.string, value.shape)
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, np.finfo(np.float32).max]
        tensors["special_floats"] = tf.constant(special, tf.float32)
        for folder, version in (("dtypes", V2), ("dtypes_v1", V1)):
            names = [
                name
                for name in sorted(tensors)
                if version == V2 or name.split("/")[0] not in NOT_IN_V1
            ]
            path = fresh(folder)
            prefix = os.path.join(path, "model.ckpt")
            saved = [tensors[name] for name in names]
            if version == V2:
                slices = [""] * len(names)
                session.run(tf.raw_ops.SaveV2(
                    prefix=prefix, tensor_names=names, shape_and_slices=slices, tensors=saved
                ))  # fmt: skip
            else:
                session.run(tf.raw_ops.Save(filename=prefix, tensor_names=names, data=saved))
            found = session.run({name: tensors[name] for name in names})
            write_truth(path, {name: row(tensors[name].dtype.name, found[name]) for name in names})


def make_object_based():
    """Write `object_based`: a tf.keras model and its Adam, by tf.train.Checkpoint, keys as truth."""
    tf.enable_v2_behavior()
    tf.compat.v2.random.set_seed(1)
    model = tf.keras.Sequential([
        tf.keras.layers.Dense(4, input_shape=(3,), name="fc1"),
        tf.keras.layers.BatchNormalization(name="bn"),
        tf.keras.layers.Dense(2, name="fc2"),
    ])  # fmt: skip
    optimizer = tf.keras.optimizers.Adam(0.01)
    inputs = np.random.RandomState(3).standard_normal((8, 3)).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.nn.l2_loss(model(inputs, training=True))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    optimizer.apply_gradients([(gradients[i], variables[i]) for i in range(len(variables))])
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    path = fresh("object_based")
    checkpoint.save(os.path.join(path, "ckpt"))
    reader = tf.train.load_checkpoint(os.path.join(path, "ckpt-1"))
    held = {
        "model/layer_with_weights-0": model.layers[0],
        "model/layer_with_weights-2": model.layers[2],
    }
    rows = {}
    for name, dtype in sorted(reader.get_variable_to_dtype_map().items()):
        rows[name] = row(dtype.name, reader.get_tensor(name))
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    for scope, layer in held.items():
        for attribute in ("kernel", "bias"):
            variable = getattr(layer, attribute)
            key = f"{scope}/{attribute}"
            assert rows[key + suffix] == row("float32", variable.numpy()), key
            for slot in ("m", "v"):
                key_of_slot = f"{key}/.OPTIMIZER_SLOT/optimizer/{slot}{suffix}"
                value = optimizer.get_slot(variable, slot).numpy()
                assert rows[key_of_slot] == row("float32", value), key_of_slot
    write_truth(path, rows)


def main():
    """Write all of them."""
    if tf.__version__ != WANTED or sys.byteorder != "little":
        sys.exit(f"this is TensorFlow {tf.__version__} on a {sys.byteorder}-endian machine; {WANTED} on a little-endian one is wanted")  # fmt: skip
    make_plain()
    make_partitioned()
    make_sharded()
    make_dtypes()
    # Eager execution can only be switched on in a process that has built no graph.
    subprocess.check_call([sys.executable, os.path.abspath(__file__), "object_based"])
    for folder, _, names in os.walk(HERE):
        if "checkpoint" in names:
            os.unlink(os.path.join(folder, "checkpoint"))  # it names a path of this machine
    with open(os.path.join(HERE, "VERSION"), "w") as file:
        file.write(f"TensorFlow {tf.__version__}, NumPy {np.__version__}, Python {platform.python_version()}\n")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["object_based"]:
        make_object_based()
    else:
        main()
