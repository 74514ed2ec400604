"""Fill `PopulationStats` from the state of a complete sweep, and warn if it is doubtful."""

import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping

import keras
import numpy as np

from tfbn.models import assignment
from tfbn.population import PopulationStats
from tfbn.stats import drift, layer_stats
from tfbn.stats.methods import METHODS
from tfbn.stats.moments import Moments
from tfbn.sweep.state import SweepState

# Smallest batch without a warning: one-pass statistics of smaller batches depend visibly on the
# batch size (figures in the README).
_SMALL_BATCH = 16
# Largest difference of the calls of one layer without a warning, in standard deviations: larger
# ones cost accuracy in inference (`tests/benchmarks/shared_layers.py`).
_SPREAD = 0.05
# Largest change of a mean by rounding to half precision without a warning, in standard deviations.
_ROUNDING = 0.01
# Largest number of layers that a warning names.
_NAMED = 5


def finish(
    state: SweepState,
    model: keras.Model,
    layers: Mapping[str, keras.Layer],
    previous: PopulationStats,
    warned: bool,
) -> PopulationStats:
    """Return the statistics of a complete sweep, without layers that inference does not use.

    Args:
        state: The complete `SweepState`.
        model: The model that was swept.
        layers: Path -> layer.
        previous: The `PopulationStats` that the model holds.
        warned: Whether `check_batch` has warned about layers that are left out.

    Raises:
        ValueError: If no layer is left, or if a layer had no values.
    """
    statistics = state.statistics()
    swept = {path: statistics[path] for path in state.paths if path in statistics}
    if not swept:
        raise unused(model, state.paths, state.by_batch)
    for path, of_layer in swept.items():
        if not of_layer.counts.any():
            raise ValueError(
                f"Expected values for layer {path!r}. Received: none, or only masked ones."
            )
    if previous.keys() != swept.keys():
        previous = previous.replace(layers={path: previous[path] for path in swept})
    stats = PopulationStats(
        swept,
        method=state.method,
        samples=state.samples,
        batches=state.batches,
        batch_size=state.batch_size,
        fingerprint=state.fingerprint,
        levels=state.level,
        previous=previous,
    )
    if not warned:
        warn_of_left_out({*state.paths} - stats.keys(), state.by_batch)
    _warn_of_differing_calls(state)
    _warn_of_small_batches(stats)
    _warn_of_rounding(stats, layers)
    return stats


def unused(model: keras.Model, paths: Iterable[str], by_batch: Iterable[str]) -> ValueError:
    """Create the error for a model whose inference uses the statistics of no layer."""
    return ValueError(
        "Expected inference to use the statistics of trained layers. Received: model "
        f"{model.name!r}, which {'runs' if by_batch else 'does not call'} "
        f"{', '.join(paths)}{' with training=True' if by_batch else ''}. Sweep the network that "
        "predicts, or pass `training` on."
    )


def warn_of_left_out(paths: Collection[str], by_batch: Collection[str]) -> None:
    """Warn about layers that train and are left out of a sweep.

    Args:
        paths: The layers whose statistics inference does not use.
        by_batch: The layers that inference normalizes by the batch.
    """
    uncalled, normalized = sorted({*paths} - {*by_batch}), sorted(by_batch)
    if uncalled:
        warn(f"Batch norm layers that inference never calls are left out: {_named(uncalled)}.")
    if normalized:
        warn(
            f"Batch norm layers that `call` runs with training=True in inference too: "
            f"{_named(normalized)}. Their output depends on the batch, and their statistics are "
            "not used. Pass `training` on to use population statistics."
        )


def warn_of_loops(paths: Collection[str]) -> None:
    """Warn that passes may not converge for layers that depend on their output in loops."""
    if paths:
        warn(
            f"method='exact' may not settle for batch norm layers that feed their output back to "
            f"themselves in a loop: {_named(sorted(paths))}. If it does not, use method='pooled', "
            "or unroll the loop."
        )


def _warn_of_differing_calls(state: SweepState) -> None:
    calls: dict[str, list[Moments]] = {}
    for site, of_call in state.settled.items():
        if np.any(of_call.count):
            calls.setdefault(site.path, []).append(of_call)
    for path, of_layer in calls.items():
        if len(of_layer) == 1:
            continue
        together = layer_stats.of_calls([state.layers[path]], state.method)
        single = [layer_stats.of_calls([one], state.method) for one in of_layer]
        drifts = [drift.of_layer(together, one) for one in single]
        furthest = max(drifts, key=lambda change: change["mean_shift"] + change["std_ratio_max"])
        if furthest["mean_shift"] > _SPREAD or abs(np.log(furthest["std_ratio"])) > _SPREAD:
            warn(
                f"Layer {path!r} is called {len(single)} times on inputs whose statistics differ: "
                f"one call differs from all by {furthest['mean_shift']:.2g} standard deviations in "
                f"the mean, and by a factor of {furthest['std_ratio']:.2g} in the standard "
                "deviation. Training normalizes each call by the statistics of that call, "
                "inference all calls by the same. Use one layer per call to avoid it."
            )


def _warn_of_small_batches(stats: PopulationStats) -> None:
    small = stats.batch_size < _SMALL_BATCH and stats.batches > 1
    if METHODS[stats.method].batches_matter and small and len(stats) > 1:
        warn(
            f"A one-pass sweep over batches of {stats.batch_size} samples gives deeper layers "
            f"statistics that depend on the batch size. Use batches of at least {_SMALL_BATCH} "
            "samples, or method='exact', which gives the same for any."
        )


def _warn_of_rounding(stats: PopulationStats, layers: Mapping[str, keras.Layer]) -> None:
    """Warn about the layer whose half-precision variables lose most of its statistics."""
    lost: dict[str, float] = {}
    half = [path for path in layers if _dtype(layers[path]) in ("float16", "bfloat16")]
    for path in half:
        if path not in stats:
            continue
        swept = stats[path]
        mean, variance = assignment.round_to_variables(
            path, swept.mean, swept.variance, layers[path]
        )
        varies = swept.variance > 0
        shift = np.abs(mean - swept.mean)[varies] / np.sqrt(swept.variance[varies])
        lost[path] = np.inf if np.any(variance[varies] == 0) else np.max(shift, initial=0.0)
    path = max(lost, key=lambda path: lost[path], default="")
    if not lost or lost[path] <= _ROUNDING:
        return
    effect = (
        "a variance to 0"
        if np.isinf(lost[path])
        else f"a mean by {lost[path]:.2g} standard deviations"
    )
    dtype = _dtype(layers[path])
    warn(
        f"Layer {path!r} has statistics in {dtype}, which rounds {effect}. Build it with "
        f"dtype='mixed_{dtype}', which keeps variables in float32."
    )


def _dtype(layer: keras.Layer) -> str:
    return keras.backend.standardize_dtype(layer.moving_mean.dtype)


def _named(paths: Collection[str]) -> str:
    shown = [repr(path) for path in paths][:_NAMED]
    return ", ".join(shown) + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")


def warn(message: str) -> None:
    """Warn at the line of the caller outside of this package."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
