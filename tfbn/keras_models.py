"""What tfbn needs to know of a Keras model: its batch norm layers and its weights."""

import hashlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

_STATISTICS = (
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
)


class Site(NamedTuple):
    """One call of one batch norm layer.

    A layer that a model calls twice has two sites: in training mode each call normalises
    with its own statistics.

    Attributes:
        path: The path of the layer.
        call: Which of its calls in one run of the model, from 0.
    """

    path: str
    call: int


def batch_norm_layers(model):
    """Every `keras.layers.BatchNormalization` (or subclass) in a model, by path.

    The path joins the names of the layers on the way from the model, whose own name is
    left out. Siblings of the same name are told apart by `#2`, `#3` in their order, so
    paths never collide. A layer that is shared has the first of its paths.

    Returns:
        A dict from path to layer, in the order in which the model holds them.
    """
    return {
        path: layer
        for path, layer in layers(model).items()
        if isinstance(layer, keras.layers.BatchNormalization)
    }


def layers(model):
    """Every layer in a model, by path; outer layers before those inside them."""
    found = {}
    seen = set()

    def visit(layer, path):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        found[path] = layer
        names = {}
        # Keras has no public list of a layer's direct sublayers that also covers custom
        # layers and wrappers; `Model.layers` knows only a model's own.
        for child in layer._layers:
            name = child.name
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name}#{names[name]}"
            visit(child, f"{path}/{name}" if path else name)

    # A model's own path is empty, unless it is itself the one layer of interest.
    is_batch_norm = isinstance(model, keras.layers.BatchNormalization)
    visit(model, model.name if is_batch_norm else "")
    return found


def input_specs(model):
    """What a model takes, as far as Keras knows: for each argument the specs of a batch.

    Returns:
        A list of structures of `tf.TensorSpec` with a batch axis of any size, or `None` for
        a subclassed model of which Keras has recorded nothing.
    """
    if isinstance(model, keras.Sequential):
        return [_any_batch(tensor) for tensor in model.inputs]
    if getattr(model, "inputs", None):  # Functional: one argument, in the structure of its inputs.
        return [keras.tree.map_structure(_any_batch, model.input)]
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        return None

    def spec(shape):
        return tf.TensorSpec((None, *shape[1:]), model.input_dtype)

    return [keras.tree.map_shape_structure(spec, shape)]


def _any_batch(tensor):
    return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)


def statistics(layer):
    """The variables that hold a batch norm layer's statistics, by attribute name.

    `moving_mean` and `moving_variance`, and with `renorm=True` also `moving_stddev`,
    `renorm_mean` and `renorm_stddev`.
    """
    found = {name: getattr(layer, name, None) for name in _STATISTICS}
    return {name: variable for name, variable in found.items() if variable is not None}


def on_replicas(model, variables):
    """The values of some variables of a model on every replica: (TensorFlow variable, value).

    Under a distribution strategy each replica has moving averages of its own.
    """
    return [
        (local, local.numpy().copy())
        for variable in variables
        for local in model.distribute_strategy.experimental_local_results(variable.value)
    ]


def all_statistics(model):
    """The variables that hold the statistics of all batch norm layers of a model, in order."""
    return [
        variable
        for layer in batch_norm_layers(model).values()
        for variable in statistics(layer).values()
    ]


def fingerprint(model):
    """SHA-256 over the weights that population statistics depend on, as a hex string.

    These are all floating-point weights but the statistics of the batch norm layers
    themselves. Whether a weight is trainable does not matter, so freezing a model does
    not change its fingerprint; counters and random seeds do not either.
    """
    digest = hashlib.sha256()
    seen = set(map(id, all_statistics(model)))
    # Innermost layers first, so that each weight is met in the one layer that owns it:
    # the order of `weights` within an outer layer changes when layers are frozen.
    for layer in reversed(layers(model).values()):
        own = [v for v in layer.weights if id(v) not in seen]
        for variable in sorted(own, key=lambda v: v.name):
            seen.add(id(variable))
            if keras.backend.is_float_dtype(variable.dtype):
                value = tf.convert_to_tensor(variable).numpy()
                digest.update(f"{value.shape} {variable.dtype};".encode())
                digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return digest.hexdigest()
