"""How often 95 % intervals of a sample hold the statistics of the population.

    python tests/benchmarks/coverage.py [--repetitions 40] [--tolerance 0.1] [--alone]

Each row is a kind of data and a batch size. The sample comes as a stream that draws from a finite
population at random, so the true statistics are exact. Every repetition is a sweep of a stream with
another order. The share of channels whose true value lies within 1.96 standard errors is printed
for means and variances, in the first layer and in the layers behind it, with the half width of its
own 95 % interval, in which a repetition counts as one. `unknown` is the share of layers whose
errors are NaN, which are left out, and `constant` of those with a channel that never varied.
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
PIXEL = 20  # The channel that is alone.


def digits(rng, number):
    """Real images."""
    images = load_digits().data / 16
    return images[rng.integers(0, len(images), number)] + 0.02 * rng.normal(size=(number, FEATURES))


def contrast(rng, number):
    """Images of log-normal contrast."""
    return digits(rng, number) * np.exp(0.5 * rng.normal(size=(number, 1)))


def lognormal(rng, number):
    """Heavy tails: a kurtosis of 9, where a normal distribution has 3."""
    return np.exp(0.5 * rng.normal(size=(number, FEATURES)))


def heavier(rng, number):
    """A kurtosis of 114."""
    return lognormal(rng, number) ** 2


def flags(rng, number):
    """Rare flags: 1 in one row of a hundred."""
    return rng.random((number, FEATURES)) < 0.01


def alike(rng, number):
    """Images in groups of ten alike rows."""
    rows = np.repeat(digits(rng, -(-number // ALIKE)), ALIKE, axis=0)
    return rows + 0.02 * rng.normal(size=rows.shape)


KINDS = {kind.__name__: kind for kind in (digits, contrast, lognormal, heavier, flags, alike)}


def network(alone):
    """Three levels of batch norm layers, or one with one channel."""
    x = inputs = keras.Input((1 if alone else FEATURES,))
    if alone:
        return keras.Model(inputs, layers.BatchNormalization()(x))
    for width in (24, 24, 16):
        x = layers.Dense(width, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, x)


def stream(rng, x, batch_size, run):
    """Batches of runs of consecutive rows, which are drawn at random."""
    rows = np.zeros(0, int)
    while True:
        while len(rows) < batch_size:
            first = run * rng.integers(0, len(x) // run, (64, 1))
            rows = np.concatenate([rows, (first + np.arange(run)).ravel()])
        yield x[rows[:batch_size]]
        rows = rows[batch_size:]


def covered(stats, truth):
    """Part of the network, name of the statistic -> whether the intervals hold the true values."""
    actual = {}
    for number, (path, layer) in enumerate(stats.items()):
        for name in ("mean", "variance"):
            error = getattr(layer, f"{name}_error")
            off = np.abs(getattr(layer, name) - getattr(truth[path], name))
            hits = [] if np.isnan(error).any() else off <= 1.96 * error
            actual.setdefault(("first" if number == 0 else "behind", name), []).extend(hits)
    return actual


def share(repetitions):
    """Text of the share of hits and of the half width of its 95 % interval."""
    repetitions = [np.mean(hits) for hits in repetitions if hits]
    if not repetitions:
        return "-"
    width = 1.96 * np.std(repetitions) / np.sqrt(len(repetitions))
    return f"{np.mean(repetitions):.1%} +-{100 * width:.1f}"


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=40, help="for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--population", type=int, default=20_000)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--alone", action="store_true", help="a layer with one channel of the data")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores; tolerance {args.tolerance:g}, "
        f"{args.seeds} seeds, {args.repetitions} repetitions each"
    )
    places = list(itertools.product(("first", "behind"), ("mean", "variance")))
    titles = "  ".join(f"{' '.join(place):>15}" for place in places)
    print(f"     kind  batch  samples  {titles}  unknown  constant  seconds")
    for kind, batch_size in itertools.product(args.kinds, args.batches):
        start = time.perf_counter()
        hits, unknown, constant, samples = {place: [] for place in places}, [], [], []
        for seed in range(args.seeds):
            keras.utils.set_random_seed(seed)
            model, rng = network(args.alone), np.random.default_rng(seed)
            x = KINDS[kind](rng, args.population).astype("float32")
            if args.alone:
                x = x[:, PIXEL : PIXEL + 1]
            truth = tfbn.collect(model, x, batch_size=2000, verbose=0)
            for _ in range(args.repetitions):
                batches = stream(rng, x, batch_size, ALIKE if kind == "alike" else 1)
                stats = tfbn.collect(model, batches, tolerance=args.tolerance, verbose=0)
                for place, actual in covered(stats, truth).items():
                    hits[place].append(actual)
                unknown += [np.isnan(layer.relative_error) for layer in stats.values()]
                constant += [layer.constant.any() for layer in stats.values()]
                samples.append(stats.samples)
        shares = "  ".join(f"{share(hits[place]):>15}" for place in places)
        print(
            f"{kind:>9}  {batch_size:5}  {np.mean(samples):7.0f}  {shares}  "
            f"{np.mean(unknown):7.0%}  {np.mean(constant):8.0%}  "
            f"{time.perf_counter() - start:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
