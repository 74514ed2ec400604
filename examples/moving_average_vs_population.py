"""Why does batch normalization track its accuracy with moving averages, and how do they differ
from the population statistics used at the end? The answer as an experiment.

    python examples/moving_average_vs_population.py --out answer

It writes report.md, its figures and results.json, from which every number in the report is.

(a) The network of Figure 1 of Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167), with and
    without batch norm.
(b) Validation metrics three ways, for batch sizes 2, 8, 32 and momentum 0.9, 0.99, 0.999.
(c) Ways to get population statistics, as in Table 2 of Wu & Johnson 2021
    (https://arxiv.org/abs/2105.07576).
"""

import argparse
import json
import os
import pathlib
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from digits import load
from scipy.stats import t as student_t

import tfbn

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

FASHION_MNIST_SAMPLES = 6000  # Of 60,000: batches of 2 take their time.
BATCH_SIZES = (2, 8, 32)
MOMENTA = (0.9, 0.99, 0.999)
PLAIN_LEARNING_RATES = (0.1, 0.5, 2.0)
LEARNING_RATE = 0.5
STEPS_BETWEEN_POINTS = 100
WAYS = {
    "moving_average": ("moving averages", "tab:orange", "-"),
    "population": ("population statistics", "tab:blue", "-"),
    "mini_batch": ("mini-batch statistics", "0.5", "--"),
}
QUANTITIES = ("loss", "error")
SWEEPS = {
    "one pass, batches of 2": ("pooled", 2),
    "one pass, batches of 10": ("pooled", 10),
    "one pass, batches of 100": ("pooled", 100),
    "one pass, one batch of all": ("pooled", None),
    "exact, batches of 2": ("exact", 2),
}


def main():
    """Run the three experiments and write them up."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "data": args.data,
        "samples": [len(part[0]) for part in data(args.data, 0)],
        "figure_1": figure_1(args),
        "three_ways": three_ways(args),
        "sweeps": sweeps(args),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_figure_1(results["figure_1"], args.out / "figure_1.png")
    draw_three_ways(results["three_ways"], args.out / "three_ways.png")
    draw_sweeps(results["sweeps"], args.out / "sweeps.png")
    (args.out / "report.md").write_text(report(results))
    print(f"Wrote {args.out / 'report.md'}")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=6, help="trainings in (c); 3 at most in (a)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps in (a)")
    parser.add_argument("--epochs", type=int, default=6, help="in (b), and four times that in (c)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("answer"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: one training has no standard error")
    return args


def data(name, seed):
    """Training and test images and labels; a seed has its own split of the digits."""
    train, test = load(name, seed)
    if name == "fashion-mnist":
        train = tuple(part[:FASHION_MNIST_SAMPLES] for part in train)
    return train, test


# (a) Figure 1 of Ioffe & Szegedy.


def figure_1(args):
    """Three sigmoid layers of 100 units, trained with batches of 60, evaluated all along."""
    runs = []
    for seed in range(min(args.seeds, 3)):
        for batch_norm, rates in ((False, PLAIN_LEARNING_RATES), (True, (LEARNING_RATE,))):
            for rate in rates:
                runs.append(figure_1_run(args, seed, batch_norm, rate))
                last = runs[-1]["accuracy"]["population" if batch_norm else "plain"][-1]
                print(f"(a) seed {seed}, {batch_norm=}, {rate=}: test accuracy {last:.4f}")
    points = max(1, args.steps // STEPS_BETWEEN_POINTS)
    return {"steps": [STEPS_BETWEEN_POINTS * (i + 1) for i in range(points)], "runs": runs}


def figure_1_run(args, seed, batch_norm, learning_rate):
    """One training: test accuracy and percentiles of a sigmoid's input at every point."""
    (x, y), test = data(args.data, seed)
    keras.utils.set_random_seed(seed)
    model = sigmoid_network(x.shape[1:], batch_norm)
    model.compile(
        keras.optimizers.SGD(learning_rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=STEPS_BETWEEN_POINTS,
    )
    tracker = tfbn.StatsTracker(
        x, validation_data=test, batch_size=len(x), validation_batch_size=60
    )
    percentiles = SigmoidInput(test[0], tracker if batch_norm else None)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).cache().shuffle(len(x), seed).repeat()
    history = model.fit(
        batches.batch(60),
        steps_per_epoch=STEPS_BETWEEN_POINTS,
        epochs=max(1, args.steps // STEPS_BETWEEN_POINTS),
        validation_data=None if batch_norm else test,
        callbacks=[tracker, percentiles] if batch_norm else [percentiles],
        shuffle=False,  # The dataset does.
        verbose=0,
    ).history
    if batch_norm:
        accuracy = {way: history[f"val_accuracy_{way}"] for way in WAYS}
    else:
        accuracy = {"plain": history["val_accuracy"]}
    return {
        "seed": seed,
        "batch_norm": batch_norm,
        "learning_rate": learning_rate,
        "accuracy": accuracy,
        "percentiles": percentiles.found,
    }


def sigmoid_network(input_shape, batch_norm):
    """The paper's network: small Gaussian weights, and batch norm before each sigmoid."""
    layers = [keras.Input(input_shape, name="image"), keras.layers.Flatten()]
    for number in range(3):
        gaussian = keras.initializers.RandomNormal(stddev=0.1)
        layers.append(keras.layers.Dense(100, use_bias=not batch_norm, kernel_initializer=gaussian))
        if batch_norm:
            layers.append(tfbn.BatchNormalization())
        layers.append(keras.layers.Activation("sigmoid", name=f"sigmoid_{number + 1}"))
    return keras.Sequential([*layers, keras.layers.Dense(10, "softmax")])


class SigmoidInput(keras.callbacks.Callback):
    """15th, 50th and 85th percentile, over the test set, of what enters one last-layer sigmoid.

    Batch norm, if there is any, has the population statistics of the moment.
    """

    def __init__(self, x, tracker):
        super().__init__()
        self.found = []
        self._x = x
        self._tracker = tracker

    def on_epoch_end(self, epoch, logs=None):
        """One more point."""
        entering = keras.Model(self.model.inputs[0], self.model.get_layer("sigmoid_3").input)
        moving = self._tracker.stats.assign(self.model) if self._tracker else None
        unit = np.asarray(entering(self._x, training=False))[:, 0]
        if moving is not None:
            moving.assign(self.model)
        self.found.append(np.percentile(unit, [15, 50, 85]).tolist())


def draw_figure_1(results, path):
    """Accuracy over steps, and the percentiles without and with batch norm."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = results["steps"]
    plain = best_plain(results)
    for runs, way, color, label in (
        (plain, "plain", "tab:red", f"without, learning rate {plain[0]['learning_rate']:g}"),
        (with_batch_norm(results), "population", "tab:blue", "with batch norm"),
    ):
        curves = np.array([run["accuracy"][way] for run in runs])
        for curve in curves:
            axes[0].plot(steps, 100 * curve, color=color, alpha=0.3, linewidth=0.8)
        axes[0].plot(steps, 100 * curves.mean(0), color=color, label=label)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].set_title("Batch norm gets there in fewer steps", fontsize=11)
    axes[0].legend(loc="lower right", fontsize=9)
    spreads = []
    for panel, runs, name in (
        (axes[1], plain, "without"),
        (axes[2], with_batch_norm(results), "with"),
    ):
        low, middle, high = np.array(runs[0]["percentiles"]).T
        panel.fill_between(steps, low, high, color="0.85")
        panel.plot(steps, middle, color="0.2")
        spreads.append((high - low).max() / (high - low).min())
        panel.set_title(
            f"{name}: its widest spread is {spreads[-1]:.1f} times its narrowest", fontsize=11
        )
        panel.set_ylabel("a sigmoid's input, percentiles 15, 50, 85")
    lowest = min(panel.get_ylim()[0] for panel in axes[1:])
    highest = max(panel.get_ylim()[1] for panel in axes[1:])
    for panel in axes[1:]:
        panel.set_ylim(lowest, highest)
    for panel in axes:
        panel.set_xlabel("training steps")
    if curves.mean(0)[-1] < np.mean([run["accuracy"]["plain"][-1] for run in plain]):
        axes[0].set_title("Batch norm does not pay here", fontsize=11)
    save(figure, path)


def best_plain(results):
    """The runs without batch norm at the learning rate whose mean final accuracy is best."""

    def runs(rate):
        return [
            run for run in results["runs"] if not run["batch_norm"] and run["learning_rate"] == rate
        ]

    return runs(
        max(
            PLAIN_LEARNING_RATES,
            key=lambda rate: np.mean([run["accuracy"]["plain"][-1] for run in runs(rate)]),
        )
    )


def with_batch_norm(results):
    """The runs with batch norm."""
    return [run for run in results["runs"] if run["batch_norm"]]


# (b) Three ways over training.


def three_ways(args):
    """Validation metrics after every epoch, for batch sizes and momenta; one seed."""
    runs = []
    for batch_size in BATCH_SIZES:
        for momentum in MOMENTA:
            (x, y), test = data(args.data, 0)
            keras.utils.set_random_seed(0)
            model = convolutional_network(x.shape[1:], momentum)
            model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
            tracker = tfbn.StatsTracker(
                x, validation_data=test, batch_size=len(x), validation_batch_size=batch_size
            )
            history = model.fit(
                x, y, batch_size=batch_size, epochs=args.epochs, callbacks=[tracker], verbose=0
            ).history
            runs.append(
                {
                    "batch_size": batch_size,
                    "momentum": momentum,
                    "steps_per_epoch": -(-len(x) // batch_size),
                    "history": history,
                }
            )
            last = {way: round(history[f"val_loss_{way}"][-1], 4) for way in WAYS}
            print(f"(b) {batch_size=}, {momentum=}: validation loss {last}")
    return runs


def convolutional_network(input_shape, momentum):
    """Three convolutions, each with batch norm."""
    layers = [keras.Input(input_shape, name="image")]
    for filters, strides in [(16, 1), (32, 2), (32, 2)]:
        layers += [
            keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
            tfbn.BatchNormalization(momentum=momentum),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, "softmax")]
    return keras.Sequential(layers)


def draw_three_ways(runs, path):
    """A panel for each batch size and momentum."""
    figure, grid = plt.subplots(
        len(BATCH_SIZES), len(MOMENTA), figsize=(11, 9), sharey="row", layout="constrained"
    )
    for axes, run in zip(grid.flat, runs, strict=True):
        losses = {way: run["history"][f"val_loss_{way}"] for way in WAYS}
        epochs = range(1, len(losses["population"]) + 1)
        for way, (label, color, style) in WAYS.items():
            axes.plot(epochs, losses[way], style, color=color, label=label, marker=".")
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        factor = losses["moving_average"][-1] / losses["population"][-1]
        axes.set_title(
            f"batch {run['batch_size']}, momentum {run['momentum']:g}: moving\n"
            f"average ends at {factor:.3g} times the population's loss",
            fontsize=9,
        )
    for axes in grid[-1]:
        axes.set_xlabel("epochs")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation loss, nats")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    save(figure, path)


# (c) Table 2 of Wu & Johnson, small.


def sweeps(args):
    """Validation loss and error with each kind of statistics, early in training and after it."""
    last = 4 * args.epochs
    checkpoints = [max(1, last // 12), last]
    rows = []
    for seed in range(args.seeds):
        (x, y), test = data(args.data, seed)
        keras.utils.set_random_seed(seed)
        model = residual_network(x.shape[1:])
        steps = last * -(-len(x) // 32)
        schedule = keras.optimizers.schedules.CosineDecay(2e-3, steps)
        model.compile(
            keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        for first, epochs in zip([0, *checkpoints], checkpoints, strict=False):
            model.fit(x, y, batch_size=32, epochs=epochs, initial_epoch=first, verbose=0)
            found = {"moving average": evaluate(model, test)}
            for name, (method, batch_size) in SWEEPS.items():
                with warnings.catch_warnings():
                    # That one-pass sweeps over few samples are biased is the point here.
                    warnings.simplefilter("ignore", UserWarning)
                    stats = tfbn.collect(
                        model, x, method=method, batch_size=batch_size or len(x), verbose=0
                    )
                moving = stats.assign(model)
                found[name] = evaluate(model, test)
                moving.assign(model)
            rows.append({"seed": seed, "epochs": epochs, "found": found})
            print(f"(c) {seed=}, {epochs=}: " + json.dumps(found))
        if seed == 0:
            model.save(args.out / "residual_seed_0.keras")
    return {"checkpoints": checkpoints, "momentum": 0.99, "batch_size": 32, "rows": rows}


def residual_network(input_shape):
    """Three residual blocks, eight batch norm layers with the default momentum of 0.99."""

    def convolution(x, filters, strides=1, size=3):
        x = keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return tfbn.BatchNormalization()(x)

    x = inputs = keras.Input(input_shape, name="image")
    x = keras.layers.ReLU()(convolution(x, 16))
    for filters, strides in [(16, 1), (32, 2), (32, 1)]:
        y = keras.layers.ReLU()(convolution(x, filters, strides))
        y = convolution(y, filters)
        if strides > 1:
            x = convolution(x, filters, strides, size=1)
        x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, "softmax")(x))


def evaluate(model, test):
    """Validation loss in nats, and error in percent."""
    found = model.evaluate(*test, batch_size=256, verbose=0, return_dict=True)
    return {"loss": found["loss"], "error": 100 * (1 - found["accuracy"])}


def column(results, epochs, name, quantity):
    """One value a seed."""
    rows = [row["found"] for row in results["rows"] if row["epochs"] == epochs]
    return np.array([found[name][quantity] for found in rows])


def standard_error(values):
    """Of the mean over seeds."""
    return values.std(ddof=1) / np.sqrt(len(values))


def gain(results, epochs, name, quantity):
    """Paired difference to the moving average: mean, half its 95 % interval."""
    difference = column(results, epochs, name, quantity)
    difference = difference - column(results, epochs, "moving average", quantity)
    quantile = student_t.ppf(0.975, len(difference) - 1)
    return difference.mean(), quantile * standard_error(difference)


def draw_sweeps(results, path):
    """Every seed's loss with each kind of statistics."""
    checkpoints = results["checkpoints"]
    figure, grid = plt.subplots(
        1,
        len(checkpoints),
        figsize=(6.5 * len(checkpoints), 4),
        layout="constrained",
        squeeze=False,
    )
    names = ["moving average", *SWEEPS]
    for axes, epochs in zip(grid[0], checkpoints, strict=True):
        for place, name in enumerate(reversed(names)):
            values = column(results, epochs, name, "loss")
            color = "tab:orange" if name == "moving average" else "tab:blue"
            axes.plot(values, np.full(len(values), place), ".", color=color, alpha=0.5)
            axes.plot(values.mean(), place, "|", color=color, markersize=22, markeredgewidth=2)
        axes.set_yticks(range(len(names)), reversed(names))
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xlabel("validation loss, nats (a dot a training, a bar their mean)")
        factor = column(results, epochs, "moving average", "loss").mean()
        factor /= column(results, epochs, "exact, batches of 2", "loss").mean()
        axes.set_title(
            f"after {counted(epochs)}: the moving average's loss is\n"
            f"{factor:.2f} times that with exact statistics",
            fontsize=10,
        )
    save(figure, path)


def plain_numbers(axis):
    """0.05 and 2 on a logarithmic axis, not powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure, path):
    """Write a figure, without the lines that say nothing."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The report.


def report(results):
    """Markdown, with every number from `results`."""
    parts = [
        "# Why moving averages, and how are they different from population statistics?",
        answer(results),
        report_figure_1(results["figure_1"]),
        report_three_ways(results["three_ways"]),
        report_sweeps(results["sweeps"]),
        report_origins(results),
    ]
    return "\n\n".join(parts) + "\n"


def report_origins(results):
    """Where the data and the ideas are from."""
    train, test = results["samples"]
    split = ", split anew for every seed" if results["data"] == "digits" else ""
    return (
        "## Data and sources\n\n"
        f"{results['data']}, {train} training and {test} test images{split}. "
        "The experiments are after Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167, Figure "
        "1 and Algorithm 2) and Wu & Johnson 2021 (https://arxiv.org/abs/2105.07576, Table 2). "
        "Theirs are on ImageNet: from as little data as here, no size of an effect carries over."
    )


def answer(results):
    """The short answer."""
    lines = [
        "**In short.** To infer, batch norm needs the mean and variance of its inputs over the "
        "training data, as the network computes them *with its present weights*. To get them, the "
        "data must be run through the network once more (a sweep). A moving average of the "
        "mini-batch statistics costs nothing beside training, so it is used to follow the accuracy "
        "*while* the weights still change. It is an approximation in two ways: it mixes the "
        "statistics of many earlier weights, and it starts from 0 and 1, of which it still holds "
        "momentum^steps. At the end the weights are fixed and one sweep gives the statistics "
        "themselves. Ioffe & Szegedy do that (Algorithm 2, steps 7 to 12); most frameworks keep "
        "the moving average instead."
    ]
    for epochs in results["sweeps"]["checkpoints"]:
        mean, half = gain(results["sweeps"], epochs, "exact, batches of 2", "error")
        before = column(results["sweeps"], epochs, "moving average", "error").mean()
        steps = epochs * -(-results["samples"][0] // 32)
        lines.append(
            f"- After {counted(epochs)} of training (batch 32, momentum 0.99, so "
            f"{100 * 0.99**steps:.1f} % of the moving average is its start) the exact population "
            f"statistics change the test error of {before:.2f} % by {mean:+.2f} "
            f"± {half:.2f} points (95 % interval): "
            f"{verdict(mean, half)}."
        )
    return "\n".join([lines[0], "", *lines[1:]])


def counted(epochs):
    """`1 epoch`, `2 epochs`."""
    return f"{epochs} epoch{'s' if epochs > 1 else ''}"


def verdict(mean, half):
    """What a 95 % interval of a change in error or loss says."""
    if not abs(mean) > half:
        return "no difference that these trainings can tell from none"
    return "a gain" if mean < 0 else "a loss"


def report_figure_1(results):
    """(a)"""
    plain, normalised = best_plain(results), with_batch_norm(results)
    target = np.mean([run["accuracy"]["plain"][-1] for run in plain])
    final = np.mean([run["accuracy"]["population"][-1] for run in normalised])
    reached = np.mean([run["accuracy"]["population"] for run in normalised], 0) >= target
    steps = results["steps"]
    if reached.any():
        sooner = f"With batch norm it is there after {steps[int(reached.argmax())]} steps"
    else:
        sooner = "With batch norm it does not get there"
    lags = [
        max(
            abs(a - b)
            for a, b in zip(
                run["accuracy"]["moving_average"][first:],
                run["accuracy"]["population"][first:],
                strict=True,
            )
        )
        for first in (0, len(steps) // 2)
        for run in normalised
    ]
    count = len(normalised)
    late = 100 * max(lags[count:])
    tracking = "it will do here" if late < 1 else "it would take a longer training"
    return (
        "## (a) The network of Figure 1\n\n![Accuracy and percentiles](figure_1.png)\n\n"
        f"Three sigmoid layers of 100 units, batches of 60, SGD, {count} seeds (thin lines). "
        "Without batch norm the learning rate is the best at the end of "
        f"{', '.join(f'{rate:g}' for rate in PLAIN_LEARNING_RATES)}, chosen on the test set in "
        f"its favour: {plain[0]['learning_rate']:g}; with batch norm it is {LEARNING_RATE:g} and "
        f"was not searched. Without, the mean test accuracy after {steps[-1]} steps is "
        f"{100 * target:.2f} %. {sooner} (points are {STEPS_BETWEEN_POINTS} steps apart), "
        f"and ends at {100 * final:.2f} %. A step takes longer with batch norm.\n\n"
        "The other panels follow the input of one sigmoid, unit 0 of the last hidden layer, seed "
        "0: its 15th, 50th and 85th percentile over the test set.\n\n"
        "The accuracy with moving averages (momentum 0.99) is at most "
        f"{100 * max(lags[:count]):.2f} points from that with population statistics over the whole "
        f"run, and at most {late:.2f} points in its second half: to *track* the accuracy, "
        f"{tracking}."
    )


def report_three_ways(runs):
    """(b)"""
    lines = [
        "| batch | momentum | steps | start left | moving average | population | mini-batch |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        history = run["history"]
        steps = run["steps_per_epoch"] * len(history["loss"])
        last = {name: values[-1] for name, values in history.items()}
        cells = [
            f"{last[f'val_loss_{way}']:.4f} ({100 * last[f'val_accuracy_{way}']:.1f} %)"
            for way in WAYS
        ]
        lines.append(
            f"| {run['batch_size']} | {run['momentum']:g} | {steps} | "
            f"{100 * run['momentum'] ** steps:.1f} % | " + " | ".join(cells) + " |"
        )
    better = [
        f"batch {run['batch_size']} with momentum {run['momentum']:g}"
        for run in runs
        if run["history"]["val_loss_moving_average"][-1] < run["history"]["val_loss_population"][-1]
    ]
    where = f"Here: {'; '.join(better)}" if better else "Here it is so nowhere"
    same = all(
        run["history"][f"val_loss_{way}"] == other["history"][f"val_loss_{way}"]
        for run in runs
        for other in runs
        if run["batch_size"] == other["batch_size"]
        for way in ("population", "mini_batch")
    )
    return (
        "## (b) Three ways, over training\n\n![Loss three ways](three_ways.png)\n\n"
        "Validation loss (and accuracy) after the last epoch, one seed. Of the moving average's "
        "start, 0 and 1, momentum^steps is left:\n\n"
        + "\n".join(lines)
        + "\n\nMomentum has no part in training, only in the moving average. "
        + (
            "The curves with population and mini-batch statistics are equal to the last bit for "
            "all momenta of a batch size, so all that differs within a row of the figure is the "
            "moving average. "
            if same
            else "The curves with population statistics differ a little all the same: this "
            "machine does not add in the same order every time. "
        )
        + "Mini-batch statistics are what training normalises with. With batches of 2 they are "
        "noise, and a prediction depends on the other sample of its batch; they are no way to "
        "infer.\n\n"
        "The population statistics do not always give the smaller loss. "
        + where
        + ". One seed cannot tell small differences from chance, but there is a reason why it may "
        "be so: a network that was trained with batches of 2 never saw activations normalised "
        "by the whole population, and the moving average, taken while training ran, is of "
        "activations as training saw them."
    )


def report_sweeps(results):
    """(c)"""
    count = len({row["seed"] for row in results["rows"]})
    parts = [
        "## (c) Which sweep?\n\n![Loss with each kind of statistics](sweeps.png)\n\n"
        "A residual network with eight batch norm layers, trained with batches of 32 and a cosine "
        f"schedule, evaluated early and at the end. Means over {count} seeds ± standard error; "
        "differences are paired, seed by seed, with half of their 95 % interval (Student's t, not "
        "corrected for the number of rows)."
    ]
    for epochs in results["checkpoints"]:
        lines = [
            f"After {counted(epochs)}:\n",
            "| statistics | loss | error, % | loss - moving average's | error - moving average's |",
            "|:--|--:|--:|--:|--:|",
        ]
        for name in ("moving average", *SWEEPS):
            loss = column(results, epochs, name, "loss")
            error = column(results, epochs, name, "error")
            cells = [
                f"{loss.mean():.4f} ± {standard_error(loss):.4f}",
                f"{error.mean():.2f} ± {standard_error(error):.2f}",
            ]
            if name == "moving average":
                cells += ["", ""]
            else:
                cells.append("{:+.4f} ± {:.4f}".format(*gain(results, epochs, name, "loss")))
                cells.append("{:+.2f} ± {:.2f}".format(*gain(results, epochs, name, "error")))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    parts.append(conclusion(results))
    return "\n\n".join(parts)


def conclusion(results):
    """What (c) shows, as far as it does."""
    everything = "one pass, one batch of all"
    apart = {
        name: max(
            np.abs(
                column(results, epochs, name, "loss") - column(results, epochs, everything, "loss")
            ).max()
            for epochs in results["checkpoints"]
        )
        for name in SWEEPS
    }
    sentences = [
        "One pass depends on the sweep's batch size: against one batch of all, the loss of a "
        f"training moves by up to {apart['one pass, batches of 2']:.4f} with batches of 2, "
        f"{apart['one pass, batches of 10']:.4f} with 10 and "
        f"{apart['one pass, batches of 100']:.4f} with 100. The exact sweep over batches of 2 "
        f"moves it by at most {apart['exact, batches of 2']:.1e}: the same statistics.",
        "Which statistics predict best is another question.",
    ]
    for epochs in results["checkpoints"]:
        biased, whole = (
            {quantity: column(results, epochs, name, quantity).mean() for quantity in QUANTITIES}
            for name in ("one pass, batches of 2", everything)
        )
        mean, half = gain(results, epochs, "exact, batches of 2", "loss")
        before = column(results, epochs, "moving average", "loss").mean()
        sentences.append(
            f"After {counted(epochs)} exact statistics change the moving average's loss by "
            f"{100 * mean / before:+.1f} % ({mean:+.4f} ± {half:.4f} nats: "
            f"{verdict(mean, half)}), and the biased sweep over batches of 2 has a loss of "
            f"{biased['loss']:.4f} and an error of {biased['error']:.2f} % where one "
            f"batch of all has {whole['loss']:.4f} and {whole['error']:.2f} %."
        )
    return " ".join(sentences)


if __name__ == "__main__":
    main()
