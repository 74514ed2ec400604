"""Statistics from and into the batch norm layers of Keras models."""

import re
from collections.abc import Iterable, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.stats.layer_stats import LayerStats


def from_layer(layer: keras.Layer) -> LayerStats:
    """Return the `LayerStats` that a layer holds."""
    by_name = {name: value_of(v) for name, v in keras_models.statistics(layer).items()}
    mean, variance = by_name.pop("moving_mean"), by_name.pop("moving_variance")
    return LayerStats(0, mean, variance, by_name or None)


def value_of(variable: keras.Variable) -> np.ndarray:
    """Return a copy of a variable's value, in its dtype."""
    return tf.convert_to_tensor(variable).numpy().copy()


def changed_variable(stats: LayerStats, layer: keras.Layer) -> str | None:
    """Return the name of a layer's variable that does not hold these statistics, or `None`."""
    for name, value in variable_values(stats, layer).items():
        held = value_of(getattr(layer, name))
        if not np.array_equal(held, value.astype(held.dtype), equal_nan=True):
            return name
    return None


def matching_layers(model: keras.Model, paths: Iterable[str]) -> dict[str, keras.Layer]:
    """Return the batch norm layers of a model for the paths of some statistics.

    Names that Keras creates end in a counter, which differs in an architecture that is built twice.
    If only counters differ, the layers correspond in order.

    Raises:
        ValueError: If a layer is missing or not built.
    """
    found, layers = _correspondence(model, paths), {}
    for path, layer in found.items():
        if layer is None:
            raise ValueError(
                f"Expected a model with the batch norm layers of these statistics. "
                f"Received: model {model.name!r}, which has no batch norm layer "
                f"{path!r}; it has {list(keras_models.batch_norm_layers(model))}. Assign "
                "statistics only to the model they were collected from, or to one of the same "
                "architecture."
            )
        if not layer.built:
            raise ValueError(
                f"Expected a built model. Received: model {model.name!r}, whose layer "
                f"{path!r} has no weights yet. Call the model on a batch first."
            )
        layers[path] = layer
    return layers


def mismatch(model: keras.Model, layers: Mapping[str, LayerStats]) -> str | None:
    """Return how the layers of a model differ from statistics, in words; `None` if they do not."""
    for path, layer in _correspondence(model, layers).items():
        if layer is None or not layer.built:
            return f"the model has no batch norm layer {path!r}"
        name = changed_variable(layers[path], layer)
        if name is not None:
            return f"{name} of layer {path!r} has changed since the sweep"
    return None


def _correspondence(model, paths):
    """path -> layer, or `None`."""
    paths = list(paths)
    layers = keras_models.batch_norm_layers(model)
    same_names = [*map(_without_counters, layers)] == [*map(_without_counters, paths)]
    if same_names and layers.keys() != set(paths):
        return dict(zip(paths, layers.values(), strict=True))
    return {path: layers.get(path) for path in paths}


def _without_counters(path: str) -> str:
    return re.sub(r"_\d+(?=/|$)", "", path)


def variable_values(stats: LayerStats, layer: keras.Layer) -> dict[str, np.ndarray]:
    """Return the float64 values for the statistics variables of a layer: attribute -> value."""
    by_name = {"moving_mean": stats.mean, "moving_variance": stats.variance}
    if getattr(layer, "renorm", False):
        stddev = np.sqrt(stats.variance + layer.epsilon)
        by_name |= stats.renorm or {
            "moving_stddev": stddev,
            "renorm_mean": stats.mean,
            "renorm_stddev": stddev,
        }
    return by_name


def assignments(path: str, stats: LayerStats, layer: keras.Layer) -> list[tuple]:
    """Return pairs of a layer's statistics variables and their new values, in their dtype.

    Raises:
        ValueError: If a shape differs, or a value is too large for the dtype.
    """
    assignments = []
    for name, value in variable_values(stats, layer).items():
        variable = getattr(layer, name)
        if tuple(variable.shape) != value.shape:
            raise ValueError(
                f"Expected statistics of shape {tuple(variable.shape)} for layer "
                f"{path!r}. Received: shape {value.shape}. These statistics belong to "
                "another model."
            )
        with np.errstate(over="ignore"):
            cast = value.astype(keras.backend.standardize_dtype(variable.dtype))
        too_large = np.isfinite(value) & ~np.isfinite(cast.astype(np.float64))
        if too_large.any():
            channel = int(np.argmax(too_large))
            raise ValueError(
                f"Expected statistics that {variable.dtype} can hold for layer {path!r}. Received: "
                f"{name} {value[channel]} in channel {channel}. Look for very large values in the "
                "data of the sweep."
            )
        assignments.append((variable, cast))
    return assignments


def round_to_variables(
    path: str, mean: np.ndarray, variance: np.ndarray, layer: keras.Layer
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance as rounded to the dtype of the layer's variables.

    Raises:
        ValueError: If a value is too large for the dtype.
    """
    written = {id(v): value for v, value in assignments(path, LayerStats(1, mean, variance), layer)}
    rounded_mean, rounded_variance = (
        written[id(variable)].astype(np.float64)
        for variable in (layer.moving_mean, layer.moving_variance)
    )
    return rounded_mean, rounded_variance
