"""The recipe for a budget: how a network shrinks to it, and when its ranks are frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdlrt.errors import RankError
from tdlrt.ranks.bounds import (
    check_bounds,
    check_number,
    check_positive_integer,
    set_fields,
)
from tdlrt.ranks.budget import ParameterBudget
from tdlrt.ranks.schedule import LinearSchedule, Schedule

__all__ = ["BudgetRecipe"]


@dataclass(frozen=True)
class BudgetRecipe:
    """How a training of known length meets a budget; `TDLRT(budget=b, total_steps=N)` follows it.

    Ranks are frozen after F = freeze_at N steps. Until then step t allows the network the share

        (1 + spare) (b + (start - b) min(1, (F - t) / (ramp_share F)))

    of its dense parameters, and b once ranks are frozen. So the first cuts wait until the network
    has begun to learn, since a random weight has no directions that could be spared, and no cut is
    larger than the others: adapt_every / (ramp_share F) of what has to go. A budget above `start`
    stays as it is.

    Args:
        budget: b in (0, 1], a share of the parameters of the dense weights of the Tucker layers.
        total_steps: N, the number of whole steps of the training.
        start: Share before the first step.
        freeze_at: Share of the training after which ranks are frozen.
        ramp_share: Share of the F steps in which the budget falls, the last ones.
        spare: See `ParameterBudget`.
        adapt_every: Ranks are examined every so many steps.
        ramp: How the budget falls: LinearSchedule, CubicSchedule, or another function of the start,
            the end, the number of steps and the step after which it begins; None for a budget that
            holds from the first step.

    Raises:
        RankError: A value is out of range.

    >>> recipe = BudgetRecipe(0.05, total_steps=1000)
    >>> recipe.freeze_after, recipe.rank_policy.fraction
    (500, LinearSchedule(start=0.5, end=0.05, steps=300, begin=200))
    """

    budget: float
    total_steps: int
    start: float = 0.5
    freeze_at: float = 0.5
    ramp_share: float = 0.6
    spare: float = 0.25
    adapt_every: int = 10
    ramp: Callable[[float, float, int, int], Schedule] | None = LinearSchedule

    def __post_init__(self) -> None:
        for name, example in (("budget", 0.05), ("start", 0.5), ("freeze_at", 0.5)):
            expected = f"a number in (0, 1], such as {example}"
            value = check_number(name, getattr(self, name), expected, lambda x: 0 < x <= 1)
            set_fields(self, **{name: value})
        expected = "a number in [0, 1]"
        share = check_number("ramp_share", self.ramp_share, expected, lambda x: 0 <= x <= 1)
        bounds = check_bounds(min_rank=1, max_rank=None, multiple_of=1, spare=self.spare)
        set_fields(self, ramp_share=share, spare=bounds["spare"])
        for name in ("total_steps", "adapt_every"):
            set_fields(self, **{name: check_positive_integer(name, getattr(self, name))})
        if self.ramp is not None and not callable(self.ramp):
            raise RankError(
                f"ramp: got {self.ramp!r}, expected the class LinearSchedule or CubicSchedule, a "
                "function of start, end, steps and begin that returns a schedule, or None"
            )

    @property
    def freeze_after(self) -> int:
        """F, the number of steps after which ranks are frozen."""
        return max(1, round(self.freeze_at * self.total_steps))

    @property
    def rank_policy(self) -> ParameterBudget:
        """The budget of every step."""
        steps = max(1, round(self.ramp_share * self.freeze_after))
        start, begin = max(self.start, self.budget), self.freeze_after - steps
        fraction = self.ramp(start, self.budget, steps, begin) if self.ramp else self.budget
        return ParameterBudget(fraction, spare=self.spare)
