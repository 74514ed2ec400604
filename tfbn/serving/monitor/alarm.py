"""Compute the distance of samples from the population, and a p-value for an alarm.

Take one channel of a layer with population mean mu and variance sigma^2, and s^2 = sigma^2 +
epsilon, by which the layer divides. Samples of n values with mean m and variance v have moved by

    a = (m - mu) / s        and        b = (v + (m - mu)^2 - sigma^2) / (2 s^2),

where b is close to the logarithm of the ratio of standard deviations. Both are averages over
values, so for samples from the population their expectation is 0 for any number of values. The
distance of a layer is D, where D^2 is the mean of a^2 + b^2 over channels. The distance of a
network is the root mean square over its layers, weighted by 1 / (noise + 0.05^2), where noise is
its part of the layer's D^2. Early layers average over many positions. Late layers have few values,
and sixteen samples may miss some of them (one class, for example) without a visible spread.

Noise. With samples in G blocks (see `Blocks`) of n_i values, whose a and b make the vectors x_i
with mean x, the sampling error of x has the covariance Sigma, estimated as in `tfbn.stats.moments`
by

    G / (G - 1) sum_i n_i^2 (x_i - x) (x_i - x)' / N^2,  N = sum_i n_i,

times 1 + N / M, because the population is an average of M values. With noise alone, D^2 has the
expectation tr Sigma (in units of the mean over channels), and D^2 / tr Sigma has approximately an F
distribution with f and f (G - 1) degrees of freedom, f = (tr Sigma)^2 / tr(Sigma^2), for any
dependence between channels (Box 1954, "Some theorems on quadratic forms applied in the study of
analysis of variance problems, I"; Brunner, Dette & Munk 1997, "Box-type approximations in
nonparametric factorial designs"). One test covers all channels of all layers and requires no
correction for their number. The unbiased estimates of the traces are from Bai & Saranadasa (1996),
"Effect of high dimension: by an example of a two sample problem", section 3.

Until a rare value occurs, the spread of the samples is close to 0, and a and b lack the part that
the value has in the population. The noise of a channel is therefore at least the noise that the
sweep measured: its squared standard errors of mean and variance, times (M / N)(1 + N / M), in units
of s^2 and 4 s^4. The missing part is added to tr Sigma, and as a diagonal matrix to Sigma in
tr(Sigma^2). If the population has no standard errors (statistics without a sweep, or a sweep of one
batch), the spread of the samples counts as all of the noise.

Consecutive samples may be correlated: frames of a film, a folder of one class. Blocks absorb
correlations shorter than a block. For longer ones, Sigma and the second degrees of freedom are
corrected by the Bartlett window over the 4 next blocks (Newey & West 1987, "A simple, positive
semi-definite, heteroskedasticity and autocorrelation consistent covariance matrix"), only upwards.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfbn.stats import drift, moments
from tfbn.stats.layer_stats import LayerStats
from tfbn.stats.moments import Moments

# The largest distance that does not count as drift: validation data is this far from the training
# data.
TOLERANCE = 0.05

# Fewer samples do not allow an estimate of their spread and correlation.
FEWEST_SAMPLES = 16
_LAG = 4
_MOST_BLOCKS = 32
_MOST_DIMENSIONS = 100.0


class ScaledMoments(NamedTuple):
    """Mean and squared divisor, in the form that `tfbn.stats.drift` requires."""

    mean: np.ndarray
    variance: np.ndarray


class Blocks:
    """Store moments of consecutive samples in at most 31 blocks.

    All blocks have the same number of samples (1, then 2, 4 and so on); the last may have fewer.
    Memory does not grow with the number of samples, and correlated neighbours count as one.
    """

    def __init__(self):
        self.samples = 0
        self._size = 1
        self._blocks: list[Moments] = []

    def add(self, sample: Moments) -> None:
        """Add the moments of one sample."""
        if self.samples % self._size:
            self._blocks[-1] = _merged(self._blocks[-1], sample)
        else:
            self._blocks.append(sample)
        self.samples += 1
        if len(self._blocks) == _MOST_BLOCKS and not self.samples % self._size:
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
            self._blocks = [_merged(*pair) for pair in pairs]
            self._size *= 2

    def total(self) -> Moments:
        """Return the moments of all samples, with the spread between blocks."""
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
        """Return count, mean and variance, each of shape `(blocks, channels)`."""
        count, mean, variance = zip(
            *((block.count, block.mean, moments.variance(block)) for block in self._blocks),
            strict=True,
        )
        return np.stack(count), np.stack(mean), np.stack(variance)


def _merged(a: Moments, b: Moments) -> Moments:
    return moments.merge_one_batch(a, b, method="pooled")


class DistanceEstimate(NamedTuple):
    """The distance of the samples of a layer or a network from the population, and its noise.

    Attributes:
        squared: The squared distance D^2.
        noise: Gram matrix of the noise of the samples, of shape `(blocks, blocks)`. Its trace is tr
            Sigma and the sum of its squared entries is tr(Sigma^2), both before the correction of
            their bias.
        unseen: The addition to tr Sigma from the sweep's standard errors.
        unseen_squares: Their addition to tr(Sigma^2).
    """

    squared: float
    noise: np.ndarray
    unseen: float
    unseen_squares: float

    @property
    def expected(self) -> float:
        """The expectation of D^2 with noise alone; NaN for one block."""
        return float(np.trace(self.noise) * self._correlation + self.unseen)

    @property
    def distance(self) -> float:
        """The distance, corrected for noise; NaN for one block."""
        return float(np.sqrt(np.maximum(0.0, self.squared - self.expected)))

    @property
    def _correlation(self) -> float:
        """The factor by which correlated blocks increase Sigma, at least 1."""
        blocks, trace = len(self.noise), np.trace(self.noise)
        lag = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks)))
        window = np.maximum(0.0, 1 - lag / (_LAG + 1))
        # The expected ratio for independent blocks, since the average of the blocks is subtracted.
        independent = (blocks - window.sum() / blocks) / (blocks - 1) if blocks > 1 else 1.0
        # Equal samples have a trace of 0.
        ratio = np.sum(window * self.noise) / trace if trace > 0 else 1.0
        return max(1.0, ratio / independent)

    @property
    def p_value(self) -> float:
        """The probability of a larger distance if the true one is `TOLERANCE`.

        NaN for fewer than 16 samples.
        """
        blocks = len(self.noise)
        if blocks < FEWEST_SAMPLES:
            return np.nan
        trace, squares = np.trace(self.noise), np.sum(self.noise**2)
        degrees = blocks - 1
        squares = degrees**2 / ((degrees - 1) * (degrees + 2)) * (squares - trace**2 / degrees)
        dimensions = (trace + self.unseen) ** 2 - 2 * squares / degrees
        dimensions /= max(squares + self.unseen_squares, np.finfo(float).tiny)
        # Equal samples would give 0 / 0, and few blocks do not support more dimensions.
        dimensions = float(np.clip(dimensions, 1.0, _MOST_DIMENSIONS))
        ratio = self.squared / (self.expected + TOLERANCE**2)
        return _survival(ratio, dimensions, dimensions * degrees / self._correlation)


def _survival(ratio: float, first: float, second: float) -> float:
    """Return the probability that F with these degrees of freedom is larger than `ratio`."""
    x = second / (second + first * ratio)
    return float(tf.math.betainc(np.float64(second / 2), np.float64(first / 2), np.float64(x)))


def layer_distance(blocks: Blocks, population: LayerStats, epsilon: float) -> DistanceEstimate:
    """Compute the distance of the samples of one layer from its population.

    Args:
        blocks: The moments of the samples.
        population: The population; a count of 0 (not known) counts as infinite.
        epsilon: The epsilon of the layer.
    """
    n, means, variances = blocks.stacked()
    mean, variance, count = population.mean, population.variance, population.counts
    scale = scaled(mean, variance, epsilon).variance
    shift, _ = drift.by_channel(ScaledMoments(mean, scale), ScaledMoments(means, scale))
    second = (variances + (means - mean) ** 2 - variance) / (2 * scale)
    total = n.sum(0)
    relative = np.divide(total, count, out=np.zeros_like(mean), where=count > 0)
    share = n / np.maximum(total, 1)
    errors = (population.mean_error / np.sqrt(scale), population.variance_error / (2 * scale))
    moved = DistanceEstimate(0.0, np.zeros([len(n)] * 2), 0.0, 0.0)
    for each, error in zip((shift, second), errors, strict=True):
        each = np.where(n > 0, each, 0.0)
        average = np.sum(share * each, 0)
        deviation = np.sqrt(_correction(n) * (1 + relative)) * share * (each - average)
        measured = np.sum(deviation**2, 0)
        known = np.divide(error**2, relative, out=np.zeros_like(mean), where=relative > 0)
        unseen = np.nan_to_num(np.maximum(0.0, known * (1 + relative) - measured))
        moved = DistanceEstimate(
            moved.squared + float(np.mean(average**2)),
            moved.noise + deviation @ deviation.T / mean.size,
            moved.unseen + float(np.mean(unseen)),
            moved.unseen_squares + float(np.mean(unseen * (unseen + 2 * measured))) / mean.size,
        )
    return moved


def network_distance(layers: list[DistanceEstimate]) -> DistanceEstimate:
    """Combine the distances of layers to the distance of a network, weighted by their noise."""
    noise = np.array([np.trace(layer.noise) + layer.unseen for layer in layers])
    weights = 1 / (noise + TOLERANCE**2)
    weights /= weights.sum()
    pairs = list(zip(weights, layers, strict=True))
    return DistanceEstimate(
        float(sum(w * layer.squared for w, layer in pairs)),
        sum(w * layer.noise for w, layer in pairs),
        float(sum(w * layer.unseen for w, layer in pairs)),
        float(sum(w**2 * layer.unseen_squares for w, layer in pairs)),
    )


def std_ratio_error(blocks: Blocks, variance: np.ndarray, epsilon: float) -> float:
    """Compute the standard error of `std_ratio`, see `tfbn.stats.drift.of_layer`.

    Let m and v be the mean and variance of all samples, and u_i = v_i + (m_i - m)^2. The logarithm
    of the ratio is the mean of log(v) / 2 over channels, and its standard error is

        sqrt(G / (G - 1) sum_i e_i^2),  e_i = mean over channels of n_i (u_i - v) / (2 N v).

    Args:
        blocks: The moments of the samples.
        variance: The variance of the population, of shape `(channels,)`.
        epsilon: The epsilon of the layer.
    """
    n, means, variances = blocks.stacked()
    share = n / np.maximum(n.sum(0), 1)
    around = variances + (means - np.sum(share * means, 0)) ** 2
    ours = scaled(means, variance, epsilon).variance
    theirs = scaled(means, np.sum(share * around, 0), epsilon).variance
    logs = np.mean(share * (around + epsilon - theirs) / (2 * theirs), 1)
    ratio = np.exp(np.mean(np.log(theirs / ours)) / 2)
    return float(ratio * np.sqrt(_correction(n) * np.sum(logs**2)))


def _correction(n: np.ndarray) -> float:
    """Return G / (G - 1) for an array of G rows; NaN for one row."""
    return len(n) / (len(n) - 1) if len(n) > 1 else np.nan


def scaled(mean: np.ndarray, variance: np.ndarray, epsilon: float) -> ScaledMoments:
    """Return a mean with the squared divisor of a layer, variance + epsilon, which is never 0."""
    return ScaledMoments(mean, np.maximum(variance + epsilon, float(np.finfo(np.float32).tiny)))
