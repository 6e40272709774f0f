"""What people do today for the same jobs, with TensorFlow: run as `python peers.py JOB ...`."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def list_variables(path):
    import tensorflow as tf

    for name, shape in tf.train.list_variables(path):
        sys.stdout.write("%s %s\n" % (name, shape))  # noqa: UP031  # TF1 runs this on Python 3.7


def _kept(reader):
    """Yield (name, value) of the weights, renamed."""
    for name in sorted(reader.get_variable_to_shape_map()):
        if not name.endswith(("/adam_m", "/adam_v")):
            yield name.replace("bert/", "model/", 1), reader.get_tensor(name)


def save_v2(source, destination):
    import tensorflow as tf

    names, values = zip(*_kept(tf.train.load_checkpoint(source)), strict=True)
    tf.raw_ops.SaveV2(
        prefix=destination,
        tensor_names=list(names),
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(value) for value in values],
    )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[destination], destination_prefix=destination, delete_old_dirs=False
    )


def saver(source, destination):
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        variables = [
            v1.get_variable(name, initializer=tf.constant(value))
            for name, value in _kept(tf.train.load_checkpoint(source))
        ]
        session.run(v1.global_variables_initializer())
        v1.train.Saver(variables).save(session, destination, write_meta_graph=False)


def to_safetensors(source, destination):
    import tensorflow as tf
    from safetensors.numpy import save_file

    save_file(dict(_kept(tf.train.load_checkpoint(source))), destination)


def compare(first, second):
    import numpy as np
    import tensorflow as tf

    one, other = tf.train.load_checkpoint(first), tf.train.load_checkpoint(second)
    for name in one.get_variable_to_shape_map():
        if not np.array_equal(one.get_tensor(name), other.get_tensor(name)):
            sys.exit("%s differs" % name)  # noqa: UP031


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
