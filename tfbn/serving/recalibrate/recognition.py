"""Recognize the batch norm layers in the graph of a SavedModel that another tool wrote.

A form of `patterns` in the flattened signature is a batch norm layer if nothing else reads its mean
and variance. A wrong match is detected later, because the network with these layers must predict
what is served. A missed layer would not be detected, so an unused variable that could belong to one
is an error. Masks have no effect on inference, so a layer that may have a mask is an error too.
"""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbn.graphs.flattening import bodies, flattened
from tfbn.serving import saved_models
from tfbn.serving.export.batch_norms import BatchNorms, Call, Layer
from tfbn.serving.provenance import Provenance
from tfbn.serving.recalibrate import patterns
from tfbn.serving.recalibrate.patterns import Match
from tfbn.serving.saved_models import SavedModel


class _Variable(NamedTuple):
    """A variable that a graph captures.

    Attributes:
        path: The path in the SavedModel's tree of objects.
        name: The name from the tool that wrote it.
        trainable: Whether it is marked as trainable.
        channels: The number of values if there is one per channel, else 0.
    """

    path: str
    name: str
    trainable: bool
    channels: int


def recognized(version: pathlib.Path, model: SavedModel) -> tuple[BatchNorms, Any]:
    """Return the batch norm layers of a SavedModel's default signature, and its flat function.

    Args:
        version: The directory of the version.
        model: The SavedModel.

    Raises:
        ValueError: If the signature cannot be read, if it has no batch norm, or if it may have
            batch norm that is not recognized.
    """
    if saved_models.DEFAULT not in model.loaded.signatures:
        raise _refusal(version, f"no signature {saved_models.DEFAULT!r}")
    signature = model.loaded.signatures[saved_models.DEFAULT]
    graph = flattened(signature)
    variables = _variables(version, signature, graph, model.meta_graph.object_graph_def)
    matches = list(patterns.matches(graph.graph))[::-1]
    layers: dict[str, Layer] = {}
    calls: list[Call] = []
    paths: dict[str, str] = {}
    for match in matches:
        layer = _layer(version, match, variables)
        mean = _read(match.parameters["mean"], variables)
        assert mean is not None
        path = paths.setdefault(mean.path, _path(mean, taken=layers))
        if layers.setdefault(path, layer).variables != layer.variables:
            raise _refusal(version, f"two batch norm layers that share a mean, {path!r}")
        calls.append(Call(path, match.x.name, None, match.y.name))
    _require_no_masks(version, signature.graph, layers)
    _require_only_reader(version, graph.graph, matches)
    _require_all(version, graph.graph, layers, variables)
    return BatchNorms(layers, calls, function=None), graph


def _refusal(version: pathlib.Path, received: str) -> ValueError:
    return ValueError(
        f"Cannot recalibrate {str(version)!r} of another tool: it has {received}. Recalibrate the "
        "model, and export it."
    )


def _variables(
    version: pathlib.Path, signature: Any, graph: Any, objects: Any
) -> dict[str, _Variable]:
    """Return name of a captured placeholder in the flat graph -> variable."""
    node_paths = saved_models.node_paths(objects)
    bound = saved_models.bound_inputs(objects, saved_models.DEFAULT)
    if bound is None or len(bound) != len(signature.captured_inputs):
        raise _refusal(version, "no record of the variables that its signature reads")
    nodes = {id(t): node for t, node in zip(signature.captured_inputs, bound, strict=True)}
    variables = {}
    placeholders = graph.inputs[len(graph.inputs) - len(graph.captured_inputs) :]
    for outer, inner in zip(graph.captured_inputs, placeholders, strict=True):
        node = nodes[id(outer)]
        if objects.nodes[node].WhichOneof("kind") == "variable":
            proto = objects.nodes[node].variable
            shape = tf.TensorShape(proto.shape)
            wide = [size for size in shape if size != 1] if shape.rank else [0, 0]
            floating = tf.dtypes.as_dtype(proto.dtype).is_floating
            channels = shape.num_elements() if floating and len(wide) < 2 else 0
            variables[inner.name] = _Variable(
                node_paths[node], proto.name, proto.trainable, channels or 0
            )
    return variables


def _read(tensor: tf.Tensor, variables: dict[str, _Variable]) -> _Variable | None:
    """Return the variable that a tensor reads."""
    resource = patterns.variable(tensor)
    return None if resource is None else variables.get(resource.name)


def _layer(version: pathlib.Path, match: Match, variables: dict[str, _Variable]) -> Layer:
    variable_paths = {}
    names = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
    neutral = {"gamma": 1.0, "beta": 0.0}
    for name, attribute in names.items():
        if name not in match.parameters:
            continue
        parameter = _read(match.parameters[name], variables)
        if parameter is None:
            value = patterns.constant(match.parameters[name])
            if name in neutral and value is not None and np.all(value == neutral[name]):
                continue
            raise _refusal(version, f"batch norm {match.y.op.name!r} whose {name} is no variable")
        if not parameter.channels:
            raise _refusal(
                version, f"batch norm {parameter.name!r} whose {name} is not per channel"
            )
        variable_paths[attribute] = parameter.path
    if match.x.shape.rank is None:
        raise _refusal(version, f"batch norm {match.y.op.name!r} on an input of unknown rank")
    dtype = match.x.dtype
    policy = f"mixed_{dtype.name}" if dtype in (tf.float16, tf.bfloat16) else dtype.name
    return Layer(match.axis, match.epsilon, policy, match.x.shape.as_list(), variable_paths)


def _path(mean: _Variable, taken: Iterable[str]) -> str:
    """Return a path for a layer, from the name of its mean."""
    path = mean.name.rpartition("/")[0] or mean.name or mean.path.rpartition("/")[0]
    numbered = [path, *(f"{path}#{number}" for number in range(2, len(list(taken)) + 2))]
    return next(path for path in numbered if path not in taken)


def _require_no_masks(version: pathlib.Path, graph: tf.Graph, layers: dict[str, Layer]) -> None:
    """Raise `ValueError` if the values that enter a layer may be masked.

    Keras allows a mask for inputs of rank 3 and more. It is a boolean tensor of a lower rank, which
    no operation may read in inference.
    """
    booleans = [
        tensor.shape.rank
        for body in bodies(graph)
        for op in body.get_operations()
        if op.type != "Const"
        for tensor in op.outputs
        if tensor.dtype == tf.bool and tensor.shape.rank != 0
    ]
    for path, layer in layers.items():
        rank = len(layer.shape)
        masked = any(other is None or other < rank for other in booleans)
        if rank == 3 or (rank > 3 and masked):
            raise _refusal(version, f"layer {path!r} over sequences, which may be masked")


def _require_only_reader(version: pathlib.Path, graph: tf.Graph, matches: list[Match]) -> None:
    """Raise `ValueError` if something else reads a statistic, or a value between it and a layer."""
    inside = {op for match in matches for op in match.operations}
    ends = {match.y.op for match in matches}
    between = {tensor.name for op in inside - ends for tensor in op.outputs}
    between.update(
        resource.name
        for match in matches
        for name in ("mean", "variance")
        if (resource := patterns.variable(match.parameters[name])) is not None
    )
    for op in graph.get_operations():
        inputs = op.inputs
        if op.type == "IdentityN":  # A custom gradient holds the values that it requires.
            pairs = zip(op.inputs, op.outputs, strict=True)
            inputs = [tensor for tensor, output in pairs if output.consumers()]
        if op not in inside and any(tensor.name in between for tensor in inputs):
            raise _refusal(version, f"an operation {op.name!r} that reads a statistic as well")


def _require_all(
    version: pathlib.Path,
    graph: tf.Graph,
    layers: dict[str, Layer],
    variables: dict[str, _Variable],
) -> None:
    """Raise `ValueError` if the graph may have batch norm that was not recognized."""
    known = {path for layer in layers.values() for path in layer.variables.values()}
    centers = _subtracted_from_data(graph)
    for placeholder, variable in variables.items():
        unknown = variable.channels and variable.path not in known
        if unknown and (not variable.trainable or placeholder in centers):
            name = variable.name
            raise _refusal(version, f"a variable {name!r} of no batch norm that is recognized")
    if not layers:
        raise _refusal(version, "no batch norm layer that is recognized")


def _subtracted_from_data(graph: tf.Graph) -> set[str]:
    """Return the captured placeholders that are subtracted from data, like a mean."""
    data: set[str] = set()
    centers = set()
    for op in graph.get_operations():
        entered = op.type == "Placeholder" and op.outputs[0].dtype != tf.resource
        if entered or any(tensor.name in data for tensor in op.inputs):
            data.update(tensor.name for tensor in op.outputs)
        if op.type == "Sub" and op.inputs[0].name in data:
            resource = patterns.variable(op.inputs[1])
            if resource is not None:
                centers.add(resource.name)
    return centers


def described(loaded: Any, fingerprint: str) -> Provenance:
    """Return the provenance of a SavedModel that another tool wrote."""
    return Provenance(
        tfbn=None,
        keras=None,
        tensorflow=loaded.tensorflow_version,
        fingerprint=fingerprint,  # Of the batch norm layers only.
        stale="they are those of a model that tfbn did not export",
        folded=False,
        max_abs_difference=0.0,
        inputs=None,  # The signature has names without an order.
        outputs=None,
        statistics=None,
    )
