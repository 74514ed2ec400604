import dataclasses

import pytest

from tfbn.stats.methods import METHODS
from tfbn.sweep.options import SweepOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "other"}, r"method.*'other'"),
        ({"batch_size": 0}, r"batch_size.*0"),
        ({"steps": -1}, r"steps.*-1"),
        ({"steps": 2.5}, r"steps.*2\.5"),
        ({"tolerance": 0}, r"tolerance.*0"),
        ({"tolerance": float("nan")}, r"tolerance.*nan"),
        ({"tolerance": 0.1, "checkpoint": "file"}, r"(?s)checkpoint.*'file'.*tolerance=0\.1"),
    ],
)
def test_values_that_no_sweep_takes(options, message):
    with pytest.raises(ValueError, match=message):
        SweepOptions(**options)


def test_options_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SweepOptions().steps = 3


def test_only_exact_statistics_are_independent_of_the_batches():
    independent = {name for name, method in METHODS.items() if not method.batches_matter}
    assert independent == {"exact"} == {name for name in METHODS if METHODS[name].by_level}
