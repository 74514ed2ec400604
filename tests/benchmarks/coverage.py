"""How often 95 % intervals of a sample hold the statistics of the population.

    python tests/benchmarks/coverage.py [--copies 20] [--tolerance 0.1] [--direct]

Each row is a kind of data and a batch size. The sample comes as a stream that draws from a finite
population at random, so the true statistics are exact. A sweep draws many samples at once: the
network holds independent copies side by side, whose rows are drawn independently. They share only
the sample's size. `covered` is the share of channels whose true value lies within 1.96 standard
errors, over all copies and seeds: means and variances, in the first layer and in the layers behind
it. `unknown` is the share of layers whose errors are NaN, which are left out.
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


def network(copies, direct):
    """Copies of three levels of batch norm layers; `direct`: and one before, on the data itself."""

    def normalized(x):
        width = x.shape[-1]
        x = layers.BatchNormalization()(layers.Reshape((copies * width,))(x))
        return layers.ReLU()(layers.Reshape((copies, width))(x))

    x = inputs = keras.Input((copies, FEATURES))
    if direct:
        x = normalized(x)
    for width in (24, 24, 16):
        x = normalized(layers.Dense(width, use_bias=False)(x))
    return keras.Model(inputs, x)


def truth_of(model, x, direct):
    """The statistics of each layer over the whole population."""
    alone = network(1, direct)
    for ours, theirs in zip(alone.layers, model.layers, strict=True):
        if isinstance(ours, layers.Dense):
            ours.set_weights(theirs.get_weights())
    return list(tfbn.collect(alone, x[:, None], batch_size=2000, verbose=0).values())


def stream(rng, x, copies, batch_size, run):
    """Batches of runs of consecutive rows, which are drawn at random."""
    rows = np.zeros((0, copies), int)
    while True:
        while len(rows) < batch_size:
            first = run * rng.integers(0, len(x) // run, (64, 1, copies))
            drawn = first + np.arange(run)[:, None]
            rows = np.concatenate([rows, drawn.reshape(-1, copies)])
        yield x[rows[:batch_size]]
        rows = rows[batch_size:]


def covered(stats, truth, copies):
    """Part of the network, name of the statistic -> whether the intervals hold the true values."""
    found = {}
    for number, (layer, true) in enumerate(zip(stats.values(), truth, strict=True)):
        for name in ("mean", "variance"):
            error = getattr(layer, f"{name}_error")
            off = np.abs(getattr(layer, name) - np.tile(getattr(true, name), copies))
            hits = [] if np.isnan(error).any() else off <= 1.96 * error
            found.setdefault(("first" if number == 0 else "behind", name), []).extend(hits)
    return found


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--population", type=int, default=20_000)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--direct", action="store_true", help="a batch norm layer on the data")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores; tolerance {args.tolerance:g}, "
        f"{args.seeds} seeds, {args.copies} copies each"
    )
    places = list(itertools.product(("first", "behind"), ("mean", "variance")))
    print("     kind  batch  samples  " + "  ".join(map("{0[0]} {0[1]}".format, places)), end="")
    print("  unknown  seconds")
    for kind, batch_size in itertools.product(args.kinds, args.batches):
        start = time.perf_counter()
        hits, unknown, samples = {place: [] for place in places}, [], []
        for seed in range(args.seeds):
            keras.utils.set_random_seed(seed)
            model, rng = network(args.copies, args.direct), np.random.default_rng(seed)
            x = KINDS[kind](rng, args.population).astype("float32")
            batches = stream(rng, x, args.copies, batch_size, ALIKE if kind == "alike" else 1)
            stats = tfbn.collect(model, batches, tolerance=args.tolerance, verbose=0)
            truth = truth_of(model, x, args.direct)
            for place, found in covered(stats, truth, args.copies).items():
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
