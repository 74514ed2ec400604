"""Build models to export, and call versions like a server."""

import os

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.models.fingerprints import fingerprint
from tfbn.models.keras_models import batch_norm_layers
from tfbn.population import LayerStats, PopulationStats

BATCH_NORMS = [tfbn.BatchNormalization, keras.layers.BatchNormalization]


def sweep(model):
    """Assign random statistics as if from a sweep, because mean 0 and variance 1 hide errors."""
    rng = np.random.default_rng(1)
    actual = {}
    for path, layer in batch_norm_layers(model).items():
        channels = layer.moving_mean.shape[0]
        actual[path] = LayerStats(
            320, rng.normal(size=channels), rng.uniform(0.5, 2.0, size=channels)
        )
        if layer.scale:
            layer.gamma.assign(rng.uniform(0.5, 2.0, size=channels))
        if layer.center:
            layer.beta.assign(rng.normal(size=channels))
    stats = PopulationStats(
        actual,
        method="pooled",
        samples=20,
        batches=2,
        batch_size=10,
        fingerprint=fingerprint(model),
        previous=PopulationStats.read(model),
    )
    stats.assign(model)
    return model


def dense_model(batch_norm=keras.layers.BatchNormalization):
    return sweep(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(3), batch_norm(name="bn"), layers.Dense(2)]
        )
    )


def conv_model():
    return sweep(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
    )


def by_numpy(model, x):
    """Build Dense, batch norm, Dense in float64."""
    first, bn, last = model.layers
    w = [np.float64(v.numpy()) for v in (*first.weights, *last.weights)]
    gamma, beta, mean, variance = (np.float64(v.numpy()) for v in bn.weights)
    hidden = (x @ w[0] + w[1] - mean) / np.sqrt(variance + bn.epsilon) * gamma + beta
    return hidden @ w[2] + w[3]


def serve(path):
    """Call the default signature with tensors by name, like a server."""
    loaded = tf.saved_model.load(os.fspath(path))
    signature = loaded.signatures["serving_default"]

    def call(**inputs):
        outputs = signature(**{name: tf.constant(x) for name, x in inputs.items()})
        call.keep = loaded
        return {name: y.numpy() for name, y in outputs.items()}

    return call


def signature_of(path):
    signature = tf.saved_model.load(os.fspath(path)).signatures["serving_default"]
    return signature.structured_input_signature, signature.structured_outputs


def everything_under(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.bn = layers.BatchNormalization()

    def call(self, x, training=None):
        return self.bn(self.dense(x), training=training)


class OfDict(TwoInputs):
    def call(self, x, training=None):
        return {"sum": super().call(x["p"] + x["q"], training), "p": x["p"]}


def called(model, x):
    model(x)
    return model


def functional(inputs, outputs):
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    u = layers.BatchNormalization()(layers.Dense(2, name="u")(a))
    v = layers.Dense(2, name="v")(b)
    return keras.Model(inputs(a, b), outputs(u, v))


ONES = np.ones((2, 4), "float32")


STRUCTURES = {
    "sequential": lambda: keras.Sequential([keras.Input((4,)), layers.Dense(2)]),
    "sequential without Input": lambda: called(keras.Sequential([layers.Dense(2)]), ONES),
    "one": lambda: functional(lambda a, b: [a, b], lambda u, v: u + v),
    "lists": lambda: functional(lambda a, b: [a, b], lambda u, v: [u, v]),
    "dicts": lambda: functional(lambda a, b: {"a": a, "b": b}, lambda u, v: {"u": u, "v": v}),
    "nested": lambda: functional(lambda a, b: {"a": [a], "b": b}, lambda u, v: (u, v)),
    "subclassed": lambda: called(TwoInputs(), ONES),
    "subclassed with dicts": lambda: called(OfDict(), {"p": ONES, "q": ONES}),
}


class HardWired(keras.Model):
    def __init__(self, batch_norm):
        super().__init__()
        self.block = keras.Sequential([layers.Dense(3), batch_norm(name="inner")])

    def call(self, x):
        return self.block.layers[1](self.block.layers[0](x), training=True)


def field(*shape, seed=0):
    """Return data from another distribution than the statistics."""
    return (np.random.default_rng(seed).normal(size=(23, *shape)) * 3 + 2).astype("float32")


class Doubled(layers.BatchNormalization):
    """Double the output of batch norm, and add the input."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask) + inputs


def nested():
    """Build nested models with layers of equal names and a shared layer."""
    inner = keras.Sequential([layers.Dense(4), layers.BatchNormalization(name="bn")], name="inner")
    shared = layers.BatchNormalization(name="shared")
    x = inputs = keras.Input((4,))
    for block in (inner, keras.Sequential([layers.BatchNormalization(name="bn")], name="inner_2")):
        x = shared(block(x) * 2)
    return keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x)))


class Siblings(keras.Model):
    """Build children with equal names, some without batch norm, called in another order."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(4, name="twin")
        self.second = layers.BatchNormalization(name="twin")
        self.third = keras.Sequential([layers.BatchNormalization(name="bn")], name="twin")
        self.fourth = layers.BatchNormalization(name="twin")

    def call(self, x, training=None):
        for part in (self.fourth, self.first, self.third, self.second):
            x = tf.nn.relu(part(x, training=training)) if part is not self.first else part(x)
        return x


def masked():
    """Padded steps do not count."""
    x = inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 3, mask_zero=True)(x)
    x = layers.BatchNormalization()(x)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x))


def residual():
    """A convolution before and after each of several batch norm layers, in 16 bits."""
    x = inputs = keras.Input((6, 6, 2))
    for strides in (1, 2):
        y = layers.Conv2D(4, 3, strides, padding="same")(x)
        y = tfbn.BatchNormalization(axis=-1, scale=False)(y)
        y = layers.BatchNormalization(center=False, epsilon=0.1)(layers.ReLU()(y))
        x = layers.Conv2D(4, 1, strides)(x) + y
    return keras.Model(inputs, layers.Flatten()(x))


def several():
    """Build a model with named inputs and outputs."""
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    u = layers.BatchNormalization()(layers.Dense(2, name="first")(a))
    v = tfbn.BatchNormalization()(layers.Dense(2)(b))
    return keras.Model({"a": a, "b": b}, {"sum": u + v, "difference": u - v})


def channels_first():
    """Its batch norm layers are over axis 1."""
    return keras.Sequential([keras.Input((3, 4, 4)), layers.BatchNormalization(axis=1)])


MODELS = {
    "dense": (dense_model, lambda: field(4)),
    "convolutional": (conv_model, lambda: field(8, 8, 3)),
    "nested": (nested, lambda: field(4)),
    "siblings": (lambda: called(Siblings(), field(4)), lambda: field(4)),
    "masked": (masked, lambda: np.random.default_rng(0).integers(0, 9, (23, 5)).astype("int32")),
    "residual": (residual, lambda: field(6, 6, 2)),
    "several": (several, lambda: {"a": field(4), "b": field(3, seed=1)}),
    "subclassed": (
        lambda: called(TwoInputs(), field(4)),
        lambda: field(4),
    ),
    "of a kind": (
        lambda: keras.Sequential([keras.Input((4,)), Doubled(), layers.Dense(2), Doubled()]),
        lambda: field(4),
    ),
    "channels first": (channels_first, lambda: field(3, 4, 4)),
}


def made(name):
    """Return a model with assigned statistics, and data from the field."""
    keras.utils.set_random_seed(0)
    build, data = MODELS[name]
    return sweep(build()), data()


class Fused(tf.Module):
    """Batch norm in one kernel, as in TensorFlow 1 and `tf.keras`."""

    def __init__(self):
        super().__init__()
        start = {"mean": 0.3, "variance": 2.0, "scale": 1.5, "offset": -1.0}
        self.bn = {
            name: tf.Variable(tf.fill([3], value), name={"mean": "bn/moving_mean"}.get(name, name))
            for name, value in start.items()
        }

    @tf.function(input_signature=[tf.TensorSpec((None, 5, 5, 3), name="image")])
    def infer(self, x):
        bn = self.bn
        y, *_ = tf.compat.v1.nn.fused_batch_norm(
            x, bn["scale"], bn["offset"], bn["mean"], bn["variance"], 0.01, is_training=False
        )
        return {"y": tf.nn.relu(y)}
