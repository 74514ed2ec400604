"""Compare the predictions of two networks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Difference(NamedTuple):
    """The difference between an output and the expected output.

    Attributes:
        absolute: The largest absolute difference. NaN and infinity are equal to themselves, and
            infinitely far from other values; so are outputs of other shapes, and other strings.
        scale: The largest finite absolute value that was expected.
    """

    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference as a multiple of the scale."""
        return 0.0 if not self.absolute else self.absolute / self.scale if self.scale else np.inf

    def tolerance(self, low_precision: bool) -> float:
        """Return the largest difference that is allowed between separately optimized graphs."""
        return max(1.0, self.scale) * (2e-2 if low_precision else 1e-3)


def difference(output: Any, expected: Any) -> Difference:
    """Compare an output with the expected one, both tensors or arrays."""
    got, want = np.asarray(output), np.asarray(expected)
    if got.shape != want.shape:
        return Difference(np.inf, 0.0)
    if want.dtype.kind in "OSU":
        return Difference(0.0 if np.array_equal(got, want) else np.inf, 0.0)
    got, want = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(got - want))
    finite = np.abs(want[np.isfinite(want)])
    largest = np.max(np.nan_to_num(distance, nan=np.inf, posinf=np.inf), initial=0.0)
    return Difference(float(largest), float(np.max(finite, initial=0.0)))


def differences(outputs: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Difference]:
    """Return name of an output -> its difference."""
    return {name: difference(outputs[name], want) for name, want in expected.items()}


def relative_difference(outputs: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest relative difference of several outputs."""
    pairs = zip(outputs, expected, strict=True)
    return max((difference(*pair).relative for pair in pairs), default=0.0)
