"""Sweeps on several devices of one process."""

import collections
import threading

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.models.keras_models import batch_norm_layers

METHODS = ["pooled", "exact"]  # "algorithm2" runs as "pooled" does.


def on_devices(strategy, build):
    """Return a network with a replica per device, and a copy on one device."""
    with strategy.scope():
        model = build(tfbn.BatchNormalization)
    alone = build(tfbn.BatchNormalization)
    alone.set_weights(model.get_weights())
    return model, alone


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("build", "method"),
    [(networks.residual, method) for method in METHODS]
    + [(networks.branching, "exact"), (networks.subclassed, "exact")],
)
def test_two_devices_give_what_one_gives(build, method, two_devices):
    model, alone = on_devices(two_devices, build)
    x = networks.data(model, 37)
    for batch_size in (16, 37):  # A remainder of 5; a single batch, so one device is idle.
        options = {"method": method, "batch_size": batch_size, "verbose": 0}
        actual = tfbn.collect(model, x, **options)
        networks.assert_statistics(actual, tfbn.collect(alone, x, **options), 1e-6)
        assert actual.samples == 37
    if method == "exact":
        [expected] = networks.in_training(build, alone, x, [slice(None)])
        path_of = {id(layer): path for path, layer in batch_norm_layers(model).items()}
        for layer, (mean, variance) in zip(networks.batch_norms(model), expected, strict=True):
            ours = actual[path_of[id(layer)]]
            assert np.all(np.abs(ours.mean - mean) <= 1e-4 * np.sqrt(variance))
            np.testing.assert_allclose(ours.variance, variance, rtol=1e-4)


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory_limit", [0, None])
def test_each_device_runs_its_own_replica(method, memory_limit, two_devices):
    # Different weights, which training never produces, show which replica ran a batch.
    def build(bn):
        return keras.Sequential([keras.Input((3,)), layers.Dense(3), bn(), bn()])

    model, _ = on_devices(two_devices, build)
    first, second = two_devices.experimental_local_results(model.layers[0].kernel.value)
    second.assign(first.numpy() * 3)
    x = networks.data(model, 24)
    actual = tfbn.collect(
        model, x, method=method, batch_size=8, memory_limit=memory_limit, verbose=0
    )
    entered = x.astype("d") @ first.numpy().astype("d")
    entered[8:16] *= 3  # The second batch, on the second device.
    stats = next(iter(actual.values()))
    assert np.all(np.abs(stats.mean - entered.mean(0)) <= 1e-5 * entered.std(0))
    if method == "algorithm2":
        expected = entered.reshape(3, 8, 3).var(1, ddof=1).mean(0)
    else:
        expected = entered.var(0)
    np.testing.assert_allclose(stats.variance, expected, rtol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_distributed_dataset_comes_in_the_batches_of_the_replicas(method, two_devices):
    model, alone = on_devices(two_devices, networks.plain)
    # Batches of 20 are split into 10 and 10; a last batch of one sample into 1 and 0.
    x = networks.data(model, 40 if method == "algorithm2" else 41)
    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x)))).batch(20)
    parts = [x[i : i + 10] for i in range(0, len(x), 10)]
    actual = tfbn.collect(
        model, two_devices.experimental_distribute_dataset(dataset), method=method, verbose=0
    )
    expected = tfbn.collect(alone, iter(parts), method=method, verbose=0)
    networks.assert_statistics(actual, expected, 1e-6)
    assert actual.batches == len(parts) and actual.samples == sum(map(len, parts))


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
    for actual, values in zip(stats.values(), (entered, normalized), strict=True):
        networks.assert_layer(actual, values.mean((0, 1)), values.var((0, 1)))


@pytest.mark.slow
def test_data_that_ends_in_another_thread_is_no_error_of_a_sweep(two_devices):
    # While an iterator ends, TensorFlow raises its "End of sequence" in any operation outside a
    # function that copies between devices at the time. The sweep prefetches while devices compute.
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
