"""The recipe for a budget: how a network shrinks to it, and when its ranks are frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdlrt.errors import RankError
from tdlrt.ranks.bounds import check_bounds, check_number, check_positive_integer
from tdlrt.ranks.budget import ParameterBudget
from tdlrt.ranks.schedule import CubicSchedule, Schedule

__all__ = ["BudgetRecipe"]


@dataclass(frozen=True)
class BudgetRecipe:
    """How a training of known length meets a budget; `TDLRT(budget=b, total_steps=N)` follows it.

    Ranks are frozen after F = freeze_at N steps. Until then step t allows the network the share

        (1 + spare) (b + (start - b) max(0, 1 - t / (ramp_share F))^3)

    of its dense parameters, and b once ranks are frozen. A budget above `start` stays as it is.

    Args:
        budget: b in (0, 1], a share of the parameters of the dense weights of the Tucker layers.
        total_steps: N, the number of whole steps of the training.
        start: Share before the first step.
        freeze_at: Share of the training after which ranks are frozen.
        ramp_share: Share of the F steps in which the budget falls.
        spare: See `ParameterBudget`.
        adapt_every: Ranks are examined every so many steps.
        ramp: How the budget falls: CubicSchedule, LinearSchedule, or another function of the start,
            the end and the number of steps; None for a budget that holds from the first step.

    Raises:
        RankError: A value is out of range.

    Source: the ramp is that of Zhu, Gupta, arXiv:1710.01878.

    >>> recipe = BudgetRecipe(0.05, total_steps=1000)
    >>> recipe.freeze_after, recipe.rank_policy.fraction
    (500, CubicSchedule(start=0.5, end=0.05, steps=375))
    """

    budget: float
    total_steps: int
    start: float = 0.5
    freeze_at: float = 0.5
    ramp_share: float = 0.75
    spare: float = 0.25
    adapt_every: int = 10
    ramp: Callable[[float, float, int], Schedule] | None = CubicSchedule

    def __post_init__(self) -> None:
        for name, example in (("budget", 0.05), ("start", 0.5), ("freeze_at", 0.5)):
            expected = f"a number in (0, 1], such as {example}"
            check_number(name, getattr(self, name), expected, lambda x: 0 < x <= 1)
        check_number("ramp_share", self.ramp_share, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        check_bounds(min_rank=1, max_rank=None, multiple_of=1, spare=self.spare)
        check_positive_integer("total_steps", self.total_steps)
        check_positive_integer("adapt_every", self.adapt_every)
        if self.ramp is not None and not callable(self.ramp):
            raise RankError(
                f"ramp: got {self.ramp!r}, expected the class CubicSchedule or LinearSchedule, a "
                "function of start, end and steps that returns a schedule, or None"
            )

    @property
    def freeze_after(self) -> int:
        """F, the number of steps after which ranks are frozen."""
        return max(1, round(self.freeze_at * self.total_steps))

    @property
    def rank_policy(self) -> ParameterBudget:
        """The budget of every step."""
        steps = max(1, round(self.ramp_share * self.freeze_after))
        start = max(self.start, self.budget)
        fraction = self.ramp(start, self.budget, steps) if self.ramp else self.budget
        return ParameterBudget(fraction, spare=self.spare)
