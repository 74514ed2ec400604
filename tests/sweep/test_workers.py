"""Tests of sweeps in several real processes of a `tf.distribute` strategy."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import keras
import networks
import numpy as np
import pytest

import tfbn

HERE = pathlib.Path(__file__).parents[1]
METHODS = ["pooled", "exact"]  # "algorithm2" runs as "pooled" does.


WORKER = """
import shutil, sys, threading
sys.path.insert(0, sys.argv[1])
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras, networks, numpy as np, pathlib, tfbn, os, signal, time
me = strategy.cluster_resolver.task_id
out = pathlib.Path(sys.argv[2])
keras.utils.set_random_seed(0)
with strategy.scope():
    model = networks.residual(tfbn.BatchNormalization)
x = networks.data(model, 50)
def shard(*ends):
    return x[([0, *ends] + [50])[me] : ([0, *ends] + [50])[me + 1]]
"""


def run_workers(tmp_path, script, count=2, timeout=300):
    """Run a script as several workers, and return their exit statuses and what they printed."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    workers = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        environment = os.environ | {
            "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        command = [sys.executable, "-c", WORKER + script, str(HERE), str(tmp_path)]
        workers.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], printed


SWEEP = """
# Keras's `fit` does not work here.
with strategy.scope():
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)

@tf.function
def train(x):
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    strategy.run(step, args=(x,))

for _ in range(3):
    train(tf.constant(x[25 * me : 25 * me + 25]))
np.save(out / f"before_{me}.npy", networks.batch_norms(model)[0].moving_mean)
for name, ends in [("uneven", [37]), ("none", [0]), ("all", [50])]:
    for method in ["pooled", "algorithm2", "exact"]:
        # One after the other, so that the others wait.
        time.sleep(0.2 * me)
        stats = tfbn.update_population_stats(
            model, shard(*ends), method=method, batch_size=16, verbose=0
        )
        stats.save(out / f"{name}_{method}_{me}.npz")
        np.save(out / f"{name}_{method}_{me}.npy", np.concatenate(
            [np.concatenate([bn.moving_mean, bn.moving_variance])
             for bn in networks.batch_norms(model)]))
if me == 0:
    model.save(out / "model.keras")
"""


@pytest.mark.slow
def test_two_workers_agree_on_what_one_process_finds(tmp_path):
    statuses, printed = run_workers(tmp_path, SWEEP)
    assert statuses == [0, 0], printed
    model = keras.models.load_model(tmp_path / "model.keras")
    x = networks.data(model, 50)
    # Training left different moving averages on each worker.
    assert np.any(np.load(tmp_path / "before_0.npy") != np.load(tmp_path / "before_1.npy"))
    for name, end in [("uneven", 37), ("none", 0), ("all", 50)]:
        parts = [part[i : i + 16] for part in (x[:end], x[end:]) for i in range(0, len(part), 16)]
        for method in METHODS:
            a, b = (
                tfbn.PopulationStats.load(tmp_path / f"{name}_{method}_{i}.npz") for i in (0, 1)
            )
            assert a == b
            one, two = (np.load(tmp_path / f"{name}_{method}_{i}.npy") for i in (0, 1))
            np.testing.assert_array_equal(one, two)

            def batches(parts=parts):
                yield from parts

            alone = tfbn.collect(model, batches(), method=method, verbose=0)
            networks.assert_statistics(a, alone, 1e-6)
            assert (a.samples, a.batches, a.batch_size) == (50, len(parts), 16)
            np.testing.assert_allclose(
                one,
                np.concatenate([np.concatenate([s.mean, s.variance]) for s in a.values()]),
                rtol=1e-6,
            )
        [expected] = networks.in_training(networks.residual, model, x, [slice(None)])
        networks.assert_statistics(a, expected)


FAIL = """
held = model.get_weights()
for method in ["pooled", "exact"]:
    for case in ["nan", "argument", "nothing"]:
        part, options = shard(20), {}
        if case == "nothing":
            part = part[:0]
        if case == "nan" and me == 1:
            part = part.copy()
            part[17] = np.nan
        if case == "argument" and me == 1:
            options = {"steps": 99}
        try:
            tfbn.update_population_stats(
                model, part, method=method, batch_size=8, verbose=0, **options
            )
        except Exception as error:
            print(f"{me}/{method}/{case}/{type(error).__name__}/{error}", flush=True)
assert all(np.array_equal(a, b) for a, b in zip(held, model.get_weights()))
stats = tfbn.collect(model, shard(20), batch_size=8, verbose=0)
print(f"{me}/{stats.samples}")
"""


@pytest.mark.slow
def test_an_error_of_one_worker_is_an_error_of_all(tmp_path):
    statuses, printed = run_workers(tmp_path, FAIL)
    assert statuses == [0, 0], printed
    first, second = (
        [line for line in text.splitlines() if line.startswith(f"{i}/")]
        for i, text in enumerate(printed)
    )
    for method in ("pooled", "exact"):
        for case, words in [("nan", "batch 2 "), ("argument", "steps=99")]:
            [ours] = [line for line in first if line.startswith(f"0/{method}/{case}/")]
            [theirs] = [line for line in second if line.startswith(f"1/{method}/{case}/")]
            assert "/RuntimeError/" in ours and "worker 1" in ours and words in ours
            assert "/ValueError/" in theirs and words in theirs
        for i, lines in enumerate((first, second)):
            [line] = [line for line in lines if line.startswith(f"{i}/{method}/nothing/")]
            assert "Expected data with at least one batch" in line
    assert first[-1] == "0/50" and second[-1] == "1/50"  # Both workers can continue.


DIE = """
def batches():
    for i in range(0, 25, 5):
        if me == 1 and i == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x[i : i + 5]
held = model.get_weights()
start = time.monotonic()
try:
    tfbn.update_population_stats(
        model, batches(), method="exact", verbose=0
    ).save(out / "stats.npz")
except RuntimeError as error:
    print(f"after {time.monotonic() - start:.0f} s: {error}")
assert all(np.array_equal(a, b) for a, b in zip(held, model.get_weights()))
"""


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_of_the_others(tmp_path):
    start = time.monotonic()
    statuses, printed = run_workers(tmp_path, DIE)
    assert statuses == [0, -signal.SIGKILL], printed
    assert "Expected all 2 workers" in printed[0] and "Start all workers again" in printed[0]
    assert os.listdir(tmp_path) == []
    assert time.monotonic() - start < 100


INTERRUPT = """
if me == 0:
    # A shell's background job, and what it starts, ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # While the other is away.
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        tfbn.collect(model, x, verbose=0)
    except KeyboardInterrupt:
        print(f"interrupted: {time.monotonic() - start < 4}")
else:
    time.sleep(6)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_for_other_workers(tmp_path):
    _, printed = run_workers(tmp_path, INTERRUPT)
    assert "interrupted: True" in printed[0]


RESUME = """
from tfbn.sweep import checkpoint
checkpoint.Checkpoint.share = float("inf")
dies = (out / "first").exists()
read = 0
class Data(keras.utils.PyDataset):
    def __len__(self):
        return [4, 3][me]
    def __getitem__(self, i):
        global read
        read += 1
        # Two readings at the start look for a shuffle. Three batches make a level.
        if dies and me == 1 and read == 2 + 3 + 2:
            shutil.copy(out / "c.1", out / "second_level")
        if dies and me == 1 and read == 2 + 6 + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return shard(28)[8 * i : 8 * i + 8], None
try:
    stats = tfbn.collect(
        model, Data(), method="exact", memory_limit=0, checkpoint=out / "c", verbose=0
    )
except RuntimeError as error:
    print(error)
else:
    stats.save(out / f"stats_{me}.npz")
    model.save(out / f"model_{me}.keras")
"""


@pytest.mark.slow
def test_workers_go_on_from_their_checkpoints(tmp_path):
    (tmp_path / "first").touch()
    statuses, printed = run_workers(tmp_path, RESUME)
    assert statuses == [0, -signal.SIGKILL], printed
    (tmp_path / "first").unlink()
    assert sorted(os.listdir(tmp_path)) == ["c.0", "c.1", "second_level"]
    # As if the second worker had died before it saved any of the third level.
    os.replace(tmp_path / "second_level", tmp_path / "c.1")
    statuses, printed = run_workers(tmp_path, RESUME)
    assert statuses == [0, 0], printed
    names = ["model_0.keras", "model_1.keras", "stats_0.npz", "stats_1.npz"]
    assert sorted(os.listdir(tmp_path)) == names
    a, b = (tfbn.PopulationStats.load(tmp_path / f"stats_{i}.npz") for i in (0, 1))
    assert a == b and a.samples == 50
    model = keras.models.load_model(tmp_path / "model_0.keras")
    x = networks.data(model, 50)
    [expected] = networks.in_training(networks.residual, model, x, [slice(None)])
    networks.assert_statistics(a, expected)


EMPTY = """
class PartlyFrozen(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (keras.layers.BatchNormalization() for _ in range(3))
    def call(self, inputs, training=None):
        x = self.two(self.one(inputs, training=training), training=False)
        return self.three(x, training=training)

with strategy.scope():
    partly = PartlyFrozen()
    partly(np.zeros((2, 4), "f"))
    noise = [networks.Drawing("generator"), keras.layers.BatchNormalization()]
    noisy = keras.Sequential([keras.Input((8,)), *noise])
x = np.random.default_rng(0).normal(size=(50, 4)).astype("f")
for order, ends in enumerate([(0, 0), (0, 50), (50, 50), (0, 20), (20, 20), (20, 50)]):
    for method in ["exact", "pooled"]:
        for name in ["all", "checkpoint"] if method == "exact" else ["all"]:
            options = {"checkpoint": out / "c", "memory_limit": 0} if name == "checkpoint" else {}
            stats = tfbn.collect(
                partly, shard(*ends), method=method, batch_size=10, verbose=0, **options
            )
            assert list(stats) == [partly.one.name, partly.three.name], (order, method)
            stats.save(out / f"{method}_{name}_{order}_{me}.npz")
stats = tfbn.collect(noisy, np.zeros((1000, 8), "f"), batch_size=10, verbose=0)
stats.save(out / f"noise_{me}.npz")
"""


@pytest.mark.slow
def test_workers_without_data_in_any_place_and_workers_with_equal_batches(tmp_path):
    statuses, printed = run_workers(tmp_path, EMPTY, count=3)
    assert statuses == [0, 0, 0], printed
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("f").astype("d")
    behind = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) / np.sqrt(1 + 1e-3)
    for path in tmp_path.glob("exact_*.npz"):
        stats = tfbn.PopulationStats.load(path)
        assert stats.samples == 50, path
        for actual, values in zip(stats.values(), (x, behind), strict=True):
            networks.assert_layer(actual, values.mean(0), values.var(0), 1e-4)
    # 3,000 draws per channel: a standard error of 0.018.
    [noise] = tfbn.PopulationStats.load(tmp_path / "noise_0.npz").values()
    np.testing.assert_allclose(noise.mean, 0, atol=0.08)
    assert np.all(noise.mean_error > 0.01)


SAMPLE = """
class Data(keras.utils.PyDataset):
    def __len__(self):
        return 100 if me < 2 else 0
    def __getitem__(self, i):
        with open(out / f"read_{me}", "a") as file:
            print(i, file=file)
        return np.random.default_rng([me, i]).normal(i, 1, (4, 1)).astype("f")

with strategy.scope():
    alone = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
stats = tfbn.collect(alone, Data(), tolerance=0.1, verbose=0)
stats.save(out / f"stats_{me}.npz")
"""


@pytest.mark.slow
def test_workers_draw_samples_from_unlike_places(tmp_path):
    """One worker may have no data."""
    statuses, printed = run_workers(tmp_path, SAMPLE, count=3)
    assert statuses == [0, 0, 0], printed
    a, b, c = (tfbn.PopulationStats.load(tmp_path / f"stats_{i}.npz") for i in range(3))
    assert a == b == c and a.relative_error <= 0.1
    [actual] = a.values()
    assert abs(actual.mean[0] - 49.5) < 4 * actual.mean_error[0]
    first, second = ((tmp_path / f"read_{i}").read_text().split()[:10] for i in range(2))
    assert first != second and len(set(first)) == 10
