"""How much data an epoch of `fit` has, for a sweep of far less to be noticed."""

import warnings
from typing import Any

import keras

from tfbn.models.assignment import value_of
from tfbn.population import PopulationStats

# Fewer samples than this leave the mean of a channel unknown by more than 0.06 std.
_FEW_SAMPLES = 256


class EpochSize:
    """The size of the largest epoch so far.

    Args:
        whole: Whether an epoch has all data once; with `steps_per_epoch` it may repeat little.

    Attributes:
        batches: How many batches.
        samples: How many samples; 0 where a model does not count them.
    """

    def __init__(self, whole: bool = False) -> None:
        self._whole = whole
        self.batches = self.samples = 0
        self._open = False

    def begin(self) -> None:
        """Begin an epoch."""
        self._open = True

    def step(self, batch: int) -> None:
        """Count a batch by its number in the epoch."""
        self.batches = max(self.batches, batch + 1)

    def end(self, model: keras.Model) -> None:
        """End the epoch, before validation resets the metrics."""
        if self._open:
            # Keras weights the mean of the loss by the number of samples.
            counts = [_count(metric) for metric in model.metrics if metric.name == "loss"]
            self.samples = max(self.samples, *counts, 0)
            self._open = False

    def warn_of(self, stats: PopulationStats, generator: bool) -> None:
        """Warn if the statistics are of less data than an epoch trains on.

        Args:
            stats: The statistics of a sweep that was to have all data.
            generator: Whether the data came from a generator, which was to have no less. Other
                data may be a part that the user has chosen, unless it is hardly any.
        """
        if generator:
            self._warn_if_short(stats)
            return
        fed = self.samples or self.batches
        if self._whole and stats.samples < min(_FEW_SAMPLES, fed / 4):
            warnings.warn(
                f"The sweep had {stats.samples} samples, an epoch of `fit` at least {fed}. Pass "
                "all training data as x, or `steps` to sweep a part of it.",
                stacklevel=4,
            )

    def _warn_if_short(self, stats: PopulationStats) -> None:
        if self.samples:
            short, size = stats.samples < self.samples, f"{self.samples} samples"
        else:
            short, size = stats.batches < self.batches, f"{self.batches} batches"
        if short:
            warnings.warn(
                f"The generator of PopulationStatsCallback ended after {stats.samples} samples in "
                f"{stats.batches} batches, but an epoch of training has {size}. Pass all of the "
                "training data, or say with `steps` how much of it to sweep.",
                stacklevel=5,
            )


def _count(metric: Any) -> int:
    # Under a strategy the count is a sum over replicas, which int() does not read.
    return int(value_of(metric.count)) if isinstance(metric, keras.metrics.Mean) else 0
