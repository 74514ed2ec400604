"""One adapter for each kind of data that `model.fit` takes: what a sweep reads from it."""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models.keras_models import Structure, inputs_of
from tfbn.sweep.arrays import ABSENT, is_absent, number_of_samples, rows, to_sliceable

DEFAULT_BATCH_SIZE = 32  # As in `model.fit`.


@dataclasses.dataclass(frozen=True)
class Source:
    """Data as a sweep reads it.

    Attributes:
        kind: The name of the kind of data, for messages.
        read: Returns an iterator over the inputs of each batch.
        length: The number of batches; infinite for endless data, `None` where it is unknown.
        repeatable: Whether `read` can be called again.
        static: Whether all batches have one size, which `fit` makes part of the model's trace.
        split: Whether each batch comes as several, one for each replica.
        population_size: The number of samples that the batches are drawn from at random; 0 if
            they are not.
    """

    kind: str
    read: Callable[[], Iterator[Structure]]
    length: float | None
    repeatable: bool = True
    static: bool = False
    split: bool = False
    population_size: int = 0


def adapt(x: Any, batch_size: int | None = None, *, shuffle: bool = False) -> Source:
    """Return the `Source` for data of any kind.

    Args:
        x: The data.
        batch_size: For arrays; 32 by default.
        shuffle: Whether to draw the samples of arrays in random order.

    Raises:
        ValueError: If `model.fit` does not take such data, or if arrays differ in length.
    """
    if is_arrays(x):
        return _from_arrays(x, int(batch_size or DEFAULT_BATCH_SIZE), shuffle)
    for kind, adapter in _ADAPTERS.items():
        if isinstance(x, kind) and not isinstance(x, str | bytes | dict):
            return adapter(x)
    raise ValueError(
        "Expected data as `model.fit` takes it as x: arrays or tensors (one, a list or a "
        "dict), a tf.data.Dataset, a keras.utils.PyDataset, or an iterable of batches. "
        f"Received: {type(x)}."
    )


def is_arrays(x: Any) -> bool:
    """Whether `x` is an array or a structure of them, whose optional inputs may be `None`."""
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def specs_of(x: tf.data.Dataset) -> Structure:
    """The specs of the inputs in a dataset's batches."""
    specs = inputs_of(x.element_spec)
    return keras.tree.map_structure(lambda spec: ABSENT if is_absent(spec) else spec, specs)


def is_one_shot(x: Any) -> bool:
    """Whether `x` is an iterator, which can be read only once."""
    return hasattr(x, "__next__") and not isinstance(x, keras.utils.PyDataset)


def _from_arrays(x: Structure, size: int, shuffle: bool) -> Source:
    arrays = keras.tree.map_structure(to_sliceable, x)
    length = number_of_samples(arrays)
    order = np.random.default_rng(0).permutation(length) if shuffle else None

    def batch(start: int) -> Structure:
        which: Any = slice(start, start + size)
        if order is not None:
            which = np.sort(order[which])  # A file is read in its order.
        return keras.tree.map_structure(lambda array: rows(array, which), arrays)

    return Source(
        "arrays",
        lambda: map(batch, range(0, length, size)),
        -(-length // size),
        population_size=length if shuffle else 0,
    )


def _from_pydataset(x: keras.utils.PyDataset) -> Source:
    length = x.num_batches
    kind = "PyDataset (its num_batches is None)" if length is None else "PyDataset"

    def read() -> Iterator[Structure]:
        # Not `on_epoch_end`: it may shuffle, and a sweep must not change the order in `fit`.
        for i in itertools.count() if length is None else range(length):
            yield inputs_of(x[i])

    return Source(kind, read, math.inf if length is None else length)


def _from_dataset(x: tf.data.Dataset) -> Source:
    return Source(
        "tf.data.Dataset",
        lambda: map(inputs_of, x),
        _length_of(int(x.cardinality())),
        static=_is_static(x),
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
    name, repeatable = type(x).__name__, iter(x) is not x
    return Source(
        name, lambda: map(inputs_of, x), math.inf if endless else length, repeatable=repeatable
    )


# Kind of data -> its adapter; the first that fits.
_ADAPTERS: dict[type, Callable[[Any], Source]] = {
    keras.utils.PyDataset: _from_pydataset,
    tf.data.Dataset: _from_dataset,
    tf.distribute.DistributedDataset: _from_distributed,
    Iterable: _from_iterable,
}


def _length_of(cardinality: int) -> float | None:
    if cardinality == tf.data.INFINITE_CARDINALITY:
        return math.inf
    return cardinality if cardinality >= 0 else None


def _is_static(x: tf.data.Dataset) -> bool:
    """Whether all leaves of a dataset's inputs have a batch axis of known length."""
    shapes = [spec.shape for spec in keras.tree.flatten(specs_of(x))]
    return bool(shapes) and all(shape.rank and shape[0] is not None for shape in shapes)


def _on_replica(replica: int, leaf: Any) -> Any:
    return leaf.values[replica] if isinstance(leaf, tf.distribute.DistributedValues) else leaf
