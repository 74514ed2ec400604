"""Convert answers of the signature `monitor`, as clients receive them, to moments of samples."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from tfbn.serving.monitor import monitor
from tfbn.stats import moments

# Float64 represents all integers up to this one.
_MOST = 2**53


class Samples(NamedTuple):
    """The moments of the values that entered a layer, for every sample of an answer.

    Attributes:
        count, mean, variance: float64, each of shape `(samples, channels)`.
    """

    count: np.ndarray  # type: ignore[assignment]  # Hides `tuple.count`.
    mean: np.ndarray
    variance: np.ndarray

    def merged(self) -> moments.Moments:
        """Return the moments of all samples, merged into one batch."""
        count = self.count.sum(0)
        share = self.count / np.maximum(count, 1)
        mean = np.sum(share * self.mean, 0)
        variance = np.sum(share * (self.variance + (self.mean - mean) ** 2), 0)
        return moments.of_batch(count, mean, variance, method="pooled")

    def each(self) -> list[moments.Moments]:
        """Return the moments of every sample."""
        return [moments.of_batch(*sample, method="pooled") for sample in zip(*self, strict=True)]


def outputs_of(answer: Any) -> Mapping[str, Any]:
    """Return the outputs of an answer over gRPC or REST, name -> values.

    Raises:
        ValueError: If the answer has no outputs by name.
    """
    outputs = getattr(answer, "outputs", answer)
    if isinstance(outputs, Mapping) and set(outputs) == {"outputs"}:
        outputs = outputs["outputs"]
    if isinstance(outputs, Mapping) and set(outputs) == {"predictions"}:
        rows = outputs["predictions"]
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            outputs = {name: [row.get(name) for row in rows] for name in rows[0]}
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"Expected outputs by name, of the signature 'monitor'. Received: {answer!r:.200}."
        )
    return outputs


def identities(outputs: Mapping[str, Any]) -> list[str]:
    """Return for every sample the identity of the statistics that normalized it."""
    values = np.asarray(_entry(outputs, monitor.IDENTITY)).reshape(-1).tolist()
    return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]


def samples_of(outputs: Mapping[str, Any], path: str, shape: tuple[int, int]) -> Samples:
    """Return the samples of one layer.

    Args:
        outputs: See `outputs_of`.
        path: The path of the layer.
        shape: The number of samples, and of channels.

    Raises:
        ValueError: If an entry is missing, has another shape, or has an impossible value: not
            finite, or negative.
    """
    count, mean, variance = (
        _numbers(outputs, f"{path}/{name}") for name in monitor.Moments._fields
    )
    count = count[:, np.newaxis] if count.ndim == 1 else count
    why = _impossible(count, mean, variance, shape)
    if why is not None:
        raise ValueError(
            f"Expected moments of shape {shape} of layer {path!r}. Received: {why}. Leave it out."
        )
    return Samples(np.broadcast_to(count, shape), mean, variance)


def _impossible(
    count: np.ndarray, mean: np.ndarray, variance: np.ndarray, shape: tuple[int, int]
) -> str | None:
    """Return the first impossible value in words, or `None`."""
    if mean.shape != shape or variance.shape != shape or count.shape not in ((shape[0], 1), shape):
        shapes = [value.shape for value in (count, mean, variance)]
        return f"count, mean and variance of shapes {shapes}"
    whole = (count >= 0) & (count <= _MOST) & (count == np.floor(count))
    counted = count > 0
    possible = {
        "mean": np.isfinite(mean) | ~counted,
        "variance": (np.isfinite(variance) & (variance >= 0)) | ~counted,
    }
    if not whole.all():
        return f"the count {count[~whole][0]}, no whole number"
    for (name, valid), values in zip(possible.items(), (mean, variance), strict=True):
        if not valid.all():
            sample, channel = np.argwhere(~valid)[0]
            return f"{name} {values[sample, channel]} in channel {channel} of sample {sample}"
    return None


def _entry(outputs: Mapping[str, Any], name: str) -> Any:
    if name not in outputs:
        raise ValueError(
            f"Expected {name!r} from the signature 'monitor'. Received: {sorted(outputs)[:10]}."
        )
    value = outputs[name]
    return tf.make_ndarray(value) if isinstance(value, tensor_pb2.TensorProto) else value


def _numbers(outputs: Mapping[str, Any], name: str) -> np.ndarray:
    value = _entry(outputs, name)
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected numbers in {name!r}. Received: {value!r:.100}. Leave it out."
        ) from error
