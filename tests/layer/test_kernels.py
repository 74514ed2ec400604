"""Compare the kernels with NumPy in float64."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfbn.layer import kernels, sums

MODES = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}


def axes_but(axis, rank):
    return tuple(a for a in range(rank) if a != axis % rank)


def along(values, axis, rank):
    shape = [1] * rank
    shape[axis] = -1
    return np.reshape(values, shape)


def reference_moments(x, axis, mask=None):
    x = np.asarray(x, np.float64)
    axes = axes_but(axis, x.ndim)
    where = np.ones(x.shape, bool)
    if mask is not None:
        where = np.broadcast_to(np.asarray(mask, bool)[..., None], x.shape)
    count = where.sum(axes)
    divisor = np.maximum(count, 1)
    mean = np.where(where, x, 0).sum(axes) / divisor
    squares = np.where(where, (x - along(mean, axis, x.ndim)) ** 2, 0)
    return count, mean, squares.sum(axes) / divisor


def reference_train(x, gamma, beta, dy, axis, epsilon, mask=None):
    """Compute y and the gradients by Ioffe & Szegedy 2015, section 3, in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes, rank = axes_but(axis, x.ndim), x.ndim
    count, mean, variance = (along(v, axis, rank) for v in reference_moments(x, axis, mask))
    weight = 1.0 if mask is None else np.asarray(mask, np.float64)[..., None]
    g = along(gamma, axis, rank)
    inverse = 1 / np.sqrt(variance + epsilon)
    v = (x - mean) * inverse
    d_v = dy * g
    d_variance = (d_v * (x - mean)).sum(axes, keepdims=True) * -0.5 * inverse**3
    d_mean = -(d_v * inverse).sum(axes, keepdims=True)
    per_value = weight / np.maximum(count, 1)
    dx = d_v * inverse + per_value * (d_mean + 2 * d_variance * (x - mean))
    return v * g + along(beta, axis, rank), dx, (dy * v).sum(axes), dy.sum(axes)


def train_with_gradients(x, gamma, beta, dy, **options):
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        y = kernels.train(x, gamma, beta, **options)[0]
    return y, *tape.gradient(y, [x, gamma, beta], dy)


def assert_near(actual, expected, tolerance):
    """Require equality within `tolerance` of the largest value, or of 1."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def data(shape, ratio, axis, dtype="float32", seed=0):
    """Draw values with means `ratio` standard deviations from zero, of alternating sign."""
    rng = np.random.default_rng(seed)
    sign = np.where(np.arange(shape[axis]) % 2, 1, -1)
    values = rng.normal(size=shape) + ratio * along(sign, axis, len(shape))
    return tf.cast(tf.constant(values), dtype)


def parameters(channels, seed=0):
    rng = np.random.default_rng(seed)
    gamma, beta = rng.uniform(0.5, 2, channels), rng.normal(size=channels)
    return tf.constant(gamma, tf.float32), tf.constant(beta, tf.float32)


@st.composite
def batches(draw):
    """Draw data, axis and mask (or `None`), of any rank, with odd sizes, zeros and ones."""
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if axis % len(shape):
        shape[0] = draw(st.sampled_from([0, 1, 2, 31, 32, 33, 100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=shape) * draw(st.sampled_from([1e-3, 1, 50]))
    x += draw(st.sampled_from([0, -3, 1e3]))
    dtype = draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
    mask = draw(st.sampled_from([None, "some", "all", "none"]))
    if mask is not None:
        mask = {"some": rng.random(shape[:-1]) < 0.6, "all": 1, "none": 0}[mask]
        mask = np.broadcast_to(np.asarray(mask, bool), shape[:-1])
    return tf.cast(tf.constant(x), dtype), axis, mask


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


CASES = [
    ((6, 5, 4, 3), -1),
    ((6, 3, 5, 4), 1),
    ((70, 3), -1),
    ((5, 1, 7), 1),
    ((4, 6, 5), 1),
    ((3, 2, 3, 2, 4), -1),
    ((3, 2, 2, 2, 2, 4), -1),
    ((3, 7), 0),
]


@pytest.fixture(params=[*MODES, "GPU visible"])
def run(request, monkeypatch):
    """Return a runner for a mode, or for the path for GPUs, which is correct on any device."""
    if request.param == "GPU visible":
        monkeypatch.setattr(kernels, "_gpu_visible", lambda: True)
        monkeypatch.setattr(kernels, "_xla_runs_on_gpu", lambda: True)
        return tf.function
    return MODES[request.param]


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
    # With few bits and a far mean, rounding may leave no variance.
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


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_half_precision_with_one_channel_far_from_zero(dtype, axis, run):
    """Another channel has values whose distance from the mean overflows the dtype."""
    rng = np.random.default_rng(0)
    x = rng.normal(30, 1, (400, 3))
    x[:, 1] = -6e4
    x[::40, 1] = 6.5e4
    x[:, 2] = rng.normal(size=400)
    x = np.asarray(tf.cast(x, dtype))
    x = np.ascontiguousarray(np.moveaxis(x.reshape(20, 20, 3), -1, axis))
    dy = np.asarray(tf.cast(data(x.shape, 1, axis, seed=1), dtype))
    gamma, beta = parameters(3)
    step = run(lambda *args: train_with_gradients(*args, axis=axis, epsilon=1e-3))
    y, dx, dgamma, dbeta = step(tf.constant(x), gamma, beta, tf.constant(dy))
    right = reference_train(x, gamma, beta, dy, axis, 1e-3)
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    for actual, expected in zip((y, dx), right[:2], strict=True):
        actual = np.asarray(tf.cast(actual, tf.float64))
        np.testing.assert_allclose(actual, expected, rtol=rounding, atol=rounding * 1e-2)
    # The moments are not rounded to the dtype, so the tolerance is below its rounding.
    np.testing.assert_allclose(dgamma, right[2], rtol=0, atol=1e-6 * np.sum(np.abs(dy)))
    np.testing.assert_allclose(dbeta, right[3], rtol=0, atol=1e-6 * np.sum(np.abs(dy)))


def formula(x, gamma, axis):
    """Compute the step in float64 from operations that TensorFlow differentiates correctly."""
    axes = axes_but(axis, len(x.shape))
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
    shape = [1] * len(x.shape)
    shape[axis] = -1
    return (x - mean) / tf.sqrt(variance + 0.1) * tf.reshape(gamma, shape)


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
    """Forward mode works inside a function, and on a function."""
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


@pytest.mark.slow
def test_second_order_gradient_of_a_step_in_a_branch():
    """TensorFlow's derivative of the fused operation is silently 0 there."""
    x, dy = data((6, 7, 3), 0, -1), data((6, 7, 3), 0.5, -1, seed=1)
    gamma, _ = parameters(3)

    @tf.function
    def second(x, far):
        def step():
            return kernels.train(x, gamma, None, axis=-1, epsilon=0.1)[0]

        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.cond(far, step, lambda: x)
            first = inner.gradient(y, x, dy)
        return outer.gradient(first, x, tf.sin(dy))

    def right(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = formula(x, tf.cast(gamma, tf.float64), -1)
            first = inner.gradient(y, x, tf.cast(dy, tf.float64))
        return outer.gradient(first, x, tf.cast(tf.sin(dy), tf.float64))

    assert_near(second(x, tf.constant(True)), right(tf.cast(x, tf.float64)), 2e-5)


def test_tracing_a_network_traces_the_step_once():
    """Its gradients are registered once too, because they stay until the process ends."""
    x, dy = data((6, 7, 3), 0, -1), data((6, 7, 3), 1, -1, seed=1)

    def network(x, dy, layers):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(layers):
                y = kernels.train(y, None, None, axis=-1, epsilon=0.012345)[0]
        return tape.gradient(y, x, dy)

    def traced(layers):
        graph = tf.function(network).get_concrete_function(x, dy, layers).graph.as_graph_def()
        return len(graph.library.function), len(graph.node)

    (functions, nodes), (more_functions, more_nodes) = traced(1), traced(5)
    assert more_functions == functions
    assert more_nodes - nodes <= 4 * 30


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


@pytest.mark.quick(5)
@pytest.mark.parametrize("samples", [0, 1, 16])
@pytest.mark.parametrize(
    ("positions", "fits"),
    [
        ((56, 56), True),
        ((14, 14), True),
        ((7, 7), True),
        ((13, 13), True),
        ((8,), True),
        ((0, 8), True),
        ((7,), False),
        ((1, 1), False),
        ((53,), False),
        ((None, 14), False),
    ],
)
def test_sums_over_stretches(positions, fits, samples):
    """If a stretch divides the positions of a sample, its length is computed in the trace."""
    step = tf.function(
        lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3),
        input_signature=[tf.TensorSpec((None, *positions, 4))],
    )
    assert ("FloorMod" in operations(step.get_concrete_function().graph)) is not fits
    for ratio in (0, 7.9, 1e4):
        x = data((samples, *(n if n is not None else 14 for n in positions), 4), ratio, -1)
        _, count, mean, variance = step(x)
        right_count, right_mean, right_variance = reference_moments(x, -1)
        assert count == right_count[0]
        assert np.all(np.abs(mean - right_mean) <= 1e-6 * (1 + np.abs(right_mean)))
        rounding = (2.0**-24 * right_mean) ** 2
        assert np.all(np.abs(variance - right_variance) <= 5e-6 * right_variance + rounding)


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
        # TensorFlow's derivatives of the formula, in float64.
        axes = axes_but(axis, len(shape))
        # The second derivative of tf.nn.moments is wrong: it treats the mean as a constant.
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
        v = (x - mean) / tf.sqrt(variance + 0.1)
        return v * tf.reshape(gamma, along(np.ones(shape[axis]), axis, len(shape)).shape)

    def ours(x, gamma):
        return kernels.train(x, gamma, None, axis=axis, epsilon=0.1)[0]

    x = data(shape, ratio, axis)
    right = second(plain, *(tf.cast(v, tf.float64) for v in (x, gamma, dy)))
    actual = run(lambda *args: second(ours, *args))(x, gamma, dy)
    for one, expected in zip(actual, right, strict=True):
        assert np.abs(expected).max() > 1e-3
        assert_near(one, expected, 2e-5)


def operations(graph):
    """Return the names of all operations, including the bodies of functions."""
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


def traced(shape, dtype, **options):
    function = tf.function(
        lambda x: train_with_gradients(
            x,
            *parameters(4),
            tf.ones_like(x),
            axis=options.pop("axis", -1),
            epsilon=1e-3,
            **options,
        ),
        jit_compile=options.pop("jit_compile", None),
    )
    return operations(function.get_concrete_function(tf.TensorSpec(shape, dtype)).graph)


FUSED, FUSED_GRADIENT = "FusedBatchNormV3", "FusedBatchNormGradV3"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        *(((None,) * rank + (4,), -1) for rank in range(1, 5)),
        *(((None, 4) + (None,) * rank, 1) for rank in range(1, 4)),
    ],
)
def test_training_is_fused_where_promised(dtype, shape, axis):
    assert {FUSED, FUSED_GRADIENT} <= traced(shape, dtype, axis=axis)


def argument(x):
    return x


def computed(x):
    return tf.nn.relu(x)


def convolution(x):
    """Compute an identity convolution."""
    identity = tf.eye(x.shape[-1], batch_shape=[1, 1], dtype=x.dtype)
    return tf.nn.conv2d(x, identity, 1, "SAME")


def biased_convolution(x):
    return tf.nn.bias_add(convolution(x), tf.zeros(x.shape[-1], x.dtype))


def inference(source, axis):
    """Return the inference step after a function of its argument."""
    parts = {"axis": axis, "epsilon": 1e-3}
    return lambda x, *weights: kernels.normalize(source(x), *weights, **parts)


LAST = (None, None, None, 4)


@pytest.mark.quick(8)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("source", "shape", "axis", "fused", "fused_with_gpu"),
    [
        (argument, LAST, -1, True, True),
        (argument, (None, 4), 1, True, True),
        (argument, (None, 4, None), 1, False, True),
        (computed, LAST, 3, False, True),
        (convolution, LAST, 3, True, True),
        (convolution, (None, 4, 5, 4), 1, False, True),
        (biased_convolution, LAST, -1, False, True),
    ],
)
def test_inference_is_fused_where_promised(
    dtype, source, shape, axis, fused, fused_with_gpu, monkeypatch
):
    weights = [tf.ones(4)] * 4
    for gpu, expected in [(False, fused), (True, fused_with_gpu)]:
        monkeypatch.setattr(kernels, "_gpu_visible", lambda gpu=gpu: gpu)
        infer = tf.function(inference(source, axis))
        graph = infer.get_concrete_function(tf.TensorSpec(shape, dtype), *weights).graph
        assert (FUSED in operations(graph)) is expected


@pytest.mark.quick(6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", [argument, computed, convolution, biased_convolution])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("ratio", [1, 1e4])
def test_inference_and_its_gradient_far_from_zero(mode, source, axis, ratio):
    x = abs(data((5, 4, 4, 4), ratio, axis))
    dy = data(x.shape, 1, axis, seed=1)
    gamma, beta = parameters(4)
    mean, variance = tf.fill([4], float(ratio)), tf.linspace(0.5, 2.0, 4)

    def step(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y = inference(source, axis)(x, mean, variance, gamma, beta)
        return y, *tape.gradient(y, [x, gamma, beta], dy)

    scale, g, b = (along(v, axis, 4) for v in (1 / np.sqrt(variance + 1e-3), gamma, beta))
    normalized, axes = (np.asarray(x, np.float64) - ratio) * scale, axes_but(axis, 4)
    right = [
        normalized * g + b,
        dy * scale * g,
        np.sum(dy * normalized, axes),
        np.sum(dy, axes),
    ]
    for actual, expected in zip(MODES[mode](step)(x, gamma, beta, dy), right, strict=True):
        assert_near(actual, expected, 2e-6)


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


def test_no_fused_operation_in_functions_called_under_xla():
    """Fails if TensorFlow removes or changes the private function that detects XLA."""

    @tf.function
    def inner(x):
        return kernels.train(x, None, None, axis=-1, epsilon=1e-3)[0]

    def outer(x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: inner(x), lambda: x)

    spec = tf.TensorSpec((8, 4), tf.float32)
    assert FUSED in operations(tf.function(outer).get_concrete_function(spec).graph)
    # A traced function would keep its graph, so this one is new.
    inner = tf.function(inner.python_function)
    compiled = tf.function(outer, jit_compile=True)
    assert FUSED not in operations(compiled.get_concrete_function(spec).graph)


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_graph_traced_outside_is_right_when_xla_compiles_it_later(ratio):
    step = tf.function(lambda x: kernels.train(x, None, None, axis=-1, epsilon=1e-3))
    x = data((16, 28, 28, 4), ratio, -1)
    step(x)
    *_, variance = tf.function(step, jit_compile=True)(x)
    np.testing.assert_allclose(variance, reference_moments(x, -1)[2], rtol=1e-5)


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


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e4, 1e6]), min_size=1, max_size=200),
    st.sampled_from([-1, 1, 0]),
)
@example([1e6] + [0.0] * 199, -1)
@example(([1e6] + [0.0] * 60) * 3, -1)
def test_sampled_mean_is_near_the_mean_for_any_data(values, axis):
    shape = {-1: (len(values), 1), 1: (len(values), 1, 1), 0: (1, len(values))}[axis]
    x = tf.reshape(tf.constant(values, tf.float32), shape)
    sampled = sums.sampled_mean(x, axis, long=False)
    distance = abs(float(sampled[0]) - np.mean(values))
    assert distance <= np.sqrt(61) * np.std(values) * (1 + 1e-5) + 1e-6 * abs(np.mean(values))


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


@pytest.mark.slow
def test_kernels_are_correct_without_onednn():
    """TensorFlow has two CPU versions of the fused operation and chooses when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gradient and not onednn", __file__]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
