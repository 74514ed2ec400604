"""Fold batch norm layers into the layers before them, for inference."""

import collections
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from tfbn.layer import BatchNormalization
from tfbn.models import copying, keras_models

# Class -> axes of the output channels in the layer's last kernel, from the end. Depthwise kernels
# have two: input channel and multiplier, in the order of the channels.
_CHANNELS = {
    layers.Dense: (-1,),
    layers.Conv1D: (-1,),
    layers.Conv2D: (-1,),
    layers.Conv3D: (-1,),
    layers.Conv1DTranspose: (-2,),
    layers.Conv2DTranspose: (-2,),
    layers.Conv3DTranspose: (-2,),
    layers.DepthwiseConv1D: (-2, -1),
    layers.DepthwiseConv2D: (-2, -1),
    layers.SeparableConv1D: (-1,),
    layers.SeparableConv2D: (-1,),
}

# Dtype -> largest |mean| / std. The rounding of the mean, 2**-11 or 2**-8 of it, is then at most
# about 0.01 std.
_LARGEST_RATIO = {"float16": 20.0, "bfloat16": 2.5}

_BATCH_NORMS = (layers.BatchNormalization, BatchNormalization)


def fold(model: keras.Model) -> keras.Model:
    """Return a copy of a model's inference network with its batch norm layers folded.

    In inference batch norm is an affine map per channel, y = scale x + offset with
    scale = gamma / sqrt(variance + epsilon) and offset = beta - mean scale. For x = W v + b from a
    Dense or convolution layer, y = (scale W) v + (scale b + offset) is the same layer with other
    weights (Jacob et al. 2018, section 3.2), computed in float64. A layer is folded like this where
    it is exact: both layers are called once, nothing else uses x, the layer has no activation, and
    channels and precision agree. Elsewhere `keras.layers.Rescaling` with the name of the batch norm
    layer multiplies by scale and adds offset. Half precision would round x scale and offset before
    they cancel, so Rescaling computes in float32 there, and a Dense or convolution layer is folded
    only if the mean, with the layer's bias and without, is at most 20 (float16) or 2.5 (bfloat16)
    standard deviations from zero.

    Nested Functional and Sequential models are folded too. A warning lists the layers that are not
    folded: batch norm in custom layers, wrappers and subclassed models, custom subclasses of batch
    norm, and layers that are called with `training=True` and are not frozen.

    ```python
    folded = tfbn.fold(model)  # predicts the same
    folded.save("folded.keras")
    ```

    Args:
        model: A built Functional or Sequential model. It is not changed.

    Returns:
        A Functional model of stock Keras layers (and the layers that are not folded), with the same
        names, inputs and outputs. It is not compiled. `training=True` does not restore batch
        statistics.

    Raises:
        ValueError: If the model is subclassed, which hides its graph, or not built; or if a custom
            layer in it has state that saving and loading would lose.
    """
    keras_models.refuse_keras_2(model)
    if not _is_graph(model):
        raise ValueError(
            f"Expected a Functional or Sequential model. Received: {model!r}. Fold "
            "keras.Model(x, model.call(x)), x = keras.Input(shape)."
        )
    keras_models.require_built(model)
    plan = _make_plan(model)
    if copying.custom_classes(model):
        # A folded network rounds differently, so a copy without folding is verified.
        copying.verify(model, _rebuild(model, _Plan(plan.graphs, {}, set(), set()), {}))
    folded = _rebuild(model, plan, {})
    remaining = list(keras_models.batch_norm_layers(folded))
    if remaining:
        warnings.warn(
            f"{len(remaining)} batch norm layers of model {model.name!r} cannot be folded "
            f"exactly and stay: {remaining}.",
            stacklevel=2,
        )
    return folded


def _is_graph(layer: keras.Operation) -> bool:
    """Whether a layer is a Functional or Sequential model with Keras's `call`."""
    if not isinstance(layer, (keras.Function, keras.Sequential)):
        return False
    defining = next(cls for cls in type(layer).__mro__ if "call" in vars(cls))
    return defining.__module__.startswith("keras.")


class _Graph(NamedTuple):
    """The calls in a model. A tensor is (operation name, index of its call, index of its output).

    Attributes:
        model: A plain Functional model of the graph.
        calls: Operation name -> input tensors of each call.
        in_training: Names of operations called with `training=True`.
        uses: Tensor -> number of uses.
    """

    model: keras.Model
    calls: dict[str, list[list[tuple]]]
    in_training: set[str]
    uses: collections.Counter[tuple]


class _Plan(NamedTuple):
    """What to do with the layers of a model and its nested models. Keys are ids of operations.

    Attributes:
        graphs: Model -> its graph.
        absorbed: Dense or convolution layer -> batch norm layer to fold into it.
        removed: The batch norm layers in `absorbed`.
        rescaled: The batch norm layers to replace by `Rescaling`.
    """

    graphs: dict[int, _Graph]
    absorbed: dict[int, layers.BatchNormalization]
    removed: set[int]
    rescaled: set[int]


def _make_plan(model: keras.Model) -> _Plan:
    plan = _Plan({}, {}, set(), set())
    _add_graphs(model, plan.graphs)
    calls: collections.Counter[int] = collections.Counter()
    for graph in plan.graphs.values():
        for operation in graph.model.operations:
            calls[id(operation)] += len(graph.calls[operation.name])
    for graph in plan.graphs.values():
        operations = {operation.name: operation for operation in graph.model.operations}
        for name, layer in operations.items():
            if type(layer) not in _BATCH_NORMS:
                continue
            if layer.trainable and name in graph.in_training:
                continue
            source = graph.calls[name][0][0]
            producer = operations[source[0]]
            once = calls[id(layer)] == calls[id(producer)] == graph.uses[source] == 1
            if once and _can_absorb(producer, layer):
                plan.absorbed[id(producer)] = layer
                plan.removed.add(id(layer))
            elif _can_be_rescaled(layer):
                plan.rescaled.add(id(layer))
    return plan


def _add_graphs(model: keras.Model, graphs: dict[int, _Graph]) -> None:
    graph = graphs[id(model)] = _graph(model)
    for operation in graph.model.operations:
        if _is_graph(operation) and id(operation) not in graphs:
            _add_graphs(operation, graphs)


def _graph(model: keras.Model) -> _Graph:
    if isinstance(model, keras.Sequential):
        [inputs], [outputs] = model.inputs, model.outputs
    else:
        inputs, outputs = model.input, model.output
    # The config of a plain Functional model is the only public description of a graph.
    plain = keras.Model(inputs, outputs, name=model.name)
    config = plain.get_config()
    nodes = {layer["name"]: layer["inbound_nodes"] for layer in config["layers"]}
    calls = {name: [_tensors(node) for node in called] for name, called in nodes.items()}
    in_training = {
        name for name, called in nodes.items() if any(n["kwargs"].get("training") for n in called)
    }
    uses = collections.Counter(t for called in calls.values() for node in called for t in node)
    outputs = keras.tree.flatten(config["output_layers"])
    uses.update(zip(outputs[::3], outputs[1::3], outputs[2::3], strict=True))
    return _Graph(plain, calls, in_training, uses)


def _tensors(config: Any) -> list[tuple]:
    """Return the tensors in a part of a config, in order."""
    if isinstance(config, dict):
        if config.get("class_name") == "__keras_tensor__":
            return [tuple(config["config"]["keras_history"])]
        config = config.values()
    elif not isinstance(config, (list, tuple)):
        return []
    return [tensor for part in config for tensor in _tensors(part)]


def _can_absorb(layer: keras.Operation, batch_norm: layers.BatchNormalization) -> bool:
    """Whether a layer can compute the batch norm layer after it, with other weights."""
    if type(layer) not in _CHANNELS or layer.activation is not keras.activations.linear:
        return False
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return False
    rank = len(layer.output.shape)
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    return (
        batch_norm.axis % rank == (1 if channels_first else rank - 1)
        and batch_norm.compute_dtype == layer.compute_dtype
        and _survives_rounding(layer, batch_norm)
    )


def _survives_rounding(layer: keras.Layer, batch_norm: layers.BatchNormalization) -> bool:
    """Whether folding in half precision changes the output by at most about 0.01 std.

    Rounding a kernel moves the mean of its product by up to one unit in the last place, and the
    model rounds product + bias by as much. In single precision both are negligible.
    """
    limit = _LARGEST_RATIO.get(layer.compute_dtype)
    if limit is None:
        return True
    std = np.sqrt(np.float64(batch_norm.moving_variance.numpy()) + batch_norm.epsilon)
    mean = np.float64(batch_norm.moving_mean.numpy())
    product = mean - np.float64(layer.bias.numpy()) if layer.use_bias else mean
    return bool(np.all(np.maximum(np.abs(mean), np.abs(product)) <= limit * std))


def _can_be_rescaled(batch_norm: layers.BatchNormalization) -> bool:
    # With channels-first images, Rescaling interprets a scale of less than three axes as channels.
    return keras.config.image_data_format() == "channels_last" or len(batch_norm.output.shape) > 3


def _rebuild(model: keras.Model, plan: _Plan, copies: dict[int, Any]) -> keras.Model:
    """Copy a model by plan. `copies` maps id -> copy of an operation, for shared layers."""

    def copy(operation: keras.Operation) -> Callable:
        if id(operation) not in copies:
            copies[id(operation)] = _copy(operation, plan, copies)
        return copies[id(operation)]

    graph = plan.graphs[id(model)].model
    rebuilt = copying.rebuild_graph(graph, copy)
    for operation in graph.operations:
        if id(operation) in plan.absorbed:
            weights = _folded_weights(operation, plan.absorbed[id(operation)])
            copies[id(operation)].set_weights(weights)
        elif isinstance(copies.get(id(operation)), layers.Layer) and (
            id(operation) not in plan.graphs and id(operation) not in plan.rescaled
        ):
            copying.copy_state(operation, copies[id(operation)])
    return rebuilt


def _copy(operation: keras.Operation, plan: _Plan, copies: dict[int, Any]) -> Callable:
    if id(operation) in plan.graphs:
        return _rebuild(operation, plan, copies)
    if id(operation) in plan.removed:
        return lambda inputs, **_: inputs
    if id(operation) in plan.rescaled:
        rescaling = _rescaling(operation)
        return lambda inputs, **_: rescaling(inputs)
    if id(operation) in plan.absorbed:
        return type(operation).from_config(operation.get_config() | {"use_bias": True})
    return copying.rebuild(operation)


def _affine(batch_norm: layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """Return scale = gamma / sqrt(variance + epsilon), offset = beta - mean scale, in float64."""
    scale = 1 / np.sqrt(np.float64(batch_norm.moving_variance.numpy()) + batch_norm.epsilon)
    if batch_norm.scale:
        scale = scale * batch_norm.gamma.numpy()
    offset = -batch_norm.moving_mean.numpy() * scale
    if batch_norm.center:
        offset = offset + batch_norm.beta.numpy()
    return scale, offset


def _folded_weights(layer: keras.Layer, batch_norm: layers.BatchNormalization) -> list[np.ndarray]:
    """Return the weights of a layer, and a bias, with the batch norm layer after it folded in."""
    scale, offset = _affine(batch_norm)
    weights = layer.get_weights()
    bias = weights.pop().astype(np.float64) if layer.use_bias else 0.0
    kernel = weights.pop().astype(np.float64)
    shape = [1] * kernel.ndim
    for axis in _CHANNELS[type(layer)]:
        shape[axis] = kernel.shape[axis]
    return [*weights, kernel * scale.reshape(shape), bias * scale + offset]


def _rescaling(batch_norm: layers.BatchNormalization) -> Callable:
    """Return a function on Keras tensors that computes the batch norm layer in inference."""
    shape = [1] * len(batch_norm.output.shape)
    shape[batch_norm.axis] = -1
    scale, offset = (v.reshape(shape[1:]) for v in _affine(batch_norm))
    name, policy = batch_norm.name, batch_norm.dtype_policy
    if batch_norm.compute_dtype not in _LARGEST_RATIO:
        scale, offset = (v.astype(batch_norm.variable_dtype) for v in (scale, offset))
        return layers.Rescaling(scale, offset, name=name, dtype=policy)
    scale, offset = scale.astype("float32"), offset.astype("float32")
    rescaling = layers.Rescaling(scale, offset, name=name, dtype="float32")
    # Identity layers cast like the batch norm layer, before and after.
    before = layers.Identity(name=f"{name}_input", dtype=policy)
    after = layers.Identity(name=f"{name}_output", dtype=policy)

    def rescaled(x):
        is_wide = x.dtype in ("float32", "float64")
        return after(rescaling(before(x) if is_wide else x))

    return rescaled
