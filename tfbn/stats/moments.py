"""The moments of batches: count, mean, M2, standard errors.

M2 is the sum of squared distances from the mean, so the population variance is M2 / count.
All arrays are NumPy in float64, because a population may have many values.

The standard errors come from the spread between batches. Let batch b have m_b values with mean
mu_b and variance sigma2_b, and N = sum(m_b). With d_b = mu_b - mean and
e_b = sigma2_b + d_b^2 - variance, the mean of all is off by sum(m_b d_b) / N and its variance by
sum(m_b e_b) / N, to first order. So with B batches the squared standard errors are
B / (B - 1) sum(m_b^2 d_b^2) / N^2 and the same with e_b: the ratio estimator of cluster sampling
(Cochran 1977, Sampling Techniques, section 9A.1), where a batch is a cluster. It requires
independent batches, not independent values within a batch.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tfbn.stats.methods import METHODS


class Moments:
    """Moments of the values so far, per channel.

    Args:
        rows: float64, of shape `(10, channels)`: count, mean, M2, the number of batches, and
            sum(m_b^2), sum(m_b^2 d_b), sum(m_b^2 e_b), sum(m_b^2 d_b^2), sum(m_b^2 d_b e_b) and
            sum(m_b^2 e_b^2).
    """

    __slots__ = ("rows",)

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    @property
    def count(self) -> np.ndarray:
        """Number of values."""
        return self.rows[0]

    @property
    def mean(self) -> np.ndarray:
        """Mean of the values."""
        return self.rows[1]

    @property
    def m2(self) -> np.ndarray:
        """Sum of squared distances from the mean."""
        return self.rows[2]

    @property
    def batches(self) -> np.ndarray:
        """Number of batches with values."""
        return self.rows[3]

    def __eq__(self, other: object) -> bool:
        """Return whether the two hold the same numbers, to the bit."""
        if not isinstance(other, Moments):
            return NotImplemented
        return self.rows.tobytes() == other.rows.tobytes()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable, tuple]:
        # Without a spread between batches, send three numbers per channel instead of ten.
        if self.rows[3:].any():
            return Moments, (self.rows,)
        return of_values, tuple(self.rows[:3])

    def split(self, channels: Sequence[int]) -> list["Moments"]:
        """Split the channels into consecutive groups of the given sizes."""
        return [Moments(rows) for rows in np.split(self.rows, np.cumsum(channels)[:-1], axis=1)]


def of_values(count: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> Moments:
    """Create moments without the spread between batches."""
    return Moments(np.concatenate([[count, mean, m2], np.zeros((7, len(mean)))]))


def of_batch(count: np.ndarray, mean: np.ndarray, variance: np.ndarray, *, method: str) -> Moments:
    """Create the moments of one batch from its count, mean and biased variance.

    `"pooled"` and `"exact"`: M2 = m * sigma2. `"algorithm2"` takes the unbiased
    variance of Algorithm 2, step 10 (Ioffe & Szegedy 2015), so its M2 is
    m * m / (m - 1) * sigma2: not finite for a batch of one value per channel.
    """
    mean = np.asarray(mean, np.float64)
    count = np.broadcast_to(np.asarray(count, np.float64), mean.shape)
    m2 = count * np.asarray(variance, np.float64)
    if METHODS[method].averages_variances:
        with np.errstate(invalid="ignore", divide="ignore"):
            # Channels without values skip the division.
            m2 = np.where(count == 0, m2, m2 * (count / (count - 1)))
    return _as_one_batch(of_values(count, mean, m2))


def merge(a: Moments, b: Moments, *, method: str) -> Moments:
    """Merge the moments of two different sets of batches.

    mean = (n_a mean_a + n_b mean_b) / n. For `"pooled"` and `"exact"`,
    M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / n (Chan, Golub & LeVeque 1983,
    eq. 2.1), the law of total variance. `"algorithm2"` averages the parts' variances:
    M2 = M2_a + M2_b. A part of count 0 changes nothing; its other numbers are ignored.
    """
    whole = _values_together(a, b, method)
    for part in (a, b):
        whole.rows[3:] += spread_around(part, whole, method=method)
    return whole


def merge_one_batch(a: Moments, b: Moments, *, method: str) -> Moments:
    """Merge the moments of two parts of one batch into the moments of one batch."""
    return _as_one_batch(_values_together(a, b, method))


def _as_one_batch(moments: Moments) -> Moments:
    moments.rows[3] = moments.count > 0
    moments.rows[4] = moments.count**2
    return moments


def _values_together(a: Moments, b: Moments, method: str) -> Moments:
    """Compute count, mean and M2 of two parts."""
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    # Parts of count 0 may hold any numbers, and are replaced below.
    with np.errstate(invalid="ignore", over="ignore"):
        delta = b.mean - a.mean
        m2 = a.m2 + b.m2
        if not METHODS[method].averages_variances:
            m2 = m2 + delta * delta * (a.count * share)
        mean = a.mean + delta * share
    only_a, only_b = b.count == 0, a.count == 0
    return of_values(
        count,
        np.where(only_a, a.mean, np.where(only_b, b.mean, mean)),
        np.where(only_a, a.m2, np.where(only_b, b.m2, m2)),
    )


def spread_around(part: Moments, whole: Moments, *, method: str) -> np.ndarray:
    """Compute rows 3 to 9 of a part, around the mean and variance of the whole.

    d grows by s, the difference of the means, and e by 2 s d + c.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        s = np.where(part.count == 0, 0.0, part.mean - whole.mean)
        c = np.where(part.count == 0, 0.0, variance(part) - variance(whole))
    t = 2 * s
    if METHODS[method].averages_variances:  # Its variance does not depend on the means.
        t = np.zeros_like(s)
    else:
        c = c + s * s
    batches, weight, d, e, dd, de, ee = part.rows[3:]
    return np.stack(
        [
            batches,
            weight,
            d + s * weight,
            e + t * d + c * weight,
            np.maximum(dd + 2 * s * d + s * s * weight, 0),  # Rounding may make it negative.
            de + t * dd + (c + s * t) * d + s * e + s * c * weight,
            np.maximum(ee + t * (t * dd + 2 * de + 2 * c * d) + c * (2 * e + c * weight), 0),
        ]
    )


def variance(moments: Moments) -> np.ndarray:
    """Compute M2 / count per channel; 0 for count 0."""
    return np.where(moments.count == 0, 0.0, moments.m2 / np.maximum(moments.count, 1))


def standard_errors(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Compute the standard errors of mean and variance per channel; NaN below two batches."""
    several = moments.batches > 1
    scale = moments.batches / np.maximum(moments.batches - 1, 1) / np.maximum(moments.count, 1) ** 2
    mean_error, variance_error = (
        np.where(several, np.sqrt(np.maximum(scale * squares, 0)), np.nan)
        for squares in (moments.rows[7], moments.rows[9])
    )
    return mean_error, variance_error


def finite(moments: Moments) -> np.ndarray:
    """Return whether mean and M2 are finite, per channel."""
    return np.isfinite(moments.mean) & np.isfinite(moments.m2)


def together(
    merge: Callable[[Moments, Moments], Moments], pairs: Iterable[tuple[Moments, Moments]]
) -> list[Moments]:
    """Compute `merge(a, b)` for many pairs at once; numbers of channels may differ."""
    pairs = list(pairs)
    if not pairs:
        return []
    ours, theirs = (
        Moments(np.concatenate([part.rows for part in side], axis=1))
        for side in zip(*pairs, strict=True)
    )
    return merge(ours, theirs).split([len(a.mean) for a, _ in pairs])
