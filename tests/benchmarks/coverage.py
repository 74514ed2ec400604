"""How often 95 % intervals of a sample hold the statistics of the population.

    python tests/benchmarks/coverage.py [--repeats 10] [--seeds 3] [--tolerance 0.1]

Each row is a kind of data and a batch size. The sample comes as a stream that draws from a finite
population at random, so the true statistics are exact. `covered` is the share of channels whose
true value lies within 1.96 standard errors, over all repeats and seeds: means and variances, in the
first layer and in the layers behind it. `unknown` is the share of layers whose errors are NaN,
which are left out.
"""

import argparse
import itertools
import os
import platform
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import tfbn

FEATURES = 64
ALIKE = 10


def digits(rng, number):
    """Real images."""
    images = load_digits().data / 16
    return images[rng.integers(0, len(images), number)] + 0.02 * rng.normal(size=(number, FEATURES))


def contrast(rng, number):
    """Images of log-normal contrast."""
    return digits(rng, number) * np.exp(0.5 * rng.normal(size=(number, 1)))


def lognormal(rng, number):
    """Heavy tails: a kurtosis of 114, where a normal distribution has 3."""
    return np.exp(rng.normal(size=(number, FEATURES)))


def flags(rng, number):
    """Rare flags: 1 in one row of a hundred."""
    return rng.random((number, FEATURES)) < 0.01


def alike(rng, number):
    """Images in groups of ten alike rows."""
    rows = np.repeat(digits(rng, -(-number // ALIKE)), ALIKE, axis=0)
    return rows + 0.02 * rng.normal(size=rows.shape)


KINDS = {kind.__name__: kind for kind in (digits, contrast, lognormal, flags, alike)}


def network():
    """Four levels of batch norm layers, the first on the data itself."""
    inputs = keras.Input((FEATURES,))
    x = layers.BatchNormalization()(inputs)
    for width in (24, 24, 16):
        x = layers.Dense(width, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, x)


def stream(rng, x, batch_size, run):
    """Batches of runs of consecutive rows, which are drawn at random."""
    rows = np.zeros(0, int)
    while True:
        while len(rows) < batch_size:
            first = run * rng.integers(0, len(x) // run, 1 + batch_size)
            rows = np.concatenate([rows, (first[:, None] + np.arange(run)).ravel()])
        yield x[rows[:batch_size]]
        rows = rows[batch_size:]


def covered(stats, truth):
    """Part of the network, name of the statistic -> whether the intervals hold the true values."""
    found = {}
    for number, (path, layer) in enumerate(stats.items()):
        for name in ("mean", "variance"):
            error = getattr(layer, f"{name}_error")
            off = np.abs(getattr(layer, name) - getattr(truth[path], name))
            hits = [] if np.isnan(error).any() else off <= 1.96 * error
            found.setdefault(("first" if number == 0 else "behind", name), []).extend(hits)
    return found


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--population", type=int, default=20_000)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores; tolerance {args.tolerance:g}, "
        f"{args.seeds} seeds, {args.repeats} repeats each"
    )
    places = list(itertools.product(("first", "behind"), ("mean", "variance")))
    print("     kind  batch  samples  " + "  ".join(map("{0[0]} {0[1]}".format, places)), end="")
    print("  unknown  seconds")
    for kind, batch_size in itertools.product(args.kinds, args.batches):
        start = time.perf_counter()
        hits, unknown, samples = {place: [] for place in places}, [], []
        for seed in range(args.seeds):
            keras.utils.set_random_seed(seed)
            model, rng = network(), np.random.default_rng(seed)
            x = KINDS[kind](rng, args.population).astype("float32")
            truth = tfbn.collect(model, x, batch_size=2000, verbose=0)
            for _ in range(args.repeats):
                batches = stream(rng, x, batch_size, ALIKE if kind == "alike" else 1)
                stats = tfbn.collect(model, batches, tolerance=args.tolerance, verbose=0)
                for place, found in covered(stats, truth).items():
                    hits[place] += found
                unknown += [np.isnan(layer.relative_error) for layer in stats.values()]
                samples.append(stats.samples)
        shares = [f"{np.mean(hits[p]):{len(' '.join(p))}.1%}" if hits[p] else "-" for p in places]
        print(
            f"{kind:>9}  {batch_size:5}  {np.mean(samples):7.0f}  {'  '.join(shares)}  "
            f"{np.mean(unknown):7.0%}  {time.perf_counter() - start:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
