"""Functions that worker processes in the tests of `collect_shards` import by name."""

import itertools
import os
import pathlib
import signal

import keras
import networks
import numpy as np
from keras import layers


@keras.saving.register_keras_serializable("tests")
class Called(layers.Layer):
    """Stores the process and the shape of every call in Python, including traces."""

    def __init__(self, log, **options):
        super().__init__(**options)
        self.log = log

    def call(self, inputs):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return inputs

    def get_config(self):
        return super().get_config() | {"log": self.log}


def counting(log):
    """Return a network that counts its traces in a file."""
    return keras.Sequential(
        [
            keras.Input((3,)),
            Called(log),
            layers.BatchNormalization(),
            layers.Dense(4, "relu"),
            layers.BatchNormalization(),
        ]
    )


class Source:
    """Builds a subclassed model; its unnamed layers are numbered differently in every process."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self):
        """Build one to three models of the same kind first, depending on the process."""
        for _ in range(1 + os.getpid() % 3):
            networks.subclassed(layers.BatchNormalization)
        keras.utils.set_random_seed(os.getpid() if self.seed is None else self.seed)
        return networks.subclassed(layers.BatchNormalization)


def slice_of(path_and_bounds):
    """Load some samples of an array in a file."""
    path, start, end = path_and_bounds
    return np.load(path)[start:end]


class Deadly:
    """Yields the batches of a shard, and kills the process on the second sweep of `victim`.

    Args:
        log: The name of the file that counts the sweeps of `victim`.
        size: The batch size. The process is killed after the first batch.
        victim: The shard.
    """

    def __init__(self, log, size, victim):
        self.log = pathlib.Path(log)
        self.size = size
        self.victim = victim

    def __call__(self, shard):
        deadly = False
        if shard == self.victim:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()}\n")
            deadly = len(self.log.read_text().splitlines()) == 2
        x = slice_of(shard)
        for first in range(0, len(x), self.size):
            if first and deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            yield x[first : first + self.size]


def in_file(tmp_path, x, *ends):
    """Save `x` and return its shards as names and bounds, for `slice_of`."""
    np.save(tmp_path / "x.npy", x)
    bounds = [0, *ends, len(x)]
    return [(str(tmp_path / "x.npy"), start, end) for start, end in itertools.pairwise(bounds)]
