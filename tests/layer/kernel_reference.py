"""Reference steps of batch norm in float64 NumPy, and data for the kernels."""

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

from tfbn.layer import kernels

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


def formula(x, gamma, axis):
    """Compute the step in float64 from operations that TensorFlow differentiates correctly."""
    axes = axes_but(axis, len(x.shape))
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
    shape = [1] * len(x.shape)
    shape[axis] = -1
    return (x - mean) / tf.sqrt(variance + 0.1) * tf.reshape(gamma, shape)


def operations(graph):
    """Return the names of all operations, including the bodies of functions."""
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


FUSED, FUSED_GRADIENT = "FusedBatchNormV3", "FusedBatchNormGradV3"


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
