"""Turn a model's stock batch normalization layers into tfbn's."""

import keras

from tfbn.models import copying, keras_models


def convert(model: keras.Model) -> keras.Model:
    """A copy of `model` with `tfbn.BatchNormalization` in place of Keras's layer.

    The copy has the class, names, dtype policies and `trainable` flags of `model` and all of its
    state: weights, the constants and vocabularies of adapted layers, whatever saving and loading
    carry. `model` is left as it was and shares no variable with the copy. Layers are found
    wherever they are: in nested models, in layers that are shared, inside wrappers such as
    `TimeDistributed`, and in layers and models whose class makes them, such as those of KerasHub.
    Subclasses of Keras's layer keep their class, since they may override anything. The copy
    is not compiled, unless its class does that as KerasHub's tasks do, and the state of the
    optimizer stays behind: compile it before training.

    Before layers are exchanged, the copy is run beside `model` on made-up inputs, and refused if
    it predicts anything else. A warning says so where `model` takes none of these inputs.

    `save` and `load_model` work as for `model`. A process that loads the file must `import tfbn`
    first. Batch norm that a class makes in its own code (KerasHub's backbones, a subclassed
    model) is not in the file's config and so is loaded as Keras's layer, with the same weights
    and predictions; `convert` the loaded model again to train it on.

    ```python
    model = tfbn.convert(keras.models.load_model("model.keras"))
    ```

    Args:
        model: A `keras.Model`, built or not, that can be made again from its config: Functional,
            Sequential, or of a class with `get_config()`.

    Returns:
        A model of the same class.

    Raises:
        ValueError: `model` is none, cannot be made again from its config, or its copy would not
            predict the same.
    """
    keras_models.refuse_keras_2(model)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model. Received: {model!r} of class {type(model).__name__}. Load a "
            "file with keras.models.load_model first."
        )
    converted = copying.copy(model)
    if model.built:
        copying.verify(model, converted)
    for layer in keras_models.batch_norm_layers(converted).values():
        if type(layer) is keras.layers.BatchNormalization:
            copying.make_ours(layer)
    return converted
