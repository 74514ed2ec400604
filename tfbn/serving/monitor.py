"""The inference network of a model with what enters its batch norm layers measured.

It normalises with the population statistics that its layers hold, as inference always does, so
that its outputs are those of the model. Beside them it gives the moments of the batch.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn import keras_models
from tfbn.layer import kernels


class Moments(NamedTuple):
    """The moments of the values that entered a batch norm layer, from all of its calls.

    Attributes:
        count: Number of values per channel, float64: a scalar, or of shape `[channels]` where a
            mask tells channels apart.
        mean: Per channel, float64, shape `[channels]`; 0 without values.
        variance: The biased variance per channel, as `mean`.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def run(
    model: keras.Model, args: list, layers: Mapping[str, keras.Layer] | None = None
) -> tuple[Any, dict[str, Moments]]:
    """Run a model for inference, to be called while a graph is traced or eagerly.

    The calls of a layer that is called several times are one population: their counts add up.
    Masked positions do not count.

    Args:
        model: A built model.
        args: The positional arguments of a call.
        layers: The batch norm layers to measure by path, see `selected`; all if `None`.

    Returns:
        The model's outputs, and by path the moments of every layer in the order of `layers`.

    Raises:
        ValueError: If the model does not call one of the layers, or calls it in the body of a
            loop or branch, out of which a graph hands nothing.
    """
    layers = keras_models.batch_norm_layers(model) if layers is None else layers
    calls = collections.defaultdict(list)
    outer = _graph()

    def observe(path, layer, call, inputs, training, mask):
        x = tf.convert_to_tensor(inputs)
        if not x.dtype.is_floating:  # As the layer itself does it.
            x = tf.cast(x, layer.compute_dtype)
        if _graph() is not outer:
            raise ValueError(
                "Expected batch norm layers outside of loops and branches. Received: layer "
                f"{path!r} of model {model.name!r}, which is called in one. Give in monitor= the "
                "layers that are not."
            )
        calls[path].append(Moments(*kernels.moments(x, layer.axis, mask)))
        return call(inputs, training=training, mask=mask)

    with keras_models.observed_calls(layers, observe), keras_models.inlined_functions():
        outputs = model(*args, training=False)
    for path in layers:
        if path not in calls:
            raise ValueError(
                f"Expected batch norm layers that the model calls. Received: layer {path!r} of "
                f"model {model.name!r}, which it does not call. Leave it out of monitor=."
            )
    return outputs, {path: _merged(calls[path]) for path in layers}


def selected(
    model: keras.Model, chosen: bool | Iterable[str | keras.Layer]
) -> dict[str, keras.Layer]:
    """The batch norm layers of a model that `monitor=` stands for, by path.

    Args:
        model: A built model.
        chosen: `True` for all of them, or a list of paths and layers.

    Raises:
        ValueError: If there are none, or one is not a batch norm layer of the model.
    """
    layers = keras_models.batch_norm_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a model with batch norm layers to monitor. Received: model {model.name!r}, "
            "which has none. Export it without monitor."
        )
    if chosen is True:
        return layers
    if isinstance(chosen, str | bytes | keras.Layer) or not isinstance(chosen, Iterable):
        raise ValueError(
            "Expected monitor to be True, or a list of batch norm layers or their paths. "
            f"Received: {chosen!r}. Put it in a list."
        )
    paths = {id(layer): path for path, layer in layers.items()}
    wanted = set()
    for entry in chosen:
        path = entry if isinstance(entry, str) else paths.get(id(entry))
        if path not in layers:
            raise ValueError(
                f"Expected batch norm layers of model {model.name!r} in monitor. Received: "
                f"{entry!r}, which is none of {list(layers)}."
            )
        wanted.add(path)
    if not wanted:
        raise ValueError(
            "Expected batch norm layers in monitor. Received: none. Export without monitor, or "
            "give True for all."
        )
    return {path: layer for path, layer in layers.items() if path in wanted}


def _graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _merged(calls: list[Moments]) -> Moments:
    """The moments of several calls together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    first, *rest = calls
    for other in rest:
        count = first.count + other.count
        share = other.count / tf.maximum(count, 1)
        delta = other.mean - first.mean
        between = tf.square(delta) * share * (1 - share)
        within = first.variance + (other.variance - first.variance) * share
        first = Moments(count, first.mean + delta * share, within + between)
    return first
