"""What must be true of the installation before anything else is imported.

tfbn does not require a TensorFlow distribution by name, because `tensorflow` and
`tensorflow-cpu` provide the same package and pip would install one over the other.
So its absence shows at import, and must be said clearly there.
"""

import importlib.util


def check():
    """Raise one clear `ImportError` unless Keras 3 runs on TensorFlow here."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "tfbn needs TensorFlow. Received: an environment without it. Install one of "
            "its distributions: `pip install 'tfbn[tensorflow]'`, or "
            "`pip install 'tfbn[tensorflow-cpu]'` for machines without a GPU."
        )
    import keras

    if not keras.__version__.startswith("3."):
        raise ImportError(
            f"tfbn needs Keras 3. Received: Keras {keras.__version__}. "
            "Run `pip install --upgrade keras`."
        )
    if keras.backend.backend() != "tensorflow":
        raise ImportError(
            "tfbn needs Keras to run on TensorFlow. "
            f"Received: the Keras backend {keras.backend.backend()!r}. Set the environment "
            "variable KERAS_BACKEND=tensorflow before Keras is imported, or change "
            "'backend' in ~/.keras/keras.json."
        )
