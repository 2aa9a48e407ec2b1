"""A policy for each layer, selected by patterns of layer names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tdlrt.errors import NothingMatchedError, RankError
from tdlrt.linalg import Cutoff
from tdlrt.ranks.policy import Candidate, FixedRank, RankPolicy

__all__ = ["ByName"]


@dataclass(frozen=True)
class ByName(RankPolicy):
    """The policy of the first pattern (`*`, `?`, `[..]`) that matches the name of a layer.

    A layer whose name no pattern matches keeps its ranks. A `ParameterBudget` counts the layers of
    its own pattern alone.

    Args:
        policies: Policies by pattern; the order of the patterns matters.

    Raises:
        RankError: One of the values is not a policy.
    """

    policies: Mapping[str, RankPolicy]

    def __post_init__(self) -> None:
        for pattern, policy in self.policies.items():
            if not isinstance(policy, RankPolicy):
                raise RankError(
                    f"rank_policy[{pattern!r}]: got {policy!r}, expected a rank policy such as "
                    "RelativeTolerance(0.1)"
                )

    @property
    def needs_spectra(self) -> bool:
        """Whether any of the policies reads singular values."""
        return any(policy.needs_spectra for policy in self.policies.values())

    def cutoffs(self, candidates: Mapping[str, Candidate], step: int) -> dict[str, Cutoff]:
        """The cutoffs that the policy of each layer chooses."""
        cutoffs: dict[str, Cutoff] = {}
        for policy, group in self._groups(candidates):
            cutoffs |= policy.cutoffs(group, step)
        return cutoffs

    def check(self, candidates: Mapping[str, Candidate]) -> None:
        """Refuse a pattern that gets no layer, and policies that cannot be met.

        Raises:
            RankError: A policy cannot be met.
            NothingMatchedError: A pattern matches no layer, or earlier patterns take all of its
                layers.
        """
        for pattern in self.policies:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise NothingMatchedError(
                    f"rank_policy[{pattern!r}]: matches none of the Tucker layers "
                    f"{', '.join(candidates)}"
                )
        groups = self._groups(candidates)
        for pattern, policy in self.policies.items():
            if not any(policy is used for used, _ in groups):
                raise NothingMatchedError(
                    f"rank_policy[{pattern!r}]: earlier patterns take all of its layers; put this "
                    "pattern before them"
                )
        for policy, group in groups:
            policy.check(group)

    def settled(self) -> ByName:
        """The settled policy of each pattern."""
        return ByName({pattern: policy.settled() for pattern, policy in self.policies.items()})

    def _groups(
        self, candidates: Mapping[str, Candidate]
    ) -> list[tuple[RankPolicy, dict[str, Candidate]]]:
        patterns = [next((p for p in self.policies if fnmatchcase(n, p)), None) for n in candidates]
        layers = list(zip(patterns, candidates.items(), strict=True))
        return [
            (
                FixedRank() if pattern is None else self.policies[pattern],
                {name: candidate for its, (name, candidate) in layers if its == pattern},
            )
            for pattern in dict.fromkeys(patterns)
        ]
