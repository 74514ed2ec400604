"""Serve a network, let its requests change, notice it, and move its population along.

    python examples/served_population.py --out served-population

A small ResNet is trained, exported with a monitor, and asked images that another camera might have
taken. The monitor's alarm tells that they are others; their batch norm statistics, taken from n of
these unlabelled requests, make the model's next version. It writes report.md with the tables and
the figure accuracy.png, and results.json, from which every number in them is. Two rows are there to
show where it does harm: inverted images, and images that have not changed at all.

`--data fashion-mnist` takes the 60,000 images of Debian's package dataset-fashion-mnist, and up
to 45 minutes on two cores.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from digits import FASHION_MNIST, read_idx
from moving_average_vs_population import residual_network, standard_error
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfbn

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 500)  # Requests that a version is made of.
WEIGHTS = (0, 1, 4, 16)  # As how many samples the training data counts beside them.
REQUESTS, TEST = 500, 500  # Images to be requests, and others to test with.
NO_SHIFT = "none"
SHIFTS = {
    "contrast to a quarter": lambda x, noise: 0.5 + (x - 0.5) / 4,
    "brightness + 0.4": lambda x, noise: x + 0.4,
    "darker, x 0.3": lambda x, noise: 0.3 * x,
    "noise": lambda x, noise: x + 0.3 * noise,
    "inverted": lambda x, noise: 1 - x,
    NO_SHIFT: lambda x, noise: x,
}
COLORS = dict(zip(WEIGHTS, ("tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))
SERVED_SHIFT, SERVED_REQUESTS = "contrast to a quarter", 64


def main():
    """Run the experiment and write it up."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "data": args.data,
        "epochs": args.epochs,
        "counts": COUNTS,
        "weights": WEIGHTS,
        "alarms": [],
        "runs": [],
    }
    for seed in range(args.seeds):
        train, requests, test = load(args, seed)
        model = trained(args, seed, train)
        source = tfbn.update_population_stats(model, train[0], batch_size=256, verbose=0)
        model.save(args.out / f"seed_{seed}.keras")
        served = args.out / "models" / f"seed_{seed}"
        exported = tfbn.export(model, served, sample=test[0][:8], monitor=True)
        results["train"] = len(train[0])
        for shift in SHIFTS:
            field = shifted(shift, requests[0], seed), shifted(shift, test[0], seed + 1), test[1]
            run = {"seed": seed, "shift": shift, **accuracies(model, source, *field)}
            results["runs"].append(run)
            alarm = {"seed": seed, "shift": shift, "requests": until_alarm(exported.path, field[0])}
            results["alarms"].append(alarm)
            print(
                f"seed {seed}, {shift}: accuracy {run['as_trained']:.3f}, with the statistics of "
                f"64 requests {run['accuracy']['0'][COUNTS.index(64)]:.3f}; "
                f"alarm after {alarm['requests'] or 'none of ' + str(REQUESTS)} requests"
            )
            if shift == SERVED_SHIFT and seed == 0:
                results["served"] = next_version(exported.path, *field)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.out / "accuracy.png")
    text = report(results)
    (args.out / "report.md").write_text(text)
    print(text)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", type=pathlib.Path, default=FASHION_MNIST)
    parser.add_argument("--epochs", type=int, help="20 for digits, 1 for fashion-mnist")
    parser.add_argument("--seeds", type=int, help="trainings: 4 of digits, 2 of fashion-mnist")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("served-population"))
    args = parser.parse_args()
    epochs, seeds = {"digits": (20, 4), "fashion-mnist": (1, 2)}[args.data]
    args.epochs = args.epochs or epochs
    args.seeds = args.seeds or seeds
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: one training has no standard error")
    return args


def load(args, seed):
    """Images in [0, 1] with one channel, and labels: to train with, to be requests, to test with.

    A seed has its own split. That the requests have labels is known to nobody here.
    """
    if args.data == "digits":
        x, y = load_digits(return_X_y=True)
        x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
        train, rest = split(x, y, REQUESTS + TEST, seed)
    else:
        train, rest = (read_idx(part, args.data_dir) for part in ("train", "t10k"))
        train, rest = (((x / 255).astype("float32")[..., None], y) for x, y in (train, rest))
        _, rest = split(*rest, REQUESTS + TEST, seed)
    return train, *split(*rest, TEST, seed)


def split(x, y, size, seed):
    """Two parts of the data, the second of some size, with each class in proportion."""
    x, part, y, part_y = train_test_split(x, y, test_size=size, random_state=seed, stratify=y)
    return (x, y), (part, part_y)


def shifted(shift, x, seed):
    """Images as another camera takes them, in [0, 1] as any camera does."""
    noise = np.random.default_rng(seed).normal(size=x.shape)
    return np.clip(SHIFTS[shift](x, noise), 0, 1).astype("float32")


def trained(args, seed, train):
    """Eight batch norm layers in three residual blocks, trained for long enough."""
    keras.utils.set_random_seed(seed)
    model = residual_network(train[0].shape[1:])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    batch_size = 32 if args.data == "digits" else 128
    model.fit(*train, batch_size=batch_size, epochs=args.epochs, verbose=0)
    return model


def accuracies(model, source, requests, test, labels):
    """Accuracy as trained; and by weight of the source, for each count of requests."""
    predict = tf.function(lambda x: model(x, training=False), autograph=False)

    def accuracy():
        return float(np.mean(np.argmax(predict(tf.constant(test)), -1) == labels))

    found = {"as_trained": accuracy(), "accuracy": {str(weight): [] for weight in WEIGHTS}}
    for count in COUNTS:
        stats = tfbn.collect(model, requests[:count], batch_size=250, verbose=0)
        for weight in WEIGHTS:
            previous = stats.blend(source, samples=weight).assign(model)
            found["accuracy"][str(weight)].append(accuracy())
            previous.assign(model)
    return found


def until_alarm(version, requests):
    """How many requests of one image it takes until the monitor's alarm sounds, or `None`."""
    monitor = tf.saved_model.load(os.fspath(version)).signatures["monitor"]
    [name] = monitor.structured_input_signature[1]
    served = tfbn.ServedStats(version)
    for count, image in enumerate(requests, start=1):
        served.add(monitor(**{name: tf.constant(image[None])}))
        if served.compare().drifted:
            return count
    return None


def next_version(version, requests, test, labels):
    """Recalibrate what is served, from its SavedModel alone: accuracy before, after."""
    found = tfbn.recalibrate(version, requests[:SERVED_REQUESTS], verbose=0)
    print(tfbn.describe(found.path))

    def accuracy(path):
        serve = tf.saved_model.load(os.fspath(path)).signatures["serving_default"]
        [name] = serve.structured_input_signature[1]
        [outputs] = serve(**{name: tf.constant(test)}).values()
        return float(np.mean(np.argmax(outputs, -1) == labels))

    return {
        "before": [int(version.name), accuracy(version)],
        "after": [found.version, accuracy(found.path)],
    }


def of_shift(results, shift, weight=None):
    """Accuracy in percent, a row for each seed: as trained, or for each count of requests."""
    runs = [run for run in results["runs"] if run["shift"] == shift]
    if weight is None:
        return 100 * np.array([run["as_trained"] for run in runs])
    return 100 * np.array([run["accuracy"][str(weight)] for run in runs])


def report(results):
    """The tables."""
    seeds = len({run["seed"] for run in results["runs"]})
    counts, weights = list(results["counts"]), list(results["weights"])
    served = results["served"]
    lines = [
        "# The population of a served network, when its requests change",
        "",
        f"{results['data']}, {results['train']} training images, {results['epochs']} epochs; "
        f"{seeds} trainings with splits of their own. Accuracy in %, mean ± standard error over "
        "the trainings, on test images that were shifted as the requests were.",
        "",
        "![Accuracy against the number of requests](accuracy.png)",
        "",
        "## The statistics of n unlabelled requests",
        "",
        "| shift | as trained | " + " | ".join(f"n = {n}" for n in counts) + " |",
        "|:--|--:|" + "--:|" * len(counts),
    ]
    for shift in SHIFTS:
        cells = [with_error(column) for column in of_shift(results, shift, 0).T]
        trained = with_error(of_shift(results, shift))
        lines.append(f"| {shift} | {trained} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Blended with those of the training data, which count as N samples",
        "",
        "What N changes against N = 0, in points of accuracy, paired by training.",
        "",
        "| shift | N | " + " | ".join(f"n = {n}" for n in counts) + " |",
        "|:--|--:|" + "--:|" * len(counts),
    ]
    for shift in SHIFTS:
        for weight in weights[1:]:
            gains = of_shift(results, shift, weight) - of_shift(results, shift, 0)
            cells = [with_error(column, sign="+") for column in gains.T]
            lines.append(f"| {shift} | {weight} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Requests of one image until the alarm sounds",
        "",
        "| shift | " + " | ".join(f"training {seed + 1}" for seed in range(seeds)) + " |",
        "|:--|" + "--:|" * seeds,
    ]
    for shift in SHIFTS:
        sounded = [alarm["requests"] for alarm in results["alarms"] if alarm["shift"] == shift]
        lines.append(f"| {shift} | " + " | ".join(str(n or "none") for n in sounded) + " |")
    (before, was), (after, now) = served["before"], served["after"]
    lines += [
        "",
        "## The next version, from the SavedModel alone",
        "",
        f"Version {before} of the first network answers {100 * was:.1f} % of the images with "
        f"{SERVED_SHIFT} right, version {after} {100 * now:.1f} %: `tfbn.recalibrate` on "
        f"{SERVED_REQUESTS} requests.",
    ]
    return "\n".join([*lines, ""])


def with_error(values, sign=""):
    """The mean and its standard error, as text."""
    return f"{values.mean():{sign}.1f} ± {standard_error(values):.1f}"


def draw(results, path):
    """A panel for each shift: accuracy against the number of requests."""
    counts = list(results["counts"])
    figure, grid = plt.subplots(
        2, 3, figsize=(11.5, 7), sharex=True, sharey=True, layout="constrained"
    )
    for axes, shift in zip(grid.flat, SHIFTS, strict=True):
        trained = of_shift(results, shift).mean()
        axes.axhline(trained, color="0.4", linestyle="--", linewidth=1.2, label="as trained")
        for weight in reversed(results["weights"]):  # The requests alone come on top.
            values = of_shift(results, shift, weight)
            mean, error = values.mean(0), np.apply_along_axis(standard_error, 0, values)
            label = f"blended, N = {weight}" if weight else "requests alone"
            color = COLORS[weight]
            axes.plot(counts, mean, marker=".", color=color, label=label)
            axes.fill_between(counts, mean - error, mean + error, color=color, alpha=0.13)
        swept = of_shift(results, shift, 0).mean(0)[counts.index(64)]
        name = "no shift" if shift == NO_SHIFT else shift
        axes.set_title(f"{name}: {trained:.1f} % → {swept:.1f} % with n = 64", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 102)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    for axes in grid[-1]:
        axes.set_xlabel("unlabelled requests, n")
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy on shifted test images, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        [handles[0], *handles[:0:-1]],
        [labels[0], *labels[:0:-1]],
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
    )
    figure.suptitle(
        f"{results['data']}: batch norm statistics of a few unlabelled requests undo what light "
        "and contrast did to a served network.\nThey cannot undo an inversion, and where nothing "
        "has shifted a handful of them does harm. Bands: ± standard error."
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
