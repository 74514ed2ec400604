"""Convert each kind of data that `model.fit` takes to the tensors that `fit` reads."""

import dataclasses
import functools
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models.keras_models import Structure, inputs_of

DEFAULT_BATCH_SIZE = 32  # As in `model.fit`.
# An optional input that is `None`: a structure without a tensor, so that only the code that reads
# data and the code that calls the model handle it.
ABSENT: tuple = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """Data for a sweep.

    Attributes:
        kind: Name of the kind of data, for messages.
        read: Function that returns an iterator over the inputs of each batch.
        length: Number of batches; infinite for endless data, `None` if unknown.
        repeatable: Whether `read` can be called again.
        static: Whether all batches have one size, which `fit` includes in the model's trace.
        split: Whether each element is a list of batches, one for each replica.
        take: Function from item numbers, ascending, to their batch. Items are samples of arrays,
            or batches of other data. `None` for a stream.
        items: Number of items.
        batch_items: Number of items in a batch.
        by_sample: Whether an item is a sample.
    """

    kind: str
    read: Callable[[], Iterator[Structure]]
    length: float | None
    repeatable: bool = True
    static: bool = False
    split: bool = False
    take: Callable[[np.ndarray], Structure] | None = None
    items: int = 0
    batch_items: int = 1
    by_sample: bool = False


@dataclasses.dataclass(frozen=True)
class NumberedSamples:
    """Samples that can be read by number, and faster in order.

    Attributes:
        batches: All samples in order.
        take: Function from sample numbers to their batch.
        number: Number of samples.
        batch_size: Number of samples in a batch.
    """

    batches: tf.data.Dataset
    take: Callable[[np.ndarray], Structure]
    number: int
    batch_size: int

    def __iter__(self) -> Iterator[Structure]:
        """Iterate over the batches."""
        return iter(self.batches)


def adapt(x: Any, batch_size: int | None = None) -> Source:
    """Return the `Source` for data of any kind.

    Args:
        x: The data.
        batch_size: For arrays; 32 by default.

    Raises:
        ValueError: If `model.fit` does not take such data, or if arrays differ in length.
    """
    if is_arrays(x):
        return _from_arrays(x, int(batch_size or DEFAULT_BATCH_SIZE))
    for kind, adapter in _ADAPTERS.items():
        if isinstance(x, kind) and not isinstance(x, str | bytes | dict):
            return adapter(x)
    raise ValueError(
        f"Expected data as `model.fit` takes it: arrays, a dataset or batches. Received: {type(x)}."
    )


def is_arrays(x: Any) -> bool:
    """Return whether `x` is an array, or a structure of arrays and `None`."""
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def specs_of(x: tf.data.Dataset) -> Structure:
    """Return the specs of the inputs in a dataset's batches."""
    specs = inputs_of(x.element_spec)
    return keras.tree.map_structure(lambda spec: ABSENT if is_absent(spec) else spec, specs)


def is_one_shot(x: Any) -> bool:
    """Return whether `x` is an iterator, which can be read only once."""
    return hasattr(x, "__next__") and not isinstance(x, keras.utils.PyDataset)


def _from_arrays(x: Structure, size: int) -> Source:
    arrays = keras.tree.map_structure(to_sliceable, x)
    length = number_of_samples(arrays)

    def take(which: slice | np.ndarray) -> Structure:
        return keras.tree.map_structure(lambda array: rows(array, which), arrays)

    return Source(
        "arrays",
        lambda: (take(slice(start, start + size)) for start in range(0, length, size)),
        -(-length // size),
        take=take,
        items=length,
        batch_items=size,
        by_sample=True,
    )


def _from_pydataset(x: keras.utils.PyDataset) -> Source:
    # Not `on_epoch_end`: it may shuffle, and a sweep must not change the order in `fit`.
    length = x.num_batches
    if length is None:
        kind = "PyDataset (its num_batches is None)"
        return Source(kind, lambda: (inputs_of(x[i]) for i in itertools.count()), math.inf)
    return _from_sequence(x, length)


def _from_sequence(x: Any, length: int) -> Source:
    """Return the `Source` for data that can be indexed by batch."""
    return Source(
        type(x).__name__,
        lambda: (inputs_of(x[i]) for i in range(length)),
        length,
        take=lambda numbers: inputs_of(x[int(numbers[0])]),
        items=length,
    )


def _from_dataset(x: tf.data.Dataset) -> Source:
    return Source(
        "tf.data.Dataset",
        lambda: map(inputs_of, x),
        _length_of(int(x.cardinality())),
        static=_is_static(x),
    )


def _from_numbered(x: NumberedSamples) -> Source:
    return dataclasses.replace(
        _from_dataset(x.batches),
        take=lambda which: inputs_of(x.take(which)),
        items=x.number,
        batch_items=x.batch_size,
        by_sample=True,
    )


def _from_distributed(x: tf.distribute.DistributedDataset) -> Source:
    def read() -> Iterator[Structure]:
        for element in x:
            inputs = inputs_of(element)
            several = [
                leaf.values
                for leaf in keras.tree.flatten(inputs)
                if isinstance(leaf, tf.distribute.DistributedValues)
            ]
            yield [
                keras.tree.map_structure(functools.partial(_on_replica, i), inputs)
                for i in range(len(several[0]) if several else 1)
            ]

    length = _length_of(int(x.cardinality))
    return Source("tf.distribute.DistributedDataset", read, length, split=True)


def _from_iterable(x: Iterable) -> Source:
    length = len(x) if isinstance(x, Sized) else None
    endless = length == sys.maxsize  # Grain's datasets that repeat.
    if length is not None and not endless and _has_numbers(x):
        numbered = _from_sequence(x, length)
        return dataclasses.replace(numbered, read=lambda: map(inputs_of, x))
    name, repeatable = type(x).__name__, _is_repeatable(x)
    return Source(
        name, lambda: map(inputs_of, x), math.inf if endless else length, repeatable=repeatable
    )


def _has_numbers(x: Any) -> bool:
    """Return whether `x[i]` is the element that iteration yields at position i."""
    return hasattr(x, "__getitem__") and not isinstance(x, Mapping) and not is_one_shot(x)


def _is_repeatable(x: Iterable) -> bool:
    first = iter(x)
    # `__iter__` creates a new generator in each call, unless it returns one that it stores.
    holds = isinstance(first, types.GeneratorType) and iter(x) is first
    return first is not x and not holds


# Type of data -> adapter; the first match is used.
_ADAPTERS: dict[type, Callable[[Any], Source]] = {
    keras.utils.PyDataset: _from_pydataset,
    tf.data.Dataset: _from_dataset,
    NumberedSamples: _from_numbered,
    tf.distribute.DistributedDataset: _from_distributed,
    Iterable: _from_iterable,
}


def _length_of(cardinality: int) -> float | None:
    if cardinality == tf.data.INFINITE_CARDINALITY:
        return math.inf
    return cardinality if cardinality >= 0 else None


def _is_static(x: tf.data.Dataset) -> bool:
    """Return whether all inputs of a dataset have a batch axis of known length."""
    shapes = [spec.shape for spec in keras.tree.flatten(specs_of(x))]
    return bool(shapes) and all(shape.rank and shape[0] is not None for shape in shapes)


def _on_replica(replica: int, leaf: Any) -> Any:
    return leaf.values[replica] if isinstance(leaf, tf.distribute.DistributedValues) else leaf


def number_of_samples(arrays: Structure) -> int:
    """Return the number of samples in a structure of arrays: the length of the first axis.

    Raises:
        ValueError: If the lengths differ, or for a scalar.
    """
    shapes = [leaf.shape for leaf in keras.tree.flatten(arrays)]
    if not all(map(len, shapes)):
        raise ValueError("Expected arrays with a batch axis. Received: a scalar.")
    lengths = {shape[0] for shape in shapes}
    if len(lengths) > 1:
        raise ValueError(
            f"Expected inputs with the same number of samples. Received: {sorted(lengths)}."
        )
    return lengths.pop()


def to_sliceable(leaf: Any) -> Any:
    """Convert an array to one that `rows` supports."""
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
    """Return some samples of a sliceable array, by a slice or by sorted numbers."""
    if tf.is_tensor(array) and not isinstance(which, slice):
        return tf.gather(array, which)
    return array[which]


def to_tensor(leaf: Any) -> Any:
    """Convert a leaf of a batch to the tensor that `fit` passes to the model.

    Raises:
        ValueError: For complex numbers.
    """
    if is_absent(leaf):
        return ABSENT
    if not tf.is_tensor(leaf):
        leaf = _from_coo(leaf.tocoo()) if hasattr(leaf, "tocoo") else _from_array(np.asarray(leaf))
    if leaf.dtype.is_complex:
        raise ValueError(f"Expected real numbers. Received: values of {leaf.dtype.name}")
    return leaf


def is_absent(leaf: Any) -> bool:
    """Return whether a leaf of a batch, or its spec, is an optional input that is `None`."""
    if isinstance(leaf, tf.TypeSpec):
        return not hasattr(leaf, "shape")
    # Keras turns every `Optional` into `None`.
    return leaf is None or isinstance(leaf, tf.experimental.Optional)


def _from_array(array: np.ndarray) -> tf.Tensor:
    # Like `fit`, convert floats to Keras's float type.
    floating = np.issubdtype(array.dtype, np.floating)
    # The host computes digests and looks for NaN, so a GPU would copy the data back.
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(array, keras.config.floatx() if floating else None)


def _from_coo(matrix: Any) -> tf.SparseTensor:
    indices = np.column_stack([matrix.row, matrix.col]).astype(np.int64)
    return tf.sparse.reorder(tf.SparseTensor(indices, _from_array(matrix.data), matrix.shape))


def _from_pandas(frame: Any) -> np.ndarray:
    if frame.ndim == 1:  # A column, which a Series is.
        return np.expand_dims(frame.to_numpy(), -1)
    floating = [dtype for dtype in frame.dtypes if str(dtype).startswith("float")]
    if floating:  # `to_numpy` would choose another type for columns of several types.
        frame = frame.astype(keras.config.floatx())
    return frame.to_numpy()


class _SparseRows:
    """A `tf.SparseTensor` that supports slices of its first axis.

    Args:
        tensor: The tensor.

    Attributes:
        shape: The shape of the tensor.
    """

    def __init__(self, tensor: tf.SparseTensor):
        tensor = tf.sparse.reorder(tensor)
        self.shape = tuple(tensor.shape)
        self._indices = tensor.indices.numpy()
        self._values = tensor.values
        self._ends = np.searchsorted(self._indices[:, 0], np.arange(self.shape[0] + 1))

    def __getitem__(self, which: slice | np.ndarray) -> tf.SparseTensor:
        """Return the chosen rows, renumbered from 0."""
        numbers = np.arange(self.shape[0])[which]
        begins, lengths = self._ends[numbers], np.diff(self._ends)[numbers]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        taken = np.repeat(begins, lengths) + within
        new_rows = np.repeat(np.arange(len(numbers)), lengths)
        indices = np.column_stack([new_rows, self._indices[taken, 1:]])
        shape = [len(numbers), *self.shape[1:]]
        return tf.SparseTensor(indices, tf.gather(self._values, taken), shape)
