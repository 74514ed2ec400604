"""Batch norm layers found in the graph of a SavedModel that another tool wrote.

Inference of a batch norm layer is one of two patterns of operations,

    FusedBatchNorm(x, gamma, beta, mean, variance)
    x * inv + (beta - mean * inv),  inv = rsqrt(variance + epsilon) * gamma

as TensorFlow's fused kernel and `tf.nn.batch_normalization` (and so Keras 3) have it. They are
taken for batch norm where mean and variance come from variables which nothing else reads. What
was taken for a layer is tested afterwards, since the network run with these layers must predict
what is served; what was overlooked is not, so that every variable with the name of a statistic has
to be found. Masks leave no trace in inference. So layers over sequences, which may have one, are
refused.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from tfbn.serving.export.batch_norms import BatchNorms, Call, Layer

_SIGNATURE = "serving_default"
_FUSED = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"}
_READS = {"ReadVariableOp", "Identity", "Cast", "Reshape", "StopGradient", "ExpandDims", "Squeeze"}
_STATISTICS = ("moving_mean", "moving_variance")


class _Found(NamedTuple):
    """One call: the tensors that enter and leave, and the tensors of the four variables."""

    entered: tf.Tensor
    left: tf.Tensor
    gamma: tf.Tensor | None
    beta: tf.Tensor | None
    mean: tf.Tensor
    variance: tf.Tensor
    epsilon: float
    axis: int


def recognized(version: pathlib.Path, loaded: Any) -> BatchNorms:
    """The batch norm layers of a SavedModel's default signature.

    Args:
        version: Its directory.
        loaded: The SavedModel, as `tf.saved_model.load` gives it.

    Raises:
        ValueError: If the signature's function cannot be read, if there is no batch norm in it,
            or if there may be more than is recognized.
    """
    name, places = _function(version)
    [function] = getattr(loaded, name).concrete_functions if name else [None]
    if function is None or len(places) != len(function.captured_inputs):
        raise _not(version, f"no function of its own behind the signature {_SIGNATURE!r}")
    graph = function.graph
    captured = graph.inputs[len(graph.inputs) - len(places) :]
    place_of = {tensor.name: place for tensor, place in zip(captured, places, strict=True)}
    layers: dict = {}
    calls: list = []
    found: list = []
    paths: dict = {}
    for call in _calls(graph):
        layer = _layer(call, place_of)
        if layer is None:
            continue
        found.append(call)
        place = layer.variables["moving_mean"]
        if place not in paths:
            paths[place] = _path(place, version, taken=layers)
        path = paths[place]
        if layers.setdefault(path, layer).variables != layer.variables:
            raise _not(version, f"two batch norm layers that share a mean, {path!r}")
        if len(layer.shape) == 3:
            raise _not(
                version, f"layer {path!r} over sequences, whose masks the graph does not tell"
            )
        calls.append(Call(path, call.entered.name, None, call.left.name))
    _require_all(version, graph, layers, calls)
    _require_alone(version, graph, found)
    return BatchNorms(layers, calls, name)


def _not(version, received):
    return ValueError(
        "Expected a SavedModel of tfbn.export, or one of another tool in which every batch norm "
        f"layer can be told from its operations. Received: {str(version)!r}, with {received}. "
        "Recalibrate the model itself, and export it with tfbn.export."
    )


def _proto(version):
    content = (version / "saved_model.pb").read_bytes()
    return saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]


def _function(version):
    """The name of the function behind the default signature, and the places of its variables.

    A place is `None` for what is not found in the tree of objects.
    """
    graph = _proto(version)
    objects = graph.object_graph_def
    if not objects.nodes:
        return None, []
    places = _places(objects.nodes)
    children = {child.local_name: child.node_id for child in objects.nodes[0].children}
    signatures = objects.nodes[children["signatures"]] if "signatures" in children else None
    named = {c.local_name: c.node_id for c in signatures.children} if signatures else {}
    if _SIGNATURE not in named:
        return None, []
    wrapper = objects.nodes[named[_SIGNATURE]].bare_concrete_function.concrete_function_name
    [body] = [f for f in graph.graph_def.library.function if f.signature.name == wrapper]
    called = [node.attr["f"].func.name for node in body.node_def if "PartitionedCall" in node.op]
    for name, node in children.items():
        inner = list(objects.nodes[node].function.concrete_functions)
        if len(inner) == 1 and called == inner:
            bound = objects.concrete_functions[inner[0]].bound_inputs
            return name, [places.get(node_id) for node_id in bound]
    return None, []


def _places(nodes):
    """By number of a node the first path that leads to it."""
    found, pending = {0: ""}, [0]
    for node in pending:
        for child in nodes[node].children:
            if child.node_id not in found:
                prefix = f"{found[node]}/" if found[node] else ""
                found[child.node_id] = prefix + child.local_name
                pending.append(child.node_id)
    return found


def _path(place, version, taken):
    """A name for a layer, from that of the variable of its mean."""
    objects = _proto(version).object_graph_def
    names = {path: node for node, path in _places(objects.nodes).items()}
    name = objects.nodes[names[place]].variable.name
    path = name.rpartition("/")[0] or name or place.rpartition("/")[0]
    numbered = [path, *(f"{path}#{number}" for number in range(2, len(taken) + 2))]
    return next(path for path in numbered if path not in taken)


def _calls(graph):
    consumers: dict[str, list] = {}
    for op in graph.get_operations():
        for tensor in op.inputs:
            consumers.setdefault(tensor.name, []).append(op)
    for op in graph.get_operations():
        found = None
        if op.type in _FUSED and not op.get_attr("is_training"):
            x, gamma, beta, mean, variance = op.inputs
            axis = 1 if op.get_attr("data_format").decode().startswith("NC") else -1
            epsilon = op.get_attr("epsilon")
            found = _Found(x, op.outputs[0], gamma, beta, mean, variance, epsilon, axis)
        elif op.type == "Rsqrt":
            found = _unfused(op, consumers)
        if found is not None:
            yield found


def _unfused(rsqrt, consumers):
    """The call around a reciprocal square root, or `None` if it is no batch norm."""
    added = rsqrt.inputs[0].op
    if added.type not in ("Add", "AddV2"):
        return None
    variance, epsilon = added.inputs
    epsilon = tf.get_static_value(epsilon)
    if epsilon is None or np.ndim(epsilon):
        return None

    def users(tensor):
        """Its consumers, past casts."""
        found: list[tuple] = []
        for op in consumers.get(tensor.name, []):
            found += users(op.outputs[0]) if op.type == "Cast" else [(op, tensor)]
        return found

    inverse, gamma = rsqrt.outputs[0], None
    first = users(inverse)
    if len(first) == 1 and first[0][0].type == "Mul":
        op, tensor = first[0]
        gamma, inverse = _other(op, tensor), op.outputs[0]
    products = {}
    for op, tensor in users(inverse):
        if op.type != "Mul":
            return None
        other = _other(op, tensor)
        negative = other.op.type == "Neg"  # Without beta it is x * inv + (-mean) * inv.
        mean = other.op.inputs[0] if negative else other
        if _variable(mean) is None:
            products["x"] = op, other, False
        else:
            products["mean"] = op, mean, negative
    if set(products) != {"mean", "x"} or len(users(inverse)) != 2:
        return None
    (shift, mean, negative), (scaled, x, _) = products["mean"], products["x"]
    beta = None
    if not negative:
        [(subtracted, tensor), *more] = users(shift.outputs[0]) or [(None, None)]
        if more or subtracted is None or subtracted.type != "Sub":
            return None
        if subtracted.inputs[1] is not tensor:
            return None
        shift, beta = subtracted, subtracted.inputs[0]
    sums = [op for tensor in (shift, scaled) for op, _ in users(tensor.outputs[0])]
    if len(sums) != 2 or sums[0] is not sums[1] or sums[0].type not in ("Add", "AddV2"):
        return None
    left = sums[0].outputs[0]
    return _Found(x, left, gamma, beta, mean, variance, float(epsilon), _axis(mean))


def _other(op, tensor):
    return op.inputs[1] if op.inputs[0] is tensor else op.inputs[0]


def _axis(mean):
    """The axis of the channels, to which a mean is broadcast."""
    wide = [axis for axis, size in enumerate(mean.shape) if size != 1]
    return wide[0] - mean.shape.rank if len(wide) == 1 else -1


def _variable(tensor):
    """The captured input that a tensor reads, or `None` if it is of something else."""
    while tensor.op.type in _READS:
        tensor = tensor.op.inputs[0]
    return tensor.name if tensor.dtype == tf.resource and tensor.op.type == "Placeholder" else None


def _layer(call, place_of):
    """The layer of a call, or `None` where its statistics are of no variables."""
    held = {
        "gamma": (call.gamma, 1.0),
        "beta": (call.beta, 0.0),
        "moving_mean": (call.mean, None),
        "moving_variance": (call.variance, None),
    }
    variables = {}
    for name, (tensor, neutral) in held.items():
        if tensor is None:
            continue
        place = place_of.get(_variable(tensor))
        if place is not None:
            variables[name] = place
            continue
        constant = tf.get_static_value(tensor)
        if neutral is None or constant is None or not np.all(constant == neutral):
            return None
    shape = call.entered.shape
    if shape.rank is None or len(variables) < 2:
        return None
    dtype = call.entered.dtype
    policy = f"mixed_{dtype.name}" if dtype in (tf.float16, tf.bfloat16) else dtype.name
    return Layer(call.axis, float(call.epsilon), policy, shape.as_list(), variables)


def _require_all(version, graph, layers, calls):
    """Raise `ValueError` if there may be batch norm that was not recognized."""
    places = {place for layer in layers.values() for place in layer.variables.values()}
    objects = _proto(version).object_graph_def
    named = {
        node: path
        for node, path in _places(objects.nodes).items()
        if objects.nodes[node].variable.name.endswith(_STATISTICS)
    }
    bound = {
        node for function in objects.concrete_functions.values() for node in function.bound_inputs
    }
    for node, path in named.items():
        if node in bound and path not in places:
            name = objects.nodes[node].variable.name
            raise _not(version, f"a variable {name!r} of no batch norm layer that was recognized")
    left = {call.left for call in calls}
    for op in graph.get_operations():
        if op.type in _FUSED and op.outputs[0].name not in left:
            raise _not(version, f"an operation {op.name!r} whose statistics are of no variables")
    if not layers:
        raise _not(version, "no batch norm layer that was recognized")


def _require_alone(version, graph, found):
    """Raise `ValueError` if something else than batch norm reads a statistic."""
    known = {name for call in found for t in (call.mean, call.variance) for name in _readers(t)}
    statistics = {_variable(t) for call in found for t in (call.mean, call.variance)}
    for op in graph.get_operations():
        if any(tensor.name in statistics for tensor in op.inputs) and op.name not in known:
            raise _not(version, f"an operation {op.name!r} that reads a statistic for itself")


def _readers(tensor):
    """The names of the operations by which a tensor reads a variable."""
    while tensor.op.type in _READS:
        yield tensor.op.name
        tensor = tensor.op.inputs[0]


def described(loaded: Any) -> dict[str, Any]:
    """The provenance of such a SavedModel, as far as there is any."""
    signature = loaded.signatures[_SIGNATURE]
    return {
        "tfbn": None,
        "keras": None,
        "tensorflow": loaded.tensorflow_version,
        "stale": "they are those of a model that tfbn did not export",
        "folded": False,
        "max_abs_difference": 0.0,
        "inputs": sorted(signature.structured_input_signature[1]),
        "outputs": sorted(signature.structured_outputs),
        "statistics": None,
    }
