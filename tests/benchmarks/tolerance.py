"""How much data a tolerance takes, however much there is.

    python tests/benchmarks/tolerance.py [--sizes 10000 100000 1000000] [--tolerances 0.02 0.01]

A small residual network on scikit-learn's digits, made many by random shifts, contrasts and noise.
For each size of the data the sample that a tolerance took, the time of the exact sweep over it and
that over all data, and how far the worst channel is from the statistics of all data.
"""

import argparse
import os
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import tfbn

BATCH = 32


def network(images):
    """Three residual blocks, trained for one epoch, so that channels differ as they do in use."""

    def convolution(x, filters):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return tfbn.BatchNormalization()(x)

    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.ReLU()(convolution(inputs, 16))
    for _ in range(3):
        y = layers.ReLU()(convolution(x, 16))
        x = layers.ReLU()(layers.Add()([x, convolution(y, 16)]))
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(images, load_digits().target, epochs=1, verbose=0)
    return model


def many(images, number):
    """Images with random shifts, contrasts and noise."""
    rng = np.random.default_rng(0)
    result = np.empty((number, 8, 8, 1), np.float32)
    for start in range(0, number, 10_000):
        part = images[rng.integers(0, len(images), min(10_000, number - start))]
        part = np.roll(part, rng.integers(-1, 2), axis=1)
        contrast = rng.uniform(0.5, 1.5, (len(part), 1, 1, 1))
        result[start : start + len(part)] = part * contrast + rng.normal(0, 0.05, part.shape)
    return result


def off(stats, truth):
    """By how much the worst channel is off, in standard deviations."""
    return max(
        max(
            np.max(np.abs(stats[path].mean - whole.mean) / np.sqrt(whole.variance)),
            np.max(np.abs(np.sqrt(stats[path].variance / whole.variance) - 1)),
        )
        for path, whole in truth.items()
    )


def timed(model, x, **options):
    """The statistics, and the seconds they took."""
    start = time.perf_counter()
    stats = tfbn.collect(model, x, batch_size=BATCH, verbose=0, **options)
    return stats, time.perf_counter() - start


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.02, 0.01])
    args = parser.parse_args()
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, batches of {BATCH}"
    )
    keras.utils.set_random_seed(0)
    images = (load_digits().data / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    model = network(images)
    timed(model, images)  # Traces the network.
    print("   images  tolerance  samples  seconds  std error  true error")
    for size in args.sizes:
        x = many(images, size)
        truth, seconds = timed(model, x)
        print(f"{size:9}        all  {size:7}  {seconds:7.1f}          -           -", flush=True)
        for tolerance in args.tolerances:
            stats, seconds = timed(model, x, tolerance=tolerance)
            print(
                f"{size:9}  {tolerance:9g}  {stats.samples:7}  {seconds:7.1f}  "
                f"{stats.relative_error:9.4f}  {off(stats, truth):10.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
