"""The alarm: a distance of samples from the population, and the limit that noise alone keeps.

Take one channel of a layer with population mean mu and variance sigma^2, and s^2 = sigma^2 +
epsilon, by which the layer divides. Samples of n values with mean m and variance v have moved by

    a = (m - mu) / s        and        b = (v + (m - mu)^2 - sigma^2) / (2 s^2),

the second being about the logarithm of the ratio of standard deviations. Both are averages over
values, so that for samples from the population they are 0 on average however few values a sample
has. The distance of a layer is D, D^2 the mean over channels of a^2 + b^2. That of a network is the
root mean square over its layers, weighted by 1 / (noise + 0.05^2), noise being its addition to the
layer's D^2: first layers average over many positions, while of the few values of the last ones, one
for a class, sixteen samples may miss some and not show it.

Noise. With samples in G blocks (see `Blocks`) of n_i values, whose a and b make the vectors x_i
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

While no rare value has occurred, the samples' own spread is next to nothing, and a and b lack that
value's part in the population. So the noise of a channel is at least what the sweep has measured:
its squared standard errors of mean and variance, times (M / N)(1 + N / M), in units of s^2 and
4 s^4. The missing part is added to tr Sigma, and as a diagonal matrix to Sigma in tr(Sigma^2).
Where the population has no standard errors (statistics that no sweep measured, or one batch), the
alarm assumes that the samples' own spread is all the noise there is.

Samples that follow one another may be alike: frames of a film, a folder of one class. Blocks take
that in where they are longer than what is alike. For what is longer than a block, Sigma and the
second degrees of freedom are corrected by the Bartlett window over the 4 next blocks (Newey & West
1987, "A simple, positive semi-definite, heteroskedasticity and autocorrelation consistent
covariance matrix"), never downwards.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfbn.stats import drift, moments
from tfbn.stats.layer_stats import LayerStats
from tfbn.stats.moments import Moments

# A distance that is no drift however sure it is: data that a network was not trained on is this
# far from the data it was trained on.
TOLERANCE = 0.05

# Fewer samples do not show their own spread well enough, nor whether neighbours are alike.
FEWEST_SAMPLES = 16
_LAG = 4
_MOST_BLOCKS = 32
_MOST_DIMENSIONS = 100.0


class Scaled(NamedTuple):
    """Mean and variance as `tfbn.stats.drift` takes them."""

    mean: np.ndarray
    variance: np.ndarray


class Blocks:
    """Moments of samples in order, in at most 31 blocks of neighbours.

    Each block has the same number of samples, but for the last, which may be unfinished: 1 for
    the first 31 samples, then 2, 4 and so on. So memory does not grow with their number, and
    samples that are alike because they follow one another count as one.
    """

    def __init__(self):
        self.samples = 0
        self._size = 1
        self._blocks = []

    def add(self, found: Moments) -> None:
        """Add the moments of one sample."""
        if self.samples % self._size:
            self._blocks[-1] = _merged(self._blocks[-1], found)
        else:
            self._blocks.append(found)
        self.samples += 1
        if len(self._blocks) == _MOST_BLOCKS and not self.samples % self._size:
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
            self._blocks = [_merged(*pair) for pair in pairs]
            self._size *= 2

    def total(self) -> Moments:
        """The moments of all samples, with the spread between blocks: all merged at once."""
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
    """How far the samples of a layer, or of a network, have moved, and their noise.

    Attributes:
        squared: The squared distance D^2.
        noise: The covariance of the samples' own noise as its Gram matrix, of shape
            `(blocks, blocks)`: its trace is tr Sigma, the sum of its squared entries tr(Sigma^2),
            both before the bias is taken out.
        unseen: What the sweep's standard errors add to tr Sigma.
        unseen_squares: What they add to tr(Sigma^2).
    """

    squared: float
    noise: np.ndarray
    unseen: float
    unseen_squares: float

    @property
    def expected(self) -> float:
        """The expectation of D^2 from noise alone; NaN for one block."""
        return float(np.trace(self.noise) * self._alike + self.unseen)

    @property
    def distance(self) -> float:
        """The distance without the part of noise; NaN for one block."""
        return float(np.sqrt(np.maximum(0.0, self.squared - self.expected)))

    @property
    def _alike(self):
        """How much larger Sigma is because blocks are like their neighbours, at least 1."""
        blocks, trace = len(self.noise), np.trace(self.noise)
        apart = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks)))
        window = np.maximum(0.0, 1 - apart / (_LAG + 1))
        # Without any likeness the ratio is this, since the blocks' average is subtracted.
        independent = (blocks - window.sum() / blocks) / (blocks - 1) if blocks > 1 else 1.0
        # Equal samples have no spread.
        ratio = np.sum(window * self.noise) / trace if trace > 0 else 1.0
        return max(1.0, ratio / independent)

    @property
    def p_value(self) -> float:
        """The probability of such a distance where the true one is at most `TOLERANCE`.

        NaN for fewer than 16 samples.
        """
        blocks = len(self.noise)
        if blocks < FEWEST_SAMPLES:
            return np.nan
        trace, squares = np.trace(self.noise), np.sum(self.noise**2)
        free = blocks - 1
        squares = free**2 / ((free - 1) * (free + 2)) * (squares - trace**2 / free)
        dimensions = (trace + self.unseen) ** 2 - 2 * squares / free
        dimensions /= max(squares + self.unseen_squares, np.finfo(float).tiny)
        # Equal samples have no spread, which would be 0 / 0; few blocks may give a spread over
        # more dimensions than they can tell.
        dimensions = float(np.clip(dimensions, 1.0, _MOST_DIMENSIONS))
        ratio = self.squared / (self.expected + TOLERANCE**2)
        return _survival(ratio, dimensions, dimensions * free / self._alike)


def _survival(ratio, first, second):
    """The probability that F with these degrees of freedom is larger than `ratio`."""
    place = second / (second + first * ratio)
    return float(tf.math.betainc(np.float64(second / 2), np.float64(first / 2), np.float64(place)))


def movement(blocks: Blocks, population: LayerStats, epsilon: float) -> Movement:
    """How far the samples of one layer have moved from its population.

    Args:
        blocks: Their moments.
        population: A count of 0 is one that is not known, and taken as endless.
        epsilon: The epsilon of the layer.
    """
    n, means, variances = blocks.stacked()
    mean, variance, count = population.mean, population.variance, population.counts
    scale = scaled(mean, variance, epsilon).variance
    shift, _ = drift.by_channel(Scaled(mean, scale), Scaled(means, scale))
    second = (variances + (means - mean) ** 2 - variance) / (2 * scale)
    total = n.sum(0)
    own = np.divide(total, count, out=np.zeros_like(mean), where=count > 0)
    share = n / np.maximum(total, 1)
    errors = (population.mean_error / np.sqrt(scale), population.variance_error / (2 * scale))
    moved = Movement(0.0, np.zeros([len(n)] * 2), 0.0, 0.0)
    for each, error in zip((shift, second), errors, strict=True):
        each = np.where(n > 0, each, 0.0)
        average = np.sum(share * each, 0)
        apart = np.sqrt(_free(n) * (1 + own)) * share * (each - average)
        measured = np.sum(apart**2, 0)
        known = np.divide(error**2, own, out=np.zeros_like(mean), where=own > 0) * (1 + own)
        unseen = np.nan_to_num(np.maximum(0.0, known - measured))
        moved = Movement(
            moved.squared + float(np.mean(average**2)),
            moved.noise + apart @ apart.T / mean.size,
            moved.unseen + float(np.mean(unseen)),
            moved.unseen_squares + float(np.mean(unseen * (unseen + 2 * measured))) / mean.size,
        )
    return moved


def together(movements: list[Movement]) -> Movement:
    """The movement of a network from those of its layers, weighted by how well each is known."""
    noise = np.array([np.trace(movement.noise) + movement.unseen for movement in movements])
    weights = 1 / (noise + TOLERANCE**2)
    weights /= weights.sum()
    pairs = list(zip(weights, movements, strict=True))
    return Movement(
        float(sum(w * movement.squared for w, movement in pairs)),
        sum(w * movement.noise for w, movement in pairs),
        float(sum(w * movement.unseen for w, movement in pairs)),
        float(sum(w**2 * movement.unseen_squares for w, movement in pairs)),
    )


def std_ratio_error(blocks: Blocks, variance: np.ndarray, epsilon: float) -> float:
    """The standard error of `std_ratio`, see `tfbn.stats.drift.of_layer`, of samples in blocks.

    With m and v the mean and variance of all samples and u_i = v_i + (m_i - m)^2, that of its
    logarithm, the mean over channels of log(v) / 2, is the root of G / (G - 1) times the sum over
    blocks of the squared mean over channels of n_i (u_i - v) / (2 N v).

    Args:
        blocks: The moments of the samples.
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
