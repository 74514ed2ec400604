"""Batches of model inputs from whatever `model.fit` takes."""

import functools
import itertools

import keras
import numpy as np
import tensorflow as tf

DEFAULT_BATCH_SIZE = 32  # As in `model.fit`.


class Batches:
    """The inputs of a model, a batch at a time, in the order in which the data has them.

    Attributes:
        total: The number of batches, or `None` where only counting them would tell.
        repeatable: Whether they can be iterated over again. A generator cannot.
    """

    def __init__(self, elements, total, repeatable=True, steps=None, may_be_empty=False):
        self._elements = elements
        self._steps = steps
        self._may_be_empty = may_be_empty
        self._samples = None
        self.total = total
        self.repeatable = repeatable

    def __iter__(self):
        """Yield the inputs, as tensors.

        Raises:
            ValueError: If the data ends before the first batch (unless it may be empty) or
                before `steps`, or holds another number of samples than it did the last time.
            RuntimeError: If the data raises an error, from that error.
        """
        iterator = self._elements()
        number = size = 0
        while number != self._steps:
            try:
                inputs = to_tensors(next(iterator))
                size += samples(inputs)
            except StopIteration:
                break
            except Exception as error:
                raise RuntimeError(
                    f"Expected batch {number} (counting from 0) of the data. Received: "
                    f"{type(error).__name__}: {error}. Nothing was changed."
                ) from error
            number += 1
            yield inputs
        if number == 0 and not self._may_be_empty:
            raise empty()
        if self._steps is not None and number < self._steps:
            raise _too_short(self._steps, number)
        if self._samples not in (None, size):
            raise ValueError(
                "Expected the same data in every pass. Received: "
                f"{self._samples} samples and then {size}. Use data that does not change "
                "from one iteration to the next."
            )
        self._samples = size

    def in_memory(self, limit):
        """The same batches, read once and held in main memory.

        Raises:
            ValueError: If they take more than `limit` bytes.
        """
        held, taken = [], 0
        for inputs in self:
            held.append(inputs)
            taken += nbytes(inputs)
            if taken > limit:
                raise ValueError(
                    "Expected data that can be read several times, or that fits in memory. "
                    f"Received: a generator whose first {len(held)} batches take more than "
                    f"memory_limit={limit} bytes. Pass arrays, a tf.data.Dataset or a PyDataset, "
                    "or raise memory_limit."
                )
        return Batches(lambda: iter(held), len(held), may_be_empty=self._may_be_empty)


def batches(x, batch_size=None, steps=None, may_be_empty=False):
    """Batches of the inputs in `x`; targets and sample weights are dropped.

    Args:
        x: NumPy arrays or tensors (one, or a list, tuple or dict of them, sliced along
            their first axis); a `tf.data.Dataset`, a `keras.utils.PyDataset` or another
            iterable of batches, whose elements are x, (x, y) or (x, y, sample_weight); a
            `tf.distribute.DistributedDataset` of such, whose batches come as those of the
            replicas.
        batch_size: Only for arrays; 32 by default. Other data has batches of its own.
        steps: How many batches make the data; all there are by default. Data that has no
            end needs it.
        may_be_empty: Whether no batch at all is fine too.

    Raises:
        ValueError: If `x` is nothing that `model.fit` takes, is endless and has no
            `steps`, is empty but may not be, has fewer batches than `steps`, has arrays of
            different lengths, or comes in batches of its own and `batch_size` is given too.
    """
    check_positive(batch_size=batch_size, steps=steps)
    repeatable = True
    if isinstance(x, keras.utils.PyDataset):
        length = x.num_batches
        if length is None and steps is None:
            raise _endless("an endless PyDataset (its num_batches is None)")
        elements = _from_pydataset(x, steps or length)
    elif isinstance(x, tf.data.Dataset):
        length = int(x.cardinality())
        if length == tf.data.INFINITE_CARDINALITY and steps is None:
            raise _endless("an endless tf.data.Dataset")
        length = length if length >= 0 else None
        elements = _from_elements(x)
    elif isinstance(x, tf.distribute.DistributedDataset):
        length = int(x.cardinality)
        if length == tf.data.INFINITE_CARDINALITY and steps is None:
            raise _endless("an endless tf.distribute.DistributedDataset")
        length = length if length >= 0 else None
        elements = _from_replicas(x, steps)
    elif _is_arrays(x):
        arrays = keras.tree.map_structure(_to_sliceable, x)
        length = samples(arrays)
        size = int(batch_size or DEFAULT_BATCH_SIZE)
        elements = _from_arrays(arrays, size, length)
        length = -(-length // size)
    elif hasattr(x, "__iter__") and not isinstance(x, str | bytes | dict):
        repeatable = iter(x) is not x
        length = len(x) if hasattr(x, "__len__") else None
        elements = _from_elements(x)
    else:
        raise ValueError(
            "Expected what `model.fit` takes as x: arrays or tensors (one, a list or a dict), a "
            "tf.data.Dataset, a keras.utils.PyDataset, or an iterable of batches. "
            f"Received: {type(x)}."
        )
    if batch_size is not None and not _is_arrays(x):
        raise ValueError(
            "Expected `batch_size` only with arrays and tensors. Received: "
            f"batch_size={batch_size} with {type(x).__name__}, which has batches of its own. "
            "Leave it out."
        )
    if length == 0 and not may_be_empty:
        raise empty()
    if None not in (length, steps) and length < steps:
        raise _too_short(steps, length)
    if isinstance(x, tf.distribute.DistributedDataset):  # Each of its batches comes as several.
        return Batches(elements, None, may_be_empty=may_be_empty)
    total = length if steps is None else int(steps)
    return Batches(elements, total, repeatable, steps, may_be_empty)


def check_positive(**values):
    """Raise `ValueError` unless all are positive integers or `None`."""
    for name, value in values.items():
        if value is not None and (value != int(value) or value < 1):
            raise ValueError(f"Expected {name} to be a positive integer. Received: {value!r}.")


def _from_pydataset(dataset, length):
    # Not `on_epoch_end`: it may shuffle, and a sweep must not change what `fit` sees.
    return lambda: (_inputs(dataset[i]) for i in range(length))


def _from_elements(iterable):
    return lambda: (_inputs(element) for element in iterable)


def _from_replicas(dataset, steps):
    def parts():
        for element in itertools.islice(dataset, steps):
            inputs = _inputs(element)
            several = [
                leaf.values
                for leaf in keras.tree.flatten(inputs)
                if isinstance(leaf, tf.distribute.DistributedValues)
            ]
            for replica in range(len(several[0]) if several else 1):
                part = keras.tree.map_structure(functools.partial(_on_replica, replica), inputs)
                if samples(part):  # At the end of the data there may be nothing left for it.
                    yield part

    return parts


def _on_replica(replica, leaf):
    return leaf.values[replica] if isinstance(leaf, tf.distribute.DistributedValues) else leaf


def _from_arrays(arrays, size, length):
    def batch(start):
        return keras.tree.map_structure(lambda array: array[start : start + size], arrays)

    return lambda: (batch(start) for start in range(0, length, size))


def _inputs(element):
    return keras.utils.unpack_x_y_sample_weight(element)[0]


def _is_arrays(x):
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _to_sliceable(leaf):
    if hasattr(leaf, "tocsr"):  # SciPy's sparse matrices
        return leaf.tocsr()
    # `asarray` for pandas and for the tensors of other frameworks.
    return leaf if tf.is_tensor(leaf) else np.asarray(leaf)


def to_tensors(inputs):
    """A batch as the model gets it from `fit`."""
    return keras.tree.map_structure(_to_tensor, inputs)


def _to_tensor(leaf):
    if tf.is_tensor(leaf):
        return leaf
    leaf = leaf.toarray() if hasattr(leaf, "toarray") else np.asarray(leaf)
    # As `fit` does it: float64 arrays reach the model in Keras's float type.
    return tf.convert_to_tensor(leaf, keras.config.floatx() if leaf.dtype == np.float64 else None)


def samples(arrays):
    """The number of samples in a structure of arrays or tensors: the length of their first axis.

    Raises:
        ValueError: If they differ in it, or if one has none.
    """
    lengths = {leaf.shape[0] if len(leaf.shape) else None for leaf in keras.tree.flatten(arrays)}
    if None in lengths:
        raise ValueError("Expected arrays with a batch axis. Received: a scalar.")
    if len(lengths) > 1:
        raise ValueError(
            "Expected all input arrays to have the same number of samples. "
            f"Received: {sorted(lengths)}."
        )
    return lengths.pop()


def empty():
    """The error to raise for data without a batch."""
    return ValueError(
        "Expected data with at least one batch. Received: data that yields nothing. Pass the "
        "training data; a generator that was used up must be made anew."
    )


def _endless(kind):
    return ValueError(
        f"Expected data that ends. Received: {kind}, and no `steps`. Say with `steps` how many "
        "batches make the training data."
    )


def _too_short(steps, seen):
    return ValueError(
        f"Expected steps={steps} batches. Received: data that ends after {seen}. Lower `steps`, "
        "or leave it out to take all there is."
    )


def nbytes(structure):
    """Bytes that a structure of tensors takes."""
    flat = tf.nest.flatten(structure, expand_composites=True)
    return sum(tensor.dtype.size * int(tf.size(tensor)) for tensor in flat)
