"""Time that an exported network takes to answer, on this machine; run as a script.

Five exports of one network of keras.applications take turns on the same batch, loaded as a
server loads them: with Keras's batch norm layers, with tfbn's, with tfbn's behind an op that
refuses NaN and infinity in requests, folded, and with its batch norm layers taken out (whose
answers are wrong, but nothing can be faster). Printed are the median and the least
milliseconds, and the median over turns of the ratio to Keras's and to the last.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import tfbn
from tfbn.models.folding import fold
from tfbn.models.keras_models import batch_norm_layers


def contenders(name, size):
    """The networks to compare, by name."""
    keras.utils.set_random_seed(0)
    network = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3))
    rng = np.random.default_rng(0)
    for layer in batch_norm_layers(network).values():
        channels = layer.moving_mean.shape[0]
        layer.moving_mean.assign(0.1 * rng.normal(size=channels))
        layer.moving_variance.assign(rng.uniform(0.5, 2.0, channels))

    def ours(layer):
        cls = type(layer)
        if cls is keras.layers.BatchNormalization:
            cls = tfbn.BatchNormalization
        return cls.from_config(layer.get_config())

    def none(layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return lambda inputs, **_: inputs
        return type(layer).from_config(layer.get_config())

    converted = keras.models.clone_model(network, clone_function=ours)
    converted.set_weights(network.get_weights())
    refuse_nan = keras.layers.Lambda(lambda x: tf.debugging.check_numerics(x, "not a number"))
    return {
        "Keras": network,
        "tfbn": converted,
        "NaN refused": keras.Sequential(
            [keras.Input(network.input_shape[1:]), refuse_nan, converted]
        ),
        "tfbn, folded": fold(converted),
        "without": keras.models.clone_model(network, clone_function=none),
    }


def turns(endpoints, x, repeats, clock):
    """Milliseconds of each endpoint in each turn."""
    times = {name: [] for name in endpoints}
    for repeat in range(repeats + 3):
        for name, endpoint in endpoints.items():
            start = clock()
            [output] = endpoint(x).values()
            output.numpy()
            if repeat >= 3:
                times[name].append(1e3 * (clock() - start))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="MobileNetV2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of all threads, in place of what the clock shows: for a machine that others use too",
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The batch norm statistics")
    with tempfile.TemporaryDirectory() as directory:
        loaded = {}
        for name, network in contenders(args.network, args.size).items():
            exported = tfbn.export(network, os.path.join(directory, name))
            loaded[name] = tf.saved_model.load(os.fspath(exported.path))
        x = np.random.default_rng(1).random((args.batch, args.size, args.size, 3), "float32")
        endpoints = {name: model.signatures["serving_default"] for name, model in loaded.items()}
        clock = time.process_time if args.cpu_time else time.perf_counter
        times = turns(endpoints, tf.constant(x), args.repeats, clock)
    print(
        f"{args.network}, batch {args.batch}, {args.size} x {args.size}; TensorFlow "
        f"{tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} processors"
    )
    print(f"{'batch norm':14}{'median ms':>10}{'least ms':>10}{'of Keras':>10}{'of without':>12}")
    for name, values in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(values, times[other], strict=True))
            for other in ("Keras", "without")
        ]
        print(
            f"{name:14}{statistics.median(values):10.1f}{min(values):10.1f}"
            f"{ratios[0]:10.2f}{ratios[1]:12.2f}"
        )


if __name__ == "__main__":
    main()
