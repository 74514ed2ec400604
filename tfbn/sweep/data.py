"""The data of a sweep: whatever `model.fit` takes, as batches of model inputs."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn import arguments, keras_models
from tfbn.keras_models import Structure
from tfbn.sweep.batches import Batches, NotABatchError, empty, to_tensors, too_short

DEFAULT_BATCH_SIZE = 32  # As in `model.fit`.


def batches(
    x: Any,
    batch_size: int | None = None,
    steps: int | None = None,
    may_be_empty: bool = False,
    model: keras.Model | None = None,
    sample: bool = False,
) -> Batches:
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
        sample: Whether only the first ones will be taken. Then arrays come in random order, the
            same every time, and other data may be endless.

    Raises:
        ValueError: If `x` is nothing that `model.fit` takes, is endless and has no
            `steps`, is known to be empty but may not be, has fewer batches than `steps`, has
            arrays of different lengths, or comes in batches of its own and `batch_size` is given
            too.
    """
    arguments.positive(batch_size=batch_size, steps=steps)
    repeatable, static, population_size = True, False, 0
    specs = _single_input(model)
    if isinstance(x, keras.utils.PyDataset):
        length = x.num_batches
        if length is None and steps is None and not sample:
            raise _endless("an endless PyDataset (its num_batches is None)")
        elements = _from_pydataset(x, steps or length)
    elif isinstance(x, tf.data.Dataset):
        length = int(x.cardinality())
        if length == tf.data.INFINITE_CARDINALITY and steps is None and not sample:
            raise _endless("an endless tf.data.Dataset")
        length = length if length >= 0 else None
        static = _is_static(x.element_spec)
        elements = _from_elements(x)
    elif isinstance(x, tf.distribute.DistributedDataset):
        length = int(x.cardinality)
        if length == tf.data.INFINITE_CARDINALITY and steps is None and not sample:
            raise _endless("an endless tf.distribute.DistributedDataset")
        length = length if length >= 0 else None
        elements = _from_replicas(x, steps)
    elif _is_arrays(x):
        _refuse_list_of_batches(x, specs)
        arrays = keras.tree.map_structure(_to_sliceable, x)
        length = samples(arrays)
        size = int(batch_size or DEFAULT_BATCH_SIZE)
        population_size = length if sample else 0
        elements = _from_arrays(arrays, size, length, shuffle=sample)
        length = -(-length // size)
    elif hasattr(x, "__iter__") and not isinstance(x, str | bytes | dict):
        repeatable = iter(x) is not x
        length = len(x) if hasattr(x, "__len__") else None
        if length == sys.maxsize:  # As Grain says that it repeats.
            if steps is None and not sample:
                raise _endless(f"an endless {type(x).__name__}")
            length = None
        elements = _from_elements(x)
    else:
        raise ValueError(
            "Expected data as `model.fit` takes it as x: arrays or tensors (one, a list or a "
            "dict), a tf.data.Dataset, a keras.utils.PyDataset, or an iterable of batches. "
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
    if length is not None and steps is not None and length < steps:
        raise too_short(steps, length)
    prepare = functools.partial(_prepared, getattr(model, "preprocess_samples", None), specs)
    if isinstance(x, tf.distribute.DistributedDataset):  # Each of its batches comes as several.
        return Batches(elements, None, prepare=prepare)
    return Batches(
        elements,
        length if steps is None else int(steps),
        prepare=prepare,
        repeatable=repeatable,
        static=static,
        population_size=population_size,
        steps=steps,
    )


def _from_pydataset(
    dataset: keras.utils.PyDataset, length: int | None
) -> Callable[[], Iterator[Structure]]:
    # Not `on_epoch_end`: it may shuffle, and a sweep must not change the order that `fit` sees.
    return lambda: (
        _inputs(dataset[i]) for i in (itertools.count() if length is None else range(length))
    )


def _from_elements(iterable: Iterable) -> Callable[[], Iterator[Structure]]:
    return lambda: (_inputs(element) for element in iterable)


def _from_replicas(
    dataset: tf.distribute.DistributedDataset, steps: int | None
) -> Callable[[], Iterator[Structure]]:
    def parts() -> Iterator[Structure]:
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


def _on_replica(replica: int, leaf: Any) -> Any:
    return leaf.values[replica] if isinstance(leaf, tf.distribute.DistributedValues) else leaf


def _from_arrays(
    arrays: Structure, size: int, length: int, *, shuffle: bool
) -> Callable[[], Iterator[Structure]]:
    order = np.random.default_rng(0).permutation(length) if shuffle else None

    def batch(start):
        end = start + size
        if order is None:
            return keras.tree.map_structure(lambda array: array[start:end], arrays)
        drawn = np.sort(order[start:end])  # A file is read in its order.
        return keras.tree.map_structure(functools.partial(_rows, drawn), arrays)

    return lambda: (batch(start) for start in range(0, length, size))


def _rows(drawn: np.ndarray, array: Any) -> Any:
    return tf.gather(array, drawn) if tf.is_tensor(array) else array[drawn]


def _inputs(element: Structure) -> Structure:
    return keras.utils.unpack_x_y_sample_weight(element)[0]


def _is_arrays(x: Any) -> bool:
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _to_sliceable(leaf: Any) -> Any:
    if hasattr(leaf, "tocsr"):  # SciPy's sparse matrices
        return leaf.tocsr()
    # `asarray` for pandas and for the tensors of other frameworks.
    return leaf if tf.is_tensor(leaf) else np.asarray(leaf)


def samples(arrays: Structure) -> int:
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


def _single_input(model: keras.Model | None) -> tf.TensorSpec | None:
    """The spec of the one input of a model, or `None` where it has others or is not known."""
    specs = None if model is None else keras_models.input_specs(model)
    leaves = keras.tree.flatten(specs)
    return leaves[0] if specs is not None and len(leaves) == 1 else None


def _refuse_list_of_batches(x: Any, spec: tf.TensorSpec | None) -> None:
    if spec is not None and isinstance(x, list | tuple) and len(x) > 1:
        raise ValueError(
            f"Expected one array, for a model with one input. Received: a {type(x).__name__} of "
            f"{len(x)} arrays, which stands for {len(x)} inputs. To give batches, pass a generator "
            "or a tf.data.Dataset that yields them."
        )


def _prepared(
    preprocess: Callable[[Structure], Structure] | None,
    spec: tf.TensorSpec | None,
    inputs: Structure,
) -> Structure:
    """The inputs as `fit` feeds them to the network: preprocessed, where the model does that."""
    if preprocess is not None:  # KerasHub's tasks do it in `fit`, not in their call.
        inputs = to_tensors(_inputs(preprocess(inputs)))
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
            f"{tuple(shape)}, which has no batch axis. Give the data in batches, for example with "
            "`dataset.batch(32)`."
        )


def _is_static(element_spec: Structure) -> bool:
    """Whether all leaves of a dataset's inputs have a batch axis of known length."""
    leaves = keras.tree.flatten(_inputs(element_spec))
    shapes = [getattr(leaf, "shape", tf.TensorShape(None)) for leaf in leaves]
    return bool(shapes) and all(shape.rank and shape[0] is not None for shape in shapes)


def _endless(kind: str) -> ValueError:
    return ValueError(
        f"Expected data that ends. Received: {kind}, and no `steps`. Say with `steps` how many "
        "batches make the training data."
    )
