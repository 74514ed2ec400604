"""Tests of `tfbn.LayerStats`."""

import copy
import pickle

import numpy as np
import pytest

from tfbn import LayerStats

RENORM = {
    "moving_stddev": np.array([0.5, 1.5]),
    "renorm_mean": np.array([1.0, -1.0]),
    "renorm_stddev": np.array([2.0, 3.0]),
}


@pytest.mark.parametrize("count", [7, np.int32(7), 7.0, np.array(7), [7, 9], np.array([9.0, 7.0])])
def test_the_count_is_an_int_and_has_one_for_each_channel(count):
    stats = LayerStats(count, [1, 2], [3, 4])
    assert type(stats.count) is int and stats.count == 7
    assert stats.counts.dtype == np.int64 and stats.counts.shape == (2,)
    np.testing.assert_array_equal(stats.counts, np.broadcast_to(count, 2))


def test_the_arrays_are_its_own():
    given = np.array([1.0, 2.0])
    stats = LayerStats(1, given, given, dict.fromkeys(RENORM, given))
    given[0] = 9
    for array in (stats.mean, stats.variance, *stats.renorm.values()):
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, [1, 2])
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, 1.0, 2.0), r"\(\)"),
        ((1, [], []), r"\(0,\)"),
        ((1, [[1.0]], [[1.0]]), r"\(1, 1\)"),
        ((1, [1.0, 2.0], [1.0]), r"variance of shape \(1,\)"),
        ((1, [1.0], [1.0], RENORM), r"moving_stddev of shape \(2,\)"),
        ((1, [1.0, 2.0], [1.0, 2.0], {"renorm_mean": [1.0, 2.0]}), "renorm_mean"),
        ((1, [1.0, 2.0], [1.0, 2.0], {**RENORM, "other": [1.0, 2.0]}), "other"),
        ((-1, [1.0], [1.0]), "-1"),
        ((0.5, [1.0], [1.0]), "0.5"),
        ((np.nan, [1.0], [1.0]), "nan"),
        ((np.inf, [1.0], [1.0]), "inf"),
        ((2**53 + 1, [1.0], [1.0]), "9007199254740993"),
        ((2**70, [1.0], [1.0]), "1180591620717411303424"),
        (("many", [1.0], [1.0]), "many"),
        ((None, [1.0], [1.0]), "None"),
        (([1, 2], [1.0], [1.0]), r"\[1, 2\]"),
        (([1], [1.0, 2.0], [1.0, 2.0]), r"\[1\]"),
    ],
)
def test_what_is_no_statistics_is_refused(arguments, says):
    with pytest.raises(ValueError, match=f"Expected.*Received: .*{says}"):
        LayerStats(*arguments)


def test_equal_is_equal_to_the_bit():
    stats = LayerStats(3, [1.0, np.nan], [1.0, 0.0], RENORM)
    assert stats == LayerStats(3, [1.0, np.nan], [1.0, 0.0], dict(reversed(RENORM.items())))
    assert stats == copy.deepcopy(stats) == pickle.loads(pickle.dumps(stats))
    for other in (
        LayerStats([3, 4], [1.0, np.nan], [1.0, 0.0], RENORM),
        LayerStats(3, [1.0, 1.0], [1.0, 0.0], RENORM),
        LayerStats(3, [1.0, np.nan], [1.0, -0.0], RENORM),
        LayerStats(3, [1.0, np.nan], [1.0, 0.0]),
        LayerStats(3, [1.0, np.nan], [1.0, 0.0], {**RENORM, "renorm_mean": [0.0, 0.0]}),
        LayerStats(3, [1.0], [1.0]),
        3,
    ):
        assert stats != other


def test_what_no_data_has():
    assert LayerStats(1, [-1e300, 2], [0.0, 1e300]).impossible() is None
    assert LayerStats(1, [1, np.inf], [1, 1]).impossible() == "mean inf in channel 1"
    assert LayerStats([1, 0], [1, np.nan], [1, -1]).impossible() == "mean nan in channel 1"
    assert LayerStats([1, 0], [1, np.nan], [1, -1]).impossible(where_counted=True) is None
    assert LayerStats([1, 0], [1, 2], [-1, 1]).impossible(where_counted=True) is not None
