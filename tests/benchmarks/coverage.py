"""How often 95 % intervals of a sample hold the statistics of the population.

    python tests/benchmarks/coverage.py [--repeats 10] [--tolerance 0.05]

Each row is a kind of data and a batch size: the share of all channels of three layers whose mean
and standard deviation are within 1.96 standard errors, over three seeds with some samples each, and
the share of layers whose errors are not known (NaN), which are left out.
"""

import argparse
import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import tfbn

DIGITS = (load_digits().data / 16).astype("float32")


def digits(rng, number):
    """Real images."""
    return DIGITS[rng.integers(0, len(DIGITS), number)]


def contrast(rng, number):
    """Images of log-normal contrast."""
    return digits(rng, number) * np.exp(0.5 * rng.normal(size=(number, 1))).astype("float32")


def lognormal(rng, number):
    """Heavy tails."""
    return np.exp(0.5 * rng.normal(size=(number, 64))).astype("float32")


def flags(rng, number):
    """Rare flags, 1 in one row of a hundred."""
    return (rng.random((number, 64)) < 0.01).astype("float32")


def alike(rng, number):
    """Groups of ten alike rows."""
    rows = np.repeat(digits(rng, number // 10 + 1), 10, axis=0)[:number]
    return (rows + 0.02 * rng.normal(size=rows.shape)).astype("float32")


def network():
    """Three levels of batch norm layers."""
    x = inputs = keras.Input((64,))
    for width in (24, 24, 16):
        x = layers.Dense(width, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, x)


def covered(stats, truth):
    """Whether each mean and each variance is within its interval, of layers with known errors."""
    known = [path for path in stats if np.isfinite(stats[path].mean_error).all()]
    hits = [
        np.abs(getattr(stats[path], name) - getattr(truth[path], name))
        <= 1.96 * getattr(stats[path], f"{name}_error")
        for path in known
        for name in ("mean", "variance")
    ]
    return np.concatenate(hits) if hits else np.zeros(0, bool), 1 - len(known) / len(stats)


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--population", type=int, default=100_000)
    parser.add_argument("--tolerance", type=float, default=0.05)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| data | batch | samples | covered | unknown |\n| --- | --- | --- | --- | --- |")
    for kind in (digits, contrast, lognormal, flags, alike):
        for batch_size in (1, 4, 32):
            hits, unknown, samples = [], [], []
            for seed in range(3):
                keras.utils.set_random_seed(seed)
                model, rng = network(), np.random.default_rng(seed)
                x = kind(rng, args.population)
                truth = tfbn.collect(model, x, batch_size=5000, verbose=0)
                for _ in range(args.repeats):
                    part = (
                        rng.permutation(x)
                        if kind is not alike
                        else np.roll(
                            x.reshape(-1, 10, 64), rng.integers(len(x) // 10), axis=0
                        ).reshape(-1, 64)
                    )
                    stream = (part[i : i + batch_size] for i in range(0, len(x), batch_size))
                    stats = tfbn.collect(model, stream, tolerance=args.tolerance, verbose=0)
                    found, missing = covered(stats, truth)
                    hits.append(found)
                    unknown.append(missing)
                    samples.append(stats.samples)
            print(
                f"| {kind.__name__} | {batch_size} | {np.mean(samples):.0f} | "
                f"{np.mean(np.concatenate(hits)):.1%} | {np.mean(unknown):.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
