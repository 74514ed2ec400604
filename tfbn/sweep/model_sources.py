"""Where the processes of a cluster get a model from."""

import os
from collections.abc import Callable

import keras
import tensorflow as tf

from tfbn.models import keras_models

# The path of a `.keras` file, or a function that returns the model.
Source = str | Callable[[], keras.Model]


def check_source(model: str | os.PathLike | Callable[[], keras.Model]) -> Source:
    """The path or function that gives a model in any process.

    Raises:
        ValueError: If it is neither the path of a `.keras` file that exists nor a function.
    """
    keras_models.refuse_keras_2(model)
    known = False
    if isinstance(model, str | os.PathLike):
        known = str(model).endswith(".keras")
        if known and tf.io.gfile.exists(os.fspath(model)):
            return os.fspath(model)
    elif callable(model) and not isinstance(model, keras.Model):
        return model
    raise ValueError(
        "Expected `model` to be the path of a .keras file, or a function without arguments that "
        f"returns the model. Received: model={model!r}"
        + (", which does not exist" if known else "")
        + ". Save the model where all workers can read it."
    )


def load(source: Source) -> keras.Model:
    """The model of a source of `check_source`.

    Raises:
        ValueError: If Keras cannot load the file.
    """
    if callable(source):
        return source()
    try:
        return keras.models.load_model(source, compile=False)
    except Exception as error:
        raise ValueError(
            f"Expected a .keras file that Keras can load. Received: model={source!r}, on which it "
            f"raised {type(error).__name__}: {error} Give a function that returns the model."
        ) from error
