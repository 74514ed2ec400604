"""Tests of samples drawn in one process."""

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn


@pytest.mark.parametrize("method", ["exact", "pooled", "algorithm2"])
def test_a_sample_of_sorted_data_is_as_close_as_it_was_asked_to_be(
    model, digits, population, method
):
    stats = tfbn.collect(model, digits, method=method, batch_size=16, tolerance=0.03, verbose=0)
    assert 320 <= stats.samples < len(digits)
    assert stats.relative_error <= stats.tolerance == 0.03
    assert stats.population_size == len(digits)
    assert networks.off(stats, population) < 3 * 0.03
    again = tfbn.collect(model, digits, method=method, batch_size=16, tolerance=0.03, verbose=0)
    assert again == stats


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_all_of_the_data_has_no_error_left(model, digits, population, method):
    """The population is the data."""
    stats = tfbn.collect(model, digits[:200], method=method, tolerance=1e-6, verbose=0)
    assert stats.samples == stats.population_size == 200
    assert stats.relative_error == 0
    if method == "exact":
        everything = tfbn.collect(model, digits[:200], verbose=0)
        for path, layer in stats.items():
            np.testing.assert_allclose(layer.mean, everything[path].mean, atol=1e-5)


def test_a_stream_that_ends_first_is_swept_whole(model, digits, capsys):
    dataset = tf.data.Dataset.from_tensor_slices(digits[::3]).batch(16)
    stats = tfbn.collect(model, dataset, tolerance=1e-4, verbose=0)
    whole = tfbn.collect(model, dataset, verbose=0)
    assert stats.samples == whole.samples and stats.population_size == 0
    for path, layer in stats.items():
        np.testing.assert_allclose(layer.mean, whole[path].mean, atol=1e-6)
    stats.summary()
    assert "tolerance=0.0001 (not reached)" in capsys.readouterr().out


def shuffled(digits):
    """Return data with a new order and new noise in every iteration."""
    dataset = tf.data.Dataset.from_tensor_slices(digits).shuffle(2000).batch(16)
    return dataset.map(lambda x: x + tf.random.normal(tf.shape(x), stddev=0.01))


@pytest.mark.parametrize("source", ["generator", "shuffled", "endless"])
def test_all_levels_see_the_same_sample_of_any_stream(model, digits, population, source):
    order = np.random.default_rng(0).permutation(len(digits))
    x = {
        "generator": lambda: (digits[part] for part in np.array_split(order, 110)),
        "shuffled": lambda: shuffled(digits),
        "endless": lambda: shuffled(digits).repeat(),
    }[source]()
    stats = tfbn.collect(model, x, tolerance=0.05, verbose=0)
    assert stats.samples < len(digits) and stats.levels == 3
    assert networks.off(stats, population) < 3 * 0.05


def test_only_the_sample_is_read(model, digits):
    read = []
    order = np.random.default_rng(0).permutation(len(digits))

    def batches():
        for i in range(0, len(digits), 16):
            read.append(i)
            yield digits[order[i : i + 16]]

    stats = tfbn.collect(model, batches(), tolerance=0.1, verbose=0)
    assert len(read) == stats.batches == 20


def test_a_sample_that_does_not_fit_is_read_again_or_refused(model, digits):
    order = np.random.default_rng(0).permutation(len(digits))
    dataset = tf.data.Dataset.from_tensor_slices(digits[order]).batch(16)
    read = []

    class Counted:
        def __iter__(self):
            for batch in dataset:
                read.append(None)
                yield batch

    stats = tfbn.collect(model, Counted(), tolerance=0.05, verbose=0)
    assert len(read) == stats.batches
    read.clear()
    tfbn.collect(model, Counted(), tolerance=0.05, memory_limit=5000, verbose=0)
    assert len(read) >= 2 * stats.batches
    small = tfbn.collect(model, dataset, tolerance=0.05, memory_limit=5000, verbose=0)
    large = tfbn.collect(model, dataset, tolerance=0.05, verbose=0)
    assert small.samples == large.samples
    for path, layer in small.items():
        np.testing.assert_allclose(layer.mean, large[path].mean, atol=1e-5)
    with pytest.raises(ValueError, match="memory_limit=5000"):
        tfbn.collect(model, iter(dataset), tolerance=0.05, memory_limit=5000, verbose=0)


def test_batches_of_one_have_errors_behind_the_first_layer(model, digits, population):
    stats = tfbn.collect(model, digits, batch_size=1, tolerance=0.1, verbose=0)
    assert all((layer.mean_error > 0).all() for layer in stats.values())
    assert networks.off(stats, population) < 4 * 0.1


def test_steps_bound_the_data_that_is_sampled():
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization(name="bn")])
    x = np.random.default_rng(0).normal(size=(64000, 1)).astype("float32")
    x[3200:] += 100
    stats = tfbn.collect(model, x, steps=100, tolerance=0.05, verbose=0)
    assert stats.population_size == 3200 and abs(stats["bn"].mean[0]) < 0.3
    shards = tfbn.collect_shards(model, [x, x], steps=100, tolerance=0.05, verbose=0)
    assert shards.population_size == 6400 and abs(shards["bn"].mean[0]) < 0.3
