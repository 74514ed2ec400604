"""Tests of sweeps on several devices and by several workers."""

import collections
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.models.keras_models import batch_norm_layers

HERE = pathlib.Path(__file__).parents[1]
METHODS = ["pooled", "exact"]  # "algorithm2" runs as "pooled" does.


def on_devices(strategy, build):
    """A network with a replica on each device, and one of the same weights on one device."""
    with strategy.scope():
        model = build(tfbn.BatchNormalization)
    alone = build(tfbn.BatchNormalization)
    alone.set_weights(model.get_weights())
    return model, alone


# Several devices.


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("build", "method"),
    [(networks.residual, method) for method in METHODS]
    + [(networks.branching, "exact"), (networks.subclassed, "exact")],
)
def test_two_devices_give_what_one_gives(build, method, two_devices):
    model, alone = on_devices(two_devices, build)
    x = networks.data(model, 37)
    for batch_size in (16, 37):  # A remainder of 5; a single batch, so one device has nothing.
        options = {"method": method, "batch_size": batch_size, "verbose": 0}
        found = tfbn.collect(model, x, **options)
        networks.assert_statistics(found, tfbn.collect(alone, x, **options), 1e-6)
        assert found.samples == 37
    if method == "exact":
        [expected] = networks.in_training(build, alone, x, [slice(None)])
        path_of = {id(layer): path for path, layer in batch_norm_layers(model).items()}
        for layer, (mean, variance) in zip(networks.batch_norms(model), expected, strict=True):
            ours = found[path_of[id(layer)]]
            assert np.all(np.abs(ours.mean - mean) <= 1e-4 * np.sqrt(variance))
            np.testing.assert_allclose(ours.variance, variance, rtol=1e-4)


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory_limit", [0, None])
def test_each_device_runs_its_own_replica(method, memory_limit, two_devices):
    # Replicas with different weights, unlike after training, show which one has run a batch.
    def build(bn):
        return keras.Sequential([keras.Input((3,)), layers.Dense(3), bn(), bn()])

    model, _ = on_devices(two_devices, build)
    first, second = two_devices.experimental_local_results(model.layers[0].kernel.value)
    second.assign(first.numpy() * 3)
    x = networks.data(model, 24)
    found = tfbn.collect(
        model, x, method=method, batch_size=8, memory_limit=memory_limit, verbose=0
    )
    entered = x.astype("d") @ first.numpy().astype("d")
    entered[8:16] *= 3  # The second batch, on the second device.
    stats = next(iter(found.values()))
    np.testing.assert_allclose(stats.mean, entered.mean(0), rtol=1e-5)
    if method == "algorithm2":
        expected = entered.reshape(3, 8, 3).var(1, ddof=1).mean(0)
    else:
        expected = entered.var(0)
    np.testing.assert_allclose(stats.variance, expected, rtol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_distributed_dataset_comes_in_the_batches_of_the_replicas(method, two_devices):
    model, alone = on_devices(two_devices, networks.plain)
    # Batches of 20 come as 10 and 10; the last sample, where there may be one, as 1 and none.
    x = networks.data(model, 40 if method == "algorithm2" else 41)
    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x)))).batch(20)
    parts = [x[i : i + 10] for i in range(0, len(x), 10)]
    found = tfbn.collect(
        model, two_devices.experimental_distribute_dataset(dataset), method=method, verbose=0
    )
    expected = tfbn.collect(alone, iter(parts), method=method, verbose=0)
    networks.assert_statistics(found, expected, 1e-6)
    assert found.batches == len(parts) and found.samples == sum(map(len, parts))


def test_a_distributed_dataset_that_does_not_end(two_devices):
    model, _ = on_devices(two_devices, networks.plain)
    dataset = tf.data.Dataset.from_tensor_slices(networks.data(model, 40)).batch(20).repeat()
    endless = two_devices.experimental_distribute_dataset(dataset)
    with pytest.raises(ValueError, match=r"endless tf\.distribute\.DistributedDataset"):
        tfbn.collect(model, endless)
    stats = tfbn.collect(model, endless, steps=3, verbose=0)
    assert (stats.samples, stats.batches, stats.batch_size) == (60, 6, 10)


@pytest.mark.parametrize("eager", [False, True])
def test_two_devices_where_the_graph_cannot_be_cut(eager, two_devices):
    with two_devices.scope():
        model = networks.Looped()
        model(np.zeros((2, 3, 4)))
    model.run_eagerly = eager
    x = np.random.default_rng(0).normal(3, 2, size=(20, 3, 4)).astype("f")
    stats = tfbn.collect(model, x, method="exact", batch_size=3, verbose=0)
    entered = x.astype("d")
    normalized = (entered - entered.mean((0, 1))) / np.sqrt(entered.var((0, 1)) + 1e-3)
    for found, values in zip(stats.values(), (entered, normalized), strict=True):
        np.testing.assert_allclose(found.mean, values.mean((0, 1)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.variance, values.var((0, 1)), rtol=1e-5)


@pytest.mark.slow
def test_data_that_ends_in_another_thread_is_no_error_of_a_sweep(two_devices):
    # While an iterator ends, TensorFlow gives its "End of sequence" to any operation, outside a
    # function, that copies between devices at the time. The sweep reads ahead while devices work.
    with two_devices.scope():
        inputs = [keras.Input((4,)) for _ in range(20)]
        model = keras.Model(inputs, tfbn.BatchNormalization()(layers.Concatenate()(inputs)))
    data, done = tf.data.Dataset.range(3), threading.Event()

    def end_again_and_again():
        while not done.is_set():
            collections.deque(data, maxlen=0)

    thread = threading.Thread(target=end_again_and_again)
    thread.start()
    try:
        x = [np.zeros((10_000, 4), np.float32)] * 20
        tfbn.collect(model, x, batch_size=2, method="exact", verbose=0)
    finally:
        done.set()
        thread.join()


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_an_error_on_a_device_leaves_the_model_as_it_was(method, fails_at, two_devices):
    model, _ = on_devices(two_devices, networks.plain)
    x = networks.data(model, 20)
    x[4 * fails_at] = np.nan
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(ValueError, match=f"batch {fails_at} .*holds NaN or Inf"):
        tfbn.update_population_stats(model, x, method=method, batch_size=4, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Several workers.

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
    # Training left each of them its own moving averages.
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
        for found, (mean, variance) in zip(a.values(), expected, strict=True):
            np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.variance, variance, rtol=1e-4)


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
    assert first[-1] == "0/50" and second[-1] == "1/50"  # And they can go on.


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
checkpoint._SHARE = float("inf")
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
    for found, (mean, variance) in zip(a.values(), expected, strict=True):
        np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.variance, variance, rtol=1e-4)


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
        for found, values in zip(stats.values(), (x, behind), strict=True):
            np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-5)
            np.testing.assert_allclose(found.variance, values.var(0), rtol=1e-4)
    # 3,000 draws a channel: a standard error of 0.018.
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
    """Also if one of them has no data."""
    statuses, printed = run_workers(tmp_path, SAMPLE, count=3)
    assert statuses == [0, 0, 0], printed
    a, b, c = (tfbn.PopulationStats.load(tmp_path / f"stats_{i}.npz") for i in range(3))
    assert a == b == c and a.relative_error <= 0.1
    [found] = a.values()
    assert abs(found.mean[0] - 49.5) < 4 * found.mean_error[0]
    first, second = ((tmp_path / f"read_{i}").read_text().split()[:10] for i in range(2))
    assert first != second and len(set(first)) == 10
