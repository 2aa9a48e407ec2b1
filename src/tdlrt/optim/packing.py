"""Layers of different sizes in zero-padded stacks: the part of each, and writing values there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdlrt.linalg import Layout

__all__ = ["member_views", "put"]


def member_views(
    stacks: Sequence[Tensor],
    layout: Layout,
    place: int,
    ranks: Sequence[int],
    number: int | None = None,
) -> list[Tensor]:
    """A member's part of stacks of cores and of bases, or of cores alone."""
    core, *bases = (stack[place if number is None else number] for stack in stacks)
    views = [core[tuple(slice(0, rank) for rank in ranks)]]
    for mode, basis in zip(layout.modes, bases, strict=False):
        views.append(basis[: layout.sizes[place][mode], : ranks[mode]])
    return views


def put(stacks: Sequence[Tensor], values: Sequence[Tensor], index: Tensor | None) -> None:
    """Write values into stacks, in the places of an index or in all."""
    if index is None:
        torch._foreach_copy_(list(stacks), list(values))
    else:
        for stack, value in zip(stacks, values, strict=True):
            stack.index_copy_(0, index, value)
