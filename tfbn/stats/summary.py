"""The table of population statistics that is printed, and the same as plain data."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tfbn.stats import blending, drift, stats_file

if TYPE_CHECKING:
    from tfbn.population import PopulationStats


def table(stats: "PopulationStats") -> tuple[str, list[str], list[list]]:
    """Title, head and rows of the table of `PopulationStats.summary`."""
    if stats.method == "assigned":
        title = f"Statistics of {len(stats)} layers as the model held them, not swept"
        return title, ["layer", "channels"], [[path, len(stats[path].mean)] for path in stats]
    title = (
        f"Population statistics: method={stats.method!r}, {stats.samples} samples "
        f"in {stats.batches} batches of at most {stats.batch_size}"
    )
    if stats.tolerance is not None:
        why = "reached" if stats.relative_error <= stats.tolerance else "data ended first"
        size = stats.population_size
        title += f" drawn at random from {size}" if size else " in the order of the data"
        title += f", tolerance={stats.tolerance:g} ({why})"
    if stats.source_weight:
        title += f", {blending.in_words(stats.samples, stats.source_weight)}"
    off = {} if stats.previous is None else drift.of_layers(stats, stats.previous)
    rows = []
    for path in [*off, *(path for path in stats if path not in off)]:
        error = stats[path].relative_error
        known = "-" if np.isnan(error) else f"{error:.4f}"
        rows.append([path, stats[path].count, *drift.cells(off.get(path))[::2], known])
    return title, ["layer", "values/channel", *drift.COLUMNS[::2], "std error"], rows


def as_dict(stats: "PopulationStats") -> dict[str, Any]:
    """All of the statistics but `previous`, for JSON. An error that is not known is `None`."""
    return {
        **{name: getattr(stats, name) for name in stats_file.ATTRIBUTES},
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
