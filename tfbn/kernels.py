"""Batch normalization as pure functions on tensors.

Statistics are always float32 (float64 for float64 inputs), whatever the dtype of the
inputs, and have one value per channel.
"""

import tensorflow as tf


def moments(x, axis, mask=None):
    """Count, mean and biased variance per channel over all unmasked positions of a batch."""
    x = tf.cast(x, statistics_dtype(x.dtype))
    axes = _reduction_axes(x, axis)
    if mask is None:
        mean, variance = tf.nn.moments(x, axes)
        count = tf.cast(tf.size(x) // tf.shape(x)[axis], tf.float64)
        return count, mean, variance
    weights = tf.cast(tf.broadcast_to(tf.expand_dims(mask, -1), tf.shape(x)), x.dtype)
    count = tf.reduce_sum(weights, axes)
    mean, variance = tf.nn.weighted_moments(x, axes, weights)
    return tf.cast(count[0], tf.float64), mean, variance


def normalize(x, mean, variance, gamma, beta, *, axis, epsilon):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, in the dtype of x."""
    dtype = statistics_dtype(x.dtype)
    shape = [1] * x.shape.rank
    shape[axis] = -1

    def per_channel(v):
        return None if v is None else tf.reshape(tf.cast(v, dtype), shape)

    y = tf.nn.batch_normalization(
        tf.cast(x, dtype),
        per_channel(mean),
        per_channel(variance),
        per_channel(beta),
        per_channel(gamma),
        epsilon,
    )
    return tf.cast(y, x.dtype)


def statistics_dtype(dtype):
    """The dtype in which statistics of values of `dtype` are computed."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def _reduction_axes(x, axis):
    return [a for a in range(x.shape.rank) if a != axis % x.shape.rank]
