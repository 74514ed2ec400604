"""Validate the data of a sweep against its options and model, and return its batches."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn.models import keras_models
from tfbn.models.keras_models import Structure, inputs_of
from tfbn.sweep.adapters import Source, adapt, is_arrays, number_of_samples
from tfbn.sweep.batches import Batches, NotABatchError, Position, empty, to_tensors, too_short
from tfbn.sweep.options import SweepOptions
from tfbn.sweep.random_order import RandomOrder


def batches(
    x: Any,
    options: SweepOptions,
    model: keras.Model | None = None,
    *,
    may_be_empty: bool = False,
    shard: int = 0,
) -> Batches:
    """Create batches of the inputs in `x`, without targets and sample weights.

    Args:
        x: NumPy arrays or tensors (one, or a list, tuple or dict of them, sliced along
            their first axis); a `tf.data.Dataset`, a `keras.utils.PyDataset` or another
            iterable of batches, whose elements are x, (x, y) or (x, y, sample_weight); a
            `tf.distribute.DistributedDataset`, which yields the batches of the replicas.
        options: `batch_size` requires arrays. Endless data requires `steps` or a `tolerance`.
            With a `tolerance`, data that supports access by sample or batch is read in a random
            order, the same every time.
        model: The model, whose inputs identify unbatched data.
        may_be_empty: Whether to allow data without a batch.
        shard: The number of this shard of the data. Each shard has a different order.

    Raises:
        ValueError: If `x` is not supported by `model.fit`, endless without `steps`, empty unless
            allowed, or shorter than `steps`, if arrays differ in length, or for a `batch_size`
            with data that is already batched.
    """
    batch_size, steps, sample = options.batch_size, options.steps, options.tolerance is not None
    specs = _single_input(model)
    if is_arrays(x):
        _refuse_list_of_batches(x, specs)
    source = adapt(x, batch_size)
    if batch_size is not None and not is_arrays(x):
        raise ValueError(
            f"Expected `batch_size` only with arrays. Received: batch_size={batch_size} with "
            f"{type(x).__name__}."
        )
    endless = source.length == math.inf
    if endless and steps is None and not sample:
        raise _endless(source.kind)
    length = None if source.length is None or endless else int(source.length)
    if length == 0 and not may_be_empty:
        raise empty()
    if length is not None and steps is not None and length < steps:
        raise too_short(steps, length)
    prepare = functools.partial(_prepared, getattr(model, "preprocess_samples", None), specs)
    if source.split:
        read = functools.partial(_parts, source.read, steps)
        return Batches(read, None, prepare=prepare, source=(shard, 0))
    total = length if steps is None else int(steps)
    in_order = Batches(
        source.read,
        total,
        prepare=prepare,
        repeatable=source.repeatable,
        static=source.static,
        steps=steps,
        source=(shard, 0),
    )
    return _in_random_order(source, in_order, shard) if sample and source.take else in_order


def _in_random_order(source: Source, in_order: Batches, shard: int) -> Batches:
    """Return the same data in random order, by sample if supported, else by batch."""
    take, total, size = source.take, in_order.total, source.batch_items
    assert take is not None and total is not None
    order = RandomOrder(min(source.items, total * size), seed=shard)

    def position(number: int) -> Position:
        items = np.sort(order[number * size : (number + 1) * size])
        return Position(number, items) if source.by_sample else Position(int(items[0]))

    def read_from(first: int) -> Iterator[Structure]:
        for number in range(first, total):
            yield take(np.sort(order[number * size : (number + 1) * size]))  # Faster for files.

    return Batches(
        lambda: read_from(0),
        total,
        prepare=in_order.prepare,
        static=in_order.static,
        read_from=read_from,
        population_size=len(order) if source.by_sample else 0,
        source=in_order.source,
        position=position,
    )


def _parts(read: Callable[[], Iterator[list[Structure]]], steps: int | None) -> Iterator[Structure]:
    """Yield the parts of split batches."""
    for parts in itertools.islice(read(), steps):
        for part in parts:
            if number_of_samples(part):  # The last part of a replica may be empty.
                yield part


def _single_input(model: keras.Model | None) -> tf.TensorSpec | None:
    """Return the spec of a model's only input; `None` for several or unknown inputs."""
    specs = None if model is None else keras_models.input_specs(model)
    leaves = keras.tree.flatten(specs)
    return leaves[0] if specs is not None and len(leaves) == 1 else None


def _refuse_list_of_batches(x: Any, spec: tf.TensorSpec | None) -> None:
    if spec is not None and isinstance(x, list | tuple) and len(x) > 1:
        raise ValueError(
            f"Expected one array, for a model with one input. Received: a {type(x).__name__} of "
            f"{len(x)} arrays. To pass batches, use a generator or tf.data.Dataset."
        )


def _prepared(
    preprocess: Callable[[Structure], Structure] | None,
    spec: tf.TensorSpec | None,
    inputs: Structure,
) -> Structure:
    """Convert inputs to the inputs that `fit` passes to the network; preprocess if needed."""
    if preprocess is not None:  # KerasHub's tasks preprocess in `fit`, not in `call`.
        inputs = to_tensors(inputs_of(preprocess(inputs)))
    _check_batch(spec, inputs)
    return inputs


def _check_batch(spec: tf.TensorSpec | None, inputs: Structure) -> None:
    """Raise an error for a sample where a batch is required.

    Keras appends an axis of length 1 to inputs that lack it, which would create a batch.
    """
    leaves = keras.tree.flatten(inputs)
    if spec is None or spec.shape.rank is None or len(leaves) != 1:
        return
    shape, wanted = leaves[0].shape, spec.shape
    lacks_last = wanted[-1] == 1 and wanted[:-1].is_compatible_with(shape)
    is_sample = wanted[1:].is_compatible_with(shape)
    if shape.rank == wanted.rank - 1 and (not lacks_last or (is_sample and wanted.rank > 2)):
        raise NotABatchError(
            f"Expected batches of shape {tuple(wanted)}. Received: an element of shape "
            f"{tuple(shape)}, which has no batch axis. Use `dataset.batch(32)`."
        )


def _endless(kind: str) -> ValueError:
    return ValueError(
        f"Expected data that ends. Received: an endless {kind}, and no `steps`. Set `steps`."
    )
