"""How the cost of a sweep grows: memory and time with the samples, messages with the channels.

    python tests/benchmarks/scale.py [--samples 10000 100000 1000000] [--limit 64]

A network of three batch norm layers, one after the other, on images of 8x8, in batches of 100 that
are made when they are asked for and are never all there. Every sweep has a process of its own.
The seconds per 100,000 samples are without the first batch of every pass over the data, in which
the network is traced. The processor's time stands beside the clock's, as that depends on who else
uses the machine. `data alone` reads the same batches and sweeps nothing. `--limit` is the
`memory_limit` of the last method in MiB: so much more may be resident, and where all that lies
between two levels fits, less is computed.

Then the messages: what one of two workers sends for every level, and what it would send for one
step of training. Memory is read from /proc, so Linux it must be.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import unittest.mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.sweep import data, run, state_bytes, workers
from tfbn.sweep.options import SweepOptions

BATCH = 100
METHODS = ("pooled", "algorithm2", "exact")


class Images(keras.utils.PyDataset):
    """Noise, always the same for the same number of batch.

    Attributes:
        asked: When the first and the second batch of every pass were asked for.
    """

    def __init__(self, samples):
        super().__init__()
        self.asked = []
        self._samples = samples

    def __len__(self):
        return -(-self._samples // BATCH)

    def __getitem__(self, index):
        if index < 2:
            self.asked.append(clocks())
        size = min(BATCH, self._samples - index * BATCH)
        return np.random.default_rng(index).standard_normal((size, 8, 8, 3), np.float32)


def small():
    """Two convolutions and two dense layers: 3 levels of batch norm layers, 56 channels."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, use_bias=False),
            tfbn.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(16, 3, strides=2, use_bias=False),
            tfbn.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(32, use_bias=False),
            tfbn.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(10),
        ]
    )


def memory():
    """MiB resident now, and at most so far.

    Not `ru_maxrss`: it begins with what the process that started this one took.
    """
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]


def clocks():
    """Seconds by the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def sweep(method, samples, limit):
    """Sweep once.

    Returns:
        MiB before, after and at most; seconds by the clock and of the processor; and those that
        are not for the first batch of a pass.
    """
    model, images = small(), Images(samples)
    before, _ = memory()
    start = clocks()
    if method == "data alone":
        for _ in data.batches(images, SweepOptions()):
            pass
    else:
        stats = tfbn.collect(model, images, method=method, memory_limit=limit, verbose=0)
        if stats.samples != samples:
            raise RuntimeError(f"swept {stats.samples} samples, not {samples}")
    seconds = clocks() - start
    images.asked[0] = start
    first = np.subtract(images.asked[1::2], images.asked[::2]).sum(axis=0)
    return before, *memory(), *seconds, *(seconds - first)


def fresh(method, samples, limit):
    """Run `sweep` in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps([method, samples, limit])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def growth(name, method, samples, limit):
    """Sweep more and more samples, and print what that takes."""
    print(name)
    first = None
    for number in samples:
        before, after, peak, clock, processor, *steady = fresh(method, number, limit)
        rates = [seconds * 1e5 / (number - BATCH) for seconds in steady]
        first = first or (peak, *rates)
        grown = [a / b for a, b in zip((peak, *rates), first, strict=True)]
        print(
            f"{number:10}{before:8.0f}{after:8.0f}{peak:8.0f} MiB {grown[0]:7.3f}"
            f"{clock:11.1f}{processor:9.1f} s {rates[0]:9.2f}{rates[1]:9.2f} s"
            f"{grown[1]:8.2f}{grown[2]:9.2f}",
            flush=True,
        )


def messages(model, x, method):
    """What one of two workers sends in a sweep: the bytes and the numbers of every message."""
    sent = []

    class Twin(workers.Workers):
        """A worker whose only fellow has the same data, and so the same to say."""

        def __init__(self, model):
            super().__init__(model)
            self.count = 2

        def _exchange(self, message):
            sent.append(message)
            return [message] * 2

    with unittest.mock.patch.object(run, "Workers", Twin):
        tfbn.collect(model, x, method=method, batch_size=len(x), memory_limit=2**30, verbose=0)
    sent = [message for message in sent if len(message) > 1]  # Not that nothing has failed.
    states = [state_bytes.unpack(message[1:]) for message in sent]
    numbers = [sum(actual.rows.size for actual in state.moments.values()) for state in states]
    return list(map(len, sent)), numbers


def print_messages(name, model, shape):
    """Compare the bytes sent by a sweep of each method with a training step's gradient."""
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
    actual = tfbn.PopulationStats.read(model)
    channels = sum(len(layer.mean) for layer in actual.values())
    gradient = 4 * sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    print(
        f"{name}: {len(actual)} batch norm layers, {channels} channels; gradient of one step "
        f"{gradient} bytes"
    )
    for method in METHODS:
        (hello, *sizes), (_, *numbers) = messages(model, x, method)
        total, largest = hello + sum(sizes), max(sizes)
        print(
            f"  {method:10} {len(sizes):2} level(s): {sum(numbers) / channels:.2f} numbers a "
            f"channel; {total} bytes in all, {total / channels:.1f} a channel, of which "
            f"{total - 8 * sum(numbers)} say what they are of; the largest message {largest}; "
            f"{total / gradient:.4f} of a gradient",
            flush=True,
        )


def main():
    """Print everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(sweep(*args.one)))
        return
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores"
    )
    print(
        "   samples  before   after    peak     to first     clock   proc.    /100,000    proc."
        "    to first   proc."
    )
    growth("data alone", "data alone", args.samples, 0)
    for method in METHODS:
        growth(method, method, args.samples, 0)
    growth(f"exact, memory_limit {args.limit} MiB", "exact", args.samples, args.limit * 2**20)
    print_messages("this network", small(), (8, 8, 3))
    # Its messages and its gradient are the same for images of any size.
    resnet = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3))
    print_messages("ResNet-50", resnet, (32, 32, 3))


if __name__ == "__main__":
    main()
