"""The record of the batch norm layers in a served graph: written beside it at export, read again.

A SavedModel is a graph without layers. With the names of the tensors that enter and leave each
call of a batch norm layer, and the places of its variables, the graph can be run with these calls
replaced, which a sweep needs (`tfbn.serving.recalibrate.loading`). Nothing is added to the graph.
"""

import json
import pathlib
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.models import keras_models

FILE = "assets.extra/tfbn_batch_norms.json"

_VARIABLES = ("gamma", "beta", "moving_mean", "moving_variance")


class Call(NamedTuple):
    """One call of a batch norm layer in the graph of an endpoint.

    Attributes:
        path: The path of the layer in the model.
        entered: The name of the tensor that enters; `None` for a call in the body of a loop, of a
            branch or of another function, into which the graph does not let anybody see.
        mask: The name of its mask, or `None`.
        left: The name of the tensor that leaves.
    """

    path: str
    entered: str | None
    mask: str | None
    left: str | None


class Layer(NamedTuple):
    """A batch norm layer, as far as its sweep needs to know it.

    Attributes:
        axis: As Keras has it.
        epsilon: As Keras has it.
        dtype: The name of its dtype policy.
        shape: The shape of the input, `None` for sizes that are not known.
        variables: By attribute of the layer (`gamma`, if it has one, and so on) the path of the
            variable in the SavedModel's tree of objects.
    """

    axis: int
    epsilon: float
    dtype: str
    shape: list[int | None]
    variables: dict[str, str]


class BatchNorms(NamedTuple):
    """The batch norm layers of an endpoint.

    Attributes:
        layers: The layers, by path.
        calls: Their calls, in order.
        function: The name of the endpoint's function in the SavedModel; `None` if the names are
            those of tensors in its flattened default signature.
    """

    layers: dict[str, Layer]
    calls: list[Call]
    function: str | None = "serve"

    def ordered(self, model: keras.Model) -> "BatchNorms":
        """The same, with the layers in the order in which a model holds them."""
        paths = keras_models.batch_norm_layers(model)
        return self._replace(layers={p: self.layers[p] for p in paths if p in self.layers})


def call_of(path: str, graph: tf.Graph, entered: Any, mask: Any, left: Any) -> Call:
    """The record of a call in the graph of an endpoint.

    Args:
        path: The path of the layer.
        graph: The endpoint's own graph.
        entered: The input of the layer.
        mask: Its mask, or `None`.
        left: Its output.
    """
    tensors = [entered, left] if mask is None else [entered, mask, left]
    if any(getattr(tensor, "graph", None) is not graph for tensor in tensors):
        return Call(path, None, None, None)
    return Call(path, entered.name, None if mask is None else mask.name, left.name)


def layer_of(layer: keras.layers.BatchNormalization, model: keras.Model, entered: Any) -> Layer:
    """The record of a layer.

    Args:
        layer: A layer of the model.
        model: The model, whose variables `keras.export.ExportArchive` keeps in a list.
        entered: The input of the layer.
    """
    places = {id(variable): place for place, variable in enumerate(model.variables)}
    held = {name: getattr(layer, name) for name in _VARIABLES}
    low = layer.compute_dtype != layer.variable_dtype
    return Layer(
        axis=layer.axis,
        epsilon=layer.epsilon,
        dtype=f"mixed_{layer.compute_dtype}" if low else layer.compute_dtype,
        shape=list(entered.shape),
        variables={
            name: f"variables/{places[id(variable)]}"
            for name, variable in held.items()
            if variable is not None
        },
    )


def write(version: pathlib.Path, found: BatchNorms) -> None:
    """Write the record into a version that is not yet in place; nothing without any layers."""
    if not found.layers:
        return
    file = version / FILE
    file.parent.mkdir(exist_ok=True)
    layers = {path: layer._asdict() for path, layer in found.layers.items()}
    file.write_text(json.dumps({**found._asdict(), "layers": layers}, indent=1))


def read(version: pathlib.Path) -> BatchNorms | None:
    """The record that lies beside a version, or `None` if there is none.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        content = (version / FILE).read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = json.loads(content)
        layers = {path: Layer(**layer) for path, layer in found["layers"].items()}
        calls = [Call(*call) for call in found["calls"]]
        missing = [call.path for call in calls if call.path not in layers]
        if missing or not all(call.left is None or ":" in call.left for call in calls):
            raise ValueError("a call of no layer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "Expected the record of batch norm layers that tfbn.export wrote. Received: "
            f"{str(version / FILE)!r}, which is damaged ({type(error).__name__}: {error}). Export "
            "the model again."
        ) from error
    return BatchNorms(layers, calls, found["function"])
