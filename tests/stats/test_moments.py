"""Tests of `tfbn.stats.moments`."""

import functools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfbn.stats import moments

PARTS = st.lists(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(0, 6), st.just(3)),
        elements=st.floats(-1e3, 1e3, allow_subnormal=False),
    ),
    min_size=1,
    max_size=6,
)


def of(values, method):
    """Return the moments of one part."""
    n = len(values)
    mean, variance = (values.mean(0), values.var(0)) if n else (np.zeros(3), np.zeros(3))
    return moments.of_batch(n, mean, variance, method=method)


def merged(parts, method):
    """Merge the moments of all parts in order."""
    total = of(parts[0], method)
    for part in parts[1:]:
        total = moments.merge(total, of(part, method), method=method)
    return total


@settings(max_examples=100)
@given(PARTS)
def test_parts_merge_to_the_whole(parts):
    values = np.concatenate(parts)
    total = merged(parts, "pooled")
    assert np.all(total.count == len(values))
    if len(values):
        scale = np.abs(values).max() + 1
        np.testing.assert_allclose(total.mean, values.mean(0), atol=1e-12 * scale)
        variance = moments.variance(total)
        np.testing.assert_allclose(variance, values.var(0), rtol=1e-10, atol=1e-12 * scale**2)
        assert np.all(variance >= 0)


@settings(max_examples=50)
@given(PARTS)
def test_merging_is_commutative_and_associative(parts):
    forward, backward = merged(parts, "pooled"), merged(parts[::-1], "pooled")
    for name in ("count", "mean", "m2", "batches"):
        a, b = getattr(forward, name), getattr(backward, name)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-6)
    for a, b in zip(*map(moments.standard_errors, (forward, backward)), strict=True):
        scale = 1 + np.abs(np.concatenate(parts)).max(initial=0) ** 2
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale)


@settings(max_examples=100)
@given(PARTS, st.sampled_from(["pooled", "algorithm2"]), st.integers(0, 6))
def test_standard_errors_are_those_of_cluster_sampling(parts, method, cut):
    if method == "algorithm2":
        parts = [part for part in parts if len(part) != 1]
    batches = [part for part in parts if len(part)]
    if len(batches) < 2:
        return
    halves = [half for half in (parts[:cut], parts[cut:]) if half]
    total = functools.reduce(
        functools.partial(moments.merge, method=method), [merged(half, method) for half in halves]
    )
    n = np.array([[len(batch)] for batch in batches])
    mu = np.array([batch.mean(0) for batch in batches])
    sigma2 = np.array([batch.var(0, ddof=int(method == "algorithm2")) for batch in batches])
    mean = np.sum(n * mu, 0) / n.sum()
    if method == "pooled":
        sigma2 += (mu - mean) ** 2
    variance = np.sum(n * sigma2, 0) / n.sum()
    correction = len(batches) / (len(batches) - 1)
    for error, of_batch in zip(
        moments.standard_errors(total), (mu - mean, sigma2 - variance), strict=True
    ):
        expected = np.sqrt(correction * np.sum((n * of_batch) ** 2, 0)) / n.sum()
        scale = 1 + np.abs(np.concatenate(batches)).max() ** 2
        np.testing.assert_allclose(error, expected, rtol=1e-6, atol=1e-6 * scale)


def test_one_batch_tells_no_standard_errors():
    for parts in ([np.ones((4, 3))], [np.ones((4, 3)), np.zeros((0, 3))]):
        assert all(
            np.isnan(error).all() for error in moments.standard_errors(merged(parts, "exact"))
        )


def test_parts_of_one_batch_are_one_batch():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) for n in (2, 5, 4)]
    one = functools.reduce(
        functools.partial(moments.merge_one_batch, method="exact"),
        [of(part, "exact") for part in parts],
    )
    np.testing.assert_allclose(one.rows, of(np.concatenate(parts), "exact").rows, rtol=1e-12)


def test_many_pairs_merge_as_one_by_one():
    rng = np.random.default_rng(0)
    merge = functools.partial(moments.merge, method="exact")

    def part(channels):
        values = rng.normal(size=(5, channels))
        return moments.of_batch(5, values.mean(0), values.var(0), method="exact")

    pairs = [(part(channels), part(channels)) for channels in (3, 1, 4)]
    assert moments.together(merge, pairs) == [merge(a, b) for a, b in pairs]
    assert moments.together(merge, []) == []


def test_algorithm2_averages_unbiased_variances():
    rng = np.random.default_rng(0)
    parts = [rng.normal(5 * i, 1 + i, size=(4 + i, 3)) for i in range(3)]
    total = merged(parts, "algorithm2")
    weights = np.array([len(part) for part in parts]) / sum(map(len, parts))
    np.testing.assert_allclose(total.mean, weights @ [part.mean(0) for part in parts])
    expected = weights @ [part.var(0, ddof=1) for part in parts]
    np.testing.assert_allclose(moments.variance(total), expected)


def test_algorithm2_has_no_variance_for_one_value():
    one = of(np.ones((1, 3)), "algorithm2")
    assert not moments.finite(one).any()
    assert moments.finite(of(np.ones((1, 3)), "pooled")).all()
    assert moments.finite(of(np.ones((0, 3)), "algorithm2")).all()


def test_merging_keeps_precision_far_from_zero():
    values = np.random.default_rng(0).normal(size=(3000, 3)) + 1e6
    total = merged(np.split(values, 100), "pooled")
    np.testing.assert_allclose(moments.variance(total), values.var(0), rtol=1e-9)


@pytest.mark.parametrize("method", ["pooled", "exact", "algorithm2"])
@pytest.mark.parametrize("held", [np.nan, np.inf, -1.0, 1e300])
@pytest.mark.filterwarnings("error")
def test_a_part_of_no_values_changes_nothing_whatever_it_holds(method, held):
    values = np.random.default_rng(0).normal(size=(5, 3))
    part = of(values, "pooled" if method == "exact" else method)
    # Channel 1 has no values in the first part, channel 2 none in the second.
    part.rows[0, 2], part.rows[1:3, 2], part.rows[3:, 2] = 0, np.nan, 0
    empty = moments.of_values(np.zeros(3), np.full(3, held), np.full(3, held))
    some = moments.of_values(
        np.array([0.0, 0, 7]), np.array([held, held, 2]), np.array([held, held, 3])
    )
    for total in (
        moments.merge(part, empty, method=method),
        moments.merge(empty, part, method=method),
    ):
        np.testing.assert_array_equal(total.rows[:, :2], part.rows[:, :2])
        assert total.count[2] == 0
    for total in (
        moments.merge(part, some, method=method),
        moments.merge(some, part, method=method),
    ):
        np.testing.assert_array_equal(total.count, [5, 5, 7])
        np.testing.assert_array_equal(total.mean, [*part.mean[:2], 2])
        np.testing.assert_array_equal(total.m2, [*part.m2[:2], 3])


def test_nothing_seen_has_variance_0():
    held = moments.of_values(np.array([0.0, 2]), np.array([np.nan, 1]), np.array([np.nan, 6]))
    np.testing.assert_array_equal(moments.variance(held), [0, 3])


def test_moments_are_equal_to_moments_only():
    values = np.array([2.0]), np.array([1.0]), np.array([3.0])
    actual = moments.of_batch(*values, method="pooled")
    assert actual == moments.of_batch(*values, method="pooled")
    assert actual != 3
