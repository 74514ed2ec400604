"""Moments of a population that arrives in parts: count, mean and M2 per channel.

M2 is the sum of squared distances from the mean, so the population variance is
M2 / count. Everything is float64: a part may hold few values and a population many.
"""

from typing import NamedTuple

import tensorflow as tf


class Moments(NamedTuple):
    """Count (scalar), mean and M2 (one value per channel) of the values seen so far."""

    count: tf.Tensor
    mean: tf.Tensor
    m2: tf.Tensor


def from_batch(count, mean, variance, *, method):
    """The moments that one batch brings, given its count, mean and biased variance.

    `"pooled"` and `"exact"`: M2 = m * sigma2. `"algorithm2"` takes the unbiased
    variance of Algorithm 2, step 10 (Ioffe & Szegedy 2015), so its M2 is
    m * m / (m - 1) * sigma2: not finite for a batch of one value per channel.
    """
    count, mean, variance = (tf.cast(v, tf.float64) for v in (count, mean, variance))
    if method == "algorithm2":
        # 0 values bring nothing and must not divide 0 by -1 into a negative zero.
        variance *= count / tf.where(count == 0, tf.ones_like(count), count - 1)
    return Moments(count, mean, count * variance)


def merge(a, b, *, method):
    """The moments of two parts together.

    mean = (n_a mean_a + n_b mean_b) / n. For `"pooled"` and `"exact"`,
    M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / n (Chan, Golub & LeVeque 1983,
    eq. 2.1), the law of total variance. `"algorithm2"` averages the parts' variances:
    M2 = M2_a + M2_b. A part of count 0 changes nothing.
    """
    count = a.count + b.count
    share = b.count / tf.maximum(count, 1.0)
    delta = b.mean - a.mean
    m2 = a.m2 + b.m2
    if method != "algorithm2":
        m2 += delta * delta * (a.count * share)
    return Moments(count, a.mean + delta * share, m2)


def variance(moments):
    """M2 / count, per channel; 0 where nothing was seen."""
    return moments.m2 / tf.maximum(moments.count, 1.0)


def finite(moments):
    """Whether mean and M2 are finite in every channel."""
    return tf.reduce_all(tf.math.is_finite(moments.mean) & tf.math.is_finite(moments.m2))
