"""How much data an epoch of `fit` has, for a generator of another size to be noticed."""

import warnings
from typing import Any

import keras

from tfbn.population import PopulationStats


class EpochSize:
    """The size of the largest epoch so far.

    Attributes:
        batches: How many batches.
        samples: How many samples; 0 where a model does not count them.
    """

    def __init__(self) -> None:
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

    def warn_if_short(self, stats: PopulationStats) -> None:
        """Warn where fewer samples were swept than an epoch trains on."""
        if self.samples:
            short, size = stats.samples < self.samples, f"{self.samples} samples"
        else:
            short, size = stats.batches < self.batches, f"{self.batches} batches"
        if short:
            warnings.warn(
                f"The generator of PopulationStatsCallback ended after {stats.samples} samples in "
                f"{stats.batches} batches, but an epoch of training has {size}. Pass all of the "
                "training data, or say with `steps` how much of it to sweep.",
                stacklevel=3,
            )


def _count(metric: Any) -> int:
    return int(metric.count) if isinstance(metric, keras.metrics.Mean) else 0
