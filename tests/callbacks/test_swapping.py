"""Tests of `tfbn.population_stats`."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.callbacks import swapping

X = np.random.default_rng(0).normal(3, 2, (24, 6)).astype("float32")


def build():
    """Build a network with batch norm on its inputs."""
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(), layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def values_of(model):
    """Return all values, on every device."""
    results = model.distribute_strategy.experimental_local_results
    return [v.numpy() for w in model.weights for v in results(w.value)]


def assert_population(model):
    """Compute the loss with NumPy in float64."""
    networks.assert_layer(model.layers[0], X.astype("float64").mean(0), X.astype("float64").var(0))


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_custom_loop(devices, two_devices):
    if devices == 2:
        with two_devices.scope():
            model = build()
    else:
        model = build()
    for _ in range(2):
        model.fit(X, X[:, :1], verbose=0)
        before = values_of(model)
        with tfbn.population_stats(model, X, verbose=0) as stats:
            assert_population(model)
            model.evaluate(X, X[:, :1], verbose=0)
            assert stats.samples == len(X)
            with swapping.swapped_out(model):
                networks.assert_same(before, values_of(model))
            assert_population(model)
        networks.assert_same(before, values_of(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_moving_averages_are_restored_after_an_error(error):
    model = build()
    before = values_of(model)
    with pytest.raises(error), tfbn.population_stats(model, X, method="pooled", verbose=0):
        assert_population(model)
        raise error
    networks.assert_same(before, values_of(model))
    with (
        pytest.raises(ValueError, match="NaN"),
        tfbn.population_stats(model, X * np.nan, verbose=0),
    ):
        raise AssertionError("the block must not run")
    networks.assert_same(before, values_of(model))


def test_blocks_nest():
    model = build()
    before = values_of(model)
    with tfbn.population_stats(model, X, verbose=0):
        with tfbn.population_stats(model, X[:8], verbose=0) as stats:
            np.testing.assert_allclose(model.layers[0].moving_mean, X[:8].mean(0), rtol=1e-5)
            [moving] = stats.previous.values()
            np.testing.assert_array_equal(moving.mean, before[2])
        assert_population(model)
    networks.assert_same(before, values_of(model))
