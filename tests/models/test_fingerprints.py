"""Tests of `tfbn.models.fingerprints`."""

import keras
import networks
import numpy as np
import pytest
from keras import layers

from tfbn.models import fingerprints


def test_fingerprint_depends_on_weights_only():
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


def test_fingerprint_ignores_counters_and_seeds():
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


def test_digests_depend_on_values_and_kinds_of_weights():
    def build(name):
        x = keras.Input((3,), name="x")
        y = layers.BatchNormalization(name=f"{name}_bn")(layers.Dense(3, name=name)(x))
        return keras.Model(x, y)

    a, b = build("a"), build("b")
    b.set_weights(a.get_weights())
    digests = {variable.path: digest for variable, digest in fingerprints.digests(a)}
    assert sorted(digests) == sorted(variable.path for variable in a.weights)
    assert len(set(digests.values())) == 6  # Zeros of a bias, a beta and a mean; ones of two.
    assert [d for _, d in fingerprints.digests(b)] == [*digests.values()]  # Names differ.
    for variable in b.weights:
        value = variable.numpy()
        variable.assign(np.nextafter(value, np.float32(9)))
        changed = {
            v.path for v, digest in fingerprints.digests(b) if digest not in digests.values()
        }
        assert changed == {variable.path}
        variable.assign(value)


def test_digests_of_the_latest_fingerprint():
    model = networks.plain(layers.BatchNormalization)
    swept = fingerprints.fingerprint(model)
    before = {digest for _, digest in fingerprints.digests(model)}
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    weights = fingerprints.digests_of(model, swept)
    statistics = {digest for _, digest in fingerprints.digests_of_statistics(model)}
    assert weights | statistics == before
    assert weights & statistics == set()
    assert fingerprints.fingerprint(model) != swept
    assert fingerprints.digests_of(model, swept) is None  # No longer the latest.
    assert fingerprints.digests_of(model, "") is None
    now = {digest for _, digest in fingerprints.digests(model)} - statistics
    assert fingerprints.digests_of(model, fingerprints.fingerprint(model)) == now
