"""Turn a model's stock batch normalization layers into tfbn's."""

import keras

from tfbn.layer import BatchNormalization


def convert(model):
    """A copy of `model` with `tfbn.BatchNormalization` in place of Keras's layer.

    The copy has the weights, names, dtype policies and `trainable` flags of `model`, which is left
    as it was and shares no variable with the copy. Layers are found wherever the model's config
    mentions them: also in nested models, in layers that are shared, and inside wrappers such as
    `TimeDistributed`. Subclasses of Keras's layer keep their class, since what they override is
    not known. The copy is not compiled, and the state of the optimizer stays behind: compile it
    before training.

    Example:
        >>> model = tfbn.convert(keras.applications.ResNet50())

    Args:
        model: A Functional or Sequential `keras.Model`, built or not.

    Returns:
        A model of the same class.

    Raises:
        ValueError: `model`, or a part of it that holds batch normalization, is written as a class
            with a `call` of its own. Only its code says how its layers are made.
    """
    if not isinstance(model, keras.Sequential | keras.Function):
        raise ValueError(
            "Only Functional and Sequential models can be converted. "
            f"Received: {model!r} of class {type(model).__name__}. {_INSTEAD}"
        )
    config = keras.saving.serialize_keras_object(model)
    # Classes that were never registered can be found by nobody else.
    classes = {type(layer).__name__: type(layer) for layer in _layers(model)}
    # Safe mode is about files of unknown origin. This config is of a model that already runs.
    converted = keras.saving.deserialize_keras_object(
        _with_tfbn_layers(config), custom_objects=classes, safe_mode=False
    )
    owners = [
        f"{layer.name} ({type(layer).__name__})"
        for layer in _layers(converted)
        if any(_is_stock(part) for part in _layers(layer, include_self=False, recursive=False))
    ]
    if owners:
        raise ValueError(
            "A part of this model makes its batch normalization in code of its own. "
            f"Received: {model!r} with {', '.join(owners)}. {_INSTEAD}"
        )
    converted.set_weights(model.get_weights())
    # Setting the flag of a model sets those of its layers, so the config alone would lose a layer
    # that was set free in a frozen model. Models come before their layers here.
    for layer, original in zip(_layers(converted), _layers(model), strict=True):
        layer.trainable = original.trainable
    return converted


_INSTEAD = (
    "Write tfbn.BatchNormalization for keras.layers.BatchNormalization where the class makes its "
    "layers: arguments and weights are the same, so load_weights() still reads its old files."
)


def _with_tfbn_layers(config):
    if isinstance(config, list | tuple):
        return type(config)(_with_tfbn_layers(item) for item in config)
    if not isinstance(config, dict):
        return config
    config = {key: _with_tfbn_layers(value) for key, value in config.items()}
    if config.get("class_name") == "BatchNormalization" and config.get("module") == "keras.layers":
        ours = keras.saving.get_registered_name(BatchNormalization)
        config |= {"module": BatchNormalization.__module__, "registered_name": ours}
    return config


def _is_stock(layer):
    return type(layer) is keras.layers.BatchNormalization


def _layers(layer, **options):
    # `layers` is the public list, but only models have it: it does not show what wrappers hold.
    return list(layer._flatten_layers(**options))
