"""Tests of the fused kernel for CPUs, and of when it is used."""

import numpy as np
import pytest
import tensorflow as tf
from kernel_reference import (
    FUSED,
    FUSED_GRADIENT,
    MODES,
    along,
    assert_near,
    axes_but,
    data,
    formula,
    operations,
    parameters,
    reference_moments,
    reference_train,
    traced,
    train_with_gradients,
)

from tfbn.layer import kernels


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_half_precision_with_one_channel_far_from_zero(dtype, axis, run):
    """In another channel the distance from the mean overflows the dtype."""
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


@pytest.mark.slow
def test_second_order_gradient_of_a_step_in_a_branch():
    """TensorFlow's derivative of the fused operation is silently 0 in this case."""
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
    """Gradients are registered once too, because a registration lasts until the process ends."""
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


def inference(source, axis):
    """Return the inference step, applied to a function of its argument."""
    parts = {"axis": axis, "epsilon": 1e-3}
    return lambda x, *weights: kernels.normalize(source(x), *weights, **parts)


LAST = (None, None, None, 4)


def computed(x):
    return tf.nn.relu(x)


def convolution(x):
    """Compute an identity convolution."""
    identity = tf.eye(x.shape[-1], batch_shape=[1, 1], dtype=x.dtype)
    return tf.nn.conv2d(x, identity, 1, "SAME")


def biased_convolution(x):
    return tf.nn.bias_add(convolution(x), tf.zeros(x.shape[-1], x.dtype))


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
