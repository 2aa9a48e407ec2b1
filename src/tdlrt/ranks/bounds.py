"""Bounds that rank policies share: smallest and largest rank, multiples, spare directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tdlrt.errors import RankError
from tdlrt.scalars import as_int, as_number

__all__ = ["check_bounds", "check_number", "check_positive_integer", "set_fields"]


def check_bounds(
    min_rank: int, max_rank: int | None, multiple_of: int, spare: float
) -> dict[str, int | float | None]:
    """Refuse bounds that no rank can satisfy.

    Args:
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are multiples of this, mode sizes permitting.
        spare: Share of spare directions, kept until the ranks are frozen.

    Returns:
        The four by name, as Python's own numbers.

    Raises:
        RankError: A bound is out of range, or max_rank is below min_rank.
    """
    min_rank = check_positive_integer("min_rank", min_rank)
    multiple_of = check_positive_integer("multiple_of", multiple_of)
    if max_rank is not None:
        max_rank = check_positive_integer("max_rank", max_rank)
        if max_rank < min_rank:
            raise RankError(
                f"max_rank: got {max_rank}, below min_rank={min_rank}; "
                "raise max_rank or lower min_rank"
            )
    expected = "a share of at least 0, such as 0.25"
    spare = check_number("spare", spare, expected, lambda x: 0 <= x < math.inf)
    return {
        "min_rank": min_rank,
        "max_rank": max_rank,
        "multiple_of": multiple_of,
        "spare": spare,
    }


def check_number(
    name: str, value: object, expected: str, holds: Callable[[float], bool], given: object = None
) -> float:
    """Refuse a value that is not a number, or that is out of range.

    Args:
        name: Name of the argument.
        value: Its value.
        expected: The range in words.
        holds: Whether a number is in the range.
        given: The argument as the user gave it, if the value is only a part of it.

    Returns:
        The value as Python's own number.

    Raises:
        RankError: The value is not a number, or out of range.
    """
    number = as_number(value)
    if number is None or not holds(number):  # NaN fails too
        got = value if given is None else given
        raise RankError(f"{name}: got {got!r}, expected {expected}")
    return number


def check_positive_integer(name: str, value: object) -> int:
    """A value as Python's own int; refused if it is not an int of at least 1.

    Raises:
        RankError: The value is not an int of at least 1.
    """
    whole = as_int(value)
    if whole is None or whole < 1:
        raise RankError(f"{name}: got {value!r}, expected an int of at least 1")
    return whole


def set_fields(record: object, **values: Any) -> None:
    """Give fields of a frozen dataclass other values, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
