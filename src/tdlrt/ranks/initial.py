"""Initial ranks: the ranks that the option `rank` gives a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from tdlrt.errors import RankError
from tdlrt.linalg import Cutoff
from tdlrt.ranks.tolerance import RelativeTolerance

__all__ = ["RankSpec", "explicit_ranks", "initial_cutoff"]

# Modes of at most this size start at full rank if `rank` is a fraction: they have little to save.
SMALL_MODE = 4

RankSpec: TypeAlias = float | int | Sequence[int] | Literal["full"] | RelativeTolerance

_EXPECTED = (
    "a fraction in (0, 1], a positive int, a tuple with one rank per mode, 'full' "
    "or a RelativeTolerance"
)


def initial_cutoff(spec: RankSpec, shape: Sequence[int]) -> Cutoff:
    """The cutoff that the option `rank` gives a weight.

    A fraction applies to the sizes of the channel modes (the first two), rounded, at least 1; all
    other modes, and modes of size 4 or less, start at full rank. An int is clipped to the size of
    each mode. A tuple is used unchanged, 'full' keeps every rank, and a `RelativeTolerance` chooses
    ranks by the singular values of the weight.

    Args:
        spec: The rank.
        shape: (n_1, ..., n_d) of the weight.

    Raises:
        RankError: The rank is not one of the above, not positive, or larger than its mode.
    """
    if isinstance(spec, RelativeTolerance):
        return spec.cutoff(shape)
    return Cutoff(explicit_ranks(spec, shape))


def explicit_ranks(spec: object, shape: Sequence[int], channels: int = 2) -> tuple[int, ...]:
    """The ranks that a fraction, an int, a tuple or 'full' gives a weight of a given shape.

    Args:
        spec: The rank.
        shape: (n_1, ..., n_d) of the weight.
        channels: How many modes are channel modes, to which a fraction applies; they come first.

    Raises:
        RankError: The rank is none of these, not positive, or larger than its mode.
    """
    if spec == "full":
        return tuple(shape)
    if isinstance(spec, float):
        if not 0 < spec <= 1:
            raise RankError(f"rank: got the fraction {spec}, expected {_EXPECTED}")
        return tuple(
            max(1, math.floor(spec * n + 0.5)) if mode < channels and n > SMALL_MODE else n
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
