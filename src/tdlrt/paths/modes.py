"""The order in which bases act on the modes of an input or of an output, one mode after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["ModeShape", "expanding_modes", "reducing_modes"]


class ModeShape(NamedTuple):
    """One mode of a tensor before x size x after, which a matrix maps to before x result x after.

    Attributes:
        mode: The mode, counted from 0.
        before: Product of the sizes of the modes before it.
        after: Product of the sizes of the modes after it.
        size: Size of the mode.
        result: Size of the mode in the result.
    """

    mode: int
    before: int
    after: int
    size: int
    result: int


def reducing_modes(sizes: Sequence[int], ranks: Sequence[int]) -> Iterator[ModeShape]:
    """The modes of a tensor in the order in which bases reduce them, the first mode first.

    >>> [(one.before, one.after) for one in reducing_modes((50, 4, 4), (9, 3, 2))]
    [(1, 16), (9, 4), (27, 1)]
    """
    for mode, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        yield ModeShape(mode, math.prod(ranks[:mode]), math.prod(sizes[mode + 1 :]), size, rank)


def expanding_modes(sizes: Sequence[int], ranks: Sequence[int]) -> Iterator[ModeShape]:
    """The modes of a core in the order in which bases expand them, the last mode first."""
    for one in reversed(list(reducing_modes(sizes, ranks))):
        yield one._replace(size=one.result, result=one.size)
