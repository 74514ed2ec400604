"""Checks of the numbers among a user's arguments."""

import math
import numbers
import operator
from typing import Any

# Up to here every whole number is a float64 too.
_MOST = 2**53


def whole(name: str, value: Any, least: int = 0) -> int:
    """The argument `name` as an int; `ValueError` unless it is a whole number up to 2**53."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number <= _MOST:
        raise ValueError(
            f"Expected {name} to be a whole number, at least {least}. Received: {value!r}."
        )
    return number


def positive(**values: Any) -> None:
    """Raise `ValueError` unless all are positive integers or `None`."""
    for name, value in values.items():
        if value is not None and (value != int(value) or value < 1):
            raise ValueError(f"Expected {name} to be a positive integer. Received: {value!r}.")


def tolerance(value: Any) -> float | None:
    """A tolerance as a float; `ValueError` unless it is a number over 0 and up to 1, or `None`."""
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if real else math.nan
    if not 0 < number <= 1:
        raise ValueError(
            "Expected tolerance to be a number over 0 and up to 1, in standard deviations. "
            f"Received: {value!r}."
        )
    return number
