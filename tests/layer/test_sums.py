"""Compare stretches and their moments with NumPy in float64."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfbn.layer import sums


@st.composite
def data(draw):
    """Draw values of any rank, size, floating dtype and distance from zero, and a channel axis."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    other = (axis + 1) % len(shape)
    shape[other] = draw(st.sampled_from([0, 1, 2, 31, 49, 53, 64, 100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(draw(st.sampled_from([0, 1.4, -20, 1e4])), 1, shape)
    return tf.cast(x, draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))), axis


def right_moments(x, axis):
    x = np.moveaxis(np.asarray(tf.cast(x, tf.float64)), axis, -1)
    x = x.reshape(-1, x.shape[-1])
    if not len(x):
        return 0, np.zeros(x.shape[1]), np.zeros(x.shape[1])
    return len(x), x.mean(0), x.var(0)


@pytest.fixture(scope="module")
def measure():
    """Return one trace of the moments for each axis and dtype."""
    return {
        (within, dtype): tf.function(
            lambda x, within=within: sums.moments_of_stretches(x, within),
            input_signature=[tf.TensorSpec([None, None, None], dtype)],
            autograph=False,
        )
        for within in (1, 2)
        for dtype in (tf.float32, tf.float64, tf.float16, tf.bfloat16)
    }


def assert_right(moments, x, axis):
    count, mean, variance = moments
    right_count, right_mean, right_variance = right_moments(x, axis)
    assert count.dtype == mean.dtype == variance.dtype == tf.float64
    assert count == right_count
    std = np.sqrt(right_variance)
    assert np.all(np.abs(mean - right_mean) <= 1e-6 * np.maximum(np.abs(right_mean), std))
    rounding = (2.0**-24 * right_mean) ** 2
    assert np.all(np.abs(variance - right_variance) <= 2e-6 * right_variance + rounding)


@settings(max_examples=150)
@given(given_data=data())
def test_one_trace_serves_any_shape(measure, given_data):
    x, axis = given_data
    x3 = sums.stretched(x, axis)
    assert x3.dtype == x.dtype
    within = sums.within_stretches(x, axis)
    assert_right(measure[within, x.dtype](x3), x, axis)
    assert_right(sums.moments_of_stretches(x3, within), x, axis)


@pytest.mark.slow
@settings(max_examples=60)
@given(data(), st.data())
def test_stretches_of_unknown_shapes(drawn, choice):
    """The stretches do not depend on how much of the shape is known."""
    x, axis = drawn
    spec = [choice.draw(st.sampled_from([n, None])) for n in x.shape]
    step = tf.function(
        lambda x: sums.moments_of_stretches(
            sums.stretched(x, axis), sums.within_stretches(x, axis)
        ),
        input_signature=[tf.TensorSpec(spec, x.dtype)],
    )
    assert_right(step(x), x, axis)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((8, 56, 56, 3), -1, (512, 49, 3)),
        ((8, 14, 14, 3), 3, (32, 49, 3)),
        ((96, 3), 1, (2, 48, 3)),
        ((53, 3), 1, (53, 1, 3)),
        ((0, 3), 1, (0, 49, 3)),
        ((5, 3, 4, 6), 1, (5, 3, 24)),
        ((5, 1, 4, 6), 1, (5, 1, 24)),
        ((3, 7), 0, (1, 3, 7)),
    ],
)
def test_stretches_preserve_the_order_of_the_data(shape, axis, expected):
    x = tf.reshape(tf.range(np.prod(shape)), shape)
    assert sums.stretched(x, axis).shape == expected
    np.testing.assert_array_equal(np.ravel(sums.stretched(x, axis)), np.ravel(x))
    unknown = tf.function(
        lambda x: sums.stretched(x, axis), input_signature=[tf.TensorSpec([None] * len(shape))]
    )
    last = axis % len(shape) == len(shape) - 1
    assert unknown(tf.cast(x, tf.float32)).shape[2 if last else 1] == shape[axis]


def test_tracing_stretches_is_cheap():
    """A network with a hundred layers traces them a hundred times."""
    for spec, most in [([None, 14, 14, 3], 3), ([None, 3, 14, 14], 3), ([None, 3], 17)]:
        axis = spec.index(3)
        with tf.Graph().as_default() as graph:
            sums.stretched(tf.compat.v1.placeholder(tf.float32, spec), axis)
        assert len(graph.get_operations()) <= most


@pytest.mark.parametrize("within", [1, 2])
def test_no_gradient_is_registered(within):
    """A registered gradient would keep the traced function alive until the process ends."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, None, None])
        sums.moments_of_stretches(x, within)
    assert "_gradient_op_type" not in str(graph.as_graph_def())
    assert not {"IdentityN"} & {op.type for op in graph.get_operations()}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("centre", [0, 100])
def test_non_finite_values_affect_their_channel_alone(bad, centre):
    x = np.random.default_rng(0).normal(centre, 1, (4, 32, 3)).astype("float32")
    x[2, 7, 1] = bad
    _, mean, variance = sums.moments_of_stretches(tf.constant(x), 1)
    assert (np.isfinite(mean) & np.isfinite(variance)).tolist() == [True, False, True]
    right = right_moments(np.delete(x, 1, axis=2), -1)
    np.testing.assert_allclose(np.delete(mean, 1), right[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.delete(variance, 1), right[2], rtol=2e-6)


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
