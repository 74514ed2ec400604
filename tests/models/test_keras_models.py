"""Tests of `tfbn.models.keras_models`."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.models import fingerprints, keras_models


@pytest.mark.parametrize("build", networks.NETWORKS)
def test_every_layer_is_listed_once(build):
    model = build(layers.BatchNormalization)
    paths = keras_models.batch_norm_layers(model)
    assert {id(layer) for layer in paths.values()} == {id(b) for b in networks.batch_norms(model)}
    assert len(paths) == len(networks.batch_norms(model))


def test_nested_layers_of_one_name_have_different_paths():
    paths = keras_models.batch_norm_layers(networks.nested(layers.BatchNormalization))
    assert list(paths) == ["block/bn", "outer/block/bn", "outer/bn"]


def test_siblings_of_one_name_get_numbers():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.twins = [layers.BatchNormalization(name="bn") for _ in range(3)]

        def call(self, x):
            return sum(twin(x) for twin in self.twins)

    model = Twins()
    model(np.ones((2, 2)))
    assert list(keras_models.batch_norm_layers(model)) == ["bn", "bn#2", "bn#3"]


def test_paths_are_the_same_after_saving_and_loading(tmp_path):
    model = networks.nested(tfbn.BatchNormalization)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert list(keras_models.batch_norm_layers(loaded)) == list(
        keras_models.batch_norm_layers(model)
    )
    assert fingerprints.fingerprint(loaded) == fingerprints.fingerprint(model)


class Unused(keras.Model):
    """A layer with an unused layer."""

    def __init__(self):
        super().__init__()
        self.unused, self.bn = layers.Dense(3), layers.BatchNormalization()

    def call(self, x, training=None):
        return self.bn(x, training=training)


class Container(keras.Model):
    """A model that is never called, around one that is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_uncalled_layers_need_no_weights():
    model, x = Unused(), np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")
    with pytest.raises(ValueError, match="Expected a built model"):
        keras_models.require_built(model)
    assert not keras_models.has_weights(Container(model))
    model(x)
    assert not model.unused.built
    keras_models.require_built(Container(model))
    [stats] = tfbn.collect(model, x, verbose=0).values()
    np.testing.assert_allclose(stats.mean, np.float64(x).mean(0), rtol=1e-6)
    model = Unused()
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0, callbacks=[tfbn.PopulationStatsCallback(x)])
    np.testing.assert_allclose(model.bn.moving_mean, np.float64(x).mean(0), rtol=1e-6)


def test_uncalled_batch_norm_has_no_weights():
    model = Unused()
    model.unused = layers.BatchNormalization()
    model(np.ones((2, 4)))
    assert not keras_models.has_weights(model)
