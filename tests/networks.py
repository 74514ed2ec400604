"""Networks for the tests, and what their statistics must be.

The oracle is Keras alone, in float64: a copy of the network made of Keras's own layers with
momentum 0, whose moving statistics after a step in training mode equal the batch's.
"""

import contextlib
import itertools
import operator
import sys
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tfbn.models.keras_models import batch_norm_layers


@contextlib.contextmanager
def dtype_policy(name):
    """Build layers under a dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def plain(bn):
    """Two convolutions and a dense layer, one after the other."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3),
            bn(),
            layers.ReLU(),
            layers.Conv2D(6, 3),
            bn(scale=False),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(5),
            bn(center=False),
        ]
    )


def residual(bn):
    """Three residual blocks, one with a convolution and batch norm in its shortcut."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(bn()(layers.Conv2D(4, 3, padding="same")(x)))
    for filters, strides in [(4, 1), (6, 2), (6, 1)]:
        y = layers.ReLU()(bn()(layers.Conv2D(filters, 3, strides, padding="same")(x)))
        y = bn()(layers.Conv2D(filters, 3, padding="same")(y))
        if strides > 1:
            x = bn()(layers.Conv2D(filters, 1, strides)(x))
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


def dense_connections(bn):
    """A dense block: every layer reads all that came before."""
    x = inputs = keras.Input((6, 6, 3))
    for _ in range(4):
        y = layers.Conv2D(3, 3, padding="same")(layers.ReLU()(bn()(x)))
        x = layers.Concatenate()([x, y])
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(bn()(x)))


def branching(bn):
    """Two inputs, branches of different depth, two outputs; one output skips a branch."""
    a, b = keras.Input((5,), name="a"), keras.Input((3,), name="b")
    x = bn()(layers.Dense(4)(a))
    y = bn()(layers.Dense(4)(bn()(layers.Dense(4, "relu")(b))))
    z = bn()(layers.Dense(3)(layers.Concatenate()([x, y])))
    return keras.Model({"a": a, "b": b}, {"one": z, "two": layers.Dense(1)(x)})


def late_input(bn):
    """An input that joins above the first level, and a batch norm right on an input."""
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    x = bn()(layers.Add()([a, bn()(b)]))
    return keras.Model({"a": a, "b": b}, bn()(layers.Multiply()([x, b])))


def nested(bn):
    """Models inside a model, with the same layer names in each."""

    def block():
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, name="dense"), bn(name="bn")], name="block"
        )

    inputs = keras.Input((4,))
    outer = keras.Sequential(
        [keras.Input((4,)), block(), layers.ReLU(), bn(name="bn")], name="outer"
    )
    return keras.Model(inputs, layers.Dense(2)(outer(block()(inputs))))


class Subclassed(keras.Model):
    """Its own `call`, a list of layers, and a batch norm in a custom layer."""

    def __init__(self, bn):
        super().__init__()
        self.blocks = [layers.Conv2D(3, 3), bn(), layers.Conv2D(4, 3), bn()]
        self.custom = Normalized(bn)

    def call(self, inputs, training=None):
        """Convolutions, a sum over positions, and the custom layer."""
        x = inputs
        for layer in self.blocks:
            x = layer(x, training=training) if hasattr(layer, "moving_mean") else layer(x)
        return self.custom(keras.ops.mean(x, axis=(1, 2)), training=training)


class Normalized(layers.Layer):
    """A dense layer and a batch norm in a layer that is not a model."""

    def __init__(self, bn):
        super().__init__()
        self.dense, self.bn = layers.Dense(3), bn()

    def call(self, inputs, training=None):
        return self.bn(self.dense(inputs), training=training)


def subclassed(bn):
    """A subclassed model that has been called once."""
    model = Subclassed(bn)
    model(np.zeros((2, 8, 8, 3)))
    return model


def channels_first(bn):
    """Batch norm over axis 1, of values that do not depend on the data format."""
    inputs = keras.Input((3, 4, 5))
    x = bn(axis=1)(inputs)
    return keras.Model(inputs, bn(axis=2)(layers.Dense(5)(x)))


NETWORKS = [
    plain,
    residual,
    dense_connections,
    branching,
    late_input,
    nested,
    subclassed,
    channels_first,
]


def data(model, samples, seed=0):
    """Inputs for a network, with samples that differ in location and scale."""
    rng = np.random.default_rng(seed)

    def array(shape):
        spread = rng.uniform(0.2, 3, (samples, *[1] * len(shape)))
        return (spread * (rng.normal(size=(samples, *shape)) + spread)).astype("float32")

    if not getattr(model, "inputs", None):
        return array((8, 8, 3))
    if len(model.inputs) > 1:
        return {tensor.name: array(tensor.shape[1:]) for tensor in model.inputs}
    return array(model.inputs[0].shape[1:])


def batch_norms(model):
    """The batch norm layers, in Keras's order."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def in_training(build, model, x, slices):
    """Mean and biased variance of what enters each batch norm layer in each batch, in float64.

    Args:
        build: The network's function, for a copy made of Keras's own layers.
        model: The network whose weights the copy gets.
        x: The data.
        slices: The batches, as slices of the samples.

    Returns:
        For every batch a list of (mean, variance), in the order of `batch_norms`.
    """
    with dtype_policy("float64"):
        twin = build(lambda **options: layers.BatchNormalization(momentum=0.0, **options))
    twin.set_weights(model.get_weights())
    actual = []
    for batch in slices:
        part = keras.tree.map_structure(operator.itemgetter(batch), x)
        twin(keras.tree.map_structure(lambda a: a.astype("float64"), part), training=True)
        actual.append(
            [(bn.moving_mean.numpy(), bn.moving_variance.numpy()) for bn in batch_norms(twin)]
        )
    return actual


class Looped(keras.Model):
    """Batch norm in the body of a while loop, over the parts of its input."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = layers.BatchNormalization(), layers.BatchNormalization()

    def call(self, inputs, training=None):
        x = self.first(inputs, training=training)

        def body(i, total):
            return i + 1, total + self.bn(x[:, i], training=training)

        return tf.while_loop(lambda i, _: i < 3, body, [0, tf.zeros_like(x[:, 0])])[1]


class Cell(keras.Model):
    """Batch norm on its own output, three times, and another behind it."""

    def __init__(self):
        super().__init__()
        self.bn, self.dense = layers.BatchNormalization(), layers.Dense(4, "tanh")
        self.behind = layers.BatchNormalization()

    def call(self, inputs, training=None):
        h = keras.ops.zeros_like(inputs[:, 0])
        for step in range(3):
            h = self.bn(self.dense(h + inputs[:, step]), training=training)
        return self.behind(h, training=training)


class Drawing(layers.Layer):
    """Adds noise of standard deviation 1, in inference too."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.seeds = keras.random.SeedGenerator(11)
        self.generator = tf.random.Generator.from_seed(3)

    def call(self, x):
        shape = tf.shape(x)
        if self.how == "generator":
            return x + keras.random.normal(shape, seed=self.seeds)
        if self.how == "global":
            return x + keras.random.normal(shape)
        if self.how == "tensorflow":
            return x + tf.random.normal(shape)
        if self.how == "uniform":
            return x + tf.random.uniform(shape, -(3**0.5), 3**0.5)
        if self.how == "truncated":
            return x + tf.random.truncated_normal(shape) / 0.87962566
        if self.how == "tf generator":
            return x + self.generator.normal(shape)
        if self.how == "gamma":
            return x + tf.random.gamma(shape, 1.0)
        raise ValueError(self.how)


def pooled(counts, batches):
    """Mean and variance of the values of all batches together, by the law of total variance."""
    weights = np.asarray(counts, np.float64) / np.sum(counts)
    means, variances = (np.stack(v) for v in zip(*batches, strict=True))
    mean = weights @ means
    return mean, weights @ (variances + (means - mean) ** 2)


def assert_same(a, b):
    """Compare arrays to the bit."""
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def assert_layer(actual, mean, variance, rtol=1e-5):
    """Compare the statistics of a layer, the mean in units of the standard deviation.

    Args:
        actual: A Keras layer, or `LayerStats`.
        mean, variance: The right values.
        rtol: The tolerance of the variance, and of the mean.
    """
    if isinstance(actual, keras.Layer):
        found_mean, found_variance = actual.moving_mean, actual.moving_variance
    else:
        found_mean, found_variance = actual.mean, actual.variance
    std = np.sqrt(np.asarray(variance)) + 1e-30
    np.testing.assert_allclose(found_mean / std, mean / std, rtol=0, atol=rtol)
    np.testing.assert_allclose(found_variance, variance, rtol=rtol)


def assert_statistics(stats, expected, rtol=1e-4, model=None):
    """Compare the statistics of all layers.

    Args:
        stats: `tfbn.PopulationStats`.
        expected: Others, with the same counts; or the (mean, variance) of each layer.
        rtol: See `assert_layer`.
        model: If it is given, `expected` is in the order of `batch_norms`.
    """
    layers_found = list(stats.values())
    if model is not None:
        path_of = {id(layer): path for path, layer in batch_norm_layers(model).items()}
        layers_found = [stats[path_of[id(layer)]] for layer in batch_norms(model)]
    known = list(expected.values()) if isinstance(expected, Mapping) else expected
    assert len(stats) == len(known)
    for actual, one in zip(layers_found, known, strict=True):
        if isinstance(one, tuple):
            assert_layer(actual, *one, rtol)
            continue
        np.testing.assert_array_equal(actual.count, one.count)
        assert_layer(actual, one.mean, one.variance, rtol)


def assert_exact(stats, build, model, x, rtol=1e-4):
    """Compare with one batch in training mode, in float64."""
    [expected] = in_training(build, model, x, [slice(None)])
    assert_statistics(stats, expected, rtol, model)


def normal(*shape, seed=0, loc=0.0, scale=1.0):
    """Random numbers."""
    return np.random.default_rng(seed).normal(loc, scale, shape).astype("float32")


def three_levels(bn=layers.BatchNormalization):
    """Three dense layers, each with batch norm."""
    parts = [part for _ in range(3) for part in (layers.Dense(6, "tanh"), bn())]
    return keras.Sequential([keras.Input((4,)), *parts])


def varied(samples=400):
    """Samples that differ in place and spread, so that each of them counts."""
    rng = np.random.default_rng(5)
    spread = rng.uniform(0.1, 4, (samples, 1))
    return (spread * rng.normal(size=(samples, 4)) + spread).astype("float32")


# Data in another order, or other data, in every pass.


class Pairs(keras.utils.PyDataset):
    """Batches of six, with targets."""

    def __init__(self, x, endless=False):
        super().__init__()
        self.x, self.endless, self.epochs = x, endless, 0

    @property
    def num_batches(self):
        return None if self.endless else -(-len(self.x) // 6)

    def __getitem__(self, i):
        i %= -(-len(self.x) // 6)
        return self.x[6 * i : 6 * i + 6], np.zeros(6)

    def on_epoch_end(self):
        self.epochs += 1


class Endless:
    """It says that it repeats, as Grain does."""

    def __len__(self):
        return sys.maxsize

    def __iter__(self):
        return itertools.repeat(np.ones((4, 3), "float32"))


class Compiled(layers.Layer):
    """A layer whose call is a `tf.function` with a batch norm in it."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn()

    @tf.function
    def call(self, inputs, training=None):
        return self.bn(inputs, training=training)


def off(stats, population):
    """By how much the worst channel is off: means in standard deviations, and those in parts."""
    return max(
        max(
            np.max(np.abs(stats[path].mean - p.mean) / np.sqrt(p.variance)),
            np.max(np.abs(np.sqrt(stats[path].variance / p.variance) - 1)),
        )
        for path, p in population.items()
    )
