"""Copies of Keras models: the same layers with the same state, and the check that they agree.

`convert` and `fold` both start from one. Neither way that Keras has is enough: `clone_model` and
`from_config` carry no state, and `get_weights` leaves behind all state but weights, such as the
constants of an adapted `Normalization` or the table of a `StringLookup`.
"""

import tempfile
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn import origins
from tfbn.layer import BatchNormalization
from tfbn.models import keras_models
from tfbn.models.keras_models import Structure


def copy(model: keras.Model) -> keras.Model:
    """A model of the same class, structure and state, which shares nothing with it.

    A Functional or Sequential model of Keras's own class is made again layer by layer, any other
    from its config. The copy is not compiled.

    Raises:
        ValueError: The model cannot be made again from its config.
    """
    try:
        copied = _copied(model, {})
        if model.built and not copied.built:
            copied.build_from_config(model.get_build_config())
            copied.built = True
        copy_state(model, copied)
    except Exception as error:  # Of whatever class a layer's own code raises.
        raise ValueError(
            f"Expected a model that its config makes again. Received: {model!r}, for which that "
            f"ends in {_in_short(error)}. If a class in it takes arguments, give it a get_config() "
            "that returns them."
        ) from error
    return copied


def made_again(operation: keras.Operation) -> keras.Operation:
    """A layer, operation or model of the same class and config, with a state of its own."""
    config = keras.saving.serialize_keras_object(operation)
    # A loss that only its author knows is nothing to us, and the copy's first call builds it.
    config = {key: config[key] for key in config.keys() - {"compile_config", "build_config"}}
    # Safe mode is about files of unknown origin. This config is of a layer that already runs.
    made = keras.saving.deserialize_keras_object(
        config, custom_objects=_custom_objects(operation), safe_mode=False
    )
    if isinstance(operation, keras.layers.Lambda):
        # The code of a lambda in a config does not know the names that surround it.
        made.function, made.mask = operation.function, operation.mask
    return made


def graph_again(
    model: keras.Model, copied: Callable[[keras.Operation], Callable[..., Any]]
) -> keras.Model:
    """A plain Functional model of the same graph.

    Args:
        model: A Functional or built Sequential model.
        copied: A function from one of its operations to the one that stands for it.
    """
    tensors = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    outputs = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    # Not the model itself: `clone_model` would compile the clone as well, and call its class.
    plain = keras.Model(tensors, outputs, name=model.name)
    # Left to itself, `clone_model` forgets which inputs are sparse or optional.
    layers = [layer for layer in plain.layers if isinstance(layer, keras.layers.InputLayer)]

    def again(tensor):
        [layer] = [layer for layer in layers if layer.output is tensor]
        config = layer.get_config() | {"optional": layer.optional}  # Keras 3.10 leaves it out.
        made = keras.layers.InputLayer.from_config(config)
        made.trainable = layer.trainable
        return made.output

    return keras.models.clone_model(
        plain,
        input_tensors=keras.tree.map_structure(again, plain.input),
        clone_function=copied,
    )


def copy_state(source: keras.Layer, target: keras.Layer) -> None:
    """Names, flags, variables, and all else that saving and loading would carry over.

    Raises:
        ValueError: The layers inside are not the same, or a vocabulary is lost.
    """
    pairs = _pairs(source, target)
    for mine, theirs in pairs:
        if type(mine) is not type(theirs):
            make_ours(theirs)
        # Layers that a class makes without a name are given the next number each time.
        theirs.name = mine.name
        # Setting the flag of a model sets those of its layers, which come after it here.
        theirs.trainable = mine.trainable
    for mine, theirs in pairs:
        store: dict[str, Any] = {}
        mine.save_own_variables(store)
        theirs.load_own_variables({key: _stored(value) for key, value in store.items()})
        if hasattr(mine, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                mine.save_assets(directory)
                theirs.load_assets(directory)
        origins.share(mine, theirs)
        if hasattr(mine, "get_vocabulary") and mine.get_vocabulary() != theirs.get_vocabulary():
            raise ValueError(
                f"the vocabulary of layer {mine.name!r} came back as another. It is saved as text, "
                "which loses words with a line break in them, and empty ones at the end"
            )
    # Saving merges the factors of LoRA, and leaves out the state of random generators and which
    # single variables are frozen.
    for mine, theirs in zip(source.variables, target.variables, strict=True):
        theirs.assign(mine)
        theirs.trainable = mine.trainable


def _stored(value: Any) -> np.ndarray:
    """An array, as a file would give it back."""
    value = value.value if isinstance(value, keras.Variable) else value
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def verify(model: keras.Model, copied: keras.Model) -> None:
    """Refuse a copy that predicts something else, on inputs that are made up for it.

    Inputs on which the model contradicts its own prediction show nothing about the copy, so
    larger ones are tried: TensorFlow reads uninitialized memory where a convolution's window is
    larger than its image.

    Raises:
        ValueError: The copy predicts something else.
    """
    reason = "Keras does not know the inputs of the model"
    for inputs in _made_up_inputs(model):
        try:
            outputs = _predicted(model, inputs)
        except Exception as error:  # Of whatever class its layers raise.
            reason = f"the model takes none of the inputs made up for it ({_in_short(error)})"
            continue
        if not any(output.size for output in outputs):
            reason = "its predictions for the inputs made up for it are empty"
            continue
        off = _difference(outputs, _predicted(copied, inputs))
        if off <= 1e-5:
            return
        # The same operations on the same numbers, but some devices round differently each time.
        own = _difference(outputs, _predicted(model, inputs))
        if own < 0.01 and off > 10 * own:
            raise ValueError(
                f"Expected a copy that predicts the same as the model. Received: {model!r}, "
                f"whose copy is off by {off:.1e} of the largest value. A layer has state that "
                f"saving and loading would lose: of custom classes it has {custom_classes(model)}. "
                "Override save_own_variables() and load_own_variables() there."
            )
        if own < 0.01:
            return
        reason = "the model predicts something else each time"
    warnings.warn(
        f"The copy of model {model.name!r} has its layers, weights and other state, but the "
        f"predictions were not compared: {reason}.",
        stacklevel=3,
    )


def make_ours(layer: keras.layers.BatchNormalization) -> None:
    """Turn a `keras.layers.BatchNormalization`, and none of its subclasses, into tfbn's.

    Ours is Keras's with other methods: it has the same attributes and variables. Exchanging the
    class reaches every place that knows the layer, also in code that is not ours.
    """
    object.__setattr__(layer, "__class__", BatchNormalization)


def is_known(thing: Any) -> bool:
    """Whether a class or function is Keras's own, or ours."""
    return thing.__module__.partition(".")[0] in ("keras", "tfbn")


def custom_classes(model: keras.Model) -> list[str]:
    """The names of the classes of a model's layers that are neither Keras's nor ours."""
    classes = {type(layer) for layer in keras_models.layers(model).values()}
    return sorted(cls.__name__ for cls in classes if not is_known(cls))


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"


def _copied(layer: keras.Operation, copies: dict[int, keras.Operation]) -> keras.Operation:
    """`copies` has those of the layers that were met before, by id: shared layers stay shared."""
    if id(layer) not in copies:
        plain = is_known(type(layer))

        def inner(operation):
            return _copied(operation, copies)

        if plain and isinstance(layer, keras.Function):
            copies[id(layer)] = graph_again(layer, inner)
        elif plain and isinstance(layer, keras.Sequential):
            copies[id(layer)] = _sequential_again(layer, inner)
        else:
            copies[id(layer)] = made_again(layer)
        if isinstance(layer, keras.Model):
            copies[id(layer)].dtype_policy = layer.dtype_policy
    return copies[id(layer)]


def _sequential_again(
    model: keras.Sequential, copied: Callable[[keras.Operation], keras.Operation]
) -> keras.Sequential:
    layers = [copied(layer) for layer in model.layers]
    # A Sequential model's own list leaves its input out.
    first = list(keras_models.layers(model).values())[1:2]
    if first and isinstance(first[0], keras.layers.InputLayer):
        layers.insert(0, copied(first[0]))
    return keras.Sequential(layers, name=model.name)


def _custom_objects(operation: keras.Operation) -> dict[str, Any]:
    """The classes and functions that a layer's config names, and only this process may know.

    Keras's own are left out: of two classes with one name, its config would find the wrong one.
    """
    layers = [operation]
    if isinstance(operation, keras.Layer):
        layers = list(keras_models.layers(operation).values())
    custom = {}
    for layer in layers:
        values = [layer]
        for value in vars(layer).values():
            values += [value, *(value if isinstance(value, list | tuple) else ())]
            values += value.values() if isinstance(value, dict) else ()
        for value in values:
            thing = value if isinstance(value, types.FunctionType) else type(value)
            if not is_known(thing) and (thing is value or hasattr(thing, "from_config")):
                custom[keras.saving.get_registered_name(thing)] = thing
    return custom


def _pairs(source: keras.Layer, target: keras.Layer) -> list[tuple[keras.Layer, keras.Layer]]:
    """Each layer that has state, or holds one that has, with its copy."""
    mine, theirs = (
        [layer for layer in keras_models.layers(model).values() if _has_state(layer)]
        for model in (source, target)
    )
    if list(map(_stock_class, mine)) != list(map(_stock_class, theirs)):
        raise ValueError(
            f"of {len(mine)} layers with state {len(theirs)} came back, or others. A config does "
            "not know of layers that a wrapper and the model share, nor of those that were added "
            "later"
        )
    return list(zip(mine, theirs, strict=True))


def _stock_class(layer: keras.Layer) -> type:
    """A class that makes its batch norm makes Keras's, also where ours has taken its place."""
    is_ours = type(layer) is BatchNormalization
    return keras.layers.BatchNormalization if is_ours else type(layer)


def _has_state(layer: keras.Layer) -> bool:
    # Models often keep layers that they have no use for any more. Those that matter have state.
    saves = type(layer).save_own_variables is not keras.layers.Layer.save_own_variables
    return bool(layer.variables) or saves or hasattr(layer, "save_assets")


def _made_up_inputs(model: keras.Model) -> Iterator[Structure]:
    """Inputs to try one after the other; none where Keras does not know their shapes."""
    # In these the size of a batch may be fixed.
    specs = [model.input] if isinstance(model, keras.Function) else getattr(model, "inputs", None)
    specs = specs or keras_models.input_specs(model)
    # Words and categories may be few, and images have a least size.
    for size, categories in ((32, 2), (32, 1), (128, 2), (320, 2)) if specs is not None else ():
        yield keras.tree.map_structure(_MadeUp(model, size, categories), specs)


class _MadeUp:
    """Random inputs: numbers in [0, 1), categories from 0, words that the model knows."""

    def __init__(self, model: keras.Model, size: int, categories: int):
        self.size, self.categories = size, categories
        self.generator = np.random.default_rng(0)
        vocabularies = [
            layer.get_vocabulary()
            for layer in keras_models.layers(model).values()
            if hasattr(layer, "get_vocabulary")
        ]
        self.words = [str(word) for words in vocabularies for word in words[-2:]] or ["a"]

    def __call__(self, spec: Any) -> tf.Tensor:
        shape = [spec.shape[0] or 2, *(length or self.size for length in spec.shape[1:])]
        dtype = keras.backend.standardize_dtype(spec.dtype)
        if dtype == "string":
            return keras.ops.convert_to_tensor(self.generator.choice(self.words, shape))
        if keras.backend.is_float_dtype(dtype):
            return keras.ops.convert_to_tensor(self.generator.random(shape), dtype)
        values = self.generator.integers(0, self.categories, shape)
        return keras.ops.convert_to_tensor(values, dtype)


def _predicted(model: keras.Model, inputs: Structure) -> list[np.ndarray]:
    """All outputs as arrays. Nothing moves, not even the generators of random numbers."""
    outputs, _ = model.stateless_call(
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
        *inputs,
        training=False,
    )
    return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(outputs)]


def _difference(outputs: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """The largest, as a part of an output's largest value; infinite where it cannot be told."""
    return max((_difference_of_one(*pair) for pair in zip(outputs, others, strict=True)), default=0)


def _difference_of_one(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return np.inf
    if not np.issubdtype(a.dtype, np.inexact):
        return 0.0 if np.array_equal(a, b) else np.inf
    a, b = (np.asarray(values, np.float64) for values in (a, b))
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return np.inf
    off = np.abs(a - b)[np.isfinite(a)]
    return float(off.max() / np.abs(a[np.isfinite(a)]).max()) if a.any() else np.inf
