"""A relative tolerance for each layer separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdlrt.linalg import Cutoff
from tdlrt.ranks.bounds import check_bounds, set_fields
from tdlrt.ranks.policy import Candidate, FixedRank, RankPolicy
from tdlrt.ranks.schedule import Schedule, check_values, value_at

__all__ = ["DEFAULT_TAU", "RelativeTolerance"]

# The tolerance if neither a tolerance nor a policy is given.
DEFAULT_TAU = 0.1


@dataclass(frozen=True)
class RelativeTolerance(RankPolicy):
    """Smallest ranks with ||C - C_truncated|| <= tau ||C||, for each layer separately.

    The squared budget tau^2 ||C||^2 is shared equally by the modes (a matrix has one truncation,
    which gets all of it), so the tolerance holds by construction. The bounds on ranks are applied
    afterwards.

    Args:
        tau: Relative tolerance in [0, 1), or a schedule of it; 0 discards nothing.
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are rounded up to a multiple of this, if the mode size permits.
        spare: Spare directions that are kept beyond the tolerance, as a share of the rank, rounded
            up. A new direction has a singular value of the order of the learning rate. Without
            spare directions it has one step to grow beyond the tolerance, and ranks hardly grow.
            Spare directions are cut when ranks are frozen.

    Raises:
        RankError: A value is out of range.

    Source: arXiv:2305.19059, algorithm 1.
    """

    needs_spectra = False

    tau: float | Schedule
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    spare: float = 0.0

    def __post_init__(self) -> None:
        expected = f"a number in [0, 1), such as {DEFAULT_TAU}"
        tau = check_values("tau", self.tau, expected, lambda x: 0 <= x < 1)
        bounds = check_bounds(self.min_rank, self.max_rank, self.multiple_of, self.spare)
        set_fields(self, tau=tau, **bounds)

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The tolerance of this step, as a cutoff for each layer."""
        return {name: self.cutoff(candidate.shape, step) for name, candidate in candidates.items()}

    def cutoff(self, shape: Sequence[int], step: int = 0) -> Cutoff:
        """The cutoff of one layer.

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
