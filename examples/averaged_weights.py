"""Average the weights of a network, and give batch norm the statistics of the averaged ones.

    python examples/averaged_weights.py --out averaged-out

Keras averages weights in two ways, `use_ema=True` of its optimizers and the callback
`SwapEMAWeights`, and both leave batch norm's moving averages alone. Those were taken while other
weights trained, and do not belong to the averaged ones. A sweep gives those that do.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from digits import build, load

import tfbn

LAST, AVERAGED = "last weights", "averaged weights"
MOVING, POPULATION = "moving averages", "population statistics"


def main():
    """Run the example."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "epochs": args.epochs,
        "ema_momentum": args.ema_momentum,
        "steps": args.epochs * -(-len(load("digits", 0)[0][0]) // 32),
        "use_ema": [with_use_ema(seed, args) for seed in range(args.seeds)],
        "SwapEMAWeights": [with_swapped_weights(seed, args) for seed in range(args.seeds)],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (args.out / "report.md").write_text(text)
    print(text)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--ema-momentum", type=float, default=0.99, help="of the weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("averaged-out"))
    return parser.parse_args()


def with_use_ema(seed, args):
    """`fit` leaves the averaged weights in the model, and the callback sweeps with these."""
    model, train, test = fresh(seed, args)
    last = LastWeights()
    population = tfbn.PopulationStatsCallback(train[0], batch_size=256, freeze=False)
    model.fit(*train, epochs=args.epochs, callbacks=[last, population], verbose=0)
    averaged = {POPULATION: evaluate(model, test)}
    model.save(args.out / f"use_ema_seed_{seed}.keras")
    population.stats.previous.assign(model)
    averaged[MOVING] = evaluate(model, test)
    # The weights before `fit` replaced them, to separate the two effects.
    model.set_weights(last.values)
    unaveraged = {MOVING: evaluate(model, test)}
    tfbn.update_population_stats(model, train[0], batch_size=256, verbose=0)
    unaveraged[POPULATION] = evaluate(model, test)
    return {LAST: unaveraged, AVERAGED: averaged}


class LastWeights(keras.callbacks.Callback):
    """All weights at the end of an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        """Keep them."""
        self.values = self.model.get_weights()


def with_swapped_weights(seed, args):
    """`SwapEMAWeights` puts the averaged weights in for the end of every epoch.

    The tracker is listed after it, and so sees these weights.
    """
    model, train, test = fresh(seed, args)
    history = model.fit(
        *train,
        epochs=args.epochs,
        callbacks=[
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
            tfbn.StatsTracker(
                train[0], validation_data=test, batch_size=256, validation_batch_size=256
            ),
        ],
        verbose=0,
    ).history
    return {
        MOVING: history["val_loss_moving_average"],
        POPULATION: history["val_loss_population"],
    }


def fresh(seed, args):
    """The network of the digits example, to be trained with averaging, and its data."""
    keras.utils.set_random_seed(seed)
    train, test = load("digits", seed)
    model = build(train[0].shape[1:])
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # Quick enough that for the last weights the moving averages do not lag much.
            layer.momentum = 0.9
    optimizer = keras.optimizers.Adam(use_ema=True, ema_momentum=args.ema_momentum)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, train, test


def evaluate(model, test):
    """Validation loss and accuracy."""
    results = model.evaluate(*test, batch_size=256, verbose=0, return_dict=True)
    return {"loss": results["loss"], "accuracy": results["accuracy"]}


def report(results):
    """Before, after, and by how much."""
    seeds = len(results["use_ema"])
    lines = [
        "# Averaged weights need statistics of their own",
        "",
        f"Digits, {seeds} training{'s' * (seeds > 1)} of {results['epochs']} epochs, weights "
        f"averaged with momentum {results['ema_momentum']:g}"
        + ("; mean ± standard error over the trainings." if seeds > 1 else "."),
        "",
        "## `use_ema=True`, after training",
        "",
        "| weights | statistics | validation loss | accuracy, % |",
        "|:--|:--|--:|--:|",
    ]
    for weights in (LAST, AVERAGED):
        for statistics in (MOVING, POPULATION):
            found = [run[weights][statistics] for run in results["use_ema"]]
            loss = mean_and_error([values["loss"] for values in found])
            accuracy = mean_and_error([100 * values["accuracy"] for values in found], digits=2)
            lines.append(f"| {weights} | {statistics} | {loss} | {accuracy} |")
    lines.append("")
    for weights in (LAST, AVERAGED):
        change = mean_and_error(
            [run[weights][POPULATION]["loss"] - run[weights][MOVING]["loss"]
             for run in results["use_ema"]],
            sign="+",
        )  # fmt: skip
        lines.append(f"- For the {weights} a sweep changes the loss by {change}.")
    averaged, last = (
        np.mean([run[weights][POPULATION]["loss"] for run in results["use_ema"]])
        for weights in (AVERAGED, LAST)
    )
    if averaged > last:
        lines.append(
            "- The average itself is behind here: it holds "
            f"{results['ema_momentum'] ** results['steps']:.1%} of the weights from before the "
            f"{results['steps']} steps, and much of early ones. Averaging is for longer trainings."
        )
    lines += [
        "",
        "## `SwapEMAWeights`, at the end of every epoch",
        "",
        "Validation loss of the averaged weights; the change is paired, training by training.",
        "",
        f"| epoch | {MOVING} | {POPULATION} | change |",
        "|--:|--:|--:|--:|",
    ]
    moving, population = (
        np.array([run[statistics] for run in results["SwapEMAWeights"]])
        for statistics in (MOVING, POPULATION)
    )
    for epoch, (before, after) in enumerate(zip(moving.T, population.T, strict=True), start=1):
        change = mean_and_error(after - before, sign="+")
        lines.append(f"| {epoch} | {before.mean():.4f} | {after.mean():.4f} | {change} |")
    return "\n".join([*lines, ""])


def mean_and_error(values, digits=4, sign=""):
    """The mean and its standard error, as text; of one value the error is not known."""
    values = np.asarray(values)
    mean = f"{values.mean():{sign}.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}"


if __name__ == "__main__":
    main()
