"""Tests of `tfbn.stats.drift`."""

import html.parser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tfbn import LayerStats
from tfbn.stats import drift

OURS = LayerStats(9, [1.0, 2.0], [4.0, 9.0])
THEIRS = LayerStats(9, [2.0, -1.0], [16.0, 9.0])


def test_formula():
    shift, ratio = drift.by_channel(OURS, THEIRS)
    np.testing.assert_allclose(shift, [0.5, -1])
    np.testing.assert_allclose(ratio, [2, 1])
    layer_drift = drift.of_layer(OURS, THEIRS)
    np.testing.assert_allclose(layer_drift["mean_shift"], np.sqrt((0.5**2 + 1) / 2))
    np.testing.assert_allclose(layer_drift["mean_shift_max"], 1)
    np.testing.assert_allclose(layer_drift["std_ratio"], np.sqrt(2))
    np.testing.assert_allclose(layer_drift["std_ratio_max"], 2)
    narrower = drift.of_layer(THEIRS, OURS)
    np.testing.assert_allclose(narrower["std_ratio"], np.sqrt(1 / 2))
    np.testing.assert_allclose(narrower["std_ratio_max"], 2)


@settings(max_examples=50)
@given(
    arrays(np.float64, (2, 2, 3), elements=st.floats(-1e3, 1e3, allow_subnormal=False)),
    st.floats(0.01, 100),
    st.floats(-100, 100),
)
def test_drift_is_unit_free(values, scale, offset):
    # Changing the unit of the data, x -> scale x + offset, does not change the drift.
    (mean, variance), (other_mean, other_variance) = values
    variance, other_variance = abs(variance) + 1, abs(other_variance) + 1
    a = LayerStats(1, mean, variance), LayerStats(1, other_mean, other_variance)
    b = (
        LayerStats(1, scale * mean + offset, scale**2 * variance),
        LayerStats(1, scale * other_mean + offset, scale**2 * other_variance),
    )
    for ours, theirs in zip(drift.by_channel(*a), drift.by_channel(*b), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-7)


def test_channels_that_never_vary_stay_finite():
    still = LayerStats(9, [1.0, 1.0], [0.0, 0.0])
    assert drift.of_layer(still, still) == {
        "mean_shift": 0,
        "mean_shift_max": 0,
        "std_ratio": 1,
        "std_ratio_max": 1,
    }
    assert np.isfinite(list(drift.of_layer(still, OURS).values())).all()
    assert np.isfinite(list(drift.of_layer(OURS, still).values())).all()


@pytest.mark.filterwarnings("error")
def test_layers_are_sorted_by_drift_with_nan_first():
    near, broken = LayerStats(9, [1.0, 2.1], [4.0, 9.0]), LayerStats(0, [np.nan, 1], [-1, np.inf])
    ours = dict.fromkeys(["near", "far", "broken", "narrow", "alone"], OURS)
    narrow = LayerStats(9, [1.0, 2.0], [4e-6, 9e-6])
    theirs = {"far": THEIRS, "near": near, "broken": broken, "narrow": narrow}
    assert list(drift.of_layers(ours, theirs)) == ["broken", "narrow", "far", "near"]


def test_cells():
    layer_drift = {"mean_shift": 0.1234, "mean_shift_max": 2, "std_ratio": 0.5, "std_ratio_max": 3}
    assert drift.cells(layer_drift) == ["0.123 std", "2.000 std", "0.500", "x 3.000"]
    assert drift.cells(None) == ["-", "-", "-", "-"]
    assert len(drift.COLUMNS) == 4


def test_columns_are_aligned():
    lines = drift.table(["layer", "n"], [["a", 1], ["a/longer/one", 12345], ["b", "-"]])
    assert lines == [
        "layer             n",
        "a                 1",
        "a/longer/one  12345",
        "b                 -",
    ]
    assert drift.table(["layer", "n"], []) == ["layer  n"]


@pytest.mark.parametrize("rows", [1, 39, 40, 41, 200])
def test_long_tables_are_cut_in_the_middle(rows):
    lines = drift.table(["layer", "n"], [[f"layer_{i}", i] for i in range(rows)])
    shown = Rows()
    shown.feed(drift.html_table(["layer", "n"], [[f"layer_{i}", i] for i in range(rows)]))
    numbers = [line.split()[-1] for line in lines[1:]]
    assert shown.rows[0] == ["layer", "n"]
    assert [cells[-1].split()[-1] for cells in shown.rows[1:]] == numbers
    if rows <= 40:
        assert numbers == [str(i) for i in range(rows)]
    else:
        first, last = [str(i) for i in range(30)], [str(i) for i in range(rows - 10, rows)]
        assert numbers == [*first, "...", *last]
        assert lines[31] == f"... {rows - 40} more ..." == shown.rows[31][0]


class Rows(html.parser.HTMLParser):
    """Collect the cells of a table, by row."""

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], []

    def handle_starttag(self, tag, attrs):
        """Start a row or a cell."""
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        """Check that tags are closed in order."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Add text to a cell."""
        if data.strip():
            assert self.open[-1] in ("td", "th")
            self.rows[-1][-1] += data


@given(st.text(max_size=20))
@settings(max_examples=50)
def test_html_is_escaped(name):
    name = "x" + name.replace("\r", "").replace("\0", "")
    shown = Rows()
    shown.feed(drift.html_table(["layer"], [[name]]))
    assert shown.rows == [["layer"], [name]] and not shown.open
