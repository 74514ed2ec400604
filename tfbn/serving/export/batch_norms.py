"""Store the batch norm layers of a served graph in a file.

A SavedModel is a graph without layers. The record has the names of the tensors that enter and leave
each call of a batch norm layer, and the paths of its variables. With it the graph can be executed
with these calls replaced, as a sweep requires (`tfbn.serving.recalibrate.loading`). The graph does
not change.
"""

import json
import pathlib
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.serving import versions

FILE = "assets.extra/tfbn_batch_norms.json"

_VARIABLES = ("gamma", "beta", "moving_mean", "moving_variance")


class Call(NamedTuple):
    """One call of a batch norm layer in the graph of an endpoint.

    Attributes:
        path: The path of the layer in the model.
        entered: The name of the tensor that enters; `None` for a call in the body of a loop, branch
            or function, whose tensors cannot be accessed.
        mask: The name of its mask, or `None`.
        left: The name of the tensor that leaves.
    """

    path: str
    entered: str | None
    mask: str | None
    left: str | None


class Layer(NamedTuple):
    """The configuration of a batch norm layer that its sweep requires.

    Attributes:
        axis: The axis of the channels, as in Keras.
        epsilon: The number added to the variance.
        dtype: The name of the dtype policy.
        shape: The shape of the input, with `None` for unknown sizes.
        variables: Attribute of the layer (`moving_mean`, `moving_variance`, and `gamma` and `beta`
            if it has them) -> path of the variable in the SavedModel's tree of objects.
    """

    axis: int
    epsilon: float
    dtype: str
    shape: list[int | None]
    variables: dict[str, str]


class BatchNorms(NamedTuple):
    """The batch norm layers of an endpoint.

    Attributes:
        layers: Path -> layer.
        calls: The calls of the layers, in order.
        function: The name of the endpoint's function in the SavedModel; `None` if the tensors are
            in its flattened default signature.
    """

    layers: dict[str, Layer]
    calls: list[Call]
    function: str | None = "serve"

    def ordered(self, model: keras.Model) -> "BatchNorms":
        """Return a copy with the layers in the order of a model."""
        paths = keras_models.batch_norm_layers(model)
        return self._replace(layers={p: self.layers[p] for p in paths if p in self.layers})


def call_of(path: str, graph: tf.Graph, entered: Any, mask: Any, left: Any) -> Call:
    """Return the record of a call in the graph of an endpoint.

    Args:
        path: The path of the layer.
        graph: The graph of the endpoint.
        entered: The input of the layer.
        mask: The mask of the layer, or `None`.
        left: The output of the layer.
    """
    tensors = [entered, left] if mask is None else [entered, mask, left]
    if any(getattr(tensor, "graph", None) is not graph for tensor in tensors):
        return Call(path, None, None, None)
    return Call(path, entered.name, None if mask is None else mask.name, left.name)


def layer_of(layer: keras.layers.BatchNormalization, model: keras.Model, entered: Any) -> Layer:
    """Return the record of a layer.

    Args:
        layer: A layer of the model.
        model: The model, whose variables `keras.export.ExportArchive` keeps in a list.
        entered: The input of the layer.
    """
    indices = {id(variable): i for i, variable in enumerate(model.variables)}
    variables = {name: getattr(layer, name) for name in _VARIABLES}
    low = layer.compute_dtype != layer.variable_dtype
    return Layer(
        axis=layer.axis,
        epsilon=layer.epsilon,
        dtype=f"mixed_{layer.compute_dtype}" if low else layer.compute_dtype,
        shape=list(entered.shape),
        variables={
            name: f"variables/{indices[id(variable)]}"
            for name, variable in variables.items()
            if variable is not None
        },
    )


def write(version: pathlib.Path, record: BatchNorms) -> None:
    """Write the record into a version that is not yet in place. No layers, no file."""
    if not record.layers:
        return
    file = version / FILE
    file.parent.mkdir(exist_ok=True)
    layers = {path: layer._asdict() for path, layer in record.layers.items()}
    file.write_text(json.dumps({**record._asdict(), "layers": layers}, indent=1))


def read(version: pathlib.Path) -> BatchNorms | None:
    """Return the record of a version, or `None` without one.

    Raises:
        ValueError: If the record is damaged.
    """
    try:
        content = (version / FILE).read_bytes()
    except FileNotFoundError:
        return None
    try:
        entries = json.loads(content)
        layers = {path: Layer(**layer) for path, layer in entries["layers"].items()}
        calls = [Call(*call) for call in entries["calls"]]
        missing = [call.path for call in calls if call.path not in layers]
        if missing or not all(call.left is None or ":" in call.left for call in calls):
            raise ValueError("a call of no layer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise versions.damaged(version / FILE, error) from error
    return BatchNorms(layers, calls, entries["function"])
