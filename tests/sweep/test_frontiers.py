"""Tests of the store of frontiers."""

import tensorflow as tf

from tfbn.sweep.batches import Batch
from tfbn.sweep.frontiers import Frontier, Frontiers


def batch(index, key):
    """A batch with a key."""
    return Batch(index, tf.zeros([2]), 2, 0, key)


def frontier(size, level=1, value=0.0):
    """A frontier of so many bytes."""
    return Frontier(None, level, [tf.fill([size // 4], value)])


def test_a_batch_is_known_by_its_key_in_any_place():
    kept = Frontiers(1000)
    kept.put(batch(0, 7), frontier(400, value=7.0))
    assert kept.get(batch(5, 7)).values[0][0] == 7.0
    assert kept.get(batch(0, 8)) is None


def test_only_what_fits_is_kept_and_smaller_frontiers_make_room():
    kept = Frontiers(1000)
    kept.put(batch(0, 1), frontier(800))
    kept.put(batch(1, 2), frontier(400))
    assert len(kept) == 1 and kept.get(batch(1, 2)) is None
    kept.put(batch(0, 1), frontier(600, level=2))
    kept.put(batch(1, 2), frontier(400))
    assert len(kept) == 2 and kept.get(batch(0, 1)).level == 2


def test_a_frontier_that_grew_too_large_leaves_the_earlier_one():
    kept = Frontiers(1000)
    kept.put(batch(0, 1), frontier(800))
    kept.put(batch(0, 1), frontier(1200, level=2))
    assert kept.get(batch(0, 1)).level == 1


def test_batches_that_a_pass_did_not_meet_are_dropped_and_their_room_is_free():
    kept = Frontiers(1000)
    for key in (1, 2):
        kept.put(batch(0, key), frontier(500))
    kept.end_pass()
    kept.get(batch(0, 2))
    kept.get(batch(0, 3))  # Not there.
    kept.end_pass()
    assert len(kept) == 1 and kept.get(batch(0, 1)) is None
    kept.put(batch(0, 4), frontier(500))
    assert len(kept) == 2


def test_the_batches_come_in_the_order_of_the_first_pass_without_their_data():
    kept = Frontiers(1000)
    for index, key in enumerate((9, 3, 5)):
        kept.put(batch(index, key), frontier(100))
    kept.put(batch(0, 9), frontier(100, level=2))
    assert [(b.index, b.key, b.inputs) for b in kept] == [(0, 9, None), (1, 3, None), (2, 5, None)]


def test_neither_the_batch_itself_nor_what_has_no_size_is_kept():
    kept = Frontiers(1000)
    kept.put(batch(0, 1), frontier(100, level=0))
    handle = tf.raw_ops.TensorListReserve(
        element_shape=[2], num_elements=3, element_dtype=tf.float32
    )
    kept.put(batch(1, 2), Frontier(None, 1, [handle]))
    assert len(kept) == 0
