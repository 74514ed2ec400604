"""The endpoint of a model: the graph that is served, and the SavedModel that holds it."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import keras
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.serving.export import batch_norms, signature
from tfbn.serving.monitor import monitor

# Ops that no batch norm layer needs for inference: reductions over the data and new moving
# averages.
_TRAINING_OPS = {
    "Mean",
    "SquaredDifference",
    "AssignVariableOp",
    "AssignAddVariableOp",
    "AssignSubVariableOp",
}


class Saved(NamedTuple):
    """The facts about an endpoint that the trace of its network showed.

    Attributes:
        output_names: The endpoint's names of its outputs by the model's, in the model's order.
        training_ops: Path of a batch norm layer and type of an op of training that it ran.
        batch_norms: Where the batch norm layers are in the graph.
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
        path: The directory to make.
        name_outputs: Gives the endpoint's names of outputs, by the model's.
        monitored: Batch norm layers by path: a second endpoint, `monitor`, tells their
            inputs' statistics. It has a graph of its own, so that `serve` is as it is without.
    """
    traced = []

    def serve(*args):  # The name is part of the endpoint: unnamed inputs become `args_0`.
        args = _checked(args, specs)
        training_ops: list[tuple[str, str]] = []
        found = batch_norms.BatchNorms({}, [])
        with _observed(model, training_ops, found):  # Here, since saving traces more than this.
            outputs = model(*args, training=False)
        named = signature.named_outputs(outputs)
        names = name_outputs({name: _spec(name, output) for name, output in named.items()})
        traced.append(Saved(names, training_ops, found.ordered(model)))
        if all(name == new for name, new in names.items()) and signature.are_flat(outputs):
            return outputs
        return {names[name]: output for name, output in named.items()}

    def monitor_(*args):
        assert monitored is not None
        measured = monitor.run(model, _checked(args, specs), monitored)
        named = signature.named_outputs(measured.outputs)
        beside = monitor.answers(model, monitored, measured)
        return _apart({traced[0].output_names[name]: y for name, y in named.items()}, beside)

    archive = keras.export.ExportArchive()
    archive.track(model)  # For lookup tables, which are no variables.
    archive.add_endpoint("serve", serve, input_signature=specs)
    if monitored is not None:
        archive.add_endpoint("monitor", monitor_, input_signature=specs)
    with _without_notes():
        archive.write_out(os.fspath(path), verbose=False)
    return traced[0]


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """A context without TensorFlow's notes, which name the temporary folder."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checked(args, specs):
    """The arguments, behind a check of their shapes and of an empty batch.

    The check is in the graph because whoever feeds a graph by the names of its tensors, as a
    server does, goes past the shapes of the signature.
    """
    args = tf.nest.map_structure(lambda x, spec: tf.ensure_shape(x, spec.shape), list(args), specs)
    sizes = [
        tf.shape(x)[0]
        for x, spec in zip(tf.nest.flatten(args), tf.nest.flatten(specs), strict=True)
        if spec.shape.rank and spec.shape[0] is None
    ]
    if not sizes:
        return args
    # Kernels of oneDNN answer an empty batch with errors about other things. One empty input
    # among others may be right, a graph without edges, say.
    message = "Expected at least one sample. Received: an empty batch."
    with tf.control_dependencies([tf.debugging.Assert(tf.add_n(sizes) > 0, [message])]):
        return tf.nest.map_structure(tf.identity, args)


def _apart(outputs, beside):
    """Two dicts as one."""
    for name in outputs:
        if name in beside:
            raise ValueError(
                "Expected outputs with names that the monitor's own answers do not have. Received: "
                f"output {name!r}. Give it another name, or export without monitor."
            )
    return outputs | beside


def _spec(name, output):
    if not tf.is_tensor(output):
        raise ValueError(
            "Expected a model whose outputs are tensors, in lists and dicts. "
            f"Received: {name!r} is {output!r}. Wrap the model in one with such outputs."
        )
    return tf.TensorSpec(output.shape, output.dtype, name)


@contextlib.contextmanager
def _observed(
    model: keras.Model, ops: list[tuple[str, str]], found: batch_norms.BatchNorms
) -> Iterator[None]:
    """Note the calls of batch norm layers while a model is traced.

    Only the layer itself knows which ops are its own: names of ops may be shared, and a
    mean elsewhere in the model is no concern of batch norm.

    Args:
        model: The model.
        ops: (path, op type) is added for each op of training that a layer makes.
        found: The calls are added, and their layers.
    """
    outer = tf.compat.v1.get_default_graph()

    def observe(path, layer, call, inputs, training, mask):
        graph = tf.compat.v1.get_default_graph()
        before, calls = len(graph.get_operations()), len(found.calls)
        outputs = call(inputs, training=training, mask=mask)
        ops.extend((path, op.type) for op in graph.get_operations()[before:] if _is_of_training(op))
        if len(found.calls) == calls:  # Else this is a subclass's call, around the layer's own.
            found.layers[path] = batch_norms.layer_of(layer, model, inputs)
            found.calls.append(batch_norms.call_of(path, outer, inputs, mask, outputs))
        return outputs

    layers = keras_models.batch_norm_layers(model)
    with keras_models.observed_calls(layers, observe, outermost=True):
        yield


def _is_of_training(op):
    fused = op.type.startswith("FusedBatchNorm") and op.get_attr("is_training")
    return op.type in _TRAINING_OPS or fused
