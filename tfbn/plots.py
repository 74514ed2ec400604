"""Figures: `plot_drift` of moving averages by layer, `plot_history` of metrics three ways."""

import numpy as np

# Told apart by people who do not see red and green, and in print.
_WAYS = {
    "moving_average": ("moving averages", "tab:orange", "-", "o"),
    "population": ("population statistics", "tab:blue", "-", "o"),
    "mini_batch": ("mini-batch statistics", "0.5", "--", "s"),
}


def plot_drift(stats, other=None):
    """Draw how far each layer's moving averages are from its population statistics.

    With mu and sigma the population's mean and standard deviation of a channel, and mu', sigma'
    the other's: the left panel has abs(mu' - mu) / sigma, the right one sigma' / sigma. A dot
    is a layer, its root mean square or geometric mean over channels (`mean_shift` and
    `std_ratio` of `PopulationStats.compare`); a line spans all of its channels. The dotted
    line is 1 / sqrt(samples), an upper bound of the standard error of mu: what is left of it
    is no more than chance in the choice of samples.

    No display is needed. In a notebook the figure shows itself; to keep it:
    `tfbn.plot_drift(stats).savefig("drift.png")`.

    Args:
        stats: `tfbn.PopulationStats`.
        other: The `PopulationStats` that are compared with it. By default what the model held
            when it was swept, `stats.previous`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there is nothing to compare with, or if layers or shapes differ.
        ImportError: If matplotlib is not installed.
    """
    figure_class = _figure_class()
    other = stats.previous if other is None else other
    if other is None:
        raise ValueError(
            "Expected statistics to compare with. Received: other=None, and stats that do not "
            "know what the model held before the sweep. Pass `other`, for example "
            "PopulationStats.read(model)."
        )
    drift = stats.compare(other)
    layers = list(stats)
    figure = figure_class(figsize=(10, 1.9 + 0.24 * len(layers)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, layer in enumerate(layers):
        shift, ratio = _by_channel(stats[layer], other[layer])
        for axes, values, dot in (
            (left, np.abs(shift), drift[layer]["mean_shift"]),
            (right, ratio, drift[layer]["std_ratio"]),
        ):
            axes.plot([values.min(), values.max()], [place, place], color="0.75", label="channels")
            axes.plot([dot], [place], "o", ms=5, color="tab:orange", label="layer")
    handles = left.lines[:2]
    if stats.samples:
        handles.append(left.axvline(stats.samples**-0.5, color="0.4", linestyle=":", linewidth=1))
        handles[-1].set_label(f"sampling error of {stats.samples} samples")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    left.set_xlim(left=0)
    left.set_yticks(range(len(layers)), layers)
    left.set_ylim(len(layers) - 0.5, -0.5)
    left.set_xlabel("mean off by, in standard deviations of the population")
    right.axvline(1, color="0.4", linewidth=1)
    right.set_xscale("log")
    _plain_numbers(right.xaxis)
    right.set_xlabel("standard deviation, as a multiple of the population's")
    figure.suptitle(_drift_in_words(drift), fontsize=11)
    _undecorate(figure)
    return figure


def plot_history(history):
    """Draw validation metrics over epochs with each kind of statistics.

    No display is needed. In a notebook the figure shows itself; to keep it:
    `tfbn.plot_history(history).savefig("history.png")`.

    Args:
        history: What `fit` returned with `tfbn.StatsTracker` among its callbacks, or its
            `history` dict: lists by `val_<metric>_<way>`. A metric whose values are all
            positive and spread over more than a factor of 10 has a logarithmic axis.

    Returns:
        A `matplotlib.figure.Figure` with a panel for each metric.

    Raises:
        ValueError: If there are no such metrics.
        ImportError: If matplotlib is not installed.
    """
    figure_class = _figure_class()
    lists = getattr(history, "history", history)
    suffix = "_moving_average"
    metrics = [name[: -len(suffix)] for name in lists if name.endswith(suffix)]
    if not metrics:
        raise ValueError(
            "Expected the history of a fit with tfbn.StatsTracker among its callbacks. Received: "
            f"metrics {list(lists)}."
        )
    figure = figure_class(figsize=(5.5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        curves = {way: np.asarray(lists[f"{metric}_{way}"], float) for way in _WAYS}
        for way, (label, color, style, marker) in _WAYS.items():
            epochs = np.arange(1, len(curves[way]) + 1)
            axes.plot(epochs, curves[way], style, marker=marker, ms=4, color=color, label=label)
        drawn = np.concatenate(list(curves.values()))
        if drawn.min() > 0 and drawn.max() > 10 * drawn.min():
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epochs")
        axes.set_ylabel(metric.removeprefix("val_") + ", validation")
        axes.set_title(_ending_in_words(metric.removeprefix("val_"), curves), fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(_WAYS), frameon=False)
    _undecorate(figure)
    return figure


def _figure_class():
    """matplotlib's `Figure`. Used without pyplot, it needs no display and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib, to draw with. Received: an environment without it. Run "
            "`pip install 'tfbn[plot]'`."
        ) from error
    return Figure


def _by_channel(stats, other):
    # The smallest normal float32 keeps channels that never vary finite.
    tiny = np.finfo(np.float32).tiny
    std = np.sqrt(np.maximum(stats.variance, tiny))
    other_std = np.sqrt(np.maximum(other.variance, tiny))
    return (other.mean - stats.mean) / std, other_std / std


def _drift_in_words(drift):
    layer, shift = max(
        ((layer, off["mean_shift"]) for layer, off in drift.items()), key=lambda pair: pair[1]
    )
    ratios = [off["std_ratio"] for off in drift.values()]
    low, high = min(ratios), max(ratios)
    if shift < 0.01 and low > 0.99 and high < 1.01:
        return "Means and standard deviations agree with the population's to 1 %"
    return (
        f"Means are off by up to {shift:.2g} standard deviations ({layer});\n"
        f"standard deviations are {low:.2g} to {high:.2g} times those of the population"
    )


def _ending_in_words(metric, curves):
    moving, population = curves["moving_average"][-1], curves["population"][-1]
    ending = f"{metric} after {len(curves['population'])} epochs: {moving:.3g} with moving averages"
    if f"{moving:.3g}" == f"{population:.3g}":
        return f"{ending},\nthe same with population statistics"
    return f"{ending},\n{population:.3g} with population statistics"


def _plain_numbers(axis):
    """0.5, 2 and 10 on a logarithmic axis, not powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _undecorate(figure):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
