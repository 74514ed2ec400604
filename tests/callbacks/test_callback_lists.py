import copy
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn.callbacks import callback_lists
from tfbn.callbacks.callback_lists import argument_of_fit, enclosing, members, pickled_state

X = np.zeros((8, 2), "float32")


class Spy(keras.callbacks.Callback):
    """Record the enclosing callback lists when training begins."""

    def on_train_begin(self, logs=None):
        """Store the positions, and an argument of `fit`."""
        self.positions = enclosing(self)
        self.epochs = argument_of_fit("epochs")


class Holder(keras.callbacks.Callback):
    """Call a list of other callbacks."""

    def __init__(self, *inner):
        super().__init__()
        self.list = keras.callbacks.CallbackList(list(inner))

    def on_train_begin(self, logs=None):
        self.list.on_train_begin(logs)


def fit(*callbacks):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(X, X[:, :1], epochs=2, callbacks=list(callbacks), verbose=0)


def test_the_position_in_the_list_of_fit():
    before, spy, after = (keras.callbacks.Callback(), Spy(), keras.callbacks.Callback())
    fit(before, spy, after)
    [position] = spy.positions
    assert position.before == [before]
    assert position.after[0] is after  # Keras adds its own behind.
    assert spy.epochs == 2
    assert argument_of_fit("epochs") is None


def test_positions_inside_another_callback_come_first():
    first, spy, last = (keras.callbacks.Callback(), Spy(), keras.callbacks.Callback())
    inside = keras.callbacks.Callback()
    holder = Holder(inside, spy)
    fit(first, holder, last)
    inner, outer = spy.positions
    assert inner.before == [inside] and inner.after == []
    assert outer.before == [first] and outer.after[0] is last
    assert members(outer.callbacks)[:3] == [first, holder, last]
    assert {inside, spy} <= set(members(outer.callbacks))


def test_a_fit_inside_another_has_its_own_list():
    spy = Spy()
    fit(keras.callbacks.LambdaCallback(on_train_begin=lambda logs: fit(spy)))
    assert len(spy.positions) == 1


def test_outside_of_fit_there_is_no_list():
    assert enclosing(Spy()) == []


def test_a_callback_in_two_lists_is_one_member():
    inner = keras.callbacks.Callback()
    holder = Holder(inner)
    assert members([inner, holder]) == members([inner, inner, holder]) == [inner, holder]


@pytest.mark.parametrize(
    ("data", "kind"),
    [(tf.data.Dataset.range(3), "a tf.data.Dataset"), ({"a": iter([])}, "an iterator")],
)
def test_data_that_cannot_be_pickled_is_refused_and_the_advice_works(data, kind):
    callback = types.SimpleNamespace(x=data)
    with pytest.raises(TypeError, match=f"Cannot pickle .*{kind}.*Pass arrays.*copy.deepcopy"):
        pickled_state(callback, ("x",))
    assert pickled_state(types.SimpleNamespace(x=X), ("x",)) == {"x": X}
    spy = Spy()
    spy.x, spy.other = data, [1]
    copied = callback_lists.shared_copy(spy, {}, ("x",))
    assert copied.x is data and copied.other == [1] and copied.other is not spy.other
    assert callback_lists.shallow_copy(spy).other is spy.other
    assert isinstance(copy.copy(spy), Spy)
