"""Batch normalization by TensorFlow's fused operation."""

import tensorflow as tf

from tfbn.layer import sums


def train(x, gamma, beta, *, axis, epsilon):
    """As `kernels.train`, where the operation is known to run on a CPU."""
    count = sums.values_per_channel(x, axis)
    x_near_zero, shift, mean, variance = _recentre(x, axis, count)
    gamma, beta = _scale_and_offset(gamma, beta, mean)
    image, data_format = as_image(x_near_zero, axis)

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

        y = inference(image, mean, variance, gamma, beta, epsilon, data_format)
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
        mean, variance = _moments(wide, axis, count)

        def as_it_is():
            return x, tf.zeros_like(mean), mean, variance

        def shifted():
            shift = tf.cast(mean, tf.float32)
            centred = wide - sums.along(axis, shift, x)
            moments = _moments(centred, axis, count)
            return tf.cast(centred, x.dtype), tf.cast(shift, tf.float64), *moments

        near = sums.near_zero(mean, variance, sums.SAFE_RATIO)
        return tf.cond(near, as_it_is, shifted), lambda dx, *_: dx

    return recentre(x)


def _moments(x, axis, count):
    stretches = sums.stretched(x, axis)
    return sums.moments_of_sums(*sums.sums(stretches, sums.within_stretches(x, axis)), count)


def train_on_any_device(x, gamma, beta, *, axis, epsilon):
    """As `kernels.train`, by nothing but what the fused operation means on every device."""
    count = sums.values_per_channel(x, axis)
    # Not in the half precision that `x` may have: the shifted values would be rounded once more.
    wide = tf.cast(x, tf.float32)
    shift = tf.stop_gradient(sums.sampled_mean(wide, axis))
    image, data_format = as_image(wide - sums.along(axis, shift, x), axis, device_unknown=True)
    gamma, beta = _scale_and_offset(gamma, beta, shift)
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


def inference(image, mean, variance, gamma, beta, epsilon, data_format):
    """Normalize by statistics that are given."""
    gamma, beta = _scale_and_offset(gamma, beta, mean)
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


def as_image(x, axis, *, device_unknown=False):
    """`x` with rank 4 for the fused operation, and its data format.

    Where a position lies is nothing to normalization. To oneDNN it is: it shares out the first
    axis among the cores, and takes twice as long where the positions lie along the others.
    """
    x = sums.channels_second(x, axis)
    if x.shape[2] != 1:
        return tf.expand_dims(x, -1), "NCHW"
    if device_unknown:
        # cuDNN takes no more than 65535 images at once.
        return tf.reshape(x, [1, -1, 1, x.shape[1]]), "NHWC"
    return tf.reshape(x, [-1, 1, 1, x.shape[1]]), "NHWC"


def _scale_and_offset(gamma, beta, mean):
    ones = tf.ones_like(mean, tf.float32)
    gamma = ones if gamma is None else tf.cast(gamma, tf.float32)
    beta = tf.zeros_like(ones) if beta is None else tf.cast(beta, tf.float32)
    return gamma, beta
