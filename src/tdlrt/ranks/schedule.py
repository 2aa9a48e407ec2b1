"""Schedules: a tolerance or a budget that depends on the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tdlrt.ranks.bounds import check_number, check_positive_integer

__all__ = ["CubicSchedule", "LinearSchedule", "Schedule", "check_values", "value_at"]


class Schedule(ABC):
    """A number that depends on the step, for a tolerance or a budget."""

    @abstractmethod
    def value(self, step: int) -> float:
        """The number at a step, counted from 1."""

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value over all steps; both must be valid."""


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int

    _power: ClassVar[int]

    def __post_init__(self) -> None:
        check_positive_integer("steps", self.steps)
        for name in ("start", "end"):
            check_number(name, getattr(self, name), "a finite number", math.isfinite)

    def value(self, step: int) -> float:
        """The number at a step, counted from 1; `end` from step `steps` on."""
        left = max(0.0, 1 - step / self.steps)
        return self.end + (self.start - self.end) * left**self._power

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value over all steps."""
        return min(self.start, self.end), max(self.start, self.end)


class LinearSchedule(_Ramp):
    """end + (start - end) (1 - t / steps) at step t, and `end` afterwards.

    Args:
        start: Value before the first step.
        end: Value from step `steps` on.
        steps: Length of the ramp.

    Raises:
        RankError: A value is not a finite number, or steps is not positive.
    """

    _power = 1


class CubicSchedule(_Ramp):
    """end + (start - end) (1 - t / steps)^3 at step t, and `end` afterwards; it is fast at first.

    Args:
        start: Value before the first step.
        end: Value from step `steps` on.
        steps: Length of the ramp.

    Raises:
        RankError: A value is not a finite number, or steps is not positive.

    Source: Zhu, Gupta, arXiv:1710.01878, equation 1.

    >>> CubicSchedule(0.5, 0.25, steps=100).value(50)
    0.28125
    """

    _power = 3


def value_at(number: float | Schedule, step: int) -> float:
    """A number, or the value of a schedule at a step."""
    return number.value(step) if isinstance(number, Schedule) else number


def check_values(name: str, number: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Refuse a number, or a schedule with an extreme value, that is out of range.

    See `check_number` for the arguments.

    Raises:
        RankError: A value is not a number, or out of range.
    """
    for value in number.extremes if isinstance(number, Schedule) else (number,):
        check_number(name, value, expected, holds, given=number)
