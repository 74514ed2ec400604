"""Statistics in the making: level by level, and batch by batch within a level.

A sweep begins with the statistics of no level. A part of the next level takes in batches, is merged
with the parts that others have taken in (`PopulationStats.merge`), and goes on top of what is below
it, until all levels are there.
"""

import numpy as np

from tfbn import moments
from tfbn.population import PopulationStats, latest
from tfbn.sweep import batches as data

# How much of a standard deviation, or of a variance, rounding alone never makes out.
_UNSETTLED = 1e-3


def start(model, layers, method):
    """The statistics of no level, above which a sweep of some layers begins."""
    before = PopulationStats.read(model)
    return PopulationStats(
        method=method,
        fingerprint=before.fingerprint,
        previous=before.replace(layers={path: before[path] for path in layers}),
        level=0,
        calls={},
    )


def add(part, samples, found, levels):
    """Statistics with one batch more: its size, and by site the moments of what entered."""
    calls = dict(part.calls)
    for site, brought in found:
        key = part.level, site
        held = calls.get(key)
        calls[key] = brought if held is None else moments.merge(held, brought, method=part.method)
    return part.replace(
        calls=calls,
        samples=part.samples + samples,
        batches=part.batches + 1,
        batch_size=max(part.batch_size, samples),
        levels=max(part.levels, levels),
    )


def above(below, part):
    """A part with what is below it, for every call at the highest level that it was swept at."""
    settled = {(level, site): found for site, (level, found) in latest(below.calls).items()}
    return part.replace(calls=settled | part.calls, previous=below.previous)


def finish(stats, model, previous):
    """What `collect` returns: the statistics of all levels, with what the model held before.

    Raises:
        ValueError: If there was no data, or if a layer was never called, or without any value.
    """
    if not stats.batches:
        raise data.empty()
    stats = stats.replace(previous=previous)
    stats.require_all(model)
    layers = {path: stats[path] for path in previous}
    return stats.replace(layers=layers, calls=None)


def check_settled(below, stats):
    """Raise `ValueError` if the last level changed what an earlier one had found for a call.

    Where a network cannot be cut into levels every level sweeps all calls, and the last comes
    after all must have settled. A layer whose input depends on its own output, in a loop,
    has no population to settle on.
    """
    before = latest(below.calls)
    for site, (level, found) in latest(stats.calls).items():
        if level == stats.level and site in before:
            _, held = before[site]
            # Rounding counts where a channel hardly varies.
            variance = moments.variance(held) + 1e-6 * held.mean**2
            moved = np.abs(found.mean - held.mean) > _UNSETTLED * np.sqrt(variance)
            moved |= np.abs(moments.variance(found) - moments.variance(held)) > (
                _UNSETTLED * variance
            )
            if np.any(moved):
                raise ValueError(
                    "Expected a network in which no batch norm layer's input depends on its own "
                    f"output. Received: layer {site.path!r}, which is called in a loop that feeds "
                    "what it gives back to it: no statistics are exact for it. Use "
                    "method='pooled'."
                )
