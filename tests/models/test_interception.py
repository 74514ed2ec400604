"""Tests of `tfbn.models.interception`."""

import threading

import keras
import numpy as np
import pytest

from tfbn.models.interception import observed_calls, patch_in_thread


class Thing:
    def answer(self, value=1):
        return value


def test_replaces_and_restores():
    original = Thing.__dict__["answer"]
    with patch_in_thread(Thing, "answer", lambda call, self, value=1: call(self, value) + 10):
        assert Thing().answer(5) == 15
    assert Thing().answer(5) == 5
    assert Thing.__dict__["answer"] is original


def test_innermost_replacement_is_called():
    with patch_in_thread(Thing, "answer", lambda call, self: 2):
        with patch_in_thread(Thing, "answer", lambda call, self: 3):
            assert Thing().answer() == 3
        assert Thing().answer() == 2


def test_other_threads_run_the_original():
    answers = []
    with patch_in_thread(Thing, "answer", lambda call, self: 2):
        thread = threading.Thread(target=lambda: answers.append(Thing().answer()))
        thread.start()
        thread.join()
    assert answers == [1]


def test_contexts_of_two_threads_may_end_in_any_order():
    entered, leave, inside = threading.Event(), threading.Event(), []

    def other():
        with patch_in_thread(Thing, "answer", lambda call, self: 3):
            entered.set()
            leave.wait(10)
            inside.append(Thing().answer())

    thread = threading.Thread(target=other)
    with patch_in_thread(Thing, "answer", lambda call, self: 2):
        thread.start()
        entered.wait(10)
    assert Thing().answer() == 1
    leave.set()
    thread.join()
    assert inside == [3]
    assert Thing.__dict__["answer"].__qualname__ == "Thing.answer"


def test_restores_after_an_error():
    original = Thing.__dict__["answer"]
    with pytest.raises(KeyError), patch_in_thread(Thing, "answer", lambda call, self: {}[0]):
        Thing().answer()
    assert Thing.__dict__["answer"] is original


def test_keeps_a_later_replacement_by_other_code():
    def other(self):
        return 7

    original = Thing.__dict__["answer"]
    try:
        with patch_in_thread(Thing, "answer", lambda call, self: 2):
            Thing.answer = other
        assert Thing.__dict__["answer"] is other
    finally:
        Thing.answer = original


class Unmasked(keras.layers.BatchNormalization):
    """A subclass whose `call` has no mask and an argument more."""

    def call(self, x, training=None, twice=False):
        """Normalize once or twice."""
        y = super().call(x, training=training)
        return super().call(y, training=training) if twice else y


class Replacing(keras.layers.BatchNormalization):
    """A subclass that does not call its base class."""

    def call(self, x, training=None):
        """Return the input."""
        return x


@pytest.mark.parametrize(
    ("layer", "twice", "expected"),
    [
        (keras.layers.BatchNormalization(), {}, [(0, False), (1, False)]),
        (Unmasked(), {}, [(0, False), (0, True), (1, False), (1, True)]),
        (Unmasked(), {"twice": True}, [(0, False), (1, False), (0, True), (2, False), (3, False)]),
        (Replacing(), {}, [(0, False), (1, False)]),
    ],
    ids=["stock", "subclass", "two calls in a subclass", "no call of the base class"],
)
def test_calls_of_a_layer_are_numbered(layer, twice, expected):
    """Once each, though a subclass and its base class are both observed."""
    x = np.ones((3, 2), "float32")
    want = layer(x, training=False, **twice)
    calls, seen = [], []

    def observe(call):
        outputs = call.run()
        calls.append(call)
        seen.append((call.number, call.contained_another))
        return outputs

    with observed_calls({"bn": layer}, observe, outermost=True):
        for _ in range(2):
            np.testing.assert_array_equal(layer(x, training=False, **twice), want)
    assert seen[: len(expected)] == expected
    assert {call.path for call in calls} == {"bn"}
    assert all(call.layer is layer and call.training is False for call in calls)
