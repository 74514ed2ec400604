"""A sample that is as large as a tolerance takes: it grows until the standard errors are small."""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tfbn.models.keras_models import Structure
from tfbn.population import LayerStats, PopulationStats
from tfbn.sweep.accumulator import SweepState
from tfbn.sweep.batches import Batch, Batches, empty, nbytes, too_large

# Standard errors from fewer batches vary so much that a sweep would often end too early.
_FEWEST = 20
# The most by which a sample grows at once, and the least. Errors from few batches are uncertain.
_GROWTH = 1.25, 2.0
# Halves of a stream whose means differ by more of their standard errors than this, as the root
# mean square over the channels of a layer, are not of one population.
_APART = 3.0


class Sample:
    """The batches that a sweep has taken from its data so far, each read once.

    Args:
        batches: The `tfbn.sweep.batches.Batches` to take them from.
        limit: Bytes of main memory to keep them in, for `whole`. `None` to keep none.

    Attributes:
        nbytes: Bytes that the kept batches take.
    """

    def __init__(self, batches: Batches, limit: int | None):
        self._batches = batches
        self._iterator = iter(batches)
        self._limit = limit
        keep = limit is not None and not batches.population_size
        self._inputs: list[Structure] | None = [] if keep else None
        self._taken = 0
        self.nbytes = 0

    def more(self, number: int) -> "_Window":
        """The next batches, at most `number`, as the `batches` of `ShardSweep.continue_sweep`."""
        return _Window(map(self._take, itertools.islice(self._iterator, number)), self._batches)

    def whole(self) -> Batches:
        """All that was taken, as `Batches`."""
        if self._inputs is None:
            return self._batches.part(0, self._taken)
        return self._batches.holding(self._inputs)

    def _take(self, batch: Batch) -> Batch:
        self._taken += 1
        if self._inputs is None:
            return batch
        self._inputs.append(batch.inputs)
        self.nbytes += nbytes(batch.inputs)
        if self._limit is not None and self.nbytes > self._limit:
            if not self._batches.repeatable:
                raise too_large(self._taken, self._limit)
            self._inputs, self.nbytes = None, 0  # They are read again.
        return batch


class _Window:
    """Some batches in the middle of the data, which are read once."""

    def __init__(self, iterator: Iterator[Batch], batches: Batches):
        self._iterator = iterator
        self._first: list[Batch | None] = []
        self.static = batches.static

    def first(self) -> Batch | None:
        if not self._first:
            self._first.append(next(self._iterator, None))
        return self._first[0]

    def __iter__(self) -> Iterator[Batch]:
        first = self.first()
        if first is not None:
            yield first
            yield from self._iterator


class Pilot:
    """A sweep by a one-pass method that goes on until its standard errors are small enough.

    Args:
        sweep: From a number of batches to the state after that many more alone, or after fewer
            where the data has no more; `None` where it has none.
        population_size: The number of samples that the batches are drawn from at random; 0 if it
            is not known.
    """

    def __init__(self, sweep: Callable[[int], SweepState | None], population_size: int):
        self._sweep = sweep
        self._population_size = population_size
        self._rounds: list[SweepState] = []

    @property
    def state(self) -> SweepState:
        """The complete `SweepState` of all that was swept.

        Raises:
            ValueError: If that is nothing.
        """
        return _complete(self._rounds)

    def reach(self, tolerance: float) -> None:
        """Sweep until the largest relative standard error is at most `tolerance`, or data ends."""
        error, ended = math.inf, False
        while error > tolerance and not ended:
            taken = sum(state.batches for state in self._rounds)
            more = _needed(taken, error / tolerance) - taken
            reached = self._sweep(more)
            ended = reached is None or reached.batches < more
            if reached is not None:
                self._rounds.append(reached)
                error = self._relative_error()

    def _relative_error(self) -> float:
        state = self.state
        errors = [stats.relative_error for stats in state.statistics().values()]
        largest = self._factor(state.samples) * np.max(errors, initial=0.0)
        return math.inf if np.isnan(largest) else largest

    def _factor(self, samples: int) -> float:
        """The factor on the standard errors of samples drawn from a population of known size.

        sqrt(1 - samples / population_size): 0 where all were drawn (Cochran 1977, section 2.6).
        """
        size = self._population_size
        return math.sqrt(1 - samples / size) if size else 1.0

    def with_errors(self, stats: PopulationStats, tolerance: float) -> PopulationStats:
        """The `PopulationStats` of the same sample, with the standard errors of this sweep.

        Between the batches of an `"exact"` sweep, layers behind others spread more than their
        statistics are off: they are measured while the layers before them normalise with the
        statistics of the same sample, which takes out the part that its values share. In a
        one-pass method each batch normalises with its own, so that its spread shows the whole.
        """
        factor = self._factor(stats.samples)
        errors = self.state.statistics()
        layers = {
            path: layer.with_relative_errors(errors[path], factor) for path, layer in stats.items()
        }
        size = self._population_size
        return stats.replace(layers=layers, population_size=size, tolerance=tolerance)

    def warn_of_halves(self) -> None:
        """Warn where the first and the second half of the sample are of two populations."""
        halves = _halves(self._rounds)
        if halves is None:
            return
        first, second = (_complete(half).statistics() for half in halves)
        for path in first:
            apart = _apart(first[path], second[path])
            if apart > _APART:
                warnings.warn(
                    f"The first half of the sample gives layer {path!r} other means than the "
                    f"second: they differ by {apart:.1f} standard errors (root mean square over "
                    "channels). A tolerance needs data that comes in random order. Shuffle it, or "
                    "sweep all of it.",
                    stacklevel=4,
                )
                return


def _complete(rounds: Sequence[SweepState]) -> SweepState:
    state = functools.reduce(SweepState.merge, rounds) if rounds else None
    if state is None:
        raise empty()
    return state.next_level()


def _needed(batches: int, excess: float) -> int:
    """How many batches to have next, where the errors of so many are too large by a factor.

    Errors fall with the square root of the number of batches.
    """
    if not batches:
        return _FEWEST
    least, most = _GROWTH
    return math.ceil(batches * min(max(1.1 * excess**2, least), most))


def _halves(
    rounds: Sequence[SweepState],
) -> tuple[Sequence[SweepState], Sequence[SweepState]] | None:
    """Rounds in two parts of about the same number of batches, or `None` if there is only one."""
    if len(rounds) < 2:
        return None
    ends = list(itertools.accumulate(state.batches for state in rounds))
    cut = 1 + int(np.argmin([abs(end - ends[-1] / 2) for end in ends[:-1]]))
    return rounds[:cut], rounds[cut:]


def _apart(first: LayerStats, second: LayerStats) -> float:
    """The difference of two means in standard errors, as the root mean square over channels."""
    error = np.hypot(first.mean_error, second.mean_error)
    known = error > 0
    if not known.any():
        return 0.0
    return np.sqrt(np.mean(((first.mean - second.mean)[known] / error[known]) ** 2))
