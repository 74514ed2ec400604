"""Copy a Keras model with all of its state, and verify the copy's predictions.

`convert` and `fold` require it: Keras's `clone_model` and `from_config` copy no state, and
`get_weights` only weights, without the constants of an adapted `Normalization` or the table of a
`StringLookup`.
"""

import tempfile
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.layer import BatchNormalization, sweep_records
from tfbn.models import keras_models
from tfbn.models.comparison import relative_difference
from tfbn.models.keras_models import Structure


def copy(model: keras.Model) -> keras.Model:
    """Return a model of the same class, graph and state, which shares nothing with `model`.

    A stock Functional or Sequential model is rebuilt layer by layer, any other from its config.
    The copy is not compiled.

    Raises:
        ValueError: If the model cannot be rebuilt from its config.
    """
    try:
        copied = _copy_layer(model, {})
        if model.built and not copied.built:
            copied.build_from_config(model.get_build_config())
            copied.built = True
        copy_state(model, copied)
    except Exception as error:  # The code of a custom layer may raise any class.
        raise ValueError(
            f"Cannot rebuild {model!r} from its config: {_shorten(error)}. Add get_config() to "
            "custom classes."
        ) from error
    return copied


def rebuild(operation: keras.Operation) -> keras.Operation:
    """Return a layer, operation or model of the same class and config, with new state."""
    config = keras.saving.serialize_keras_object(operation)
    # A custom loss may not deserialize and is not needed. The copy's first call builds it.
    config = {key: config[key] for key in config.keys() - {"compile_config", "build_config"}}
    # Safe mode protects against files of unknown origin; this layer already runs.
    rebuilt = keras.saving.deserialize_keras_object(
        config, custom_objects=_custom_objects(operation), safe_mode=False
    )
    if isinstance(operation, keras.layers.Lambda):
        # A lambda loaded from a config loses its closure.
        rebuilt.function, rebuilt.mask = operation.function, operation.mask
    return rebuilt


def rebuild_graph(
    model: keras.Model, copy_operation: Callable[[keras.Operation], Callable[..., Any]]
) -> keras.Model:
    """Return a plain Functional model of the same graph.

    Args:
        model: A Functional or built Sequential model.
        copy_operation: Returns the replacement of an operation.
    """
    tensors = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    outputs = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    # For `model`, `clone_model` would also compile the clone and call the model's class.
    plain = keras.Model(tensors, outputs, name=model.name)
    layers = [layer for layer in plain.layers if isinstance(layer, keras.layers.InputLayer)]

    def copy_input(tensor):
        [layer] = [layer for layer in layers if layer.output is tensor]
        config = layer.get_config() | {"optional": layer.optional}  # Missing in Keras 3.10.
        copied = keras.layers.InputLayer.from_config(config)
        copied.trainable = layer.trainable
        return copied.output

    # Without `input_tensors`, `clone_model` would lose which inputs are sparse or optional.
    return keras.models.clone_model(
        plain,
        input_tensors=keras.tree.map_structure(copy_input, plain.input),
        clone_function=copy_operation,
    )


def copy_state(source: keras.Layer, target: keras.Layer) -> None:
    """Copy names, flags, variables, and everything else that saving and loading carry.

    Raises:
        ValueError: If the inner layers differ, or a vocabulary is lost.
    """
    pairs = _pairs(source, target)
    for original, copied in pairs:
        if type(original) is not type(copied):
            convert_layer(copied)
        # Automatic names have a counter.
        copied.name = original.name
        # The flag of a model sets the flags of its layers, which come later.
        copied.trainable = original.trainable
    for original, copied in pairs:
        store: dict[str, Any] = {}
        original.save_own_variables(store)
        copied.load_own_variables({key: _as_array(value) for key, value in store.items()})
        if hasattr(original, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                original.save_assets(directory)
                copied.load_assets(directory)
        sweep_records.copy(original, copied)
        if (
            hasattr(original, "get_vocabulary")
            and original.get_vocabulary() != copied.get_vocabulary()
        ):
            raise ValueError(
                f"the vocabulary of layer {original.name!r} changed: saving loses line breaks and "
                "empty words"
            )
    # Saving merges LoRA factors, and omits random generators and flags of single variables.
    for original, copied in zip(source.variables, target.variables, strict=True):
        copied.assign(original)
        copied.trainable = original.trainable


def _as_array(value: Any) -> np.ndarray:
    """Convert a value to the array that a file would return."""
    value = value.value if isinstance(value, keras.Variable) else value
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def verify(model: keras.Model, copied: keras.Model) -> None:
    """Raise `ValueError` if a copy predicts something else than the model, on random inputs.

    Larger inputs are tried while the model rejects them, or does not repeat its predictions:
    TensorFlow reads uninitialized memory if a convolution's window is larger than its image.
    """
    reason = "Keras does not know the inputs of the model"
    for inputs in _random_inputs(model):
        try:
            _require_possible_shapes(model, inputs)
            outputs = _predict(model, inputs)
        except Exception as error:  # The code of a custom layer may raise any class.
            reason = f"the model accepts no random inputs ({_shorten(error)})"
            continue
        if not any(output.size for output in outputs):
            reason = "its predictions for random inputs are empty"
            continue
        difference = relative_difference(_predict(copied, inputs), outputs)
        if difference <= 1e-5:
            return
        # Some devices round the same operations differently each time.
        noise = relative_difference(_predict(model, inputs), outputs)
        if noise < 0.01 and difference > 10 * noise:
            raise ValueError(
                f"Cannot copy {model!r}: predictions differ by {difference:.1e}. Add "
                f"save_own_variables() and load_own_variables() to {custom_classes(model)}."
            )
        if noise < 0.01:
            return
        reason = "the model predicts something else each time"
    warnings.warn(
        f"The predictions of the copy of model {model.name!r} were not compared: {reason}.",
        stacklevel=3,
    )


def convert_layer(layer: keras.layers.BatchNormalization) -> None:
    """Convert a `keras.layers.BatchNormalization` (not a subclass) to tfbn's, in place.

    tfbn's layer has the same attributes and variables, and other methods. A new class converts the
    layer for everything that refers to it, also in code that is not tfbn's.
    """
    object.__setattr__(layer, "__class__", BatchNormalization)


def is_stock(thing: Any) -> bool:
    """Whether a class or function belongs to Keras or tfbn."""
    return thing.__module__.partition(".")[0] in ("keras", "tfbn")


def custom_classes(model: keras.Model) -> list[str]:
    """Return the names of the layer classes that belong to neither Keras nor tfbn."""
    classes = {type(layer) for layer in keras_models.layers(model).values()}
    return sorted(cls.__name__ for cls in classes if not is_stock(cls))


def _shorten(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"


def _copy_layer(layer: keras.Operation, copies: dict[int, keras.Operation]) -> keras.Operation:
    """Copy a layer once. `copies` maps id -> copy, so that shared layers stay shared."""
    if id(layer) not in copies:
        stock = is_stock(type(layer))

        def copy_operation(operation):
            return _copy_layer(operation, copies)

        if stock and isinstance(layer, keras.Function):
            copies[id(layer)] = rebuild_graph(layer, copy_operation)
        elif stock and isinstance(layer, keras.Sequential):
            copies[id(layer)] = _rebuild_sequential(layer, copy_operation)
        else:
            copies[id(layer)] = rebuild(layer)
        if isinstance(layer, keras.Model):
            copies[id(layer)].dtype_policy = layer.dtype_policy
    return copies[id(layer)]


def _rebuild_sequential(
    model: keras.Sequential, copy_operation: Callable[[keras.Operation], keras.Operation]
) -> keras.Sequential:
    layers = [copy_operation(layer) for layer in model.layers]
    # `Sequential.layers` omits the input layer.
    first = list(keras_models.layers(model).values())[1:2]
    if first and isinstance(first[0], keras.layers.InputLayer):
        layers.insert(0, copy_operation(first[0]))
    return keras.Sequential(layers, name=model.name)


def _custom_objects(operation: keras.Operation) -> dict[str, Any]:
    """Return registered name -> custom class or function in a layer's config.

    Keras's are omitted: with two classes of one name, the config could resolve to the wrong one.
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
            if not is_stock(thing) and (thing is value or hasattr(thing, "from_config")):
                custom[keras.saving.get_registered_name(thing)] = thing
    return custom


def _pairs(source: keras.Layer, target: keras.Layer) -> list[tuple[keras.Layer, keras.Layer]]:
    """Return pairs of each layer with state and its copy."""
    originals, copies = (
        [layer for layer in keras_models.layers(model).values() if _has_state(layer)]
        for model in (source, target)
    )
    if list(map(_stock_class, originals)) != list(map(_stock_class, copies)):
        raise ValueError(
            f"of {len(originals)} layers with state the config creates {len(copies)}, or others: "
            "one is shared with a wrapper, or was added later"
        )
    return list(zip(originals, copies, strict=True))


def _stock_class(layer: keras.Layer) -> type:
    """Return a layer's class, and Keras's for tfbn's: the code of a class creates Keras's."""
    is_ours = type(layer) is BatchNormalization
    return keras.layers.BatchNormalization if is_ours else type(layer)


def _has_state(layer: keras.Layer) -> bool:
    # Models may keep unused layers, which the config omits. Only layers with state matter.
    saves = type(layer).save_own_variables is not keras.layers.Layer.save_own_variables
    return bool(layer.variables) or saves or hasattr(layer, "save_assets")


def _random_inputs(model: keras.Model) -> Iterator[Structure]:
    """Yield inputs to try; nothing if Keras has not recorded their shapes."""
    # `model.input` may have a fixed batch size.
    specs = [model.input] if isinstance(model, keras.Function) else getattr(model, "inputs", None)
    specs = specs or keras_models.input_specs(model)
    # Vocabularies may be small, and images have a minimal size.
    for size, categories in ((32, 2), (32, 1), (128, 2), (320, 2)) if specs is not None else ():
        yield keras.tree.map_structure(_RandomInputs(model, size, categories), specs)


class _RandomInputs:
    """Create random inputs: numbers in [0, 1), categories from 0, words of the vocabularies."""

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


def _require_possible_shapes(model: keras.Model, inputs: Structure) -> None:
    """Raise Keras's error if the graph of a model has no shape for an output of a layer."""
    if isinstance(model, keras.Function | keras.Sequential):
        specs = keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype), inputs)
        model.compute_output_spec(*specs)


def _predict(model: keras.Model, inputs: Structure) -> list[np.ndarray]:
    """Return all outputs as arrays, without a change to variables or random generators."""
    # `stateless_call` would pass `training` to a `call` that does not take it.
    with keras.StatelessScope():
        outputs = model(*inputs, training=False)
    return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(outputs)]
