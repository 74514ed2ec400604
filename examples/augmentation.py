"""Which data to sweep: the training images, or the augmented ones that training has seen?

    python examples/augmentation.py --data fashion-mnist --out augmentation

A small residual network is trained on augmented images and evaluated on test images without that,
with moving averages and with the statistics of a sweep over the training images, and over one
augmented copy of each. Writes report.md and results.json.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from digits import evaluate, load
from error_by_batch_size import mean_and_error
from moving_average_vs_population import residual_network

import tfbn

WAYS = ("moving averages", "swept without augmentation", "swept with augmentation")


def shifted(images):
    """Flip, and shift by up to 2 pixels."""
    size = tf.shape(images)
    padded = tf.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]], "REFLECT")
    return tf.image.random_flip_left_right(tf.image.random_crop(padded, size))


def shifted_and_lit(images):
    """The same, and change contrast and brightness."""
    images = tf.image.random_contrast(shifted(images), 0.3, 1.7)
    return tf.clip_by_value(tf.image.random_brightness(images, 0.4), 0.0, 1.0)


AUGMENTATIONS = {"flips and shifts": shifted, "and light": shifted_and_lit}


def main():
    """Train, sweep, evaluate, and write it up."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(args.seeds):
        train, test = (tuple(a[: args.samples] for a in part) for part in load(args.data, seed))
        for name, augment in AUGMENTATIONS.items():
            found = trained(train, test, augment, args.epochs, seed)
            runs.append({"seed": seed, "augmentation": name, "found": found})
            print(f"{seed=}, {name}: {found}")
    (args.out / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    (args.out / "report.md").write_text(report(runs))


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--samples", type=int, default=5000, help="images at most")
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 6], help="when to evaluate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("augmentation"))
    return parser.parse_args()


def trained(train, test, augment, epochs, seed):
    """Error in % and loss on test images, by epochs and by way."""
    keras.utils.set_random_seed(seed)
    model = residual_network(train[0].shape[1:])
    model.compile(
        "adam", "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    images = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0]), seed).batch(64)
    augmented = images.map(lambda x, y: (augment(x), y))
    found = {}
    for first, last in zip([0, *epochs], epochs, strict=False):
        model.fit(augmented, epochs=last, initial_epoch=first, shuffle=False, verbose=0)
        found[last] = dict.fromkeys(WAYS)
        found[last][WAYS[0]] = scores(model, test)
        for way, data in zip(WAYS[1:], (images, augmented), strict=True):
            # An exact sweep reads its data several times: each image has to be the same again.
            with tfbn.population_stats(model, np.concatenate([x for x, _ in data]), verbose=0):
                found[last][way] = scores(model, test)
    return found


def scores(model, test):
    """Error in % and loss."""
    found = evaluate(model, *test)
    return {"error": 100 * (1 - found["accuracy"]), "loss": found["loss"]}


def report(runs):
    """A table for each number of epochs."""
    parts = []
    for epochs in runs[0]["found"]:
        lines = [
            f"After {epochs} epochs, error in % and loss, mean ± standard error over seeds:\n",
            "| augmentation | statistics | error | loss |",
            "|---|---|--:|--:|",
        ]
        for name in AUGMENTATIONS:
            for way in WAYS:
                rows = [r["found"][epochs][way] for r in runs if r["augmentation"] == name]
                error, loss = (np.array([row[key] for row in rows]) for key in ("error", "loss"))
                lines.append(
                    f"| {name} | {way} | {mean_and_error(error)} | {loss.mean():.4f} ± "
                    f"{loss.std(ddof=1) / len(loss) ** 0.5:.4f} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
