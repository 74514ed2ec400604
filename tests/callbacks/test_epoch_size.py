"""Tests of the warning about a sweep of less data than an epoch."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import tfbn

X = np.random.default_rng(0).normal(3, 2, (640, 6)).astype("float32")


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("swept", [16, 640])
def test_samples_are_counted_on_all_devices(swept, mirrored, two_devices):
    """Every device counts its part of a batch."""
    with two_devices.scope() if mirrored else contextlib.nullcontext():
        model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(), layers.Dense(1)])
        model.compile("sgd", "mse")
    callback = tfbn.PopulationStatsCallback(X[:swept], verbose=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, X[:, :1], verbose=0, callbacks=[callback])
    told = [str(w.message) for w in caught if "an epoch of `fit` at least 640" in str(w.message)]
    assert len(told) == (swept < 640)
    np.testing.assert_allclose(
        np.asarray(next(iter(callback.stats.values())).mean),
        X[:swept].mean(0, dtype=np.float64),
        rtol=1e-5,
    )
