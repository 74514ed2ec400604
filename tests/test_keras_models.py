"""Tests of `tfbn.model`."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

import tfbn
from tfbn import keras_models


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
    assert keras_models.fingerprint(loaded) == keras_models.fingerprint(model)


def test_fingerprint_follows_the_weights_only():
    model = networks.plain(layers.BatchNormalization)
    before = keras_models.fingerprint(model)
    bn = networks.batch_norms(model)[0]
    model.trainable = False
    assert keras_models.fingerprint(model) == before
    bn.moving_mean.assign(bn.moving_mean + 1)
    bn.moving_variance.assign(bn.moving_variance + 1)
    assert keras_models.fingerprint(model) == before
    gamma = bn.gamma.numpy()
    bn.gamma.assign(np.nextafter(gamma, np.float32(np.inf)))
    assert keras_models.fingerprint(model) != before
    bn.gamma.assign(gamma)
    kernel = model.layers[-2].kernel
    values = kernel.numpy()
    assert keras_models.fingerprint(model) == before
    kernel.assign(np.nextafter(values, np.float32(np.inf)))
    assert keras_models.fingerprint(model) != before


def test_fingerprint_leaves_counters_and_seeds_out():
    inputs = keras.Input((3,))
    x = layers.Dropout(0.5, seed=1)(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    before = keras_models.fingerprint(model)
    model(np.ones((2, 3)), training=True)
    assert keras_models.fingerprint(model) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_fingerprint_of_any_float(dtype):
    with networks.dtype_policy(dtype):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization()])
    before = keras_models.fingerprint(model)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    assert keras_models.fingerprint(model) != before


def test_digests_are_of_values_and_of_kinds_of_weights():
    def build(name):
        x = keras.Input((3,), name="x")
        y = layers.BatchNormalization(name=f"{name}_bn")(layers.Dense(3, name=name)(x))
        return keras.Model(x, y)

    a, b = build("a"), build("b")
    b.set_weights(a.get_weights())
    found = {variable.path: digest for variable, digest in keras_models.digests(a)}
    assert sorted(found) == sorted(variable.path for variable in a.weights)
    assert len(set(found.values())) == 6  # Zeros of a bias, a beta and a mean; ones of two.
    assert [d for _, d in keras_models.digests(b)] == [*found.values()]  # Whatever their names.
    for variable in b.weights:
        held = variable.numpy()
        variable.assign(np.nextafter(held, np.float32(9)))
        changed = {v.path for v, digest in keras_models.digests(b) if digest not in found.values()}
        assert changed == {variable.path}
        variable.assign(held)


def test_digests_with_which_a_model_had_a_fingerprint():
    model = networks.plain(layers.BatchNormalization)
    swept = keras_models.fingerprint(model)
    before = {digest for _, digest in keras_models.digests(model)}
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    found = keras_models.digests_of(model, swept)
    statistics = {digest for _, digest in keras_models.digests_of_statistics(model)}
    assert found | statistics == before
    assert found & statistics == set()
    assert keras_models.fingerprint(model) != swept
    assert keras_models.digests_of(model, swept) is None  # They are forgotten by now.
    assert keras_models.digests_of(model, "") is None
    now = {digest for _, digest in keras_models.digests(model)} - statistics
    assert keras_models.digests_of(model, keras_models._sha256(model)) == now
