"""Freeze a model after its sweep, and give every layer its flag back before it trains on.

The flags are remembered by layer and not by model: a layer that is reused in another model brings
its flag along.
"""

import contextlib
import weakref
from collections.abc import Collection, Iterator

import keras

from tfbn.models import keras_models

# Layer -> its `trainable` before the freeze.
_flags: weakref.WeakKeyDictionary[keras.Layer, bool] = weakref.WeakKeyDictionary()


def freeze(model: keras.Model, by_batch: Collection[str] = ()) -> None:
    """Set `trainable=False` in all layers, and remember the flags.

    Args:
        model: The model.
        by_batch: The paths of the layers that inference normalizes by the batch, which it would not
            do if they were frozen. They stay as they are.
    """
    layers = keras_models.layers(model)
    for layer in layers.values():
        _flags[layer] = layer.trainable
    model.trainable = False
    for path in by_batch:
        layers[path].trainable = _flags[layers[path]]


def unfreeze(model: keras.Model) -> int:
    """Give the layers that are as `freeze` left them their flags back.

    Where somebody has set a flag to `True` since, it stays, and so do the flags of all layers
    inside, because setting a flag sets those too. (Keras does nothing where a flag is set to the
    value that it has, so nobody can set `False` in a frozen layer.)

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
    """A context that restores all flags, and those remembered, if it ends with an error."""
    layers = keras_models.layers(model).values()
    held = [(layer, layer.trainable, _flags.get(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, trainable, flag in held:
            layer.trainable = trainable
            if flag is not None:
                _flags[layer] = flag
        raise


def require_optimizer_for_all(model: keras.Model) -> None:
    """Raise `ValueError` if the optimizer was built while layers were frozen.

    Under a strategy `fit` builds it before the first callback is called.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    # Private. Nothing public has the variables that an optimizer was built for.
    known = set(map(id, getattr(optimizer, "_trainable_variables", ())))
    built = getattr(optimizer, "built", False)
    if built and not known.issuperset(map(id, model.trainable_variables)):
        raise ValueError(
            "Expected an optimizer for all layers that train. Received: a model that was compiled "
            "while an earlier fit had left layers frozen. Call `unfreeze()` of the earlier "
            "callback, compile the model, and fit again."
        )


def trace_anew(model: keras.Model) -> None:
    """Have `fit` trace its step again: Keras keeps the trace whatever becomes trainable."""
    if model.train_function is not None:
        model.make_train_function(force=True)
