"""Tests of the passes over networks that cannot be cut at levels."""

import numpy as np
import pytest
from states import FIRST, SECOND, begun, swept, values

from tfbn.sweep.fixed_point import FixedPoint


@pytest.mark.parametrize(
    ("found", "settled"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 1e-7), True),
        (lambda x: x + np.array([0, 0.01]), False),
        (lambda x: x.mean(0) + 1.01 * (x - x.mean(0)), False),
        (lambda x: x * [0, 1], False),
    ],
)
def test_passes_go_on_until_nothing_moves(found, settled):
    x = values(50, 1)
    state = swept(begun(fixed_point=FixedPoint()), [(FIRST, x), (SECOND, x)]).next_level()
    assert not state.complete
    state = swept(state, [(FIRST, x), (SECOND, found(x))]).next_level()
    assert state.complete is settled


def test_passes_that_never_settle_are_an_error():
    x = values(50, 1)
    state = begun(fixed_point=FixedPoint())
    with pytest.raises(ValueError, match=r"'b'.*loop that feeds"):
        for number in range(9):
            state = swept(state, [(FIRST, x), (SECOND, x + number)]).next_level()
    assert state.level >= 3  # As many passes as calls have to pass.


def test_a_constant_channel_settles_but_for_rounding():
    x = np.full((4, 2), 1 / 3)
    state = swept(begun(fixed_point=FixedPoint()), [(FIRST, x)]).next_level()
    assert swept(state, [(FIRST, x * (1 + 1e-9))]).next_level().complete
    assert not swept(state, [(FIRST, x + 0.1)]).next_level().complete
