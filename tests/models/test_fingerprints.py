"""Digests of weights, and what they follow."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

from tfbn.models import fingerprints


def test_fingerprint_follows_the_weights_only():
    model = networks.plain(layers.BatchNormalization)
    before = fingerprints.fingerprint(model)
    bn = networks.batch_norms(model)[0]
    model.trainable = False
    assert fingerprints.fingerprint(model) == before
    bn.moving_mean.assign(bn.moving_mean + 1)
    bn.moving_variance.assign(bn.moving_variance + 1)
    assert fingerprints.fingerprint(model) == before
    gamma = bn.gamma.numpy()
    bn.gamma.assign(np.nextafter(gamma, np.float32(np.inf)))
    assert fingerprints.fingerprint(model) != before
    bn.gamma.assign(gamma)
    kernel = model.layers[-2].kernel
    values = kernel.numpy()
    assert fingerprints.fingerprint(model) == before
    kernel.assign(np.nextafter(values, np.float32(np.inf)))
    assert fingerprints.fingerprint(model) != before


def test_fingerprint_leaves_counters_and_seeds_out():
    inputs = keras.Input((3,))
    x = layers.Dropout(0.5, seed=1)(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    before = fingerprints.fingerprint(model)
    model(np.ones((2, 3)), training=True)
    assert fingerprints.fingerprint(model) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_fingerprint_of_any_float(dtype):
    with networks.dtype_policy(dtype):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization()])
    before = fingerprints.fingerprint(model)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    assert fingerprints.fingerprint(model) != before


def test_digests_are_of_values_and_of_kinds_of_weights():
    def build(name):
        x = keras.Input((3,), name="x")
        y = layers.BatchNormalization(name=f"{name}_bn")(layers.Dense(3, name=name)(x))
        return keras.Model(x, y)

    a, b = build("a"), build("b")
    b.set_weights(a.get_weights())
    found = {variable.path: digest for variable, digest in fingerprints.digests(a)}
    assert sorted(found) == sorted(variable.path for variable in a.weights)
    assert len(set(found.values())) == 6  # Zeros of a bias, a beta and a mean; ones of two.
    assert [d for _, d in fingerprints.digests(b)] == [*found.values()]  # Whatever their names.
    for variable in b.weights:
        held = variable.numpy()
        variable.assign(np.nextafter(held, np.float32(9)))
        changed = {v.path for v, digest in fingerprints.digests(b) if digest not in found.values()}
        assert changed == {variable.path}
        variable.assign(held)


def test_digests_with_which_a_model_had_a_fingerprint():
    model = networks.plain(layers.BatchNormalization)
    swept = fingerprints.fingerprint(model)
    before = {digest for _, digest in fingerprints.digests(model)}
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    found = fingerprints.digests_of(model, swept)
    statistics = {digest for _, digest in fingerprints.digests_of_statistics(model)}
    assert found | statistics == before
    assert found & statistics == set()
    assert fingerprints.fingerprint(model) != swept
    assert fingerprints.digests_of(model, swept) is None  # They are forgotten by now.
    assert fingerprints.digests_of(model, "") is None
    now = {digest for _, digest in fingerprints.digests(model)} - statistics
    assert fingerprints.digests_of(model, fingerprints.fingerprint(model)) == now
