"""The inference network of a model with the inputs of its batch norm layers measured.

It normalises with the population statistics that its layers hold, as inference always does, so
that its outputs are those of the model. Beside them it gives the moments of the batch.
"""

import collections
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.layer import kernels, sums
from tfbn.models import assignment, keras_models
from tfbn.population import PopulationStats

# Beside the provenance: the population to compare the answers of the endpoint with.
FILE = "assets.extra/population.npz"

# The answer that tells by which statistics the network normalised.
IDENTITY = "monitor/population"


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
        layers: The batch norm layers to measure by path, see `monitored_layers`; all if `None`.

    Returns:
        The model's outputs, and by path the moments of every layer in the order of `layers`.

    Raises:
        ValueError: If the model does not call one of the layers, or calls it in the body of a
            loop or branch, out of which a graph hands nothing.
    """
    layers = keras_models.batch_norm_layers(model) if layers is None else layers
    calls, entered, inside = collections.defaultdict(list), [], []
    outer = _graph()

    def observe(path, layer, call, inputs, training, mask):
        x = tf.convert_to_tensor(inputs)
        if not x.dtype.is_floating:  # As the layer itself does it.
            x = tf.cast(x, layer.compute_dtype)
        if _graph() is outer:
            entered.append(x)
            calls[path].append(Moments(*_moments(x, layer.axis, mask)))
        else:
            inside.append(path)
        return call(inputs, training=training, mask=mask)

    with keras_models.observed_calls(layers, observe), keras_models.inlined_functions():
        outputs = model(*args, training=False)
    for path in inside:  # Here: an error in the body of tf.map_fn spoils the strategies of later.
        _refuse(model, f"layer {path!r}, which is called in a loop or branch")
    for path in layers:
        if path not in calls:
            _refuse(model, f"layer {path!r}, which is not called")
    if outer is not None and _vectorized(entered):
        _refuse(model, "a layer that is called in a tf.vectorized_map")
    return outputs, {path: _merged(calls[path]) for path in layers}


def answers(
    model: keras.Model, layers: Mapping[str, keras.Layer], moments: Mapping[str, Moments]
) -> dict[str, tf.Tensor]:
    """The answers of the endpoint beside the model's outputs, by name.

    For each layer `<path>/count` in int64, and `<path>/mean` and `<path>/variance` in float32,
    float64 where the layer computes in that; and `IDENTITY`.
    """
    found = {IDENTITY: identity(model)}
    for path, (count, mean, variance) in moments.items():
        dtype = sums.statistics_dtype(tf.as_dtype(layers[path].compute_dtype))
        found[f"{path}/count"] = tf.cast(count, tf.int64)
        found[f"{path}/mean"] = tf.cast(mean, dtype)
        found[f"{path}/variance"] = tf.cast(variance, dtype)
    return found


def identity(model: keras.Model) -> tf.Tensor:
    """A digest, as a string, of the statistics by which a model normalises, read when it runs."""
    values = [tf.cast(variable, tf.float64) for variable in keras_models.all_statistics(model)]
    digest = tf.fingerprint(tf.reshape(tf.concat(values, 0), [1, -1]))
    return tf.strings.as_string(tf.bitcast(digest[0], tf.int64))


def write_population(
    version: pathlib.Path, layers: Mapping[str, keras.Layer], swept: PopulationStats | None
) -> None:
    """Write the population to compare with into a version that is not yet in place.

    Args:
        version: Its directory.
        layers: The batch norm layers that are monitored, by path.
        swept: The sweep that the model's statistics come from, or `None` if they are not those
            of a sweep. Layers that are not in it have the statistics that they hold.
    """
    swept = PopulationStats({}, method="assigned") if swept is None else swept
    population = {
        path: swept[path] if path in swept else assignment.from_layer(layer)
        for path, layer in layers.items()
    }
    file = version / FILE
    file.parent.mkdir(exist_ok=True)
    swept.replace(layers=population, previous=None).save(file)


def monitored_layers(
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


def _refuse(model, received):
    raise ValueError(
        "Expected batch norm layers that are called outside of loops and branches. Received: model "
        f"{model.name!r}, with {received}. Give in monitor= the paths of other layers."
    )


def _vectorized(tensors):
    """Whether a tensor is that of one element of a `tf.vectorized_map`, which traces the first.

    The number of this element is the default of a placeholder.
    """
    seen: set[int] = set()
    pending = [tensor.op for tensor in tensors]
    while pending:
        op = pending.pop()
        if op.type == "PlaceholderWithDefault":
            return True
        new = [tensor.op for tensor in op.inputs if id(tensor.op) not in seen]
        seen.update(map(id, new))
        pending += new
    return False


def _moments(x, axis, mask):
    """Count, mean and biased variance of every channel, as `kernels.moments` has them.

    The norm of a stretch is one read of the data and writes nothing, where the sum of squares
    would write and read them again. The rare channel whose mean is many standard deviations from
    0 costs its layer a second read, see `sums.moments_of_stretches`.
    """
    if mask is not None:
        return kernels.moments(x, axis, mask)
    within = sums.within_stretches(x, axis)
    x = sums.stretched(tf.cast(x, sums.statistics_dtype(x.dtype)), axis)
    shape = tf.shape(x, tf.int64)
    count = tf.cast(shape[0] * shape[within], tf.float64)

    def around(shift):
        near = x if shift is None else x - (tf.expand_dims(shift, -1) if within == 2 else shift)
        norms = tf.cast(tf.math.reduce_euclidean_norm(near, within), tf.float64)
        squares = tf.reduce_sum(tf.square(norms), 0)
        return sums.moments_of_sums(sums.total(near, within), squares, count)

    def shifted():
        shift = tf.cast(mean, x.dtype)
        rest, variance = around(shift)
        return tf.cast(shift, tf.float64) + rest, variance

    mean, variance = around(None)
    near = sums.near_zero(mean, variance, sums.SAFE_RATIO)
    return count, *tf.cond(near, lambda: (mean, variance), shifted)


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
