"""Rank policies: how many directions a layer may keep, at the start and while it trains."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from tdlrt.errors import RankError
from tdlrt.linalg import RankRule, smallest_rank

__all__ = [
    "FixedRank",
    "RankPolicy",
    "RankSpec",
    "RelativeTolerance",
    "explicit_ranks",
    "initial_rank_rule",
]

# Modes this small start full under a fractional rank: there is nothing to save in them.
SMALL_MODE = 4


@dataclass(frozen=True, kw_only=True)
class FixedRank:
    """Every layer keeps the ranks it has; the directions still rotate."""

    def rule(self, squared_norm: float, ranks: Sequence[int], modes: Collection[int]) -> RankRule:
        """Rule that keeps the ranks r_i whatever the singular values are."""
        return lambda mode, values: ranks[mode]


@dataclass(frozen=True)
class RelativeTolerance:
    """Smallest ranks with ||C - C_truncated|| <= tau ||C||, layer by layer.

    The squared budget tau^2 ||C||^2 is shared equally by the modes (a matrix has one truncation,
    which gets all of it), so the bound holds by construction. The bounds come after it.

    Args:
        tau: Relative tolerance in [0, 1); 0 discards nothing.
        min_rank: Smallest rank of a mode.
        max_rank: Largest rank of a mode; None for no bound.
        multiple_of: Ranks are rounded up to a multiple of this (mode sizes permitting).

    Raises:
        RankError: A value is out of its range.
    """

    tau: float
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float):
            raise RankError(f"tau: got {self.tau!r}, expected a number in [0, 1), such as 0.1")
        if not 0 <= self.tau < 1:  # also refuses NaN
            raise RankError(f"tau: got {self.tau}, expected a number in [0, 1), such as 0.1")
        for name in ("min_rank", "multiple_of"):
            _check_positive_integer(name, getattr(self, name))
        if self.max_rank is not None:
            _check_positive_integer("max_rank", self.max_rank)
            if self.max_rank < self.min_rank:
                raise RankError(
                    f"max_rank: got {self.max_rank}, below min_rank={self.min_rank}; "
                    "raise max_rank or lower min_rank"
                )

    def rule(self, squared_norm: float, ranks: Sequence[int], modes: Collection[int]) -> RankRule:
        """Rule for a core of the given squared norm that is truncated in the given modes."""
        shares = 1 if len(ranks) == 2 else max(1, len(modes))
        budget = self.tau**2 * squared_norm / shares

        def keep(mode: int, values: Tensor) -> int:
            return self._bounded(smallest_rank(values, budget), len(values))

        return keep

    def _bounded(self, rank: int, size: int) -> int:
        rank = max(rank, self.min_rank)
        rank = math.ceil(rank / self.multiple_of) * self.multiple_of
        return min(rank, size, self.max_rank or size)


RankPolicy: TypeAlias = FixedRank | RelativeTolerance
RankSpec: TypeAlias = float | int | Sequence[int] | Literal["full"] | RelativeTolerance

_EXPECTED = (
    "a fraction in (0, 1], a positive int, a tuple with one rank per mode, 'full' "
    "or a RelativeTolerance"
)


def initial_rank_rule(
    spec: RankSpec, shape: Sequence[int], squared_norm: float, modes: Collection[int]
) -> RankRule:
    """Truncation rule that a user's rank means for a weight.

    A fraction applies to the channel modes (the first two; at least 1), and the other modes and
    modes of size 4 or less start full. An int is clipped to each mode. A tuple is taken as it is.

    Args:
        spec: The rank.
        shape: (n_1, ..., n_d) of the weight.
        squared_norm: ||W||^2.
        modes: The modes to truncate.

    Raises:
        RankError: The rank is not one of the above, not positive, or larger than its mode.
    """
    if isinstance(spec, RelativeTolerance):
        return spec.rule(squared_norm, shape, modes)
    return FixedRank().rule(squared_norm, explicit_ranks(spec, shape), modes)


def explicit_ranks(spec: object, shape: Sequence[int]) -> tuple[int, ...]:
    """Ranks that a fraction, an int, a tuple or 'full' means for a weight of the given shape.

    Raises:
        RankError: The rank is none of these, not positive, or larger than its mode.
    """
    if spec == "full":
        return tuple(shape)
    if isinstance(spec, float):
        if not 0 < spec <= 1:
            raise RankError(f"rank: got the fraction {spec}, expected {_EXPECTED}")
        return tuple(
            max(1, math.floor(spec * n + 0.5)) if mode < 2 and n > SMALL_MODE else n
            for mode, n in enumerate(shape)
        )
    if isinstance(spec, int) and not isinstance(spec, bool):
        if spec < 1:
            raise RankError(f"rank: got {spec}, expected {_EXPECTED}")
        return tuple(min(spec, n) for n in shape)
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return _tuple_ranks(spec, shape)
    raise RankError(f"rank: got {spec!r}, expected {_EXPECTED}")


def _tuple_ranks(spec: Sequence[object], shape: Sequence[int]) -> tuple[int, ...]:
    if len(spec) != len(shape):
        raise RankError(
            f"rank: got {len(spec)} ranks {tuple(spec)} for a weight of {len(shape)} modes "
            f"{tuple(shape)}; give one rank per mode"
        )
    ranks = []
    for mode, (rank, size) in enumerate(zip(spec, shape, strict=True)):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= size:
            raise RankError(
                f"rank: got {rank!r} for mode {mode} of size {size}, expected an int from 1 "
                f"to {size}"
            )
        ranks.append(rank)
    return tuple(ranks)


def _check_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RankError(f"{name}: got {value!r}, expected an int of at least 1")
