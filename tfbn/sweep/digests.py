"""Digests of data, by which the same samples are known again in another order or another pass."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tfbn.models.keras_models import Structure


def of_samples(inputs: Structure) -> np.ndarray:
    """A 64-bit digest of every sample of a batch.

    Inputs whose first axes differ (a graph's nodes and edges) are not taken apart: the whole batch
    has one digest.

    Args:
        inputs: A structure of tensors.

    Returns:
        An array of `uint64`.
    """
    leaves = tf.nest.flatten(inputs)
    sizes = {_samples(leaf) for leaf in leaves}
    if len(sizes) == 1 and None not in sizes:
        columns = [_of_rows(leaf) for leaf in leaves]
    else:
        leaves = tf.nest.flatten(inputs, expand_composites=True)
        shapes = tf.constant([str(leaf.shape) for leaf in leaves])
        columns = [tf.fingerprint(tf.reshape(leaf, [1, -1])) for leaf in (shapes, *leaves)]
    column = columns[0] if len(columns) == 1 else tf.fingerprint(tf.concat(columns, 1))
    return column.numpy().view(np.uint64)[:, 0]


def _samples(leaf: tf.Tensor) -> int | None:
    """The length of a tensor's first axis, if it has one."""
    if not leaf.shape.rank:
        return None
    if isinstance(leaf, tf.RaggedTensor):
        return int(leaf.nrows())
    return int(leaf.shape[0])


def _of_rows(leaf: tf.Tensor) -> tf.Tensor:
    if isinstance(leaf, tf.RaggedTensor):
        return tf.fingerprint(tf.constant(list(_ragged_rows(leaf)), tf.string))
    if isinstance(leaf, tf.SparseTensor):
        return tf.fingerprint(tf.constant(list(_sparse_rows(leaf)), tf.string))
    return tf.fingerprint(leaf)


def _ragged_rows(leaf: tf.RaggedTensor) -> Iterator[bytes]:
    splits = [level.numpy() for level in leaf.nested_row_splits]
    values = tf.fingerprint(leaf.flat_values).numpy()
    for row in range(int(leaf.nrows())):
        begin, end, lengths = row, row + 1, []
        for level in splits:
            lengths.append(np.diff(level[begin : end + 1]).tobytes())
            begin, end = level[begin], level[end]
        yield b"".join([*lengths, values[begin:end].tobytes()])


def _sparse_rows(leaf: tf.SparseTensor) -> Iterator[bytes]:
    indices, values = leaf.indices.numpy(), tf.fingerprint(leaf.values).numpy()
    order = np.argsort(indices[:, 0], kind="stable")
    indices, values = indices[order], values[order]
    ends = np.searchsorted(indices[:, 0], np.arange(leaf.shape[0] + 1))
    for begin, end in itertools.pairwise(ends):
        yield indices[begin:end, 1:].tobytes() + values[begin:end].tobytes()


def total(digests: np.ndarray) -> int:
    """The sum of digests modulo 2^64, which depends neither on their order nor on batches."""
    return int(digests.sum(dtype=np.uint64))


def of_batch(digests: np.ndarray, occurrence: int = 0, source: tuple[int, int] = (0, 0)) -> int:
    """A 64-bit digest of a batch: of its samples in their order.

    Args:
        digests: Of its samples.
        occurrence: How many batches of the same samples came before it.
        source: See `tfbn.sweep.batches.Batches`.
    """
    content = hashlib.blake2b(digests.tobytes(), digest_size=8)
    content.update(repr((occurrence, *source)).encode())
    return int.from_bytes(content.digest(), "little")


def of_sequence(before: bytes, key: int) -> bytes:
    """A digest of a batch and, by their own, of all before it; `b""` is that of none."""
    return hashlib.sha256(before + key.to_bytes(8, "little")).digest()
