"""Tests of the moments of every sample, against NumPy in float64."""

import numpy as np
import pytest
import tensorflow as tf

from tfbn.serving.monitor import per_sample


@pytest.mark.parametrize("far", [0.0, 1e3])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_of_a_sample_do_not_depend_on_its_batch(axis, far, masked):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 12, 35)).astype("float32")
    x[3] += far  # Only this sample is shifted.
    mask = rng.random((6, 12)) < 0.6 if masked else None
    scale = np.ones(x.shape[axis])

    def of(rows):
        part = None if mask is None else tf.constant(mask[rows])
        return per_sample.moments(tf.constant(x[rows]), axis, part, len(x[rows]), scale)

    whole = of(slice(0, 6))
    for i in range(6):
        for alone, among in zip(of(slice(i, i + 1)), whole, strict=True):
            np.testing.assert_array_equal(alone[0], among[i])


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("far", [0.0, 5.0, 1e4])
def test_moments_are_right_far_from_zero(axis, far):
    x = np.random.default_rng(0).normal(far, 1.0, (7, 9, 10, 4)).astype("float32")
    scale = np.ones(x.shape[axis])
    count, mean, variance = per_sample.moments(tf.constant(x), axis, None, 7, scale)
    others = tuple(a for a in range(1, 4) if a != axis % 4)
    exact = np.float64(x)
    np.testing.assert_array_equal(count, [[x[0].size / x.shape[axis]]] * 7)
    np.testing.assert_allclose(mean, exact.mean(others), atol=2e-5)
    np.testing.assert_allclose(variance, exact.var(others), rtol=2e-5)
