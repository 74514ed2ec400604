"""Compute the size of a sample for a tolerance, and the errors of its statistics.

Error bars. The batches of a sample are split into 20 groups of consecutive batches. Let w_g be the
share of group g in the values of a channel, d_g the distance of its mean from the mean of the
sample, and sigma2_g its variance. Group g adds w_g d_g to the error of the mean and
w_g (sigma2_g + d_g^2 - variance) to the error of the variance. Errors of the layers before a layer
add to its error: some of the samples are swept again with the statistics of these layers moved by
what group g adds to their errors, and the resulting change is added. So c_g, the part of group g in
the error, is known to first order at every level: the infinitesimal jackknife over groups (Efron &
Tibshirani 1993, chapter 21). The standard error is

    sqrt(1 - f) sqrt(G / (G - 1) sum(c_g^2)) (t / 1.96 + 2 skewness^2 / G + 1.5 r)

with f the share of the population that was drawn (Cochran 1977, section 2.6), t the quantile of
Student's distribution with G - 1 degrees of freedom, the skewness of c_g, and r the relative
variance of the squared error as the batches estimate it, above what batches of a normal
distribution have. The last factor ensures that 1.96 standard errors on both sides are an interval
of 95 %. Its terms are from Hall 1992, The Bootstrap and Edgeworth Expansion, section 2.6, the
coefficients from simulations: few values underestimate skewness.

- The errors require batches drawn at random, or a stream in random order, at least from one group
  to the next. They refer to the population that was drawn from; for a stream, to its source.
- They are NaN for fewer than 8 batches, and if few values dominate a layer: there, and in the
  layers behind it, a sample cannot estimate its error.
- They are too small for rare values far from all others, which a sample may miss: a third of the
  samples of one channel of exp(N(0, 1)), in batches of 32, pass as harmless. A channel that never
  varies has the errors of a flag: n samples without a value allow a rate of up to 3 / n (95 %).
- A sweep of all data, without a tolerance, has the errors of `tfbn.stats.moments`, which are
  computed from the spread between batches, and are too large for the means of layers behind others.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfbn.population import LayerStats, PopulationStats
from tfbn.stats import moments
from tfbn.stats.methods import METHODS
from tfbn.stats.moments import Moments
from tfbn.sweep import results
from tfbn.sweep.state import Site, SweepState

GROUPS = 20
# Samples to sweep again for the errors of layers before: this number, or this share of all.
_PROBE = 256, 1 / 8
# Largest size of their concatenated batches. The activations in a network take much more.
JOINED_BYTES = 2**21

_FEWEST = 8  # Smallest number of groups. Errors from fewer vary too much.
_FIRST_SAMPLES = 320
# Smallest and largest factor by which a sample grows. Errors from few groups are uncertain.
_GROWTH = 1.25, 2.0
# Largest difference of the means of a stream's halves without a warning, in standard errors, as the
# root mean square over the channels of a layer.
_DIFFERENT = 3.0
# Largest squared skewness / G, and largest r sqrt(samples) of heavy tails, as means over channels.
# Above them intervals cover too little.
_SKEWED, _UNCERTAIN = 0.08, 1.0
# Smallest samples x (relative error)^2 of heavy tails, as the median over channels: a kurtosis of
# 25, or groups of 6 alike samples. Normal data has 1 for the mean and 1/2 for the variance.
_HEAVY = 6.0
# Errors below this share of the largest one are ignored there.
_NEGLIGIBLE = 0.1
# Largest sample of an endless stream, in units of 1 / tolerance^2, which is about what a normal
# distribution requires.
_ENDLESS = 100
_NORMAL_95 = 1.959964


class Draw(NamedTuple):
    """The size of the data drawn so far.

    Attributes:
        batches: Number of batches.
        samples: Number of samples.
        ended: Whether all data has been drawn.
        total: Number of batches that can be drawn at random; 0 for data read in its order.
        population_size: Number of samples in these; 0 if unknown.
    """

    batches: int
    samples: int
    ended: bool
    total: int
    population_size: int

    @property
    def share(self) -> float:
        """Drawn share of the population; 0 for a stream."""
        if self.population_size:
            return self.samples / self.population_size
        return self.batches / self.total if self.total else 0.0

    @property
    def population(self) -> int:
        """Size of the population, estimated for batches of unknown size; 0 for a stream."""
        return round(self.samples / self.share) if self.share else 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """A swept sample.

    Attributes:
        state: The complete `SweepState`.
        replicates: One state per group, with statistics moved by what the group adds to their
            error.
        drawn: The `Draw`.
    """

    state: SweepState
    replicates: list[SweepState]
    drawn: Draw

    @functools.cached_property
    def layers(self) -> dict[str, LayerStats]:
        """Path -> statistics of a layer with errors."""
        unseen = 0.0 if self._is_all else 3 / self.drawn.samples
        layers = {}
        for path, stats in self._statistics.items():
            known = self.state.levels.get(path, 1) < self._unknown.level
            mean, variance = (
                np.where(stats.constant, unseen, error if known else np.nan)
                for error in self._errors[path].absolute
            )
            layers[path] = stats.with_errors(mean, variance)
        return layers

    @property
    def relative_error(self) -> float:
        """The largest `LayerStats.relative_error`; infinite if one is unknown."""
        errors = [stats.relative_error for stats in self.layers.values()]
        largest = np.max(errors, initial=0.0)
        return math.inf if np.isnan(largest) else float(largest)

    def finish(self, stats: PopulationStats, tolerance: float) -> PopulationStats:
        """Return the statistics of the sweep with errors, and warn about doubtful ones."""
        stats = stats.replace(
            layers={path: self.layers[path] for path in stats},
            population_size=self.drawn.population,
            tolerance=tolerance,
        )
        if not self.drawn.share:
            self._warn_of_halves()
        if self.drawn.share < 1:
            self._warn_of_constants()
            self._warn_of_unknown()
        if self.relative_error > tolerance and not self.drawn.ended:
            results.warn(
                f"{stats.samples} samples do not reach tolerance={tolerance:g}, and the data goes "
                "on: the sample ends here. Say with `steps` how much data there is.",
            )
        return stats

    @property
    def _is_all(self) -> bool:
        return self.drawn.share >= 1

    @functools.cached_property
    def _statistics(self) -> dict[str, LayerStats]:
        return self.state.statistics()

    @functools.cached_property
    def _errors(self) -> dict[str, "_Errors"]:
        """Path -> standard errors of a layer, and the doubts about them."""
        moved = [replicate.statistics() for replicate in self.replicates]
        factor = math.sqrt(max(1 - self.drawn.share, 0.0))
        errors = {}
        for path, stats in self._statistics.items():
            varies = _varies(stats)
            absolute, relative, doubts = [], [], []
            for name, scale in (
                ("mean", np.sqrt(stats.variance)),
                ("variance", 2 * stats.variance),
            ):
                parts = [getattr(each[path], name) - getattr(stats, name) for each in moved]
                squares = [getattr(each[path], f"{name}_error") ** 2 for each in moved]
                error, skewed, uncertain = _standard_errors(
                    np.array(parts), np.array(squares), self.drawn
                )
                doubt = skewed[varies] / _SKEWED
                relative.append(error[varies] / scale[varies])
                if varies.any() and self.drawn.samples * np.median(relative[-1] ** 2) > _HEAVY:
                    doubt = np.maximum(doubt, uncertain[varies] / _UNCERTAIN)
                doubts.append(doubt)
                absolute.append(np.zeros_like(error) if self._is_all else factor * error)
            errors[path] = _Errors(absolute, np.array(relative), np.array(doubts))
        return errors

    @functools.cached_property
    def _unknown(self) -> "_Unknown":
        """The level from which errors are unknown, and why."""
        unknown = _Unknown(math.inf, f"only {self.drawn.batches} batches were drawn")
        if self._is_all:
            return unknown
        largest = max(np.max(each.relative, initial=0.0) for each in self._errors.values())
        for path, errors in self._errors.items():
            # Errors that cancel leave only rounding.
            matters = errors.relative > _NEGLIGIBLE * largest
            doubts = np.where(matters, errors.doubts, 0.0)
            means = np.sum(doubts, axis=1) / np.maximum(np.sum(matters, axis=1), 1)
            level = self.state.levels.get(path, 1)
            if np.any(means > 1) and level < unknown.level:
                worst = np.argmax(np.max(doubts, axis=0))
                channel = np.flatnonzero(_varies(self._statistics[path]))[worst]
                unknown = _Unknown(
                    level, f"few values dominate channel {channel} of layer {path!r}"
                )
        return unknown

    def _warn_of_halves(self) -> None:
        """Warn if the two halves of a stream belong to different populations."""
        half = len(self.replicates) // 2
        if half < _FEWEST // 2:
            return
        base = self.state.statistics()
        moved = [replicate.statistics() for replicate in self.replicates]
        for path, stats in base.items():
            parts = np.array([each[path].mean - stats.mean for each in moved])
            difference = _standardized_difference(
                parts[:half] * len(parts), parts[-half:] * len(parts), ~stats.constant
            )
            if difference > _DIFFERENT:
                results.warn(
                    f"The first half of the sample gives layer {path!r} other means than the "
                    f"second: they differ by {difference:.1f} standard errors (root mean square "
                    "over channels). A tolerance requires data in random order. Shuffle it, "
                    "or sweep all of it.",
                )
                return

    def _warn_of_constants(self) -> None:
        constant = {
            path: np.flatnonzero(s.constant & (s.counts > 0)) for path, s in self.layers.items()
        }
        constant = {path: channels for path, channels in constant.items() if len(channels)}
        if constant:
            path, channels = next(iter(constant.items()))
            named = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
            others = f", and {len(constant) - 1} more layers" if len(constant) > 1 else ""
            results.warn(
                f"Channels that never varied in {self.drawn.samples} samples: {named} of layer "
                f"{path!r}{others}. Values in up to {3 / self.drawn.samples:.2g} of the data may "
                "be missing (95 %). Sweep all of it if rare values matter.",
            )

    def _warn_of_unknown(self) -> None:
        unknown = [path for path, stats in self.layers.items() if np.isnan(stats.relative_error)]
        if unknown:
            others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            results.warn(
                f"The errors of layer {unknown[0]!r}{others} are not known: "
                f"{self._unknown.reason}. Sweep all of the data.",
            )


class _Errors(NamedTuple):
    """Standard errors of a layer: rows for the mean and the variance.

    Attributes:
        absolute: The errors of all channels.
        relative: For channels that vary, in units of the standard deviation.
        doubts: For channels that vary: above 1, intervals cover too little.
    """

    absolute: Sequence[np.ndarray]
    relative: np.ndarray
    doubts: np.ndarray


class _Unknown(NamedTuple):
    level: float
    reason: str


def groups_of(batches: int) -> int:
    """Return the number of groups for a number of batches."""
    return max(1, min(GROUPS, batches))


def probe_share(samples: int) -> float:
    """Return the share of a sample, its first batches, to sweep again for each group."""
    least, share = _PROBE
    return min(1.0, max(share, least / max(samples, 1)))


def first_size(drawn: Draw | None) -> int:
    """Return the number of batches in the first sweep, given the size of some of them."""
    if drawn is None:
        return GROUPS
    return max(GROUPS, math.ceil(_FIRST_SAMPLES * drawn.batches / drawn.samples))


def next_size(sample: Sample, tolerance: float) -> int:
    """Compute the number of batches of the next sample; the current number ends the sampling.

    Errors decrease with the square root of the number of batches.
    """
    batches, excess = sample.drawn.batches, sample.relative_error / tolerance
    endless = not sample.drawn.share and sample.drawn.samples > _ENDLESS / tolerance**2
    if sample.drawn.ended or endless or excess <= 1:
        return batches
    least, most = _GROWTH
    return math.ceil(batches * min(max(1.1 * excess**2, least), most))


def replicates_after(
    after: SweepState,
    groups: Sequence[SweepState],
    replicates: Sequence[SweepState],
    probed: Sequence[SweepState],
) -> list[SweepState]:
    """Compute the replicates of a state after a level.

    Args:
        after: The `SweepState` after the level.
        groups: The states after each group alone.
        replicates: The replicates before the level, one for each group.
        probed: States after some of the samples: from the state before the level, then from each
            replicate; empty at the first level.

    Returns:
        The replicates. Their standard errors are what the batches of the group add to those of the
        whole.
    """
    sites = [site for site in after.settled if any(site in group.moments for group in groups)]
    if not sites:
        return [after] * len(groups)
    whole = _joined(after.settled, sites, after.settled)
    channels = [len(after.settled[site].mean) for site in sites]
    states = []
    for number, group in enumerate(groups):
        joined = _joined(group.moments, sites, after.settled)
        mean, variance = _added(joined, whole, after.method)
        if probed:
            here, moved = (
                _joined(state.moments, sites, after.settled)
                for state in (probed[0], probed[1 + number])
            )
            seen = (here.count > 0) & (moved.count > 0)
            mean = mean + np.where(seen, moved.mean - here.mean, 0.0)
            change = moments.variance(moved) - moments.variance(here)
            variance = variance + np.where(seen, change, 0.0)
        m2 = whole.count * np.maximum(moments.variance(whole) + variance, 0)
        changed = moments.of_values(whole.count, whole.mean + mean, m2)
        changed.rows[3:] = moments.spread_around(joined, whole, method=after.method)
        changed.rows[3] = whole.batches
        before = replicates[number].settled
        settled = {site: before.get(site, after.settled[site]) for site in after.settled}
        settled |= dict(zip(sites, changed.split(channels), strict=True))
        states.append(dataclasses.replace(after, settled=settled))
    return states


def _joined(
    by_site: dict[Site, Moments], sites: Sequence[Site], like: dict[Site, Moments]
) -> Moments:
    """Concatenate the moments of sites; missing sites get count 0."""
    rows = [
        by_site[site].rows if site in by_site else np.zeros_like(like[site].rows) for site in sites
    ]
    return Moments(np.concatenate(rows, axis=1))


def _varies(stats: LayerStats) -> np.ndarray:
    return ~stats.constant & (stats.counts > 0)


def _added(group: Moments, whole: Moments, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute what a group adds to the errors of mean and variance, for exact layers before."""
    share = group.count / np.maximum(whole.count, 1)
    d = np.where(group.count > 0, group.mean - whole.mean, 0.0)
    e = moments.variance(group) - moments.variance(whole)
    return share * d, share * (e if METHODS[method].averages_variances else e + d * d)


def _standard_errors(
    parts: np.ndarray, squares: np.ndarray, drawn: Draw
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute standard errors, their squared skewness / G, and r sqrt(samples) but for its noise.

    Args:
        parts: What each group adds to the error.
        squares: What the batches of each group add to the squared error.
        drawn: The size of the sample.
    """
    groups = len(parts)
    if groups < _FEWEST:
        unknown = np.full(parts.shape[1:], np.nan)
        return unknown, np.zeros_like(unknown), np.zeros_like(unknown)
    square = np.mean(parts**2, axis=0)
    scale = np.sqrt(np.where(square > 0, square, 1.0))
    skewed = np.mean((parts / scale) ** 3, axis=0) ** 2 / groups
    shares = squares / np.maximum(np.sum(squares, axis=0), np.finfo(float).tiny)
    normal = 2 / drawn.batches  # Relative variance for batches of a normal distribution.
    excess = groups * np.var(shares, axis=0, ddof=1) - normal
    wider = _student(groups - 1) / _NORMAL_95 + 2 * skewed + 1.5 * np.maximum(excess, 0.0)
    uncertain = (excess - normal) * math.sqrt(drawn.samples)
    return np.sqrt(groups * groups / (groups - 1) * square) * wider, skewed, uncertain


def _student(freedom: int) -> float:
    """Compute the 97.5 % quantile of Student's distribution (Abramowitz & Stegun, 26.7.5)."""
    z = _NORMAL_95
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _standardized_difference(first: np.ndarray, second: np.ndarray, varies: np.ndarray) -> float:
    """Compute the difference of two means in standard errors, root mean square over channels."""
    error = np.sqrt(sum(half.var(axis=0, ddof=1) / len(half) for half in (first, second)))
    known = (error > 0) & varies
    if not known.any():
        return 0.0
    return np.sqrt(np.mean(((first.mean(0) - second.mean(0))[known] / error[known]) ** 2))
