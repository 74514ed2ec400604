"""Tests of observed calls: every call of every batch norm layer, in any model."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_calls_of_a_shared_layer_are_pooled(method):
    shared = layers.BatchNormalization()
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], layers.Add()([shared(a), shared(b)]))
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(20, 3)).astype("f"), rng.normal(2, 3, size=(20, 3)).astype("f")]
    [stats] = tfbn.collect(model, x, method=method, batch_size=8, verbose=0).values()
    both = np.concatenate(x).astype(np.float64)
    assert stats.count == 40
    networks.assert_layer(stats, both.mean(0), both.var(0))


@pytest.mark.parametrize("steps", [3, None])
@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_time_distributed(method, steps):
    bn = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((steps, 4)), layers.TimeDistributed(bn)])
    x = np.random.default_rng(0).normal(3, 2, size=(21, 3, 4)).astype("f")
    [stats] = tfbn.collect(model, x, method=method, batch_size=8, verbose=0).values()
    networks.assert_layer(stats, x.astype("d").mean((0, 1)), x.astype("d").var((0, 1)))


@pytest.mark.parametrize("method", ["pooled", "algorithm2", "exact"])
def test_masked_positions_do_not_count(method):
    x = np.random.default_rng(0).normal(2, 3, size=(13, 6, 2)).astype("f")
    lengths = np.arange(13) % 6 + 1
    kept = np.arange(6) < lengths[:, None]
    x[~kept] = 0
    model = keras.Sequential([keras.Input((6, 2)), layers.Masking(), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, x, method=method, batch_size=13, verbose=0).values()
    values = x[kept].astype(np.float64)
    n = len(values)
    assert stats.count == n
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-5)
    unbiased = n / (n - 1) if method == "algorithm2" else 1
    np.testing.assert_allclose(stats.variance, values.var(0) * unbiased, rtol=1e-5)


class Doubling(layers.BatchNormalization):
    """A subclass that doubles the result of `super().call`."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def test_what_a_subclass_adds_is_kept():
    model = keras.Sequential([keras.Input((3,)), Doubling(), layers.BatchNormalization()])
    x = networks.data(model, 40)
    _, last = tfbn.collect(model, x, method="exact", batch_size=7, verbose=0).values()
    v = x.astype(np.float64)
    np.testing.assert_allclose(last.variance, 4 * v.var(0) / (v.var(0) + 1e-3), rtol=1e-5)


class Ignoring(layers.BatchNormalization):
    """A subclass that does not call `super().call`."""

    def call(self, inputs, training=None, mask=None):
        return inputs


def test_a_layer_that_cannot_be_observed_is_an_error():
    model = keras.Sequential(
        [keras.Input((3,)), Ignoring(name="mine"), layers.BatchNormalization()]
    )
    with pytest.raises(ValueError, match=r"Ignoring.call to call super.*'mine'"):
        tfbn.collect(model, networks.data(model, 4), verbose=0)
    with pytest.raises(RuntimeError, match=r"Ignoring.call to call super.*'mine'"):
        tfbn.collect_shards(model, [networks.data(model, 4)], verbose=0)
    model.layers[0].trainable = False  # `Doubling` calls it.
    x = networks.data(model, 40)
    [stats] = tfbn.collect(model, x, verbose=0).values()
    networks.assert_layer(stats, x.astype("d").mean(0), x.astype("d").var(0))


def test_duplicate_names_in_nested_models_do_not_collide():
    block = [keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")], name="b")]
    block.append(
        keras.Sequential([keras.Input((2,)), layers.BatchNormalization(name="bn")], name="b")
    )

    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = block

        def call(self, x):
            return self.blocks[0](x) + self.blocks[1](10 * x)

    model = Both()
    x = np.random.default_rng(0).normal(size=(40, 2)).astype("f")
    model(x)
    one, two = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(two.variance, 100 * one.variance, rtol=1e-5)


def test_a_layer_compiled_before_the_sweep_is_observed_and_left_as_it_was():
    model = keras.Sequential([keras.Input((3,)), networks.Compiled(layers.BatchNormalization)])
    x = networks.data(model, 40)
    before = model(x).numpy()
    trained = model(x, training=True).numpy()
    model.layers[0].bn.moving_mean.assign(np.zeros(3))
    model.layers[0].bn.moving_variance.assign(np.ones(3))
    [stats] = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(stats.variance, x.astype("d").var(0), rtol=1e-5)
    np.testing.assert_array_equal(model(x), before)
    np.testing.assert_array_equal(model(x, training=True), trained)


@pytest.mark.quick(2)
@pytest.mark.parametrize("bn", [tfbn.BatchNormalization, layers.BatchNormalization])
@pytest.mark.parametrize(
    ("dtype", "method"), [("uint8", "exact"), ("bool", "pooled"), ("int32", "exact")]
)
def test_integers_straight_into_batch_norm(bn, dtype, method):
    inputs = keras.Input((5,), dtype=dtype)
    model = keras.Model(inputs, bn()(bn()(inputs)))
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, (40, 5)).astype(dtype)
    first, second = tfbn.collect(model, x, method=method, batch_size=40, verbose=0).values()
    values = x.astype("d")
    networks.assert_layer(first, values.mean(0), values.var(0))
    np.testing.assert_allclose(second.variance, values.var(0) / (values.var(0) + 1e-3), rtol=1e-4)


def test_two_layers_under_one_mask_without_a_reader_between_them():
    def build(bn=layers.BatchNormalization):
        inputs = keras.Input((6, 3))
        x = layers.Masking()(inputs)
        return keras.Model(inputs, bn()(bn()(x)))

    model = build()
    x = networks.normal(30, 6, 3, loc=2, scale=3)
    kept = np.arange(6) < (np.arange(30) % 6 + 1)[:, None]
    x[~kept] = 0
    for memory_limit in (0, 10**9):
        for batch_size in (4, 30):
            first, second = tfbn.collect(
                model, x, batch_size=batch_size, memory_limit=memory_limit, verbose=0
            ).values()
            values = x[kept].astype("d")
            assert first.count == second.count == len(values)
            networks.assert_layer(first, values.mean(0), values.var(0))
            std = np.sqrt(values.var(0) + 1e-3)
            networks.assert_layer(second, 0, values.var(0) / std**2)
