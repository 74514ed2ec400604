"""Format the lines that `PopulationStatsCallback` prints at the end of training."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tfbn.population import PopulationStats
from tfbn.stats import drift


def lines(
    stats: PopulationStats, validation: dict[str, tuple[Any, Any]] | None, frozen: bool
) -> Iterator[str]:
    """Yield the lines about the changes by the last sweep."""
    drifts = drift.of_layers(stats, stats.previous or {})
    if drifts:
        shift, factor = _overall(drifts.values())
        worst, change = next(iter(drifts.items()))
        yield (
            f"Population statistics of {counted(len(drifts), 'layer')}: the moving averages "
            f"were off by {shift:.3f} std in the mean and a factor of {factor:.3f} in the std, "
            f"most in {worst!r} ({change['mean_shift']:.3f} std, {change['std_ratio']:.3f})."
        )
    if validation is not None:
        yield validation_in_words(validation)
    if frozen:
        yield (
            "The model is now frozen. To train it further, call `unfreeze()` of the callback, "
            "or pass it freeze=False."
        )


def validation_in_words(validation: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the metrics before and after a sweep as one line."""
    changes = (
        f"{name} {old:.4g} -> {new:.4g}"
        for name, (old, new) in validation.items()
        if isinstance(old, float)  # A metric may return any type.
    )
    return f"Validation before and after: {', '.join(changes)}."


def counted(number: int, noun: str) -> str:
    """Return a number and a noun: `1 layer`, `2 layers`."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _overall(drifts: Iterable[Mapping[str, float]]) -> tuple[float, float]:
    """Return over layers rms(shift) and exp(rms(log(ratio))), rms = root mean square."""
    shifts, ratios = zip(
        *((drift["mean_shift"], drift["std_ratio"]) for drift in drifts), strict=True
    )
    return np.sqrt(np.mean(np.square(shifts))), np.exp(np.sqrt(np.mean(np.log(ratios) ** 2)))
