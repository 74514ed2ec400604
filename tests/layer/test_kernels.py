"""Compare the kernels with NumPy in float64."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import (
    CASES,
    FUSED,
    MODES,
    along,
    assert_near,
    axes_but,
    batches,
    data,
    formula,
    operations,
    parameters,
    reference_moments,
    reference_train,
    train_with_gradients,
)

from tfbn.layer import kernels


@settings(max_examples=150)
@given(batches(), st.sampled_from(["eager", "eager", "eager", "graph"]))
def test_moments_equal_numpy(batch, mode):
    x, axis, mask = batch
    count, mean, variance = MODES[mode](kernels.moments)(x, axis, mask)
    expected = reference_moments(tf.cast(x, tf.float64), axis, mask)
    assert mean.dtype == variance.dtype == count.dtype == tf.float64
    np.testing.assert_array_equal(np.broadcast_to(count, mean.shape), expected[0])
    std = np.sqrt(expected[2])
    assert np.all(np.abs(mean - expected[1]) <= 1e-6 * np.maximum(np.abs(expected[1]), std))
    # In float32 the rounding of the mean of a constant leaves a small variance.
    rounding = (2.0**-24 * expected[1]) ** 2
    assert np.all(np.abs(variance - expected[2]) <= 1e-6 * expected[2] + rounding)
    assert np.all(variance >= 0)


@pytest.mark.quick(5)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [0, 7.9, 8.1, 1e4])
@pytest.mark.parametrize(("shape", "axis"), [((24, 30, 31, 5), -1), ((24, 5, 30, 31), 1)])
def test_moments_far_from_zero(mode, ratio, shape, axis):
    x = data(shape, ratio, axis)
    _, mean, variance = MODES[mode](kernels.moments)(x, axis)
    _, expected_mean, expected_variance = reference_moments(x, axis)
    assert_near(mean - expected_mean, 0 * expected_mean, 1e-6 * max(ratio, 1))
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-6)


@settings(max_examples=60)
@given(
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.sampled_from([((9, 4), -1), ((4, 2, 3, 2), 1), ((5, 1), 1), ((2, 3, 2, 2, 2), -1)]),
    st.floats(-100, 100),
)
def test_normalize_equals_the_formula(dtype, form, mean):
    shape, axis = form
    x = data(shape, mean, axis, dtype)
    gamma, beta = parameters(shape[axis])
    means = tf.fill([shape[axis]], tf.constant(mean, tf.float64))
    variances = tf.linspace(0.1, 2.0, shape[axis])
    for g, b in [(gamma, beta), (None, beta), (gamma, None)]:
        y = kernels.normalize(x, means, variances, g, b, axis=axis, epsilon=0.01)
        rank = len(shape)
        expected = np.asarray(tf.cast(x, tf.float64)) - mean
        expected /= along(np.sqrt(np.asarray(variances, np.float64) + 0.01), axis, rank)
        expected *= 1 if g is None else along(g, axis, rank)
        expected += 0 if b is None else along(b, axis, rank)
        assert y.dtype == x.dtype
        assert_near(tf.cast(y, tf.float64), expected, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("shape", "axis", "ratio"),
    [(*case, 1e4) for case in CASES] + [(*case, 0) for case in CASES[:1]],
)
def test_training_step_and_its_gradient(shape, axis, ratio, run):
    x, dy = data(shape, ratio, axis), data(shape, 1, axis, seed=1)
    gamma, beta = parameters(shape[axis])
    step = run(lambda *args: train_with_gradients(*args, axis=axis, epsilon=1e-3))
    expected = reference_train(x, gamma, beta, dy, axis, 1e-3)
    for actual, right in zip(step(x, gamma, beta, dy), expected, strict=True):
        assert_near(actual, right, 2e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_training_step_in_other_dtypes(dtype, run):
    # A ratio of 100 and not 1e4: rounding must leave different values in the data.
    x, dy = data((40, 3, 4), 0 if dtype == "bfloat16" else 100, -1, dtype), data((40, 3, 4), 1, -1)
    gamma, beta = parameters(4)
    dy = tf.cast(dy, dtype)
    step = run(lambda *args: train_with_gradients(*args, axis=-1, epsilon=1e-3))
    actual = step(x, gamma, beta, dy)
    x, dy = (np.asarray(tf.cast(v, tf.float64)) for v in (x, dy))
    expected = reference_train(x, gamma, beta, dy, -1, 1e-3)
    tolerance = {"float64": 1e-7, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    assert [v.dtype for v in actual] == [dtype, dtype, "float32", "float32"]
    for one, right in zip(actual, expected, strict=True):
        assert_near(tf.cast(one, tf.float64), right, tolerance)


@pytest.mark.quick(3)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ratio", [0, 7.9, 1e4])
def test_batch_variance_of_training_step(dtype, ratio, run):
    x = data((16, 28, 28, 4), ratio, -1, dtype)
    right = reference_moments(tf.cast(x, tf.float64), -1)[2]
    step = run(lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3))
    _, _, _, variance = step(x)
    # With few bits and a large mean, rounding may leave no variance.
    np.testing.assert_allclose(
        variance, right, rtol=1e-5 if dtype == "float32" else 1e-4, atol=1e-9
    )


@pytest.mark.quick(2)
@pytest.mark.parametrize("stride", [16, 61, 251])
@pytest.mark.parametrize("ratio", [0, 1e4])
def test_variance_if_exactly_the_sampled_values_are_outliers(stride, ratio, run):
    x = np.random.default_rng(0).normal(0, 1e-3, (70000, 2))
    x[::stride] += 1
    x = (x - x.mean(0)) / x.std(0) + ratio
    x = tf.constant(x, tf.float32)
    step = run(lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3))
    _, _, mean, variance = step(x)
    _, right_mean, right_variance = reference_moments(x, -1)
    np.testing.assert_allclose(mean, right_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, right_variance, rtol=2e-5)


def forward_derivative(step, x, gamma, dx, dgamma):
    with tf.autodiff.ForwardAccumulator([x, gamma], [dx, dgamma]) as accumulator:
        y = step(x, gamma)
    return accumulator.jvp(y)


@pytest.mark.quick(2)
@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 7, 3), -1), ((6, 3, 5, 2), 1)])
@pytest.mark.parametrize("ratio", [0, 1e3])
@pytest.mark.parametrize("mask", [None, True])
def test_forward_mode(shape, axis, ratio, mask, where, run):
    """Forward mode works inside a function and around a function."""
    x, dx = data(shape, ratio, axis), data(shape, 0.5, axis, seed=1)
    gamma, dgamma = parameters(shape[axis])
    options = {"axis": axis, "epsilon": 0.1}
    if mask:
        options["mask"] = np.ones(shape[:-1], bool)

    def step(x, gamma):
        return kernels.train(x, gamma, None, **options)[0]

    if where == "around":
        actual = forward_derivative(run(step), x, gamma, dx, dgamma)
    else:
        actual = run(lambda *v: forward_derivative(step, *v))(x, gamma, dx, dgamma)
    wide = [tf.cast(v, tf.float64) for v in (x, gamma, dx, dgamma)]
    right = forward_derivative(lambda x, gamma: formula(x, gamma, axis), *wide)
    assert np.abs(right).max() > 0.1
    assert_near(actual, right, 2e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("where", ["inside", "around"])
def test_forward_mode_in_inference(where, run):
    x, dx = data((6, 7, 3), 2, -1), data((6, 7, 3), 0.5, -1, seed=1)
    gamma, dgamma = parameters(3)
    mean, variance = tf.constant([1.0, 2.0, 3.0]), tf.constant([0.5, 1.0, 2.0])

    def step(x, gamma):
        return kernels.normalize(x, mean, variance, gamma, None, axis=-1, epsilon=1e-3)

    if where == "around":
        function = run(step)
        actual = forward_derivative(function, x, gamma, dx, dgamma)
        if actual is None:
            # TensorFlow has no forward-mode derivative of its fused operation and returns None.
            graph = function.get_concrete_function(x, gamma).graph
            assert FUSED in operations(graph)
            return
    else:
        actual = run(lambda *v: forward_derivative(step, *v))(x, gamma, dx, dgamma)
    scale = 1 / np.sqrt(variance + 1e-3)
    assert_near(actual, dx * scale * gamma + (x - mean) * scale * dgamma, 1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_normalized_integers_are_not_truncated(dtype, run):
    x = tf.cast(np.random.default_rng(0).integers(0, 200, (50, 3)), dtype)
    expected = reference_train(x, np.ones(3), np.zeros(3), np.zeros((50, 3)), -1, 1e-3)[0]
    y, count, mean, variance = run(lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3))(x)
    assert y.dtype == tf.float32
    assert_near(y, expected, 1e-6)
    for actual in ((count, mean, variance), run(lambda x: kernels.moments(x, -1))(x)):
        for one, right in zip(actual, reference_moments(x, -1), strict=True):
            np.testing.assert_allclose(np.broadcast_to(one, 3), right, rtol=1e-6)
    _, mean, variance = reference_moments(x, -1)
    infer = run(lambda x: kernels.normalize(x, mean, variance, None, None, axis=-1, epsilon=1e-3))
    assert_near(infer(x), expected, 1e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_give_non_finite_moments(bad, run):
    x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
    x[7, 1] = bad
    for function in (
        lambda x: kernels.moments(x, -1),
        lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3)[1:],
    ):
        _, mean, variance = run(function)(tf.constant(x))
        finite = np.isfinite(mean) & np.isfinite(variance)
        assert finite.tolist() == [True, False, True]


@pytest.mark.quick(2)
@pytest.mark.parametrize(("shape", "axis"), [((0, 3), -1), ((0, 3, 4), 1), ((2, 0, 3), -1)])
def test_empty_batch(shape, axis, run):
    x = tf.zeros(shape)
    gamma, beta = parameters(3)
    step = run(lambda *args: train_with_gradients(*args, axis=axis, epsilon=1e-3))
    y, dx, dgamma, dbeta = step(x, gamma, beta, x)
    assert y.shape == dx.shape == shape
    assert dgamma.numpy().tolist() == dbeta.numpy().tolist() == [0, 0, 0]
    for f in (kernels.moments, lambda x, a: kernels.train(x, None, None, axis=a, epsilon=1e-3)[1:]):
        count, mean, variance = run(f)(x, axis)
        assert count == 0
        assert mean.numpy().tolist() == variance.numpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
def test_one_value_per_channel(value, run):
    gamma, beta = parameters(3)
    step = run(lambda x: kernels.train(x, gamma, beta, axis=-1, epsilon=1e-3))
    y, count, mean, variance = step(tf.fill([1, 3], value))
    assert count == 1
    assert mean.numpy().tolist() == [value] * 3
    assert variance.numpy().tolist() == [0] * 3
    np.testing.assert_allclose(y[0], beta, rtol=1e-6)


def differentiable_formula(x, gamma, axis, epsilon):
    """Batch normalization that TensorFlow differentiates twice, for float64."""
    # The second derivative of tf.nn.moments is wrong: it treats the mean as a constant.
    axes = axes_but(axis, len(x.shape))
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
    v = (x - mean) / tf.sqrt(variance + epsilon)
    return v * tf.reshape(gamma, along(np.ones(x.shape[axis]), axis, len(x.shape)).shape)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("shape", "axis", "ratio"), [(*CASES[0], 0), (*CASES[1], 1e3), (*CASES[2], 1e3), (*CASES[3], 0)]
)
def test_second_order_gradient(shape, axis, ratio, run):
    dy = data(shape, 0.5, axis, seed=1)
    gamma, _ = parameters(shape[axis])

    def second(forward, x, gamma, dy):
        with tf.GradientTape() as outer:
            outer.watch([x, gamma])
            with tf.GradientTape() as inner:
                inner.watch([x, gamma])
                y = forward(x, gamma)
            first = inner.gradient(y, [x, gamma], dy)
            penalty = sum(tf.reduce_sum(tf.sin(gradient)) for gradient in first)
        return outer.gradient(penalty, [x, gamma])

    def plain(x, gamma):
        return differentiable_formula(x, gamma, axis, 0.1)

    def ours(x, gamma):
        return kernels.train(x, gamma, None, axis=axis, epsilon=0.1)[0]

    x = data(shape, ratio, axis)
    right = second(plain, *(tf.cast(v, tf.float64) for v in (x, gamma, dy)))
    actual = run(lambda *args: second(ours, *args))(x, gamma, dy)
    for one, expected in zip(actual, right, strict=True):
        assert np.abs(expected).max() > 1e-3
        assert_near(one, expected, 2e-5)


@pytest.mark.parametrize("ratio", [0, 1e3])
def test_forward_mode_over_and_behind_gradients(ratio, run):
    """Hessian-vector products; derivatives built earlier must not hinder later ones."""
    shape, axis = (6, 7, 3), -1
    x, dx = data(shape, ratio, axis), data(shape, 0.5, axis, seed=1)
    gamma, dgamma = parameters(3)
    epsilon = 0.1 + ratio / 1e6  # A trace of the kernel that no other test has used.

    def product(forward):
        def first(x, gamma):
            with tf.GradientTape() as tape:
                tape.watch(x)
                penalty = tf.reduce_sum(forward(x, gamma) ** 3)
            return tape.gradient(penalty, x)

        return lambda *args: forward_derivative(first, *args)

    def ours(x, gamma):
        return kernels.train(x, gamma, None, axis=axis, epsilon=epsilon)[0]

    def plain(x, gamma):
        return differentiable_formula(x, gamma, axis, epsilon)

    args = x, gamma, dx, dgamma
    wide = [tf.cast(v, tf.float64) for v in args]
    right = product(plain)(*wide)
    assert np.abs(right).max() > 0.1
    assert_near(run(product(ours))(*args), right, 2e-5)
    actual = run(lambda *args: forward_derivative(ours, *args))(*args)
    assert_near(actual, forward_derivative(plain, *wide), 2e-5)


@pytest.mark.parametrize(("spec", "shapes"), [
    ((None, 4), [(1, 4), (33, 4), (0, 4), (100, 4)]),
    ((None, None, None, 4), [(1, 1, 1, 4), (2, 5, 7, 4), (9, 4, 8, 4)]),
    ((None, 4, None), [(1, 4, 1), (9, 4, 8)]),
])  # fmt: skip
def test_one_trace_serves_all_sizes(spec, shapes):
    traces = []
    axis = spec.index(4)

    @tf.function(input_signature=[tf.TensorSpec(spec, tf.float32)])
    def step(x):
        traces.append(x.shape)
        return kernels.train(x, None, None, axis=axis, epsilon=1e-3)

    for shape in shapes:
        x = data(shape, 3, axis)
        y, count, mean, variance = step(x)
        expected = reference_moments(x, axis)
        assert y.shape == shape
        for one, right in zip((count, mean, variance), expected, strict=True):
            np.testing.assert_allclose(np.broadcast_to(one, (4,)), right, rtol=2e-5, atol=1e-9)
    assert len(traces) == 1


@pytest.mark.slow
def test_kernels_are_correct_without_onednn():
    """TensorFlow has two CPU versions of the fused operation and chooses when it is imported."""
    files = sorted(pathlib.Path(__file__).parent.glob("test_[cfk]*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gradient and not onednn", *files]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
