"""Tests of `tfbn.models.interception`."""

import threading

import pytest

from tfbn.models.interception import patch_in_thread


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
