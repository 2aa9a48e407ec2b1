"""Numbers that users pass: Python's and numpy's alike, but no booleans."""

from __future__ import annotations

import operator
from numbers import Integral, Real

__all__ = ["as_float", "as_int", "as_number"]


def as_int(value: object) -> int | None:
    """The int that a value is; None for all else, booleans and floats included.

    >>> as_int(3), as_int(True), as_int(3.0)
    (3, None, None)
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return operator.index(value) if whole else None  # type: ignore[arg-type]


def as_float(value: object) -> float | None:
    """The float that a value is; None for all else, booleans and ints included.

    >>> as_float(0.5), as_float(1)
    (0.5, None)
    """
    fraction = isinstance(value, Real) and not isinstance(value, Integral)
    return float(value) if fraction else None  # type: ignore[arg-type]


def as_number(value: object) -> float | None:
    """The int or the float that a value is; None for all else, booleans included."""
    whole = as_int(value)
    return as_float(value) if whole is None else whole
