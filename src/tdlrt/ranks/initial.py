"""Initial ranks: the ranks that the option `rank` gives a weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from tdlrt.errors import RankError
from tdlrt.linalg import Cutoff, possible_ranks
from tdlrt.ranks.policy import Candidate
from tdlrt.ranks.tolerance import RelativeTolerance
from tdlrt.scalars import as_float, as_int

__all__ = [
    "SMALL_INPUT",
    "SMALL_MODE",
    "RankSpec",
    "explicit_ranks",
    "fraction_within_dense",
    "initial_cutoff",
    "is_fraction",
    "starting_ranks",
]

# Modes of at most this size start at full rank if `rank` is a fraction: they have little to save.
SMALL_MODE = 4

# So does the input of a network of at most so many channels, as far as the layer is no larger than
# dense: no later layer gets back what is cut.
SMALL_INPUT = 64

RankSpec: TypeAlias = float | int | Sequence[int] | Literal["full"] | RelativeTolerance

_EXPECTED = (
    "a fraction in (0, 1], a positive int, a tuple with one rank per mode, 'full' "
    "or a RelativeTolerance"
)


def is_fraction(spec: object) -> bool:
    """Whether a rank is a fraction below 1, which adapts to each layer."""
    return as_float(spec) not in (None, 1.0)


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
    if isinstance(spec, str) and spec == "full":  # an array has no single truth value
        return tuple(shape)
    fraction, whole = as_float(spec), as_int(spec)
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise RankError(f"rank: got the fraction {fraction}, expected {_EXPECTED}")
        return tuple(
            max(1, math.floor(fraction * n + 0.5)) if mode < channels and n > SMALL_MODE else n
            for mode, n in enumerate(shape)
        )
    if whole is not None:
        if whole < 1:
            raise RankError(f"rank: got {whole}, expected {_EXPECTED}")
        return tuple(min(whole, n) for n in shape)
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return _tuple_ranks(spec, shape)
    raise RankError(f"rank: got {spec!r}, expected {_EXPECTED}")


def starting_ranks(
    limits: Sequence[int], shape: Sequence[int], learned: Collection[int]
) -> tuple[int, ...]:
    """The ranks of a generic weight truncated to limits.

    The two ranks of a matrix are one, no rank is larger than the product of the others, and a mode
    that is not factorised keeps its size.

    >>> starting_ranks((9, 4), (20, 30), learned=(0, 1))
    (4, 4)

    Args:
        limits: Largest rank of each mode.
        shape: (n_1, ..., n_d) of the weight.
        learned: Modes that are factorised.
    """
    limits = [min(limit, size) for limit, size in zip(limits, shape, strict=True)]
    matrix = len(limits) == 2 and len(learned) == 2
    return possible_ranks(
        [
            min(limits) if matrix else limits[mode] if mode in learned else size
            for mode, size in enumerate(shape)
        ],
        learned,
    )


def fraction_within_dense(
    spec: RankSpec,
    shape: Sequence[int],
    learned: Collection[int],
    channels: int = 2,
    whole: Collection[int] = (),
) -> RankSpec:
    """The ranks that a fraction gives, lowered until core and bases are no larger than the weight.

    The mode with the largest r_i / n_i loses a direction, until prod r_i + sum n_i r_i <= prod n_i:
    of the channel modes larger than `SMALL_MODE` and not in `whole`, of the others once these have
    rank 1, and at last of the kernel modes.

    >>> fraction_within_dense(0.5, (64, 64), learned=(0, 1))
    (26, 26)
    >>> fraction_within_dense(0.5, (64, 3, 3, 3), learned=range(4))
    (18, 3, 3, 3)
    >>> fraction_within_dense(0.5, (64, 8, 3, 3), learned=range(4), whole=(1,))
    (32, 8, 3, 3)

    Args:
        spec: The rank. Only a fraction below 1 can be lowered, because all else is what was typed.
        shape: (n_1, ..., n_d) of the weight.
        learned: Modes that are factorised.
        channels: See `explicit_ranks`.
        whole: Modes that start at full rank although they are larger than `SMALL_MODE`.

    Returns:
        The rank itself if it is no such fraction or fits, or the other ranks.

    Raises:
        RankError: The fraction is not positive.
    """
    if not is_fraction(spec):
        return spec
    weight = Candidate(ranks=(), available=(), shape=shape, modes=learned)
    asked = explicit_ranks(spec, shape, channels)
    start = starting_ranks(asked, shape, learned)
    limits = [size if mode in whole else asked[mode] for mode, size in enumerate(shape)]
    ranks = starting_ranks(limits, shape, learned)
    while weight.parameters_at(ranks) > weight.dense_parameters:
        able = [mode for mode in learned if ranks[mode] > 1]
        small = [mode for mode in able if mode < channels]
        large = [mode for mode in small if shape[mode] > SMALL_MODE and mode not in whole]
        modes = large or small or able
        if not modes:
            break
        largest = max(modes, key=lambda mode: ranks[mode] / shape[mode])
        lowered = [rank - (mode == largest) for mode, rank in enumerate(ranks)]
        ranks = starting_ranks(lowered, shape, learned)
    return spec if ranks == start else ranks


def _tuple_ranks(spec: Sequence[object], shape: Sequence[int]) -> tuple[int, ...]:
    if len(spec) != len(shape):
        raise RankError(
            f"rank: got {len(spec)} ranks {tuple(spec)} for a weight of {len(shape)} modes "
            f"{tuple(shape)}; give one rank per mode"
        )
    ranks = []
    for mode, (rank, size) in enumerate(zip(spec, shape, strict=True)):
        whole = as_int(rank)
        if whole is None or not 1 <= whole <= size:
            raise RankError(
                f"rank: got {rank!r} for mode {mode} of size {size}, expected an int from 1 "
                f"to {size}"
            )
        ranks.append(whole)
    return tuple(ranks)
