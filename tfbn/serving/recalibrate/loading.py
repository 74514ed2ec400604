"""A network that is served, from its SavedModel alone, as a Keras model that can be swept.

The graph of the endpoint is run piece by piece: the part before the first call of a batch norm
layer, the call itself by a layer of tfbn, the part up to the second call, and so on. To Keras it
is a model with these layers, in which everything else is its own code.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn.graphs.flattening import flattened
from tfbn.graphs.subgraphs import Subgraphs
from tfbn.layer import BatchNormalization
from tfbn.models.keras_models import Structure
from tfbn.serving import saved_models
from tfbn.serving.export import signature
from tfbn.serving.export.batch_norms import BatchNorms
from tfbn.serving.recalibrate import weights


class ServedNetwork(keras.Model):
    """The network of an endpoint, with batch norm layers that can be observed and assigned to.

    It takes the inputs of the endpoint, for several inputs as a dict by the endpoint's names or in
    the structure of the endpoint's arguments, and it is called in graphs only.

    Args:
        function: The concrete function of the endpoint.
        owner: The SavedModel, which holds the variables that the function reads.
        found: Its batch norm layers.
        variables: By layer and name the values of the layers' variables.
        specs: The endpoint's inputs, `tf.TensorSpec` with the names that clients use, in the order
            of its arguments.
        outputs: The names of its outputs, in the order of the graph's.
        name: The name of the model.
    """

    def __init__(
        self,
        function: Any,
        owner: Any,
        found: BatchNorms,
        variables: Mapping,
        specs: Sequence[tf.TensorSpec],
        outputs: Iterable[str],
        name: str,
    ):
        # The graph takes the dtypes that it takes.
        super().__init__(name=re.sub(r"\W", "_", name) or "served", autocast=False)
        self._owner = _Plain(owner)
        arguments = len(specs)
        names = [tensor.name for tensor in function.inputs]
        captured = zip(names[arguments:], function.captured_inputs, strict=True)
        self._served = Subgraphs(function.graph, dict(captured))
        self._entered = tuple(names[:arguments])
        self._left = tuple(tensor.name for tensor in function.outputs)
        self._ordered = found.function is not None
        self._calls = tuple(found.calls)
        self._specs = tuple(specs)
        self._output_names = tuple(outputs)
        self.inputs = [
            keras.KerasTensor(tuple(spec.shape), spec.dtype.name, name=spec.name) for spec in specs
        ]
        made = {}
        self.inner: list = []
        for path, layer in found.layers.items():
            made[path] = _layer(path, layer, variables[path])
            _add(self, path.split("/"), made[path])
        self._by_path = _Plain(made)
        self.built = True

    @property
    def input(self) -> Structure:
        """The inputs in the structure that data has: the only one, or all by name."""
        by_name = {tensor.name: tensor for tensor in self.inputs}
        return self.inputs[0] if len(self.inputs) == 1 else by_name

    def call(self, *args: Structure, training: bool | None = None) -> dict[str, tf.Tensor]:
        """The outputs by name."""
        named = self.by_name(*args)
        values = dict(zip(self._entered, named.values(), strict=True))
        for made in self._calls:
            layer = self._by_path.value[made.path]
            entered = [name for name in (made.entered, made.mask) if name is not None]
            x, *mask = self._served.tensors(entered, values)
            left = layer(x, mask=mask[0] if mask else None, training=training)
            values[made.left] = left
        outputs = self._served.tensors(list(self._left), values)
        return dict(zip(self._output_names, outputs, strict=True))

    def missing(self) -> list[str]:
        """Return the recorded names that no tensor of the graph has."""
        names = (name for call in self._calls for name in call[1:] if name is not None)
        return self._served.missing(list(names))

    def by_name(self, *args: Structure) -> dict[str, tf.Tensor]:
        """Inputs by the names that clients use, in the dtypes that the endpoint takes."""
        names = [str(spec.name) for spec in self._specs]
        if len(args) == 1 and isinstance(args[0], dict) and set(args[0]) == set(names):
            flat = [args[0][name] for name in names]
        else:
            # Other tools record no order of the inputs.
            flat = keras.tree.flatten(args) if self._ordered or len(names) == 1 else []
        fitting = len(flat) == len(names) and all(
            spec.shape.is_compatible_with(value.shape)
            and (spec.dtype == tf.string) == (value.dtype == tf.string)
            for value, spec in zip(flat, self._specs, strict=True)
        )
        if not fitting:
            wanted = {spec.name: f"{spec.dtype.name}{spec.shape}" for spec in self._specs}
            raise ValueError(
                f"Expected data for the inputs {wanted} of the served model, for several as a dict "
                f"by these names. Received: {keras.tree.map_structure(_in_words, args)}."
            )
        return {
            spec.name: value if value.dtype == spec.dtype else tf.cast(value, spec.dtype)
            for value, spec in zip(flat, self._specs, strict=True)
        }


def _in_words(value):
    return f"{value.dtype.name}{value.shape}"


class _Plain:
    """A value that Keras does not look into."""

    def __init__(self, value):
        self.value = value


class _Group(keras.layers.Layer):
    """A part of the model's own tree of layers: with it a layer has the path that it had there."""

    def __init__(self, name):
        super().__init__(name=name)
        self.inner = []
        self.built = True  # Nobody calls it.


def _add(parent, path, layer):
    """Add a layer at a path of names, in which `bn#2` is the second child of the name `bn`."""
    name, *rest = path
    name, _, number = name.partition("#")
    same = [child for child in parent.inner if child.name == name]
    # The others may have no batch norm in them, and are not here.
    while len(same) < int(number or 1) - 1 or (rest and len(same) < int(number or 1)):
        same.append(_Group(name))
        parent.inner.append(same[-1])
    if rest:
        _add(same[int(number or 1) - 1], rest, layer)
    else:
        parent.inner.append(layer)


def _layer(path, found, variables):
    layer = BatchNormalization(
        axis=found.axis,
        epsilon=found.epsilon,
        center="beta" in variables,
        scale="gamma" in variables,
        dtype=found.dtype,
        name=path.rpartition("/")[2].partition("#")[0],
    )
    shape = list(found.shape)
    shape[found.axis] = len(variables["moving_mean"])
    layer.build(shape)
    for name, value in variables.items():
        getattr(layer, name).assign(value)
    return layer


def load(version: pathlib.Path, loaded: Any, found: BatchNorms, flat: Any = None) -> ServedNetwork:
    """The network of a version.

    Args:
        version: Its directory.
        loaded: The SavedModel, as `tf.saved_model.load` gives it.
        found: The record of its batch norm layers.
        flat: The flattened default signature, if there is one already.

    Raises:
        ValueError: If a layer is called where the graph does not let it be observed, or if the
            record is not one of this graph.
    """
    hidden = [call.path for call in found.calls if call.entered is None]
    if hidden:
        raise ValueError(
            "Expected batch norm layers outside of loops, branches and functions of their own. "
            f"Received: {str(version)!r}, whose layer {hidden[0]!r} is in one, where a graph does "
            "not let it be observed. Recalibrate the model itself, and export it again."
        )
    if found.function is None:
        function = flat or flattened(loaded.signatures[saved_models.DEFAULT])
    else:
        [function] = getattr(loaded, found.function).concrete_functions
    specs = tf.nest.flatten(function.structured_input_signature)
    outputs = list(signature.named_outputs(function.structured_outputs))
    if isinstance(function.structured_outputs, Mapping):  # TensorFlow flattens these sorted.
        outputs.sort()
    places = [place for layer in found.layers.values() for place in layer.variables.values()]
    values = dict(zip(places, weights.read(version, places), strict=True))
    variables = {
        # Other tools keep axes of size 1 for broadcasting.
        path: {name: values[place].reshape(-1) for name, place in layer.variables.items()}
        for path, layer in found.layers.items()
    }
    network = ServedNetwork(function, loaded, found, variables, specs, outputs, version.parent.name)
    if strange := network.missing():
        raise ValueError(
            f"Expected a SavedModel as tfbn.export wrote it. Received: {str(version)!r}, whose "
            f"graph has no tensor {strange[0]!r}. Export the model again."
        )
    return network
