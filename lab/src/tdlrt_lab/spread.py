"""Formatting of a mean and a standard deviation over seeds."""

import statistics
from collections.abc import Sequence

__all__ = ["format_spread"]


def format_spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone of equal values, and an empty text of none.

    >>> format_spread([99.0, 98.0], 2), format_spread([5.0, 5.0], 0)
    ('98.50 ± 0.71', '5')
    """
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"
