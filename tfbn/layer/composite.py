"""The composite kernel: batch normalization built from plain operations, which XLA fuses."""

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
    mask: tf.Tensor | None = None,
    long: bool = False,
    synchronized: bool = False,
    renorm: Callable | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute `kernels.train`; for `long` see `sums.stretched`."""
    centred, shift, count, mean, variance = centred_moments(x, axis, mask, long=long)
    if synchronized:
        count, mean, variance = _merge_replicas(count, mean, variance)
    corrections = None if renorm is None else renorm(mean, variance)
    y = scale_centred(
        centred, mean - shift, variance, gamma, beta, axis, epsilon, corrections, long=long
    )
    return tf.cast(y, x.dtype), *(tf.stop_gradient(v) for v in (count, mean, variance))


def train_compiled(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, *, axis: int, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute `kernels.train` with XLA in a graph that XLA does not compile.

    The forward and the backward pass are two compiled functions.
    """
    channels = sums.number_of_channels(x, axis)
    gamma = tf.ones([channels]) if gamma is None else tf.cast(gamma, tf.float32)
    beta = tf.zeros([channels]) if beta is None else tf.cast(beta, tf.float32)
    given = flat(x, axis)
    y, *moments = _compiled_step(given.shape.rank, x.dtype, epsilon)(given, gamma, beta)
    return tf.reshape(y, tf.shape(x)), *moments


def flat(x: tf.Tensor, axis: int) -> tf.Tensor:
    """`x` with its channels on axis 1: [positions, channels], or [before, channels, after]."""
    if sums.channels_last(x, axis):
        return tf.reshape(x, [-1, sums.number_of_channels(x, axis)])
    return sums.channels_second(x, axis)


@functools.cache
def _compiled_step(rank: int, dtype: tf.DType, epsilon: float) -> Callable:
    """Return a function (x, gamma, beta) -> results, for `x` of rank 2 or 3, channels on axis 1.

    XLA writes every result of a function to memory. TensorFlow's gradient of a single compiled
    function would return all intermediate values, several as large as `x`. Here the only large
    arguments of the backward function are `x` and `dy`: it centres `x` again with the given
    moments, which costs no pass over memory.
    """

    @tf.function(autograph=False, jit_compile=True)
    def forward(x, gamma, beta):
        y, *moments = train(x, gamma, beta, axis=1, epsilon=epsilon, long=True)
        return y, *moments, tf.cast(moments[1], tf.float32)

    @tf.function(autograph=False, jit_compile=True)
    def backward(x, gamma, beta, shift, mean, variance, dy):
        given = shift, mean, variance
        centred, shift, _, mean, variance = centred_moments(x, 1, None, long=True, given=given)
        rest = mean - shift
        y = scale_centred(centred, rest, variance, gamma, beta, 1, epsilon, long=True)
        # `tf.GradientTape` would record nothing in forward mode, which stops recording.
        return tf.gradients(tf.cast(y, x.dtype), [x, gamma, beta], dy)

    @tf.custom_gradient
    def step(x, gamma, beta):
        y, *moments, shift = forward(x, gamma, beta)

        def gradient(dy, *_):
            return backward(x, gamma, beta, shift, *moments[1:], dy)

        return (y, *moments), gradient

    signature = [tf.TensorSpec([None] * rank, dtype), *[tf.TensorSpec([None])] * 2]
    with tf.init_scope(), tf.device(None):
        # Eager mode and forward-mode differentiation ignore a custom gradient outside a function.
        return tf.function(step, autograph=False).get_concrete_function(*signature)


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
    """Compute `kernels.normalize`."""
    dtype = sums.statistics_dtype(x.dtype)
    centred = tf.cast(x, dtype) - sums.along(axis, tf.cast(mean, dtype), x)
    y = scale_centred(centred, 0, tf.cast(variance, dtype), gamma, beta, axis, epsilon)
    return tf.cast(y, x.dtype)


def centred_moments(
    x: tf.Tensor,
    axis: int,
    mask: tf.Tensor | None,
    *,
    long: bool,
    given: tuple[tf.Tensor, tf.Tensor, tf.Tensor] | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return `(x - shift, shift, count, mean, variance)`; shift is near the unmasked values' mean.

    With d = x - shift, mean = shift + sum(d) / count and
    variance = sum(d^2) / count - (sum(d) / count)^2. The identity holds for any shift; near the
    mean it does not cancel (Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample
    Variance", section 3).

    Args:
        x, axis, mask: See `kernels.moments`.
        long: See `sums.stretched`.
        given: `(shift, mean, variance)` if they were computed before. Nothing is summed then; the
            gradients do not change.
    """
    x = tf.cast(x, sums.statistics_dtype(x.dtype))
    counted = x
    if mask is not None:
        mask = tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(x)[:-1])[..., tf.newaxis]
        # The mask comes first, so that masked values never enter a gradient.
        counted = tf.where(mask, x, tf.zeros((), x.dtype))
    count = sums.values_per_channel(x, axis, mask)
    if given is not None:
        shift = given[0]
    elif mask is None:
        shift = sums.sampled_mean(x, axis, long=long)
    else:
        # A sampled mean might see masked values only.
        shift = tf.cast(sums.sum_of_channels(counted, axis) / tf.maximum(count, 1), x.dtype)
    shift = tf.stop_gradient(shift)
    centred = x - sums.along(axis, shift, x)
    counted = centred if mask is None else tf.where(mask, centred, tf.zeros((), x.dtype))
    shift = tf.cast(shift, tf.float64)
    totals = None
    if given is not None:
        rest = given[1] - shift
        totals = rest * count, (given[2] + tf.square(rest)) * count
    total, squares = _sums_of_centred(counted, axis, totals, long=long)
    mean, variance = sums.moments_of_sums(total, squares, count)
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
    *,
    long: bool = False,
) -> tf.Tensor:
    """Compute gamma * (r * (centred - rest) / sqrt(variance + epsilon) + d) + beta.

    `rest`, the mean after centring, is small against the standard deviation. As part of the
    offset it causes no cancellation, which the mean would.
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
    scale, offset = (tf.cast(v, centred.dtype) for v in (scale, offset))
    return _affine(centred, scale, offset, axis, long=long)


def renorm_corrections(
    mean: tf.Tensor,
    variance: tf.Tensor,
    running_mean: tf.Tensor,
    running_stddev: tf.Tensor,
    epsilon: float,
    clipping: Mapping[str, float | None],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the corrections (r, d) of Batch Renormalization (Ioffe 2017, eq. 2 and section 3).

    r = stddev / running_stddev, clipped to [rmin, rmax], and
    d = (mean - running_mean) / running_stddev, clipped to [-dmax, dmax], where
    stddev = sqrt(variance + epsilon). All tensors have shape `[channels]`. The keys "rmin", "rmax"
    and "dmax" of `clipping` are optional.
    """
    dtype = mean.dtype
    epsilon = tf.cast(epsilon, dtype)
    # In the first steps of training the running value may be 0.
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


def _affine(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, axis: int, *, long: bool
) -> tf.Tensor:
    """Compute x * scale + offset.

    `sums` computes the gradients of scale and offset, which are sums over all positions: XLA on
    the CPU needs three times as long for TensorFlow's.
    """

    @tf.custom_gradient
    def affine(x, scale, offset):
        def gradient(dy):
            d_scale, d_offset = (
                tf.cast(v, x.dtype) for v in sums.totals(dy * x, dy, axis, long=long)
            )
            return dy * sums.along(axis, scale, x), d_scale, d_offset

        return x * sums.along(axis, scale, x) + sums.along(axis, offset, x), gradient

    return affine(x, scale, offset)


def _sums_of_centred(
    x: tf.Tensor, axis: int, given: tuple[tf.Tensor, tf.Tensor] | None, *, long: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return sum and sum of squares of every channel, or `given`, with the gradients of sums."""

    @tf.custom_gradient
    def sums_of(x):
        def gradient(d_total, d_squares):
            d_total, d_squares = (
                sums.along(axis, tf.cast(d, x.dtype), x) for d in (d_total, d_squares)
            )
            return d_total + 2 * d_squares * x

        return given or sums.totals(x, tf.square(x), axis, long=long), gradient

    return sums_of(x)


def _merge_replicas(
    count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Merge the moments of all replicas (Chan, Golub & LeVeque 1983, section 2)."""
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
