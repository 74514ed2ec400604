"""Sweeps and evaluations restore all random generators."""

import random

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.ops import stateful_random_ops

import tfbn
from tfbn.models.random_state import unchanged_generators


class Draws(layers.Layer):
    """A model with TensorFlow's generators in several kinds of attributes."""

    def __init__(self):
        super().__init__()
        self.one = tf.random.Generator.from_seed(1)
        self.several = [tf.random.Generator.from_seed(2)]
        self.named = {"a": (tf.random.Generator.from_seed(3),)}

    def call(self, x):
        return x


layer = Draws()
model = keras.Sequential([keras.Input((2,)), keras.Sequential([keras.Input((2,)), layer])])

DRAW = {
    "Python": random.random,
    "NumPy": lambda: float(np.random.normal()),
    "Keras": lambda: float(keras.random.normal([])),
    "TensorFlow": lambda: float(tf.random.normal([])),
    "TensorFlow's generator": lambda: float(tf.random.get_global_generator().normal([])),
    "an attribute": lambda: float(layer.one.normal([])),
    "a list": lambda: float(layer.several[0].normal([])),
    "a dict": lambda: float(layer.named["a"][0].normal([])),
}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("kind", DRAW)
def test_every_generator_is_restored(kind, error):
    drawn = []
    for number in (0, 3):
        keras.utils.clear_session()
        keras.utils.set_random_seed(3)
        tf.random.set_global_generator(tf.random.Generator.from_seed(5))
        for generator in (layer.one, layer.several[0], layer.named["a"][0]):
            generator.reset_from_seed(1)
        DRAW[kind]()
        try:
            with unchanged_generators(model):
                _ = [DRAW[kind]() for _ in range(number)]
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        drawn.append([DRAW[kind]() for _ in range(3)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_missing_global_generators_are_not_created(monkeypatch):
    monkeypatch.setattr(stateful_random_ops, "global_generator", None)
    drawn = []
    for enters in (False, True):
        keras.utils.clear_session()
        keras.utils.set_random_seed(3)
        if enters:
            with unchanged_generators(model):
                pass
            assert stateful_random_ops.global_generator is None
            with unchanged_generators(model):
                keras.random.normal([])
        drawn.append([float(keras.random.normal([])), random.random()])
    assert drawn[0] == drawn[1]


class FromLibraries(keras.utils.PyDataset):
    """Batches with augmentation by Python's and NumPy's generators."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = np.random.default_rng(i).normal(size=(8, 3)) + np.random.normal() + random.random()
        return x.astype("f"), np.ones((8, 1), "f")


CALLBACKS = {
    "tracker": lambda x: tfbn.StatsTracker(x, method="pooled", validation_data=x),
    "validation": lambda x: tfbn.PopulationStatsCallback(
        x, method="pooled", every_epoch=True, freeze=False, verbose=0
    ),
    "epochs": lambda x: tfbn.PopulationStatsCallback(
        x, method="pooled", every_epoch=True, validation_data=x, freeze=False, verbose=0
    ),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("make", CALLBACKS)
@pytest.mark.parametrize("how", ["generator", "global", "tf generator", "tensorflow"])
def test_training_continues_with_the_same_draws(make, how):
    losses = []
    for callbacks in ([], [CALLBACKS[make](FromLibraries())]):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        bn = layers.BatchNormalization()
        model = keras.Sequential(
            [keras.Input((3,)), networks.Drawing(how), bn, layers.Dense(1, use_bias=False)]
        )
        model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=how == "tensorflow")
        data = FromLibraries()
        history = model.fit(data, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
