"""Tests of the digests that identify data."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfbn.sweep import batches


def total(inputs):
    """Return the digest of some data."""
    return batches.sum_of_digests(batches.sample_digests(inputs))


def samples(n, seed=0, dtype="float32"):
    """Draw two-dimensional samples."""
    return (np.random.default_rng(seed).normal(size=(n, 3, 2)) * 100).astype(dtype)


@settings(max_examples=25)
@given(st.permutations(range(12)), st.integers(1, 11))
def test_order_and_batches_do_not_matter(order, cut):
    x = {"a": samples(12), "b": samples(12, 1)[:, 0]}
    moved = {name: tf.constant(value[list(order)]) for name, value in x.items()}
    parts = [{k: v[:cut] for k, v in moved.items()}, {k: v[cut:] for k, v in moved.items()}]
    whole = total({name: tf.constant(value) for name, value in x.items()})
    assert sum(total(part) for part in parts) % 2**64 == whole == total(moved)


def moved(x):
    """Swap one value between two samples."""
    x[0, 0, 0], x[1, 0, 0] = x[1, 0, 0], x[0, 0, 0]
    return x


CHANGES = {
    "values move between samples": moved,
    "a bit": lambda x: (
        np.nextafter(x, np.float32(np.inf)) * (x == x[3, 1, 1]) + x * (x != x[3, 1, 1])
    ),
    "a sample twice": lambda x: np.concatenate([x[:-1], x[:1]]),
    "another sample": lambda x: np.concatenate([x[:-1], samples(1, 9)]),
    "one less": lambda x: x[:-1],
    "values change places": lambda x: x[:, ::-1],
    "the sign of zero": lambda x: x * np.float32(-0.0) + (x - x),
}


@pytest.mark.parametrize("how", CHANGES)
def test_other_data_has_another_digest(how):
    x = samples(8)
    changed = CHANGES[how](x.copy())
    assert total(tf.constant(x)) != total(tf.constant(changed.astype("f")))


def test_which_input_a_value_belongs_to_matters():
    a, b = (tf.constant(samples(6, seed)) for seed in (0, 1))
    assert total([a, b]) != total([b, a])
    # The pairing of values matters too.
    assert total([a, b]) != total([a, tf.reverse(b, [0])])


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int64", "bool"])
def test_any_dtype(dtype):
    x = samples(6, dtype=dtype)
    assert len(batches.sample_digests(tf.constant(x))) == 6
    assert total(tf.constant(x)) == total(tf.constant(x[::-1].copy()))


def test_strings_and_samples_without_features():
    words = tf.constant(["a", "bb", ""])
    assert len(batches.sample_digests(words)) == 3
    assert total(words) == total(words[::-1]) != total(tf.constant(["a", "b", "b"]))
    assert len(batches.sample_digests(tf.zeros([4, 0]))) == 4


RAGGED = {
    "values": [[1.0], [2.0, 3.0], [], [1.0, 2.0]],
    "strings": [["a"], ["b", "c"], [], ["a", "b"]],
    "nested": [[[1.0], []], [[2.0, 3.0]], [], [[], [1.0]]],
}


@pytest.mark.parametrize("kind", RAGGED)
def test_ragged_samples_are_known_in_any_order(kind):
    rows = RAGGED[kind]
    ragged = tf.ragged.constant(rows)
    inputs = {"ragged": ragged, "dense": tf.constant(samples(4))}
    actual = batches.sample_digests(ragged)
    assert len(set(actual)) == len(batches.sample_digests(inputs)) == 4
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        moved = tf.ragged.constant([rows[i] for i in order])
        np.testing.assert_array_equal(batches.sample_digests(moved), actual[order])
    apart = [batches.sample_digests(tf.gather(ragged, [i])) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(apart), actual)


def test_ragged_rows_of_vectors():
    rows = [samples(n, n)[:, 0] for n in (2, 1, 3)]
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [2, 1, 3])
    moved = tf.RaggedTensor.from_row_lengths(np.concatenate(rows[::-1]), [3, 1, 2])
    assert total(ragged) == total(moved)
    assert total(ragged) != total(tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [1, 2, 3]))


def test_sparse_samples_are_known_in_any_order():
    x = np.array([[0, 1, 0], [2, 0, 3], [0, 0, 0], [1, 0, 0]], "f")
    actual = batches.sample_digests(tf.sparse.from_dense(x))
    assert len(set(actual)) == 4  # The same value in another column is a different sample.
    np.testing.assert_array_equal(
        batches.sample_digests(tf.sparse.from_dense(x[::-1])), actual[::-1]
    )
    np.testing.assert_array_equal(batches.sample_digests(tf.sparse.from_dense(x[1:])), actual[1:])


def test_what_has_no_samples_is_taken_as_one():
    graph = {"nodes": tf.zeros([3, 2]), "edges": tf.zeros([5, 2], tf.int32), "t": tf.constant(1.0)}
    assert len(batches.sample_digests(graph)) == 1
    assert total(graph) != total({**graph, "nodes": tf.zeros([2, 3])})
    assert total(graph) != total({**graph, "t": tf.constant(2.0)})
    assert len(batches.sample_digests([tf.constant(1.0), tf.zeros([3, 2])])) == 1
    assert total(tf.constant(1.0)) != total(tf.constant(2.0))


def test_equal_batches_have_keys_of_their_own():
    actual = batches.sample_digests(tf.constant(samples(4)))
    keys = {batches.batch_digest(actual, occurrence) for occurrence in range(5)}
    keys |= {batches.batch_digest(actual[::-1].copy(), 0), batches.batch_digest(actual[:-1], 0)}
    keys |= {batches.batch_digest(actual, 0, source) for source in [(0, 1), (1, 0), (1, 1)]}
    assert len(keys) == 10 and all(0 <= key < 2**64 for key in keys)


def test_a_sequence_knows_its_order():
    one, two = batches.sequence_digest(b"", 1), batches.sequence_digest(b"", 2)
    assert batches.sequence_digest(one, 2) != batches.sequence_digest(two, 1)
    assert one != two


def test_digests_tell_batches_apart():
    values = [
        np.zeros((2, 3), "f"),
        np.zeros((3, 2), "f"),
        np.zeros((2, 3), "d"),
        np.full((2, 3), -0.0, "f"),
        {"a": np.zeros((2, 3), "f"), "b": np.zeros((2, 1))},
        np.array([["a", "b"]], object),
        np.array([["ab", ""]], object),
    ]
    tensors = [keras.tree.map_structure(tf.constant, value) for value in values]
    keys = [batches.batch_digest(batches.sample_digests(tensor), 0) for tensor in tensors]
    actual = [batches.sequence_digest(b"", key) for key in keys]
    actual += [batches.sequence_digest(actual[0], key) for key in keys]
    assert len(set(actual)) == len(actual)
    assert batches.sequence_digest(b"", keys[0]) == actual[0]


def test_samples_are_drawn_from_all_batches():
    x = np.arange(1200, dtype="float32").reshape(-1, 4)
    inputs = [{"x": tf.constant(part), "n": tf.constant(part[:, 0])} for part in np.split(x, 30)]
    thinned = list(batches.prepared(inputs).thinned(1 / 4, limit=20 * 20))
    assert max(batch.samples for batch in thinned) == 20  # 20 bytes per sample.
    taken = np.concatenate([batch.inputs["x"].numpy() for batch in thinned])
    numbers = np.concatenate([batch.inputs["n"].numpy() for batch in thinned])
    np.testing.assert_array_equal(taken[:, 0], numbers)
    rows = (numbers / 4).astype(int)
    np.testing.assert_array_equal(taken, x[rows])
    assert len({*rows}) == len(rows) and 50 < len(rows) < 100
    assert len({*(rows // 10)}) > 20  # Number of batches with a sample, out of 30.


@pytest.mark.parametrize("case", ["lengths", "ragged", "static", "graph"])
def test_batches_that_cannot_be_split_are_not_thinned(case):
    ones = tf.ones
    inputs = {
        "lengths": [ones((4, 3)), ones((4, 5))],
        "ragged": [tf.ragged.constant([[1.0], [1.0, 2.0]])],
        "static": [ones((4, 3))],
        "graph": [(ones((4, 3)), ones((7, 2)))],
    }[case]
    assert batches.prepared(inputs, static=case == "static").thinned(0.5, 1000) is None
