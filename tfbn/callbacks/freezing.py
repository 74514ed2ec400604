"""Freeze a model after its sweep, and restore the `trainable` flags before it trains again.

Flags are stored by layer and not by model, because layers may be reused in another model.
"""

import contextlib
import weakref
from collections.abc import Collection, Iterator

import keras

from tfbn.models import keras_models

# Layer -> its `trainable` before the freeze.
_flags: weakref.WeakKeyDictionary[keras.Layer, bool] = weakref.WeakKeyDictionary()


def freeze(model: keras.Model, by_batch: Collection[str] = ()) -> None:
    """Store the flags of all layers, and set `trainable=False`.

    Args:
        model: The model.
        by_batch: The paths of the layers that normalize by the batch in inference. They stay
            unfrozen, because a frozen layer would not.
    """
    layers = keras_models.layers(model)
    for layer in layers.values():
        _flags[layer] = layer.trainable
    model.trainable = False
    for path in by_batch:
        layers[path].trainable = _flags[layers[path]]


def unfreeze(model: keras.Model) -> int:
    """Restore the flags of the layers that have not changed since `freeze`.

    A flag that was set to `True` since stays, and so do the flags of inner layers, which Keras sets
    with it. (Setting `False` in a frozen layer has no effect in Keras.)

    Returns:
        The number of layers whose flag has changed.
    """
    layers = list(keras_models.layers(model).values())
    flags = {layer: _flags.pop(layer) for layer in layers if layer in _flags}
    for layer in layers:
        if layer in flags and layer.trainable:
            for inner in keras_models.layers(layer).values():
                flags.pop(inner, None)
    # Outer layers come first.
    wanted = [(layer, flags.get(layer, layer.trainable)) for layer in layers]
    changed = sum(layer.trainable != flag for layer, flag in wanted)
    for layer, flag in wanted if changed else ():
        layer.trainable = flag
    return changed


@contextlib.contextmanager
def unchanged_on_error(model: keras.Model) -> Iterator[None]:
    """Restore current and stored flags if the context ends with an error."""
    layers = keras_models.layers(model).values()
    saved = [(layer, layer.trainable, _flags.get(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, trainable, flag in saved:
            layer.trainable = trainable
            if flag is not None:
                _flags[layer] = flag
        raise


def require_optimizer_for_all(model: keras.Model) -> None:
    """Raise `ValueError` if the optimizer was built while layers were frozen.

    Under a strategy `fit` builds it before it calls the first callback.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    # Private. No public attribute has the variables that an optimizer was built for.
    variables = set(map(id, getattr(optimizer, "_trainable_variables", ())))
    built = getattr(optimizer, "built", False)
    if built and not variables.issuperset(map(id, model.trainable_variables)):
        raise ValueError(
            "Compiled with layers frozen by an earlier fit. Call `unfreeze()` of the earlier "
            "callback and compile again."
        )


def retrace(model: keras.Model) -> None:
    """Make `fit` trace its step again, which Keras does not do after a change of flags."""
    if model.train_function is not None:
        model.make_train_function(force=True)
