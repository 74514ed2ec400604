import numpy as np
import pytest
import tensorflow as tf

from tfbn.models import comparison

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("output", "expected", "absolute", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5, 0.2),
        ([1.0, -3.0], [1.0, -2.0], 1.0, 0.5),
        ([3], [4], 1.0, 0.25),
        ([True], [False], 1.0, INF),
        ([0.0], [0.0], 0.0, 0.0),
        ([1e-9], [0.0], 1e-9, INF),
        ([], [], 0.0, 0.0),
        ([NAN, INF, 1.0], [NAN, INF, 1.0], 0.0, 0.0),
        ([NAN, INF, 1.0], [NAN, INF, 2.0], 1.0, 0.5),
        ([NAN, 1.0], [2.0, 1.0], INF, INF),
        ([-INF], [INF], INF, INF),
        ([INF], [1.0], INF, INF),
        ([1.0, 2.0], [1.0], INF, INF),
        (["a", "b"], ["a", "b"], 0.0, 0.0),
        (["b", "a"], ["a", "b"], INF, INF),
    ],
)
def test_differences(output, expected, absolute, relative):
    output, expected = np.array(output), np.array(expected)
    for convert in (np.asarray, tf.constant):
        got = comparison.difference(convert(output), convert(expected))
        assert (got.absolute, got.relative) == pytest.approx((absolute, relative), rel=1e-12)
        named = comparison.differences({"y": convert(output), "z": 0}, {"y": convert(expected)})
        assert named == {"y": got}
    assert comparison.relative_difference([output, 1.0], [expected, 1.0]) == got.relative


def test_half_precision_is_compared_as_numbers():
    got = comparison.difference(tf.constant([1.0], "bfloat16"), tf.constant([4.0], "bfloat16"))
    assert got == (3.0, 4.0)


def test_the_tolerance_is_relative_to_large_outputs_only():
    small, large = comparison.Difference(0.0, 0.1), comparison.Difference(0.0, 50.0)
    assert [small.tolerance(False), large.tolerance(False)] == pytest.approx([1e-3, 5e-2])
    assert [small.tolerance(True), large.tolerance(True)] == pytest.approx([2e-2, 1.0])
