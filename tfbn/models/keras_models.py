"""Access the layers of a Keras model and their variables."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# A tensor, its spec, or a nested list, tuple or dict of them.
Structure = Any

_STATISTICS = (
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
)


def batch_norm_layers(model: keras.Layer) -> dict[str, keras.layers.BatchNormalization]:
    """Return path -> layer for every `keras.layers.BatchNormalization` or subclass in a model.

    The path joins the names of the layers from below the model down to the layer. `#2`, `#3`
    distinguish siblings of the same name, so paths are unique. A shared layer has the first of its
    paths. The order is the model's.
    """
    return {
        path: layer
        for path, layer in layers(model).items()
        if isinstance(layer, keras.layers.BatchNormalization)
    }


def layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return path -> layer for every layer in a model, outer layers first."""
    refuse_keras_2(model)
    by_path = {}
    seen = set()

    def visit(layer: keras.Layer, path: str) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        by_path[path] = layer
        names: dict[str, int] = {}
        for child in _children(layer):
            name = child.name
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name}#{names[name]}"
            visit(child, f"{path}/{name}" if path else name)

    # The model has an empty path, unless it is a batch norm layer.
    is_batch_norm = isinstance(model, keras.layers.BatchNormalization)
    visit(model, model.name if is_batch_norm else "")
    return by_path


def _children(layer: keras.Layer) -> Sequence[keras.Layer]:
    # Private. No public list covers the sublayers of custom layers and wrappers; `Model.layers`
    # covers models only.
    return layer._layers


def refuse_keras_2(model: Any) -> None:
    """Raise `ValueError` for a model or layer of `tf_keras`, which is Keras 2."""
    # Compares the name of the module, because tf_keras may not be installed.
    if any(cls.__module__.partition(".")[0] == "tf_keras" for cls in type(model).__mro__):
        name = getattr(model, "name", type(model).__name__)
        raise ValueError(
            f"Expected a model of Keras 3. Received: {name!r} of tf_keras. Save it as .h5 and use "
            "keras.models.load_model(path, compile=False)."
        )


def require_built(model: Any, layers: Iterable[keras.Layer] = ()) -> None:
    """Raise `ValueError` unless `model` is a built Keras model and all `layers` are built."""
    refuse_keras_2(model)
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {model!r}.")
    if not _is_built(model) or not all(layer.built for layer in layers):
        raise ValueError(
            f"Expected a built model. Received: {model.name!r} without weights. Call it on a batch."
        )


def has_weights(model: keras.Model) -> bool:
    """Whether a model and all its batch norm layers are built."""
    return _is_built(model) and all(layer.built for layer in batch_norm_layers(model).values())


def _is_built(layer: keras.Layer) -> bool:
    """Whether a layer is built, or is a container of built layers.

    In Keras, a container is not built before its first call. A built model may have layers without
    weights that it never calls.
    """
    if layer.built or type(layer).build is not keras.Model.build:
        return layer.built
    inner = _children(layer)
    return bool(inner) and all(map(_is_built, inner))


def input_specs(model: keras.Model) -> list[Structure] | None:
    """Return the specs of a batch for each argument of a model.

    Returns:
        A list of structures of `tf.TensorSpec` with a batch axis of any size, or `None` for
        a subclassed model without a recorded input shape.
    """
    if isinstance(model, keras.Sequential):
        return [_any_batch(tensor) for tensor in model.inputs]
    if getattr(model, "inputs", None):  # Functional: one argument.
        return [keras.tree.map_structure(_any_batch, model.input)]
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        return None

    def spec(shape: Sequence[int | None] | None) -> tf.TensorSpec | None:
        return None if shape is None else tf.TensorSpec((None, *shape[1:]), model.input_dtype)

    specs = keras.tree.map_shape_structure(spec, shape)
    # The shape of an optional input that was `None` is unknown.
    return None if None in keras.tree.flatten(specs) else [specs]


def _any_batch(tensor: keras.KerasTensor) -> tf.TensorSpec:
    return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)


def inputs_of(element: Structure) -> Structure:
    """Return the inputs of a batch, without targets and sample weights."""
    return keras.utils.unpack_x_y_sample_weight(element)[0]


def statistics(layer: keras.layers.BatchNormalization) -> dict[str, keras.Variable]:
    """Return attribute -> variable for the statistics of a batch norm layer.

    These are `moving_mean` and `moving_variance`, and with `renorm=True` also `moving_stddev`,
    `renorm_mean` and `renorm_stddev`.
    """
    variables = {name: getattr(layer, name, None) for name in _STATISTICS}
    return {name: variable for name, variable in variables.items() if variable is not None}


def always_passes_training_on(model: keras.Model) -> bool:
    """Whether every layer certainly receives the model's `training` argument.

    True if all code is Keras's or tfbn's, and no call in a Functional model sets `training`.
    Otherwise a trace in training mode is required.
    """
    for layer in layers(model).values():
        if type(layer).call.__module__.partition(".")[0] not in ("keras", "tfbn"):
            return False
        if isinstance(layer, keras.Function):
            for operation in layer.operations:
                # Private. No public attribute has the arguments of a Functional model's calls.
                for node in operation._inbound_nodes:
                    if node.arguments.kwargs.get("training") is not None:
                        return False
    return True


def trace_key(model: keras.Model) -> tuple:
    """Return a key, to compare with `==`, of everything that a trace of a model depends on.

    It has the path, class, `call`, dtype policy, flags, variables and plain attributes (epsilon,
    axis, activation) of every layer, and weak references. Values of weights, training, prediction
    and `compile` do not change it.
    """
    return tuple((path, *_layer_key(layer)) for path, layer in layers(model).items())


def _layer_key(layer: keras.Layer) -> tuple:
    # Keras's layers have caches under private names, such as the dropout mask of an RNN cell.
    stock = type(layer).__module__.partition(".")[0] == "keras"
    ignored = _bookkeeping()
    attributes = [
        (name, _comparable(value))
        for name, value in vars(layer).items()
        if not (stock and name[0] == "_")
        and name not in ignored
        and not isinstance(value, keras.Layer)
    ]
    return (
        WeakIdentity(layer),
        type(layer),
        getattr(type(layer).call, "__wrapped__", type(layer).call),
        layer.trainable,
        str(layer.dtype_policy.get_config()) if layer.dtype_policy else "",
        tuple(map(WeakIdentity, layer.variables)),
        tuple(attributes),
    )


class WeakIdentity:
    """A weak reference to an object, equal to others while that object is alive."""

    def __init__(self, value: object):
        self._reference = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return isinstance(other, WeakIdentity) and value is not None and value is other._reference()

    __hash__ = None  # type: ignore[assignment]


def _comparable(value: object) -> object:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return tuple((str(key), _comparable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    try:
        return WeakIdentity(value)
    except TypeError:  # A built-in type without weak references.
        return type(value)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """Return the attributes that Keras manages in any layer or model."""
    layer, model = keras.Layer(), keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    managed = {*vars(layer), *(vars(model)), *vars(keras.Model())}
    # Created by `fit`, `evaluate` and `predict`; `evaluate` by `callbacks.fit_guard`.
    later = {"history", "stop_training", "stop_evaluating", "stop_predicting", "optimizer"}
    return frozenset(managed | later | {"_eval_epoch_iterator", "evaluate"})


class Snapshot:
    """Store the values of some variables of a model, on every replica, to restore them.

    Under a distribution strategy the moving averages differ between replicas.

    Args:
        model: A built model.
        variables: Some of its variables.
    """

    def __init__(self, model: keras.Model, variables: Iterable[keras.Variable]):
        strategy = model.distribute_strategy
        self._values = [
            (local, local.numpy().copy())
            for variable in variables
            for local in strategy.experimental_local_results(variable.value)
        ]

    def restore(self) -> None:
        """Restore all values."""
        for variable, value in self._values:
            variable.assign(value)

    def holds(self) -> bool:
        """Whether every variable still has its value, to the bit."""
        return all(
            variable.numpy().tobytes() == value.tobytes() for variable, value in self._values
        )


def all_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the statistics variables of all batch norm layers of a model, in order."""
    return [
        variable
        for layer in batch_norm_layers(model).values()
        for variable in statistics(layer).values()
    ]


@contextlib.contextmanager
def restored_on_error(model: keras.Model, variables: Iterable[keras.Variable]) -> Iterator[None]:
    """Restore some variables if the context ends with an error."""
    snapshot = Snapshot(model, variables)
    try:
        yield
    except BaseException:  # Ctrl-C too: all layers or none.
        snapshot.restore()
        raise
