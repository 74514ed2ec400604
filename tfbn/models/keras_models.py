"""The layers of a Keras model, their calls and their variables."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.layer import BatchNormalization
from tfbn.models.patching import patch_in_thread

# A tensor, or its spec, or a list, tuple or dict of such structures.
Structure = Any
# From the path, the layer, its own call, the inputs, `training` and the mask to the outputs.
Observe = Callable[
    [str, keras.Layer, Callable[..., tf.Tensor], tf.Tensor, bool | None, tf.Tensor | None],
    tf.Tensor,
]

_STATISTICS = (
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
)


def batch_norm_layers(model: keras.Layer) -> dict[str, keras.layers.BatchNormalization]:
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


def layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Every layer in a model, by path; outer layers before those inside them."""
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

    # A model's own path is empty, unless it is itself the one layer of interest.
    is_batch_norm = isinstance(model, keras.layers.BatchNormalization)
    visit(model, model.name if is_batch_norm else "")
    return by_path


def _children(layer: keras.Layer) -> Sequence[keras.Layer]:
    # Private. Keras has no public list of a layer's direct sublayers that also covers custom
    # layers and wrappers; `Model.layers` knows only a model's own.
    return layer._layers


def refuse_keras_2(model: Any) -> None:
    """Raise `ValueError` for a model or layer of Keras 2, which `tf_keras` provides."""
    # By the name of the module, so that tf_keras need not be installed.
    if any(cls.__module__.partition(".")[0] == "tf_keras" for cls in type(model).__mro__):
        name = getattr(model, "name", type(model).__name__)
        raise ValueError(
            f"Expected a model of Keras 3. Received: {name!r} of tf_keras, which is Keras 2. Build "
            "it with Keras 3, or load an .h5 file of it: keras.models.load_model(path, "
            "compile=False)."
        )


def require_built(model: Any, layers: Iterable[keras.Layer] = ()) -> None:
    """Raise `ValueError` unless a model is one of Keras's and has weights, and so have layers."""
    refuse_keras_2(model)
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {model!r}. Pass the model itself.")
    if not _is_built(model) or not all(layer.built for layer in layers):
        raise ValueError(
            f"Expected a built model. Received: model {model.name!r}, which has no weights yet. "
            "Call it on a batch, or fit or load it, before this."
        )


def has_weights(model: keras.Model) -> bool:
    """Whether a model is built, and so is every batch norm layer in it."""
    return _is_built(model) and all(layer.built for layer in batch_norm_layers(model).values())


def _is_built(layer: keras.Layer) -> bool:
    """Whether a layer or model is built, or is a container that holds only such.

    Keras does not count a container as built before it is called. A built model may hold layers
    without weights, which it never calls.
    """
    if layer.built or type(layer).build is not keras.Model.build:
        return layer.built
    inner = _children(layer)
    return bool(inner) and all(map(_is_built, inner))


def input_specs(model: keras.Model) -> list[Structure] | None:
    """The inputs of a model, as far as Keras knows: for each argument the specs of a batch.

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

    def spec(shape: Sequence[int | None] | None) -> tf.TensorSpec | None:
        return None if shape is None else tf.TensorSpec((None, *shape[1:]), model.input_dtype)

    specs = keras.tree.map_shape_structure(spec, shape)
    # An optional input was `None`, so that its shape is unknown.
    return None if None in keras.tree.flatten(specs) else [specs]


def _any_batch(tensor: keras.KerasTensor) -> tf.TensorSpec:
    return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)


def inputs_of(element: Structure) -> Structure:
    """The inputs in a batch of data, which may hold targets and sample weights too."""
    return keras.utils.unpack_x_y_sample_weight(element)[0]


def statistics(layer: keras.layers.BatchNormalization) -> dict[str, keras.Variable]:
    """The variables that hold a batch norm layer's statistics, by attribute name.

    `moving_mean` and `moving_variance`, and with `renorm=True` also `moving_stddev`,
    `renorm_mean` and `renorm_stddev`.
    """
    variables = {name: getattr(layer, name, None) for name in _STATISTICS}
    return {name: variable for name, variable in variables.items() if variable is not None}


def always_passes_training_on(model: keras.Model) -> bool:
    """Whether it is certain that every layer in a model trains where the model does.

    That is so where all code is Keras's or tfbn's own, and no call in a Functional model fixes
    `training`. Else only a trace in training mode tells.
    """
    for layer in layers(model).values():
        if type(layer).call.__module__.partition(".")[0] not in ("keras", "tfbn"):
            return False
        if isinstance(layer, keras.Function):
            for operation in layer.operations:
                # Private. No public list has the arguments of a Functional model's calls.
                for node in operation._inbound_nodes:
                    if node.arguments.kwargs.get("training") is not None:
                        return False
    return True


def trace_key(model: keras.Model) -> tuple:
    """All that a trace of a model depends on but its weights, to be compared with `==`.

    These are the layers and for each its path, class, `call`, dtype policy, flags, variables and
    plain attributes (epsilon, axis, an activation). Training, prediction, `compile` and
    `set_weights` do not change it. It holds objects weakly.
    """
    return tuple((path, *_layer_key(layer)) for path, layer in layers(model).items())


def _layer_key(layer: keras.Layer) -> tuple:
    # Keras's own layers keep caches under private names: the dropout mask of an RNN's cell.
    private = type(layer).__module__.partition(".")[0] == "keras"
    books = _bookkeeping()
    attributes = [
        (name, _comparable(value))
        for name, value in vars(layer).items()
        if not (private and name[0] == "_")
        and name not in books
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
    """An object held weakly, equal only to itself for as long as it lives."""

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
    except TypeError:  # No weak reference to it: objects of built-in types that were not met yet.
        return type(value)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """The attributes by which Keras keeps its own books on any layer or model."""
    layer, model = keras.Layer(), keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    books = {*vars(layer), *(vars(model)), *vars(keras.Model())}
    # These come with `fit`, `evaluate` and `predict`; `evaluate` while a callback watches over it.
    later = {"history", "stop_training", "stop_evaluating", "stop_predicting", "optimizer"}
    return frozenset(books | later | {"_eval_epoch_iterator", "evaluate"})


@contextlib.contextmanager
def observed_calls(
    layers: Mapping[str, keras.Layer], observe: Observe, outermost: bool = False
) -> Iterator[None]:
    """Within the context this thread's calls of some batch norm layers run `observe`.

    The call is replaced in the two classes that define it, so that a subclass that adds to
    `super().call()` keeps its additions. Other threads, and other layers, are not affected.

    Args:
        layers: Batch norm layers by path.
        observe: Called as `observe(path, layer, call, inputs, training, mask)`, gives the
            outputs. `call(inputs, training=..., mask=...)` is the layer's own.
        outermost: Whether to observe the additions of subclasses too, in their own `call`.
    """
    classes = {keras.layers.BatchNormalization, BatchNormalization}
    if outermost:
        for layer in layers.values():
            classes.add(next(cls for cls in type(layer).__mro__ if "call" in cls.__dict__))
    paths = {id(layer): path for path, layer in layers.items()}

    def stand_in(original, layer, inputs, training=None, mask=None):
        call = functools.partial(original, layer)
        if id(layer) not in paths:
            return call(inputs, training=training, mask=mask)
        return observe(paths[id(layer)], layer, call, inputs, training, mask)

    with contextlib.ExitStack() as stack:
        for cls in classes:
            stack.enter_context(patch_in_thread(cls, "call", stand_in))
        yield


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Within the context this thread runs the functions of `tf.function` as part of their caller.

    A trace from before would not have the changes of the context, and nobody may run one from now
    later.
    """

    def inlined(call, function, *args, **kwargs):
        return function.python_function(*args, **kwargs)

    with patch_in_thread(_Function, "__call__", inlined):
        yield


# The type that `tf.function` returns has no public name.
_Function = type(tf.function(lambda: None))


class Snapshot:
    """The values of some variables of a model, on every replica, to be put back.

    Under a distribution strategy each replica has moving averages of its own.

    Args:
        model: A built model.
        variables: Variables of it.
    """

    def __init__(self, model: keras.Model, variables: Iterable[keras.Variable]):
        strategy = model.distribute_strategy
        self._values = [
            (local, local.numpy().copy())
            for variable in variables
            for local in strategy.experimental_local_results(variable.value)
        ]

    def restore(self) -> None:
        """Write all values back."""
        for variable, value in self._values:
            variable.assign(value)

    def holds(self) -> bool:
        """Whether every variable still has its value, to the bit."""
        return all(
            variable.numpy().tobytes() == value.tobytes() for variable, value in self._values
        )


def all_statistics(model: keras.Model) -> list[keras.Variable]:
    """The variables that hold the statistics of all batch norm layers of a model, in order."""
    return [
        variable
        for layer in batch_norm_layers(model).values()
        for variable in statistics(layer).values()
    ]


@contextlib.contextmanager
def restored_on_error(model: keras.Model, variables: Iterable[keras.Variable]) -> Iterator[None]:
    """A stretch after which some variables hold their old values, if it ends with an error."""
    before = Snapshot(model, variables)
    try:
        yield
    except BaseException:  # Ctrl-C too: all layers or none.
        before.restore()
        raise
