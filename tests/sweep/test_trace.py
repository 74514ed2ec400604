"""Tests of traces: their signatures, and networks that cannot be traced for a sweep."""

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbn


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", ["pooled", "exact"])
@pytest.mark.parametrize("eager", [False, True])
def test_time_distributed_over_other_numbers_of_steps_in_every_batch(method, eager):
    bn, last = layers.BatchNormalization(), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((None, 4)), layers.TimeDistributed(bn), last])
    model.run_eagerly = eager
    x = np.random.default_rng(0).normal(3, 2, size=(60, 5, 4)).astype("f")
    parts = [x[20 * i : 20 * i + 20, :steps] for i, steps in enumerate((3, 2, 5))]
    stats, _ = tfbn.collect(model, iter(parts), method=method, verbose=0).values()
    values = np.concatenate([part.reshape(-1, 4) for part in parts]).astype("d")
    assert stats.count == len(values)
    networks.assert_layer(stats, values.mean(0), values.var(0))


class Vectorized(keras.Model):
    """Batch norm in a function that is vectorized over the steps."""

    def __init__(self):
        super().__init__()
        self.bn = layers.BatchNormalization()
        self.bn.build((None, 4))

    def call(self, inputs, training=None):
        return tf.vectorized_map(lambda part: self.bn(part, training=training), inputs)


def test_a_layer_in_a_vectorized_function_is_an_error():
    model = Vectorized()
    model(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"called in tf\.vectorized_map"):
        tfbn.collect(model, np.ones((20, 3, 4), "f"), verbose=0)


class Mapped(Vectorized):
    """The same with `tf.map_fn`."""

    def call(self, inputs, training=None):
        return tf.map_fn(lambda part: self.bn(part, training=training), inputs)


def test_a_layer_in_map_fn_is_swept():
    model, x = Mapped(), networks.normal(20, 3, 4, loc=1)
    model(x[:2])
    [stats] = tfbn.collect(model, x, verbose=0).values()
    networks.assert_layer(stats, x.astype("d").mean((0, 1)), x.astype("d").var((0, 1)))


@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_batches_of_different_shapes(method):
    model = keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.BatchNormalization(),
            layers.Conv1D(4, 2),
            layers.BatchNormalization(),
        ]
    )
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(16, length, 3)).astype("f") for length in (5, 9, 5, 7)]
    stats = tfbn.collect(model, iter(batches), method=method, verbose=0)
    first, second = stats.values()
    values = np.concatenate([b.reshape(-1, 3) for b in batches]).astype("d")
    assert (first.count, second.count) == (16 * 26, 16 * 22)
    networks.assert_layer(first, values.mean(0), values.var(0))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_batch_norm_behind_a_stateful_rnn_is_refused_by_name(method, eager):
    inputs = keras.Input((3, 4), batch_size=10)
    x = layers.GRU(5, stateful=True, name="keeps_its_state")(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    model.run_eagerly = eager
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(ValueError, match="keeps_its_state"):
        tfbn.collect(model, networks.normal(40, 3, 4), method=method, batch_size=10, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # The advice: a copy with stateful=False.
    inputs = keras.Input((3, 4), batch_size=10)
    gru = layers.GRU(5)
    copy = keras.Model(inputs, layers.BatchNormalization()(gru(inputs)))
    gru.set_weights(model.layers[1].get_weights())
    x = networks.normal(40, 3, 4)
    [stats] = tfbn.collect(copy, x, method=method, batch_size=10, verbose=0).values()
    values = np.asarray(gru(x), "d")
    networks.assert_layer(stats, values.mean(0), values.var(0))


def test_a_stateful_rnn_behind_batch_norm_is_fine():
    inputs = keras.Input((3, 4), batch_size=10)
    outputs = layers.GRU(5, stateful=True)(layers.BatchNormalization()(inputs))
    model = keras.Model(inputs, outputs)
    x = networks.normal(40, 3, 4)
    [actual] = tfbn.collect(model, x, batch_size=10, verbose=0).values()
    networks.assert_layer(actual, x.astype("d").mean((0, 1)), x.astype("d").var((0, 1)))


class Static(keras.Model):
    """A network that reshapes with its static batch size."""

    def __init__(self, bn=layers.BatchNormalization):
        super().__init__()
        self.first, self.second, self.dense = bn(), bn(), layers.Dense(4)

    def call(self, x, training=None):
        x = self.first(x, training=training)
        x = tf.reshape(x, [x.shape[0], 4])
        return self.second(self.dense(ops.relu(x)), training=training)


def static(bn):
    """Build a `Static` network."""
    model = Static(bn)
    model(np.zeros((2, 2, 2)))
    return model


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_network_that_uses_the_static_size_of_its_batch(method):
    model = static(layers.BatchNormalization)
    x = networks.normal(41, 2, 2, loc=2)
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(10, drop_remainder=True)
    for source, options, used in (
        (dataset, {}, x[:40]),
        (x, {"batch_size": 10}, x),  # A last batch of one.
    ):
        stats = tfbn.collect(model, source, method=method, verbose=0, **options)
        if method == "exact":
            networks.assert_exact(stats, static, model, used)
        else:
            first, _ = stats.values()
            values = used.astype("d").reshape(-1, 2)
            networks.assert_layer(first, values.mean(0), values.var(0))


@pytest.mark.slow
def test_no_function_is_traced_again_and_again(caplog):
    model = networks.three_levels()
    for size in range(1, 12):
        tfbn.collect(model, networks.varied(50), batch_size=size, verbose=0)
        fresh = networks.three_levels()
        tfbn.collect(fresh, networks.varied(50), batch_size=size + 10, verbose=0)
    assert not [record for record in caplog.records if "retracing" in record.getMessage()]


class Rescaling(layers.Layer):
    """Rescales by a statistic of a batch norm layer, as folding for quantization does."""

    def __init__(self, statistic):
        super().__init__()
        self.bn = layers.BatchNormalization(name="read")
        self.statistic = statistic

    def call(self, x, training=None):
        return self.bn(x, training=training) * (1 + getattr(self.bn, self.statistic))


class OwnReader(layers.BatchNormalization):
    """A layer that reads its moving mean outside of `super().call`."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask) + self.moving_mean


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("build", "statistic"),
    [
        (lambda: Rescaling("moving_variance"), "moving_variance of layer '.*read'"),
        (lambda: Rescaling("moving_mean"), "moving_mean of layer '.*read'"),
        (lambda: OwnReader(name="read"), "moving_mean of layer 'read'"),
    ],
)
@pytest.mark.parametrize(
    ("eager", "method"), [(False, "exact"), (True, "exact"), (False, "pooled")]
)
def test_a_statistic_that_is_read_past_its_layer_is_an_error(build, statistic, method, eager):
    reads = build()
    model = keras.Sequential([keras.Input((3,)), reads, layers.BatchNormalization(name="behind")])
    model.run_eagerly = eager
    before = [w.copy() for w in model.get_weights()]
    x = 3 * networks.normal(20, 3)
    with pytest.raises(ValueError, match=statistic):
        tfbn.collect(model, x, method=method, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    reads.trainable = False  # A frozen layer keeps its statistics, so the others can be computed.
    entering = np.asarray(reads(x), "d")
    [actual] = tfbn.collect(model, x, method=method, verbose=0).values()
    networks.assert_layer(actual, entering.mean(0), entering.var(0))


def test_a_statistic_that_is_read_only_for_the_outputs_is_fine():
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), Rescaling("moving_mean")]
    )
    x = 3 * networks.normal(20, 3)
    first, second = tfbn.collect(model, x, verbose=0).values()
    networks.assert_layer(first, x.astype("d").mean(0), x.astype("d").var(0))
    networks.assert_layer(second, 0, first.variance / (first.variance + 1e-3))
