"""Warnings about the statistics of a sweep that is done."""

import warnings

import numpy as np

from tfbn.population import PopulationStats
from tfbn.sweep.accumulator import SweepState
from tfbn.sweep.methods import METHODS

# Fewer samples a batch than this, and one-pass statistics depend visibly on how many: the
# README has the figures.
_SMALL_BATCH = 16
# Calls of one layer whose populations differ by more than this, in standard deviations, are worth
# a warning: such networks lost accuracy in inference (`tests/benchmarks/shared_layers.py`).
_SPREAD = 0.05


def warn_of(state: SweepState, stats: PopulationStats) -> None:
    """Warn where statistics are not all that their user may expect.

    Args:
        state: The complete `SweepState`.
        stats: The `PopulationStats` that it came to.
    """
    for path, (calls, furthest) in state.spreads().items():
        if furthest["mean_shift"] > _SPREAD or abs(np.log(furthest["std_ratio"])) > _SPREAD:
            warnings.warn(
                f"Layer {path!r} is called {calls} times on inputs whose statistics differ: those "
                f"of one call are off from those of all by {furthest['mean_shift']:.2g} standard "
                f"deviations in the mean, and by a factor of {furthest['std_ratio']:.2g} in the "
                "standard deviation. In training every call is normalised by its own, in "
                "inference all by the same. A layer for every call has no such difference.",
                stacklevel=3,
            )
    small = stats.batch_size < _SMALL_BATCH and stats.batches > 1
    if METHODS[stats.method].batches_matter and small and len(stats) > 1:
        warnings.warn(
            f"A one-pass sweep over batches of {stats.batch_size} samples gives deeper layers "
            f"statistics that depend on the batch size. Use batches of at least {_SMALL_BATCH} "
            "samples, or method='exact', which gives the same for any.",
            stacklevel=3,
        )
