"""Compute the drift between two statistics of a batch norm layer, and format it as tables.

For a channel with mean mu and standard deviation sigma in one, mu' and sigma' in the other, the
shift is (mu' - mu) / sigma and the ratio sigma' / sigma.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

# Lower bound of the variance, which keeps the ratios of constant channels finite.
_TINY = float(np.finfo(np.float32).tiny)

# Rows shown of a long table.
_FIRST, _LAST = 30, 10

COLUMNS = ("mean off by", "largest", "std ratio", "largest")


class Statistics(Protocol):
    """Mean and variance per channel, float64, each of shape `(channels,)`."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def variance(self) -> np.ndarray: ...


def by_channel(ours: Statistics, theirs: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Return shift and ratio of every channel, each of shape `(channels,)`."""
    std = np.sqrt(np.maximum(ours.variance, _TINY))
    other_std = np.sqrt(np.maximum(theirs.variance, _TINY))
    with np.errstate(invalid="ignore", over="ignore"):  # A broken model holds NaN.
        return (theirs.mean - ours.mean) / std, other_std / std


def of_layer(ours: Statistics, theirs: Statistics) -> dict[str, float]:
    """Return shift and ratio of a layer, and of its worst channel.

    Returns:
        `mean_shift`: the root mean square of the shift over channels; `mean_shift_max`: its
        largest absolute value; `std_ratio`: the geometric mean of the ratio r over channels;
        `std_ratio_max`: the largest factor max(r, 1 / r).
    """
    shift, ratio = by_channel(ours, theirs)
    with np.errstate(invalid="ignore", over="ignore"):
        log_ratio = np.log(ratio)
        return {
            "mean_shift": float(np.sqrt(np.mean(shift**2))),
            "mean_shift_max": float(np.max(np.abs(shift))),
            "std_ratio": float(np.exp(np.mean(log_ratio))),
            "std_ratio_max": float(np.exp(np.max(np.abs(log_ratio)))),
        }


def of_layers(
    ours: Mapping[str, Statistics], theirs: Mapping[str, Statistics]
) -> dict[str, dict[str, float]]:
    """Return path -> `of_layer` for the layers in both, worst first.

    The worst has the largest `mean_shift` + abs(log(`std_ratio`)). Layers with NaN come first.
    """
    report = {path: of_layer(ours[path], theirs[path]) for path in ours if path in theirs}
    return dict(sorted(report.items(), key=lambda item: -_severity(item[1])))


def cells(drift: Mapping[str, float] | None) -> list[str]:
    """Return a layer's cells for `COLUMNS` from its `of_layer`; dashes for `None`."""
    if drift is None:
        return ["-"] * len(COLUMNS)
    return [
        f"{drift['mean_shift']:.3f} std",
        f"{drift['mean_shift_max']:.3f} std",
        f"{drift['std_ratio']:.3f}",
        f"x {drift['std_ratio_max']:.3f}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a text table: first column left-aligned, the others right-aligned.

    A table of more than 40 rows shows the first 30, the number of rows left out, and the last 10.
    """
    shown, left_out = _cut(rows)
    cells = [[str(cell) for cell in row] for row in (head, *shown)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        aligned = [first.ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(aligned))
    if left_out:
        lines.insert(1 + _FIRST, f"... {left_out} more ...")
    return lines


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return the table as HTML, with all cells escaped."""
    shown, left_out = _cut(rows)
    body = [_html_row("td", row) for row in shown]
    if left_out:
        body.insert(_FIRST, f'<tr><td colspan="{len(head)}">... {left_out} more ...</td></tr>')
    top = ["<table>", f"<thead>{_html_row('th', head)}</thead>", "<tbody>"]
    return "\n".join([*top, *body, "</tbody></table>"])


def _html_row(tag: str, row: Sequence[object]) -> str:
    left, right = "text-align: left", "text-align: right"
    cells = [
        f'<{tag} style="{right if i else left}">{html.escape(str(cell))}</{tag}>'
        for i, cell in enumerate(row)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _cut(rows: Iterable[Sequence[object]]) -> tuple[list[Sequence[object]], int]:
    rows = list(rows)
    left_out = max(0, len(rows) - _FIRST - _LAST)
    return rows if not left_out else rows[:_FIRST] + rows[-_LAST:], left_out


def _severity(drift: Mapping[str, float]) -> float:
    severity = drift["mean_shift"] + abs(np.log(drift["std_ratio"]))
    return np.inf if np.isnan(severity) else severity
