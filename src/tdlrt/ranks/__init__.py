"""Rank policies: how many directions a layer may keep, at the start and while it trains."""

from tdlrt.ranks.budget import ParameterBudget
from tdlrt.ranks.by_name import ByName
from tdlrt.ranks.initial import RankSpec, explicit_ranks, initial_cutoff
from tdlrt.ranks.policy import Candidate, FixedRank, RankPolicy
from tdlrt.ranks.schedule import CubicSchedule, LinearSchedule, Schedule
from tdlrt.ranks.tolerance import DEFAULT_TAU, RelativeTolerance

__all__ = [
    "DEFAULT_TAU",
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
    "initial_cutoff",
]
