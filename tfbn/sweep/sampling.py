"""A sample that is as large as a tolerance takes, and how far its statistics may be off.

Error bars. The batches of a sample are put into 20 groups of consecutive ones. Let w_g be the
share of group g in the values of a channel, d_g the distance of its mean from the mean of the
sample, and sigma2_g its variance. Group g adds w_g d_g to the error of the mean and
w_g (sigma2_g + d_g^2 - variance) to the error of the variance. Layers behind others are off too
because the layers before them are: with the statistics of those moved by what group g adds to
their errors, the first few batches are swept once more, and the change that this makes is added.
So c_g, the part of group g in the error, is known to first order at every level: the infinitesimal
jackknife over groups (Efron & Tibshirani 1993, chapter 21). The standard error is

    sqrt(1 - f) sqrt(G / (G - 1) sum(c_g^2)) (t / 1.96 + (2 skewness^2 - 0.07 kurtosis) / G)

with f the share of the population that was drawn (Cochran 1977, section 2.6), t the quantile of
Student's distribution with G - 1 degrees of freedom, and the skewness and the excess kurtosis of
c_g. The last factor is there so that 1.96 standard errors on both sides are an interval of 95 %.
Its coefficients are from Hall 1992, The Bootstrap and Edgeworth Expansion, section 2.6, but for 2,
which is 1.08 there: few groups show less skewness than there is.

- They assume that the batches were drawn at random, or that a stream has random order, at least
  from one group to the next. They hold for the population that was drawn from; for a stream, for
  its source.
- They are NaN for fewer than 8 batches, and where few values dominate a layer: there, and in the
  layers behind it, a sample says nothing of its own error.
- They are too small where the data hides what the sample has not seen: rare values that are far
  from all others. For one channel of exp(N(0, 1)), intervals of the variance cover 79 %. A channel
  that never varies has the errors of a flag: n samples without a value leave a rate of up to 3 / n
  (95 %).
- They are too large behind other layers where samples come in groups of their like, because the
  samples that are swept once more then hold few different ones.
- A sweep of all data, without a tolerance, has the errors of `tfbn.stats.moments` instead. These
  come from the spread between batches alone, and are too large for the means of layers behind
  others.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfbn.population import LayerStats, PopulationStats
from tfbn.stats import moments
from tfbn.stats.moments import Moments
from tfbn.sweep import results
from tfbn.sweep.state import Site, SweepState

GROUPS = 20
# Samples that show how statistics depend on those before them: this many, or this share of all.
_PROBE = 256, 1 / 8
# Their batches are joined up to this size. The activations in a network take much more.
JOINED_BYTES = 2**21

_FEWEST = 8  # Groups. Errors from fewer vary too much.
_FIRST_SAMPLES = 64
# The most by which a sample grows at once, and the least. Errors from few groups are uncertain.
_GROWTH = 1.25, 2.0
# Halves of a stream whose means differ by more of their standard errors than this, as the root
# mean square over the channels of a layer, are not of one population.
_APART = 3.0
# Squared skewness over groups, as a mean over channels, above which intervals cover too little.
_HEAVY = 0.08
# Errors of less than this share of the largest one do not decide that.
_NEGLIGIBLE = 0.1
# An endless stream is given up after so many samples, in units of 1 / tolerance^2, which is about
# what a normal distribution needs.
_ENDLESS = 100
_NORMAL_95 = 1.959964


class Draw(NamedTuple):
    """What was drawn of the data so far.

    Attributes:
        batches: How many batches.
        samples: How many samples.
        ended: Whether no more can be drawn.
        total: How many batches can be drawn at random; 0 if they come in the order of the data.
        population_size: How many samples these have; 0 if it is unknown.
    """

    batches: int
    samples: int
    ended: bool
    total: int
    population_size: int

    @property
    def share(self) -> float:
        """The share of the population that was drawn; 0 for a stream."""
        if self.population_size:
            return self.samples / self.population_size
        return self.batches / self.total if self.total else 0.0

    @property
    def population(self) -> int:
        """The size of the population, estimated if batches have unknown sizes; 0 for a stream."""
        return round(self.samples / self.share) if self.share else 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample that was swept.

    Attributes:
        state: The complete `SweepState`.
        replicates: For each group the same state, with statistics moved by what the group adds to
            their error.
        drawn: The `Draw`.
    """

    state: SweepState
    replicates: list[SweepState]
    drawn: Draw

    @functools.cached_property
    def layers(self) -> dict[str, LayerStats]:
        """Path -> the statistics of a layer, with their errors."""
        return self._with_errors(self.state.statistics())

    @property
    def relative_error(self) -> float:
        """The largest `LayerStats.relative_error`; infinite if one is not known."""
        errors = [stats.relative_error for stats in self.layers.values()]
        largest = np.max(errors, initial=0.0)
        return math.inf if np.isnan(largest) else float(largest)

    def finish(self, stats: PopulationStats, tolerance: float) -> PopulationStats:
        """The statistics of the sweep with their errors, and warnings where they are due."""
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
                "on: the sample ends here. Say with `steps` how much data there is, or raise the "
                "tolerance.",
            )
        return stats

    def _with_errors(self, statistics: dict[str, LayerStats]) -> dict[str, LayerStats]:
        parts: dict[str, tuple[list, list]] = {path: ([], []) for path in statistics}
        for replicate in self.replicates:
            for path, moved in replicate.statistics().items():
                parts[path][0].append(moved.mean - statistics[path].mean)
                parts[path][1].append(moved.variance - statistics[path].variance)
        factor = math.sqrt(max(1 - self.drawn.share, 0.0))
        errors, relative, skewed, heavy_level = {}, {}, {}, math.inf
        for path, stats in statistics.items():
            found = [_standard_errors(np.array(each)) for each in parts[path]]
            errors[path] = [factor * error if factor else 0 * stats.mean for error, _ in found]
            varies = ~stats.constant & (stats.counts > 0)
            scales = np.sqrt(stats.variance[varies]), 2 * stats.variance[varies]
            relative[path] = np.array(
                [error[varies] / scale for (error, _), scale in zip(found, scales, strict=True)]
            )
            skewed[path] = np.array([skewness[varies] for _, skewness in found])
        largest = max((np.max(each, initial=0.0) for each in relative.values()), default=0.0)
        for path, each in relative.items():
            # Errors that cancel leave rounding, of any distribution.
            matters = each > _NEGLIGIBLE * largest
            number = np.maximum(matters.sum(axis=1), 1)
            heavy = np.sum(skewed[path] * matters, axis=1) / number > _HEAVY
            if factor and heavy.any():
                heavy_level = min(heavy_level, self.state.levels.get(path, 1))
        unseen = 3 / self.drawn.samples if factor else 0.0
        layers = {}
        for path, stats in statistics.items():
            known = self.state.levels.get(path, 1) < heavy_level
            layers[path] = stats.with_errors(
                *(
                    np.where(stats.constant, unseen, error if known else np.nan)
                    for error in errors[path]
                )
            )
        return layers

    def _warn_of_halves(self) -> None:
        """Warn where the first and the second half of a stream are of two populations."""
        half = len(self.replicates) // 2
        if half < _FEWEST // 2:
            return
        base = self.state.statistics()
        moved = [replicate.statistics() for replicate in self.replicates]
        for path, stats in base.items():
            parts = np.array([each[path].mean - stats.mean for each in moved])
            apart = _apart(parts[:half] * len(parts), parts[-half:] * len(parts), ~stats.constant)
            if apart > _APART:
                results.warn(
                    f"The first half of the sample gives layer {path!r} other means than the "
                    f"second: they differ by {apart:.1f} standard errors (root mean square over "
                    "channels). A tolerance needs data that comes in random order. Shuffle it, or "
                    "sweep all of it.",
                )
                return

    def _warn_of_constants(self) -> None:
        found = {
            path: np.flatnonzero(s.constant & (s.counts > 0)) for path, s in self.layers.items()
        }
        found = {path: channels for path, channels in found.items() if len(channels)}
        if found:
            path, channels = next(iter(found.items()))
            named = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
            others = f", and {len(found) - 1} more layers" if len(found) > 1 else ""
            results.warn(
                f"Channels that never varied in {self.drawn.samples} samples: {named} of layer "
                f"{path!r}{others}. Values in up to {3 / self.drawn.samples:.2g} of the data may "
                "be missing (95 %). Sweep all of it if rare values matter.",
            )

    def _warn_of_unknown(self) -> None:
        unknown = [path for path, stats in self.layers.items() if np.isnan(stats.relative_error)]
        if unknown:
            why = (
                f"only {self.drawn.batches} batches were drawn"
                if self.drawn.batches < _FEWEST
                else "few values dominate it, or a layer before it"
            )
            results.warn(
                f"The errors of layer {unknown[0]!r} are not known: {why}. Sweep all of the data.",
            )


def groups_of(batches: int) -> int:
    """How many groups a number of batches makes."""
    return max(1, min(GROUPS, batches))


def probe_share(samples: int) -> float:
    """The share of a sample, its first batches, that is swept once more for each group."""
    least, share = _PROBE
    return min(1.0, max(share, least / max(samples, 1)))


def first_size(drawn: Draw | None) -> int:
    """How many batches the first sweep has, given the size of some of them."""
    if drawn is None:
        return GROUPS
    return max(GROUPS, math.ceil(_FIRST_SAMPLES * drawn.batches / drawn.samples))


def next_size(sample: Sample, tolerance: float) -> int:
    """How many batches to have next; no more than there are if these will do, or are all.

    Errors fall with the square root of the number of batches.
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
    """The replicates of a state after a level.

    Args:
        after: The `SweepState` after the level.
        groups: The states after each group alone.
        replicates: The replicates before the level, one for each group.
        probed: After the first few batches: the state from the one before the level, and the
            states from each of the replicates; nothing at the first level.
    """
    sites = [site for site in after.settled if any(site in group.moments for group in groups)]
    if not sites:
        return [after] * len(groups)
    whole = _joined(after.settled, sites, after.settled)
    channels = [len(after.settled[site].mean) for site in sites]
    states = []
    for number, group in enumerate(groups):
        mean, variance = _added(_joined(group.moments, sites, after.settled), whole, after.method)
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
        changed = moments.of_values(whole.count, whole.mean + mean, m2).split(channels)
        before = replicates[number].settled
        settled = {site: before.get(site, after.settled[site]) for site in after.settled}
        settled |= dict(zip(sites, changed, strict=True))
        states.append(dataclasses.replace(after, settled=settled))
    return states


def _joined(
    by_site: dict[Site, Moments], sites: Sequence[Site], like: dict[Site, Moments]
) -> Moments:
    """The moments of some sites as one; of those that are missing, without values."""
    rows = [
        by_site[site].rows if site in by_site else np.zeros_like(like[site].rows) for site in sites
    ]
    return Moments(np.concatenate(rows, axis=1))


def _added(group: Moments, whole: Moments, method: str) -> tuple[np.ndarray, np.ndarray]:
    """What a group adds to the errors of mean and variance, the layers before it being right."""
    share = group.count / np.maximum(whole.count, 1)
    d = np.where(group.count > 0, group.mean - whole.mean, 0.0)
    e = moments.variance(group) - moments.variance(whole)
    return share * d, share * (e if method == "algorithm2" else e + d * d)


def _standard_errors(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The standard errors from the parts of groups, and their squared skewness over groups."""
    groups = len(parts)
    if groups < _FEWEST:
        unknown = np.full(parts.shape[1:], np.nan)
        return unknown, np.zeros_like(unknown)
    square = np.mean(parts**2, axis=0)
    scale = np.sqrt(np.where(square > 0, square, 1.0))
    skewness = np.mean((parts / scale) ** 3, axis=0)
    kurtosis = np.where(square > 0, np.mean((parts / scale) ** 4, axis=0) - 3, 0.0)
    wider = _student(groups - 1) / _NORMAL_95 + (2 * skewness**2 - 0.07 * kurtosis) / groups
    return np.sqrt(groups * groups / (groups - 1) * square) * wider, skewness**2 / groups


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution (Abramowitz & Stegun, 26.7.5)."""
    z = _NORMAL_95
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _apart(first: np.ndarray, second: np.ndarray, varies: np.ndarray) -> float:
    """The difference of two means in standard errors, as the root mean square over channels."""
    error = np.sqrt(sum(half.var(axis=0, ddof=1) / len(half) for half in (first, second)))
    known = (error > 0) & varies
    if not known.any():
        return 0.0
    return np.sqrt(np.mean(((first.mean(0) - second.mean(0))[known] / error[known]) ** 2))
