"""The cost of `tfbn.collect_shards` beside the sweep itself, on each engine.

    python tests/benchmarks/shards.py --engine processes

The network has eight levels and next to nothing to compute. Printed are the time of a level over
few and over many shards, from which follow the cost of a level and of a task; the bytes of a task
and of its result; and the time of a level over 8 shards that take a simulated half second each, for
1, 2 and 4 workers. Level 1, in which processes start, import TensorFlow, load and trace, is given
by itself.
"""

import argparse
import pathlib
import pickle
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import keras
import numpy as np
from cluster_sweep import ENGINES
from keras import layers

import tfbn

LEVELS, WIDTH = 8, 256
COLUMNS = "{:>8}{:>8}{:>10}{:>12}{:>12}{:>12}"


class Load:
    """Data of a shard after some simulated work."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, seed):
        import numpy as np  # This class is pickled by value.

        time.sleep(self.seconds)
        return np.random.default_rng(seed).normal(size=(8, WIDTH)).astype("float32")


def main():
    """Print the table of an engine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="processes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 34], help="without work")
    parser.add_argument("--seconds", type=float, default=0.5, help="of simulated work in a shard")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        save(path)
        print(f"{args.engine}, {LEVELS} levels of {WIDTH} channels")
        print(COLUMNS.format("workers", "shards", "work s", "level 1 s", "a level s", "ideal s"))
        for workers in args.workers:
            with ENGINES[args.engine](workers) as any_map:
                for shards in args.shards:
                    measure(path, any_map, workers, shards, 0)
                measure(path, any_map, workers, 8, args.seconds)


def save(path):
    """A chain of batch norm layers."""
    blocks = [layers.BatchNormalization() for _ in range(LEVELS)]
    keras.Sequential([keras.Input((WIDTH,)), *blocks]).save(path)


def measure(path, any_map, workers, shards, seconds):
    """Print one row, and once the bytes."""
    times, sent, brought = [], [], []

    def timed(function, items):
        start = time.perf_counter()
        results = list(any_map(function, items))
        times.append(time.perf_counter() - start)
        sent.append(len(pickle.dumps(function)))
        brought.append(max(len(content) for _, content in results))
        return results

    load = Load(seconds)
    tfbn.collect_shards(path, range(shards), map=timed, load=load, verbose=0)
    ideal = -(-shards // workers) * seconds
    first, *others = times
    row = [f"{first:.2f}", f"{np.median(others):.4f}", f"{ideal:.2f}"]
    print(COLUMNS.format(workers, shards, seconds, *row), flush=True)
    if workers == 1 and not seconds:
        print(f"bytes: task {sent[0]} at level 1 and {sent[-1]} at {LEVELS}; result {brought[-1]}")


if __name__ == "__main__":
    main()
