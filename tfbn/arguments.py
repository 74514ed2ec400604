"""Validate the numbers among a user's arguments."""

import math
import numbers
import operator
from typing import Any

# Every integer up to here is exact in float64.
_LARGEST = 2**53


def integer(name: str, value: Any, least: int = 0) -> int:
    """Return the argument `name` as an int.

    Raises:
        ValueError: If `value` is not an integer from `least` to 2**53.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number <= _LARGEST:
        raise ValueError(f"Expected {name} to be an integer >= {least}. Received: {value!r}.")
    return number


def positive(**values: Any) -> None:
    """Raise `ValueError` unless every value is a positive integer or `None`."""
    for name, value in values.items():
        if value is not None and (value != int(value) or value < 1):
            raise ValueError(f"Expected {name} to be an integer >= 1. Received: {value!r}.")


def tolerance(value: Any) -> float | None:
    """Return a tolerance as a float, or `None` for `None`.

    Raises:
        ValueError: If `value` is not a number with 0 < value <= 1.
    """
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if real else math.nan
    if not 0 < number <= 1:
        raise ValueError(f"Expected tolerance in (0, 1], in std. Received: {value!r}.")
    return number
