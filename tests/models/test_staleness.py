import keras
import numpy as np
from keras import layers

import tfbn
from tfbn.models import staleness
from tfbn.serving import sweeps


def names(model):
    """Return path -> names of the variables upstream."""
    name_of = {id(variable): variable.path for variable in model.variables}
    return {
        path: {name_of[one] for one in variables}
        for path, variables in staleness.upstream_variables(model).items()
    }


def test_a_layer_depends_on_the_weights_before_it_alone():
    inputs = keras.Input((3,))
    left = layers.Dense(2, name="left")(inputs)
    left = layers.BatchNormalization(name="bn_left")(left)
    right = layers.BatchNormalization(name="bn_right")(layers.Dense(2, name="right")(inputs))
    both = layers.BatchNormalization(name="bn_both")(layers.Add()([left, right]))
    model = keras.Model(inputs, layers.Dense(1, name="head")(both))
    actual = names(model)
    assert actual["bn_left"] == {"left/kernel", "left/bias"}
    assert actual["bn_right"] == {"right/kernel", "right/bias"}
    assert actual["bn_both"] == {
        f"{layer}/{name}"
        for layer in ("left", "right", "bn_left", "bn_right")
        for name in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
        if (name in ("kernel", "bias")) == (layer in ("left", "right"))
    }


def test_inside_a_loop_every_weight_counts():
    norm = layers.BatchNormalization(name="bn")
    cell = layers.RNN(Cell(norm), name="rnn")
    model = keras.Sequential([keras.Input((4, 2)), cell, layers.Dense(1, name="head")])
    [actual] = names(model).values()
    assert actual == {variable.path for variable in model.variables}


class Cell(layers.Layer):
    """Normalize the sum of input and state."""

    state_size = output_size = 2

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def build(self, shape):
        self.norm.build(shape)

    def call(self, inputs, states, training=None):
        output = self.norm(inputs + states[0], training=training)
        return output, [output]


def test_a_model_that_cannot_be_traced_without_data_gives_nothing():
    class Unknown(keras.Model):
        """Record no input."""

    assert staleness.upstream_variables(Unknown()) is None


def test_a_sweep_and_the_records_of_layers_are_judged_alike():
    """`PopulationStats.mismatch` and `sweeps.sweep_of` name the same difference."""
    norm = layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="dense"), norm])
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    stats = tfbn.collect(model, x, verbose=0)
    stats.assign(model)
    assert stats.mismatch(model) is None and sweeps.sweep_of(model).stale is None
    kernel = model.layers[0].kernel
    kernel.assign(kernel + 1)
    assert stats.mismatch(model) == "the weights have changed since the sweep"
    assert sweeps.sweep_of(model).stale.startswith(f"{stats.mismatch(model)}: {kernel.path!r}")
    norm.moving_variance.assign(norm.moving_variance + 1)
    assert stats.mismatch(model) == "moving_variance of layer 'bn' has changed since the sweep"
    assert sweeps.sweep_of(model).stale == stats.mismatch(model)
