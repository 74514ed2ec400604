"""The alarm: a distance of requests from the population, and the limit that noise alone keeps.

Take one channel of a layer with population mean mu and variance sigma^2, and s^2 = sigma^2 +
epsilon, by which the layer divides. Requests of n values with mean m and variance v have moved by

    a = (m - mu) / s        and        b = (v + (m - mu)^2 - sigma^2) / (2 s^2),

the second being about the logarithm of the ratio of standard deviations. Both are averages over
values, so that for requests from the population they are 0 on average however few values a request
has. The distance of a layer is D, D^2 the mean over channels of a^2 + b^2. That of a network is the
root mean square over its layers, weighted by 1 / (noise + 0.05^2), noise being its addition to the
layer's D^2: first layers average over many positions, while of the few values of the last ones, one
for a class, sixteen requests may miss some and not show it.

Noise. With requests in G blocks (see `Blocks`) of n_i values, whose a and b make the vectors x_i
of mean x, the sampling error of x has the covariance Sigma, estimated as in `tfbn.stats.moments` by

    G / (G - 1) sum_i n_i^2 (x_i - x) (x_i - x)' / N^2,  N = sum_i n_i,

times 1 + N / M because the population is an average too, of M values. Noise alone gives D^2 the
expectation tr Sigma (in units of the mean over channels), and D^2 / tr Sigma a distribution close
to F with f and f (G - 1) degrees of freedom, f = (tr Sigma)^2 / tr(Sigma^2), however the channels
depend on one another (Box 1954, "Some theorems on quadratic forms applied in the study of analysis
of variance problems, I"; Brunner, Dette & Munk 1997, "Box-type approximations in nonparametric
factorial designs"). There is one test for all channels of all layers, and nothing to correct for
their number. The traces are estimated without bias as in Bai & Saranadasa (1996), "Effect of high
dimension: by an example of a two sample problem", section 3.

Requests that follow one another may be alike: frames of a film, a folder of one class. Blocks take
that in where they are longer than what is alike. For what is longer than a block, Sigma and the
second degrees of freedom are corrected by the Bartlett window over the 4 next blocks (Newey & West
1987, "A simple, positive semi-definite, heteroskedasticity and autocorrelation consistent
covariance matrix"), never downwards.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfbn.stats import drift, moments
from tfbn.stats.moments import Moments

# A distance that is no drift however sure it is: data that a network was not trained on is this
# far from the data it was trained on.
TOLERANCE = 0.05

# Fewer blocks do not tell their own spread well enough, nor whether neighbours are alike.
_FEWEST_BLOCKS = 16
_LAG = 4
_MOST_BLOCKS = 32
_MOST_DIMENSIONS = 100.0


class Scaled(NamedTuple):
    """Mean and variance as `tfbn.stats.drift` takes them."""

    mean: np.ndarray
    variance: np.ndarray


class Blocks:
    """Moments of requests in order, in at most 31 blocks of neighbours.

    Each block has the same number of requests, but for the last, which may be unfinished: 1 for
    the first 31 requests, then 2, 4 and so on. So memory does not grow with their number, and
    requests that are alike because they follow one another count as one.
    """

    def __init__(self):
        self.requests = 0
        self._size = 1
        self._blocks = []

    def add(self, found: Moments) -> None:
        """Add the moments of one request."""
        if self.requests % self._size:
            self._blocks[-1] = _merged(self._blocks[-1], found)
        else:
            self._blocks.append(found)
        self.requests += 1
        if len(self._blocks) == _MOST_BLOCKS and not self.requests % self._size:
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
            self._blocks = [_merged(*pair) for pair in pairs]
            self._size *= 2

    def total(self) -> Moments:
        """The moments of all requests, with the spread between blocks: all merged at once."""
        n, means, variances = self.stacked()
        count = n.sum(0)
        mean = np.sum(n * means, 0) / np.maximum(count, 1)
        d = np.where(n > 0, means - mean, 0.0)
        around = np.where(n > 0, variances, 0.0) + d * d
        m2 = np.sum(n * around, 0)
        e = around - m2 / np.maximum(count, 1)
        spread = [np.sum(n * n * term, 0) for term in (1.0, d, e, d * d, d * e, e * e)]
        return Moments(np.stack([count, mean, m2, np.sum(n > 0, 0), *spread]))

    def stacked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count, mean and variance, each of shape `(blocks, channels)`."""
        count, mean, variance = zip(
            *((block.count, block.mean, moments.variance(block)) for block in self._blocks),
            strict=True,
        )
        return np.stack(count), np.stack(mean), np.stack(variance)


def _merged(a, b):
    return moments.merge_one_batch(a, b, method="pooled")


class Movement(NamedTuple):
    """How far the requests of a layer, or of a network, have moved, and their noise.

    Attributes:
        squared: The squared distance D^2.
        noise: The covariance of noise as its Gram matrix, of shape `(blocks, blocks)`: its trace
            is tr Sigma, the sum of its squared entries tr(Sigma^2), both as they are before the
            bias is taken out.
    """

    squared: float
    noise: np.ndarray

    @property
    def distance(self) -> float:
        """The distance without the part of noise; NaN for one block."""
        added = np.trace(self.noise) * self._alike
        return float(np.sqrt(np.maximum(0.0, self.squared - added)))

    @property
    def _alike(self):
        """How much larger Sigma is because blocks are like their neighbours, at least 1."""
        blocks, trace = len(self.noise), np.trace(self.noise)
        apart = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks)))
        window = np.maximum(0.0, 1 - apart / (_LAG + 1))
        # Without any likeness the ratio is this, since the blocks' average is subtracted.
        independent = (blocks - window.sum() / blocks) / (blocks - 1) if blocks > 1 else 1.0
        # Equal requests have no spread.
        ratio = np.sum(window * self.noise) / trace if trace > 0 else 1.0
        return max(1.0, ratio / independent)

    @property
    def p_value(self) -> float:
        """The probability of such a distance where the true one is at most `TOLERANCE`."""
        blocks = len(self.noise)
        if blocks < _FEWEST_BLOCKS:
            return 1.0
        trace, squares = np.trace(self.noise), np.sum(self.noise**2)
        free = blocks - 1
        squares = free**2 / ((free - 1) * (free + 2)) * (squares - trace**2 / free)
        dimensions = (trace**2 - 2 * squares / free) / max(squares, np.finfo(float).tiny)
        # Equal requests have no spread, which would be 0 / 0; few blocks may give a spread over
        # more dimensions than they can tell.
        dimensions = float(np.clip(dimensions, 1.0, _MOST_DIMENSIONS))
        ratio = self.squared / (trace * self._alike + TOLERANCE**2)
        return _survival(ratio, dimensions, dimensions * free / self._alike)


def _survival(ratio, first, second):
    """The probability that F with these degrees of freedom is larger than `ratio`."""
    place = second / (second + first * ratio)
    return float(tf.math.betainc(np.float64(second / 2), np.float64(first / 2), np.float64(place)))


def movement(
    blocks: Blocks, mean: np.ndarray, variance: np.ndarray, count: np.ndarray, epsilon: float
) -> Movement:
    """How far the requests of one layer have moved from its population.

    Args:
        blocks: Their moments.
        mean, variance, count: Of the population, each of shape `(channels,)`; a count of 0 is
            one that is not known, and taken as endless.
        epsilon: The epsilon of the layer.
    """
    n, means, variances = blocks.stacked()
    scale = scaled(mean, variance, epsilon).variance
    shift, _ = drift.by_channel(Scaled(mean, scale), Scaled(means, scale))
    second = (variances + (means - mean) ** 2 - variance) / (2 * scale)
    total = n.sum(0)
    own = np.divide(total, count, out=np.zeros_like(mean), where=count > 0)
    share = n / np.maximum(total, 1)
    squared, noise = 0.0, np.zeros([len(n)] * 2)
    for moved in (shift, second):
        moved = np.where(n > 0, moved, 0.0)
        average = np.sum(share * moved, 0)
        apart = np.sqrt(1 + own) * share * (moved - average)
        noise += _free(n) * apart @ apart.T / mean.size
        squared += float(np.mean(average**2))
    return Movement(squared, noise)


def together(movements: list[Movement]) -> Movement:
    """The movement of a network from those of its layers, weighted by how well each is known."""
    noise = np.array([np.trace(movement.noise) for movement in movements])
    weights = 1 / (noise + TOLERANCE**2)
    weights /= weights.sum()
    return Movement(
        float(sum(w * movement.squared for w, movement in zip(weights, movements, strict=True))),
        sum(w * movement.noise for w, movement in zip(weights, movements, strict=True)),
    )


def std_ratio_error(blocks: Blocks, variance: np.ndarray, epsilon: float) -> float:
    """The standard error of `std_ratio`, see `tfbn.stats.drift.of_layer`, of requests in blocks.

    With m and v the mean and variance of all requests and u_i = v_i + (m_i - m)^2, that of its
    logarithm, the mean over channels of log(v) / 2, is the root of G / (G - 1) times the sum over
    blocks of the squared mean over channels of n_i (u_i - v) / (2 N v).

    Args:
        blocks: The moments of the requests.
        variance: Of the population, of shape `(channels,)`.
        epsilon: The epsilon of the layer.
    """
    n, means, variances = blocks.stacked()
    share = n / np.maximum(n.sum(0), 1)
    around = variances + (means - np.sum(share * means, 0)) ** 2
    ours = scaled(means, variance, epsilon).variance
    theirs = scaled(means, np.sum(share * around, 0), epsilon).variance
    logs = np.mean(share * (around + epsilon - theirs) / (2 * theirs), 1)
    ratio = np.exp(np.mean(np.log(theirs / ours)) / 2)
    return float(ratio * np.sqrt(_free(n) * np.sum(logs**2)))


def _free(n):
    """G / (G - 1) for an array of G rows; one row does not tell its spread."""
    return len(n) / (len(n) - 1) if len(n) > 1 else np.nan


def scaled(mean: np.ndarray, variance: np.ndarray, epsilon: float) -> Scaled:
    """A mean, and as its variance the square of a layer's divisor, never 0."""
    return Scaled(mean, np.maximum(variance + epsilon, float(np.finfo(np.float32).tiny)))
