"""The fused kernel: TensorFlow's fused operation, for training on CPUs and for inference."""

import functools
from collections.abc import Callable

import tensorflow as tf

from tfbn.layer import sums


def train(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, *, axis: int, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute `kernels.train` on a CPU."""
    gamma, beta = _scale_and_offset(gamma, beta, sums.number_of_channels(x, axis))
    step = _training_step(sums.within_stretches(x, axis), x.dtype, epsilon)
    y, *moments = step(sums.stretched(x, axis), gamma, beta)
    return tf.reshape(y, tf.shape(x)), *moments


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
    one_image: bool,
) -> tf.Tensor:
    """Compute `kernels.normalize`; `one_image` is required on GPUs, see `_as_image`."""
    image, data_format = _as_image(x, axis, one_image=one_image)
    y = normalize_image(image, mean, variance, gamma, beta, epsilon, data_format)
    return tf.reshape(y, tf.shape(x))


def normalize_image(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    data_format: str = "NHWC",
) -> tf.Tensor:
    """Compute `kernels.normalize` for `x` of rank 4."""
    gamma, beta = _scale_and_offset(gamma, beta, tf.shape(mean)[0])
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=tf.cast(mean, tf.float32),
        variance=tf.cast(variance, tf.float32),
        epsilon=epsilon,
        data_format=data_format,
        is_training=False,
    )
    return y


@functools.cache
def _training_step(within: int, dtype: tf.DType, epsilon: float) -> Callable:
    """Return a function (x, gamma, beta) -> (y, count, mean, variance); x is from `sums.stretched`.

    One trace serves all layers and shapes: a trace for every layer would take most of the time of
    a network's first step. Forward-mode differentiation also requires a function: it ignores the
    custom gradients of single operations.
    """

    @tf.custom_gradient
    def step(x, gamma, beta):
        shape = tf.shape(x, tf.int64)
        count = tf.cast(shape[0] * shape[within], tf.float64)

        def moments(x):
            # The custom gradient treats them as constants.
            return sums.moments_of_sums(*sums.sums(tf.stop_gradient(x), within), count)

        def normalized(x, mean, variance):
            image, data_format = _as_image(x, 3 - within)
            y = normalize_image(image, mean, variance, gamma, beta, epsilon, data_format)
            return tf.cast(tf.reshape(y, shape), dtype)

        mean, variance = moments(tf.cast(x, tf.float32))
        near = sums.near_zero(mean, variance, sums.SAFE_RATIO)

        def unshifted():
            return normalized(x, mean, variance), tf.zeros_like(mean), mean, variance

        def shifted():
            # In half precision a shifted value could overflow, and would be rounded twice.
            shift = tf.cast(mean, tf.float32)
            centred = _shifted(x, shift, within)
            rest, variance = moments(centred)
            return normalized(centred, rest, variance), tf.cast(shift, tf.float64), rest, variance

        y, shift, mean, variance = tf.cond(near, unshifted, shifted)

        # The backward graph also reads these. A gradient that reached the `tf.cond` through them
        # would make it return variants, on which forward mode fails.
        constants = tf.stop_gradient(shift), tf.stop_gradient(mean), tf.stop_gradient(variance)

        def gradient(dy, *_):
            return _gradient(x, dy, gamma, *constants, near, within, epsilon)

        return (y, count, shift + mean, variance), gradient

    signature = [tf.TensorSpec([None] * 3, dtype), *[tf.TensorSpec([None])] * 2]
    # The function is shared, so it must not depend on the caller's device, tape or control flow.
    with tf.init_scope(), tf.device(None):
        # An inlined function would be optimized once for every layer, in the first step.
        function = tf.function(step, autograph=False, experimental_attributes={"_noinline": True})
        return function.get_concrete_function(*signature)


def _gradient(
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor,
    shift: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    near: tf.Tensor,
    within: int,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the gradient of the training step with respect to x, gamma and beta.

    The second gradient is custom: TensorFlow's for the fused operation is silently 0 inside
    `tf.cond` and in forward-mode differentiation of a function, and forward mode fails on the
    variants that a differentiated `tf.cond` returns.
    """

    @tf.custom_gradient
    def gradient(x, dy, gamma, shift, mean, variance, near):
        def first(x, dy):
            image, data_format = _as_image(x, 3 - within)
            dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=tf.reshape(dy, tf.shape(image)),
                x=image,
                scale=gamma,
                reserve_space_1=tf.cast(mean, tf.float32),
                reserve_space_2=tf.cast(variance, tf.float32),
                reserve_space_3=tf.cast(mean, tf.float32),
                epsilon=epsilon,
                data_format=data_format,
                is_training=True,
            )
            return tf.reshape(dx, tf.shape(x)), dgamma, dbeta

        def shifted():
            return _shifted(x, tf.cast(shift, tf.float32), within)

        def first_of_shifted():
            dx, *others = first(shifted(), tf.cast(dy, tf.float32))
            return tf.cast(dx, x.dtype), *others

        def second(d_dx, d_dgamma, d_dbeta):
            by_x, by_dy, by_gamma = _second_gradient(
                shifted(), dy, gamma, d_dx, d_dgamma, d_dbeta, within, epsilon
            )
            return tf.cast(by_x, x.dtype), tf.cast(by_dy, dy.dtype), by_gamma, *[None] * 4

        return tf.cond(near, lambda: first(x, dy), first_of_shifted), second

    # `second` may only use tensors of the backward graph, and these are from the forward graph.
    return gradient(*(tf.identity(v) for v in (x, dy, gamma, shift, mean, variance, near)))


def _second_gradient(
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor,
    d_dx: tf.Tensor,
    d_dgamma: tf.Tensor,
    d_dbeta: tf.Tensor,
    within: int,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the gradient of `_gradient` with respect to x, dy and gamma; `x` is float32.

    With v = (x - mean(x)) * s, s = 1 / sqrt(variance + epsilon) and the linear map
    P(a) = a - mean(a) - v * mean(v * a), the gradient of the training step is
    dx = gamma * s * P(dy), dgamma = sum(dy * v), dbeta = sum(dy). The gradient of sum(a * v) with
    respect to x is s * P(a). The rest is the product rule.
    """
    axes = [0, within]
    dy, d_dx = tf.cast(dy, tf.float32), tf.cast(d_dx, tf.float32)

    def mean(v):
        return tf.reduce_mean(v, axes, keepdims=True)

    def along(v):
        return tf.expand_dims(v, -1) if within == 2 else v

    centred = x - mean(x)
    s = tf.math.rsqrt(mean(tf.square(centred)) + epsilon)
    v = centred * s

    def p(a):
        return a - mean(a) - v * mean(v * a)

    scale = along(gamma) * s
    by_dy = scale * p(d_dx) + along(d_dgamma) * v + along(d_dbeta)
    by_v = along(d_dgamma) * dy - scale * (d_dx * mean(dy * v) + dy * mean(d_dx * v))
    by_x = s * p(by_v) - scale * s * mean(d_dx * p(dy)) * v
    by_gamma = tf.reduce_sum(d_dx * s * p(dy), axes)
    return by_x, by_dy, by_gamma


def _shifted(x: tf.Tensor, shift: tf.Tensor, within: int) -> tf.Tensor:
    shift = tf.stop_gradient(shift)
    return tf.cast(x, tf.float32) - (tf.expand_dims(shift, -1) if within == 2 else shift)


def _as_image(x: tf.Tensor, axis: int, *, one_image: bool = False) -> tuple[tf.Tensor, str]:
    """Return `x` with rank 4 for the fused operation, and its data format.

    Positions go on the first axis, which oneDNN divides among the cores; on the other axes it
    takes twice as long.
    """
    if not sums.channels_last(x, axis):
        return tf.expand_dims(sums.channels_second(x, axis), -1), "NCHW"
    channels = sums.number_of_channels(x, axis)
    # cuDNN supports at most 65535 images.
    return tf.reshape(x, [1, -1, 1, channels] if one_image else [-1, 1, 1, channels]), "NHWC"


def _scale_and_offset(
    gamma: tf.Tensor | None, beta: tf.Tensor | None, channels: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    gamma = tf.ones([channels]) if gamma is None else tf.cast(gamma, tf.float32)
    beta = tf.zeros([channels]) if beta is None else tf.cast(beta, tf.float32)
    return gamma, beta
