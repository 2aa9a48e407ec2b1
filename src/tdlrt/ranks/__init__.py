"""Rank policies: how many directions a layer keeps in each mode, at the start and in training.

A *direction* of mode i is a left singular vector of Mat_i(W); a layer of rank r_i has r_i of them.
*Spare* directions are kept beyond what a policy asks for, to give new directions time to grow.
"""

from tdlrt.ranks.budget import ParameterBudget
from tdlrt.ranks.by_name import ByName
from tdlrt.ranks.initial import (
    SMALL_INPUT,
    SMALL_MODE,
    RankSpec,
    explicit_ranks,
    fraction_within_dense,
    initial_cutoff,
    is_fraction,
    starting_ranks,
)
from tdlrt.ranks.policy import Candidate, FixedRank, RankPolicy
from tdlrt.ranks.recipe import BudgetRecipe
from tdlrt.ranks.schedule import CubicSchedule, LinearSchedule, Schedule
from tdlrt.ranks.tolerance import DEFAULT_TAU, RelativeTolerance

__all__ = [
    "DEFAULT_TAU",
    "SMALL_INPUT",
    "SMALL_MODE",
    "BudgetRecipe",
    "ByName",
    "Candidate",
    "CubicSchedule",
    "FixedRank",
    "LinearSchedule",
    "ParameterBudget",
    "RankPolicy",
    "RankSpec",
    "RelativeTolerance",
    "Schedule",
    "explicit_ranks",
    "fraction_within_dense",
    "initial_cutoff",
    "is_fraction",
    "starting_ranks",
]
