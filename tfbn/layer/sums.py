"""Sums and moments of every channel, over short stretches in float32 and over these in float64.

A channel's values are summed in float32 over short stretches of the data and in float64 from
there on, where there is little left to sum. So the sums are about as fast as in float32 alone
and about as right as in float64.
"""

import tensorflow as tf

# A stretch is at most so long. It divides most sizes of images, and adds up in float32 without
# losing more than half a digit.
_STRETCH = 49
# E[x^2] - E[x]^2 loses a factor 1 + (mean / std)^2 of precision. At this ratio that is two of
# the seven digits of float32, of an error that averages out over the stretches.
SAFE_RATIO = 8.0
# Where the moments themselves are wanted, not a step of a training: half a digit.
_EXACT_RATIO = 1.5
# The part of the data whose mean is the shift where a second read is to be avoided: 1 / 16.
# Such a mean is within sqrt(16) std of the mean of all, whatever the data (see `sampled_mean`).
_SAMPLED = 16


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype in which values of `dtype` are handled: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def channels_last(x: tf.Tensor, axis: int) -> bool:
    """Whether `axis` is the last one of `x`."""
    return axis % x.shape.rank == x.shape.rank - 1


def number_of_channels(x: tf.Tensor, axis: int) -> int | tf.Tensor:
    """It, or the tensor that will hold it where it is unknown while a function is traced."""
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def within_stretches(x: tf.Tensor, axis: int) -> int:
    """The axis of `stretched(x, axis)` that is within stretches; 0 is the one over them."""
    return 1 if channels_last(x, axis) else 2


def stretched(x: tf.Tensor, axis: int) -> tf.Tensor:
    """`x` with rank 3, ready to be summed: a stretch of one channel's values lies on one axis.

    With the channels last the shape is [stretches, stretch, channels]. Summing over the middle
    one of three axes is several times faster than over the first of two. The length of a stretch
    divides the number of positions, so nothing is cut or padded.

    With the channels elsewhere the shape is [before, channels, after], and a stretch is all that
    comes after the channel.

    Args:
        x: Tensor of rank 2 or more.
        axis: The axis of the channels.
    """
    if not channels_last(x, axis):
        return channels_second(x, axis)
    channels = number_of_channels(x, axis)
    # A number of positions that is fixed needs no operation to find the length, and the same
    # data has the same stretches in eager and in graph mode.
    positions = x.shape[1:-1].num_elements()
    stretch = 1 if positions is None else _length_of_stretch(positions)
    if stretch < 8:
        size = x.shape[:-1].num_elements()
        size = tf.size(x, tf.int64) // tf.cast(channels, tf.int64) if size is None else size
        stretch = _length_of_stretch(size)
    return tf.reshape(x, [-1, stretch, channels])


def moments_of_stretches(x: tf.Tensor, within: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Count, mean and biased variance of every channel of data from `stretched`.

    mean = sum(x) / count and variance = sum(x^2) / count - mean^2; where the mean of some channel
    is more than 1.5 standard deviations from zero, the same again for x - mean, which is free of
    cancellation (Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance",
    section 3).

    No dimension need be known while a function is traced, so one trace serves all layers.

    Args:
        x: Floating tensor of rank 3.
        within: The axis within stretches, 1 or 2. Axis 0 is over stretches, the third axis is
            that of the channels.

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
    """Sum and sum of squares of every channel of data from `stretched`, in float64."""
    return total(x, within), total(tf.square(x), within)


def total(x: tf.Tensor, within: int) -> tf.Tensor:
    """Sum of every channel of data from `stretched`, in float64."""
    return tf.reduce_sum(tf.cast(tf.reduce_sum(x, within), tf.float64), 0)


def sum_of_channels(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Sum of every channel, in float64."""
    return total(stretched(x, axis), within_stretches(x, axis))


def moments_of_sums(
    total: tf.Tensor, squares: tf.Tensor, count: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of values from their sum and their sum of squares."""
    divisor = tf.maximum(count, 1)
    mean = total / divisor
    return mean, tf.maximum(squares / divisor - tf.square(mean), 0)


def near_zero(mean: tf.Tensor, variance: tf.Tensor, ratio: float) -> tf.Tensor:
    """Whether every |mean| / std is at most `ratio`."""
    # Not the other way round: a mean that is not finite must not count as near.
    return tf.reduce_all(tf.square(mean) <= ratio**2 * variance)


def sampled_mean(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The mean of a part of the data, at least 1 / `_SAMPLED` of it, in the dtype of `x`.

    Let the sampled mean be s. Then count * variance >= (count / 16) * (s - mean)^2, so
    |s - mean| <= 4 std, which is near enough for one pass.
    """
    first = axis % x.shape.rank == 0
    x = channels_second(x, axis)
    some = -(-tf.shape(x)[2 if first else 0] // _SAMPLED)
    sample = x[:, :, :some] if first else x[:some]
    count = tf.cast(values_per_channel(sample, 1), x.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(sample, [0, 2]), count)


def values_per_channel(x: tf.Tensor, axis: int, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Values per channel, float64; a scalar, or per channel where a mask may differ by it."""
    if mask is None:
        channels = tf.cast(number_of_channels(x, axis), tf.float64)
        return tf.cast(tf.size(x, tf.int64), tf.float64) / channels
    if channels_last(x, axis):
        return tf.math.count_nonzero(mask, dtype=tf.float64)
    axes = [a for a in range(x.shape.rank) if a != axis % x.shape.rank]
    return tf.math.count_nonzero(tf.broadcast_to(mask, tf.shape(x)), axes, dtype=tf.float64)


def along(axis: int, per_channel: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """A value per channel in the shape that broadcasts over `x`."""
    if channels_last(x, axis):
        return per_channel
    shape = [1] * x.shape.rank
    shape[axis] = -1
    return tf.reshape(per_channel, shape)


def channels_second(x: tf.Tensor, axis: int) -> tf.Tensor:
    """`x` as [before, channels, after]; `after` is 1 where that leaves the order as it is."""
    axis %= x.shape.rank
    channels = number_of_channels(x, axis)
    if channels_last(x, axis):
        return tf.reshape(x, [-1, channels, 1])
    before, after = x.shape[:axis].num_elements(), x.shape[axis + 1 :].num_elements()
    # One of them can be inferred, but not of an empty tensor from a 0.
    if after:
        return tf.reshape(x, [-1, channels, after])
    if before:
        return tf.reshape(x, [before, channels, -1])
    shape = tf.shape(x)
    before, after = tf.reduce_prod(shape[:axis]), tf.reduce_prod(shape[axis + 1 :])
    return tf.reshape(x, [before, channels, after])


def _length_of_stretch(positions: int | tf.Tensor) -> int | tf.Tensor:
    """The largest divisor of `positions` that is no longer than a stretch may be."""
    if isinstance(positions, int):
        return max(n for n in range(1, _STRETCH + 1) if positions % n == 0)
    lengths = tf.constant([*range(1, _STRETCH + 1)], tf.int64)
    return tf.cast(tf.reduce_max(tf.where(positions % lengths == 0, lengths, 1)), tf.int32)
