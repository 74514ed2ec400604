"""The data of a sweep: whatever `model.fit` takes, as batches of model inputs."""

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
from tfbn.sweep.batches import Batches, NotABatchError, empty, to_tensors, too_short
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
    """Batches of the inputs in `x`; targets and sample weights are dropped.

    Args:
        x: NumPy arrays or tensors (one, or a list, tuple or dict of them, sliced along
            their first axis); a `tf.data.Dataset`, a `keras.utils.PyDataset` or another
            iterable of batches, whose elements are x, (x, y) or (x, y, sample_weight); a
            `tf.distribute.DistributedDataset` of such, whose batches come as those of the
            replicas.
        options: `batch_size` is for arrays alone. Data that does not end needs `steps`, unless
            only the first batches will be taken for a `tolerance`. Then data whose samples or
            batches can be addressed comes in random order, the same every time.
        model: The model that they are for, whose inputs tell unbatched data.
        may_be_empty: Whether no batch at all is fine too.
        shard: The number of this part of the data, if others are swept with it. Each draws in
            another order.

    Raises:
        ValueError: If `x` is nothing that `model.fit` takes, is endless and has no
            `steps`, is known to be empty but may not be, has fewer batches than `steps`, has
            arrays of different lengths, or comes in batches of its own and `batch_size` is given
            too.
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
    """The same data in random order: samples where they can be addressed, else whole batches."""
    take, total, size = source.take, in_order.total, source.batch_items
    assert take is not None and total is not None
    order = RandomOrder(min(source.items, total * size), seed=shard)

    def read_from(first: int) -> Iterator[Structure]:
        for number in range(first, total):
            yield take(np.sort(order[number * size : (number + 1) * size]))  # Files are faster so.

    return Batches(
        lambda: read_from(0),
        total,
        prepare=in_order.prepare,
        static=in_order.static,
        read_from=read_from,
        population_size=len(order) if source.by_sample else 0,
        source=in_order.source,
    )


def _parts(read: Callable[[], Iterator[list[Structure]]], steps: int | None) -> Iterator[Structure]:
    """The parts of batches that come as several."""
    for parts in itertools.islice(read(), steps):
        for part in parts:
            if number_of_samples(part):  # At the end of the data there may be none for a replica.
                yield part


def _single_input(model: keras.Model | None) -> tf.TensorSpec | None:
    """The spec of the one input of a model, or `None` where it has others or is not known."""
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
    """The inputs as `fit` feeds them to the network: preprocessed, where the model does that."""
    if preprocess is not None:  # KerasHub's tasks do it in `fit`, not in their call.
        inputs = to_tensors(inputs_of(preprocess(inputs)))
    _check_batch(spec, inputs)
    return inputs


def _check_batch(spec: tf.TensorSpec | None, inputs: Structure) -> None:
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
        raise NotABatchError(
            f"Expected batches of shape {tuple(wanted)}. Received: an element of shape "
            f"{tuple(shape)}, which has no batch axis. Use `dataset.batch(32)`."
        )


def _endless(kind: str) -> ValueError:
    return ValueError(
        f"Expected data that ends. Received: an endless {kind}, and no `steps`. Set `steps`."
    )
