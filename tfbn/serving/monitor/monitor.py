"""Run a model for inference, and compute the moments of its batch norm layers' inputs.

The layers normalize with their population statistics, so the outputs equal the model's.
"""

import collections
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import keras
import tensorflow as tf

from tfbn.graphs import walks
from tfbn.layer import sums
from tfbn.models import assignment, interception, keras_models
from tfbn.population import PopulationStats
from tfbn.serving.monitor import per_sample
from tfbn.serving.monitor.per_sample import Moments

# The population to compare the answers of the endpoint with.
FILE = "assets.extra/population.safetensors"

# The name of the output with the identity of the statistics that normalized a sample.
IDENTITY = "monitor/population"


class Measured(NamedTuple):
    """The result of `run`.

    Attributes:
        outputs: The model's outputs.
        samples: The number of samples in the batch, an int32 scalar.
        moments: Path of a layer -> moments of the values that entered it in all of its calls.
    """

    outputs: Any
    samples: tf.Tensor
    moments: dict[str, Moments]


def run(
    model: keras.Model, args: list, layers: Mapping[str, keras.Layer] | None = None
) -> Measured:
    """Run a model for inference, eagerly or while a graph is traced.

    A sample is a row of the inputs. If inputs differ in their number of rows, the batch is one
    sample. All calls of a layer are one population: their counts add up. Masked positions do not
    count. A layer may have several contiguous rows for each sample (frames of a film); any other
    number of rows is an error when the graph runs.

    Args:
        model: A built model.
        args: The positional arguments of a call.
        layers: The batch norm layers to measure by path, see `monitored_layers`; all if `None`.

    Raises:
        ValueError: If the model does not call one of the layers, calls it in the body of a loop or
            branch, whose tensors the graph cannot return, or with the channels on axis 0.
    """
    layers = keras_models.batch_norm_layers(model) if layers is None else layers
    calls, entered, inside = collections.defaultdict(list), [], []
    outer = _graph()
    samples = _number_of_samples(args)

    def observe(call: interception.LayerCall) -> tf.Tensor:
        path, layer, x = call.path, call.layer, tf.convert_to_tensor(call.inputs)
        if not x.dtype.is_floating:  # The layer casts too.
            x = tf.cast(x, layer.compute_dtype)
        if layer.axis % x.shape.rank == 0:
            _refuse(model, f"layer {path!r}, whose channels are on the axis of samples")
        if _graph() is outer:
            entered.append(x)
            scale = tf.cast(layer.moving_variance, tf.float64) + layer.epsilon
            calls[path].append(per_sample.moments(x, layer.axis, call.mask, samples, scale))
        else:
            inside.append(path)
        return call.run()

    with interception.observed_calls(layers, observe), interception.inlined_functions():
        outputs = model(*args, training=False)
    # An error inside the body of tf.map_fn would break later uses of tf.distribute strategies.
    for path in inside:
        _refuse(model, f"layer {path!r}, which is called in a loop or branch")
    for path in layers:
        if path not in calls:
            _refuse(model, f"layer {path!r}, which is not called")
    if outer is not None and walks.is_vectorized(entered):
        _refuse(model, "a layer that is called in a tf.vectorized_map")
    rows = tf.stack([tf.shape(x)[0] for x in entered])
    divisible = tf.reduce_all(tf.equal(rows % tf.maximum(samples, 1), 0))
    message = "Expected batch norm layers whose rows are those of samples. Received rows:"
    with tf.control_dependencies([tf.debugging.Assert(divisible, [message, rows])]):
        samples = tf.identity(samples)
    return Measured(outputs, samples, {path: per_sample.merged(calls[path]) for path in layers})


def _number_of_samples(args: list) -> tf.Tensor:
    """Return the number of samples in a batch, an int32 scalar."""
    inputs = [x for x in tf.nest.flatten(args) if x.shape.rank]
    inputs = [x for x in inputs if x.shape[0] is None] or inputs
    if not inputs:
        return tf.constant(1)
    first, *rest = [tf.shape(x)[0] for x in inputs]
    same = tf.reduce_all([tf.equal(size, first) for size in rest]) if rest else True
    return tf.where(same, first, 1) if rest else first


def answers(
    model: keras.Model, layers: Mapping[str, keras.Layer], measured: Measured
) -> dict[str, tf.Tensor]:
    """Return the additional outputs of the endpoint, name -> tensor with a row for each sample.

    The outputs are `<path>/count` in int64, `<path>/mean` and `<path>/variance` in float32 (float64
    for layers that compute in float64), and `IDENTITY`. All of them have a row for each sample, so
    a server that merges requests can split them.
    """
    outputs = {IDENTITY: tf.fill([measured.samples], identity(model))}
    for path, (count, mean, variance) in measured.moments.items():
        dtype = sums.statistics_dtype(tf.as_dtype(layers[path].compute_dtype))
        count = tf.cast(count, tf.int64)
        outputs[f"{path}/count"] = count[:, 0] if count.shape[1] == 1 else count
        outputs[f"{path}/mean"] = tf.cast(mean, dtype)
        outputs[f"{path}/variance"] = tf.cast(variance, dtype)
    return outputs


def identity(model: keras.Model) -> tf.Tensor:
    """Return a digest of a model's batch norm statistics as a string, computed when it runs."""
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
        swept: The sweep that the model's statistics come from, or `None` without one. For layers
            that are not in it, the current statistics are written.
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
    """Return the batch norm layers that `monitor=` selects, path -> layer.

    Args:
        model: A built model.
        chosen: `True` for all of them, or a list of paths and layers.

    Raises:
        ValueError: If the model or the list has no layers, or if an entry is not a batch norm
            layer of the model.
    """
    layers = keras_models.batch_norm_layers(model)
    if not layers:
        raise ValueError(f"Model {model.name!r} has no batch norm layers. Export without monitor.")
    if chosen is True:
        return layers
    if isinstance(chosen, str | bytes | keras.Layer) or not isinstance(chosen, Iterable):
        raise ValueError(
            f"Expected monitor=True or a list of layers. Received: {chosen!r}. Put it in a list."
        )
    paths = {id(layer): path for path, layer in layers.items()}
    wanted = set()
    for entry in chosen:
        path = entry if isinstance(entry, str) else paths.get(id(entry))
        if path not in layers:
            raise ValueError(
                f"Expected batch norm layers in monitor, of {list(layers)}. Received: {entry!r}."
            )
        wanted.add(path)
    if not wanted:
        raise ValueError("Expected layers in monitor. Received: none. Leave it out, or use True.")
    return {path: layer for path, layer in layers.items() if path in wanted}


def _refuse(model: keras.Model, received: str) -> NoReturn:
    raise ValueError(
        f"Cannot monitor model {model.name!r}: it has {received}. Pass other layers as monitor."
    )


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
