"""Compute sums and moments of every channel in float32 and float64.

Short stretches of a channel's values are summed in float32, and these sums in float64. This is
about as fast as float32 and about as precise as float64.
"""

import tensorflow as tf

# Longest stretch. It divides most sizes of images, and a float32 sum over it loses at most half a
# digit.
_STRETCH = 49
# Largest |mean| / std of a training step without a shift. E[x^2] - E[x]^2 loses a factor
# 1 + (mean / std)^2 of precision: here two of the seven digits of float32, of an error that
# averages out over the stretches.
SAFE_RATIO = 8.0
# The same for `moments_of_stretches`, which loses half a digit.
_EXACT_RATIO = 1.5
# Longest stretch on a GPU. Longer ones leave XLA too few blocks to run in parallel.
_LONG_STRETCH = 512
# Strides of `sampled_mean`; the second for many values on a GPU, which sums few rows faster. Primes
# sample all columns of an image, whose borders may differ from the rest.
_SAMPLED, _SAMPLED_OF_MANY = 61, 251


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Return the dtype to compute in: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def channels_last(x: tf.Tensor, axis: int) -> bool:
    """Whether `axis` is the last one of `x`."""
    return axis % x.shape.rank == x.shape.rank - 1


def number_of_channels(x: tf.Tensor, axis: int) -> int | tf.Tensor:
    """Return it as an int, or as a tensor if it is unknown in a trace."""
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def within_stretches(x: tf.Tensor, axis: int) -> int:
    """Return the axis of `stretched(x, axis)` within stretches; axis 0 is over stretches."""
    return 1 if channels_last(x, axis) else 2


def stretched(x: tf.Tensor, axis: int, *, long: bool = False) -> tf.Tensor:
    """Reshape `x` to rank 3, with one axis for a stretch of a channel's values.

    With the channels last the shape is [stretches, stretch, channels]: a sum over the middle of
    three axes is several times faster than over the first of two. The length of a stretch divides
    the number of positions, so nothing is cut or padded.

    With the channels elsewhere the shape is [before, channels, after], and a stretch is the last
    axis.

    Args:
        x: Tensor of rank 2 or more.
        axis: The axis of the channels.
        long: Whether a stretch is about as long as the square root of the number of positions,
            which gives a GPU most blocks for the sum within stretches and the sum over them.
    """
    if not channels_last(x, axis):
        return channels_second(x, axis)
    channels = number_of_channels(x, axis)
    if long:
        size = x.shape[:-1].num_elements()
        size = tf.size(x, tf.int64) // tf.cast(channels, tf.int64) if size is None else size
        return tf.reshape(x, [-1, _length_of_long_stretch(size), channels])
    # A static shape requires no operations here, and gives the same stretches in eager and graph
    # mode.
    positions = x.shape[1:-1].num_elements()
    stretch = 1 if positions is None else length_of_stretch(positions)
    if stretch < 8:
        size = x.shape[:-1].num_elements()
        size = tf.size(x, tf.int64) // tf.cast(channels, tf.int64) if size is None else size
        stretch = length_of_stretch(size)
    return tf.reshape(x, [-1, stretch, channels])


def moments_of_stretches(x: tf.Tensor, within: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute count, mean and biased variance of every channel of data from `stretched`.

    mean = sum(x) / count and variance = sum(x^2) / count - mean^2. If the mean of a channel is more
    than 1.5 standard deviations from zero, both are computed for x - mean, which avoids
    cancellation (Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance",
    section 3).

    A trace requires no static dimension, so one serves all layers.

    Args:
        x: Floating tensor of rank 3.
        within: The axis within stretches, 1 or 2. Axis 0 is over stretches, the third axis is for
            the channels.

    Returns:
        `(count, mean, variance)` in float64: the number of values per channel, a scalar, and two
        tensors of shape `[channels]`. Without any value all are 0. A NaN or an infinity among
        the values makes `mean` or `variance` of its channel non-finite.
    """
    x = tf.cast(x, statistics_dtype(x.dtype))
    shape = tf.shape(x, tf.int64)
    count = tf.cast(shape[0] * shape[within], tf.float64)
    mean, variance = moments_of_sums(*sums(x, within), count)

    def shifted():
        shift = tf.stop_gradient(tf.cast(mean, x.dtype))
        centred = x - tf.expand_dims(shift, -1) if within == 2 else x - shift
        rest, variance = moments_of_sums(*sums(centred, within), count)
        return tf.cast(shift, tf.float64) + rest, variance

    near = near_zero(mean, variance, _EXACT_RATIO)
    mean, variance = tf.cond(near, lambda: (mean, variance), shifted)
    return count, mean, variance


def sums(x: tf.Tensor, within: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return sum and sum of squares of every channel of data from `stretched`, in float64."""
    return total(x, within), total(tf.square(x), within)


def total(x: tf.Tensor, within: int) -> tf.Tensor:
    """Return the sum of every channel of data from `stretched`, in float64."""
    return tf.reduce_sum(tf.cast(tf.reduce_sum(x, within), tf.float64), 0)


def totals(x: tf.Tensor, z: tf.Tensor, axis: int, *, long: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the sums of every channel of two tensors, in float64, in two XLA kernels.

    The sums over stretches are one reduction, because XLA does not fuse reductions of different
    inputs.
    """
    within = within_stretches(x, axis)
    parts = [tf.reduce_sum(stretched(v, axis, long=long), within) for v in (x, z)]
    both = tf.reduce_sum(tf.concat([tf.cast(v, tf.float64) for v in parts], -1), 0)
    first, second = tf.split(both, 2)
    return first, second


def sum_of_channels(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Return the sum of every channel, in float64."""
    return total(stretched(x, axis), within_stretches(x, axis))


def moments_of_sums(
    total: tf.Tensor, squares: tf.Tensor, count: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Compute mean and variance of values from their sum and their sum of squares."""
    divisor = tf.maximum(count, 1)
    mean = total / divisor
    return mean, tf.maximum(squares / divisor - tf.square(mean), 0)


def near_zero(mean: tf.Tensor, variance: tf.Tensor, ratio: float) -> tf.Tensor:
    """Whether every |mean| / std is at most `ratio`."""
    # `<=` and not `not >`: a NaN must not count as near.
    return tf.reduce_all(tf.square(mean) <= ratio**2 * variance)


def sampled_mean(x: tf.Tensor, axis: int, *, long: bool) -> tf.Tensor:
    """Return the mean of every 61st value (251st of many on a GPU), in the dtype of `x`.

    For the sampled mean s, count * variance >= (count / 61) * (s - mean)^2, so
    |s - mean| <= sqrt(61) std for any data. E[d^2] - E[d]^2 of d = x - s then loses at most a
    factor 62 of precision (252 of many on a GPU), and almost nothing in usual data.

    Args:
        x: Floating tensor of rank 2 or more.
        axis: The axis of the channels.
        long: See `stretched`.
    """
    x = channels_second(x, axis)
    shape = tf.shape(x)
    before, after = (shape[k] if x.shape[k] is None else x.shape[k] for k in (0, 2))
    stride = tf.where(long & (before * after >= 2**16), _SAMPLED_OF_MANY, _SAMPLED)
    # Few images are sampled inside, too.
    part = tf.maximum(stride // tf.maximum(before, 1), 1)
    sample = x[::stride, :, ::part]
    # `tf.ensure_shape` has no forward-mode derivative in a tf.function.
    sample.set_shape([None, x.shape[1], None])
    count = tf.cast(values_per_channel(sample, 1), x.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(sample, [0, 2]), count)


def values_per_channel(x: tf.Tensor, axis: int, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Return the number of values per channel, float64.

    It is a scalar, or of shape `[channels]` where channels may be masked differently.
    """
    if mask is None:
        channels = tf.cast(number_of_channels(x, axis), tf.float64)
        return tf.cast(tf.size(x, tf.int64), tf.float64) / channels
    if channels_last(x, axis):
        return tf.math.count_nonzero(mask, dtype=tf.float64)
    axes = [a for a in range(x.shape.rank) if a != axis % x.shape.rank]
    return tf.math.count_nonzero(tf.broadcast_to(mask, tf.shape(x)), axes, dtype=tf.float64)


def along(axis: int, per_channel: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Reshape values per channel so that they broadcast over `x`."""
    if channels_last(x, axis):
        return per_channel
    shape = [1] * x.shape.rank
    shape[axis] = -1
    return tf.reshape(per_channel, shape)


def channels_second(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Reshape `x` to [before, channels, after]; with the channels last, `after` is 1."""
    axis %= x.shape.rank
    channels = number_of_channels(x, axis)
    if channels_last(x, axis):
        return tf.reshape(x, [-1, channels, 1])
    before, after = x.shape[:axis].num_elements(), x.shape[axis + 1 :].num_elements()
    # `tf.reshape` can infer one of them, but not if the other is 0.
    if after:
        return tf.reshape(x, [-1, channels, after])
    if before:
        return tf.reshape(x, [before, channels, -1])
    shape = tf.shape(x)
    before, after = tf.reduce_prod(shape[:axis]), tf.reduce_prod(shape[axis + 1 :])
    return tf.reshape(x, [before, channels, after])


def length_of_stretch(positions: int | tf.Tensor) -> int | tf.Tensor:
    """Return the largest divisor of `positions` up to the longest stretch."""
    if isinstance(positions, int):
        return max(n for n in range(1, _STRETCH + 1) if positions % n == 0)
    lengths = tf.constant([*range(1, _STRETCH + 1)], tf.int64)
    return tf.cast(tf.reduce_max(tf.where(positions % lengths == 0, lengths, 1)), tf.int32)


def _length_of_long_stretch(positions: int | tf.Tensor) -> int | tf.Tensor:
    """Return the largest divisor of `positions` up to about its square root."""
    if isinstance(positions, int):
        most = min(max(_STRETCH, int(1.25 * positions**0.5)), _LONG_STRETCH)
        return max(n for n in range(1, most + 1) if positions % n == 0)
    lengths = tf.range(1, _LONG_STRETCH + 1, dtype=tf.int64)
    short = tf.cast(lengths, tf.float64) <= 1.25 * tf.sqrt(tf.cast(positions, tf.float64))
    fits = ((lengths <= _STRETCH) | short) & (positions % lengths == 0)
    return tf.cast(tf.reduce_max(tf.where(fits, lengths, 1)), tf.int32)
