"""Schedules: a tolerance or a budget that depends on the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tdlrt.errors import RankError
from tdlrt.ranks.bounds import check_number, check_positive_integer, set_fields
from tdlrt.scalars import as_int

__all__ = ["CubicSchedule", "LinearSchedule", "Schedule", "check_values", "settled", "value_at"]


class Schedule(ABC):
    """A number that depends on the step, for a tolerance or a budget."""

    @abstractmethod
    def value(self, step: int) -> float:
        """The number at a step, counted from 1."""

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value over all steps; both must be valid."""

    @property
    def final(self) -> float | None:
        """The number that it ends with, which a budget meets when ranks are frozen.

        By default None: a budget then meets the number of the step in which ranks are frozen.
        """
        return None


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int
    begin: int = 0

    _power: ClassVar[int]

    def __post_init__(self) -> None:
        set_fields(self, steps=check_positive_integer("steps", self.steps))
        begin = as_int(self.begin)
        if begin is None or begin < 0:
            raise RankError(f"begin: got {self.begin!r}, expected an int of at least 0")
        set_fields(self, begin=begin)
        for name in ("start", "end"):
            value = check_number(name, getattr(self, name), "a finite number", math.isfinite)
            set_fields(self, **{name: value})

    def value(self, step: int) -> float:
        """The number at a step, counted from 1; `end` from step `begin + steps` on."""
        left = min(1.0, max(0.0, 1 - (step - self.begin) / self.steps))
        return self.end + (self.start - self.end) * left**self._power

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value over all steps."""
        return min(self.start, self.end), max(self.start, self.end)

    @property
    def final(self) -> float:
        """`end`."""
        return self.end


class LinearSchedule(_Ramp):
    """end + (start - end) (1 - (t - begin) / steps) at step t, `start` before, `end` afterwards.

    Args:
        start: Value until step `begin`.
        end: Value from step `begin + steps` on.
        steps: Length of the ramp.
        begin: Step after which it begins.

    Raises:
        RankError: A value is not a finite number, or steps is not positive, or begin is negative.
    """

    _power = 1


class CubicSchedule(_Ramp):
    """end + (start - end) (1 - (t - begin) / steps)^3 at step t; it is fast at first.

    Args:
        start: Value until step `begin`.
        end: Value from step `begin + steps` on.
        steps: Length of the ramp.
        begin: Step after which it begins.

    Raises:
        RankError: A value is not a finite number, or steps is not positive, or begin is negative.

    Source: Zhu, Gupta, arXiv:1710.01878, equation 1.

    >>> CubicSchedule(0.5, 0.25, steps=100).value(50)
    0.28125
    """

    _power = 3


def value_at(number: float | Schedule, step: int) -> float:
    """A number, or the value of a schedule at a step."""
    return number.value(step) if isinstance(number, Schedule) else number


def settled(number: float | Schedule) -> float | Schedule:
    """What a number is once ranks are frozen: the one its schedule ends with, or itself."""
    final = number.final if isinstance(number, Schedule) else None
    return number if final is None else final


def check_values(
    name: str, number: float | Schedule, expected: str, holds: Callable[[float], bool]
) -> float | Schedule:
    """Refuse a number, or a schedule with an extreme value, that is out of range.

    See `check_number` for the arguments.

    Returns:
        The schedule, or the number as Python's own.

    Raises:
        RankError: A value is not a number, or out of range.
    """
    if not isinstance(number, Schedule):
        return check_number(name, number, expected, holds)
    for value in number.extremes:
        check_number(name, value, expected, holds, given=number)
    return number
