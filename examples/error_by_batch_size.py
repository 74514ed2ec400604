"""Test error with moving averages and with population statistics, by batch size and epoch.

    python examples/error_by_batch_size.py --data fashion-mnist --out errors

A small residual network, in the form of Tables 1 and 2 of Wu & Johnson 2021
(https://arxiv.org/abs/2105.07576). Momentum has no part in training, so one training has the moving
averages of all momenta: its layers have momentum 0 and hold the statistics of the last batch, which
the training step averages. Writes report.md, error_by_batch_size.png and results.json.
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
from digits import load

import tfbn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH_SIZES = (2, 8, 32, 128)
MOMENTA = (0.9, 0.99, 0.999)
POPULATION = "population"
LEARNING_RATE = 0.1  # For batches of 128, in proportion for others.
STEPS_PER_EXECUTION = 25


def main():
    """Train, evaluate, and write it up."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(args.seeds):
        train, test = (
            tuple(array[:count] for array in part)
            for part, count in zip(
                load(args.data, seed), (args.samples, args.test_samples), strict=True
            )
        )
        for batch_size in BATCH_SIZES:
            errors = trained(train, test, batch_size, args.epochs, seed)
            runs.append({"seed": seed, "batch_size": batch_size, "errors": errors})
            print(f"{seed=}, {batch_size=}: error, % after {args.epochs} epochs {errors[-1]}")
    results = {
        "data": args.data,
        "samples": [len(train[0]), len(test[0])],
        "epochs": args.epochs,
        "seeds": args.seeds,
        "runs": runs,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "report.md").write_text(report(results))
    draw(results, args.out / "error_by_batch_size.png")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--samples", type=int, default=8000, help="training images at most")
    parser.add_argument("--test-samples", type=int, default=10000, help="test images at most")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("errors"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: one training has no standard error")
    return args


class Network(keras.Model):
    """A network that averages the statistics of its batches with several momenta at once."""

    def track(self):
        """Start the averages, at mean 0 and variance 1 as a layer does."""
        self.norms = [
            layer for layer in self.layers if isinstance(layer, keras.layers.BatchNormalization)
        ]
        start = self.statistics()
        self.averages = tf.Variable(tf.tile(start[None], [len(MOMENTA), 1]), trainable=False)

    def statistics(self):
        """The means and variances that the layers hold, as one vector."""
        pairs = [(layer.moving_mean, layer.moving_variance) for layer in self.norms]
        return tf.concat([tf.convert_to_tensor(value) for pair in pairs for value in pair], 0)

    def hold(self, statistics):
        """Put a vector of means and variances into the layers."""
        variables = [v for layer in self.norms for v in (layer.moving_mean, layer.moving_variance)]
        ends = np.cumsum([variable.shape[0] for variable in variables])[:-1]
        for variable, values in zip(variables, np.split(statistics, ends), strict=True):
            variable.assign(values)

    def train_step(self, data):
        """Keras's step, and a step of the averages: momentum * average + (1 - momentum) * batch."""
        metrics = super().train_step(data)
        momenta = tf.constant(MOMENTA)[:, None]
        self.averages.assign(momenta * self.averages + (1 - momenta) * self.statistics())
        return metrics


def residual_network(input_shape):
    """Three residual blocks, eight batch norm layers."""

    def convolution(x, filters, strides=1, size=3):
        x = keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return keras.layers.BatchNormalization(momentum=0.0)(x)

    inputs = keras.Input(input_shape, name="image")
    x = keras.layers.ReLU()(convolution(inputs, 16, 2 if input_shape[0] > 16 else 1))
    for filters, strides in [(16, 1), (32, 2), (32, 1)]:
        y = keras.layers.ReLU()(convolution(x, filters, strides))
        y = convolution(y, filters)
        if strides > 1:
            x = convolution(x, filters, strides, size=1)
        x = keras.layers.ReLU()(x + y)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return Network(inputs, keras.layers.Dense(10, "softmax")(x))


def trained(train, test, batch_size, epochs, seed):
    """Train, and return the test errors after every epoch in %, by kind of statistics."""
    keras.utils.set_random_seed(seed)
    model = residual_network(train[0].shape[1:])
    model.track()
    # Whole executions, so that no batch is smaller than the others.
    count = min(STEPS_PER_EXECUTION, len(train[0]) // batch_size)
    steps = len(train[0]) // batch_size // count * count
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE * batch_size / 128, steps * epochs)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        "sparse_categorical_crossentropy",
        steps_per_execution=count,
        jit_compile=False,
    )
    batches = tf.data.Dataset.from_tensor_slices(train).cache().shuffle(len(train[0]), seed)
    batches = batches.batch(batch_size, drop_remainder=True).repeat().prefetch(2)
    errors = []

    def evaluate(epoch, logs):
        last = model.statistics()
        found = {}
        for momentum, average in zip(MOMENTA, model.averages.numpy(), strict=True):
            model.hold(average)
            found[str(momentum)] = error(model, *test)
        tfbn.update_population_stats(model, train[0], batch_size=500, verbose=0)
        found[POPULATION] = error(model, *test)
        model.hold(last.numpy())
        errors.append(found)

    callback = keras.callbacks.LambdaCallback(on_epoch_end=evaluate)
    model.fit(
        batches,
        steps_per_epoch=steps,
        epochs=epochs,
        shuffle=False,  # The dataset does.
        callbacks=[callback],
        verbose=0,
    )
    return errors


def error(model, x, y):
    """The classification error in %."""
    found = model.predict(x, batch_size=500, verbose=0).argmax(1)
    return round(100 * float((found != y).mean()), 4)


def table(results, epoch):
    """Errors after an epoch: a row for each batch size, mean and standard error over seeds."""
    columns = [*map(str, MOMENTA), POPULATION]
    lines = [
        "| batch size | " + " | ".join(f"momentum {m:g}" for m in MOMENTA) + " | population "
        "| population - best momentum |",
        "|--:" * (len(columns) + 2) + "|",
    ]
    for batch_size in BATCH_SIZES:
        found = errors_of(results, batch_size)[:, epoch - 1]
        best = found[:, :-1].mean(0).argmin()
        cells = [mean_and_error(column) for column in found.T]
        cells.append(mean_and_error(found[:, -1] - found[:, best], sign="+"))
        lines.append(f"| {batch_size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def errors_of(results, batch_size):
    """Errors with the axes seed, epoch, kind of statistics (the population last)."""
    columns = [*map(str, MOMENTA), POPULATION]
    return np.array(
        [
            [[found[name] for name in columns] for found in run["errors"]]
            for run in results["runs"]
            if run["batch_size"] == batch_size
        ]
    )


def mean_and_error(values, sign=""):
    """`12.34 ± 0.05`: the mean and its standard error."""
    return f"{values.mean():{sign}.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def report(results):
    """The tables, after the first and the last epoch."""
    count, tested = results["samples"]
    last = results["epochs"]
    return (
        f"# Test error by batch size: {results['data']}\n\n"
        f"{count} training and {tested} test images, {results['seeds']} seeds, cosine schedule  "
        f"over {last} epochs. Error in %, mean ± standard error over seeds; the last column is "
        "paired, seed by seed, with the momentum that is best after the fact.\n\n"
        "![Test error over epochs](error_by_batch_size.png)\n\n"
        f"After 1 epoch:\n\n{table(results, 1)}\n\n"
        f"After {last} epochs:\n\n{table(results, last)}\n"
    )


def draw(results, path):
    """A panel for each batch size: errors over epochs."""
    figure, panels = plt.subplots(
        1, len(BATCH_SIZES), figsize=(11, 3.4), sharey=True, layout="constrained"
    )
    epochs = range(1, results["epochs"] + 1)
    colors = ["#fdbe85", "#fd8d3c", "#b33b00", "tab:blue"]
    labels = [*(f"moving averages, momentum {m:g}" for m in MOMENTA), "population statistics"]
    for axes, batch_size in zip(panels, BATCH_SIZES, strict=True):
        curves = errors_of(results, batch_size)
        spread = curves.std(0, ddof=1) / len(curves) ** 0.5
        for i, (label, color) in enumerate(zip(labels, colors, strict=True)):
            axes.errorbar(
                epochs, curves.mean(0)[:, i], spread[:, i], color=color, label=label, marker="."
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(f"batches of {batch_size}", fontsize=10)
        axes.set_xlabel("epochs")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test error, %")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
