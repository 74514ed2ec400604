"""Tests of the composite kernel: masks, XLA, replicas and renorm."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from kernel_reference import (
    FUSED,
    FUSED_GRADIENT,
    assert_near,
    batches,
    data,
    parameters,
    reference_moments,
    reference_train,
    traced,
    train_with_gradients,
)

from tfbn.layer import kernels


@settings(max_examples=40)
@given(batches().filter(lambda batch: batch[0].dtype == tf.float32 and batch[2] is not None))
def test_masked_training_step(batch):
    x, axis, mask = batch
    gamma, beta = parameters(x.shape[axis])
    dy = data(x.shape, 1, axis, seed=1)
    # An epsilon below the variance of the smallest data.
    step = {"axis": axis, "epsilon": 1e-3, "mask": mask}
    expected = reference_train(x, gamma, beta, dy, axis, 1e-3, mask)
    for actual, right in zip(
        train_with_gradients(x, gamma, beta, dy, **step), expected, strict=True
    ):
        assert_near(actual, right, 3e-5)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 1e30])
def test_masked_values_never_count(hidden):
    x = np.random.default_rng(0).normal(size=(6, 5, 3)).astype("float32")
    mask = np.arange(30).reshape(6, 5) % 3 > 0
    expected = reference_moments(x, -1, mask)
    x[~mask] = hidden
    with tf.GradientTape() as tape:
        x = tf.constant(x)
        tape.watch(x)
        actual = kernels.moments(x, -1, mask)
    for one, right in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.broadcast_to(one, right.shape), right, rtol=1e-6, atol=1e-7)
    gradient = tape.gradient(actual[1:], x).numpy()
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[~mask] == 0)


def test_mask_that_includes_the_channels():
    x = data((4, 3, 5), 2, 1)
    mask = np.array([[1, 0, 1], [1, 0, 1], [1, 0, 0], [1, 0, 1]])
    for actual, right in zip(
        kernels.moments(x, 1, mask), reference_moments(x, 1, mask), strict=True
    ):
        np.testing.assert_allclose(actual, right, rtol=1e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64"},
        {"dtype": "float32", "mask": np.ones((2, 3))},
        {"dtype": "float32", "jit_compile": True},
        {"dtype": "float16", "jit_compile": True},
        {"dtype": "float32", "synchronized": True},
    ],
)
def test_composite_elsewhere(options):
    ops = traced((2, 3, 4), **options)
    assert "Rsqrt" in ops
    assert not {FUSED, FUSED_GRADIENT} & ops


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_graph_traced_outside_is_right_when_xla_compiles_it_later(ratio):
    step = tf.function(lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3))
    x = data((16, 28, 28, 4), ratio, -1)
    step(x)
    *_, variance = tf.function(step, jit_compile=True)(x)
    np.testing.assert_allclose(variance, reference_moments(x, -1)[2], rtol=1e-5)


def test_renorm_corrections():
    r, d = kernels.renorm_corrections(
        tf.constant([2.0, 1.0, -9.0], tf.float64),
        tf.constant([3.99, 0.08, 99.99], tf.float64),
        tf.constant([1.0, 1.0, 0.0]),
        tf.constant([0.5, 0.0, 1.0]),
        0.01,
        {"rmin": 0.5, "rmax": 3.0, "dmax": 4.0},
    )
    # stddev is 2, 0.3 and 10; a running stddev of 0 counts as sqrt(epsilon) = 0.1.
    np.testing.assert_allclose(r, [3.0, 3.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(d, [2.0, 0.0, -4.0], rtol=1e-6)
    r, _ = kernels.renorm_corrections(
        tf.constant([2.0]), tf.constant([3.99]), [1.0], [8.0], 0.01, {"rmin": 0.5, "rmax": None}
    )
    np.testing.assert_allclose(r, [0.5], rtol=1e-6)
