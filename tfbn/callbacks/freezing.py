"""Freeze a model after its sweep, and restore the `trainable` flags before it trains again.

Flags are stored by layer and not by model, because layers may be reused in another model.
"""

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import keras

from tfbn.models import keras_models


class _Flags(NamedTuple):
    """The `trainable` flags of a layer and of its weights apart from inner layers.

    Setting the flag of a layer sets the flags of its weights, also where they differed (LoRA).
    """

    layer: bool
    weights: list[tuple[keras.Variable, bool]]


class _Frozen(NamedTuple):
    """A layer's flags before a freeze, and the model whose `fit` froze it."""

    flags: _Flags
    fitted: weakref.ref[keras.Model]


_frozen: weakref.WeakKeyDictionary[keras.Layer, _Frozen] = weakref.WeakKeyDictionary()


def freeze(
    model: keras.Model, by_batch: Collection[str] = (), fitted: keras.Model | None = None
) -> None:
    """Store the flags of all layers, and set `trainable=False`.

    Args:
        model: The model.
        by_batch: The paths of the layers that normalize by the batch in inference. They stay
            unfrozen, because a frozen layer would not.
        fitted: The model that `fit` has trained, if `model` is a part of it.
    """
    layers = keras_models.layers(model)
    flags = _flags_of(layers.values())
    for layer, before in flags.items():
        _frozen[layer] = _Frozen(before, weakref.ref(fitted or model))
    # Each layer, because TensorFlow skips `model.trainable = False` if it is False already.
    for layer in layers.values():
        layer.trainable = False
    _set_flags({layers[path]: flags[layers[path]] for path in by_batch})


def unfreeze(model: keras.Model, fitted: keras.Model | None = None) -> int:
    """Restore the flags of the layers that have not changed since `freeze`.

    A flag that was set to `True` since stays, and so do the flags of inner layers, which Keras sets
    with it. (Setting `False` in a frozen layer has no effect in Keras.)

    Args:
        model: The model.
        fitted: If given, only layers that the `fit` of this model froze.

    Returns:
        The number of layers whose flag has changed.
    """
    layers = list(keras_models.layers(model).values())
    stored = {
        layer: _frozen.pop(layer).flags
        for layer in layers
        if layer in _frozen and (fitted is None or _frozen[layer].fitted() is fitted)
    }
    for layer in layers:
        if layer in stored and layer.trainable:
            for inner in keras_models.layers(layer).values():
                stored.pop(inner, None)
    changed = sum(layer.trainable != flags.layer for layer, flags in stored.items())
    if changed:
        _set_flags(_flags_of(layers) | stored)
    return changed


def reused(model: keras.Model, fitted: keras.Model) -> list[str]:
    """Return the names of the outermost layers that `unfreeze` will train in another model.

    Args:
        model: The model to unfreeze.
        fitted: The model that `fit` will train.
    """
    names: list[str] = []
    inside: set[keras.Layer] = set()
    for layer in keras_models.layers(model).values():
        frozen = _frozen.get(layer)
        if frozen is None or layer.trainable or frozen.fitted() in (model, fitted):
            continue
        if frozen.flags.layer and layer not in inside:
            names.append(layer.name)
            inside.update(keras_models.layers(layer).values())
    return names


@contextlib.contextmanager
def unchanged_on_error(*models: keras.Model) -> Iterator[None]:
    """Restore current and stored flags if the context ends with an error."""
    layers = [layer for model in models for layer in keras_models.layers(model).values()]
    flags, stored = _flags_of(layers), {layer: _frozen.get(layer) for layer in layers}
    try:
        yield
    except BaseException:
        _set_flags(flags)
        _frozen.update({layer: frozen for layer, frozen in stored.items() if frozen is not None})
        raise


def _flags_of(layers: Iterable[keras.Layer]) -> dict[keras.Layer, _Flags]:
    """Return the flags of layers, outer layers first."""
    layers = list(dict.fromkeys(layers))
    flags: dict[keras.Layer, _Flags] = {}
    inside: set[int] = set()
    for layer in reversed(layers):
        direct = [weight for weight in layer.weights if id(weight) not in inside]
        flags[layer] = _Flags(layer.trainable, [(weight, weight.trainable) for weight in direct])
        inside.update(map(id, direct))
    return {layer: flags[layer] for layer in layers}


def _set_flags(flags: dict[keras.Layer, _Flags]) -> None:
    """Set the flags of layers, outer layers first, then of weights."""
    for layer, before in flags.items():
        layer.trainable = before.layer
    for before in flags.values():
        for weight, trainable in before.weights:
            weight.trainable = trainable


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
