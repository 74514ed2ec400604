"""Compute moments of every channel and sample of a batch, bit-identical in any batch."""

from typing import NamedTuple

import tensorflow as tf

from tfbn.layer import sums


class Moments(NamedTuple):
    """Moments of the values that entered a batch norm layer, for every sample of a batch.

    Attributes:
        count: Number of values per channel, float64, shape `[samples, 1]`, or
            `[samples, channels]` under a mask.
        mean: float64, shape `[samples, channels]`; 0 without values.
        variance: The biased variance, as `mean`.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def moments(
    x: tf.Tensor, axis: int, mask: tf.Tensor | None, samples: tf.Tensor, scale: tf.Tensor
) -> Moments:
    """Return the moments of every sample.

    mean = sum(x) / count and variance = sum(x^2) / count - mean^2, from sums over short stretches
    in float32 and sums over stretches in float64. The norm of a stretch reads the data once and
    stores no squares. Channels of a sample with |mean| > 8 sqrt(variance + scale), where the
    difference loses digits, are computed again around their mean, independently of the other
    samples.

    Args:
        x: Floating tensor `[rows, ...]`. `rows` is a multiple of `samples`, and the rows of one
            sample are contiguous.
        axis: The axis of the channels, not 0.
        mask: As in `tfbn.layer.kernels.moments`.
        samples: The number of samples, a scalar.
        scale: The squared divisor of the layer, shape `[channels]`.
    """
    x = tf.cast(x, sums.statistics_dtype(x.dtype))
    if mask is not None:
        return _masked(x, axis % x.shape.rank, mask, samples)
    x, within = _stretched(x, axis % x.shape.rank, samples)
    shape = tf.shape(x, tf.int64)
    count = tf.fill([samples, 1], tf.cast(shape[1] * shape[within], tf.float64))

    def around(shift: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        if shift is None:
            near = x
        else:
            near = x - tf.reshape(
                shift, [samples, 1, 1, -1] if within == 2 else [samples, 1, -1, 1]
            )
        total = tf.reduce_sum(tf.cast(tf.reduce_sum(near, within), tf.float64), 1)
        norms = tf.cast(tf.math.reduce_euclidean_norm(near, within), tf.float64)
        mean, variance = sums.moments_of_sums(total, tf.reduce_sum(tf.square(norms), 1), count)
        return mean, tf.where(count > 1, variance, tf.zeros_like(variance))

    mean, variance = around(None)
    # A mean that is not finite must not count as near, so the comparison is not inverted.
    near = tf.square(mean) <= sums.SAFE_RATIO**2 * (variance + tf.cast(scale, tf.float64))

    def shifted() -> tuple[tf.Tensor, tf.Tensor]:
        shift = tf.cast(mean, x.dtype)
        rest, around_mean = around(shift)
        exact = tf.cast(shift, tf.float64) + rest
        return tf.where(near, mean, exact), tf.where(near, variance, around_mean)

    return Moments(count, *tf.cond(tf.reduce_all(near), lambda: (mean, variance), shifted))


def merged(calls: list[Moments]) -> Moments:
    """Return the moments of several calls together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    first, *rest = calls
    for other in rest:
        count = first.count + other.count
        share = other.count / tf.maximum(count, 1)
        delta = other.mean - first.mean
        between = tf.square(delta) * share * (1 - share)
        within = first.variance + (other.variance - first.variance) * share
        first = Moments(count, first.mean + delta * share, within + between)
    return first


def _stretched(x: tf.Tensor, axis: int, samples: tf.Tensor) -> tuple[tf.Tensor, int]:
    """Return `x` with shape `[samples, stretches, stretch, channels]`, or `[samples, stretches,
    channels, stretch]`, and the axis of the stretch.
    """
    channels = sums.number_of_channels(x, axis)
    if axis != x.shape.rank - 1:
        after = x.shape[axis + 1 :].num_elements()
        after = tf.reduce_prod(tf.shape(x)[axis + 1 :]) if after is None else after
        return tf.reshape(x, [samples, -1, channels, after]), 3
    # A sample may have several rows, but its stretches must not depend on other samples.
    positions = x.shape[1:-1].num_elements()
    if positions is None:
        positions = tf.reduce_prod(tf.shape(x)[1:-1])
    stretch = sums.length_of_stretch(positions)
    if isinstance(positions, int) and stretch < 8:  # A prime number, for example.
        stretch = next((n for n in range(8, positions) if positions % n == 0), positions)
    return tf.reshape(x, [samples, -1, stretch, channels]), 2


def _masked(x: tf.Tensor, axis: int, mask: tf.Tensor, samples: tf.Tensor) -> Moments:
    """Return the moments of values where the mask is true, from two passes in float64."""
    mask = tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(x)[:-1])[..., tf.newaxis]
    mask = tf.broadcast_to(mask, tf.shape(x))
    order = [a for a in range(x.shape.rank) if a != axis] + [axis]
    shape = [samples, -1, sums.number_of_channels(x, axis)]
    x, mask = (tf.reshape(tf.transpose(v, order), shape) for v in (tf.cast(x, tf.float64), mask))
    count = tf.math.count_nonzero(mask, 1, dtype=tf.float64)

    def mean_of(values: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.where(mask, values, 0.0), 1) / tf.maximum(count, 1)

    mean = mean_of(x)
    return Moments(count, mean, mean_of(tf.square(x - mean[:, tf.newaxis])))
