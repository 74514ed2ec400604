"""Write the SavedModel of a model, with the endpoints `serve` and `monitor`."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.models import interception, keras_models
from tfbn.serving.export import batch_norms, signature
from tfbn.serving.monitor import monitor

# Operations that batch norm requires only in training: reductions and new moving averages.
_TRAINING_OPS = {
    "Mean",
    "SquaredDifference",
    "AssignVariableOp",
    "AssignAddVariableOp",
    "AssignSubVariableOp",
}


class Saved(NamedTuple):
    """The result of the trace of an endpoint.

    Attributes:
        output_names: Name of an output in the model -> name in the endpoint, in the model's order.
        training_ops: Pairs of the path of a batch norm layer and the type of a training operation.
        batch_norms: The record of the batch norm layers in the graph.
    """

    output_names: dict[str, str]
    training_ops: list[tuple[str, str]]
    batch_norms: batch_norms.BatchNorms


def save(
    model: keras.Model,
    specs: list,
    path: pathlib.Path,
    name_outputs: Callable[[dict[str, tf.TensorSpec]], dict[str, str]],
    monitored: Mapping[str, keras.Layer] | None = None,
) -> Saved:
    """Write the SavedModel of a model's inference network, with the endpoint `serve`.

    Args:
        model: A built model.
        specs: The endpoint's arguments, with the names that clients will use.
        path: The directory to create.
        name_outputs: Returns name of an output in the model -> name in the endpoint.
        monitored: Path -> batch norm layer, to add a second endpoint, `monitor`, which returns
            moments of their inputs. Its graph is separate, so `serve` does not change.
    """
    traced = []

    def serve(*args: Any) -> Any:  # The name `args` is public: unnamed inputs become `args_0`.
        args = _checked(args, specs)
        training_ops: list[tuple[str, str]] = []
        record = batch_norms.BatchNorms({}, [])
        # Only here, because saving traces other functions as well.
        with _observed(model, training_ops, record):
            outputs = model(*args, training=False)
        named = signature.named_outputs(outputs)
        names = name_outputs({name: _spec(name, output) for name, output in named.items()})
        traced.append(Saved(names, training_ops, record.ordered(model)))
        if all(name == new for name, new in names.items()) and signature.are_flat(outputs):
            return outputs
        return {names[name]: output for name, output in named.items()}

    def monitor_(*args: Any) -> dict[str, tf.Tensor]:
        assert monitored is not None
        measured = monitor.run(model, _checked(args, specs), monitored)
        named = signature.named_outputs(measured.outputs)
        moments = monitor.answers(model, monitored, measured)
        return _merged({traced[0].output_names[name]: y for name, y in named.items()}, moments)

    archive = keras.export.ExportArchive()
    archive.track(model)  # Lookup tables are not variables.
    archive.add_endpoint("serve", serve, input_signature=specs)
    if monitored is not None:
        archive.add_endpoint("monitor", monitor_, input_signature=specs)
    with _without_notes():
        archive.write_out(os.fspath(path), verbose=False)
    return traced[0]


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Suppress TensorFlow's notes, which name the temporary folder."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checked(args: Sequence[Any], specs: list) -> Any:
    """Return the arguments, after a check of their shapes and for an empty batch.

    The check is part of the graph, because a server feeds tensors by name and does not check the
    shapes of the signature.
    """
    args = tf.nest.map_structure(lambda x, spec: tf.ensure_shape(x, spec.shape), list(args), specs)
    sizes = [
        tf.shape(x)[0]
        for x, spec in zip(tf.nest.flatten(args), tf.nest.flatten(specs), strict=True)
        if spec.shape.rank and spec.shape[0] is None
    ]
    if not sizes:
        return args
    # Kernels of oneDNN raise misleading errors for an empty batch. One empty input of several is
    # allowed: a graph without edges, for example.
    message = "Expected at least one sample. Received: an empty batch."
    with tf.control_dependencies([tf.debugging.Assert(tf.add_n(sizes) > 0, [message])]):
        return tf.nest.map_structure(tf.identity, args)


def _merged(outputs: dict[str, tf.Tensor], moments: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return the union of two dicts without common names."""
    for name in outputs:
        if name in moments:
            raise ValueError(f"Output {name!r} has the name of a monitor's output. Rename it.")
    return outputs | moments


def _spec(name: str, output: Any) -> tf.TensorSpec:
    if not tf.is_tensor(output):
        raise ValueError(f"Output {name!r} is {output!r} and not a tensor. Wrap the model.")
    return tf.TensorSpec(output.shape, output.dtype, name)


@contextlib.contextmanager
def _observed(
    model: keras.Model, ops: list[tuple[str, str]], record: batch_norms.BatchNorms
) -> Iterator[None]:
    """Record the calls of batch norm layers while a model is traced.

    Operations are attributed to a layer by its call, because their names may be shared, and other
    layers may compute means too.

    Args:
        model: The model.
        ops: Receives (path, type) of each training operation that a layer creates.
        record: Receives the calls and their layers.
    """
    outer = tf.compat.v1.get_default_graph()

    def observe(call: interception.LayerCall) -> tf.Tensor:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        outputs = call.run()
        added = graph.get_operations()[before:]
        ops.extend((call.path, op.type) for op in added if _is_of_training(op))
        if not call.contained_another:
            record.layers[call.path] = batch_norms.layer_of(call.layer, model, call.inputs)
            record.calls.append(
                batch_norms.call_of(call.path, outer, call.inputs, call.mask, outputs)
            )
        return outputs

    layers = keras_models.batch_norm_layers(model)
    with interception.observed_calls(layers, observe, outermost=True):
        yield


def _is_of_training(op: tf.Operation) -> bool:
    fused = op.type.startswith("FusedBatchNorm") and op.get_attr("is_training")
    return op.type in _TRAINING_OPS or fused
