"""Tests of the check on one batch, before `fit` trains."""

import warnings

import keras
import networks
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn.sweep.first_trace import FirstTrace, check_batch
from tfbn.sweep.options import SweepOptions

X = networks.normal(12, 3)


class Partly(keras.Model):
    """Trains `a` and one of two calls of `b`; inference uses `b` and `c`."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (layers.BatchNormalization(name=name) for name in "abc")

    def call(self, x, training=None):
        """Call all layers in training, and all but `a` in inference."""
        x = self.a(x, training=True) if training else x
        x = self.b(self.b(x, training=training), training=False)
        return self.c(x, training=False)


def partly():
    model = Partly()
    model(X, training=True)
    return model


def checked(model, x, trained=None, may_train_others=False, **options):
    options = SweepOptions(batch_size=None if isinstance(x, tf.data.Dataset) else 4, **options)
    return check_batch(model, x, options, trained=trained, may_train_others=may_train_others)


@pytest.mark.parametrize("data", [X, tf.data.Dataset.from_tensor_slices(X).batch(4)])
def test_layers_are_told_from_one_batch(data):
    actual = checked(partly(), data)
    assert actual == FirstTrace(frozenset("ab"), frozenset("b"), frozenset("b"))
    named = checked(partly(), data, trained=["a", "c"])
    assert (named.trained, named.used) == (frozenset("ac"), frozenset("c"))


def test_a_dataset_is_not_read():
    read = []

    def rows():
        read.append(1)
        yield from X

    data = tf.data.Dataset.from_generator(rows, output_signature=tf.TensorSpec((3,)))
    checked(partly(), data.batch(4))
    assert read == []


def test_collect_reuses_the_trace():
    calls, counts = [], []

    class Called(keras.layers.Layer):
        def call(self, x):
            calls.append(1)
            return x

    for check in (False, True):
        model = keras.Sequential([keras.Input((3,)), Called(), layers.BatchNormalization()])
        if check:
            checked(model, X)
        for _ in range(2):
            calls.clear()
            tfbn.collect(model, X, batch_size=4, verbose=0)
            counts.append(len(calls))
    first, second, after_check, _ = counts
    assert first > second == after_check


def test_data_whose_shape_is_unknown_is_needed():
    signature = tf.TensorSpec(None)
    data = tf.data.Dataset.from_generator(lambda: iter([X]), output_signature=signature)
    assert checked(partly(), data) is None
    eager = partly()
    eager.compile(run_eagerly=True)
    assert checked(eager, tf.data.Dataset.from_tensors(X)).used == {"a", "b"}  # Not known yet.
    assert checked(eager, X).used == {"b"}


def test_a_custom_step_may_train_what_call_does_not():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    model.trainable = False
    with pytest.raises(ValueError, match="include_frozen"):
        checked(model, X)
    assert checked(model, X, may_train_others=True).used == frozenset()


@pytest.mark.parametrize(
    ("x", "says"),
    [(X[:, :2], r"batch 0 .*\(4, 2\)"), (X[:0], "at least one batch"), (iter(()), "at least one")],
)
def test_bad_data_is_an_error(x, says):
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    options = SweepOptions(batch_size=None if hasattr(x, "__next__") else 4)
    with pytest.raises(ValueError, match=f"(?s)^Expected.*{says}"):
        check_batch(model, x, options)


def test_warnings_are_of_unknown_layers_alone():
    actual = FirstTrace(frozenset("ab"), frozenset(), frozenset("b"), looping=frozenset("b"))
    with pytest.warns(UserWarning) as caught:
        actual.warn()
    assert sorted("'b'" in str(one.message) for one in caught) == [False, True]
    assert sum("'a'" in str(one.message) for one in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual.warn(known="ab")
