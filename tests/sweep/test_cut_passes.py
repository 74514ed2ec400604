"""Tests of passes over a network that is cut into levels."""

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn


class CalledTwice(keras.Model):
    """The second call of the first layer depends on the second layer."""

    def __init__(self):
        super().__init__()
        self.a = layers.BatchNormalization(name="a")
        self.b = layers.BatchNormalization(name="b")

    def call(self, x, training=None):
        first = self.a(x, training=training)
        behind = tf.nn.relu(self.b(x, training=training))
        return first + self.a(behind, training=training)


def test_a_shared_layer_whose_second_call_is_behind_another_layer():
    model = CalledTwice()
    x = np.random.default_rng(0).normal(1, 2, (40, 3)).astype("float32")
    model(x)
    stats = tfbn.collect(model, x, batch_size=7, verbose=0)
    h = x.astype("float64")
    np.testing.assert_allclose(stats["b"].mean, h.mean(0), rtol=1e-5)
    behind = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3), 0)
    both = np.concatenate([h, behind])
    networks.assert_layer(stats["a"], both.mean(0), both.var(0), 1e-4)


class Reached(keras.Model):
    """One layer is called only if the second input is a sequence."""

    def __init__(self):
        super().__init__()
        self.first = layers.BatchNormalization(name="first")
        self.second = layers.BatchNormalization(name="second")

    def call(self, inputs, training=None):
        x = tf.nn.relu(self.first(inputs["x"], training=training))
        return self.second(x, training=training) if len(inputs["kind"].shape) == 3 else x


def with_kind(x, sequence):
    """Return inputs for `Reached`."""
    return {"x": x, "kind": np.zeros((len(x), 2, 3) if sequence else (len(x), 2), "float32")}


def reached(build=Reached):
    """Build the model."""
    model = build()
    model(with_kind(np.ones((2, 3), "float32"), True))
    return model


def test_batches_that_reach_fewer_levels():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    batches = [with_kind(x[:5], False), with_kind(x[5:15], True), with_kind(x[15:], False)]
    stats = tfbn.collect(reached(), iter(batches), verbose=0)
    every = x.astype("float64")
    np.testing.assert_allclose(stats["first"].mean, every.mean(0), atol=1e-6)
    behind = np.maximum((every[5:15] - every.mean(0)) / np.sqrt(every.var(0) + 1e-3), 0)
    assert (stats["first"].count, stats["second"].count) == (20, 10)
    networks.assert_layer(stats["second"], behind.mean(0), behind.var(0), 1e-4)


class Deeper(Reached):
    """Adds two levels."""

    def __init__(self):
        super().__init__()
        self.third = layers.BatchNormalization(name="third")
        self.fourth = layers.BatchNormalization(name="fourth")

    def call(self, inputs, training=None):
        x = tf.nn.relu(self.third(super().call(inputs, training), training=training))
        return self.fourth(x, training=training)


class Changing:
    """Batches that switch to the other kind in pass `since`."""

    def __init__(self, since):
        self.since = since + 1  # One more iteration checks whether the data can be read again.

    def __iter__(self):
        self.since -= 1
        return iter([with_kind(np.arange(12, dtype="float32").reshape(4, 3), self.since < 1)])


def test_batches_that_reach_other_layers_in_a_later_pass():
    # In the second pass levels differ, and the sweep restarts with the current data.
    [*_, last] = tfbn.collect(reached(Deeper), Changing(2), memory_limit=0, verbose=0)
    assert last == "fourth"
    with pytest.raises(ValueError, match="reaches layer 'second', which no batch of an earlier"):
        tfbn.collect(reached(Deeper), Changing(3), memory_limit=0, verbose=0)
    # The same data in every pass.
    stats = tfbn.collect(reached(Deeper), Changing(9), memory_limit=0, verbose=0)
    x = np.arange(12.0).reshape(4, 3)
    networks.assert_layer(stats["first"], x.mean(0), x.var(0))


def test_an_overflow_behind_a_frontier_that_was_kept():
    bn = layers.BatchNormalization
    model = keras.Sequential([keras.Input((3,)), bn(), layers.Dense(3), bn()])
    model.layers[1].kernel.assign(np.full((3, 3), 3e38))
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    with pytest.raises(ValueError, match=r"(?s)Received: in batch 0.*overflow inside the network"):
        tfbn.collect(model, x, verbose=0)


def test_draws_that_cannot_be_made_again_are_refused_only_where_they_would_have_to_be():
    model = keras.Sequential(
        [keras.Input((3,)), networks.Drawing("gamma"), layers.BatchNormalization(), layers.Dense(3)]
    )
    deep = keras.Sequential([model, layers.BatchNormalization()])
    x = np.zeros((2000, 3), "f")
    deep(x[:1])
    with pytest.raises(ValueError, match="drawn again"):
        tfbn.collect(deep, x, memory_limit=0, verbose=0)
    first, _ = tfbn.collect(deep, x, verbose=0).values()
    np.testing.assert_allclose(first.variance, 1, atol=0.3)
    # The advice.
    first, _ = tfbn.collect(deep, x, method="pooled", memory_limit=0, verbose=0).values()
    np.testing.assert_allclose(first.variance, 1, atol=0.3)
    drawing = networks.Drawing("generator")  # `keras.random` with a `SeedGenerator`.
    bns = [layers.BatchNormalization(), layers.Dense(3), layers.BatchNormalization()]
    deep = keras.Sequential([keras.Input((3,)), drawing, *bns])
    first, second = tfbn.collect(deep, x, memory_limit=0, verbose=0).values()
    np.testing.assert_allclose(first.variance, 1, atol=0.3)
    np.testing.assert_allclose(second.mean, bns[1].bias, atol=1e-4)


class Branching(keras.Model):
    """Long inputs pass the batch norm layers in another order, or pass more of them."""

    def __init__(self, swaps):
        super().__init__()
        self.one, self.two = layers.BatchNormalization(), layers.BatchNormalization()
        self.swaps = swaps

    def order(self, steps):
        if steps > 3:
            return [self.one, self.two]
        return [self.two, self.one] if self.swaps else [self.two]

    def call(self, x, training=None):
        for layer in self.order(x.shape[1]):
            x = ops.tanh(layer(x, training=training))
        return x


@pytest.mark.quick(2)
@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("short_first", [False, True])
def test_a_layer_whose_level_differs_between_signatures(swaps, shards, short_first):
    model = Branching(swaps)
    x = [networks.normal(30, 3, 2, loc=1), networks.normal(50, 6, 2, loc=-2, scale=2)]
    model(x[0]), model(x[1])
    x = x if short_first else x[::-1]
    collect = tfbn.collect_shards if shards else tfbn.collect
    if swaps:  # The statistics of each layer depend on the other.
        with pytest.raises(ValueError, match="exact statistics"):
            collect(model, x if shards else iter(x), verbose=0)
        return
    stats = collect(model, x if shards else iter(x), verbose=0)
    seen = {model.one.name: [], model.two.name: []}
    for part in x:
        value = part.astype("d")
        for layer in model.order(part.shape[1]):
            seen[layer.name].append(value.reshape(-1, 2))
            actual = stats[layer.name]
            value = np.tanh((value - actual.mean) / np.sqrt(actual.variance + layer.epsilon))
    for name, values in seen.items():
        values = np.concatenate(values)
        assert stats[name].count == len(values)
        networks.assert_layer(stats[name], values.mean(0), values.var(0), rtol=1e-4)
