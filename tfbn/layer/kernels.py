"""Batch normalization as pure functions on tensors: which kernel runs where, fused or composite.

Two ways compute a training step; which one runs is decided while a function is traced.

- Fused (`fused.py`), in eager and graph mode where there is no GPU: TensorFlow's fused operation
  for the normalization and for the gradient. Its own statistics are not used: it adds up the
  values of a channel one by one in float32, and at mean / std = 1e4 its variance is off by 8e-3.
- Composite (`composite.py`), plain operations, everywhere else: under XLA, which lowers the fused
  operation's statistics to E[x^2] - E[x]^2 (TensorFlow #118701); for float64, masks, renorm, and
  statistics shared across replicas; under `tf.vectorized_map`; and where a GPU is visible. There
  the fused operation's gradient takes other things on a GPU than on a CPU, and the device that
  will run it is not known. In a graph that XLA does not compile, forward and backward are compiled
  each for itself, if TensorFlow is built for such GPUs: 3 and 5 passes over memory (compiled for
  H200, H100 and A100 by `tests/layer/test_gpu_steps.py`; not measured on a GPU).

In inference, where there are no statistics to compute, the fused operation is used only where
it is the faster one:

- on the output of `Conv2D`, channels last and as it is, for there TensorFlow's graph optimizer
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

from collections.abc import Callable
from typing import TypedDict

import tensorflow as tf

# TensorFlow has no public way to ask whether the graph being traced will be compiled by XLA.
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from tfbn.layer import composite, fused, sums
from tfbn.layer.composite import renorm_corrections

__all__ = ["moments", "normalize", "renorm_corrections", "train"]


class Form(TypedDict):
    """The axis of the channels and the epsilon of a batch norm layer, as arguments."""

    axis: int
    epsilon: float


def moments(
    x: tf.Tensor, axis: int, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Count, mean and biased variance of every channel over all unmasked positions.

    Args:
        x: Tensor of rank 2 or more. Whole numbers are taken as float32.
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
    x = _floating(x)
    if mask is not None or _under_xla():
        *_, count, mean, variance = composite.centred_moments(
            x, axis, mask, long=_under_xla_for_gpu()
        )
        return count, mean, variance
    return sums.moments_of_stretches(sums.stretched(x, axis), sums.within_stretches(x, axis))


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
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, in the dtype of `x`.

    This is inference (Ioffe & Szegedy 2015, Algorithm 2, line 11): `mean` and `variance` are
    constants, to which no gradient flows.

    Args:
        x: Tensor of rank 2 or more. Whole numbers are taken as float32.
        mean, variance: Shape `[channels]`, float32 or float64.
        gamma, beta: Shape `[channels]`, or `None` for 1 and 0.
        axis: The axis of the channels.
        epsilon: Added to the variance.
    """
    x = _floating(x)
    mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
    if not (_fusable(x) and _fusion_pays_in_inference(x, axis)):
        return composite.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    if _from_convolution(x, axis):
        return fused.normalize_image(x, mean, variance, gamma, beta, epsilon)
    one_image = _gpu_visible()
    form: Form = {"axis": axis, "epsilon": epsilon}
    return fused.normalize(x, mean, variance, gamma, beta, one_image=one_image, **form)


def train(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    axis: int,
    epsilon: float,
    mask: tf.Tensor | None = None,
    synchronized: bool = False,
    renorm: Callable | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalize a batch by its own statistics.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta with the mean and the biased
    variance of the batch (Ioffe & Szegedy 2015, Algorithm 1), and gradients that take into
    account that both depend on `x`.

    Args:
        x: Tensor of rank 2 or more. Whole numbers are taken as float32.
        gamma, beta: Shape `[channels]`, or `None` for 1 and 0.
        axis: The axis of the channels.
        epsilon: Added to the variance.
        mask: As in `moments`. Masked positions are normalized too, they only do not count.
        synchronized: Whether the statistics are those of all replicas' batches together, under
            a `tf.distribute` strategy.
        renorm: Function from `(mean, variance)` to the corrections `(r, d)` of Batch
            Renormalization. The normalized value v is then replaced by r * v + d, with r and d
            constants for the gradient (Ioffe 2017, Algorithm 1).

    Returns:
        `(y, count, mean, variance)`: `y` in the dtype of `x`, the others as from `moments`, but
        constants for the gradient.
    """
    x = _floating(x)
    form: Form = {"axis": axis, "epsilon": epsilon}
    if _fusable(x) and mask is None and not synchronized and renorm is None:
        if not _gpu_visible():
            return fused.train(x, gamma, beta, **form)
        if _xla_runs_on_gpu():
            return composite.train_compiled(x, gamma, beta, **form)
    return composite.train(
        x,
        gamma,
        beta,
        mask=mask,
        long=_under_xla_for_gpu(),
        synchronized=synchronized,
        renorm=renorm,
        **form,
    )


def _under_xla() -> bool:
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _under_xla_for_gpu() -> bool:
    return _under_xla() and _gpu_visible()


def _gpu_visible() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def _xla_runs_on_gpu() -> bool:
    # Not where a plug-in brings the GPU.
    return tf.test.is_built_with_gpu_support()


def _floating(x: tf.Tensor) -> tf.Tensor:
    """`x` as it is, or whole numbers as float32: their normalized values are none."""
    return x if x.dtype.is_floating else tf.cast(x, tf.float32)


def _fusable(x: tf.Tensor) -> bool:
    half_or_single = x.dtype in (tf.float32, tf.float16, tf.bfloat16)
    return half_or_single and not _under_xla() and not _vectorized()


def _vectorized() -> bool:
    """Whether `tf.vectorized_map` traces this call.

    It cannot convert the fused operation with another mean per element, nor the branches of
    `fused.py`. TensorFlow has no public way to ask; the name of the scope is the only sign.
    """
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        scopes = graph.get_name_scope().split("/")
        if any(scope.startswith("loop_body") for scope in scopes):
            return True
        graph = getattr(graph, "outer_graph", None)  # The graph that calls this function.
    return False


def _fusion_pays_in_inference(x: tf.Tensor, axis: int) -> bool:
    if _gpu_visible() or _from_convolution(x, axis):
        return True
    # Neither an eager tensor nor a function's argument may be written over.
    kept = not tf.is_symbolic_tensor(x) or x.op.type == "Placeholder"
    return kept and sums.channels_last(x, axis)


def _from_convolution(x: tf.Tensor, axis: int) -> bool:
    """Whether `x` is the output of a `Conv2D`, with its channels last, in a graph."""
    convolved = tf.is_symbolic_tensor(x) and x.op.type == "Conv2D"
    return convolved and x.op.get_attr("data_format") == b"NHWC" and sums.channels_last(x, axis)
