"""Tests of `tfbn.sweep.data` beyond what the sweep's tests cover with whole sweeps."""

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.sweep import data
from tfbn.sweep.options import SweepOptions


def batches_of(x, **options):
    """The batches of data."""
    return data.batches(x, SweepOptions(**options))


def test_float64_arrays_come_in_keras_float_type():
    [batch] = batches_of(np.ones((3, 2)))
    assert batch.inputs.dtype == keras.config.floatx()
    [batch] = batches_of(tf.ones((3, 2), tf.float64))  # The dtype of a tensor is deliberate.
    assert batch.inputs.dtype == tf.float64
    [batch] = batches_of(np.ones((3, 2), np.uint8))
    assert batch.inputs.dtype == tf.uint8


def test_structures_are_sliced_together():
    x = {"a": np.arange(7), "b": [np.arange(7) * 10, np.arange(14).reshape(7, 2)]}
    actual = [batch.inputs for batch in batches_of(x, batch_size=3)]
    np.testing.assert_array_equal(actual[1]["a"], [3, 4, 5])
    np.testing.assert_array_equal(actual[1]["b"][0], [30, 40, 50])
    np.testing.assert_array_equal(actual[2]["b"][1], [[12, 13]])


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
    batches = batches_of(x)
    assert (
        [float(b.inputs[0, 0]) for b in batches]
        == [0, 1]
        == [float(b.inputs[0, 0]) for b in batches]
    )
    assert x.ended == 0


def test_pandas_and_scipy():
    pandas = pytest.importorskip("pandas")
    [batch] = batches_of(pandas.DataFrame({"a": [1.0, 2], "b": [3.0, 4]}))
    np.testing.assert_array_equal(batch.inputs, [[1, 3], [2, 4]])


def test_scipy_sparse_matrices_are_sparse_tensors_as_in_fit():
    sparse = pytest.importorskip("scipy.sparse")
    x = sparse.coo_matrix(np.eye(5))
    batches = [tf.sparse.to_dense(batch.inputs) for batch in batches_of(x, batch_size=2)]
    np.testing.assert_array_equal(np.concatenate(batches), np.eye(5))


def test_held_in_memory():
    batches = batches_of(iter([np.ones((4, 3), "f"), np.ones((2, 3), "f")]))
    assert not batches.repeatable
    held = batches.in_memory(limit=72)
    assert held.repeatable and held.total == 2
    assert [b.samples for b in held] == [4, 2] == [b.samples for b in held]
    with pytest.raises(ValueError, match="memory_limit=71"):
        batches_of(iter([np.ones((4, 3), "f"), np.ones((2, 3), "f")])).in_memory(limit=71)


def test_ctrl_c_passes_through():
    def interrupted():
        yield np.ones((2, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(batches_of(interrupted()))


class _Batches(keras.utils.PyDataset):
    """A PyDataset of batches."""

    def __init__(self, batches):
        super().__init__()
        self._parts = batches

    @property
    def num_batches(self):
        return len(self._parts)

    def __getitem__(self, index):
        return (self._parts[index],)


class _Sequence:
    """A sequence of batches, not a PyDataset."""

    def __init__(self, batches):
        self._parts = batches

    def __len__(self):
        return len(self._parts)

    def __getitem__(self, index):
        if index >= len(self._parts):
            raise IndexError
        return (self._parts[index],)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


def _memory_map(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


ADDRESSED = {
    "array": lambda x, folder: x,
    "tensor": lambda x, folder: tf.constant(x),
    "memory map": _memory_map,
    "dict": lambda x, folder: {"a": x, "b": x},
    "PyDataset": lambda x, folder: _Batches(np.array_split(x, len(x) // 10)),
    "sequence": lambda x, folder: _Sequence(np.array_split(x, len(x) // 10)),
}


@pytest.mark.parametrize("kind", ADDRESSED)
def test_a_sample_of_sorted_data_is_drawn_at_random(kind, tmp_path):
    x = np.repeat(np.arange(10.0, dtype="float32"), 100)[:, None]
    size = 10 if kind in ("array", "tensor", "memory map", "dict") else None
    drawn = batches_of(ADDRESSED[kind](x, tmp_path), batch_size=size, tolerance=0.1)
    assert drawn.drawn and drawn.total == 100
    assert drawn.population_size == (1000 if size else 0)
    rows = [np.ravel(keras.tree.flatten(batch.inputs)[0]) for batch in drawn]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), x[:, 0])
    assert len(set(np.concatenate(rows[:30]))) >= 9  # Ten classes; without shuffling, 3.
    again = [np.ravel(keras.tree.flatten(batch.inputs)[0]) for batch in drawn.part(20, 25)]
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(rows[20:25]))


@pytest.mark.parametrize("kind", ADDRESSED)
def test_a_sample_is_drawn_from_the_first_steps_batches(kind, tmp_path):
    x = np.arange(1000, dtype="float32")[:, None]
    size = 10 if kind in ("array", "tensor", "memory map", "dict") else None
    drawn = batches_of(ADDRESSED[kind](x, tmp_path), batch_size=size, steps=20, tolerance=0.1)
    assert drawn.population_size == (200 if size else 0)
    rows = [np.ravel(keras.tree.flatten(batch.inputs)[0]) for batch in drawn]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(200))


def test_streams_are_sampled_in_their_order():
    x = tf.data.Dataset.from_tensor_slices(np.arange(100.0)).batch(10)
    for stream in (x, iter(x), (batch for batch in x)):
        drawn = batches_of(stream, tolerance=0.1)
        assert not drawn.drawn
        np.testing.assert_array_equal(drawn.first().inputs, np.arange(10))


def test_what_can_be_read_again():
    class Held:
        def __init__(self):
            self.held = (x for x in [np.ones((2, 2))])

        def __iter__(self):
            return self.held

    class Made:
        def __iter__(self):
            return (x for x in [np.ones((2, 2))])

    for x, repeatable in ((Held(), False), (Made(), True), (iter([]), False), ([[1.0]], True)):
        assert data.batches(x, SweepOptions(), may_be_empty=True).repeatable is repeatable


def test_complex_numbers_are_an_error():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(RuntimeError, match=r"Expected real numbers. Received: .* complex64"):
        tfbn.collect(model, np.ones((8, 3), "complex64"), verbose=0)


def test_endless_data_with_steps():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    [stats] = tfbn.collect(model, networks.Endless(), steps=5, verbose=0).values()
    assert stats.count == 20


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_data_without_a_batch_axis_is_refused(method):
    images = networks.normal(12, 8, 8, 3)
    model = networks.plain(layers.BatchNormalization)
    unbatched = tf.data.Dataset.from_tensor_slices(images)
    for x in (unbatched, iter(images), tf.data.Dataset.from_tensor_slices((images, np.zeros(12)))):
        with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
            tfbn.collect(model, x, method=method, verbose=0)
    gray = keras.Sequential([keras.Input((8, 8, 1)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
        tfbn.collect(gray, unbatched.map(lambda v: v[..., 0]), method=method, verbose=0)
    vectors = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
        tfbn.collect(
            vectors,
            tf.data.Dataset.from_tensor_slices(networks.normal(9, 3)),
            method=method,
            verbose=0,
        )
    two = networks.branching(layers.BatchNormalization)
    single = tf.data.Dataset.from_tensor_slices(
        {"a": networks.normal(9, 5), "b": networks.normal(9, 3)}
    )
    with pytest.raises(ValueError, match=r"no batch axis|batch 0"):
        tfbn.collect(two, single, method=method, verbose=0)


def test_inputs_that_lack_the_last_axis_of_one_are_taken_as_fit_takes_them():
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    x = networks.normal(20, loc=3)
    [actual] = tfbn.collect(
        model, tf.data.Dataset.from_tensor_slices(x).batch(6), verbose=0
    ).values()
    assert actual.count == 20
    networks.assert_layer(actual, x.astype("d").mean(), x.astype("d").var())


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_batches_is_told_from_several_inputs(kind):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="one array, for a model with one input"):
        tfbn.collect(model, kind([networks.normal(6, 3), networks.normal(6, 3)]), verbose=0)
    a, b = keras.Input((3,)), keras.Input((3,))
    bn = layers.BatchNormalization()
    two = keras.Model([a, b], bn(layers.Add()([a, b])))
    x = [networks.normal(6, 3), networks.normal(6, 3, seed=1)]
    [actual] = tfbn.collect(two, kind(x), verbose=0).values()
    networks.assert_layer(
        actual, (x[0].astype("d") + x[1]).mean(0), (x[0].astype("d") + x[1]).var(0)
    )
