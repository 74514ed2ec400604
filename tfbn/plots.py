"""Plot the drift of moving averages by layer, and validation metrics over epochs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tfbn.stats.drift import by_channel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from tfbn.population import PopulationStats
    from tfbn.serving.monitor.served_stats import ServedDrift
    from tfbn.stats.layer_stats import LayerStats

_SPAN, _ERROR = "0.5", "#9ecae1"  # Visible on white and black backgrounds.

# Tick labels of an axis of ratios, in addition to powers of 10.
_RATIOS = [0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 5]

# Kind of statistics -> label and style, which can be distinguished without colors.
_WAYS = {
    "moving_average": ("moving averages", "tab:orange", "-", "o"),
    "population": ("population statistics", "tab:blue", "-", "o"),
    "mini_batch": ("mini-batch statistics", "0.5", "--", "s"),
}


def plot_drift(
    stats: "PopulationStats | ServedDrift",
    other: "PopulationStats | None" = None,
    ax: "Sequence[Axes] | np.ndarray | None" = None,
) -> "Figure":
    """Plot the drift of each layer's moving averages from its population statistics.

    Let mu and sigma be the population's mean and standard deviation of a channel, and mu', sigma'
    the moving averages'. The left panel shows abs(mu' - mu) / sigma, the right panel sigma' /
    sigma. A dot is the root mean square or geometric mean over the channels of a layer
    (`mean_shift` and `std_ratio` of `PopulationStats.compare`), a line the range of its channels.
    The titles show the range over layers and over channels. A wide bar is the standard error if the
    sweep measured it (`LayerStats.mean_error` and `variance_error`, root mean square over
    channels): a dot inside it can be explained by the choice of samples.

    The figure is pyplot's current figure, so `plt.savefig` and `plt.show` work as usual. Saving
    requires no display. In a notebook, end the line with a semicolon to show it only once.

    ```python
    tfbn.plot_drift(stats).savefig("drift.png")
    ```

    Args:
        stats: `tfbn.PopulationStats`, or the result of `tfbn.ServedStats.compare`, to compare
            served data with the population, in units of sqrt(variance + epsilon).
        other: The `PopulationStats` to compare with. By default `stats.previous`, the statistics
            before the sweep.
        ax: Two matplotlib axes, for example `plt.subplots(1, 2, layout="constrained")[1]`; other
            layouts may clip the names of layers. By default the axes of a new figure.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `stats` or `other` are not statistics, if `stats.previous` is `None` without
            `other`, if layers or shapes differ, or if `ax` is not two axes.
        ImportError: If matplotlib is not installed.
    """
    drift = _compared(stats, other)
    layers = list(drift)
    panels = left, right = _panels(ax, 2, (10, 1.9 + 0.24 * len(layers)), sharey=True)
    bars = []
    for row, layer in enumerate(drift.values()):
        if not np.isnan(layer.mean_error):
            bar: dict[str, Any] = {"color": _ERROR, "lw": 7, "solid_capstyle": "butt"}
            ends = [1 / (1 + layer.std_error), 1 + layer.std_error]
            bars = left.plot([0, layer.mean_error], [row] * 2, label="standard error", **bar)
            right.plot(ends, [row] * 2, **bar)
        for axes, values, dot in (
            (left, layer.shifts, layer.mean_shift),
            (right, layer.ratios, layer.std_ratio),
        ):
            axes.plot([values.min(), values.max()], [row] * 2, color=_SPAN, label="channels")
            axes.plot([dot], [row], "o", ms=5, color="tab:orange", label="layer")
    handles = left.lines[-2:]
    handles += bars
    left.set_xlim(left=0)
    left.locator_params(axis="x", nbins=5)
    for axes in panels:
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylim(len(layers) - 0.5, -0.5)
    right.tick_params(labelleft=False)
    left.set_xlabel("mean off by\n(std of the population)")
    right.axvline(1, color="0.5", linewidth=1)
    _ratio_axis(right)
    right.set_xlabel("std\n(std of the population)")
    most = max(layer.mean_shift for layer in drift.values())
    furthest = max(layer.shifts.max() for layer in drift.values())
    left.set_title(f"mean off by up to {most:.3g}\n(channels {furthest:.3g})")
    few, many = (end(layer.std_ratio for layer in drift.values()) for end in (min, max))
    fewest = min(layer.ratios.min() for layer in drift.values())
    most = max(layer.ratios.max() for layer in drift.values())
    right.set_title(f"std {few:.3g} to {many:.3g} times\n(channels {fewest:.3g} to {most:.3g})")
    return _finished(panels, handles, new=ax is None)


class _Layer(NamedTuple):
    """The drift of a layer: by channel, averaged over channels, and its standard errors."""

    shifts: np.ndarray
    ratios: np.ndarray
    mean_shift: float
    std_ratio: float
    mean_error: float
    std_error: float


def _compared(stats: Any, other: Any) -> dict[str, _Layer]:
    """Return path -> drift of a layer."""
    if hasattr(stats, "channels") and other is None:  # A `ServedDrift`
        return {
            path: _Layer(
                np.abs(shift),
                ratio,
                *(stats.layers[path][name] for name in ("mean_shift", "std_ratio")),
                *(stats.layers[path][name] for name in ("mean_shift_error", "std_ratio_error")),
            )
            for path, (shift, ratio) in stats.channels.items()
        }
    for name, given in (("stats", stats), ("other", other)):
        if given is not None or name == "stats":
            _require_statistics(name, given)
    other = stats.previous if other is None else other
    if other is None:
        raise ValueError(
            "Expected statistics to compare with. Received: other=None without stats.previous. "
            "Pass other=PopulationStats.read(model)."
        )
    layers = {}
    drift = stats.compare(other)
    for path in stats:
        shift, ratio = by_channel(stats[path], other[path])
        means = drift[path]["mean_shift"], drift[path]["std_ratio"]
        layers[path] = _Layer(np.abs(shift), ratio, *means, *_errors(stats[path]))
    return layers


def _errors(stats: "LayerStats") -> list[float]:
    """Return the RMS standard errors of mean and standard deviation, in standard deviations."""
    variance = np.where(stats.variance > 0, stats.variance, np.inf)
    squares = stats.mean_error**2 / variance, (stats.variance_error / (2 * variance)) ** 2
    return [float(np.sqrt(np.mean(square))) for square in squares]


def plot_history(history: Any, ax: "Axes | Sequence[Axes] | np.ndarray | None" = None) -> "Figure":
    """Plot validation metrics over epochs with each kind of statistics.

    The figure is pyplot's current figure, so `plt.savefig` and `plt.show` work as usual. Saving
    requires no display. In a notebook, end the line with a semicolon to show it only once.

    ```python
    tfbn.plot_history(history).savefig("history.png")
    ```

    Args:
        history: The history of a `fit` with the callback `tfbn.StatsTracker`, or its `history`
            dict: `val_<metric>_<kind of statistics>` -> list. A metric has a logarithmic axis if
            its values are positive and span more than a factor of 10.
        ax: A matplotlib axes for each metric. By default the axes of a new figure.

    Returns:
        The `matplotlib.figure.Figure`, with a panel for each metric.

    Raises:
        ValueError: If the history has no such metrics, or if `ax` has not one axes for each.
        ImportError: If matplotlib is not installed.
    """
    lists, metrics = _tracked(history)
    panels = _panels(ax, len(metrics), (5.5 * len(metrics), 4))
    for axes, metric in zip(panels, metrics, strict=True):
        curves = {way: np.asarray(lists[f"{metric}_{way}"], float) for way in _WAYS}
        for way, (label, color, style, marker) in _WAYS.items():
            epochs = np.arange(1, len(curves[way]) + 1)
            axes.plot(epochs, curves[way], style, marker=marker, ms=4, color=color, label=label)
        drawn = np.concatenate(list(curves.values()))
        if drawn.min() > 0 and drawn.max() > 10 * drawn.min():
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("epochs")
        axes.set_ylabel(metric.removeprefix("val_") + ", validation")
        axes.set_title(_ending_in_words(metric.removeprefix("val_"), curves))
    return _finished(panels, panels[0].lines[-len(_WAYS) :], new=ax is None)


def _require_statistics(name: str, given: object) -> None:
    if not hasattr(given, "compare"):
        raise ValueError(
            f"Expected {name} to be tfbn.PopulationStats. Received: {name}={given!r} of class "
            f"{type(given).__name__}. For the history of a fit use tfbn.plot_history."
        )


def _tracked(history: Any) -> tuple[dict[str, list[float]], list[str]]:
    """Return the lists of a history, and the names of the metrics with all kinds of statistics."""
    lists = getattr(history, "history", history)
    names = list(lists) if isinstance(lists, dict) else []
    suffix = "_moving_average"
    metrics = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    needed = [f"{metric}_{way}" for metric in metrics for way in _WAYS]
    if not metrics or not all(len(lists.get(name, ())) for name in needed):
        raise ValueError(
            "Expected the history of a fit with StatsTracker as callback. Received: history of "
            f"class {type(history).__name__} with {names}. For PopulationStats use plot_drift."
        )
    return lists, metrics


def _panels(
    ax: Any, count: int, figsize: tuple[float, float], sharey: bool = False
) -> "list[Axes]":
    """Return the given axes, or the axes of a new figure."""
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'tfbn[plot]'.") from error
    if ax is not None:
        panels = list(np.ravel(ax))
        if len(panels) != count or not all(isinstance(axes, Axes) for axes in panels):
            raise ValueError(
                f"Expected matplotlib axes, {count} for this figure. Received: ax={ax!r}. "
                f"Use plt.subplots(1, {count}, layout='constrained')."
            )
        return panels
    try:
        figure = pyplot.figure(figsize=figsize, layout="constrained")
    except ImportError:
        # The backend requires a display. A figure without a backend can still be saved.
        figure = Figure(figsize=figsize, layout="constrained")
    return list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _finished(panels: "list[Axes]", handles: "Sequence[Line2D]", new: bool) -> "Figure":
    """Return the figure with a legend, below the panels of a new figure."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure: Any = panels[0].figure
    if new:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
    else:
        panels[0].legend(handles=handles, fontsize="small")
    return figure


def _ending_in_words(metric: str, curves: Mapping[str, np.ndarray]) -> str:
    moving, population = curves["moving_average"][-1], curves["population"][-1]
    ending = f"{metric} after {len(curves['population'])} epochs:\nmoving averages {moving:.3g},"
    return f"{ending}\npopulation {population:.3g}"


def _ratio_axis(axes: "Axes") -> None:
    """Set a logarithmic axis around 1, with plain numbers on each side that has data."""
    ends = np.concatenate([line.get_xdata() for line in axes.lines]).astype(float)
    ends = ends[(ends > 0) & np.isfinite(ends)]
    low, high = ends.min(initial=0.99), ends.max(initial=1.01)
    margin = (high / low) ** 0.05
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    numbers = [*_RATIOS, *(10.0**k for k in range(-40, 41) if k)]
    chosen = [1.0]
    for number in sorted(numbers, key=lambda number: -abs(np.log(number))):
        distance = min(abs(np.log(number / other)) for other in chosen)
        if low <= number <= high and distance > 0.12 * np.log(high / low):
            chosen.append(number)
    axes.set_xticks(sorted(chosen))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if 1e-4 <= x < 1e6 else f"{x:.0e}")
    axes.xaxis.set_minor_formatter("")


def _plain_numbers(axis: "Axis") -> None:
    """Label a logarithmic axis with 0.5, 2 and 10, a short one also with 0.8 and 1.2."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    locator = LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(locator)
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
