"""Measure the data of an epoch of `fit`, and warn if a sweep had far less."""

import warnings
from typing import Any

import keras

from tfbn.models.assignment import value_of
from tfbn.population import PopulationStats

# With fewer samples the standard error of the mean of a channel is more than 0.06 std.
_FEW_SAMPLES = 256


class EpochSize:
    """The size of the largest epoch so far.

    Args:
        full: Whether an epoch has all data once; with `steps_per_epoch` it may be a part.

    Attributes:
        batches: Number of batches.
        samples: Number of samples; 0 if the model does not count them.
    """

    def __init__(self, full: bool = False) -> None:
        self._full = full
        self.batches = self.samples = 0
        self._running = False

    @property
    def batch_size(self) -> float | None:
        """The mean number of samples in a batch, or `None` if it is unknown."""
        return self.samples / self.batches if self.samples and self.batches else None

    def begin(self) -> None:
        """Begin an epoch."""
        self._running = True

    def step(self, batch: int) -> None:
        """Count a batch by its number in the epoch."""
        self.batches = max(self.batches, batch + 1)

    def end(self, model: keras.Model) -> None:
        """End the epoch, before validation resets the metrics."""
        if self._running:
            # Keras weights the mean of the loss by the number of samples.
            counts = [_count(metric) for metric in model.metrics if metric.name == "loss"]
            self.samples = max(self.samples, *counts, 0)
            self._running = False

    def warn_of(self, stats: PopulationStats, generator: bool) -> None:
        """Warn if a sweep had less data than an epoch.

        Args:
            stats: The statistics of a sweep without `steps` and `tolerance`.
            generator: Whether the data came from a generator, which requires a full epoch. Other
                data may be a chosen part, so the warning is only for a very small one.
        """
        if generator:
            self._warn_if_short(stats)
            return
        least = self.samples or self.batches
        if self._full and stats.samples < min(_FEW_SAMPLES, least / 4):
            warnings.warn(
                f"The sweep had {stats.samples} samples, an epoch of `fit` at least {least}. Pass "
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
                f"{stats.batches} batches, but an epoch of training has {size}. Pass all training "
                "data, or `steps` to sweep a part of it.",
                stacklevel=5,
            )


def _count(metric: Any) -> int:
    # int() does not support the count of a strategy, which is a sum over replicas.
    return int(value_of(metric.count)) if isinstance(metric, keras.metrics.Mean) else 0
