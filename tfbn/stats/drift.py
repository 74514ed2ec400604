"""Drift: how far two statistics of a batch norm layer are apart, and its tables.

With mu and sigma the mean and the standard deviation of one channel, mu' and sigma' those of the
other statistics, the shift is (mu' - mu) / sigma and the ratio sigma' / sigma.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

# A channel that never varies has variance 0: the smallest normal float32 keeps the
# ratios finite without being seen anywhere else.
_TINY = float(np.finfo(np.float32).tiny)

# Of a long table the first and the last rows.
_FIRST, _LAST = 30, 10

COLUMNS = ("mean off by", "largest", "std ratio", "largest")


class Statistics(Protocol):
    """Mean and variance per channel, float64, each of shape `(channels,)`."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def variance(self) -> np.ndarray: ...


def by_channel(ours: Statistics, theirs: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Shift and ratio of every channel, each of shape `(channels,)`."""
    std = np.sqrt(np.maximum(ours.variance, _TINY))
    other_std = np.sqrt(np.maximum(theirs.variance, _TINY))
    with np.errstate(invalid="ignore", over="ignore"):  # A broken model may hold anything.
        return (theirs.mean - ours.mean) / std, other_std / std


def of_layer(ours: Statistics, theirs: Statistics) -> dict[str, float]:
    """Shift and ratio of a layer, and of its worst channel.

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
    """`of_layer` of every layer of `ours` that is in `theirs` too, by path, worst first.

    The worst has the largest `mean_shift` + abs(log(`std_ratio`)). One with NaN comes first.
    """
    report = {path: of_layer(ours[path], theirs[path]) for path in ours if path in theirs}
    return dict(sorted(report.items(), key=lambda item: -_severity(item[1])))


def cells(drift: Mapping[str, float] | None) -> list[str]:
    """The cells of a layer under `COLUMNS`, from its drift by `of_layer`; dashes for `None`."""
    if drift is None:
        return ["-"] * len(COLUMNS)
    return [
        f"{drift['mean_shift']:.3f} std",
        f"{drift['mean_shift_max']:.3f} std",
        f"{drift['std_ratio']:.3f}",
        f"x {drift['std_ratio_max']:.3f}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table: first column to the left, the others to the right.

    Of more than 40 rows, the first 30 and the last 10 are shown, and between them how many
    are not.
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
    """The table in HTML. Whatever the cells hold is text there."""
    shown, left_out = _cut(rows)
    lines = [_html_row("td", row) for row in shown]
    if left_out:
        more = f'<tr><td colspan="{len(head)}">... {left_out} more ...</td></tr>'
        lines.insert(_FIRST, more)
    return "\n".join(
        [
            "<table>",
            f"<thead>{_html_row('th', head)}</thead>",
            "<tbody>",
            *lines,
            "</tbody></table>",
        ]
    )


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
