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
    found = {}
    for path, layer in batch_norm_layers(model).items():
        channels = layer.moving_mean.shape[0]
        found[path] = LayerStats(
            320, rng.normal(size=channels), rng.uniform(0.5, 2.0, size=channels)
        )
        if layer.scale:
            layer.gamma.assign(rng.uniform(0.5, 2.0, size=channels))
        if layer.center:
            layer.beta.assign(rng.normal(size=channels))
    stats = PopulationStats(
        found,
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
