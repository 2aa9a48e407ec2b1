"""Bounds that rank policies share: smallest and largest rank, multiples, spare directions."""

from __future__ import annotations

import math
from collections.abc import Callable

from tdlrt.errors import RankError

__all__ = ["check_bounds", "check_number", "check_positive_integer"]


def check_bounds(min_rank: int, max_rank: int | None, multiple_of: int, spare: float) -> None:
    """Refuse bounds that no rank can satisfy.

    Args:
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are multiples of this, mode sizes permitting.
        spare: Share of spare directions, kept until the ranks are frozen.

    Raises:
        RankError: A bound is out of range, or max_rank is below min_rank.
    """
    check_positive_integer("min_rank", min_rank)
    check_positive_integer("multiple_of", multiple_of)
    if max_rank is not None:
        check_positive_integer("max_rank", max_rank)
        if max_rank < min_rank:
            raise RankError(
                f"max_rank: got {max_rank}, below min_rank={min_rank}; "
                "raise max_rank or lower min_rank"
            )
    expected = "a share of at least 0, such as 0.25"
    check_number("spare", spare, expected, lambda x: 0 <= x < math.inf)


def check_number(
    name: str, value: object, expected: str, holds: Callable[[float], bool], given: object = None
) -> None:
    """Refuse a value that is not a number, or that is out of range.

    Args:
        name: Name of the argument.
        value: Its value.
        expected: The range in words.
        holds: Whether a number is in the range.
        given: The argument as the user gave it, if the value is only a part of it.

    Raises:
        RankError: The value is not a number, or out of range.
    """
    ordinary = isinstance(value, int | float) and not isinstance(value, bool)
    if not ordinary or not holds(value):  # type: ignore[arg-type]  # NaN fails too
        got = value if given is None else given
        raise RankError(f"{name}: got {got!r}, expected {expected}")


def check_positive_integer(name: str, value: object) -> None:
    """Refuse a value that is not an int of at least 1.

    Raises:
        RankError: The value is not an int of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RankError(f"{name}: got {value!r}, expected an int of at least 1")
