"""Arrays and tensors of every kind that `model.fit` takes, sliced by samples."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models.keras_models import Structure


def number_of_samples(arrays: Structure) -> int:
    """The number of samples in a structure of arrays: the length of their first axis.

    Raises:
        ValueError: If they differ in it, or if one has none.
    """
    shapes = [leaf.shape for leaf in keras.tree.flatten(arrays) if leaf is not None]
    if not all(map(len, shapes)):
        raise ValueError("Expected arrays with a batch axis. Received: a scalar.")
    lengths = {shape[0] for shape in shapes}
    if len(lengths) > 1:
        raise ValueError(
            "Expected all input arrays to have the same number of samples. "
            f"Received: {sorted(lengths)}."
        )
    return lengths.pop()


def to_sliceable(leaf: Any) -> Any:
    """An array that `rows` takes."""
    if hasattr(leaf, "tocsr"):  # SciPy's sparse matrices
        return leaf.tocsr()
    # `asarray` for pandas and for the tensors of other frameworks.
    return leaf if tf.is_tensor(leaf) else np.asarray(leaf)


def rows(array: Any, which: slice | np.ndarray) -> Any:
    """Some samples of a sliceable array, by a slice or by their sorted numbers."""
    if tf.is_tensor(array) and not isinstance(which, slice):
        return tf.gather(array, which)
    return array[which]
