"""Arrays and tensors of every kind that `model.fit` takes, sliced by samples as `fit` does it."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models.keras_models import Structure

# An optional input that is `None`: a structure without a tensor, so that only the code at both
# ends, which reads data and calls the model, has to treat it.
ABSENT: tuple = ()


def number_of_samples(arrays: Structure) -> int:
    """The number of samples in a structure of arrays: the length of their first axis.

    Raises:
        ValueError: If they differ in it, or if one has none.
    """
    shapes = [leaf.shape for leaf in keras.tree.flatten(arrays)]
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
    """Convert an array to one that `rows` takes."""
    if leaf is None:
        return ABSENT
    if hasattr(leaf, "tocsr"):  # SciPy's sparse matrices
        return leaf.tocsr()
    if hasattr(leaf, "iloc"):
        return _from_pandas(leaf)
    if isinstance(leaf, tf.SparseTensor):
        return _SparseRows(leaf)
    # `asarray` for the tensors of other frameworks.
    return leaf if tf.is_tensor(leaf) else np.asarray(leaf)


def rows(array: Any, which: slice | np.ndarray) -> Any:
    """Some samples of a sliceable array, by a slice or by their sorted numbers."""
    if tf.is_tensor(array) and not isinstance(which, slice):
        return tf.gather(array, which)
    return array[which]


def to_tensor(leaf: Any) -> Any:
    """Convert a leaf of a batch to the tensor that the model gets from `fit`.

    Raises:
        ValueError: If it holds complex numbers.
    """
    if is_absent(leaf):
        return ABSENT
    if not tf.is_tensor(leaf):
        leaf = _from_coo(leaf.tocoo()) if hasattr(leaf, "tocoo") else _from_array(np.asarray(leaf))
    if leaf.dtype.is_complex:
        raise ValueError(f"Expected real numbers. Received: values of {leaf.dtype.name}")
    return leaf


def is_absent(leaf: Any) -> bool:
    """Whether a leaf of a batch, or its spec, is an optional input that is `None`."""
    if isinstance(leaf, tf.TypeSpec):
        return not hasattr(leaf, "shape")
    # Keras turns every `Optional` into `None`.
    return leaf is None or isinstance(leaf, tf.experimental.Optional)


def as_called(inputs: Structure) -> Structure:
    """A batch as a model is called on it, with `None` for the inputs that are absent."""
    if isinstance(inputs, dict):
        return {key: as_called(value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        parts = map(as_called, inputs)
        if hasattr(inputs, "_fields"):
            return type(inputs)(*parts)
        return type(inputs)(parts) if inputs else None
    return inputs


def _from_array(array: np.ndarray) -> tf.Tensor:
    # As in `fit`: floats reach the model in Keras's float type.
    floating = np.issubdtype(array.dtype, np.floating)
    return tf.convert_to_tensor(array, keras.config.floatx() if floating else None)


def _from_coo(matrix: Any) -> tf.SparseTensor:
    indices = np.column_stack([matrix.row, matrix.col]).astype(np.int64)
    return tf.sparse.reorder(tf.SparseTensor(indices, _from_array(matrix.data), matrix.shape))


def _from_pandas(frame: Any) -> np.ndarray:
    if frame.ndim == 1:  # A column, which a Series is.
        return np.expand_dims(frame.to_numpy(), -1)
    floating = [dtype for dtype in frame.dtypes if str(dtype).startswith("float")]
    if floating:  # Columns of several types have a type in common that `to_numpy` would not choose.
        frame = frame.astype(keras.config.floatx())
    return frame.to_numpy()


class _SparseRows:
    """A `tf.SparseTensor` that can be sliced by its first axis.

    Args:
        tensor: The tensor.

    Attributes:
        shape: Its shape.
    """

    def __init__(self, tensor: tf.SparseTensor):
        tensor = tf.sparse.reorder(tensor)
        self.shape = tuple(tensor.shape)
        self._indices = tensor.indices.numpy()
        self._values = tensor.values
        self._ends = np.searchsorted(self._indices[:, 0], np.arange(self.shape[0] + 1))

    def __getitem__(self, which: slice | np.ndarray) -> tf.SparseTensor:
        """The chosen rows, numbered anew."""
        numbers = np.arange(self.shape[0])[which]
        begins, lengths = self._ends[numbers], np.diff(self._ends)[numbers]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        taken = np.repeat(begins, lengths) + within
        new_rows = np.repeat(np.arange(len(numbers)), lengths)
        indices = np.column_stack([new_rows, self._indices[taken, 1:]])
        shape = [len(numbers), *self.shape[1:]]
        return tf.SparseTensor(indices, tf.gather(self._values, taken), shape)
