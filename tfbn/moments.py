"""Moments of a population that arrives in parts: count, mean and M2 per channel.

M2 is the sum of squared distances from the mean, so the population variance is
M2 / count. Everything is NumPy in float64: a part may hold few values and a population
many.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Count, mean and M2 of the values seen so far, one of each per channel."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray


def of_batch(count, mean, variance, *, method: str) -> Moments:
    """The moments that one batch brings, given its count, mean and biased variance.

    `"pooled"` and `"exact"`: M2 = m * sigma2. `"algorithm2"` takes the unbiased
    variance of Algorithm 2, step 10 (Ioffe & Szegedy 2015), so its M2 is
    m * m / (m - 1) * sigma2: not finite for a batch of one value per channel.
    """
    mean = np.asarray(mean, np.float64)
    count = np.broadcast_to(np.asarray(count, np.float64), mean.shape)
    m2 = count * np.asarray(variance, np.float64)
    if method == "algorithm2":
        with np.errstate(invalid="ignore", divide="ignore"):
            # No values bring nothing: they must not meet a division.
            m2 = np.where(count == 0, m2, m2 * (count / (count - 1)))
    return Moments(count, mean, m2)


def merge(a: Moments, b: Moments, *, method: str) -> Moments:
    """The moments of two parts together.

    mean = (n_a mean_a + n_b mean_b) / n. For `"pooled"` and `"exact"`,
    M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / n (Chan, Golub & LeVeque 1983,
    eq. 2.1), the law of total variance. `"algorithm2"` averages the parts' variances:
    M2 = M2_a + M2_b. A part of count 0 changes nothing, whatever else it holds.
    """
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    # Parts of count 0 may hold anything, and are left out below.
    with np.errstate(invalid="ignore", over="ignore"):
        delta = b.mean - a.mean
        m2 = a.m2 + b.m2
        if method != "algorithm2":
            m2 = m2 + delta * delta * (a.count * share)
        mean = a.mean + delta * share
    only_a, only_b = b.count == 0, a.count == 0
    return Moments(
        count,
        np.where(only_a, a.mean, np.where(only_b, b.mean, mean)),
        np.where(only_a, a.m2, np.where(only_b, b.m2, m2)),
    )


def variance(moments: Moments) -> np.ndarray:
    """M2 / count, per channel; 0 where nothing was seen."""
    return np.where(moments.count == 0, 0.0, moments.m2 / np.maximum(moments.count, 1))


def finite(moments: Moments) -> np.ndarray:
    """Whether mean and M2 are finite, per channel."""
    return np.isfinite(moments.mean) & np.isfinite(moments.m2)
