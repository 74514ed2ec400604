"""The methods of a sweep, one row each: level by level or in one pass; whether batches matter."""

from typing import NamedTuple


class Method(NamedTuple):
    """How a method sweeps.

    Attributes:
        by_level: Whether a layer is observed while the layers before it normalise with their
            population statistics, level by level. Else they normalise with the batch's own
            moments, as in training, and one pass observes all layers.
        batches_matter: Whether the statistics depend on how the data is cut into batches.
    """

    by_level: bool
    batches_matter: bool


# How the moments of batches accumulate stands in `tfbn.stats.moments`, by the same names.
METHODS = {
    "exact": Method(by_level=True, batches_matter=False),
    "pooled": Method(by_level=False, batches_matter=True),
    "algorithm2": Method(by_level=False, batches_matter=True),
}


def check_method(method: str) -> None:
    """Raise `ValueError` unless `method` is one of `METHODS`."""
    if method not in METHODS:
        raise ValueError(
            f"Expected method to be one of {tuple(METHODS)}. Received: method={method!r}."
        )
