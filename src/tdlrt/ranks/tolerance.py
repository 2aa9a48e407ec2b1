"""A relative tolerance for every layer by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdlrt.linalg import Cutoff
from tdlrt.ranks.bounds import check_bounds
from tdlrt.ranks.policy import Candidate, FixedRank, RankPolicy
from tdlrt.ranks.schedule import Schedule, check_values, value_at

__all__ = ["DEFAULT_TAU", "RelativeTolerance"]

# The tolerance where neither one nor a policy is given.
DEFAULT_TAU = 0.1


@dataclass(frozen=True)
class RelativeTolerance(RankPolicy):
    """Smallest ranks with ||C - C_truncated|| <= tau ||C||, layer by layer.

    The squared budget tau^2 ||C||^2 is shared equally by the modes (a matrix has one truncation,
    which gets all of it), so the bound holds by construction. The bounds on ranks come after it.

    Args:
        tau: Relative tolerance in [0, 1), or a schedule of it; 0 discards nothing.
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are rounded up to a multiple of this (mode sizes permitting).
        spare: Share of a rank, rounded up, that is kept beyond what tau asks: spare directions. A
            new direction has a singular value of the order of the learning rate; without this room
            it has one step to outgrow the tolerance, and ranks hardly grow. The spare directions
            are cut when the ranks are frozen.

    Raises:
        RankError: A value is out of its range.

    Source: arXiv:2305.19059, algorithm 1.
    """

    needs_spectra = False

    tau: float | Schedule
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    spare: float = 0.0

    def __post_init__(self) -> None:
        check_values(
            "tau", self.tau, f"a number in [0, 1), such as {DEFAULT_TAU}", lambda x: 0 <= x < 1
        )
        check_bounds(self.min_rank, self.max_rank, self.multiple_of, self.spare)

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The tolerance of this step."""
        return {name: self.cutoff(candidate.shape, step) for name, candidate in candidates.items()}

    def cutoff(self, shape: Sequence[int], step: int = 0) -> Cutoff:
        """Where to cut one layer.

        Args:
            shape: (n_1, ..., n_d) of the weight.
            step: Number of the step; 0 is the start of a schedule.
        """
        return Cutoff(
            limits=tuple(n if self.max_rank is None else self.max_rank for n in shape),
            tau=value_at(self.tau, step),
            min_rank=self.min_rank,
            multiple_of=self.multiple_of,
            spare=self.spare,
        )

    def settled(self) -> RankPolicy:
        """The same tolerance without spare directions; `FixedRank()` if it has none."""
        return replace(self, spare=0.0) if self.spare else FixedRank()
