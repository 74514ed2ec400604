"""Warnings about the statistics of a sweep, and the error if there are none."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import keras
import numpy as np

from tfbn.models import assignment
from tfbn.population import PopulationStats
from tfbn.sweep.methods import METHODS

if TYPE_CHECKING:
    from tfbn.sweep.state import SweepState

# Fewer samples a batch than this, and one-pass statistics depend visibly on how many: the
# README has the figures.
_SMALL_BATCH = 16
# Calls of one layer whose populations differ by more than this, in standard deviations, are worth
# a warning: such networks lost accuracy in inference (`tests/benchmarks/shared_layers.py`).
_SPREAD = 0.05
# Rounding to half precision that moves a mean by more than this, in standard deviations, is worth
# a warning.
_ROUNDING = 0.01
# So many layers does a warning name.
_NAMED = 5


def warn_of(state: "SweepState", stats: PopulationStats, reported: bool = False) -> None:
    """Warn where statistics are not all that their user may expect.

    Args:
        state: The complete `SweepState`.
        stats: The `PopulationStats` that it came to.
        reported: Whether `check_batch` has warned of layers that are left out.
    """
    if not reported:
        warn_of_left_out({*state.paths} - stats.keys(), state.by_batch)
    for path, (calls, furthest) in state.spreads().items():
        if furthest["mean_shift"] > _SPREAD or abs(np.log(furthest["std_ratio"])) > _SPREAD:
            warnings.warn(
                f"Layer {path!r} is called {calls} times on inputs whose statistics differ: those "
                f"of one call are off from those of all by {furthest['mean_shift']:.2g} standard "
                f"deviations in the mean, and by a factor of {furthest['std_ratio']:.2g} in the "
                "standard deviation. In training every call is normalised by its own, in "
                "inference all by the same. A layer for every call has no such difference.",
                stacklevel=4,
            )
    small = stats.batch_size < _SMALL_BATCH and stats.batches > 1
    if METHODS[stats.method].batches_matter and small and len(stats) > 1:
        warnings.warn(
            f"A one-pass sweep over batches of {stats.batch_size} samples gives deeper layers "
            f"statistics that depend on the batch size. Use batches of at least {_SMALL_BATCH} "
            "samples, or method='exact', which gives the same for any.",
            stacklevel=4,
        )


def warn_of_left_out(paths: Collection[str], by_batch: Collection[str]) -> None:
    """Warn that layers which train are left out of a sweep.

    Args:
        paths: The layers whose statistics inference does not use.
        by_batch: The layers that inference normalizes by the batch.
    """
    uncalled, normalized = sorted({*paths} - {*by_batch}), sorted(by_batch)
    if uncalled:
        warnings.warn(
            f"Batch norm layers that inference never calls are left out: {_named(uncalled)}.",
            stacklevel=5,
        )
    if normalized:
        warnings.warn(
            f"Batch norm layers that `call` runs with training=True in inference too: "
            f"{_named(normalized)}. Their output depends on the batch, and their statistics are "
            "not used. Pass `training` on to use population statistics.",
            stacklevel=5,
        )


def warn_of_loops(paths: Collection[str]) -> None:
    """Warn that a sweep by levels may fail, because layers in loops feed themselves."""
    if paths:
        warnings.warn(
            f"method='exact' may not settle for batch norm layers that feed their output back to "
            f"themselves in a loop: {_named(sorted(paths))}. If it does not, use method='pooled', "
            "or unroll the loop.",
            stacklevel=3,
        )


def _named(paths: Collection[str]) -> str:
    shown = [repr(path) for path in paths][:_NAMED]
    return ", ".join(shown) + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")


def unused(model: keras.Model, paths: Iterable[str], by_batch: Iterable[str]) -> ValueError:
    """The error to raise if inference uses the statistics of no layer."""
    return ValueError(
        "Expected inference to use the statistics of batch norm layers that train. Received: model "
        f"{model.name!r}, which {'runs' if by_batch else 'does not call'} {', '.join(paths)}"
        f"{' with training=True' if by_batch else ''}. Sweep the network that predicts, or pass "
        "`training` on in its `call`."
    )


def warn_of_rounding(stats: PopulationStats, layers: Mapping[str, keras.Layer]) -> None:
    """Warn of the layer whose half-precision variables lose most of its statistics."""
    lost: dict[str, float] = {}
    for path, swept in stats.items():
        dtype = keras.backend.standardize_dtype(layers[path].moving_mean.dtype)
        if dtype not in ("float16", "bfloat16"):
            continue
        mean, variance = assignment.as_held(path, swept.mean, swept.variance, layers[path])
        varies = swept.variance > 0
        shift = np.abs(mean - swept.mean)[varies] / np.sqrt(swept.variance[varies])
        lost[path] = np.inf if np.any(variance[varies] == 0) else np.max(shift, initial=0.0)
    if not lost or max(lost.values()) <= _ROUNDING:
        return
    path = max(lost, key=lambda path: lost[path])
    dtype = keras.backend.standardize_dtype(layers[path].moving_mean.dtype)
    effect = (
        "a variance to 0"
        if np.isinf(lost[path])
        else f"a mean by {lost[path]:.2g} standard deviations"
    )
    warnings.warn(
        f"Layer {path!r} has statistics in {dtype}, which rounds {effect}. Build it with "
        f"dtype='mixed_{dtype}', which keeps variables in float32.",
        stacklevel=3,
    )
