"""Convert population statistics to a table or to plain data."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tfbn.stats import blending, drift

if TYPE_CHECKING:
    from tfbn.population import PopulationStats


def table(stats: "PopulationStats") -> tuple[str, list[str], list[list]]:
    """Return title, head and rows for `PopulationStats.summary`."""
    if stats.method == "assigned":
        title = f"Statistics of {len(stats)} layers as the model held them, not swept"
        return title, ["layer", "channels"], [[path, len(stats[path].mean)] for path in stats]
    title = (
        f"Population statistics: method={stats.method!r}, {stats.samples} samples "
        f"in {stats.batches} batches of at most {stats.batch_size}"
    )
    if stats.tolerance is not None:
        outcome = "reached" if stats.relative_error <= stats.tolerance else "not reached"
        size = stats.population_size
        title += f" drawn at random from {size}" if size else " in the order of the data"
        title += f", tolerance={stats.tolerance:g} ({outcome})"
    if stats.prior_samples:
        title += f", {blending.in_words(stats.samples, stats.prior_samples)}"
    drifts = {} if stats.previous is None else drift.of_layers(stats, stats.previous)
    rows = []
    for path in [*drifts, *(path for path in stats if path not in drifts)]:
        error = stats[path].relative_error
        error_cell = "-" if np.isnan(error) else f"{error:.4f}"
        rows.append([path, stats[path].count, *drift.cells(drifts.get(path))[::2], error_cell])
    return title, ["layer", "values/channel", *drift.COLUMNS[::2], "std error"], rows


def as_dict(stats: "PopulationStats") -> dict[str, Any]:
    """Return everything but `previous` for JSON. Unknown errors are `None`."""
    return {
        **stats.attributes,
        "layers": {
            path: {
                "count": layer.count,
                "counts": layer.counts.tolist(),
                "mean": layer.mean.tolist(),
                "variance": layer.variance.tolist(),
                **{
                    name: [None if np.isnan(value) else value for value in error.tolist()]
                    for name, error in layer.errors.items()
                },
            }
            for path, layer in stats.items()
        },
    }
