"""Normalization, moments and training steps as pure functions that choose a kernel.

The kernel of a training step is chosen while a function is traced:

- Fused (`fused.py`), in eager and graph mode without a GPU: TensorFlow's fused operation computes
  the normalization and the gradient, but not the statistics: it sums the values of a channel one
  by one in float32, with an error of 8e-3 in the variance at mean / std = 1e4.
- Composite (`composite.py`), plain operations, everywhere else: under XLA, which lowers the fused
  operation's statistics to E[x^2] - E[x]^2 (TensorFlow #118701); for float64, masks, renorm, and
  statistics shared across replicas; under `tf.vectorized_map`; and with a visible GPU, because the
  fused operation's gradient requires other arguments on a GPU than on a CPU, and a trace does not
  know the device. In a graph that XLA does not compile, the forward and the backward pass are
  compiled separately if TensorFlow supports that GPU: 3 and 5 passes over memory (compiled for
  H200, H100 and A100 by `tests/layer/test_gpu_steps.py`; not measured on a GPU).

Inference computes no statistics. It uses the fused operation only where that is faster:

- directly on the channels-last output of `Conv2D`, where TensorFlow's graph optimizer merges
  convolution, normalization and activation; a reshape or a bias between them prevents it;
- on channels-last input that cannot be overwritten (arguments of a function, eager tensors): one
  operation writes one new tensor, while three write at least one and read it twice;
- on all input with a visible GPU. Images keep their shape there, so that TensorFlow's graph
  optimizer merges a following ReLU in float32 (shown by its graph, not measured on a GPU).

Elsewhere inference computes (x - mean) * scale + beta, three operations that overwrite their
input. oneDNN's kernel would allocate a tensor, and is slower with channels first. The form
x * scale + (beta - mean * scale) needs only two, but cancels for means far from zero: at
mean / std = 1e4 its error is 2e-3, not 1e-6.

Statistics are biased (divided by the count) and float64: short stretches of the data are summed in
float32, and these sums in float64.
"""

from collections.abc import Callable
from typing import TypedDict

import tensorflow as tf

# Private. No public function returns whether XLA will compile the traced graph.
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from tfbn.layer import composite, fused, sums
from tfbn.layer.composite import flat, renorm_corrections

__all__ = ["compiles_for_gpu", "flat", "moments", "normalize", "renorm_corrections", "train"]


class Form(TypedDict):
    """Keyword arguments of the kernels: the axis of the channels, and epsilon."""

    axis: int
    epsilon: float


def moments(
    x: tf.Tensor, axis: int, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute count, mean and biased variance of every channel over all unmasked positions.

    Args:
        x: Tensor of rank 2 or more. Integers are converted to float32.
        axis: The axis of the channels.
        mask: Tensor that broadcasts to the shape of `x` without its last axis. Where it is
            false (or zero) the values of `x` do not count.

    Returns:
        `(count, mean, variance)` in float64. `mean` and `variance` have shape `[channels]`.
        `count`, the number of values per channel, is a scalar, or of shape `[channels]` with a mask
        and `axis` not the last, where channels may be masked differently. Without any value all are
        0. A NaN or an infinity among the values makes `mean` or `variance` of its channel
        non-finite. Gradients flow through `mean` and `variance`.
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
    """Compute gamma * (x - mean) / sqrt(variance + epsilon) + beta, in the dtype of `x`.

    This is inference (Ioffe & Szegedy 2015, Algorithm 2, line 11). No gradient flows to `mean` and
    `variance`.

    Args:
        x: Tensor of rank 2 or more. Integers are converted to float32.
        mean, variance: Shape `[channels]`, float32 or float64.
        gamma, beta: Shape `[channels]`, or `None` for 1 and 0.
        axis: The axis of the channels.
        epsilon: Added to the variance.
    """
    x = _floating(x)
    mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
    if not (_fusable(x) and _fusion_pays_in_inference(x, axis)):
        return composite.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    if _from_convolution(x, axis) or (_gpu_visible() and _is_images(x, axis)):
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
    """Normalize a batch with its mini-batch statistics.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta with the mean and the biased
    variance of the batch (Ioffe & Szegedy 2015, Algorithm 1). Gradients flow through both.

    Args:
        x: Tensor of rank 2 or more. Integers are converted to float32.
        gamma, beta: Shape `[channels]`, or `None` for 1 and 0.
        axis: The axis of the channels.
        epsilon: Added to the variance.
        mask: See `moments`. Masked positions are normalized, but do not count.
        synchronized: Whether to merge the statistics of all replicas of a `tf.distribute` strategy.
        renorm: Function `(mean, variance) -> (r, d)`, the corrections of Batch Renormalization. The
            normalized value v becomes r * v + d, with r and d constants for the gradient (Ioffe
            2017, Algorithm 1).

    Returns:
        `(y, count, mean, variance)`: `y` in the dtype of `x`, the others like `moments`, but
        without gradients.
    """
    x = _floating(x)
    form: Form = {"axis": axis, "epsilon": epsilon}
    if _fusable(x) and mask is None and not synchronized and renorm is None:
        if not _gpu_visible():
            return fused.train(x, gamma, beta, **form)
        if compiles_for_gpu():
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


def compiles_for_gpu() -> bool:
    """Whether functions with `jit_compile=True` suit the device that will run them: a GPU."""
    return _gpu_visible() and _xla_runs_on_gpu()


def _under_xla() -> bool:
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _under_xla_for_gpu() -> bool:
    return _under_xla() and _gpu_visible()


def _gpu_visible() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def _xla_runs_on_gpu() -> bool:
    # False if a plug-in provides the GPU.
    return tf.test.is_built_with_gpu_support()


def _floating(x: tf.Tensor) -> tf.Tensor:
    """Convert integers to float32."""
    return x if x.dtype.is_floating else tf.cast(x, tf.float32)


def _fusable(x: tf.Tensor) -> bool:
    half_or_single = x.dtype in (tf.float32, tf.float16, tf.bfloat16)
    return half_or_single and not _under_xla() and not _vectorized()


def _vectorized() -> bool:
    """Whether `tf.vectorized_map` traces this call.

    It does not support the fused operation with a mean per element, nor the branches of `fused.py`.
    TensorFlow has no public function for this, so the name of the scope decides.
    """
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        scopes = graph.get_name_scope().split("/")
        if any(scope.startswith("loop_body") for scope in scopes):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def _fusion_pays_in_inference(x: tf.Tensor, axis: int) -> bool:
    if _gpu_visible() or _from_convolution(x, axis):
        return True
    # Eager tensors and arguments of a function cannot be overwritten.
    read_only = not tf.is_symbolic_tensor(x) or x.op.type == "Placeholder"
    return read_only and sums.channels_last(x, axis)


def _is_images(x: tf.Tensor, axis: int) -> bool:
    """Whether `x` has the shape of channels-last images, as many as cuDNN supports if known."""
    return x.shape.rank == 4 and sums.channels_last(x, axis) and (x.shape[0] or 0) <= 65535


def _from_convolution(x: tf.Tensor, axis: int) -> bool:
    """Whether `x` is a graph tensor, the channels-last output of a `Conv2D`."""
    convolved = tf.is_symbolic_tensor(x) and x.op.type == "Conv2D"
    return convolved and x.op.get_attr("data_format") == b"NHWC" and sums.channels_last(x, axis)
