"""Tests of `tfbn.models.keras_models`."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn.models import fingerprints, keras_models


@pytest.mark.parametrize("build", networks.NETWORKS)
def test_every_layer_is_found_once(build):
    model = build(layers.BatchNormalization)
    found = keras_models.batch_norm_layers(model)
    assert {id(layer) for layer in found.values()} == {id(b) for b in networks.batch_norms(model)}
    assert len(found) == len(networks.batch_norms(model))


def test_paths_tell_nested_layers_of_one_name_apart():
    found = keras_models.batch_norm_layers(networks.nested(layers.BatchNormalization))
    assert list(found) == ["block/bn", "outer/block/bn", "outer/bn"]


def test_siblings_of_one_name_are_numbered():
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
