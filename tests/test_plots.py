"""Tests of figures: their data and texts, compared with NumPy."""

import itertools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from tfbn import LayerStats, PopulationStats
from tfbn.plots import plot_drift, plot_history


@pytest.fixture(autouse=True)
def no_windows():
    """Open no window, and close all figures after a test."""
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def statistics(seed, samples=100, layers=("first", "block/second")):
    """Return random statistics of two layers."""
    rng = np.random.default_rng(seed)
    actual = {
        path: LayerStats(samples, rng.normal(size=5), rng.uniform(0.5, 2, 5)) for path in layers
    }
    return PopulationStats(actual, method="pooled", samples=samples)


def bars(axes):
    """Return the ends of the bars of a panel's standard errors, from the top."""
    return np.array([line.get_xdata() for line in axes.lines if line.get_linewidth() == 7])


def dots(axes):
    """Return the positions of the dots of a panel, from the top."""
    actual = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
    return np.array(actual)[:, 0]


def spans(axes):
    """Return the ends of the lines of a panel's layers, from the top."""
    lines = [
        line.get_xdata()
        for line in axes.lines
        if line.get_color() == "0.5" and len(set(line.get_ydata())) == 1
    ]
    return np.array(lines)


def test_drift_is_drawn_in_the_order_of_the_layers():
    population, moving = statistics(0), statistics(1)
    figure = plot_drift(population, moving)
    assert isinstance(figure, Figure)
    left, right = figure.axes
    pairs = [(population[path], moving[path]) for path in population]
    shifts = [np.abs(m.mean - p.mean) / np.sqrt(p.variance) for p, m in pairs]
    ratios = [np.sqrt(m.variance / p.variance) for p, m in pairs]
    assert [label.get_text() for label in left.get_yticklabels()] == list(population)
    assert left.yaxis_inverted()
    np.testing.assert_allclose(dots(left), [np.sqrt(np.mean(s**2)) for s in shifts])
    np.testing.assert_allclose(spans(left), [(s.min(), s.max()) for s in shifts])
    np.testing.assert_allclose(dots(right), [np.exp(np.log(r).mean()) for r in ratios])
    np.testing.assert_allclose(spans(right), [(r.min(), r.max()) for r in ratios])
    assert bars(left).size == bars(right).size == 0


def test_standard_errors_are_bars():
    layers = {
        path: s.with_errors(0.1 * np.sqrt(s.variance) * [0, 1, 2, 0, 0], 0.2 * s.variance)
        for path, s in statistics(0).items()
    }
    left, right = plot_drift(PopulationStats(layers, method="pooled"), statistics(1)).axes
    np.testing.assert_allclose(bars(left), [[0, 0.1]] * 2)
    np.testing.assert_allclose(bars(right), [[1 / 1.1, 1.1]] * 2)


@pytest.mark.parametrize("spread", [1.1, 1.7, 4, 6, 100, 1e4])
def test_a_logarithmic_axis_has_plain_numbers(spread):
    population = statistics(0)
    scaled = {
        path: LayerStats(0, s.mean, s.variance * np.linspace(1, spread, 5) ** 2)
        for path, s in population.items()
    }
    figure = plot_drift(population, PopulationStats(scaled, method="assigned"))
    figure.draw_without_rendering()
    axis = figure.axes[1].xaxis
    low, high = axis.get_view_interval()
    seen = [label.get_text() for label in axis.get_ticklabels()]
    seen = [text for text in seen if low <= float(text) <= high]
    assert 3 <= len(seen) <= 9 and "1" in seen and not any("e" in text for text in seen)


@pytest.mark.parametrize("factor", [0.02, 0.5, 0.97])
def test_a_ratio_axis_has_numbers_on_both_sides_of_1(factor):
    """Half of the layers are below 1, half above."""
    population = statistics(0)
    scaled = {
        path: LayerStats(0, s.mean, s.variance * f**2)
        for (path, s), f in zip(population.items(), (factor, 1 / factor), strict=True)
    }
    figure = plot_drift(population, PopulationStats(scaled, method="assigned"))
    figure.draw_without_rendering()
    axis = figure.axes[1].xaxis
    low, high = axis.get_view_interval()
    seen = [t for t in axis.get_majorticklocs() if low <= t <= high]
    assert min(seen) < 1 < max(seen)


def overlaps(figure):
    """Return pairs of texts of a figure that overlap, and texts outside of it."""
    figure.draw_without_rendering()
    actual = [
        *figure.findobj(lambda t: isinstance(t, Text) and t.get_visible() and t.get_text().strip())
    ]
    for axes in figure.axes:  # Numbers beyond the ends of an axis are not drawn.
        for place, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
            past = [t for t in labels if not low <= t.get_position()[place] <= high]
            actual = [t for t in actual if t not in past]
    boxes = [(t.get_text(), t.get_window_extent()) for t in actual]
    boxes = [(text, box) for text, box in boxes if box.width > 0]
    canvas = figure.bbox
    out = [t for t, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > canvas.x1 or b.y1 > canvas.y1]
    pairs = itertools.combinations(boxes, 2)
    return out + [(a, b) for (a, left), (b, right) in pairs if left.overlaps(right)]


@pytest.mark.parametrize("name", ["drift", "history"])
@pytest.mark.parametrize("own", [False, True])
def test_no_text_is_cut_or_overprinted(name, own):
    """Also in axes of the default size, created as documented."""
    draw, panels = FIGURES[name]
    ax = plt.subplots(1, panels, layout="constrained")[1] if own else None
    assert not overlaps(draw(ax))


def test_standard_errors_are_seen_on_white_and_on_black():
    layers = {p: s.with_errors(0.1 * s.variance, s.variance) for p, s in statistics(0).items()}
    for style, ground in (("default", 1.0), ("dark_background", 0.0)):
        with plt.style.context(style):
            left, _ = plot_drift(PopulationStats(layers, method="pooled"), statistics(1)).axes
        [bar, *_] = [line for line in left.lines if line.get_linewidth() == 7]
        assert bar.get_alpha() is None
        assert abs(np.mean(to_rgb(bar.get_color())) - ground) > 0.15


def test_drift_title_states_the_finding():
    population = statistics(0)
    shifted = {
        path: LayerStats(0, s.mean + factor * np.sqrt(s.variance), 4 * s.variance)
        for (path, s), factor in zip(population.items(), (0.5, 1.5), strict=True)
    }
    left, right = plot_drift(population, PopulationStats(shifted, method="assigned")).axes
    assert left.get_title() == "mean off by up to 1.5\n(channels 1.5)"
    assert right.get_title() == "std 2 to 2 times\n(channels 2 to 2)"
    left, _ = plot_drift(population, statistics(1)).axes
    assert (
        left.get_title()
        == f"mean off by up to {dots(left).max():.3g}\n(channels {spans(left).max():.3g})"
    )


def test_drift_is_from_what_was_there_before_by_default():
    previous = statistics(1)
    swept = PopulationStats(dict(statistics(0)), method="pooled", samples=9, previous=previous)
    assert dots(plot_drift(swept).axes[0]) == pytest.approx(
        dots(plot_drift(swept, previous).axes[0])
    )
    with pytest.raises(ValueError, match=r"to compare with. Received: other=None"):
        plot_drift(statistics(0))
    with pytest.raises(ValueError, match="different models"):
        plot_drift(swept, statistics(0, layers=("other",)))


def test_a_channel_that_never_varies_is_drawn():
    still = PopulationStats({"a": LayerStats(5, np.zeros(2), np.zeros(2))}, method="pooled")
    moving = PopulationStats({"a": LayerStats(5, np.ones(2), np.ones(2))}, method="assigned")
    plot_drift(still, moving).savefig(os.devnull, format="png")


def history(population_end=0.25):
    """Return three epochs of two metrics, and other metrics."""
    return {
        "loss": [2.0, 1.0, 0.5],
        "val_loss": [9.0, 9.0, 9.0],
        "val_loss_moving_average": [3.0, 2.0, 1.0],
        "val_loss_population": [1.0, 0.5, population_end],
        "val_loss_mini_batch": [1.1, 0.6, 0.35],
        "val_accuracy_moving_average": [0.0, 0.5, 0.6],
        "val_accuracy_population": [0.2, 0.7, 0.6],
        "val_accuracy_mini_batch": [0.1, 0.6, 0.55],
    }


def test_history_has_a_panel_for_each_metric():
    figure = plot_history(history())
    loss, accuracy = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss, validation",
        "accuracy, validation",
    ]
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        ways = ["moving_average", "population", "mini_batch"]
        for line, way in zip(axes.lines, ways, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_array_equal(line.get_ydata(), history()[f"val_{metric}_{way}"])
    assert loss.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    assert loss.get_title() == "loss after 3 epochs:\nmoving averages 1,\npopulation 0.25"
    assert accuracy.get_title().endswith("\nmoving averages 0.6,\npopulation 0.6")
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "moving averages",
        "population statistics",
        "mini-batch statistics",
    ]


def drawn(path):
    """Return whether a picture has more than its background."""
    return len(np.unique(plt.imread(path)[..., :3])) > 10


FIGURES = {
    "drift": (lambda ax=None: plot_drift(statistics(0), statistics(1), ax=ax), 2),
    "history": (lambda ax=None: plot_history(history(), ax=ax), 2),
    "one metric": (
        lambda ax=None: plot_history(
            {name: v for name, v in history().items() if "accuracy" not in name}, ax=ax
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_pyplot_knows_the_figure(name, tmp_path):
    draw, panels = FIGURES[name]
    plt.figure()
    figure = draw()
    assert plt.gcf() is figure and len(figure.axes) == panels
    plt.savefig(tmp_path / "figure.png")
    assert drawn(tmp_path / "figure.png")


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("sharey", [False, True])
def test_axes_that_are_given_are_drawn_in(name, sharey, tmp_path):
    draw, panels = FIGURES[name]
    figure, axes = plt.subplots(2, panels, squeeze=False, sharey=sharey)
    untouched = axes[0, 0]
    own = axes[1] if panels > 1 else axes[1, 0]
    lines = untouched.lines[:]
    assert draw(ax=own) is figure
    assert len(plt.get_fignums()) == 1
    assert list(untouched.lines) == list(lines) and untouched.spines["top"].get_visible()
    # The function adds artists only to its axes, not to the figure.
    assert not figure.legends and not figure.get_suptitle()
    assert axes[1, 0].get_legend() and axes[1, 0].get_title()
    alone = draw()
    for mine, theirs in zip(axes[1], alone.axes, strict=True):
        assert len(mine.lines) == len(theirs.lines)
        for a, b in zip(mine.lines, theirs.lines, strict=True):
            np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())
        assert mine.get_ylim() == theirs.get_ylim() or (sharey and name == "history")
    figure.savefig(tmp_path / "figure.png")
    assert drawn(tmp_path / "figure.png")


def test_a_part_of_a_figure_is_drawn_in():
    figure = plt.figure(layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    assert plot_drift(statistics(0), statistics(1), ax=top.subplots(1, 2)) is top
    assert plot_history(history(), ax=bottom.subplots(1, 2)) is bottom
    figure.savefig(os.devnull, format="png")


@pytest.mark.parametrize("name", FIGURES)
def test_other_axes_are_refused(name):
    draw, panels = FIGURES[name]
    three = plt.subplots(1, 3)[1]
    for wrong in (three, plt.gcf(), "left", [None] * panels):
        with pytest.raises(ValueError, match=rf"{panels} for this figure. Received: ax=.*subplots"):
            draw(ax=wrong)


class Fitted:
    """Like `keras.callbacks.History`."""

    history = {"loss": [1.0]}  # noqa: RUF012


def test_wrong_arguments_are_told_what_to_do():
    stats = statistics(0)
    for wrong in (Fitted(), history(), keras.Sequential(), None, [stats]):
        with pytest.raises(ValueError, match=r"stats to be tfbn\.PopulationStats.*plot_history"):
            plot_drift(wrong)
    with pytest.raises(ValueError, match=r"other to be .* Received: other=<.*Fitted.*plot_history"):
        plot_drift(stats, Fitted())
    partial = {name: v for name, v in history().items() if name != "val_loss_population"}
    none = {name: [] for name in history()}
    for wrong in (Fitted(), Fitted.history, stats, keras.Sequential(), None, partial, none):
        with pytest.raises(ValueError, match=r"StatsTracker .* Received: history .*plot_drift"):
            plot_history(wrong)
    # An error creates no empty figure.
    assert not plt.get_fignums()


@pytest.mark.slow
def test_no_display_is_needed(tmp_path):
    """Not even if matplotlib is configured to use windows."""
    code = (
        "import sys; from test_plots import *;"
        "plot_drift(statistics(0), statistics(1)).savefig(sys.argv[1]);"
        "plot_history(history()).savefig(sys.argv[1])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {"MPLBACKEND": "TkAgg", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", code, str(tmp_path / "figure.png")]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: plot_drift(statistics(0), statistics(1)), lambda: plot_history(history())):
        with pytest.raises(ImportError, match=r"pip install 'tfbn\[plot\]'"):
            draw()


def test_a_backend_without_a_display_draws_all_the_same(monkeypatch):
    def no_display(**options):
        raise ImportError("Cannot load backend 'TkAgg', as 'headless' is currently running")

    monkeypatch.setattr("matplotlib.pyplot.figure", no_display)
    before = PopulationStats({"bn": LayerStats(4, [0.0], [1.0])}, method="assigned")
    stats = PopulationStats({"bn": LayerStats(4, [1.0], [2.0])}, method="exact", previous=before)
    assert type(plot_drift(stats)).__name__ == "Figure"
