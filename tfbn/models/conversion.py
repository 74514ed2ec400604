"""Convert a model's stock batch normalization layers to tfbn's."""

import keras

from tfbn.models import copying, keras_models


def convert(model: keras.Model) -> keras.Model:
    """Return a copy of `model` with `tfbn.BatchNormalization` in place of Keras's layer.

    The copy has the class, names, dtype policies and `trainable` flags of `model` and all state
    that saving and loading carry: weights, constants and vocabularies of adapted layers. `model`
    does not change and shares no variable with the copy. Nested models, shared layers, wrappers
    such as `TimeDistributed`, and layers created by the code of a class (KerasHub) are converted
    too. Subclasses of Keras's layer keep their class, because they may override methods. The copy
    is not compiled, unless its class does so (KerasHub's tasks), and has no optimizer state:
    compile it before training.

    The copy is compared with `model` on random inputs, and refused if a prediction differs. A
    warning is issued if `model` accepts none of these inputs.

    `save` and `load_model` work as for `model`; a process that loads the file must `import tfbn`
    first. Batch norm created by the code of a class (KerasHub's backbones, a subclassed model) is
    not in the file's config. It loads as Keras's layer, with the same weights and predictions:
    `convert` the loaded model again before training it.

    ```python
    model = tfbn.convert(keras.models.load_model("model.keras"))
    ```

    Args:
        model: A `keras.Model`, built or not, that can be rebuilt from its config: Functional,
            Sequential, or of a class with `get_config()`.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If `model` is not a `keras.Model`, cannot be rebuilt from its config, or if its
            copy predicts something else.
    """
    keras_models.refuse_keras_2(model)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model. Received: {model!r}. Load files with keras.models.load_model."
        )
    converted = copying.copy(model)
    if model.built:
        copying.verify(model, converted)
    for layer in keras_models.batch_norm_layers(converted).values():
        if type(layer) is keras.layers.BatchNormalization:
            copying.convert_layer(layer)
    return converted
