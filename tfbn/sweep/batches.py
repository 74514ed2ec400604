"""Batches of model inputs from whatever `model.fit` takes."""

import collections
import functools
import itertools
import sys
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbn import keras_models
from tfbn.sweep import digests

DEFAULT_BATCH_SIZE = 32  # As in `model.fit`.


class Batch(NamedTuple):
    """A batch of a model's inputs.

    Attributes:
        index: Its number in the data, from 0.
        inputs: A structure of tensors.
        samples: How many samples it has: the length of the first axis of its first input.
        data: The sum of its samples' digests, see `tfbn.sweep.digests`.
        key: Its own digest, other than that of an equal batch before it.
    """

    index: int
    inputs: Any
    samples: int
    data: int
    key: int

    @property
    def number(self):
        """The number from which its random draws follow, an int64 scalar."""
        return tf.constant(self.key - 2**63, tf.int64)

    @property
    def name(self):
        """The words for it in messages."""
        return f"batch {self.index} (counting from 0)"


class Batches:
    """The inputs of a model, a batch at a time, in the order in which the data has them.

    Attributes:
        check: Raises `ValueError` for inputs that are a sample and no batch.
        total: The number of batches, or `None` where only counting them would tell.
        repeatable: Whether they can be iterated over again. A generator cannot.
        static: Whether all are of one size, which `fit` would make a part of the model's trace.
    """

    def __init__(self, elements, total, *, prepare, repeatable=True, static=False, steps=None):
        self._elements = elements
        self.prepare = prepare
        self._steps = steps
        self._begun = None
        self.total = total
        self.repeatable = repeatable
        self.static = static

    def first(self):
        """The first batch, or `None`; the next iteration begins with it, and reads on."""
        if self._begun is None:
            iterator = self._read()
            self._begun = next(iterator, None), iterator
        return self._begun[0]

    def __iter__(self):
        """Yield each `Batch`.

        Raises:
            ValueError, RuntimeError: See the description of the class.
        """
        if self._begun is None:
            yield from self._read()
            return
        (batch, iterator), self._begun = self._begun, None
        if batch is not None:
            yield batch
        yield from iterator

    def in_memory(self, limit):
        """The same batches, read once and held in main memory.

        Raises:
            ValueError: If they take more than `limit` bytes.
        """
        held, taken = [], 0
        for batch in self:
            held.append(batch.inputs)
            taken += nbytes(batch.inputs)
            if taken > limit:
                raise ValueError(
                    "Expected data that can be read several times, or that fits in memory. "
                    f"Received: a generator whose first {len(held)} batches take more than "
                    f"memory_limit={limit} bytes. Pass arrays, a tf.data.Dataset or a PyDataset, "
                    "or raise memory_limit."
                )
        return Batches(lambda: iter(held), len(held), prepare=lambda inputs: inputs)

    def _read(self):
        """Yield each `Batch`.

        Raises:
            ValueError: If the data ends before `steps`, or is not what the model takes.
            RuntimeError: If the data raises an error, from that error.
        """
        iterator = self._elements()
        seen = collections.Counter()
        number = 0
        while number != self._steps:
            try:
                inputs = self.prepare(to_tensors(next(iterator)))
            except StopIteration:
                break
            except _NotABatchError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"Expected batch {number} (counting from 0) of the data. Received: "
                    f"{type(error).__name__}: {error}. Nothing was changed."
                ) from error
            yield _numbered(number, inputs, seen)
            number += 1
        if self._steps is not None and number < self._steps:
            raise _too_short(self._steps, number)


def nbytes(structure):
    """Bytes that a structure of tensors takes."""
    flat = tf.nest.flatten(structure, expand_composites=True)
    return sum(tensor.dtype.size * int(tf.size(tensor)) for tensor in flat)


def _numbered(number, inputs, seen):
    found = digests.of_samples(inputs)
    content = digests.of_batch(found, 0)
    key = digests.of_batch(found, seen[content]) if seen[content] else content
    seen[content] += 1
    return Batch(number, inputs, batch_size_of(inputs), digests.total(found), key)


def batches(x, batch_size=None, steps=None, may_be_empty=False, model=None):
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
        model: The model that they are for, whose inputs tell unbatched data.

    Raises:
        ValueError: If `x` is nothing that `model.fit` takes, is endless and has no
            `steps`, is known to be empty but may not be, has fewer batches than `steps`, has
            arrays of different lengths, or comes in batches of its own and `batch_size` is given
            too.
    """
    check_positive(batch_size=batch_size, steps=steps)
    repeatable, static = True, False
    specs = _single_input(model)
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
        static = _is_static(x.element_spec)
        elements = _from_elements(x)
    elif isinstance(x, tf.distribute.DistributedDataset):
        length = int(x.cardinality)
        if length == tf.data.INFINITE_CARDINALITY and steps is None:
            raise _endless("an endless tf.distribute.DistributedDataset")
        length = length if length >= 0 else None
        elements = _from_replicas(x, steps)
    elif _is_arrays(x):
        _refuse_list_of_batches(x, specs)
        arrays = keras.tree.map_structure(_to_sliceable, x)
        length = samples(arrays)
        size = int(batch_size or DEFAULT_BATCH_SIZE)
        elements = _from_arrays(arrays, size, length)
        length = -(-length // size)
    elif hasattr(x, "__iter__") and not isinstance(x, str | bytes | dict):
        repeatable = iter(x) is not x
        length = len(x) if hasattr(x, "__len__") else None
        if length == sys.maxsize and steps is None:  # As Grain says that it repeats.
            raise _endless(f"an endless {type(x).__name__}")
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
    prepare = functools.partial(_prepared, getattr(model, "preprocess_samples", None), specs)
    options = {"prepare": prepare, "repeatable": repeatable}
    if isinstance(x, tf.distribute.DistributedDataset):  # Each of its batches comes as several.
        return Batches(elements, None, **options)
    total = length if steps is None else int(steps)
    return Batches(elements, total, **options, static=static, steps=steps)


def none():
    """No batches."""
    return Batches(lambda: iter(()), 0, prepare=lambda inputs: inputs)


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
    if not tf.is_tensor(leaf):
        leaf = leaf.toarray() if hasattr(leaf, "toarray") else np.asarray(leaf)
        # As `fit` does it: float64 arrays reach the model in Keras's float type.
        double = leaf.dtype == np.float64
        leaf = tf.convert_to_tensor(leaf, keras.config.floatx() if double else None)
    if leaf.dtype.is_complex:
        raise ValueError(f"Expected real numbers. Received: values of {leaf.dtype.name}")
    return leaf


def samples(arrays):
    """The number of samples in a structure of arrays: the length of their first axis.

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


def batch_size_of(inputs):
    """The number of samples in a batch: the length of the first axis of the first input with one.

    A batch need not have the same length everywhere: a graph has nodes and edges.
    """
    for leaf in keras.tree.flatten(inputs):
        if leaf.shape.rank:
            return int(leaf.shape[0] if leaf.shape[0] is not None else leaf.nrows())
    return 1


def _single_input(model):
    """The spec of the one input of a model, or `None` where it has others or is not known."""
    specs = None if model is None else keras_models.input_specs(model)
    leaves = keras.tree.flatten(specs)
    return leaves[0] if specs is not None and len(leaves) == 1 else None


def _refuse_list_of_batches(x, spec):
    if spec is not None and isinstance(x, list | tuple) and len(x) > 1:
        raise ValueError(
            f"Expected one array, for a model with one input. Received: a {type(x).__name__} of "
            f"{len(x)} arrays, which stands for {len(x)} inputs. To give batches, pass a generator "
            "or a tf.data.Dataset that yields them."
        )


class _NotABatchError(ValueError):
    """A sample where a batch belongs."""


def _prepared(preprocess, spec, inputs):
    """The inputs as `fit` feeds them to the network: preprocessed, where the model does that."""
    if preprocess is not None:  # KerasHub's tasks do it in `fit`, not in their call.
        inputs = to_tensors(_inputs(preprocess(inputs)))
    _check_batch(spec, inputs)
    return inputs


def _check_batch(spec, inputs):
    """Raise an error for a sample where a batch belongs.

    Keras adds a last axis of 1 to inputs that lack one, which makes a batch of such a sample.
    """
    leaves = keras.tree.flatten(inputs)
    if spec is None or spec.shape.rank is None or len(leaves) != 1:
        return
    shape, wanted = leaves[0].shape, spec.shape
    lacks_last = wanted[-1] == 1 and wanted[:-1].is_compatible_with(shape)
    is_sample = wanted[1:].is_compatible_with(shape)
    if shape.rank == wanted.rank - 1 and (not lacks_last or (is_sample and wanted.rank > 2)):
        raise _NotABatchError(
            f"Expected batches of shape {tuple(wanted)}. Received: an element of shape "
            f"{tuple(shape)}, which has no batch axis. Give the data in batches, for example with "
            "`dataset.batch(32)`."
        )


def _is_static(element_spec):
    """Whether all leaves of a dataset's inputs have a batch axis of known length."""
    leaves = keras.tree.flatten(_inputs(element_spec))
    shapes = [getattr(leaf, "shape", tf.TensorShape(None)) for leaf in leaves]
    return bool(shapes) and all(shape.rank and shape[0] is not None for shape in shapes)


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
