"""The signature `monitor`: what it costs, and what its alarm is worth; run as a script.

`cost`: exports of one network of keras.applications take turns on the same batch, loaded as a
server loads them: `serve` without and with a signature `monitor` beside it, and `monitor` of all
batch norm layers and of a few. Printed are the median and the least milliseconds, their ratios to
`serve`, and the median over turns of the ratio within a turn.

`alarm`: small ResNets are trained on digits and exported with `monitor=True` after a sweep of the
training images. The other images are sent one by one, as they are and shifted, in random orders,
and `tfbn.ServedStats` is asked after every request from the 16th on. Printed are for every shift
the accuracy, the distance and after how many requests the alarm sounds; without a shift these are
false alarms. The images of the last line are sent in runs of four of one class.

`noise`: false alarms on ten populations that do not move, with rare or heavy-tailed values, by the
alarm's own functions alone: a sweep of samples, then others one by one, looked at after every
sample from the 16th on.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import tfbn
from tfbn.models.keras_models import batch_norm_layers
from tfbn.serving.monitor import alarm as alarms
from tfbn.serving.monitor.answers import Samples
from tfbn.stats import layer_stats, moments

# Narrow layers early in the network, and the last: cheap, and the alarm sounds as soon.
FEW = {"MobileNetV2": ["block_2_project_BN", "block_4_project_BN", "Conv_1_bn"]}

ALIKE = "none, in runs"
SHIFTS = {
    "none": lambda x, rng: x,
    "contrast / 4": lambda x, rng: 0.5 + (x - 0.5) / 4,
    "brightness + 0.4": lambda x, rng: x + 0.4,
    "darker, x 0.3": lambda x, rng: 0.3 * x,
    "noise, std 0.3": lambda x, rng: x + rng.normal(0, 0.3, x.shape),
    "inverted": lambda x, rng: 1 - x,
    ALIKE: lambda x, rng: x,
}
TRAINED = 1200


def cost(args):
    """Time that each signature takes to answer."""
    keras.utils.set_random_seed(0)
    network = getattr(keras.applications, args.network)(
        weights=None, input_shape=(args.size, args.size, 3)
    )
    x = np.random.default_rng(1).random((args.batch, args.size, args.size, 3), "float32")
    tfbn.update_population_stats(network, x, batch_size=2, verbose=0)
    if args.tfbn:
        network = tfbn.convert(network)
    every = list(batch_norm_layers(network))
    chosen = {"all": every, "few": args.layers or FEW.get(args.network, [every[-1]])}
    signatures = {}
    with tempfile.TemporaryDirectory() as directory:

        def loaded(name, **options):
            path = tfbn.export(network, os.path.join(directory, name), **options).path
            return tf.saved_model.load(os.fspath(path))

        held = [loaded("plain")]
        signatures["serve"] = held[0].signatures["serving_default"]
        for name, paths in chosen.items():
            held.append(loaded(name, monitor=paths))
            if name == "all":
                signatures["serve beside it"] = held[-1].signatures["serving_default"]
            signatures[f"monitor {name}, {len(paths)}"] = held[-1].signatures["monitor"]
    times = turns(signatures, tf.constant(x), args)
    print(
        f"{args.network}, batch {args.batch}, {args.size} x {args.size}; TensorFlow "
        f"{tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} processors; few: "
        f"{', '.join(chosen['few'])}"
    )
    print(f"{'':20}{'median ms':>10}{'least ms':>10}{'medians':>10}{'least':>8}{'in turn':>10}")
    first = times["serve"]
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, first, strict=True)]
        print(
            f"{name:20}{statistics.median(values):10.1f}{min(values):10.1f}"
            f"{statistics.median(values) / statistics.median(first):10.2f}"
            f"{min(values) / min(first):8.2f}{statistics.median(ratios):10.2f}"
        )


def turns(signatures, x, args):
    """Milliseconds of each signature in each turn."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = {name: [] for name in signatures}
    for repeat in range(args.repeats + 3):
        for name, signature in signatures.items():
            start = clock()
            for output in signature(x).values():
                output.numpy()
            if repeat >= 3:
                times[name].append(1e3 * (clock() - start))
    return times


def resnet():
    """Nine batch norm layers in a stem and three blocks."""

    def convolved(x, filters, size, strides=1):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.ReLU()(convolved(inputs, 16, 3))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = layers.ReLU()(convolved(x, filters, 3, strides))
        y = convolved(y, filters, 3)
        x = layers.ReLU()(layers.Add()([x if strides == 1 else convolved(x, filters, 1, 2), y]))
    outputs = layers.Dense(10, "softmax")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs)


def alarm(args):
    """False alarms, and how soon true ones sound."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    runs = {name: [] for name in SHIFTS}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        keras.utils.set_random_seed(seed)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(images))
        x, y = images[order[:TRAINED]], digits.target[order[:TRAINED]]
        rest, labels = images[order[TRAINED:]], digits.target[order[TRAINED:]]
        model = resnet()
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, epochs=args.epochs, verbose=0)
        tfbn.update_population_stats(model, x, verbose=0)
        with tempfile.TemporaryDirectory() as directory:
            path = tfbn.export(model, directory, monitor=True).path
            model_served = tf.saved_model.load(os.fspath(path))
            for name, shift in SHIFTS.items():
                shifted = shift(rest, rng).astype("float32")
                answers = one_by_one(model_served, shifted)
                _, accuracy = model.evaluate(shifted, labels, verbose=0)
                count = args.runs if name in ("none", ALIKE) else 20
                for _ in range(count):
                    order = rng.permutation(len(answers))
                    if name == ALIKE:
                        order = runs_of_four(labels, rng)
                    sent = [answers[i] for i in order[: args.requests]]
                    runs[name].append((seed, accuracy, *first_alarm(path, sent)))
                report(seed, name, [run[1:] for run in runs[name] if run[0] == seed])
    print("all networks")
    for name, actual in runs.items():
        report("all", name, [run[1:] for run in actual])


def one_by_one(served, images):
    """The answers to requests of one image each."""
    signature = served.signatures["monitor"]
    return [
        {name: output.numpy() for name, output in signature(tf.constant(images[i : i + 1])).items()}
        for i in range(len(images))
    ]


def runs_of_four(labels, rng):
    """The places of all images, four neighbours of one class."""
    places = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    runs = [run[i : i + 4] for run in places for i in range(0, len(run) - 3, 4)]
    return np.concatenate([runs[i] for i in rng.permutation(len(runs))])


def first_alarm(path, answers):
    """The number of requests after which the alarm sounds, or `None`, and the distance then."""
    served = tfbn.ServedStats(path)
    for number, answer in enumerate(answers, 1):
        served.add(answer)
        if number >= 16:
            actual = served.compare()
            if actual.drifted:
                return number, actual.distance
    return None, actual.distance


def report(seed, name, runs):
    accuracies, sounded, distances = zip(*runs, strict=True)
    numbers = [number for number in sounded if number is not None]
    after = f"after {np.mean(numbers):.1f} requests, at most {max(numbers)}" if numbers else ""
    print(
        f"{seed!s:4}{name:18} accuracy {np.mean(accuracies):.3f}, distance "
        f"{np.mean(distances):.3f}, alarms in {len(numbers)} of {len(runs)} runs {after}",
        flush=True,
    )


def _rows(x):
    """Inputs of rank 2: each value is its own mean."""
    return Samples(np.ones_like(x), x, np.zeros_like(x))


def _positions(x, mask=None):
    """Inputs of shape (samples, positions, channels), all or those under a mask."""
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    mean = np.sum(weights * x, 1)
    variance = np.sum(weights * (x - mean[:, None]) ** 2, 1)
    return Samples(np.broadcast_to(mask.sum(1)[:, None], mean.shape).astype(float), mean, variance)


def _flags(rng, n):
    return np.concatenate([rng.normal(size=(n, 5)), rng.random((n, 5)) < 0.003], 1)


def _one_hot(rng, n):
    p = 1 / np.arange(1, 41)
    return np.eye(40)[rng.choice(40, n, p=p / p.sum())]


def _bag_of_words(rng, n):
    p = 1 / np.arange(1, 201) ** 1.1
    return rng.multinomial(60, rng.dirichlet(30 * p / p.sum(), n)).astype(float)


def _images(rng, n):
    brightness = rng.gamma(3.0, 1.0, (n, 1, 1))
    return brightness + rng.gamma(1.0, 1.0, (n, 64, 1)) + rng.normal(size=(n, 64, 3))


def _sequences(rng, n):
    steps = np.cumsum(rng.normal(0, 0.3, (n, 30, 4)), 1) + rng.normal(size=(n, 1, 4))
    lengths = np.minimum(rng.geometric(0.15, n), 30)
    return _positions(steps, np.arange(30) < lengths[:, None])


def _purchases(rng, n):
    return rng.lognormal(2, 1, (n, 6)) * (rng.random((n, 6)) < [0.5, 0.2, 0.1, 0.05, 0.02, 0.01])


# Name -> samples from a generator and their number.
UNSHIFTED = {
    "normals and flags of 0.3 %": lambda rng, n: _rows(_flags(rng, n)),
    "20 flags of 0.1 to 2 %": lambda rng, n: _rows(
        (rng.random((n, 20)) < np.geomspace(0.001, 0.02, 20)).astype(float)
    ),
    "lognormal(3, 2)": lambda rng, n: _rows(rng.lognormal(3, 2, (n, 2))),
    "counts": lambda rng, n: _rows(
        rng.poisson(rng.gamma(0.3, 1, (n, 8)) * np.geomspace(0.1, 10, 8)).astype(float)
    ),
    "Student t, 3": lambda rng, n: _rows(rng.standard_t(3, (n, 6))),
    "one-hot of 40 countries": lambda rng, n: _rows(_one_hot(rng, n)),
    "bag of words": lambda rng, n: _rows(_bag_of_words(rng, n)),
    "purchases": lambda rng, n: _rows(_purchases(rng, n)),
    "images": lambda rng, n: _positions(_images(rng, n)),
    "sequences with masks": _sequences,
}


def swept(samples, batch_size=32):
    """What a sweep of samples finds."""
    batches = [
        Samples(*(part[i : i + batch_size] for part in samples)).merged()
        for i in range(0, len(samples.mean), batch_size)
    ]
    merged = functools.reduce(functools.partial(moments.merge, method="pooled"), batches)
    return layer_stats.of_calls([merged], "pooled")


def sounds(population, samples):
    """The number of samples after which the alarm sounds, or `None`."""
    blocks = alarms.Blocks()
    for number, sample in enumerate(samples.each(), 1):
        blocks.add(sample)
        moved = alarms.network_distance([alarms.layer_distance(blocks, population, 1e-3)])
        if number >= 16 and moved.p_value < 0.001:
            return number
    return None


def noise(args):
    """False alarms on populations that do not move."""
    for name, draw in UNSHIFTED.items():
        actual = []
        for run in range(args.first_run, args.first_run + args.runs):
            rng = np.random.default_rng([run, *name.encode()])
            actual.append(sounds(swept(draw(rng, args.swept)), draw(rng, args.samples)))
        after = [number for number in actual if number is not None]
        print(f"{name:28} false alarms in {len(after)} of {args.runs} runs {after[:9]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("cost")
    command.set_defaults(run=cost)
    command.add_argument("--network", default="MobileNetV2")
    command.add_argument("--size", type=int, default=224)
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--repeats", type=int, default=40)
    command.add_argument("--layers", nargs="*", help="the few, by path")
    command.add_argument("--tfbn", action="store_true", help="with tfbn's batch norm layers")
    command.add_argument("--cpu-time", action="store_true", help="of all threads")
    command = commands.add_parser("alarm")
    command.set_defaults(run=alarm)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--first-seed", type=int, default=10, help="0 to 3 made the alarm")
    command.add_argument("--epochs", type=int, default=40)
    command.add_argument("--runs", type=int, default=100, help="without a shift, each seed")
    command.add_argument("--requests", type=int, default=300, help="the most in a run")
    command = commands.add_parser("noise")
    command.set_defaults(run=noise)
    command.add_argument("--runs", type=int, default=200, help="for each population")
    command.add_argument("--first-run", type=int, default=0)
    command.add_argument("--swept", type=int, default=2000, help="samples of the sweep")
    command.add_argument("--samples", type=int, default=150, help="in a run")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The batch norm statistics")
    args.run(args)


if __name__ == "__main__":
    main()
