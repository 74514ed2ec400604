"""`tfbn.BatchNormalization`: Keras's layer on tfbn's kernels."""

import keras


@keras.saving.register_keras_serializable(package="tfbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """Drop-in for `keras.layers.BatchNormalization`."""
