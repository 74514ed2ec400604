"""Tests of the cache of frontiers, with a second logical CPU as a stand-in for an accelerator."""

import numpy as np
import tensorflow as tf

from tfbn.sweep.batches import Batch
from tfbn.sweep.frontiers import Frontier, Frontiers


def batch(index, key):
    """Return a batch with a key."""
    return Batch(index, tf.zeros([2]), 2, 0, key)


def frontier(size, level=1, value=0.0, device="CPU:0"):
    """Return a frontier of a given size in bytes."""
    with tf.device(device):
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
    kept.get(batch(0, 3))  # Not in the cache.
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


def second_cpu(limit):
    """Return device -> limit, as if the second CPU were an accelerator with some memory."""
    return lambda device: limit if device.endswith("CPU:1") else None


def test_a_frontier_stays_on_its_device_and_takes_room_there_alone():
    kept = Frontiers(1000, second_cpu(500))
    kept.put(batch(0, 1), frontier(400, device="CPU:1"))
    kept.put(batch(1, 2), frontier(1000))
    kept.put(batch(2, 3), frontier(400, device="CPU:1"))  # Fits neither there nor in main memory.
    devices = {key: kept.get(batch(0, key)).values[0].device[-5:] for key in (1, 2)}
    assert devices == {1: "CPU:1", 2: "CPU:0"}
    assert kept.get(batch(2, 3)) is None


def test_a_small_frontier_of_a_full_accelerator_moves_to_main_memory():
    kept = Frontiers(1000, second_cpu(0))
    kept.put(batch(0, 1), frontier(312, device="CPU:1"))
    assert kept.get(batch(0, 1)) is None
    kept.put(batch(1, 2), frontier(4000, level=3, device="CPU:1"))  # Higher levels do not count.
    for size, moves in ((12, False), (8, True)):  # (312 + 12) / 12 < 40 == (312 + 8) / 8
        with tf.device("CPU:1"):
            kept.put(batch(0, 1), frontier(size, level=2, value=3.0, device="CPU:1"))
        assert (kept.get(batch(0, 1)) is not None) == moves
    [value] = kept.get(batch(0, 1)).values
    assert value.device.endswith("CPU:0")
    np.testing.assert_array_equal(value, [3, 3])


def test_main_memory_takes_no_more_than_the_limit_from_an_accelerator():
    kept = Frontiers(400, second_cpu(0))
    kept.put(batch(0, 1), frontier(396))
    kept.put(batch(1, 2), frontier(400, device="CPU:1"))
    kept.put(batch(1, 2), frontier(8, level=2, device="CPU:1"))
    assert len(kept) == 1


def test_logical_cpus_share_main_memory():
    kept = Frontiers(1000)
    kept.put(batch(0, 1), frontier(800, device="CPU:1"))
    kept.put(batch(1, 2), frontier(400, device="CPU:0"))
    assert len(kept) == 1


def test_the_limit_of_the_caller_holds_on_accelerators_too():
    kept = Frontiers(300, second_cpu(500))
    kept.put(batch(0, 1), frontier(400, device="CPU:1"))
    assert len(kept) == 0


def test_a_frontier_on_two_devices_needs_room_on_both():
    parts = frontier(400).values + frontier(400, device="CPU:1").values
    for limit, number in ((399, 0), (400, 1)):
        kept = Frontiers(400, second_cpu(limit))
        kept.put(batch(0, 1), Frontier(None, 1, parts))
        assert len(kept) == number


def test_a_frontier_in_another_memory_frees_its_room():
    kept = Frontiers(1000, second_cpu(400))
    kept.put(batch(0, 1), frontier(400, device="CPU:1"))
    kept.put(batch(0, 1), frontier(400, level=2))
    kept.put(batch(1, 2), frontier(400, device="CPU:1"))
    assert len(kept) == 2
