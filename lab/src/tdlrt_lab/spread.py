"""How the spread of a figure over several seeds is printed."""

import statistics
from collections.abc import Sequence

__all__ = ["format_spread"]


def format_spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values that differ, standard deviation; nothing of no values.

    >>> format_spread([99.0, 98.0], 2), format_spread([5.0, 5.0], 0)
    ('98.50 ± 0.71', '5')
    """
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"
