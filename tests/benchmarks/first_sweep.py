"""The first sweep of a model, and a later one, beside `predict` over the same data; a script.

    python tests/benchmarks/first_sweep.py [--networks ResNet50 DenseNet121] [--size 64]

The first sweep traces the network, as the first `predict` does, and is compared with that; a later
one is compared with a warm `predict`. The figures are CPU seconds of all threads together, and
ratios of them; of what was repeated the least counts. Every network is swept with every method in a
process of its own.
"""

import argparse
import os
import platform
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import tfbn

METHODS = ("pooled", "exact")


def seconds(run):
    """CPU seconds of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(network, method, args):
    """Print a line for each number of images and batch size; the first sweep is of the first."""
    model = getattr(keras.applications, network)(
        weights=None, input_shape=(args.size, args.size, 3), classes=10
    )
    cold = None
    for samples in args.images:
        x = np.random.default_rng(0).random((samples, args.size, args.size, 3)).astype("float32")
        for batch in (size for size in args.batches if size <= samples):

            def predict(x=x, batch=batch):
                model.predict(x, batch_size=batch, verbose=0)

            def sweep(x=x, batch=batch):
                tfbn.collect(model, x, method=method, batch_size=batch, verbose=0)

            first = seconds(predict), seconds(sweep)
            cold = cold or f"first {first[1] / first[0]:.2f} of the first predict"
            warm, later = (
                min(seconds(run) for _ in range(args.repeats)) for run in (predict, sweep)
            )
            print(
                f"{network:14} {method:7} {samples:5} images, batches of {batch:3}  "
                f"later {later / warm:.2f} of predict ({warm:.2f} s)  {cold}",
                flush=True,
            )
            cold = "-"


def main():
    """Start a process for each network and method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", default=["ResNet50", "DenseNet121"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, help="of the first network, in this process")
    args = parser.parse_args()
    if args.method:
        return measure(args.networks[0], args.method, args)
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, images of {args.size}x{args.size}",
        flush=True,
    )
    for network in args.networks:
        for method in METHODS:
            options = ["--networks", network, "--method", method]
            subprocess.run([sys.executable, *sys.argv, *options], check=True)
    return None


if __name__ == "__main__":
    main()
