"""Tests of passes that run the whole network."""

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

SAMPLES = 37


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_run_eagerly_gives_the_same(method):
    model = networks.residual(layers.BatchNormalization)
    x = networks.data(model, SAMPLES)
    graph = tfbn.collect(model, x, method=method, batch_size=16, verbose=0)
    model.compile(run_eagerly=True)
    eager = tfbn.collect(model, x, method=method, batch_size=16, verbose=0)
    for drift in graph.compare(eager).values():
        assert drift["mean_shift_max"] < 1e-5
        assert drift["std_ratio_max"] < 1 + 1e-5


class Eager(keras.Model):
    """Branches on tensor values in Python, so it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)
        self.first, self.second = layers.BatchNormalization(), layers.BatchNormalization()

    def call(self, x, training=None):
        x = self.first(self.dense(x), training=training)
        return self.second(x if float(x[0, 0]) > 1e9 else tf.nn.relu(x), training=training)


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_model_that_only_runs_eagerly(method):
    model = Eager()
    model.compile(run_eagerly=True)
    x = np.random.default_rng(0).normal(2, 3, (40, 4)).astype("float32")
    model(x)
    first, second = tfbn.collect(model, x, method=method, batch_size=40, verbose=0).values()
    h = np.asarray(model.dense(x), "float64")
    networks.assert_layer(first, h.mean(0), h.var(0), 1e-4)
    h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3), 0)
    networks.assert_layer(second, h.mean(0), h.var(0), 1e-4)
    with pytest.raises(ValueError, match="in batch 1"):
        tfbn.collect(model, iter([x, np.full_like(x, np.nan)]), method=method, verbose=0)
