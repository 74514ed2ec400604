"""Tests of the loop over levels, and of how many modules one sweep visits."""

import pathlib
import sys

import keras
import numpy as np
import pytest
from keras import layers
from states import FIRST, SECOND, begun, swept, values

import tfbn
from tfbn.sweep.driver import run_levels
from tfbn.sweep.fixed_point import FixedPoint

# Limits for one sweep. Raise neither: a reader follows the same path.
MODULES, CHANGES = 34, 300


class Levels:
    """An engine with made-up levels. The first level shows whether it can be cut."""

    def __init__(self, uncut=False, empty=False):
        self.uncut, self.empty, self.states = uncut, empty, []

    def initial_state(self):
        return begun()

    def run_level(self, state):
        self.states.append(state)
        if self.empty:
            return state
        if state.fixed_point:
            return swept(state, [(FIRST, values(4, 0)), (SECOND, values(4, 1))])
        if self.uncut:
            return begun(fixed_point=FixedPoint())
        return swept(state, [((FIRST, SECOND)[state.level - 1], values(4, state.level))])

    def finish(self, state):
        return state


@pytest.mark.parametrize("uncut", [False, True])
def test_levels_are_run_until_none_is_left_anew_if_the_network_cannot_be_cut(uncut):
    engine = Levels(uncut)
    done = run_levels(engine)
    assert done.complete and done.layers.keys() == {"a", "b"}
    levels = [(bool(state.fixed_point), state.level) for state in engine.states]
    assert levels == ([(False, 1), (True, 1), (True, 2)] if uncut else [(False, 1), (False, 2)])


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        run_levels(Levels(empty=True))


def test_a_sweep_changes_from_one_module_to_another_a_bounded_number_of_times():
    package = str(pathlib.Path(tfbn.__file__).parent)
    bns = [layers.Dense(8), layers.BatchNormalization(), layers.Dense(8)]
    model = keras.Sequential([keras.Input((6,)), *bns, layers.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(96, 6)).astype("float32")
    tfbn.collect(keras.models.clone_model(model), x, verbose=0)  # Imports the modules.
    visited = []

    def note(frame, event, arg):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(package) and visited[-1:] != [file]:
            visited.append(file)

    sys.setprofile(note)
    try:
        tfbn.collect(model, x, verbose=0)
    finally:
        sys.setprofile(None)
    assert len(set(visited)) <= MODULES and len(visited) <= CHANGES, (
        len(set(visited)),
        len(visited),
    )
