"""Train a small convolutional network on handwritten digits, set its batch norm statistics
from the training data, and serve it.

    python examples/digits.py --out digits-out

The moving averages of batch normalization lag: with momentum 0.99 they still hold
0.99^steps of their initial value, and what they have of the data is from earlier weights.
The default schedule is chosen to show that: 4 epochs of 37 steps. With `--epochs 40` there
is nothing left to gain.
"""

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfbn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")  # Debian's package


def main():
    """Run the example."""
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (x_train, y_train), (x_val, y_val) = load(args.data, args.seed)

    model = build(x_train.shape[1:])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    population = tfbn.PopulationStatsCallback(x_train, method=args.method, batch_size=256)
    model.fit(
        x_train,
        y_train,
        validation_data=(x_val, y_val),
        epochs=args.epochs,
        batch_size=args.batch_size,
        callbacks=[population],
        verbose=2,
    )

    # The callback has put the population statistics in; what was there before is at hand.
    stats = population.stats
    with_population = evaluate(model, x_val, y_val)
    stats.previous.assign(model)
    with_moving_average = evaluate(model, x_val, y_val)
    stats.assign(model)

    print()
    stats.summary()
    steps = args.epochs * -(-len(x_train) // args.batch_size)
    report(with_moving_average, with_population, steps, len(x_train))
    figure = args.out / "moving_average_vs_population.png"
    draw(stats, steps, figure)
    print(f"Every channel of every layer, before and after the sweep: {figure}")

    model.save(args.out / "model.keras")
    exported = tfbn.export(model, args.out / "saved_model")
    difference = compare_in_fresh_process(exported.path, model, x_val, args.out)
    print(f"Loaded back in a fresh process, {exported.path} predicts the same: ", end="")
    print(f"largest difference of a probability {difference:.1e}.")

    results = {
        "data": args.data,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "method": args.method,
        "moving_average": with_moving_average,
        "population": with_population,
        "samples": stats.samples,
        "batch_norm_layers": len(stats),
        "saved_model_max_abs_difference": difference,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--epochs", type=int, help="4 for digits, 1 for fashion-mnist")
    parser.add_argument("--batch-size", type=int, help="32 for digits, 128 for fashion-mnist")
    parser.add_argument("--method", choices=["pooled", "algorithm2", "exact"], default="exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("digits-out"))
    args = parser.parse_args()
    epochs, batch_size = {"digits": (4, 32), "fashion-mnist": (1, 128)}[args.data]
    args.epochs = args.epochs or epochs
    args.batch_size = args.batch_size or batch_size
    return args


def load(name, seed):
    """Training and validation images in [0, 1] with one channel, and their labels."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
        x_train, x_val, y_train, y_val = train_test_split(
            x, y, test_size=0.35, random_state=seed, stratify=y
        )
        return (x_train, y_train), (x_val, y_val)
    if FASHION_MNIST.exists():
        data = (read_idx("train"), read_idx("t10k"))
    else:
        data = keras.datasets.fashion_mnist.load_data()
    return tuple(((x / 255).astype("float32")[..., None], y) for x, y in data)


def read_idx(part, directory=FASHION_MNIST):
    """Images and labels from the gzipped IDX files of Fashion-MNIST."""
    images = gzip.decompress((directory / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((directory / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return x, np.frombuffer(labels, np.uint8, offset=8)


def build(input_shape):
    """Four convolutions, each with batch norm at its default momentum of 0.99."""
    layers = [keras.Input(input_shape, name="image")]
    for filters, strides in [(16, 1), (32, 2), (32, 1), (64, 2)]:
        layers += [
            keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
            tfbn.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, "softmax")]
    return keras.Sequential(layers, name="digits")


def evaluate(model, x, y):
    """Validation loss and accuracy."""
    results = model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)
    return {"loss": results["loss"], "accuracy": results["accuracy"]}


def report(moving_average, population, steps, samples):
    """The table, and what to see in it."""
    print(f"\n{'validation with':24}{'loss':>8}{'accuracy':>12}")
    for name, row in (
        ("moving averages", moving_average),
        ("population statistics", population),
    ):
        print(f"{name:24}{row['loss']:8.4f}{row['accuracy']:12.4f}")
    left = 0.99**steps
    change = population["loss"] - moving_average["loss"]
    verb = "lowers" if change < 0 else "raises"
    if left > 0.001:
        lag = f"still hold {left:.1%} of their initial values and what earlier weights gave"
        advice = "The schedule is short so that this lag shows; with more --epochs it shrinks."
    else:
        lag = "hold nothing of their initial values any more, only what the last few hundred gave"
        advice = "After so long a training there is little left to gain."
    print(
        f"\nAfter {steps} training steps the moving averages (momentum 0.99) {lag}; the sweep over "
        f"the {samples} training images {verb} the validation loss by {abs(change):.4f}. {advice}\n"
    )


def draw(stats, steps, path):
    """One figure: what each layer's channels infer with, before and after the sweep."""
    drift = stats.compare(stats.previous)
    figure, rows = plt.subplots(2, len(stats), figsize=(3 * len(stats), 6), layout="constrained")
    for column, layer in enumerate(stats):
        pairs = (
            ("mean", stats.previous[layer].mean, stats[layer].mean),
            ("variance", stats.previous[layer].variance, stats[layer].variance),
        )
        for axes, (name, before, after) in zip(rows[:, column], pairs, strict=True):
            low, high = min(before.min(), after.min()), max(before.max(), after.max())
            axes.plot([low, high], [low, high], color="0.7", linewidth=1)
            axes.scatter(after, before, s=14, color="tab:blue")
            axes.set_xlabel(f"population {name}")
            axes.set_ylabel(f"moving average of the {name}")
        off = drift[layer]
        rows[0, column].set_title(
            f"{layer}\nmean off by {off['mean_shift']:.2f} std, std x {off['std_ratio']:.2f}",
            fontsize=9,
        )
    off = [drift[layer]["std_ratio"] for layer in stats]
    figure.suptitle(
        f"After {steps} steps the moving standard deviations are {min(off):.2f} to {max(off):.2f} "
        "times those of the population.\nEach dot is a channel; on the line nothing lags."
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare_in_fresh_process(saved_model, model, x, out):
    """Largest difference between the model and its SavedModel, loaded without tfbn."""
    np.save(out / "x.npy", x)
    code = (
        "import sys, numpy as np, tensorflow as tf;"
        "serve = tf.saved_model.load(sys.argv[1]).signatures['serving_default'];"
        "x = tf.constant(np.load(sys.argv[2]));"
        "np.save(sys.argv[3], list(serve(x).values())[0])"
    )
    files = [str(saved_model), str(out / "x.npy"), str(out / "y.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    served = np.load(out / "y.npy")
    (out / "x.npy").unlink()
    (out / "y.npy").unlink()
    return float(np.max(np.abs(served - model.predict(x, verbose=0))))


if __name__ == "__main__":
    main()
