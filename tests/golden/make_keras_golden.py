"""Write the small files of Keras that the tests read; run once, with the old releases installed.

    python make_keras_golden.py keras      # Keras 3.12.4
    python make_keras_golden.py tf_keras   # tf_keras 2.16.0

Each file stands beside `truth.json`: by the variable's name in the model, its dtype, shape and the
SHA-1 of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "keras"


def model_of(keras):
    """Return a small model with a nested one, of which every variable has other values."""
    import numpy as np

    layers = keras.layers
    inner = keras.Sequential([layers.Dense(3, name="fc"), layers.BatchNormalization(name="bn")])
    start = keras.Input((4,))
    hidden = keras.Sequential([inner], name="tower")(start)
    model = keras.Model(
        start, layers.Dense(2, name="head")(layers.Dropout(0.5)(hidden)), name="net"
    )
    model.compile(keras.optimizers.Adam(), "mse")
    model.fit(np.ones((2, 4), "float32"), np.ones((2, 2), "float32"), verbose=0)
    random = np.random.default_rng(7)
    model.set_weights(
        [random.standard_normal(value.shape).astype(value.dtype) for value in model.get_weights()]
    )
    return model


def main(which: str) -> None:
    """Write the files of one Keras."""
    if which == "tf_keras":
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        import tf_keras as keras
    else:
        import keras
    FOLDER.mkdir(exist_ok=True)
    model = model_of(keras)
    model.save(FOLDER / f"{which}.keras")
    model.save(str(FOLDER / f"{which}_model.h5"))
    model.save_weights(str(FOLDER / f"{which}.weights.h5"))
    if which == "tf_keras":
        model.save_weights(str(FOLDER / f"{which}_weights.h5"))
    truth_file = FOLDER / "truth.json"
    truth = json.loads(truth_file.read_text()) if truth_file.exists() else {}
    truth[which] = {
        getattr(variable, "path", variable.name).removesuffix(":0"): {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "sha1": hashlib.sha1(value.tobytes()).hexdigest(),
        }
        for variable, value in zip(model.weights, model.get_weights(), strict=True)
    }
    truth_file.write_text(json.dumps(truth, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
