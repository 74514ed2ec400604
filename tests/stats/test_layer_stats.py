"""Tests of `tfbn.LayerStats`."""

import copy
import functools
import pickle

import numpy as np
import pytest

from tfbn import LayerStats
from tfbn.stats import layer_stats, moments

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


def parts_of(seed, sizes=(8, 8, 8, 16, 32)):
    """Return batches from one source, and their moments."""
    rng = np.random.default_rng(seed)
    batches = [rng.gamma(2.0, size=(n, 3)) for n in sizes]
    return batches, [
        moments.of_batch(len(b), b.mean(0), b.var(0), method="pooled") for b in batches
    ]


def merged(parts):
    return functools.reduce(functools.partial(moments.merge, method="pooled"), parts)


def test_errors_of_merged_statistics_are_those_of_independent_strata():
    _, parts = parts_of(0, [20] * 60)
    a, b = (layer_stats.of_calls([merged(half)], "pooled") for half in (parts[:20], parts[20:]))
    actual = a.merge(b, "pooled")
    share = np.array([1, 2]) / 3
    np.testing.assert_allclose(
        actual.mean_error, np.hypot(share[0] * a.mean_error, share[1] * b.mean_error)
    )
    whole = layer_stats.of_calls([merged(parts)], "pooled")
    np.testing.assert_allclose(actual.mean_error, whole.mean_error, rtol=0.2)
    np.testing.assert_allclose(actual.variance_error, whole.variance_error, rtol=0.4)


def test_errors_of_calls_on_the_same_batches_add_up():
    """The same values in both calls carry no more information than in one."""
    _, parts = parts_of(1)
    one = layer_stats.of_calls([merged(parts)], "pooled")
    two = layer_stats.of_calls([merged(parts), merged(parts)], "pooled")
    np.testing.assert_allclose(two.mean_error, one.mean_error)
    np.testing.assert_allclose(two.variance_error, one.variance_error)
    assert two.count == 2 * one.count


def test_relative_error_is_that_of_the_worst_channel():
    stats = LayerStats(9, np.ones(3), np.array([4.0, 1.0, 0.0]))
    assert np.isnan(stats.relative_error)
    known = stats.with_errors(np.array([0.1, 0.02, 0.0]), np.array([0.1, 0.2, 0.0]))
    assert known.relative_error == pytest.approx(0.1)  # 0.2 / (2 * 1)
    assert known.with_errors(np.array([0.4, 0, 0]), np.zeros(3)).relative_error == (
        pytest.approx(0.2)
    )


@pytest.mark.parametrize("bad", [-1.0, np.inf])
def test_impossible_errors_are_named(bad):
    stats = LayerStats(9, np.ones(2), np.ones(2)).with_errors([0.1, bad], [0.1, 0.1])
    assert "mean_error" in stats.impossible() and "channel 1" in stats.impossible()
    assert LayerStats(9, np.ones(2), np.ones(2)).impossible() is None
