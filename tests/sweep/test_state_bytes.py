"""Tests of the bytes of a state."""

import dataclasses

import numpy as np
import pytest
from states import AGAIN, FIRST, SECOND, begun, swept, values

import tfbn
from tfbn.sweep import state_bytes
from tfbn.sweep.fixed_point import FixedPoint
from tfbn.sweep.state import SweepState


@pytest.mark.parametrize("fixed_point", [None, FixedPoint(("a", "b"), True, 3)])
def test_bytes_and_back(fixed_point):
    state = swept(begun(), [(FIRST, values(4, 0)), (AGAIN, values(4, 1))]).next_level()
    state = swept(state, [(SECOND, values(4, 2))])
    state = dataclasses.replace(state, fixed_point=fixed_point)
    back = state_bytes.unpack(state_bytes.pack(state))
    for field in dataclasses.fields(SweepState):
        ours, theirs = getattr(state, field.name), getattr(back, field.name)
        if field.name in ("settled", "moments"):
            assert ours.keys() == theirs.keys()
            for site in ours:
                np.testing.assert_array_equal(ours[site].rows, theirs[site].rows)
        else:
            assert ours == theirs, field.name
    with pytest.raises(ValueError):
        state_bytes.unpack(state_bytes.pack(state)[:-9])
    with pytest.raises(ValueError, match="state of a sweep"):
        state_bytes.unpack(tfbn.PopulationStats({}, method="exact").to_bytes())
