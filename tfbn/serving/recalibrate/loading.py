"""Convert a SavedModel to a Keras model that can be swept.

The graph of the endpoint is executed in parts: the operations before the first call of a batch norm
layer, the call by a `tfbn.BatchNormalization`, the operations up to the second call, and so on. For
Keras it is a subclassed model with these layers.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.graphs.flattening import flattened
from tfbn.graphs.subgraphs import Subgraphs
from tfbn.layer import BatchNormalization
from tfbn.models.keras_models import Structure
from tfbn.serving import saved_models, versions
from tfbn.serving.export import signature
from tfbn.serving.export.batch_norms import BatchNorms, Layer
from tfbn.serving.recalibrate import weights


class ServedNetwork(keras.Model):
    """The network of an endpoint as a Keras model with batch norm layers.

    The inputs are the endpoint's: a dict by its names, or the structure of its arguments. The model
    can only be called in graphs.

    Args:
        function: The concrete function of the endpoint.
        owner: The SavedModel, which holds the variables that the function reads.
        record: The batch norm layers of the endpoint.
        variables: Path of a layer -> name of a variable -> value.
        specs: The endpoint's inputs, `tf.TensorSpec` with the names that clients use, in the order
            of its arguments.
        outputs: The names of the outputs, in the order of the graph's outputs.
        name: The name of the model.
    """

    def __init__(
        self,
        function: Any,
        owner: Any,
        record: BatchNorms,
        variables: Mapping[str, Mapping[str, np.ndarray]],
        specs: Sequence[tf.TensorSpec],
        outputs: Iterable[str],
        name: str,
    ):
        # The dtypes of the graph are fixed.
        super().__init__(name=re.sub(r"\W", "_", name) or "served", autocast=False)
        self._owner = _Plain(owner)
        arguments = len(specs)
        names = [tensor.name for tensor in function.inputs]
        captured = zip(names[arguments:], function.captured_inputs, strict=True)
        self._served = Subgraphs(function.graph, dict(captured))
        self._entered = tuple(names[:arguments])
        self._left = tuple(tensor.name for tensor in function.outputs)
        self._ordered = record.function is not None
        self._calls = tuple(record.calls)
        self._specs = tuple(specs)
        self._output_names = tuple(outputs)
        self.inputs = [
            keras.KerasTensor(tuple(spec.shape), spec.dtype.name, name=spec.name) for spec in specs
        ]
        layers = {}
        self.inner: list[keras.layers.Layer] = []
        for path, layer in record.layers.items():
            layers[path] = _layer(path, layer, variables[path])
            _add(self, path.split("/"), layers[path])
        self._by_path = _Plain(layers)
        self.built = True

    @property
    def input(self) -> Structure:
        """The inputs in the structure of data: the only input, or name -> input."""
        by_name = {tensor.name: tensor for tensor in self.inputs}
        return self.inputs[0] if len(self.inputs) == 1 else by_name

    def call(self, *args: Structure, training: bool | None = None) -> dict[str, tf.Tensor]:
        """Return the outputs, name -> tensor."""
        named = self.by_name(*args)
        values = dict(zip(self._entered, named.values(), strict=True))
        for call in self._calls:
            layer = self._by_path.value[call.path]
            entered = [name for name in (call.entered, call.mask) if name is not None]
            x, *mask = self._served.tensors(entered, values)
            left = layer(x, mask=mask[0] if mask else None, training=training)
            values[call.left] = left
        outputs = self._served.tensors(list(self._left), values)
        return dict(zip(self._output_names, outputs, strict=True))

    def missing(self) -> list[str]:
        """Return the recorded names without a tensor in the graph."""
        names = (name for call in self._calls for name in call[1:] if name is not None)
        return self._served.missing(list(names))

    def by_name(self, *args: Structure) -> dict[str, tf.Tensor]:
        """Return the inputs, name -> tensor, cast to the dtypes of the endpoint.

        Raises:
            ValueError: If structure, shapes or dtypes do not fit.
        """
        names = [str(spec.name) for spec in self._specs]
        if len(args) == 1 and isinstance(args[0], dict) and set(args[0]) == set(names):
            flat = [args[0][name] for name in names]
        else:
            # Other tools do not store the order of the inputs.
            flat = keras.tree.flatten(args) if self._ordered or len(names) == 1 else []
        fitting = len(flat) == len(names) and all(
            spec.shape.is_compatible_with(value.shape)
            and (spec.dtype == tf.string) == (value.dtype == tf.string)
            for value, spec in zip(flat, self._specs, strict=True)
        )
        if not fitting:
            wanted = {spec.name: f"{spec.dtype.name}{spec.shape}" for spec in self._specs}
            raise ValueError(
                f"Expected data for the inputs {wanted}, several as a dict. Received: "
                f"{keras.tree.map_structure(_in_words, args)}."
            )
        return {
            spec.name: value if value.dtype == spec.dtype else tf.cast(value, spec.dtype)
            for value, spec in zip(flat, self._specs, strict=True)
        }


def _in_words(value: tf.Tensor) -> str:
    return f"{value.dtype.name}{value.shape}"


class _Plain:
    """Hide a value from Keras's tracking of attributes."""

    def __init__(self, value: Any):
        self.value = value


class _Group(keras.layers.Layer):
    """A parent in the tree of layers, which gives a layer the path that it has in its model."""

    def __init__(self, name: str):
        super().__init__(name=name)
        self.inner: list[keras.layers.Layer] = []
        self.built = True  # It is never called.


def _add(parent: Any, path: Sequence[str], layer: keras.layers.Layer) -> None:
    """Add a layer at a path of names, where `bn#2` is the second child with the name `bn`."""
    name, *rest = path
    name, _, number = name.partition("#")
    same = [child for child in parent.inner if child.name == name]
    # Siblings without batch norm are not in the record.
    while len(same) < int(number or 1) - 1 or (rest and len(same) < int(number or 1)):
        same.append(_Group(name))
        parent.inner.append(same[-1])
    if rest:
        _add(same[int(number or 1) - 1], rest, layer)
    else:
        parent.inner.append(layer)


def _layer(path: str, record: Layer, variables: Mapping[str, np.ndarray]) -> BatchNormalization:
    layer = BatchNormalization(
        axis=record.axis,
        epsilon=record.epsilon,
        center="beta" in variables,
        scale="gamma" in variables,
        dtype=record.dtype,
        name=path.rpartition("/")[2].partition("#")[0],
    )
    shape = list(record.shape)
    shape[record.axis] = len(variables["moving_mean"])
    layer.build(shape)
    for name, value in variables.items():
        getattr(layer, name).assign(value)
    return layer


def load(version: pathlib.Path, loaded: Any, record: BatchNorms, flat: Any = None) -> ServedNetwork:
    """Load the network of a version.

    Args:
        version: The directory of the version.
        loaded: The SavedModel, as `tf.saved_model.load` returns it.
        record: The record of its batch norm layers.
        flat: The flattened default signature, if it exists already.

    Raises:
        ValueError: If a layer is called in a loop, branch or function, or if the record does not
            match the graph.
    """
    hidden = [call.path for call in record.calls if call.entered is None]
    if hidden:
        raise ValueError(
            f"Layer {hidden[0]!r} of '{version}' is in a loop or branch. Recalibrate the model."
        )
    if record.function is None:
        function = flat or flattened(loaded.signatures[saved_models.DEFAULT])
    else:
        [function] = getattr(loaded, record.function).concrete_functions
    specs = tf.nest.flatten(function.structured_input_signature)
    outputs = list(signature.named_outputs(function.structured_outputs))
    if isinstance(function.structured_outputs, Mapping):  # TensorFlow flattens these sorted.
        outputs.sort()
    paths = [path for layer in record.layers.values() for path in layer.variables.values()]
    values = dict(zip(paths, weights.read(version, paths), strict=True))
    variables = {
        # Variables of other tools may have axes of size 1 for broadcasting.
        path: {name: values[variable].reshape(-1) for name, variable in layer.variables.items()}
        for path, layer in record.layers.items()
    }
    name = version.parent.name
    network = ServedNetwork(function, loaded, record, variables, specs, outputs, name)
    if missing := network.missing():
        raise versions.damaged(version, f"it has no tensor {missing[0]!r}")
    return network
