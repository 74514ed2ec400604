"""Tests of `tfbn.sweep.data` beyond what the sweep's tests cover with whole sweeps."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn.sweep import data


def test_float64_arrays_come_in_keras_float_type():
    [batch] = data.batches(np.ones((3, 2)))
    assert batch.inputs.dtype == keras.config.floatx()
    [batch] = data.batches(tf.ones((3, 2), tf.float64))  # A tensor's dtype is meant.
    assert batch.inputs.dtype == tf.float64
    [batch] = data.batches(np.ones((3, 2), np.uint8))
    assert batch.inputs.dtype == tf.uint8


def test_structures_are_sliced_together():
    x = {"a": np.arange(7), "b": [np.arange(7) * 10, np.arange(14).reshape(7, 2)]}
    found = [batch.inputs for batch in data.batches(x, batch_size=3)]
    np.testing.assert_array_equal(found[1]["a"], [3, 4, 5])
    np.testing.assert_array_equal(found[1]["b"][0], [30, 40, 50])
    np.testing.assert_array_equal(found[2]["b"][1], [[12, 13]])


def test_a_pydataset_is_not_told_that_an_epoch_ended():
    class Shuffled(keras.utils.PyDataset):
        ended = 0

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return np.full((3, 2), i), np.zeros(3)

        def on_epoch_end(self):
            self.ended += 1

    x = Shuffled()
    batches = data.batches(x)
    assert (
        [float(b.inputs[0, 0]) for b in batches]
        == [0, 1]
        == [float(b.inputs[0, 0]) for b in batches]
    )
    assert x.ended == 0


def test_pandas_and_scipy():
    pandas = pytest.importorskip("pandas")
    [batch] = data.batches(pandas.DataFrame({"a": [1.0, 2], "b": [3.0, 4]}))
    np.testing.assert_array_equal(batch.inputs, [[1, 3], [2, 4]])


def test_scipy_sparse_matrices_are_sparse_tensors_as_in_fit():
    sparse = pytest.importorskip("scipy.sparse")
    x = sparse.coo_matrix(np.eye(5))
    batches = [tf.sparse.to_dense(batch.inputs) for batch in data.batches(x, batch_size=2)]
    np.testing.assert_array_equal(np.concatenate(batches), np.eye(5))


def test_held_in_memory():
    batches = data.batches(iter([np.ones((4, 3), "f"), np.ones((2, 3), "f")]))
    assert not batches.repeatable
    held = batches.in_memory(limit=72)
    assert held.repeatable and held.total == 2
    assert [b.samples for b in held] == [4, 2] == [b.samples for b in held]
    with pytest.raises(ValueError, match="memory_limit=71"):
        data.batches(iter([np.ones((4, 3), "f"), np.ones((2, 3), "f")])).in_memory(limit=71)


def test_ctrl_c_passes_through():
    def interrupted():
        yield np.ones((2, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(data.batches(interrupted()))
