import keras
import numpy as np
import pytest

import tfbn


def test_statistics_are_assigned_to_a_second_build():
    """Automatic names differ in their counters only, of one or two digits."""

    def build(units=3):
        model = keras.Sequential([keras.Input((3,))])
        for _ in range(11):
            model.add(keras.layers.Dense(units))
            model.add(keras.layers.BatchNormalization())
        return model

    x = np.random.default_rng(0).normal(1, 2, (16, 3)).astype("float32")
    first, second, wider = build(), build(), build(units=4)
    second.set_weights(first.get_weights())
    stats = tfbn.collect(first, x, verbose=0)
    assert "moving_mean" in stats.mismatch(second)
    stats.assign(second)
    stats.assign(first)
    assert stats.mismatch(first) is None
    assert stats.mismatch(second) is None
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError):
        stats.assign(wider)
    second.layers[-1].moving_variance.assign(second.layers[-1].moving_variance * 2)
    assert "moving_variance" in stats.mismatch(second)
