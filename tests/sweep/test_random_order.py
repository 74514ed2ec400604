"""Tests of `tfbn.sweep.random_order`."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfbn.sweep.random_order import RandomOrder


@given(st.integers(1, 5000), st.integers(0, 2**40))
def test_every_item_comes_once_in_any_windows(number, seed):
    order = RandomOrder(number, seed)
    cut = number // 3
    actual = np.concatenate([order[:cut], order[cut:]])
    np.testing.assert_array_equal(np.sort(actual), np.arange(number))
    np.testing.assert_array_equal(order[: number + 7], actual)


@pytest.mark.parametrize("number", [7, 100, 1000])
def test_first_items_are_uniform_over_seeds_and_unlike_for_other_seeds(number):
    first = np.array([RandomOrder(number, seed)[:5] for seed in range(400)])
    for position in first.T:
        expected = len(position) / number
        chi2 = np.sum((np.bincount(position, minlength=number) - expected) ** 2) / expected
        assert chi2 < number - 1 + 6 * np.sqrt(2 * (number - 1))
    # Pairs of neighbors are independent.
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1] + 1 / (number - 1)) < 0.2


def test_a_small_sample_of_a_huge_number_takes_little_memory():
    tracemalloc.start()
    drawn = RandomOrder(10**12, 0)[:1000]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(drawn.tolist())) == 1000 and peak < 2**20
    assert 0.4 < np.mean(drawn) / 10**12 < 0.6
