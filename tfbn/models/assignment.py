"""Read statistics from the batch norm layers of a Keras model, and assign statistics to them."""

import re
from collections.abc import Iterable, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.stats.layer_stats import LayerStats


def from_layer(layer: keras.Layer) -> LayerStats:
    """Return the statistics of a layer as `LayerStats`."""
    by_name = {name: value_of(v) for name, v in keras_models.statistics(layer).items()}
    mean, variance = by_name.pop("moving_mean"), by_name.pop("moving_variance")
    return LayerStats(0, mean, variance, by_name or None)


def assign(model: keras.Model, stats: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
    """Store statistics in the layers of a model, all or none, and return the ones before.

    Raises:
        ValueError: See `matching_layers` and `assignments`.
    """
    layers = matching_layers(model, stats)
    writes = [
        write for path, layer in layers.items() for write in assignments(path, stats[path], layer)
    ]
    before = {path: from_layer(layer) for path, layer in layers.items()}
    with keras_models.restored_on_error(model, [variable for variable, _ in writes]):
        for variable, value in writes:
            variable.assign(value)
    return before


def value_of(variable: keras.Variable) -> np.ndarray:
    """Return a copy of a variable's value, in its dtype."""
    return tf.convert_to_tensor(variable).numpy().copy()


def changed_variable(stats: LayerStats, layer: keras.Layer) -> str | None:
    """Return the name of the first variable that differs from these statistics, or `None`."""
    for name, value in variable_values(stats, layer).items():
        current = value_of(getattr(layer, name))
        if not np.array_equal(current, value.astype(current.dtype), equal_nan=True):
            return name
    return None


def matching_layers(model: keras.Model, paths: Iterable[str]) -> dict[str, keras.Layer]:
    """Return path -> batch norm layer of a model, for the paths of some statistics.

    Raises:
        ValueError: If a layer is missing or not built.
    """
    layers, theirs = {}, keras_models.batch_norm_layers(model)
    for path, corresponding in correspondence(model, paths).items():
        layer = theirs.get(corresponding)
        if layer is None:
            raise ValueError(
                f"Expected the swept model. Received: {model.name!r} with no batch norm layer "
                f"{path!r}."
            )
        if not layer.built:
            raise ValueError(
                f"Expected a built model. Received: layer {path!r} has no weights yet. Call the "
                "model."
            )
        layers[path] = layer
    return layers


def correspondence(model: keras.Model, paths: Iterable[str]) -> dict[str, str]:
    """Return path of some statistics -> path of the layer in a model, which may be missing.

    Names that Keras creates end in a counter, which differs in an architecture that is built twice.
    If only counters differ, the layers correspond in order.
    """
    paths = list(paths)
    layers = keras_models.batch_norm_layers(model)
    same_names = [*map(_without_counters, layers)] == [*map(_without_counters, paths)]
    return dict(zip(paths, layers if same_names and {*layers} != {*paths} else paths, strict=True))


def _without_counters(path: str) -> str:
    return re.sub(r"_\d+(?=/|$)", "", path)


def variable_values(stats: LayerStats, layer: keras.Layer) -> dict[str, np.ndarray]:
    """Return attribute -> float64 value for the statistics variables of a layer."""
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
                f"Expected statistics of shape {tuple(variable.shape)} for layer {path!r}. "
                f"Received: shape {value.shape}."
            )
        with np.errstate(over="ignore"):
            cast = value.astype(keras.backend.standardize_dtype(variable.dtype))
        too_large = np.isfinite(value) & ~np.isfinite(cast.astype(np.float64))
        if too_large.any():
            channel = int(np.argmax(too_large))
            raise ValueError(
                f"Expected statistics that {variable.dtype} can hold for layer {path!r}. "
                f"Received: {name} {value[channel]} in channel {channel}."
            )
        assignments.append((variable, cast))
    return assignments


def round_to_variables(
    path: str, mean: np.ndarray, variance: np.ndarray, layer: keras.Layer
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance rounded to the dtype of the layer's variables.

    Raises:
        ValueError: If a value is too large for the dtype.
    """
    rounded = {id(v): value for v, value in assignments(path, LayerStats(1, mean, variance), layer)}
    rounded_mean, rounded_variance = (
        rounded[id(variable)].astype(np.float64)
        for variable in (layer.moving_mean, layer.moving_variance)
    )
    return rounded_mean, rounded_variance
