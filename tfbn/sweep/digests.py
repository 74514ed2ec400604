"""Digests of data, by which the same samples are known again in another order or another pass."""

import hashlib

import numpy as np
import tensorflow as tf


def of_samples(inputs):
    """A 64-bit digest of every sample of a batch.

    Inputs whose first axes differ (a graph's nodes and edges), ragged and sparse ones are not
    taken apart: the whole batch has one digest.

    Args:
        inputs: A structure of tensors.

    Returns:
        An array of `uint64`.
    """
    leaves = tf.nest.flatten(inputs, expand_composites=True)
    sizes = {leaf.shape[0] if leaf.shape.rank else None for leaf in leaves}
    composite = len(leaves) != len(tf.nest.flatten(inputs))
    if len(sizes) > 1 or None in sizes or composite:
        shapes = tf.constant([str(leaf.shape) for leaf in leaves])
        leaves = [tf.reshape(leaf, [1, -1]) for leaf in (shapes, *leaves)]
    columns = [tf.fingerprint(leaf) for leaf in leaves]
    column = columns[0] if len(columns) == 1 else tf.fingerprint(tf.concat(columns, 1))
    return column.numpy().view(np.uint64)[:, 0]


def total(digests):
    """The sum of digests modulo 2^64, which depends neither on their order nor on batches."""
    return int(digests.sum(dtype=np.uint64))


def of_batch(digests, occurrence):
    """A 64-bit digest of a batch: of its samples in their order.

    Args:
        digests: Of its samples.
        occurrence: How many batches of the same samples came before it.
    """
    content = hashlib.blake2b(digests.tobytes(), digest_size=8)
    content.update(str(occurrence).encode())
    return int.from_bytes(content.digest(), "little")


def of_sequence(before, key):
    """A digest of a batch and, by their own, of all before it; `b""` is that of none."""
    return hashlib.sha256(before + key.to_bytes(8, "little")).digest()
