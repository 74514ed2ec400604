"""The kernel for all else: batch normalization of plain operations, for XLA to fuse."""

import functools
from collections.abc import Callable, Mapping

import tensorflow as tf

from tfbn.layer import sums


def train(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
    mask: tf.Tensor | None,
    sampled: bool,
    synchronized: bool,
    renorm: Callable | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `kernels.train`; `sampled` as in `centred_moments`."""
    centred, shift, count, mean, variance = centred_moments(x, axis, mask, sampled=sampled)
    if synchronized:
        count, mean, variance = _merge_replicas(count, mean, variance)
    corrections = None if renorm is None else renorm(mean, variance)
    y = scale_centred(centred, mean - shift, variance, gamma, beta, axis, epsilon, corrections)
    return tf.cast(y, x.dtype), *(tf.stop_gradient(v) for v in (count, mean, variance))


def train_compiled(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, *, axis: int, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `kernels.train`, compiled by XLA for itself, so that its operations become few kernels."""
    channels = sums.number_of_channels(x, axis)
    gamma = tf.ones([channels]) if gamma is None else tf.cast(gamma, tf.float32)
    beta = tf.zeros([channels]) if beta is None else tf.cast(beta, tf.float32)
    step = _compiled_step(3 - sums.within_stretches(x, axis), x.dtype, epsilon)
    y, *moments = step(sums.stretched(x, axis), gamma, beta)
    return tf.reshape(y, tf.shape(x)), *moments


@functools.cache
def _compiled_step(axis: int, dtype: tf.DType, epsilon: float) -> Callable:
    """From (x, gamma, beta) to the results, for `x` from `sums.stretched`; for all layers."""

    def step(x, gamma, beta):
        return train(
            x,
            gamma,
            beta,
            axis=axis,
            epsilon=epsilon,
            mask=None,
            sampled=True,
            synchronized=False,
            renorm=None,
        )

    signature = [tf.TensorSpec([None] * 3, dtype), *[tf.TensorSpec([None])] * 2]
    with tf.init_scope(), tf.device(None):
        function = tf.function(step, autograph=False, jit_compile=True)
        return function.get_concrete_function(*signature)


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
) -> tf.Tensor:
    """As `kernels.normalize`."""
    dtype = sums.statistics_dtype(x.dtype)
    centred = tf.cast(x, dtype) - sums.along(axis, tf.cast(mean, dtype), x)
    y = scale_centred(centred, 0, tf.cast(variance, dtype), gamma, beta, axis, epsilon)
    return tf.cast(y, x.dtype)


def centred_moments(
    x: tf.Tensor, axis: int, mask: tf.Tensor | None, *, sampled: bool
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """`(x - shift, shift, count, mean, variance)` for a shift near the mean of unmasked values.

    With d = x - shift, mean = shift + sum(d) / count and
    variance = sum(d^2) / count - (sum(d) / count)^2. The identity holds for any shift; one near
    the mean keeps it free of cancellation (Chan, Golub & LeVeque 1983, "Algorithms for Computing
    the Sample Variance", section 3).

    Args:
        x, axis, mask: As in `kernels.moments`.
        sampled: Whether the shift may be the mean of a part of the data, if there is no mask.
    """
    x = tf.cast(x, sums.statistics_dtype(x.dtype))
    counted = x
    if mask is not None:
        mask = tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(x)[:-1])[..., tf.newaxis]
        # Before anything else, so that no gradient ever meets the values behind the mask.
        counted = tf.where(mask, x, tf.zeros((), x.dtype))
    count = sums.values_per_channel(x, axis, mask)
    if mask is None and sampled:
        shift = sums.sampled_mean(x, axis)
    else:
        shift = tf.cast(sums.sum_of_channels(counted, axis) / tf.maximum(count, 1), x.dtype)
    shift = tf.stop_gradient(shift)
    centred = x - sums.along(axis, shift, x)
    counted = centred if mask is None else tf.where(mask, centred, tf.zeros((), x.dtype))
    mean, variance = _moments_near_zero(counted, axis, count)
    shift = tf.cast(shift, tf.float64)
    return centred, shift, count, shift + mean, variance


def scale_centred(
    centred: tf.Tensor,
    rest: tf.Tensor | float,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    axis: int,
    epsilon: float,
    corrections: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> tf.Tensor:
    """gamma * (r * (centred - rest) / sqrt(variance + epsilon) + d) + beta.

    `rest`, the mean after centring, is small beside the standard deviation. So it may go
    into the offset without the cancellation that the mean itself would cause there.
    """
    dtype = variance.dtype
    scale = tf.math.rsqrt(variance + epsilon)
    offset = -rest * scale
    if corrections is not None:
        r, d = (tf.cast(tf.stop_gradient(c), dtype) for c in corrections)
        scale, offset = scale * r, offset * r + d
    if gamma is not None:
        gamma = tf.cast(gamma, dtype)
        scale, offset = scale * gamma, offset * gamma
    if beta is not None:
        offset += tf.cast(beta, dtype)
    return _affine(centred, tf.cast(scale, centred.dtype), tf.cast(offset, centred.dtype), axis)


def renorm_corrections(
    mean: tf.Tensor,
    variance: tf.Tensor,
    running_mean: tf.Tensor,
    running_stddev: tf.Tensor,
    epsilon: float,
    clipping: Mapping[str, float | None],
) -> tuple[tf.Tensor, tf.Tensor]:
    """The corrections (r, d) of Batch Renormalization (Ioffe 2017, equation 2 and section 3).

    r = stddev / running_stddev, clipped to [rmin, rmax], and
    d = (mean - running_mean) / running_stddev, clipped to [-dmax, dmax], where
    stddev = sqrt(variance + epsilon). All tensors have shape `[channels]`; `clipping` has any
    of the keys "rmin", "rmax" and "dmax".
    """
    dtype = mean.dtype
    epsilon = tf.cast(epsilon, dtype)
    # In the first steps of a training the running value may be anything, 0 too.
    divisor = tf.maximum(tf.cast(running_stddev, dtype), tf.sqrt(epsilon))
    r = tf.sqrt(variance + epsilon) / divisor
    d = (mean - tf.cast(running_mean, dtype)) / divisor
    limits = {key: limit for key, limit in clipping.items() if limit is not None}
    if "rmin" in limits:
        r = tf.maximum(r, limits["rmin"])
    if "rmax" in limits:
        r = tf.minimum(r, limits["rmax"])
    if "dmax" in limits:
        d = tf.clip_by_value(d, -limits["dmax"], limits["dmax"])
    return r, d


def _affine(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, axis: int) -> tf.Tensor:
    """x * scale + offset.

    The gradients of scale and offset are sums over all positions. Here they are those of `sums`,
    because the ones that TensorFlow would derive take XLA on the CPU three times as long.
    """

    @tf.custom_gradient
    def affine(x, scale, offset):
        def gradient(dy):
            d_scale, d_offset = (
                tf.cast(sums.sum_of_channels(v, axis), x.dtype) for v in (dy * x, dy)
            )
            return dy * sums.along(axis, scale, x), d_scale, d_offset

        return x * sums.along(axis, scale, x) + sums.along(axis, offset, x), gradient

    return affine(x, scale, offset)


def _moments_near_zero(x: tf.Tensor, axis: int, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of values whose mean is not many standard deviations from zero."""

    @tf.custom_gradient
    def sums_of(x):
        def gradient(d_total, d_squares):
            d_total, d_squares = (
                sums.along(axis, tf.cast(d, x.dtype), x) for d in (d_total, d_squares)
            )
            return d_total + 2 * d_squares * x

        return sums.sums(sums.stretched(x, axis), sums.within_stretches(x, axis)), gradient

    total, squares = sums_of(x)
    return sums.moments_of_sums(total, squares, count)


def _merge_replicas(
    count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The moments of all replicas' values together (Chan, Golub & LeVeque 1983, section 2)."""
    context = tf.distribute.get_replica_context()
    if context is None:
        return count, mean, variance

    def total(value):
        return context.all_reduce(tf.distribute.ReduceOp.SUM, value)

    all_counts = total(count)
    divisor = tf.maximum(all_counts, 1)
    all_mean = total(count * mean) / divisor
    all_variance = total(count * (variance + tf.square(mean - all_mean))) / divisor
    return all_counts, all_mean, all_variance
