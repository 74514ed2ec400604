"""Batch normalization as pure functions on tensors.

Three ways compute the same numbers; which one runs is decided while a function is traced.

- Fused, in eager and graph mode: TensorFlow's fused operation for the normalization and for the
  gradient. Its own statistics are not used: it adds up the values of a channel one by one in
  float32, and at mean / std = 1e4 its variance is off by 8e-3.
- Fused where a GPU is visible: what the fused operation hands to its gradient means different
  things on different devices, and where it will be placed is not known yet. So its statistics
  and its gradient stay its own, on an input that was shifted to where they are safe.
- Composite, under XLA, which lowers the fused operation's statistics to E[x^2] - E[x]^2
  (TensorFlow #118701); and for float64, masks, renorm, and statistics shared across replicas.

In inference, where there are no statistics to compute, the fused operation is used only where
it is the faster one:

- on what `Conv2D` returns, channels last and as it is, for there TensorFlow's graph optimizer
  makes one operation of convolution, normalization and activation. A reshape, or a bias, between
  the two keeps it from that;
- on channels-last input that is used elsewhere too: the arguments of a function, everything in
  eager mode. One operation writes one new tensor, where three would write at least one and read
  it twice;
- on everything where a GPU is visible.

Elsewhere it is (x - mean) * scale + beta, three operations that write over their own input. For
that oneDNN's kernel makes a new tensor, and with channels first it is slower anyway. The form
x * scale + (beta - mean * scale) would need only two, but where the mean is far from zero it
cancels: at mean / std = 1e4 it is off by 2e-3 where the other is by 1e-6.

Statistics are biased (divided by the count) and float64. Over short stretches of the data sums
are float32; from there on they are float64, where there is little left to sum.
"""

import tensorflow as tf

# TensorFlow has no public way to ask whether the graph being traced will be compiled by XLA.
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

# So many values are summed in float32 before float64 takes over; or about as many, where one of
# these numbers divides the positions of a sample.
_STRETCH = 32
_STRETCHES = range(8, 50)
# E[x^2] - E[x]^2 loses a factor 1 + (mean / std)^2 of precision. At this ratio that is two of
# the seven digits of float32, of an error that averages out over the stretches.
_SAFE_RATIO = 8.0
# Where the moments themselves are what is wanted, not a step of a training: half a digit.
_EXACT_RATIO = 1.5
# The part of the data whose mean is the shift where a second read is to be avoided: 1 / 16.
# Such a mean is within sqrt(16) std of the mean of all, whatever the data (see `_sampled_mean`).
_SAMPLED = 16


def statistics_dtype(dtype):
    """The dtype in which values of `dtype` are handled: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def moments(x, axis, mask=None):
    """Count, mean and biased variance of every channel over all unmasked positions.

    With d = x - shift for a shift near the mean, mean = shift + sum(d) / count and
    variance = sum(d^2) / count - (sum(d) / count)^2. The identity holds for any shift; one near
    the mean keeps it free of cancellation (Chan, Golub & LeVeque 1983, "Algorithms for Computing
    the Sample Variance", section 3).

    Args:
        x: Floating tensor of rank 2 or more.
        axis: The axis of the channels.
        mask: Tensor that broadcasts to the shape of `x` without its last axis. Where it is
            false (or zero) the values of `x` do not count, whatever they are.

    Returns:
        `(count, mean, variance)` in float64. `count`, the number of values per channel, is a
        scalar; only with a mask and `axis` not the last, where channels may be masked
        differently, its shape is `[channels]`, as that of `mean` and `variance` is. Without any
        value all are 0. A NaN or an infinity among the values makes `mean` or `variance` of its
        channel non-finite. Gradients flow through `mean` and `variance`.
    """
    if mask is not None or _under_xla():
        *_, count, mean, variance = _centred_moments(x, axis, mask)
        return count, mean, variance
    x, count = tf.cast(x, statistics_dtype(x.dtype)), _count(x, axis)
    mean, variance = _moments_near_zero(x, axis, count)

    def shifted():
        shift = tf.stop_gradient(tf.cast(mean, x.dtype))
        rest, variance = _moments_near_zero(x - _along(axis, shift, x), axis, count)
        return tf.cast(shift, tf.float64) + rest, variance

    near = _near_zero(mean, variance, _EXACT_RATIO)
    return count, *tf.cond(near, lambda: (mean, variance), shifted)


def normalize(x, mean, variance, gamma, beta, *, axis, epsilon):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, in the dtype of `x`.

    This is inference (Ioffe & Szegedy 2015, Algorithm 2, line 11): `mean` and `variance` are
    constants, to which no gradient flows.

    Args:
        x: Floating tensor of rank 2 or more.
        mean, variance: Shape `[channels]`, float32 or float64.
        gamma, beta: Shape `[channels]`, or `None` for 1 and 0.
        axis: The axis of the channels.
        epsilon: What is added to the variance.
    """
    mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
    if not (_fusable(x) and _fusion_pays_in_inference(x, axis)):
        dtype = statistics_dtype(x.dtype)
        centred = tf.cast(x, dtype) - _along(axis, tf.cast(mean, dtype), x)
        y = _scale_centred(centred, 0, tf.cast(variance, dtype), gamma, beta, axis, epsilon)
        return tf.cast(y, x.dtype)
    gamma, beta = _scale_and_offset(gamma, beta, x.shape[axis])
    if _from_convolution(x, axis):
        return _fused_inference(x, gamma, beta, mean, variance, epsilon, "NHWC")
    image, data_format = _as_image(x, axis)
    y = _fused_inference(image, gamma, beta, mean, variance, epsilon, data_format)
    return tf.reshape(y, tf.shape(x))


def train(x, gamma, beta, *, axis, epsilon, mask=None, synchronized=False, renorm=None):
    """Normalize a batch by its own statistics.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta with the mean and the biased
    variance of the batch (Ioffe & Szegedy 2015, Algorithm 1), and gradients that take into
    account that both depend on `x`.

    Args:
        x: Floating tensor of rank 2 or more.
        gamma, beta: Shape `[channels]`, or `None` for 1 and 0.
        axis: The axis of the channels.
        epsilon: What is added to the variance.
        mask: As in `moments`. Masked positions are normalized too, they only do not count.
        synchronized: Whether the statistics are those of all replicas' batches together, under
            a `tf.distribute` strategy.
        renorm: Function from `(mean, variance)` to the corrections `(r, d)` of Batch
            Renormalization. What takes the place of the normalized value v is then r * v + d,
            with r and d constants for the gradient (Ioffe 2017, Algorithm 1).

    Returns:
        `(y, count, mean, variance)`: `y` in the dtype of `x`, the others as from `moments`.
    """
    if _fusable(x) and mask is None and not synchronized and renorm is None:
        return (_train_by_device if _gpu_visible() else _train_fused)(x, gamma, beta, axis, epsilon)
    centred, shift, count, mean, variance = _centred_moments(x, axis, mask)
    if synchronized:
        count, mean, variance = _merge_replicas(count, mean, variance)
    corrections = None if renorm is None else renorm(mean, variance)
    y = _scale_centred(centred, mean - shift, variance, gamma, beta, axis, epsilon, corrections)
    return tf.cast(y, x.dtype), count, mean, variance


def renorm_corrections(mean, variance, running_mean, running_stddev, epsilon, clipping):
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


def _under_xla():
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _gpu_visible():
    return bool(tf.config.list_physical_devices("GPU"))


def _fusable(x):
    return x.dtype in (tf.float32, tf.float16, tf.bfloat16) and not _under_xla()


def _fusion_pays_in_inference(x, axis):
    if _gpu_visible() or _from_convolution(x, axis):
        return True
    # Neither an eager tensor nor a function's argument may be written over.
    kept = not tf.is_symbolic_tensor(x) or x.op.type == "Placeholder"
    return kept and _channels_last(x, axis)


def _from_convolution(x, axis):
    """Whether `x` is the output of a `Conv2D`, with its channels last, in a graph."""
    convolved = tf.is_symbolic_tensor(x) and x.op.type == "Conv2D"
    return convolved and x.op.get_attr("data_format") == b"NHWC" and _channels_last(x, axis)


def _channels_last(x, axis):
    return axis % x.shape.rank == x.shape.rank - 1


def _train_fused(x, gamma, beta, axis, epsilon):
    gamma, beta = _scale_and_offset(gamma, beta, x.shape[axis])
    count = _count(x, axis)
    x_near_zero, shift, mean, variance = _recentre(x, axis, count)
    image, data_format = _as_image(x_near_zero, axis)

    @tf.custom_gradient
    def standardize(image, gamma, beta, mean, variance):
        def gradient(dy):
            # The gradient of the training step, although the forward op is that of inference.
            dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy,
                x=image,
                scale=gamma,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=mean,
                epsilon=epsilon,
                data_format=data_format,
                is_training=True,
            )
            return dx, dgamma, dbeta, None, None

        y = _fused_inference(image, gamma, beta, mean, variance, epsilon, data_format)
        return y, gradient

    y = standardize(image, gamma, beta, tf.cast(mean, tf.float32), tf.cast(variance, tf.float32))
    return tf.reshape(y, tf.shape(x)), count, shift + mean, variance


def _recentre(x, axis, count):
    """`(x - shift, shift, mean, variance)`, the moments those of x - shift.

    `shift` is 0, and `x` not even copied, unless the mean of some channel is so far from zero
    that a second look is needed.
    """

    @tf.custom_gradient
    def recentre(x):
        wide = tf.cast(x, tf.float32)
        mean, variance = _moments_of_sums(*_sums(wide, axis), count)

        def as_it_is():
            return x, tf.zeros_like(mean), mean, variance

        def shifted():
            shift = tf.cast(mean, tf.float32)
            centred = wide - _along(axis, shift, x)
            moments = _moments_of_sums(*_sums(centred, axis), count)
            return tf.cast(centred, x.dtype), tf.cast(shift, tf.float64), *moments

        near = _near_zero(mean, variance, _SAFE_RATIO)
        return tf.cond(near, as_it_is, shifted), lambda dx, *_: dx

    return recentre(x)


def _train_by_device(x, gamma, beta, axis, epsilon):
    gamma, beta = _scale_and_offset(gamma, beta, x.shape[axis])
    count = _count(x, axis)
    # Not in the half precision that `x` may have: the shifted values would be rounded once more.
    wide = tf.cast(x, tf.float32)
    shift = tf.stop_gradient(_sampled_mean(wide, axis))
    image, data_format = _as_image(wide - _along(axis, shift, x), axis)
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=image,
        scale=gamma,
        offset=beta,
        mean=tf.zeros_like(shift),
        variance=tf.zeros_like(shift),
        epsilon=epsilon,
        data_format=data_format,
        is_training=True,
    )
    # The operation divides by count - 1: for one value that may be 0 / 0, for none it is.
    mean = tf.where(count > 0, tf.cast(mean, tf.float64), 0)
    biased = tf.cast(variance, tf.float64) * ((count - 1) / tf.maximum(count, 1))
    variance = tf.where(count > 1, biased, 0)
    y = tf.cast(tf.reshape(y, tf.shape(x)), x.dtype)
    return y, count, tf.cast(shift, tf.float64) + mean, variance


def _fused_inference(image, gamma, beta, mean, variance, epsilon, data_format):
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=image,
        scale=gamma,
        offset=beta,
        mean=tf.cast(mean, tf.float32),
        variance=tf.cast(variance, tf.float32),
        epsilon=epsilon,
        data_format=data_format,
        is_training=False,
    )
    return y


def _centred_moments(x, axis, mask):
    """`(x - shift, shift, count, mean, variance)` for a shift near the mean of what counts."""
    x = tf.cast(x, statistics_dtype(x.dtype))
    counted = x
    if mask is not None:
        mask = tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(x)[:-1])[..., tf.newaxis]
        # Before anything else, so that no gradient ever meets what is behind the mask.
        counted = tf.where(mask, x, tf.zeros((), x.dtype))
    count = _count(x, axis, mask)
    if mask is None and _under_xla():
        shift = _sampled_mean(x, axis)
    else:
        shift = tf.cast(_sum(counted, axis) / tf.maximum(count, 1), x.dtype)
    shift = tf.stop_gradient(shift)
    centred = x - _along(axis, shift, x)
    counted = centred if mask is None else tf.where(mask, centred, tf.zeros((), x.dtype))
    mean, variance = _moments_near_zero(counted, axis, count)
    shift = tf.cast(shift, tf.float64)
    return centred, shift, count, shift + mean, variance


def _scale_centred(centred, rest, variance, gamma, beta, axis, epsilon, corrections=None):
    """gamma * (r * (centred - rest) / sqrt(variance + epsilon) + d) + beta.

    `rest`, what centring left of the mean, is small beside the standard deviation. So it may go
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


def _affine(x, scale, offset, axis):
    """x * scale + offset.

    The gradients of scale and offset are sums over all positions. Here they are those of `_sum`,
    because the ones that TensorFlow would derive take XLA on the CPU three times as long.
    """

    @tf.custom_gradient
    def affine(x, scale, offset):
        def gradient(dy):
            d_scale, d_offset = (tf.cast(_sum(v, axis), x.dtype) for v in (dy * x, dy))
            return dy * _along(axis, scale, x), d_scale, d_offset

        return x * _along(axis, scale, x) + _along(axis, offset, x), gradient

    return affine(x, scale, offset)


def _merge_replicas(count, mean, variance):
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


def _near_zero(mean, variance, ratio):
    """Whether every |mean| / std is at most `ratio`."""
    # Not the other way round: what is not finite must not count as near.
    return tf.reduce_all(tf.square(mean) <= ratio**2 * variance)


def _moments_near_zero(x, axis, count):
    """Mean and variance of values whose mean is not many standard deviations from zero."""

    @tf.custom_gradient
    def sums(x):
        def gradient(d_total, d_squares):
            d_total, d_squares = (
                _along(axis, tf.cast(d, x.dtype), x) for d in (d_total, d_squares)
            )
            return d_total + 2 * d_squares * x

        return _sums(x, axis), gradient

    return _moments_of_sums(*sums(x), count)


def _moments_of_sums(total, squares, count):
    divisor = tf.maximum(count, 1)
    mean = total / divisor
    return mean, tf.maximum(squares / divisor - tf.square(mean), 0)


def _sums(x, axis):
    """Sum and sum of squares of every channel, in float64."""
    parts, within = _stretches(x, axis)
    return _total(parts, within), _total([tf.square(part) for part in parts], within)


def _sum(x, axis):
    """Sum of every channel, in float64."""
    return _total(*_stretches(x, axis))


def _total(parts, within):
    """Sum over stretches in the dtype of the values, over all of them in float64."""
    sums = (tf.cast(tf.reduce_sum(part, within), tf.float64) for part in parts)
    return sum(tf.reduce_sum(part, 0) for part in sums)


def _stretches(x, axis):
    """Parts of `x` with three axes, and the axis within stretches; the first is over them.

    Reducing the middle one of three axes is several times faster than the first of two.
    """
    positions = x.shape[1:-1].num_elements() if _channels_last(x, axis) else None
    x = _channels_second(x, axis)
    if x.shape[2] != 1:
        return [x], 2
    channels = x.shape[1]
    fitting = [n for n in _STRETCHES if positions is not None and positions % n == 0]
    if fitting:
        # Without a remainder it is one operation in place of ten, each with its cost in tracing.
        stretch = min(fitting, key=lambda n: abs(n - _STRETCH))
        return [tf.reshape(x, [-1, stretch, channels])], 1
    whole = tf.shape(x)[0] // _STRETCH * _STRETCH
    return [tf.reshape(x[:whole], [-1, _STRETCH, channels]), x[tf.newaxis, whole:, :, 0]], 1


def _sampled_mean(x, axis):
    """The mean of a part of the data, at least 1 / `_SAMPLED` of it.

    Let the sampled mean be s. Then count * variance >= (count / 16) * (s - mean)^2, so
    |s - mean| <= 4 std, which is near enough for one pass.
    """
    x = _channels_second(x, axis)
    along = 0 if axis % x.shape.rank else 2
    some = -(-tf.shape(x)[along] // _SAMPLED)
    sample = x[:some] if along == 0 else x[:, :, :some]
    return tf.math.divide_no_nan(tf.reduce_sum(sample, [0, 2]), tf.cast(_count(sample, 1), x.dtype))


def _count(x, axis, mask=None):
    """Values per channel, float64."""
    if mask is None:
        return tf.cast(tf.size(x, tf.int64), tf.float64) / x.shape[axis]
    if _channels_last(x, axis):
        return tf.math.count_nonzero(mask, dtype=tf.float64)
    axes = [a for a in range(x.shape.rank) if a != axis % x.shape.rank]
    return tf.math.count_nonzero(tf.broadcast_to(mask, tf.shape(x)), axes, dtype=tf.float64)


def _channels_second(x, axis):
    """`x` as [before, channels, after]; `after` is 1 where that leaves the order as it is."""
    axis %= x.shape.rank
    channels = x.shape[axis]
    if _channels_last(x, axis) or channels == 1:
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


def _as_image(x, axis):
    """`x` with rank 4 for the fused operation, and its data format.

    Where a position lies is nothing to normalization. To oneDNN it is: it shares out the first
    axis among the cores, and takes twice as long where the positions lie along the others.
    """
    x = _channels_second(x, axis)
    if x.shape[2] != 1:
        return x[..., tf.newaxis], "NCHW"
    if _gpu_visible():
        # cuDNN takes no more than 65535 images at once.
        return tf.reshape(x, [1, -1, 1, x.shape[1]]), "NHWC"
    return tf.reshape(x, [-1, 1, 1, x.shape[1]]), "NHWC"


def _along(axis, per_channel, x):
    """A value per channel in the shape that broadcasts over `x`."""
    if _channels_last(x, axis):
        return per_channel
    shape = [1] * x.shape.rank
    shape[axis] = -1
    return tf.reshape(per_channel, shape)


def _scale_and_offset(gamma, beta, channels):
    gamma = tf.ones([channels]) if gamma is None else tf.cast(gamma, tf.float32)
    beta = tf.zeros([channels]) if beta is None else tf.cast(beta, tf.float32)
    return gamma, beta
